"""Runs ppo_classic.py with several seeds and makes the results table of docs/classic.md.

    python scripts/classic_seeds.py                                        # every environment, 10 seeds: hours
    python scripts/classic_seeds.py --envs CartPole-v1 Acrobot-v1 --seeds 3
    python scripts/classic_seeds.py --variant no_bootstrap --envs Pendulum-v1      # a row of the ablation table
    python scripts/classic_seeds.py --report_only                          # only the tables, from the CSVs

One row per seed goes to docs/results/classic/ENV[-VARIANT].csv as soon as the seed is done, the learning curve to
curves/; a seed that has its row is not run again. The score is the mean return of 100 evaluation episodes with frozen
statistics; last_100 is the mean of the last 100 training episodes, as CleanRL reports it.
"""

import csv
import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "classic"
BARS = {"CartPole-v1": 500, "Acrobot-v1": -80, "MountainCar-v0": -115, "Pendulum-v1": -200, "LunarLander-v3": 200,
        "HalfCheetah-v5": 1800, "Hopper-v5": 2400, "Walker2d-v5": 2500, "InvertedPendulum-v5": 950, "Swimmer-v5": 110}
VARIANTS = {  # flags that are added to the preset
    "": [],
    "no_bootstrap": ["--no_bootstrap_truncated"],
    "no_mask": ["--no_mask_dummy_rows"],
    "neither": ["--no_bootstrap_truncated", "--no_mask_dummy_rows"],
}


@dataclass
class Config:
    envs: tuple[str, ...] = tuple(BARS)  # environments, in this order
    seeds: int = 10  # seeds 1 to this
    variant: str = ""  # "", no_bootstrap, no_mask, neither
    output: Path = ROOT / "output" / "classic"  # runs go to OUTPUT/ENV[-VARIANT]/seedN
    report_only: bool = False  # run nothing


def read_rows(path: Path) -> list[dict]:
    return list(csv.DictReader(path.open())) if path.exists() else []


def run_seed(env_id: str, seed: int, name: str, config: Config) -> dict:
    """Trains and evaluates once; returns the row of the CSV and writes the learning curve, thinned to 100 points."""
    run_dir = config.output / name / f"seed{seed}"
    flags = [f"--env_id={env_id}", f"--seed={seed}", *VARIANTS[config.variant]]
    clock = time.perf_counter()
    subprocess.run([sys.executable, "-W", "ignore", str(ROOT / "ppo_classic.py"), *flags, f"--output_dir={run_dir}"],
                   check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((run_dir / "summary.json").read_text())
    curve = read_rows(run_dir / "training_metrics.csv")
    thinned = [curve[i] for i in np.unique(np.linspace(0, len(curve) - 1, 100).astype(int))]
    (RESULTS / "curves").mkdir(parents=True, exist_ok=True)
    with open(RESULTS / "curves" / f"{name}-seed{seed}.csv", "w") as file:
        file.write("global_step,return_100\n")
        file.writelines(f"{row['global_step']},{float(row['rollout/return_100']):.2f}\n" for row in thinned)
    return {"seed": seed, "score": round(summary["last_evaluation"]["eval/score"], 3),
            "standard_error": round(summary["last_evaluation"]["eval/standard_error"], 3),
            "last_100": round(float(curve[-1]["rollout/return_100"]), 3), "global_step": summary["global_step"],
            "seconds": round(time.perf_counter() - clock, 1), "torch": summary["versions"]["torch"],
            "gymnasium": summary["versions"]["gymnasium"], "machine": f"{platform.machine()}, shared",
            "command": " ".join(["python ppo_classic.py", *flags])}


def interquartile_mean(x: np.ndarray) -> np.ndarray:
    """Mean of the middle half of the last axis; a value that a quartile cuts counts in part (Agarwal et al., 2021)."""
    n = x.shape[-1]
    weights = np.clip(np.minimum(np.arange(1, n + 1), 0.75 * n) - np.maximum(np.arange(n), 0.25 * n), 0, 1)
    return (np.sort(x, -1) * weights).sum(-1) / weights.sum()


def bootstrap_interval(x: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the interquartile mean, from 10,000 resamples of the seeds."""
    resampled = np.random.default_rng(0).choice(x, (10_000, len(x)))
    low, high = np.percentile(interquartile_mean(resampled), [2.5, 97.5])
    return float(low), float(high)


def table() -> str:
    """One line per CSV: environment, seeds, mean, standard deviation, IQM with its interval, last_100, bar."""
    lines = ["| environment | seeds | score: mean ± std | IQM [95 % interval] | min, max | last 100 training episodes |"
             " bar | reached |", "|---|---|---|---|---|---|---|---|"]
    for env_id, bar in BARS.items():
        for variant in VARIANTS:
            name = f"{env_id}-{variant}" if variant else env_id
            rows = read_rows(RESULTS / f"{name}.csv")
            if not rows and variant == "":
                lines.append(f"| {env_id} | 0 | not measured | | | | {bar} | |")
            if not rows:
                continue
            score, last = (np.array([float(row[x]) for row in rows]) for x in ("score", "last_100"))
            low, high = bootstrap_interval(score)
            reached = ("yes" if score.mean() >= bar else "**NO**") if variant == "" else ""
            lines.append(
                f"| {env_id} {variant} | {len(rows)} | {score.mean():.1f} ± {score.std(ddof=min(1, len(rows) - 1)):.1f}"
                f" | {interquartile_mean(score):.1f} [{low:.1f}, {high:.1f}] | {score.min():.1f}, {score.max():.1f} |"
                f" {last.mean():.1f} | {bar} | {reached} |")
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    for env_id in () if config.report_only else config.envs:
        name = f"{env_id.replace('/', '-')}-{config.variant}" if config.variant else env_id.replace("/", "-")
        path = RESULTS / f"{name}.csv"
        for seed in range(1, config.seeds + 1):
            rows = read_rows(path)
            if any(int(row["seed"]) == seed for row in rows):
                continue
            row = run_seed(env_id, seed, name, config)
            with open(path, "a", newline="") as file:
                writer = csv.DictWriter(file, list(row), lineterminator="\n")
                if not rows:
                    writer.writeheader()
                writer.writerow(row)
            print(f"{name} seed {seed}: {row['score']} (last 100 training episodes {row['last_100']})", flush=True)
    (RESULTS / "table.md").write_text(table())
    print(table())


if __name__ == "__main__":
    main(tyro.cli(Config, use_underscores=True))
