"""The two ends of scripts/rlhf_demo.sh: preference pairs from a policy, and a report on the policies trained on them.

    python scripts/rlhf_demo.py pairs --output output/rlhf/pairs.jsonl
    python scripts/rlhf_demo.py report --folder output/rlhf

The human is a rule: a right answer beats a wrong one, and of two that are equally right or wrong the one whose length
is closer to TARGET characters wins. The demo model's own responses are nearly all shorter, and its wrong ones mostly
lack a step: a reward model learns from them that longer is better, which is true where it was taught and false beyond.
This is the length bias of real reward models, in a form in which the truth is known.
"""

import dataclasses
import json
import math
import statistics
import sys
import time
from pathlib import Path

import matplotlib.figure
import pandas
import transformers
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_llm

TARGET = 90  # characters that the human likes best


def utility(response: str, answer: str) -> tuple[float, int]:
    """The rule: the greater one of two is preferred."""
    return ppo_llm.score_gsm8k_strict(response, answer), -abs(len(response) - TARGET)


def load(config: ppo_llm.Config) -> tuple[ppo_llm.Models, list, list]:
    """A policy without critic and reference, and the examples of the demo."""
    config = dataclasses.replace(config, eval_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    return ppo_llm.build_models(tokenizer, config), *ppo_llm.load_examples(tokenizer, config)


def pairs(output: Path, prompts: int = 4000, samples: int = 4, temperature: float = 1.5, seed: int = 1) -> None:
    """Rows of prompt, chosen, rejected: the best and the worst of some samples, where the rule sees a difference."""
    config = dataclasses.replace(ppo_llm.DEMO, temperature=temperature, seed=seed)
    models, train, _ = load(config)
    examples = [e for e in train[:prompts] for _ in range(samples)]
    texts = ppo_llm.respond(models, examples, config, ppo_llm.seeded(models.actor.model.lm.device, seed, "pairs")).texts
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


def judge(models: ppo_llm.Models, base: ppo_llm.Models, reward, examples: list, before: list | None, seed: int) -> dict:
    """Win rate by the rule against the responses `before`, reward-model score, KL to base: sampled, with errors."""
    config = ppo_llm.DEMO
    rollout = ppo_llm.respond(models, examples, config, ppo_llm.seeded(models.actor.model.lm.device, seed, "report"))
    scores, _ = ppo_llm.score_responses(reward, examples, rollout.texts)
    utilities = [utility(text, e.answer) for text, e in zip(rollout.texts, examples, strict=True)]
    wins = [(a > b) + (a == b) / 2 for a, b in zip(utilities, before or utilities, strict=True)]
    kl = rollout.old_logprobs - ppo_llm.score_tokens(base.actor.model, rollout, config)[ppo_llm.LOGPROBS]
    row, columns = {"prompts": len(examples)}, {
        "win_rate": wins, "reward_model_score": scores.tolist(), "kl_per_response": kl.sum(1).tolist(),
        "characters": list(map(len, rollout.texts)), "accuracy": [right for right, _ in utilities]}
    for name, x in columns.items():
        error = statistics.stdev(map(float, x)) / math.sqrt(len(x))
        row |= {name: round(statistics.fmean(x), 4), f"{name}_se": round(error, 4)}
    return row | {"utilities": utilities}


def report(folder: Path, prompts: int = 600, seed: int = 1) -> None:
    """FOLDER/report.csv and report.png: every checkpoint of FOLDER/ppo_* on held-out prompts, beside the start."""
    config = dataclasses.replace(ppo_llm.DEMO, reward=str(folder / "reward_model" / "model"))
    reward, (base, _, evals), (models, _, _) = ppo_llm.load_reward(config), load(config), load(config)
    examples, seconds = evals[:prompts], time.monotonic()
    start = judge(base, base, reward, examples, None, seed)
    rows = [{"policy": "start", "step": 0, **start}]
    for run in sorted(folder.glob("ppo_*")):
        for checkpoint in ppo_llm.checkpoints(run):
            models.actor.load(checkpoint / "actor.safetensors")
            row = judge(models, base, reward, examples, start["utilities"], seed)
            rows.append({"policy": run.name, "step": int(checkpoint.name[5:]), **row})
            print(" ".join(f"{name} {x}" for name, x in rows[-1].items() if name != "utilities"), flush=True)
    table = pandas.DataFrame(rows).drop(columns="utilities")
    table.to_csv(folder / "report.csv", index=False)
    figure = matplotlib.figure.Figure(figsize=(10, 3.6), layout="constrained")
    titles = {"reward_model_score": "what is optimised: reward-model score", "kl_per_response": "KL to the start",
              "win_rate": "what is wanted: win rate by the human's rule"}
    for axis, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for run, label in (("ppo_kl", "with KL"), ("ppo_no_kl", "without KL")):
            part = pandas.concat([table[:1], table[table.policy == run]])
            axis.errorbar(part.step, part[name], 2 * part[f"{name}_se"], label=label, capsize=2)
        axis.set(title=title, xlabel="step")
        axis.title.set_fontsize(9)
    axis.legend()
    figure.savefig(folder / "report.png", dpi=90)
    print(f"{len(rows)} policies judged on {len(examples)} prompts in {time.monotonic() - seconds:.0f} s")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"pairs": pairs, "report": report})
