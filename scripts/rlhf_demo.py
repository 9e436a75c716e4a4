"""The two ends of scripts/rlhf_demo.sh: preference pairs from a policy, and a report on the policies trained on them.

    python scripts/rlhf_demo.py pairs --output output/rlhf/pairs.jsonl
    python scripts/rlhf_demo.py report --folder output/rlhf

The human is a rule: a right answer beats a wrong one, and of two that are equally right or wrong the one whose length
is closer to TARGET characters wins. The demo model's own responses are nearly all shorter, and its wrong ones mostly
lack a step: a reward model learns from them that longer is better, which is true where it was taught and false beyond.
This is the length bias of real reward models, in a form in which the truth is known.
"""

import csv
import dataclasses
import json
import math
import sys
from pathlib import Path

import torch
import transformers
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_llm

TARGET = 90  # characters that the human likes best


def utility(response: str, answer: str) -> tuple[float, int]:
    """The rule: the greater one of two is preferred."""
    return ppo_llm.score_gsm8k_strict(response, answer), -abs(len(response) - TARGET)


def load(model: str, config: ppo_llm.Config) -> tuple[ppo_llm.Models, list, list]:
    """A policy without critic and reference, and the examples of the demo."""
    config = dataclasses.replace(config, model=model, eval_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    return ppo_llm.build_models(tokenizer, config), *ppo_llm.load_examples(tokenizer, config)


def pairs(output: Path, prompts: int = 4000, samples: int = 4, temperature: float = 1.5, seed: int = 1) -> None:
    """Rows of prompt, chosen, rejected: the best and the worst of some samples, where the rule sees a difference."""
    config = dataclasses.replace(ppo_llm.DEMO, temperature=temperature, seed=seed)
    models, train, _ = load(config.model, config)
    examples = [e for e in train[:prompts] for _ in range(samples)]
    texts = ppo_llm.respond(models, examples, config, ppo_llm.seeded("cpu", seed, "pairs")).texts
    rows = []
    for i in range(0, len(texts), samples):
        utilities = {text: utility(text, examples[i].answer) for text in texts[i : i + samples] if text.strip()}
        chosen, rejected = max(utilities, key=utilities.get), min(utilities, key=utilities.get)
        if utilities[chosen] > utilities[rejected]:
            rows.append({"prompt": examples[i].messages, "chosen": [{"role": "assistant", "content": chosen}],
                         "rejected": [{"role": "assistant", "content": rejected}]})
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    print(f"{len(rows)} pairs from {len(examples) // samples} prompts, in {output}")


def report(folder: Path, prompts: int = 600, seed: int = 1) -> None:
    """Win rate by the rule against the start, reward-model score, KL and length of every FOLDER/*/model: report.csv."""
    config = dataclasses.replace(ppo_llm.DEMO, reward=str(folder / "reward_model" / "model"))
    reward, start = ppo_llm.load_reward(config), ppo_llm.DEMO.model
    base, _, evals = load(start, config)
    rows, before = [], None
    for name, path in [("start", start)] + [(x.parent.name, str(x)) for x in sorted(folder.glob("ppo_*/model"))]:
        models, examples = load(path, config)[0], evals[:prompts]
        rollout = ppo_llm.respond(models, examples, config, ppo_llm.seeded("cpu", seed, "report"))
        scores, _ = ppo_llm.score_responses(reward, examples, rollout.texts)
        log_ratio = rollout.old_logprobs - ppo_llm.score_tokens(base.actor.model, rollout, config)[ppo_llm.LOGPROBS]
        utilities = [utility(text, e.answer) for text, e in zip(rollout.texts, examples, strict=True)]
        before = before or utilities
        wins = torch.tensor([(a > b) + (a == b) / 2 for a, b in zip(utilities, before, strict=True)]).double()
        kl = log_ratio.sum(1)
        rows.append({
            "policy": name, "prompts": len(examples), "win_rate": wins.mean().item(),
            "win_rate_se": wins.std().item() / math.sqrt(len(wins)), "reward_model_score": scores.mean().item(),
            "reward_model_score_se": scores.std().item() / math.sqrt(len(scores)), "kl_per_response": kl.mean().item(),
            "mean_characters": sum(map(len, rollout.texts)) / len(examples),
            "strict_accuracy": sum(right for right, _ in utilities) / len(examples)})
    with open(folder / "report.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: round(x, 4) if isinstance(x, float) else x for k, x in row.items()} for row in rows)
    for row in rows:
        print(" ".join(f"{name} {x:.3f}" if isinstance(x, float) else f"{x:10}" for name, x in row.items()))


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"pairs": pairs, "report": report})
