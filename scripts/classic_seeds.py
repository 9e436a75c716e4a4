"""Runs ppo_classic.py with several seeds and makes the results tables of docs/classic.md.

    python scripts/classic_seeds.py                                        # every environment, 3 seeds: an hour or two
    python scripts/classic_seeds.py --envs CartPole-v1 Acrobot-v1 --seeds 10
    python scripts/classic_seeds.py --peer --envs HalfCheetah-v5 Hopper-v5 --seeds 3       # Stable-Baselines3 instead
    python scripts/classic_seeds.py --envs HalfCheetah-v5 Walker2d-v5 --million_steps 3
    python scripts/classic_seeds.py --report_only                          # only the tables, from the CSVs

One row per seed goes to docs/results/classic/ENV.csv as soon as the seed is done, with the commit that made it, the
learning curve to curves/; a seed that has its row is not run again. The score is the mean return of 100 evaluation
episodes with frozen statistics; last_100 is the mean of the last 100 training episodes, as CleanRL reports it. The
tables are also put into docs/classic.md. The peer (pip install stable-baselines3==2.9.2) gets our settings and steps,
and no curve. by_hand/ holds the rows that dc3ee96 and earlier commits made, with gradient and Adam written by hand, and
with two switches that are gone (no_bootstrap, no_mask).
"""

import csv
import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ppo_classic  # noqa: E402 - it is not installed

RESULTS = ROOT / "docs" / "results" / "classic"
BY_HAND = RESULTS / "by_hand"
BARS = {
    "CartPole-v1": 500,
    "Acrobot-v1": -80,
    "MountainCar-v0": -115,
    "Pendulum-v1": -200,
    "LunarLander-v3": 200,
    "HalfCheetah-v5": 1800,
    "Hopper-v5": 2400,
    "Walker2d-v5": 2500,
    "InvertedPendulum-v5": 950,
    "Swimmer-v5": 110,
}
PEER = "-stable-baselines3"  # ends the name of its CSVs
VARIANTS = ["no_bootstrap", "no_mask", "norm_obs"]  # of the runs in by_hand/


@dataclass
class Config:
    envs: tuple[str, ...] = tuple(BARS)  # environments, in this order
    seeds: int = 3  # seeds 1 to this
    million_steps: int = 0  # environment steps of a run, in millions; 0: the preset's (the tables show 0 and 3)
    peer: bool = False  # run Stable-Baselines3's PPO with the same settings (scripts/benchmark_classic.py --what peer)
    output: Path = ROOT / "output" / "classic"  # runs go to OUTPUT/ENV/seedN
    report_only: bool = False  # run nothing


def read_rows(path: Path) -> list[dict]:
    return list(csv.DictReader(path.open())) if path.exists() else []


def run_peer(env_id: str, seed: int) -> dict:
    """Trains and evaluates Stable-Baselines3's PPO once; returns the row of the CSV."""
    steps = ppo_classic.choose_preset(env_id).total_timesteps
    flags = ["--what=peer", f"--env_id={env_id}", f"--seed={seed}", f"--total_timesteps={steps}", "--eval_episodes=100"]
    clock = time.perf_counter()
    command = [sys.executable, "-W", "ignore", str(ROOT / "scripts" / "benchmark_classic.py"), *flags]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result = json.loads(printed.splitlines()[-1])
    row = {"seed": seed}
    for name in ("score", "standard_error", "last_100"):
        row[name] = round(result[name], 3)
    row["global_step"] = result["global_step"]
    row["seconds"] = round(time.perf_counter() - clock, 1)
    for name in ("torch", "gymnasium", "stable-baselines3"):
        row[name.replace("-", "_")] = version(name)
    row["machine"] = f"{platform.machine()}, shared"
    row["command"] = " ".join(["python scripts/benchmark_classic.py", *flags])
    return row


def run_seed(env_id: str, seed: int, name: str, config: Config) -> dict:
    """Trains and evaluates once; returns the row of the CSV and writes the learning curve, thinned to 100 points."""
    run_dir = config.output / name / f"seed{seed}"
    flags = [f"--env_id={env_id}", f"--seed={seed}"]
    if config.million_steps > 0:
        flags.append(f"--total_timesteps={config.million_steps}000000")
    clock = time.perf_counter()
    command = [sys.executable, "-W", "ignore", str(ROOT / "ppo_classic.py"), *flags, f"--output_dir={run_dir}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((run_dir / "summary.json").read_text())
    curve = read_rows(run_dir / "training_metrics.csv")
    (RESULTS / "curves").mkdir(parents=True, exist_ok=True)
    with open(RESULTS / "curves" / f"{name}-seed{seed}.csv", "w") as file:
        file.write("global_step,return_100\n")
        for i in np.unique(np.linspace(0, len(curve) - 1, 100).astype(int)):
            file.write(f"{curve[i]['global_step']},{float(curve[i]['rollout/return_100']):.2f}\n")
    return {
        "seed": seed,
        "score": round(summary["last_evaluation"]["eval/score"], 3),
        "standard_error": round(summary["last_evaluation"]["eval/standard_error"], 3),
        "last_100": round(float(curve[-1]["rollout/return_100"]), 3),
        "global_step": summary["global_step"],
        "seconds": round(time.perf_counter() - clock, 1),
        "commit": (summary["commit"] or "")[:7],
        "torch": summary["torch"],
        "gymnasium": summary["gymnasium"],
        "machine": f"{platform.machine()}, shared",
        "command": " ".join(["python ppo_classic.py", *flags]),
    }


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


def scores(path: Path, column: str = "score") -> dict[int, float]:
    return {int(row["seed"]): float(row[column]) for row in read_rows(path)}


def mean_and_deviation(x: np.ndarray) -> str:
    return f"{x.mean():.1f} ± {x.std(ddof=1):.1f}" if len(x) > 1 else f"{x.mean():.1f}"


def result_cells(path: Path) -> list[str]:
    """Seeds, score, IQM with its interval where there are ten seeds, smallest and largest, last 100 episodes."""
    score = np.array(list(scores(path).values()))
    if len(score) == 0:
        return ["0", "not measured", "", "", ""]
    iqm = ""
    if len(score) >= 10:
        low, high = bootstrap_interval(score)
        iqm = f"{interquartile_mean(score):.1f} [{low:.1f}, {high:.1f}]"
    last = np.mean(list(scores(path, "last_100").values()))
    return [str(len(score)), mean_and_deviation(score), iqm, f"{score.min():.1f}, {score.max():.1f}", f"{last:.1f}"]


def table() -> str:
    """Two lines per environment: the present file, and the gradient by hand; a third where 3 M steps were run."""
    lines = [
        "| environment | made by | seeds | score: mean ± std | IQM [95 % interval] | min, max | last 100 training"
        " episodes | bar |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for env_id, bar in BARS.items():
        commits = sorted({row["commit"] for row in read_rows(RESULTS / f"{env_id}.csv")})
        cells = [env_id, ", ".join(commits), *result_cells(RESULTS / f"{env_id}.csv"), str(bar)]
        lines.append(f"| {' | '.join(cells)} |")
        cells = ["", "by hand", *result_cells(BY_HAND / f"{env_id}.csv"), str(bar)]
        lines.append(f"| {' | '.join(cells)} |")
        longer = RESULTS / f"{env_id}-3M.csv"
        if longer.exists():
            commits = sorted({row["commit"] for row in read_rows(longer)})
            cells = [f"{env_id}, 3 M steps", ", ".join(commits), *result_cells(longer), ""]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def ablation() -> str:
    """One line per environment and variant, over the seeds that the variant shares with the file as it was."""
    lines = [
        "| environment | variant | seeds | score: mean ± std | as it was, same seeds | difference, seed by seed |",
        "|---|---|---|---|---|---|",
    ]
    for env_id in BARS:
        for variant in VARIANTS:
            whole = scores(BY_HAND / f"{env_id}.csv")
            changed = scores(BY_HAND / f"{env_id}-{variant}.csv")
            seeds = sorted(set(whole) & set(changed))
            if seeds:
                x = np.array([whole[seed] for seed in seeds])
                y = np.array([changed[seed] for seed in seeds])
                cells = [env_id, variant, str(len(seeds)), *map(mean_and_deviation, (y, x, y - x))]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def peers() -> str:
    """One line per environment that the peer has played, beside the rows by hand of the same seeds."""
    lines = [
        "| environment | seeds | ppo_classic.py | Stable-Baselines3 | ppo_classic.py, last 100 |"
        " Stable-Baselines3, last 100 |",
        "|---|---|---|---|---|---|",
    ]
    for env_id in BARS:
        ours = BY_HAND / f"{env_id}.csv"
        theirs = RESULTS / f"{env_id}{PEER}.csv"
        seeds = sorted(set(scores(ours)) & set(scores(theirs)))
        if seeds:
            cells = [env_id, str(len(seeds))]
            for column in ("score", "last_100"):
                for path in (ours, theirs):
                    found = scores(path, column)
                    cells.append(mean_and_deviation(np.array([found[seed] for seed in seeds])))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def insert(path: Path, name: str, text: str) -> None:
    """Puts the text between <!-- name --> and <!-- end of name -->."""
    before, rest = path.read_text().split(f"<!-- {name} -->\n")
    path.write_text(f"{before}<!-- {name} -->\n{text}<!-- end of {name} -->{rest.split(f'<!-- end of {name} -->')[1]}")


def main(config: Config) -> None:
    if config.peer and config.million_steps:
        sys.exit("error: --peer plays the steps of the preset: leave --million_steps out")
    RESULTS.mkdir(parents=True, exist_ok=True)
    for env_id in () if config.report_only else config.envs:
        name = env_id.replace("/", "-")
        if config.peer:
            name += PEER
        if config.million_steps > 0:
            name += f"-{config.million_steps}M"
        path = RESULTS / f"{name}.csv"
        for seed in range(1, config.seeds + 1):
            rows = read_rows(path)
            if any(int(row["seed"]) == seed for row in rows):
                continue
            row = run_peer(env_id, seed) if config.peer else run_seed(env_id, seed, name, config)
            with open(path, "a", newline="") as file:
                writer = csv.DictWriter(file, list(row), lineterminator="\n")
                if not rows:
                    writer.writeheader()
                writer.writerow(row)
            print(f"{name} seed {seed}: {row['score']} (last 100 training episodes {row['last_100']})", flush=True)
    for name, text in (("table", table()), ("ablation", ablation()), ("peers", peers())):
        (RESULTS / f"{name}.md").write_text(text)
        insert(ROOT / "docs" / "classic.md", name, text)
        print(text)


if __name__ == "__main__":
    main(tyro.cli(Config, use_underscores=True))
