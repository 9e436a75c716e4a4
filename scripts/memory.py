"""Makes the tables of docs/memory.md: the memory of a run on one GPU, counted from the sizes of its tensors.

    python scripts/memory.py            # prints the tables and writes docs/results/memory/*.csv
    python scripts/memory.py --write    # also puts the tables into docs/memory.md

Nothing here is measured. scripts/gpu_hour.py measures some of these peaks where a GPU is at hand, and
prints the counted ones beside them. All amounts are of tensors: the CUDA context, the allocator's gaps
and workspaces come on top.
"""

import argparse
import csv
import re
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "memory.md"
RESULTS = ROOT / "docs" / "results" / "memory"
GIB = 2**30
AT_REST = 14  # bytes per trained weight: bf16 weight 2, fp32 master 4, AdamW's two means 8
IN_UPDATE = 6  # bytes per trained weight more: fp32 sum of gradients 4, bf16 gradient of a pass 2
FROZEN = 2  # bytes per weight of a reference or of a LoRA trunk, bf16
HEAD_CHUNK = 4 * 2**26  # bytes of ppo_llm.LOGITS_PER_CHUNK logits in fp32
HEAD_CHUNKS_ALIVE = 6  # in the backward pass of the output head
STEP_COPIES = 4  # fp32 copies of the logits of a decode step
FREE = 2  # GiB of a card that stay free
CARDS = (8, 12, 16, 24, 32, 48, 80, 141)  # GB, as they are sold


@dataclass
class Shape:
    """What the memory of a model of the Qwen2.5 family depends on."""

    weights: float
    layers: int
    hidden: int
    kv_bytes: int  # of keys and values per token, bf16
    activation_bytes: float  # per token of a training pass, without gradient checkpointing
    adapter_weights: float  # of a LoRA adapter of rank 64 on all linear layers
    vocabulary: int


SHAPES = {
    "0.5B": Shape(494.0e6, 24, 896, 12288, 1.34e6, 35e6, 151936),
    "1.5B": Shape(1543.7e6, 28, 1536, 28672, 2.83e6, 74e6, 151936),
    "7B": Shape(7615.6e6, 28, 3584, 57344, 6.16e6, 161e6, 152064),
}


@dataclass
class Case:
    """The options of a run that its memory depends on."""

    model: str
    flags: str
    gradient_checkpointing: bool = False
    lora: bool = False
    trained_models: int = 2  # policy and critic
    has_reference: bool = True
    micro_batch_tokens: int = 16384
    rollout_slots: int = 256
    context: int = 1536  # tokens of the longest prompt and response


SMALL = {"micro_batch_tokens": 4096, "rollout_slots": 64}
SMALL_FLAGS = "`--micro_batch_tokens 4096 --rollout_slots 64`"
CHECKPOINTED = {"gradient_checkpointing": True}
CRITIC_FREE = {"trained_models": 1, "has_reference": False}
CASES = [
    Case("0.5B", "defaults"),
    Case("0.5B", "`--gradient_checkpointing`", **CHECKPOINTED),
    Case("0.5B", f"the same, {SMALL_FLAGS}", **CHECKPOINTED, **SMALL),
    Case("0.5B", "the same, `--adv_estimator grpo --rollout_n 8 --kl_ctrl_coef 0`", **CHECKPOINTED, **SMALL,
         **CRITIC_FREE),
    Case("0.5B", "`--lora_rank 64 --micro_batch_tokens 4096 --rollout_slots 64`", lora=True, **SMALL),
    Case("0.5B", "the same, `--gradient_checkpointing`", lora=True, **CHECKPOINTED, **SMALL),
    Case("1.5B", "defaults"),
    Case("1.5B", "`--gradient_checkpointing`", **CHECKPOINTED),
    Case("1.5B", "`--lora_rank 64 --gradient_checkpointing --micro_batch_tokens 4096 --rollout_slots 64`",
         lora=True, **CHECKPOINTED, **SMALL),
    Case("7B", "`--lora_rank 64 --gradient_checkpointing`", lora=True, **CHECKPOINTED),
    Case("7B", f"the same, {SMALL_FLAGS}", lora=True, **CHECKPOINTED, **SMALL),
    Case("7B", "`--gradient_checkpointing`", **CHECKPOINTED),
]


def at_rest(case: Case) -> float:
    """Bytes of all models when nothing is computed: trained ones with their optimizer, and the reference."""
    shape = SHAPES[case.model]
    if case.lora:  # policy, critic and reference share one frozen trunk
        return FROZEN * shape.weights + case.trained_models * AT_REST * shape.adapter_weights
    trained = case.trained_models * AT_REST * shape.weights
    if case.has_reference:
        return trained + FROZEN * shape.weights
    return trained


def activations(case: Case) -> float:
    """Bytes kept for backward; with checkpointing one state per layer, and the inside of one layer."""
    shape = SHAPES[case.model]
    whole = shape.activation_bytes * case.micro_batch_tokens
    if not case.gradient_checkpointing:
        return whole
    states = 2 * shape.layers * shape.hidden * case.micro_batch_tokens
    return states + whole / shape.layers


def rollout_bytes(case: Case) -> float:
    """The peak while responses are generated: models, KV cache, logits of a step."""
    shape = SHAPES[case.model]
    cache = case.rollout_slots * case.context * shape.kv_bytes
    logits = STEP_COPIES * 4 * case.rollout_slots * shape.vocabulary
    return at_rest(case) + cache + logits


def update_bytes(case: Case) -> float:
    """The peak of an optimizer step: models, one model's gradients, activations, the output head's chunks."""
    shape = SHAPES[case.model]
    trained = shape.adapter_weights if case.lora else shape.weights
    return at_rest(case) + IN_UPDATE * trained + activations(case) + HEAD_CHUNKS_ALIVE * HEAD_CHUNK


def smallest_card(peak: float) -> str:
    """The smallest card on which a peak in bytes leaves FREE GiB."""
    for card in CARDS:
        if peak / GIB + FREE <= card * 1e9 / GIB:
            return f"{card} GB"
    return "none: several GPUs, see [multigpu](multigpu.md) and [scaling](scaling.md)"


def gib(x: float) -> str:
    if x / GIB >= 200:
        return f"{x / GIB:.0f}"
    return f"{x / GIB:.1f}"


def fits_table() -> list[list[str]]:
    """Peaks of rollout and update, and the smallest card, case by case; the first row is the header."""
    rows = [["model", "flags", "rollout", "update", "fits on a card of"]]
    for case in CASES:
        rollout = rollout_bytes(case)
        update = update_bytes(case)
        rows.append([case.model, case.flags, gib(rollout), gib(update), smallest_card(max(rollout, update))])
    return rows


def parts_table() -> list[list[str]]:
    """What each part takes, model by model; the first row is the header."""
    plain = [Case(name, "") for name in SHAPES]
    checkpointed = [replace(case, gradient_checkpointing=True) for case in plain]
    shapes = list(SHAPES.values())
    per_token = " / ".join(f"{shape.kv_bytes:,}" for shape in shapes)
    megabytes = " / ".join(f"{shape.activation_bytes / 1e6:.2f}" for shape in shapes)
    parts = [
        ("a trained model at rest: bf16 weights 2, fp32 masters 4, AdamW's two means 8",
         f"{AT_REST} per weight", [AT_REST * shape.weights for shape in shapes]),
        ("while it is updated: fp32 sum of gradients 4, bf16 gradient of a pass 2", f"{IN_UPDATE} per weight",
         [IN_UPDATE * shape.weights for shape in shapes]),
        ("the reference, bf16", f"{FROZEN} per weight", [FROZEN * shape.weights for shape in shapes]),
        ("KV cache, 256 rows of 1536 tokens", f"{per_token} per token",
         [256 * 1536 * shape.kv_bytes for shape in shapes]),
        ("activations of 16,384 tokens", f"{megabytes} MB per token", [activations(case) for case in plain]),
        ("the same with `--gradient_checkpointing`: one state per layer, and one layer's inside", "",
         [activations(case) for case in checkpointed]),
        ("the output head: chunks of 2^26 fp32 logits, six of them alive", "",
         [HEAD_CHUNKS_ALIVE * HEAD_CHUNK for _ in shapes]),
        ("fp32 logits of a decode step, 256 rows, four copies", "",
         [STEP_COPIES * 4 * 256 * shape.vocabulary for shape in shapes]),
    ]
    rows = [["part", "bytes", *SHAPES]]
    for name, unit, sizes in parts:
        rows.append([name, unit, *[gib(size) for size in sizes]])
    return rows


TABLES = {"What fits where": fits_table, "The parts": parts_table}  # heading in the document -> its table
FILES = {"What fits where": "fits.csv", "The parts": "parts.csv"}


def markdown(rows: list[list[str]]) -> str:
    """A table of Markdown, the first row its header."""
    lines = ["|" + "|".join(f" {cell} " for cell in cells) + "|" for cells in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(line.replace("  ", " ") for line in lines)  # an empty cell is one space


def put_tables(document: str) -> str:
    """The document with the first table under each heading replaced."""
    for heading, make in TABLES.items():
        before, title, after = document.partition(f"## {heading}\n")
        found = re.search(r"(?:^\|.*\n)+", after, re.MULTILINE)
        if found is None:
            raise ValueError(f"the document has no table under {heading!r}")
        document = before + title + after[: found.start()] + markdown(make()) + "\n" + after[found.end() :]
    return document


def main() -> None:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/memory.md")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for heading, make in TABLES.items():
        print(f"\n{heading}\n\n{markdown(make())}")
        with (RESULTS / FILES[heading]).open("w", newline="") as file:
            csv.writer(file).writerows(make())
    if arguments.write:
        DOCUMENT.write_text(put_tables(DOCUMENT.read_text()))


if __name__ == "__main__":
    main()
