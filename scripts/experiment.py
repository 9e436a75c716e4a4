"""Runs ppo_llm.py several times and turns the runs into a table, a figure and CSVs in docs/results/NAME.

    python scripts/experiment.py demo       # 5 seeds and four controls, about 15 minutes
    python scripts/experiment.py timing     # the demo once, with nothing else on the machine: minutes and memory
    python scripts/experiment.py kl         # adaptive KL with two targets beside fixed, about 15 minutes
    python scripts/experiment.py format --gsm8k_dir DIR    # real GSM8K questions, a format reward, about 5 minutes
    python scripts/experiment.py gsm8k --gsm8k_dir DIR     # real GSM8K, the strict reward, about 3 minutes

A run that has finished is not repeated; `--report_only` only reads the CSVs. The exit code is 1 if a bar is missed.
"""

import csv
import json
import math
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import gsm8k_prompts
import matplotlib
import plot
import tyro

ROOT = Path(__file__).resolve().parents[1]
KL_TARGETS = (0.005, 0.012)  # per token
TITLES = {
    "demo": "The bundled demo",
    "timing": "The bundled demo, with nothing else on the machine",
    "kl": "Adaptive KL control",
    "format": "A reward for the layout, on real GSM8K questions",
    "gsm8k": "GSM8K's strict reward, a model of 1 M parameters",
}


@dataclass
class Config:
    name: Annotated[Literal["demo", "timing", "kl", "format", "gsm8k"], tyro.conf.Positional]  # which experiment
    gsm8k_dir: Path = Path("data/gsm8k")  # folder with the published train.jsonl and test.jsonl
    output: Path = ROOT / "output"  # runs go to OUTPUT/NAME/RUN
    report_only: bool = False  # run nothing, only read docs/results/NAME


def data(folder: Path) -> list[str]:
    return [f"--dataset={folder / 'train.jsonl'}", f"--eval_dataset={folder / 'test.jsonl'}"]


def prompts_folder(config: Config) -> Path:
    """Where the questions are that have the instruction already: with other rewards ppo_llm.py adds none."""
    return config.output / "prompts" / config.name


def experiments(config: Config) -> dict[str, list[str]]:
    """Run name -> the flags of ppo_llm.py."""
    real = data(config.gsm8k_dir)
    prompts = data(prompts_folder(config))
    permuted = [*prompts, "--reward=scripts/rewards/permuted.py:reward"]
    layout = [*prompts, "--reward=scripts/rewards/format.py:reward", "--lr=1e-4", "--train_batch_size=64",
              "--ppo_epochs=1", "--ppo_mini_batch_size=8", "--kl_ctrl_coef=0", "--total_steps=60", "--eval_every=60"]
    steered = ["--lr=1e-4", "--kl_ctrl_coef=0.3", "--total_steps=60", "--eval_every=30"]
    adaptive = [*steered, "--kl_ctrl_type=adaptive", "--kl_ctrl_horizon=150"]
    return {
        "demo": {
            **{f"seed{seed}": [f"--seed={seed}"] for seed in range(1, 6)},
            "control_permuted": permuted,
            **{f"control_permuted_seed{seed}": [*permuted, f"--seed={seed}"] for seed in (2, 3)},
            "control_lr0": ["--lr=0", "--critic_lr=0"],
        },
        "timing": {"demo": []},
        "kl": {
            **{f"target_{target}": [*adaptive, f"--kl_ctrl_target={target}"] for target in KL_TARGETS},
            "fixed": steered,
        },
        "format": {"format": layout},
        "gsm8k": {"gsm8k": [*real, "--total_steps=10"]},
    }[config.name]


def run(name: str, flags: list[str], config: Config, results: Path) -> None:
    """One run of ppo_llm.py; copies its CSV, and notes what it took, in results/NAME.csv and NAME.json."""
    folder = config.output / config.name / name
    started = time.perf_counter()
    subprocess.run([sys.executable, "ppo_llm.py", *flags, f"--output_dir={folder}"], check=True, cwd=ROOT)
    minutes = (time.perf_counter() - started) / 60
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.csv").write_text((folder / "training_metrics.csv").read_text())
    command = " ".join(["python ppo_llm.py", *flags])
    command = command.replace(str(config.gsm8k_dir), "$GSM8K_DIR").replace(f"{config.output}/", "output/")
    note = {
        "command": command,
        "minutes": round(minutes, 2),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2),
        "versions": json.loads((folder / "summary.json").read_text())["versions"],
    }
    (results / f"{name}.json").write_text(json.dumps(note, indent=2) + "\n")


def column(rows: list[dict], name: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]


def verdict(experiment: str, run_name: str, evals: list, error: float, late_kl: float) -> str:
    """The bar that the run has to take, and whether it does."""
    first, last = evals[0][1], evals[-1][1]
    if run_name.startswith("control"):
        bar, taken = f"within 2 standard errors ({2 * error:.3f})", abs(last - first) <= 2 * error
    elif run_name.startswith("target"):
        target = float(run_name.split("_")[1])
        bar, taken = f"KL within 30 % of {target}", abs(late_kl / target - 1) <= 0.3
    elif experiment == "format":
        bar, taken = "from at most 0.4 to at least 0.9", first <= 0.4 and last >= 0.9
    elif experiment == "demo":
        bar, taken = "gain of at least 0.2", last - first >= 0.2
    else:
        return "none"
    return f"{bar}: {'yes' if taken else '**NO**'}"


def report(experiment: str, results: Path) -> str:
    """The table (Markdown) of all runs in results, and results/curves.png."""
    lines = ["| run | start | end | gain | bar | KL per token, second half | minutes | peak GiB | command |",
             "|---|---|---|---|---|---|---|---|---|"]
    for path in sorted(results.glob("*.csv")):
        with path.open() as file:
            rows = list(csv.DictReader(file))
        note = json.loads(path.with_suffix(".json").read_text())
        evals = column(rows, "eval/score")
        kl = column(rows, "reward/kl")
        (_, first), (_, last) = evals[0], evals[-1]
        errors = [error for _, error in column(rows, "eval/standard_error")]
        late = [x for step, x in kl if step > len(kl) / 2]
        late_kl = sum(late) / len(late) if late else math.nan
        shown_kl = f"{late_kl:.4f}" if late else "no KL"
        cells = (path.stem, f"{first:.3f} ± {errors[0]:.3f}", f"{last:.3f} ± {errors[-1]:.3f}", f"{last - first:+.3f}",
                 verdict(experiment, path.stem, evals, errors[0], late_kl), shown_kl, note["minutes"],
                 note["peak_memory_gib"] or "not measured", f"`{note['command']}`")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    draw_curves(experiment, results)
    (results / "table.md").write_text("\n".join(lines) + "\n")
    return "\n".join(lines)


def draw_curves(experiment: str, results: Path) -> None:
    """results/curves.png: the seeds of one kind of run are one curve."""
    labels = {"seed": "PPO", "control_permuted": "control: scores permuted", "control_lr0": "control: learning rate 0"}
    groups = {}
    for path in sorted(results.glob("*.csv"), key=lambda path: path.stem.startswith("control")):
        found = [label for beginning, label in labels.items() if path.stem.startswith(beginning)]
        label = found[0] if found else path.stem.replace("_", " ")
        groups.setdefault(label, []).append(plot.read_run(path))
    metrics = ["eval/score", "reward/kl", "reward/kl_coef" if experiment == "kl" else "reward/score"]
    with matplotlib.rc_context(plot.STYLE):
        figure = plot.draw_comparison(groups, metrics, TITLES[experiment])
        for target in KL_TARGETS if experiment == "kl" else ():
            figure.axes[1].axhline(target, color="grey", linewidth=0.8, linestyle=":")
        figure.savefig(results / "curves.png", dpi=110)


def main(config: Config) -> None:
    results = ROOT / "docs" / "results" / config.name
    if config.name in ("demo", "format") and not config.report_only:
        questions = ROOT / "assets" / "demo" if config.name == "demo" else config.gsm8k_dir
        gsm8k_prompts.main(questions, prompts_folder(config))
    for name, flags in experiments(config).items():
        if not config.report_only and not (results / f"{name}.json").exists():
            run(name, flags, config, results)
    table = report(config.name, results)
    print(table)
    sys.exit("**NO**" in table)


if __name__ == "__main__":
    main(tyro.cli(Config, use_underscores=True))
