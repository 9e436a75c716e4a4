"""A small run that is killed, stopped and restarted at random moments ends bit by bit as the undisturbed one.

    python scripts/soak.py                                          # 2,000 steps of ppo_llm.py
    python scripts/soak.py --steps 200 --processes 2                # ppo_llm_multigpu.py under torchrun
    python scripts/soak.py --steps 100 --shortest 0 --longest 3     # a short one
    python scripts/soak.py --demo --steps 25 --signals SIGINT       # README's first command and Ctrl-C

First an undisturbed run, whose resident memory is measured; then the same command in another folder. It gets
a kill -9, a Ctrl-C or a SIGTERM some seconds after the first step that a start has finished, and is started
again. Compared are training_metrics.csv but its times, samples.jsonl and all weights and optimizer states.
Written are NAME_events.csv (one row per start), NAME_memory.csv and NAME.json. The exit code is 1 if a
promise is broken.
"""

import contextlib
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
EXIT_CODES = {"SIGKILL": -9, "SIGINT": 130, "SIGTERM": 143}


@dataclass
class Soak:
    steps: int = 2000
    """Steps of the run."""
    processes: int = 1
    """Ranks; with more than one ppo_llm_multigpu.py runs under torchrun."""
    save_every: int = 3
    """Steps between checkpoints."""
    eval_every: int = 100
    """Steps between evaluations."""
    shortest: float = 5.0
    """Seconds from the first finished step of a start to the disturbance, at least."""
    longest: float = 60.0
    """The same, at most."""
    demo: bool = False
    """The demo, in place of a model of 23,000 parameters: needs --steps 25, and signals without SIGKILL."""
    signals: tuple[Literal["SIGKILL", "SIGINT", "SIGTERM"], ...] = tuple(EXIT_CODES)
    """The kinds of disturbance."""
    seed: int = 0
    """Of the moments and the kinds of disturbance."""
    folder: Path = Path("output/soak")
    """Where the model, the runs and the log are put; what is there is deleted."""
    name: str = "soak"
    """Beginning of the names of the log's files."""


def make_model(folder: Path) -> None:
    """The random model of the tests, with prompts and a reward beside it."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import make_lm, save_folder

    save_folder(folder, make_lm())


def make_command(run_dir: Path, model: Path, soak: Soak) -> list[str]:
    if soak.demo:
        return [sys.executable, str(ROOT / "ppo_llm.py"), "--output_dir", str(run_dir)]
    flags = {
        "model": model, "dataset": model / "prompts.jsonl", "eval_dataset": model / "prompts.jsonl",
        "reward": f"{model / 'reward.py'}:coin", "device": "cpu", "train_batch_size": 8,
        "ppo_mini_batch_size": 4, "max_prompt_length": 16, "max_response_length": 8,
        "total_steps": soak.steps, "lr": 1e-4, "critic_lr": 1e-3, "lr_schedule": "cosine",
        "kl_ctrl_type": "adaptive", "eval_every": soak.eval_every, "save_every": soak.save_every,
        "output_dir": run_dir,
    }
    command = [sys.executable, str(ROOT / "ppo_llm.py")]
    if soak.processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(soak.processes),
                   "--master_port", "29611", str(ROOT / "ppo_llm_multigpu.py")]
    for name, x in flags.items():
        command += [f"--{name}", str(x)]
    return command


def launch(command: list[str], console: Path) -> subprocess.Popen:
    """A start in a process group of its own, as a terminal makes them."""
    with open(console, "w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def last_step(console: Path) -> int | None:
    """The last step that is on the console; None before the first one."""
    found = re.findall(r"^ +(\d+)/\d+ ", console.read_text(errors="replace"), re.MULTILINE)
    return int(found[-1]) if found else None


def family(pid: int) -> list[int]:
    """A process and its descendants; torchrun's ranks have sessions of their own."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    found = [pid]
    for child in children:
        found += family(int(child))
    return found


def resident(pid: int) -> float:
    """MiB of a process and its descendants; 0 if it has ended."""
    total = 0.0
    for member in family(pid):
        with contextlib.suppress(OSError):  # it may just have ended
            size = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{member}/status").read_text())
            total += int(size[1]) / 1024 if size else 0.0
    return total


def run_undisturbed(command: list[str], console: Path, soak: Soak) -> tuple[list[tuple[int, float]], float]:
    """Resident memory once a second as (step, MiB), and the seconds the run took. Raises if it fails."""
    began = time.monotonic()
    process = launch(command, console)
    memory = []
    while process.poll() is None:
        time.sleep(1)
        step = last_step(console)
        size = resident(process.pid)
        if step is not None and step < soak.steps and size > 0:  # the export at the end is another matter
            memory.append((step, size))
    if process.returncode != 0:
        tail = console.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"the undisturbed run ended with {process.returncode}: {tail}")
    return memory, time.monotonic() - began


def disturb(process: subprocess.Popen, name: str) -> None:
    """As from outside: kill -9 of all ranks, a terminal's Ctrl-C to its group, SIGTERM to the launcher."""
    if name == "SIGKILL":
        for pid in family(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    elif name == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.terminate()


def run_once(command: list[str], console: Path, delay: float, name: str) -> dict:
    """One start, disturbed that long after its first step unless it has ended before. What happened."""
    began = time.monotonic()
    process = launch(command, console)
    first = None
    while process.poll() is None and first is None:
        time.sleep(0.05)
        first = last_step(console)
    try:
        process.wait(timeout=delay)
        name = "none"
    except subprocess.TimeoutExpired:
        disturb(process, name)
    step = last_step(console)
    process.wait(timeout=600)
    text = console.read_text(errors="replace")
    return {"signal": name, "seconds": round(time.monotonic() - began, 1), "first_step": first, "step": step,
            "exit_code": process.returncode, "said_stopped": "stopped after step" in text,
            "traceback": "Traceback" in text}


def newest_checkpoint(run_dir: Path) -> int:
    steps = [int(path.name.removeprefix("step_")) for path in run_dir.glob("checkpoints/step_*[0-9]")]
    return max(steps, default=0)


def run_disturbed(command: list[str], run_dir: Path, soak: Soak) -> list[dict]:
    """Starts the command until it ends by itself. One row per start."""
    choice = random.Random(soak.seed)
    events = []
    while not events or events[-1]["signal"] != "none":
        delay = choice.uniform(soak.shortest, soak.longest)
        name = choice.choice(soak.signals)
        console = run_dir.with_name(f"console_{len(events)}.txt")
        event = {"start": len(events), "delay": round(delay, 1)}
        event |= run_once(command, console, delay, name)
        event["checkpoint"] = newest_checkpoint(run_dir)
        events.append(event)
        print(event, flush=True)
    return events


def faults(event: dict, soak: Soak) -> list[str]:
    """What a start promised and did not keep."""
    name = event["signal"]
    found = []
    if event["traceback"] and soak.processes == 1:
        found.append("a traceback")
    all_is_saved = event["step"] == event["checkpoint"] == soak.steps
    if soak.processes > 1 and name != "none" and all_is_saved:
        return found  # the signal came after the last step, and the launcher has an exit code of its own
    has_ended = event["step"] == soak.steps and event["exit_code"] == 0  # the signal came after the last step
    if name == "none" or has_ended:
        if event["exit_code"] != 0:
            found.append(f"exit code {event['exit_code']}")
        return found
    if soak.processes == 1 and event["exit_code"] != EXIT_CODES[name]:  # a launcher has codes of its own
        found.append(f"exit code {event['exit_code']}")
    if name == "SIGKILL" and event["step"] - event["checkpoint"] > soak.save_every:
        found.append("more steps lost than there are between checkpoints")
    if name != "SIGKILL" and (not event["said_stopped"] or event["checkpoint"] < event["step"]):
        found.append("a finished step was not saved")
    return found


def without_times(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: x for name, x in row.items() if not name.startswith("time/")} for row in rows]


def differences(one: Path, other: Path) -> list[str]:
    """The files of two runs that are not the same bit by bit."""
    found = []
    if without_times(one / "training_metrics.csv") != without_times(other / "training_metrics.csv"):
        found.append("training_metrics.csv")
    names = {str(path.relative_to(one)) for path in one.rglob("*.safetensors")} | {"samples.jsonl"}
    for name in sorted(names):
        if not (other / name).exists() or (one / name).read_bytes() != (other / name).read_bytes():
            found.append(name)
    return found


def growth_after(memory: list[tuple[int, float]], step: int) -> float | None:
    """Largest resident memory from this step on over that at this step, minus 1; None: not measured."""
    later = [size for at, size in memory if at >= step]
    return max(later) / later[0] - 1 if later else None


def write_csv(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(soak: Soak) -> int:
    if soak.demo and (soak.steps, soak.processes, "SIGKILL" in soak.signals) != (25, 1, False):
        sys.exit("error: --demo has 25 steps in one process and saves at its end: --steps 25 --signals SIGINT SIGTERM")
    shutil.rmtree(soak.folder, ignore_errors=True)
    soak.folder.mkdir(parents=True)
    folder = soak.folder.resolve()
    make_model(folder / "model")
    command = make_command(folder / "undisturbed", folder / "model", soak)
    memory, seconds = run_undisturbed(command, folder / "console_undisturbed.txt", soak)
    command = make_command(folder / "disturbed", folder / "model", soak)
    events = run_disturbed(command, folder / "disturbed", soak)
    broken = [f"start {event['start']}: {fault}" for event in events for fault in faults(event, soak)]
    different = differences(folder / "undisturbed", folder / "disturbed")
    broken += [f"not the same: {name}" for name in different]
    growth = growth_after(memory, min(200, soak.steps // 2))
    if growth is not None and growth > 0.02 and not soak.demo:  # which is too short to tell
        broken.append(f"resident memory grew by {growth:.1%}")
    injected = [event["signal"] for event in events if event["signal"] != "none"]
    result = {
        "steps": soak.steps, "processes": soak.processes, "save_every": soak.save_every, "seed": soak.seed,
        "starts": len(events), "faults": {name: injected.count(name) for name in EXIT_CODES},
        "bitwise_equal": not different, "seconds_undisturbed": round(seconds, 1),
        "memory_growth": growth, "broken": broken}
    write_csv(soak.folder / f"{soak.name}_events.csv", events)
    write_csv(soak.folder / f"{soak.name}_memory.csv", [{"step": at, "mib": round(x, 1)} for at, x in memory])
    (soak.folder / f"{soak.name}.json").write_text(json.dumps(result, indent=2))
    print(json.dumps(result, indent=2))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Soak, description=__doc__, use_underscores=True)))
