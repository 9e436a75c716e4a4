"""The two ends of scripts/rlhf_demo.sh: preference pairs, and a report on the policies trained on them.

    python scripts/rlhf_demo.py pairs --folder output/rlhf
    python scripts/rlhf_demo.py report --folder output/rlhf

The human is a rule: a right answer beats a wrong one, and of two that are equally right or wrong the one
whose length is closer to TARGET characters wins. The demo model's own responses are nearly all shorter, and
its wrong ones mostly lack a step: a reward model learns from them that longer is better, which is true where
it was taught and false beyond. This is the length bias of real reward models, in a form in which the truth is
known.
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
from ppo_llm import DEMO

TARGET = 90  # characters that the human likes best


def utility(response: str, answer: str) -> tuple[float, int]:
    """The rule: the greater one of two is preferred."""
    return ppo_llm.score_gsm8k_strict(response, answer), -abs(len(response) - TARGET)


def load_policy() -> ppo_llm.Models:
    """The demo model, without a critic and a reference."""
    config = dataclasses.replace(DEMO, adv_estimator="reinforce_plus_plus", kl_ctrl_coef=0.0)
    return ppo_llm.build_models(transformers.AutoTokenizer.from_pretrained(config.model), config)


def load_examples() -> tuple[list, list]:
    """The demo's examples for training and for evaluation."""
    return ppo_llm.load_examples(transformers.AutoTokenizer.from_pretrained(DEMO.model), DEMO)


def sample(models: ppo_llm.Models, examples: list, config: ppo_llm.Config, *seed) -> ppo_llm.Rollout:
    """A sampled response to each example."""
    generator = ppo_llm.seeded(models.actor.model.lm.device, *seed)
    return ppo_llm.respond(models, examples, config, generator)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def pairs(
    folder: Path, prompts: int = 4000, samples: int = 4, temperature: float = 1.5, seed: int = 1
) -> None:
    """FOLDER/pairs.jsonl (rows of prompt, chosen, rejected), FOLDER/prompts.jsonl (what the policy is asked).

    A pair is the best and the worst of some samples, where the rule sees a difference.
    """
    train, _ = load_examples()
    write_rows(folder / "prompts.jsonl", [{"prompt": e.messages, "answer": e.answer} for e in train])
    examples = [example for example in train[:prompts] for _ in range(samples)]
    config = dataclasses.replace(DEMO, temperature=temperature)
    texts = sample(load_policy(), examples, config, seed, "pairs").texts
    rows = []
    for i in range(0, len(texts), samples):
        written = [text for text in texts[i : i + samples] if text.strip()]
        utilities = {text: utility(text, examples[i].answer) for text in written}
        chosen = max(utilities, key=utilities.get)
        rejected = min(utilities, key=utilities.get)
        if utilities[chosen] > utilities[rejected]:
            rows.append({"prompt": examples[i].messages, "chosen": [{"role": "assistant", "content": chosen}],
                         "rejected": [{"role": "assistant", "content": rejected}]})
    write_rows(folder / "pairs.jsonl", rows)
    print(f"{len(rows)} pairs from {len(examples) // samples} prompts, in {folder / 'pairs.jsonl'}")


def judge(
    models: ppo_llm.Models, base: ppo_llm.Models, reward, examples: list, before: list | None, seed: int
) -> tuple[dict, list]:
    """A row of the report, and the utilities of the responses.

    Of sampled responses, each with its standard error: win rate by the rule against the utilities `before`,
    reward-model score, KL to base (nats per response), length and accuracy.
    """
    rollout = sample(models, examples, DEMO, seed, "report")
    scores, _ = ppo_llm.score_responses(reward, examples, rollout.texts)
    utilities = [utility(text, e.answer) for text, e in zip(rollout.texts, examples, strict=True)]
    wins = [(a > b) + (a == b) / 2 for a, b in zip(utilities, before or utilities, strict=True)]
    base_logprobs = ppo_llm.score_tokens(base.actor.model, rollout, DEMO)["logprobs"]
    columns = {
        "win_rate": wins,
        "reward_model_score": scores.tolist(),
        "kl_per_response": (rollout.old_logprobs - base_logprobs).sum(1).tolist(),
        "characters": [len(text) for text in rollout.texts],
        "accuracy": [right for right, _ in utilities],
    }
    row = {"prompts": len(examples)}
    for name, x in columns.items():
        error = statistics.stdev(map(float, x)) / math.sqrt(len(x))
        row |= {name: round(statistics.fmean(x), 4), f"{name}_se": round(error, 4)}
    return row, utilities


def plot(table: pandas.DataFrame, path: Path) -> None:
    """Score, KL and win rate over the steps, with two standard errors."""
    figure = matplotlib.figure.Figure(figsize=(10, 3.8), layout="constrained")
    titles = {
        "reward_model_score": ("what is optimised: reward-model score", "mean score"),
        "kl_per_response": ("KL to the start", "nats per response"),
        "win_rate": ("what is wanted: win rate by the rule", "share of the responses"),
    }
    for axis, (name, (title, unit)) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for run, label in (("ppo_kl", "with KL"), ("ppo_no_kl", "without KL")):
            part = pandas.concat([table[:1], table[table.policy == run]])
            axis.errorbar(part.step, part[name], 2 * part[f"{name}_se"], label=label, capsize=2, marker=".")
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.title.set_fontsize(9)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=90)


def report(folder: Path, prompts: int = 600, seed: int = 1) -> None:
    """FOLDER/report.csv and report.png: the start and all checkpoints of FOLDER/ppo_* on held-out prompts."""
    began = time.monotonic()
    reward = ppo_llm.load_reward(dataclasses.replace(DEMO, reward=str(folder / "reward_model" / "model")))
    base = load_policy()
    models = load_policy()
    _, held_out = load_examples()
    examples = held_out[:prompts]
    start, before = judge(base, base, reward, examples, None, seed)
    rows = [{"policy": "start", "step": 0, **start}]
    for run in sorted(folder.glob("ppo_*")):
        for checkpoint in ppo_llm.checkpoints(run):
            models.actor.load(next(checkpoint.glob("actor.*")))
            row, _ = judge(models, base, reward, examples, before, seed)
            rows.append({"policy": run.name, "step": int(checkpoint.name.removeprefix("step_")), **row})
            print(" ".join(f"{name} {x}" for name, x in rows[-1].items()), flush=True)
    table = pandas.DataFrame(rows)
    table.to_csv(folder / "report.csv", index=False)
    plot(table, folder / "report.png")
    print(f"{len(rows)} policies judged on {len(examples)} prompts in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"pairs": pairs, "report": report})
