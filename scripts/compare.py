"""PPO or GRPO? Twelve configurations at equal numbers of responses, several seeds: docs/ppo_or_grpo.md.

    python scripts/compare.py                         # builds the task, then the queue, then the report
    python scripts/compare.py --seeds 6 7 8 9 10 --only gae_lambda_1 grpo_4
    python scripts/compare.py --only grpo_4_lr_4e-4   # any name may end with _lr_RATE
    python scripts/compare.py --report_only           # tables and figures from the CSVs, runs nothing

The queue goes seed by seed, so that every seed that is done is a complete comparison. A run that has its CSV
in docs/results/compare/ is not run again: the same command continues a queue that was stopped. Each run is
what `python ppo_llm.py FLAGS` computes, in a forked process (Linux), so that the imports are paid once.

The task is the demo's, with habits of three strengths: scripts/make_demo.py goes on from assets/demo with
solutions of which 85, 95 or 99 % are spoiled, by the kind of problem. What is rarely sampled is learned late,
and the run ends before all is learned.
"""

import csv
import hashlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import gsm8k_prompts
import matplotlib.figure
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ppo_llm  # noqa: E402 - it is not installed

STEPS = 12  # of 64 responses: 768 responses a run
PRETRAINING = 3  # of the steps: what critic_warmup and the value model's own run take from the budget
EVAL_EVERY = 3
TASK = ["--base=assets/demo", "--steps=120", "--lr=5e-4", "--warmup=20", "--fault", "0.85", "0.95", "0.99",
        "--threads=1"]
COMMON = [
    "--max_response_length=64", "--ppo_mini_batch_size=16", f"--total_steps={STEPS}", "--lr=2e-4",
    "--critic_lr=3e-3", "--weight_decay=0", "--entropy_coeff=0", f"--eval_every={EVAL_EVERY}",
    "--eval_size=300", "--save_every=0"]
KL_IN_REWARD = ["--kl_ctrl_coef=0.05"]
KL_IN_LOSS = ["--use_kl_loss", "--kl_loss_type=k3+", "--kl_loss_coef=0.05"]
GAE = ["--adv_estimator=gae", "--train_batch_size=64"]
GROUPS_OF_4 = ["--rollout_n=4", "--train_batch_size=16"]
GROUPS_OF_8 = ["--rollout_n=8", "--train_batch_size=8"]
FIRST = "gae_lambda_1"  # the others are compared with it
NOT_COUNTED = ", its pre-training not counted"
CONFIGURATIONS = {
    FIRST: [*GAE, *KL_IN_REWARD],
    "gae_lambda_095": [*GAE, *KL_IN_REWARD, "--lam=0.95"],
    "gae_pretrained_critic": [*GAE, *KL_IN_REWARD],
    "gae_critic_warmup": [*GAE, *KL_IN_REWARD, f"--critic_warmup={PRETRAINING}"],
    "gae_shared_critic": [*GAE, *KL_IN_REWARD, "--critic=shared"],
    "grpo_4": ["--adv_estimator=grpo", *GROUPS_OF_4, *KL_IN_LOSS],
    "grpo_8": ["--adv_estimator=grpo", *GROUPS_OF_8, *KL_IN_LOSS],
    "rloo_4": ["--adv_estimator=rloo", *GROUPS_OF_4, *KL_IN_REWARD],
    "reinforce_plus_plus": ["--adv_estimator=reinforce_plus_plus", "--train_batch_size=64", *KL_IN_REWARD],
    "reinforce_plus_plus_baseline_4": [
        "--adv_estimator=reinforce_plus_plus_baseline", *GROUPS_OF_4, *KL_IN_REWARD],
    "gae_no_kl": [*GAE, "--kl_ctrl_coef=0"],
    "gae_kl_in_loss": [*GAE, *KL_IN_LOSS],
}
EXTRA = {  # not in a plain queue: --only names them
    "grpo_4_kl_in_reward": ["--adv_estimator=grpo", *GROUPS_OF_4, *KL_IN_REWARD],
    "control_lr0": [*GAE, *KL_IN_REWARD, "--lr=0"],
    "control_permuted": [*GAE, *KL_IN_REWARD, "--reward=scripts/rewards/permuted.py:reward"],
}
COLUMNS = (
    "step", "generated_tokens", "eval/score", "reward/score", "reward/kl", "value/explained_variance",
    "seconds")
# Quantiles of Student's t for 1, 2, 3 ... degrees of freedom: two-sided 95 %, and 99.5 % (eleven comparisons)
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
T_995 = (127.32, 14.089, 7.453, 5.598, 4.773, 4.317, 4.029, 3.833, 3.690)
PHASES = ("time/rollout", "time/score", "time/update_critic", "time/update_actor")


@dataclass
class Config:
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # seeds, in this order
    only: tuple[str, ...] = tuple(CONFIGURATIONS)  # names of configurations
    jobs: int = 1  # runs at a time
    report_only: bool = False  # run nothing
    output: Path = Path("output/compare")  # the task and the runs' folders, relative to the repository
    results: Path = ROOT / "docs" / "results" / "compare"  # CSVs, tables and figures
    document: Path = ROOT / "docs" / "ppo_or_grpo.md"  # its table is put in again


def split_name(name: str) -> tuple[str, str]:
    """grpo_4_lr_4e-4 -> (grpo_4, 4e-4); the rate is empty where it is that of COMMON."""
    base, _, rate = name.partition("_lr_")
    return base, rate


def commands(name: str, seed: int, config: Config) -> list[list[str]]:
    """The flags of the runs of ppo_llm.py that a configuration consists of: the last one is judged."""
    task = config.output / "task"
    if name == "control_permuted":
        task = config.output / "prompts"
    folder = config.output / f"{name}-seed{seed}"
    start = [f"--model={config.output / 'task'}", f"--dataset={task / 'train.jsonl'}",
             f"--eval_dataset={task / 'test.jsonl'}"]
    base, rate = split_name(name)
    flags = [*start, *COMMON, *({**CONFIGURATIONS, **EXTRA}[base])]
    if rate:
        flags.append(f"--lr={rate}")
    judged = [*flags, f"--seed={seed}", f"--output_dir={folder}"]
    if base != "gae_pretrained_critic":
        return [judged]
    # Another seed, so that the critic has not seen the prompts of the run that it is for
    critic_only = [*flags, "--lr=0", f"--total_steps={PRETRAINING}", "--critic_ppo_epochs=4",
                   "--eval_every=0", f"--seed={seed + 1000}", f"--output_dir={folder}-critic"]
    return [critic_only, [*judged, f"--critic_model={folder}-critic/critic"]]


def option(flags: list[str], name: str) -> str:
    """The value of a flag, the last one if it is given twice."""
    return [flag for flag in flags if flag.startswith(f"--{name}=")][-1].split("=", 1)[1]


def result_path(name: str, seed: int, config: Config) -> Path:
    return config.results / f"{name}-seed{seed}.csv"


def queue(config: Config) -> list[tuple[str, int]]:
    """What has not been run yet, seed by seed."""
    todo = []
    for seed in config.seeds:
        todo += [(name, seed) for name in config.only if not result_path(name, seed, config).exists()]
    return todo


def prepare(config: Config) -> None:
    """Builds the task, and the prompts of the permuted control, where they do not exist."""
    task = config.output / "task"
    if not (task / "test.jsonl").exists():
        subprocess.run([sys.executable, "scripts/make_demo.py", *TASK, f"--out={task}"], check=True)
    gsm8k_prompts.main(task, config.output / "prompts")


def read_rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def shorten(rows: list[dict], responses: int, tokens: float = 0.0, seconds: float = 0.0) -> list[dict]:
    """Rows of training_metrics.csv -> those of a result: tokens and seconds are summed up from a start."""
    short = []
    for row in rows:
        if row["rollout/response_length"]:
            tokens += float(row["rollout/response_length"]) * responses
            seconds += sum(float(row.get(name) or 0) for name in PHASES)
        kept = {name: row.get(name, "") for name in COLUMNS}
        kept["generated_tokens"] = round(tokens)
        kept["seconds"] = round(seconds, 2)
        short.append(kept)
    return short


def run_here(flags: list[str], log: Path) -> None:
    """ppo_llm.py in this process, which is a fork and ends with it."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["ppo_llm.py", *flags]
    sys.exit(ppo_llm.start())


def run_job(name: str, seed: int, config: Config) -> None:
    """All runs of a configuration with a seed; writes its CSV, and what it took to the JSON file beside."""
    clock = time.perf_counter()
    rows = []
    tokens = seconds = 0.0
    todo = commands(name, seed, config)
    for flags in todo:
        folder = Path(option(flags, "output_dir"))
        shutil.rmtree(folder, ignore_errors=True)  # of a queue that was stopped
        folder.parent.mkdir(parents=True, exist_ok=True)
        process = multiprocessing.get_context("fork").Process(
            target=run_here, args=(flags, folder.parent / f"{folder.name}.log"))
        process.start()
        process.join()
        if process.exitcode != 0:
            sys.exit(f"{name} seed {seed} failed: {folder}.log says why")
        responses = int(option(flags, "train_batch_size"))
        if any(flag.startswith("--rollout_n=") for flag in flags):
            responses *= int(option(flags, "rollout_n"))
        rows = shorten(read_rows(folder / "training_metrics.csv"), responses, tokens, seconds)
        tokens = rows[-1]["generated_tokens"]
        seconds = rows[-1]["seconds"]
    weights = (config.output / "task" / "model.safetensors").read_bytes()
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    summary = json.loads((folder / "summary.json").read_text())
    path = result_path(name, seed, config)
    note = {
        "commands": [shlex.join(["python", "ppo_llm.py", *flags]) for flags in todo],
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "wall_seconds": round(time.perf_counter() - clock, 1),
        "commit": summary["commit"],
        "machine": summary["machine"],
        "versions": summary["versions"],
        "start_weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    path.with_suffix(".json").write_text(json.dumps(note, indent=2) + "\n")
    unfinished = path.with_suffix(".part")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    unfinished.rename(path)  # a result is whole or not there
    for kind in ("model", "critic", "checkpoints"):
        if kind != "critic" or len(todo) == 1:
            shutil.rmtree(folder / kind, ignore_errors=True)
    print(f"{name} seed {seed}: {rows[-1]['eval/score']}, {note['cpu_seconds']} s of CPU", flush=True)


def count_failures(running: list, ended: list[int]) -> int:
    """How many of the processes whose sentinels are given have failed."""
    failed = 0
    for process in running:
        if process.sentinel in ended:
            process.join()
            failed += process.exitcode != 0
    return failed


def run_queue(config: Config) -> int:
    """Runs what is left, config.jobs at a time. Returns how many failed."""
    todo = queue(config)
    running = []
    failed = 0
    while todo or running:
        while todo and len(running) < config.jobs:
            job = todo.pop(0)
            if not result_path(*job, config).exists():  # another queue may have made it meanwhile
                process = multiprocessing.get_context("fork").Process(target=run_job, args=(*job, config))
                process.start()
                running.append(process)
        if running:
            ended = multiprocessing.connection.wait([process.sentinel for process in running])
            failed += count_failures(running, ended)
            running = [process for process in running if process.sentinel not in ended]
    return failed


# ---- Statistics ------------------------------------------------------------------------------------------


def interquartile_mean(x: np.ndarray) -> np.ndarray:
    """Mean of the middle half of the last axis; a value that a quartile cuts counts in part.

    Agarwal et al. 2021, "Deep reinforcement learning at the edge of the statistical precipice".
    """
    n = x.shape[-1]
    edges = np.arange(n + 1)
    inside = np.minimum(edges[1:], 0.75 * n) - np.maximum(edges[:-1], 0.25 * n)
    weights = np.clip(inside, 0, 1)
    return (np.sort(x, -1) * weights).sum(-1) / weights.sum()


def bootstrap_band(x: np.ndarray) -> tuple[float, float]:
    """95 % percentile band of the interquartile mean, from 10,000 resamples of the seeds.

    The strata of Agarwal et al. are tasks; with one task there is one.
    """
    resampled = np.random.default_rng(0).choice(x, (10_000, len(x)))
    low, high = np.percentile(interquartile_mean(resampled), [2.5, 97.5])
    return float(low), float(high)


def difference_interval(x: np.ndarray, quantiles: tuple[float, ...]) -> tuple[float, float]:
    """Student's interval of the mean of differences, seed by seed; infinitely wide for one seed."""
    if len(x) < 2:
        return -math.inf, math.inf
    half = quantiles[len(x) - 2] * x.std(ddof=1) / math.sqrt(len(x))
    return float(x.mean() - half), float(x.mean() + half)


# ---- Report ----------------------------------------------------------------------------------------------


def measure(rows: list[dict], last_step: int) -> dict[str, float]:
    """What one run shows up to a step: greedy scores, sampled score and KL of the last three steps.

    on_the_way is the mean of the last four evaluations: where the critic was trained beforehand, this
    includes the one that the run started from.
    """
    within = [row for row in rows if int(row["step"]) <= last_step]
    evaluations = [float(row["eval/score"]) for row in within if row["eval/score"]]
    steps = [row for row in within if row["reward/score"]][-3:]
    return {
        "generated_tokens": float(within[-1]["generated_tokens"]),
        "start": evaluations[0],
        "end": evaluations[-1],
        "on_the_way": float(np.mean(evaluations[-4:])),
        "sampled": float(np.mean([float(row["reward/score"]) for row in steps])),
        "kl": float(np.mean([float(row["reward/kl"] or math.nan) for row in steps])),  # NaN: not computed
    }


def measured(config: Config) -> dict[str, dict[int, dict[str, float]]]:
    """Name -> seed -> what the run shows, with its CPU seconds. A value model of one's own has two rows."""
    found = {}
    for path in sorted(config.results.glob("*-seed*.csv")):
        name, seed = path.stem.split("-seed")
        note = json.loads(path.with_suffix(".json").read_text())
        rows = read_rows(path)
        took = {"cpu_seconds": note["cpu_seconds"]}
        last_step = STEPS
        if name.startswith("gae_pretrained_critic"):
            last_step = STEPS - PRETRAINING
            found.setdefault(name + NOT_COUNTED, {})[int(seed)] = measure(rows, STEPS) | took
        found.setdefault(name, {})[int(seed)] = measure(rows, last_step) | took
    return found


def in_order(found: dict) -> list[str]:
    """The names in the order of the tables: the configurations, what was found beside them, the controls."""
    others = sorted(name for name in found if name not in {**CONFIGURATIONS, **EXTRA})
    return [*CONFIGURATIONS, *others, *EXTRA]


def column(runs: dict[int, dict[str, float]], name: str) -> np.ndarray:
    return np.array([runs[seed][name] for seed in sorted(runs)])


def compare_with_first(runs: dict, first: dict, name: str) -> list[str]:
    """Difference to the first configuration over the seeds that both have, its interval, and the verdict."""
    seeds = sorted(set(runs) & set(first))
    differences = np.array([runs[seed][name] - first[seed][name] for seed in seeds])
    if len(differences) < 2 or runs is first:
        return ["", ""]
    low, high = difference_interval(differences, T_95)
    strict_low, strict_high = difference_interval(differences, T_995)
    verdict = "no"
    if len(differences) == 2:
        return [f"{differences.mean():+.3f}", "two seeds only"]
    if low > 0 or high < 0:
        verdict = "at 95 % only"
    if strict_low > 0 or strict_high < 0:
        verdict = "**yes**"
    return [f"{differences.mean():+.3f} [{low:+.3f}, {high:+.3f}]", verdict]


def table(found: dict) -> str:
    """One line per configuration (Markdown)."""
    columns = [
        "configuration", "seeds", "generated tokens", "end: IQM [95 % band]",
        "difference to the first [95 %]", "told apart", "on the way: IQM [95 % band]",
        "difference to the first [95 %]", "told apart",
        "sampled: IQM [95 % band]", "KL per token", "CPU seconds"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for name in in_order(found):
        runs = found.get(name, {})
        if not runs:
            lines.append(f"| {name} | 0 | not measured {'| ' * (len(columns) - 3)}|")
            continue
        rate = split_name(name.split(",")[0])[1]
        first = found.get(f"{FIRST}_lr_{rate}" if rate else FIRST, {})
        cells = [name, str(len(runs)), f"{column(runs, 'generated_tokens').mean():,.0f}"]
        for metric in ("end", "on_the_way", "sampled"):
            x = column(runs, metric)
            low, high = bootstrap_band(x)
            cells.append(f"{interquartile_mean(x):.3f} [{low:.3f}, {high:.3f}]")
            if metric != "sampled":
                cells += compare_with_first(runs, first, metric)
        kl = column(runs, "kl").mean()
        cells += ["not computed" if math.isnan(kl) else f"{kl:.4f}"]
        cells += [f"{column(runs, 'cpu_seconds').mean():.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_summary(found: dict, path: Path) -> None:
    """One row per configuration and seed."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = ["generated_tokens", "start", "end", "on_the_way", "sampled", "kl", "cpu_seconds"]
        writer.writerow(["configuration", "seed", *names])
        for name, runs in found.items():
            for seed in sorted(runs):
                writer.writerow([name, seed, *[round(runs[seed][x], 5) for x in names]])


def curves(name: str, config: Config) -> list[tuple[np.ndarray, np.ndarray]]:
    """Generated tokens (thousands) and greedy score of each seed."""
    found = []
    for path in sorted(config.results.glob(f"{name}-seed*.csv")):
        rows = [row for row in read_rows(path) if row["eval/score"]]
        tokens = np.array([float(row["generated_tokens"]) / 1000 for row in rows])
        found.append((tokens, np.array([float(row["eval/score"]) for row in rows])))
    return found


def mean_curve(found: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.mean([x for x, _ in found], axis=0)
    return tokens, np.mean([y for _, y in found], axis=0)


def draw(found: dict, config: Config) -> None:
    """curves.png: a panel per configuration, each seed a thin line, the mean of the first in grey."""
    figure = matplotlib.figure.Figure(figsize=(14, 9), layout="constrained")
    axes = figure.subplots(3, 4, sharex=True, sharey=True)
    first = curves(FIRST, config)
    for axis, name in zip(axes.flat, CONFIGURATIONS, strict=True):
        seeds = curves(name, config)
        if first:
            axis.plot(*mean_curve(first), color="0.6", linewidth=4)
        for tokens, score in seeds:
            axis.plot(tokens, score, color="tab:blue", linewidth=0.8)
        if seeds:
            axis.plot(*mean_curve(seeds), color="tab:blue", linewidth=2.5)
        axis.set_title(f"{name} ({len(seeds)} seeds)", fontsize=10)
        axis.set_ylim(0, 1)
    figure.supxlabel("generated tokens, thousands")
    figure.supylabel("greedy score on held-out problems")
    figure.savefig(config.results / "curves.png", dpi=90)


def draw_ends(found: dict, config: Config) -> None:
    """ends.png: a line per configuration: the interquartile mean, its band, a dot for each seed."""
    names = [name for name in in_order(found) if name in found]
    figure = matplotlib.figure.Figure(figsize=(12, 0.27 * len(names) + 0.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"end": "greedy score at the end", "on_the_way": "greedy score on the way"}
    for axis, (metric, title) in zip(panels, titles.items(), strict=True):
        for y, name in enumerate(names):
            x = column(found[name], metric)
            axis.plot(bootstrap_band(x), [y, y], color="0.6", linewidth=6, solid_capstyle="butt")
            axis.plot(x, np.full(len(x), y), "o", color="tab:blue", markersize=4)
            axis.plot(interquartile_mean(x), y, "|", color="black", markersize=16, markeredgewidth=2)
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.savefig(config.results / "ends.png", dpi=90)


def last_change(commit: str) -> str:
    """The commit that ppo_llm.py had last been changed by; the same commit where git does not know it."""
    git = ["git", "log", "-1", "--format=%h", commit, "--", "ppo_llm.py"]
    done = subprocess.run(git, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() or commit[:7]


def origin(config: Config) -> str:
    """One line on where the runs come from: commits, machine, versions, weights, commands."""
    notes = [json.loads(path.read_text()) for path in sorted(config.results.glob("*-seed*.json"))]
    commits = ", ".join(sorted({last_change(commit) for commit in {note["commit"] for note in notes}}))
    machines = ", ".join(sorted({note["machine"] for note in notes}))
    versions = ", ".join(sorted({f"torch {note['versions']['torch']}" for note in notes}))
    weights = ", ".join(sorted({note["start_weights_sha256"][:12] for note in notes}))
    return (
        f"{len(notes)} runs with ppo_llm.py of commit {commits}; {machines}; {versions}; all start from the"
        f" weights with SHA-256 {weights}. [Every command](results/compare/commands.md), seeds in the file"
        " names.\n")


def list_commands(config: Config) -> str:
    """The commands with seed 1 (Markdown); a configuration of two runs has two."""
    lines = ["# The commands of scripts/compare.py, with seed 1", "", "The task is made by", "", "```",
             shlex.join(["python", "scripts/make_demo.py", *TASK, f"--out={Config.output / 'task'}"]), "```"]
    names = {path.stem.split("-seed")[0] for path in config.results.glob("*-seed*.csv")}
    for name in in_order(dict.fromkeys(names)):
        lines += ["", f"## {name}", "", "```"]
        lines += [shlex.join(["python", "ppo_llm.py", *flags]) for flags in commands(name, 1, Config())]
        lines.append("```")
    return "\n".join(lines) + "\n"


def insert(path: Path, text: str) -> None:
    """Puts the text between <!-- table --> and <!-- end of table -->."""
    before, rest = path.read_text().split("<!-- table -->\n")
    after = rest.split("<!-- end of table -->")[1]
    path.write_text(f"{before}<!-- table -->\n{text}<!-- end of table -->{after}")


def report(config: Config) -> str:
    """Writes summary, tables, figures and the document's table from the CSVs; returns the table."""
    found = measured(config)
    write_summary(found, config.results / "summary.csv")
    text = f"{table(found)}\n{origin(config)}"
    (config.results / "table.md").write_text(text)
    (config.results / "commands.md").write_text(list_commands(config))
    insert(config.document, text)
    if found:
        draw(found, config)
        draw_ends(found, config)
    return text


def main(config: Config) -> None:
    os.chdir(ROOT)
    config.results.mkdir(parents=True, exist_ok=True)
    unknown = [name for name in config.only if split_name(name)[0] not in {**CONFIGURATIONS, **EXTRA}]
    if unknown:
        sys.exit(f"no configuration {unknown[0]}: choose from {', '.join([*CONFIGURATIONS, *EXTRA])}")
    failed = 0
    if not config.report_only:
        prepare(config)
        failed = run_queue(config)
    print(report(config))
    if failed:
        sys.exit(f"{failed} runs failed")


if __name__ == "__main__":
    main(tyro.cli(Config, use_underscores=True))
