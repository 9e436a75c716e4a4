"""Times a PPO step of ppo_llm.py, phase by phase, beside other ways to do the same work; all in one run, in turns.

    python scripts/benchmark_llm.py                                 # demo model, ragged lengths, CPU or GPU
    python scripts/benchmark_llm.py --size large --lengths full     # ten times larger, every row of full length
    python scripts/benchmark_llm.py --size qwen                     # Qwen2.5-0.5B's shape, random weights: for a GPU
    python scripts/benchmark_llm.py --growth                        # cost against responses, length and vocabulary

The last TRL that has a PPOTrainer takes part when `--trl_path FOLDER` names what this made:
    pip install --no-deps --target FOLDER trl==1.12.0 accelerate==1.15.0

Random weights do not stop by themselves: a schedule gives each prompt the length of its response, the same for
everyone, and the tokens are counted. TRL collects garbage twice per update, all of this process: `step without gc` is
its step without these two calls. Peaks of memory are above the start of a phase, those of a step include weights and
optimizers; on the CPU they are resident memory. Writes docs/results/benchmark_llm/NAME.csv and NAME.json, and table.md
from all that lie there.
"""

import csv
import gc
import json
import logging
import os
import random
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tokenizers
import torch
import transformers
import tyro
from benchmark_peers import PEERS, Laps, Work, ours

import ppo_llm  # benchmark_peers has put the repository on the path

ROOT = Path(__file__).resolve().parents[1]
FIELDS = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size".split()
DEMO = json.loads((ROOT / "assets" / "demo" / "config.json").read_text())
SHAPES = {"demo": [DEMO[name] for name in FIELDS], "large": [384, 5, 12, 6, 1344, 832],
          "qwen": [896, 24, 14, 2, 4864, 151936], "quick": [32, 2, 4, 2, 64, 64]}  # of Qwen2
SMALL = ppo_llm.Config(train_batch_size=64, max_prompt_length=64, max_response_length=48, ppo_epochs=4,
                       ppo_mini_batch_size=16, lam=0.95)
QUICK = replace(SMALL, train_batch_size=8, max_prompt_length=16, max_response_length=8, ppo_epochs=2,
                ppo_mini_batch_size=4)
STEPS = {"demo": SMALL, "large": SMALL, "quick": QUICK, "qwen": ppo_llm.Config()}  # that is the published GSM8K step
GSM8K = (50, 158), (44, 512)  # shortest and longest prompt and response: means 104 and 278, as in the published log
GROWTH = {"train_batch_size": (64, 128, 256, 512, 1024), "max_response_length": (64, 128, 256, 512, 1024, 2048),
          "vocab_size": (512, 2048, 8192, 32768, 151936)}
PHASES = ("rollout", "scoring", "update actor", "update critic", "update", "step", "step without gc")
COLUMNS = """phase who tokens_per_s seconds least most times_ours times_least times_most peak_mib tokens
    note""".split()


@dataclass
class Config:
    size: Literal["demo", "large", "qwen"] = "demo"  # about 1 M and 10 M parameters, and Qwen2.5-0.5B's shape
    lengths: Literal["ragged", "full", "gsm8k"] = "ragged"  # 0.2-1 of the longest; all longest; published (also qwen)
    device: str = "auto"  # auto (cuda if there is one), cpu, cuda
    threads: int = 0  # of the CPU, for everyone; 0: as torch chooses
    repeats: int = 5  # timed turns, after one that is not counted
    peers: tuple[Literal["before", "dynamic", "static", "batch", "padded", "trl"], ...] = (
        "before", "dynamic", "static", "batch", "padded", "trl")  # dc3ee96, generate with two caches, and so on
    trl_path: Path | None = None  # folder with TRL 1.12.0 and accelerate
    growth: bool = False  # instead: seconds and memory of ppo_llm.py alone against three sizes
    quick: bool = False  # a tiny model: only shows that everything runs
    name: str | None = None  # of the files; None: SIZE_LENGTHS_DEVICE or growth
    results: Path = ROOT / "docs" / "results" / "benchmark_llm"


def make_work(size: str, lengths: str, device: torch.device, c: ppo_llm.Config, vocabulary: int | None = None) -> Work:
    shape, count, choice = dict(zip(FIELDS, SHAPES[size], strict=True)), c.train_batch_size, random.Random(1)
    shape["vocab_size"] = vocabulary or shape["vocab_size"]
    shape |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}} if size == "qwen" else {}
    spread = []  # prompt and response lengths, evenly from the shortest to the longest, in random order
    as_published = lengths == "gsm8k" or size == "qwen"
    ends = GSM8K if as_published else [(-(-n // 5), n) for n in (c.max_prompt_length, c.max_response_length)]
    for low, high in ends:
        step = 0 if lengths == "full" else (high - low) / (count - 1)
        spread.append(choice.sample([high - round(step * i) for i in range(count)], count))
    prompts = [[choice.randrange(1, shape["vocab_size"]) for _ in range(length)] for length in spread[0]]
    schedule = dict(zip(map(tuple, prompts), spread[1], strict=True))
    assert len(schedule) == count, "the schedule tells rows apart by their prompts"
    words = {"<pad>": 0} | {f"t{i}": i for i in range(1, shape["vocab_size"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="t1", padding_side="left")
    return Work(c, shape, prompts, schedule, fast, device)


def first_turn(build: Callable, work: Work) -> tuple[Callable, int, dict]:
    """A contestant, its tokens and its peaks of memory; that of its step counts from before it was built."""
    before, run = Laps(work.device, tidy=True).before, build(work)
    laps = Laps(work.device, tidy=True)
    tokens = run(laps)
    both = max(laps.peak.get(f"update {role}", 0.0) for role in ("actor", "critic"))
    return run, tokens, dict.fromkeys(PHASES, laps.highest - before) | {"update": both} | laps.peak


def turn(run: Callable, work: Work) -> dict:
    laps = Laps(work.device)
    run(laps)
    return laps.sums()


def compare(work: Work, config: Config) -> list[dict]:
    """Everyone once without counting, then `repeats` times in turns. The rows of the table."""
    entered, rows = {"ppo_llm.py": first_turn(ours, work)}, []
    for who, phase, build in (PEERS[peer] for peer in config.peers):
        try:
            entered[who] = first_turn(build, work)
        except Exception as error:  # whatever stops a peer is its row, not the end of the others
            missing = isinstance(error, ImportError)
            reason = f"not installed ({error.name})" if missing else f"does not run here: {error!r:.150}"
            rows.append(dict.fromkeys(COLUMNS) | {"phase": phase, "who": who, "note": " ".join(reason.split())})
        gc.collect()  # what a peer that ran out of memory leaves behind
        if work.device.type == "cuda":
            torch.cuda.empty_cache()
    turns = {who: [] for who in entered}
    for i in range(config.repeats):
        for who in list(entered)[:: -1 if i % 2 else 1]:
            turns[who].append(turn(entered[who][0], work))
    for who, (_, tokens, peaks) in entered.items():
        for phase in (phase for phase in PHASES if phase in turns[who][0]):
            seconds = [own[phase] for own in turns[who]]
            times = [x / first[phase] for x, first in zip(seconds, turns["ppo_llm.py"], strict=True)]
            read = (0 if phase == "rollout" else sum(map(len, work.prompts))) + tokens
            read *= work.c.ppo_epochs if phase.startswith("update") else 1
            numbers = [f(x) for x in (seconds, times) for f in (statistics.median, min, max)]
            cells = phase, who, read / numbers[0], *numbers, peaks[phase], tokens, ""
            rows.append(dict(zip(COLUMNS, cells, strict=True)))
    return sorted(rows, key=lambda row: PHASES.index(row["phase"]))


def grow(config: Config, size: str, device: torch.device) -> list[dict]:
    """Seconds of a step with one epoch as one size grows and the others stay. The pass is forward and backward of the
    actor's first micro-batch, whose memory is counted beside the gradients."""
    rows, points = [], [(what, n) for what, sizes in GROWTH.items() for n in (sizes[:1] if config.quick else sizes)]
    for what, n in points:
        change, vocabulary = ({}, n) if what == "vocab_size" else ({what: n}, None)
        work = make_work(size, config.lengths, device, replace(STEPS[size], ppo_epochs=1, **change), vocabulary)
        run, tokens, peaks = first_turn(ours, work)
        turns, coefficient = [turn(run, work) for _ in range(config.repeats)], work.c.kl_coef
        _, part = next(ppo_llm.micro_batches(list(range(len(work.prompts))), work.rollout, work.c))
        for _ in range(2):  # the gradients are there in the second
            laps = Laps(device, tidy=True)
            loss, _ = ppo_llm.ppo_loss("actor", work.models, part, coefficient, work.c)
            work.models.actor.backward((loss * part.mask / part.mask.sum()).sum())
            laps.lap("pass")
            del loss, _
        seconds = {phase: statistics.median(seconds[phase] for seconds in turns) for phase in PHASES[:-1]}
        logits = float(part.mask.sum()) * work.shape["vocab_size"] * 4 / 2**20
        rows.append({"grows": what, "to": n, "tokens": tokens} | seconds | {
            "step_peak_mib": peaks["step"], "pass_peak_mib": laps.peak["pass"], "whole_logits_mib": logits})
        print(rows[-1])
    return rows


def describe(config: Config, work: Work | None, device: torch.device, rows: list[dict]) -> dict:
    """What the numbers were made with."""
    cpu = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpu.read_text() if cpu.exists() else "")
    command = " ".join(["python scripts/benchmark_llm.py", *sys.argv[1:]])
    command = command.replace(str(config.trl_path), "FOLDER").replace(str(config.results), "RESULTS")
    note = {"command": command, "python": sys.version.split()[0]}
    note |= {name: sys.modules[name].__version__ for name in ("torch", "transformers", "trl") if sys.modules.get(name)}
    note |= {"machine": torch.cuda.get_device_name() if device.type == "cuda" else cpu and cpu[1],
             "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1),
             "repeats": config.repeats}
    if work is None:
        return note
    scheduled, parameters = sum(work.schedule.values()), work.models.reference.parameters()
    return note | {"parameters": sum(weight.numel() for weight in parameters), "prompts": len(work.prompts),
                   "epochs": work.c.ppo_epochs, "mini_batch": work.c.ppo_mini_batch_size,
                   "prompt_tokens": sum(map(len, work.prompts)), "response_tokens": scheduled,
                   "everyone_made_as_many": {row["tokens"] for row in rows} - {None} == {scheduled}}


def report(results: Path) -> str:
    """table.md: all measurements in the folder."""
    sections = []
    for path in sorted(results.glob("*.csv")):
        with path.open() as file:
            header, *rows = csv.reader(file)
        note = json.loads(path.with_suffix(".json").read_text())
        told = ", ".join(f"{key} {x}" for key, x in note.items() if key != "command")
        rows = [[f"{float(x):.{0 if float(x) >= 1000 else 3}f}" if re.fullmatch(r"-?\d+\.\d+", x) else x for x in row]
                for row in rows]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])
        sections.append(f"## {path.stem}\n\n`{note['command']}`: {told}.\n\n{table}\n")
    (results / "table.md").write_text("\n".join(sections))
    return "\n".join(sections)


def main(config: Config) -> None:
    torch.set_num_threads(config.threads or torch.get_num_threads())
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    auto, size = "cuda" if torch.cuda.is_available() else "cpu", "quick" if config.quick else config.size
    device = torch.device(auto if config.device == "auto" else config.device)
    longest = dict(zip(("max_prompt_length", "max_response_length"), (high for _, high in GSM8K), strict=True))
    step = replace(STEPS[size], **longest) if config.lengths == "gsm8k" else STEPS[size]
    work = None if config.growth else make_work(size, config.lengths, device, step)
    rows = compare(work, config) if work else grow(config, size, device)
    path = config.results / f"{config.name or (f'{size}_{config.lengths}_{device.type}' if work else 'growth')}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".json").write_text(json.dumps(describe(config, work, device, rows), indent=2) + "\n")
    print(report(config.results))


if __name__ == "__main__":
    chosen = tyro.cli(Config, use_underscores=True)
    if chosen.trl_path and str(chosen.trl_path) not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(chosen.trl_path), os.environ.get("PYTHONPATH"))))
        os.execv(sys.executable, [sys.executable, *sys.argv])  # transformers looks for accelerate when it is imported
    main(chosen)
