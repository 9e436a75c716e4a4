"""Runs ppo_llm.py several times and turns the runs into a table, a figure and CSVs in docs/results/NAME.

    python scripts/experiment.py demo       # 5 seeds and two controls, about 35 minutes on 2 cores
    python scripts/experiment.py kl         # adaptive KL against fixed, about 20 minutes
    python scripts/experiment.py format     # real GSM8K questions with a format reward, about 10 minutes
    python scripts/experiment.py gsm8k      # real GSM8K with the strict reward, about 15 minutes

A run that has finished is not repeated. `--report_only True` makes table and figure from the CSVs that are there.
`format` and `gsm8k` read train.jsonl and test.jsonl from --gsm8k_dir.
"""

import csv
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import matplotlib.figure
import tyro

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Config:
    name: Annotated[Literal["demo", "kl", "format", "gsm8k"], tyro.conf.Positional]  # which experiment
    gsm8k_dir: Path = Path("data/gsm8k")  # folder with the published train.jsonl and test.jsonl
    output: Path = ROOT / "output"  # runs go to OUTPUT/NAME/RUN
    report_only: bool = False  # run nothing, only read docs/results/NAME


def experiments(config: Config) -> dict[str, list[str]]:
    """Run name -> the flags of ppo_llm.py."""
    real = [f"--dataset={config.gsm8k_dir / 'train.jsonl'}", f"--eval_dataset={config.gsm8k_dir / 'test.jsonl'}"]
    small = ["--lr=1e-4", "--train_batch_size=64", "--ppo_mini_batch_size=16", "--eval_every=20"]
    adaptive = ["--kl_ctrl_type=adaptive", "--kl_ctrl_horizon=300", "--kl_ctrl_coef=0.3", "--eval_every=30"]
    return {
        "demo": {
            **{f"seed{seed}": [f"--seed={seed}"] for seed in range(1, 6)},
            "control_permuted": ["--reward=scripts/rewards/permuted.py:reward"],
            "control_lr0": ["--lr=0", "--critic_lr=0"],
        },
        "kl": {
            "fixed": ["--kl_ctrl_coef=0.3", "--eval_every=30"],
            "target_0.005": [*adaptive, "--kl_ctrl_target=0.005"],
            "target_0.012": [*adaptive, "--kl_ctrl_target=0.012"],
        },
        "format": {"format": [*real, "--reward=scripts/rewards/format.py:reward", *small]},
        "gsm8k": {"gsm8k": [*real, "--total_steps=10"]},
    }[config.name]


def run(name: str, flags: list[str], config: Config, results: Path) -> None:
    """One run of ppo_llm.py; copies its CSV, and notes what it took, in results/NAME.csv and NAME.json."""
    folder = config.output / config.name / name
    command = ["ppo_llm.py", *flags, f"--output_dir={folder}"]
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
    minutes = (time.perf_counter() - started) / 60
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.csv").write_text((folder / "training_metrics.csv").read_text())
    versions = json.loads((folder / "summary.json").read_text())["versions"]
    shown = " ".join(["python ppo_llm.py", *flags]).replace(str(config.gsm8k_dir), "$GSM8K_DIR")
    note = {"command": shown, "minutes": round(minutes, 2), "versions": versions}
    (results / f"{name}.json").write_text(json.dumps(note, indent=2) + "\n")


def report(name: str, results: Path) -> str:
    """The table (Markdown) of all runs in results, and results/curves.png. Columns: first and last evaluation, KL."""
    figure = matplotlib.figure.Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines = ["| run | start | end | gain | KL per token, mean of the second half | command |",
             "|---|---|---|---|---|---|"]
    for path in sorted(results.glob("*.csv")):
        rows, note = list(csv.DictReader(path.open())), json.loads(path.with_suffix(".json").read_text())
        evals = [(int(r["step"]), *(float(r[k]) for k in ("eval/score", "eval/standard_error"))) for r in rows
                 if r["eval/score"]]
        kl = [(int(r["step"]), float(r["reward/kl"])) for r in rows if r["reward/kl"]]
        late = [x for step, x in kl if step > len(kl) / 2]
        style = "--" if path.stem.startswith("control") else "-"
        left.plot([e[0] for e in evals], [e[1] for e in evals], style, label=path.stem)
        right.plot([step for step, _ in kl], [x for _, x in kl], style, label=path.stem)
        (_, first, first_se), (_, last, last_se) = evals[0], evals[-1]
        lines.append(f"| {path.stem} | {first:.3f} ± {first_se:.3f} | {last:.3f} ± {last_se:.3f} | {last - first:+.3f}"
                     f" | {sum(late) / max(len(late), 1):.4f} | `{note['command']}` |")
    left.set(title="greedy held-out score", xlabel="step", ylim=(0, 1))
    right.set(title="KL(policy, reference) per token", xlabel="step")
    left.legend()
    figure.savefig(results / "curves.png", dpi=90)
    table = "\n".join(lines) + "\n"
    (results / "table.md").write_text(table)
    return table


def main(config: Config) -> None:
    results = ROOT / "docs" / "results" / config.name
    for name, flags in experiments(config).items():
        if not config.report_only and not (results / f"{name}.json").exists():
            run(name, flags, config, results)
    print(report(config.name, results))


if __name__ == "__main__":
    main(tyro.cli(Config, use_underscores=True))
