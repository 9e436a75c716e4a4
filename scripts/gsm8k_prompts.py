"""GSM8K questions with the instruction that only `--reward gsm8k` adds, for runs with another reward.

    python scripts/gsm8k_prompts.py --source assets/demo --target output/prompts
    python ppo_llm.py --dataset output/prompts/train.jsonl --eval_dataset output/prompts/test.jsonl \
        --reward scripts/rewards/permuted.py:reward

train.jsonl and test.jsonl of SOURCE (question, answer) become those of TARGET (prompt, answer).
"""

import json
import sys
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ppo_llm import GSM8K_INSTRUCTION


def main(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in ("train.jsonl", "test.jsonl"):
        lines = []
        for line in (source / name).read_text(encoding="utf-8").strip().split("\n"):
            row = json.loads(line)
            prompt = f"{row['question']} {GSM8K_INSTRUCTION}"
            lines.append(json.dumps({"prompt": prompt, "answer": row["answer"]}))
        (target / name).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
