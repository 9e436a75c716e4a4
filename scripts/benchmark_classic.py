"""Speed of ppo_classic.py beside Stable-Baselines3's PPO: same environment, settings, seeds and threads, in one run.

    pip install stable-baselines3==2.9.2
    python scripts/benchmark_classic.py                     # both tasks, whole runs taken in turn: about an hour
    python scripts/benchmark_classic.py --runs 1 --scale 0.1        # a tenth of the steps, to look at
    python scripts/benchmark_classic.py --what scaling      # steps per second with 1 to 1024 environments
    python scripts/benchmark_classic.py --what report       # benchmark.md again, from benchmark.csv

`whole` is from process start to exit (imports, training, figures, checkpoint; no evaluation, which the peer does not
make either); `steady` leaves out the first tenth of the training. Peers alternate, and ratios are taken run by run.
Writes docs/results/classic/benchmark.csv, benchmark.md and scaling.csv. Nothing else should run on the machine.
"""

import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "classic"
sys.path.insert(0, str(ROOT))
TASKS = {"CartPole-v1": 500_000, "HalfCheetah-v5": 300_000}  # environment: steps; the settings are its preset


@dataclass
class Config:
    what: Literal["speed", "scaling", "report", "peer"] = "speed"  # peer is what speed starts for Stable-Baselines3
    envs: tuple[str, ...] = tuple(TASKS)  # environments of speed
    runs: int = 3  # pairs of runs per environment
    scale: float = 1.0  # part of the steps
    env_id: str = "CartPole-v1"  # of peer
    total_timesteps: int = 500_000  # of peer
    seed: int = 1  # of peer
    eval_episodes: int = 0  # of peer: greedy episodes with frozen statistics after the training


def peer(config: Config) -> None:
    """Stable-Baselines3's PPO with the settings that ppo_classic.py chooses for the environment."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecNormalize

    import ppo_classic

    class Clock(BaseCallback):
        times = []

        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            self.times.append((time.perf_counter(), self.num_timesteps))

    torch.set_num_threads(1)
    c = ppo_classic.choose_preset(config.env_id)
    envs = make_vec_env(config.env_id, c.num_envs, seed=config.seed)
    if c.norm_obs:
        envs = VecNormalize(envs, gamma=c.gamma, norm_reward=c.norm_reward == "scale")
    model = PPO("MlpPolicy", envs, learning_rate=lambda left: left * c.learning_rate, n_steps=c.num_steps,
                batch_size=c.num_envs * c.num_steps // c.num_minibatches, n_epochs=c.update_epochs, gamma=c.gamma,
                gae_lambda=c.gae_lambda, clip_range=c.clip_coef, clip_range_vf=c.clip_coef if c.clip_vloss else None,
                ent_coef=c.ent_coef, vf_coef=c.vf_coef, max_grad_norm=c.max_grad_norm, seed=config.seed, device="cpu")
    clock = Clock()
    model.learn(config.total_timesteps, callback=clock)
    clock.times.append((time.perf_counter(), model.num_timesteps))
    (start, first), (end, last) = clock.times[max(1, len(clock.times) // 10)], clock.times[-1]
    returns = [episode["r"] for episode in model.ep_info_buffer]
    result = {"steady": (last - first) / (end - start), "last_100": statistics.fmean(returns)}
    if config.eval_episodes:
        if c.norm_obs:
            envs.training = False  # freezes its statistics
        played, _ = evaluate_policy(model, envs, config.eval_episodes, deterministic=True, return_episode_rewards=True)
        error = statistics.stdev(played) / len(played) ** 0.5
        result |= {"score": statistics.fmean(played), "standard_error": error, "global_step": last}
    print(json.dumps(result))


def timed(command: list[str], folder: str) -> dict:
    """Wall and CPU seconds, peak memory in MiB, and the last line of what the command printed."""
    clock = time.perf_counter()
    with open(Path(folder) / "output.txt", "w") as file:
        process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.DEVNULL,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"{command} ended with {status}"
    lines = (Path(folder) / "output.txt").read_text().splitlines()
    return {"seconds": time.perf_counter() - clock, "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_mib": usage.ru_maxrss / 1024, "printed": lines[-1] if lines else ""}


def ours(env_id: str, steps: int, seed: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--env_id={env_id}", f"--total_timesteps={steps}", f"--seed={seed}", "--eval_episodes=0"]
        result = timed([sys.executable, str(ROOT / "ppo_classic.py"), *flags, "--output_dir=run"], folder)
        rows = list(csv.DictReader(open(Path(folder) / "run" / "training_metrics.csv")))
    early = max(1, len(rows) // 10)
    late = rows[early:]
    spent = {x: sum(float(row[f"time/{x}"]) for row in late) for x in ("rollout", "update")}
    done = int(late[-1]["global_step"]) - int(rows[early - 1]["global_step"])
    return result | {"steady": done / sum(spent.values()), "last_100": float(rows[-1]["rollout/return_100"]),
                     "rollout_share": spent["rollout"] / sum(spent.values())}


def theirs(env_id: str, steps: int, seed: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "--what=peer", f"--env_id={env_id}",
                   f"--total_timesteps={steps}", f"--seed={seed}"]
        result = timed(command, folder)
    return result | json.loads(result["printed"])


def speed(config: Config) -> None:
    """Pairs of runs, taken in turn; rows of other lengths stay in benchmark.csv."""
    path = RESULTS / "benchmark.csv"
    kept = []
    if path.exists():
        with open(path) as file:
            kept = list(csv.DictReader(file))
    rows = []
    for env_id in config.envs:
        steps = int(TASKS[env_id] * config.scale)
        kept = [row for row in kept if (row["env"], row["steps"]) != (env_id, str(steps))]
        for run in range(1, config.runs + 1):
            pair = {"ppo_classic": ours(env_id, steps, run), "stable-baselines3": theirs(env_id, steps, run)}
            for name, result in pair.items():
                result.pop("printed")
                row = {"env": env_id, "steps": steps, "run": run, "program": name}
                row |= {"whole": steps / result["seconds"], **result, "load_average": os.getloadavg()[0]}
                rows.append({key: f"{x:.5g}" if isinstance(x, float) else x for key, x in row.items()})
                print(rows[-1], flush=True)
            names = list(dict.fromkeys(name for row in kept + rows for name in row))
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, names, lineterminator="\n")
                writer.writeheader()
                writer.writerows(kept + rows)
    write_report()


def write_report() -> None:
    with open(RESULTS / "benchmark.csv") as file:
        rows = [{name: x if name in ("env", "program", "steps") else float(x or "nan") for name, x in row.items()}
                for row in csv.DictReader(file)]
    (RESULTS / "benchmark.md").write_text(report(rows))
    print(report(rows))


def report(rows: list[dict]) -> str:
    """Medians over the runs, and the median of the ratios of the pairs with their range."""
    lines = [
        "| environment | program | runs | whole, s | CPU, s | steps/s, whole | steps/s, steady | peak MiB |"
        " last 100 episodes | load |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for task in dict.fromkeys((row["env"], row["steps"]) for row in rows):
        ours = [row for row in rows if (row["env"], row["steps"]) == task and row["program"] == "ppo_classic"]
        theirs = [row for row in rows if (row["env"], row["steps"]) == task and row["program"] != "ppo_classic"]
        name = f"{task[0]}, {task[1]} steps"
        for results in (ours, theirs):
            cells = [name, results[0]["program"], str(len(results))]
            for column, digits in (("seconds", 1), ("cpu_seconds", 1), ("whole", 0), ("steady", 0), ("peak_mib", 0),
                                   ("last_100", 0), ("load_average", 1)):
                cells.append(f"{statistics.median(row[column] for row in results):.{digits}f}")
            lines.append(f"| {' | '.join(cells)} |")
        texts = []
        for column, what in (("seconds", "seconds"), ("cpu_seconds", "CPU seconds")):
            ratios = [b[column] / a[column] for a, b in zip(ours, theirs, strict=True)]
            texts.append(f"{what} **{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})")
        ratios = [a["steady"] / b["steady"] for a, b in zip(ours, theirs, strict=True)]
        texts.append(f"steady **{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})")
        lines.append(f"| {name} | ratio | | {', '.join(texts)} | | | | | | |")
    return "\n".join(lines) + f"\n\n{platform.machine()}, {os.cpu_count()} cores, one thread each.\n"


def scaling() -> None:
    """CartPole-v1 with the native vector environment, 128 steps per rollout, 4 epochs of 4 mini-batches."""
    import torch

    import ppo_classic

    torch.set_num_threads(1)
    with open(RESULTS / "scaling.csv", "w") as file:
        for line in scaling_rows(ppo_classic):
            file.write(line + "\n")
            print(line, flush=True)


def scaling_rows(ppo_classic):
    yield "num_envs,steps_per_second,rollout_steps_per_second,update_steps_per_second"
    for num_envs in (1, 4, 16, 64, 256, 1024):
        c = replace(ppo_classic.Config(), num_envs=num_envs)
        envs = ppo_classic.make_envs(c, num_envs)
        agent, stream = ppo_classic.Agent(envs, c), ppo_classic.Stream(envs, c.gamma)
        stream.restart(1)
        seconds, rows = {"rollout": 0.0, "update": 0.0}, 0
        for step in range(2 + max(3, 4096 // (num_envs * 4))):
            clock = time.perf_counter()
            rollout = ppo_classic.collect_rollout(agent, stream, step, c)
            middle = time.perf_counter()
            ppo_classic.update(agent, rollout, step, 0.0, c)
            if step >= 2:  # the first two warm up
                rows += len(rollout.values)
                seconds["rollout"] += middle - clock
                seconds["update"] += time.perf_counter() - middle
        yield (f"{num_envs},{rows / sum(seconds.values()):.0f},{rows / seconds['rollout']:.0f},"
               f"{rows / seconds['update']:.0f}")


if __name__ == "__main__":
    arguments = tyro.cli(Config, use_underscores=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    if arguments.what == "speed":
        speed(arguments)
    if arguments.what == "scaling":
        scaling()
    if arguments.what == "report":
        write_report()
    if arguments.what == "peer":
        peer(arguments)
