"""Makes docs/scaling.md: what ppo_llm_multigpu.py sends and holds, and what more GPUs bring. Needs no GPU.

    python scripts/scaling.py            # writes the document from the formulas and the counts that are there
    python scripts/scaling.py --count    # counts first, in two processes on the CPU: some minutes

Bytes sent are counted: every collective of torch.distributed is wrapped in a real run of two ranks. The
counts are kept in docs/results/scaling/counts.json. Memory and time are formulas, printed with their results.
None of it has been measured on several GPUs.
"""

import argparse
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import memory

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "scaling.md"
COUNTS = ROOT / "docs" / "results" / "scaling" / "counts.json"
STAGES = {
    "0 (fp32)": {"zero_stage": 0, "dtype": "float32"},
    "2 (fp32)": {"zero_stage": 2, "dtype": "float32"},
    "3 (fp32)": {"zero_stage": 3, "dtype": "float32"},
    "2 (bf16)": {"zero_stage": 2, "dtype": "bfloat16"},
    "3 (bf16)": {"zero_stage": 3, "dtype": "bfloat16"},
}
RUN = {  # a step without a critic; a mini-batch has several passes on each rank
    "total_steps": 1, "train_batch_size": 16, "rollout_n": 2, "ppo_mini_batch_size": 8, "ppo_epochs": 1,
    "adv_estimator": "rloo", "kl_ctrl_coef": 0.0, "max_response_length": 24, "micro_batch_tokens": 160,
    "eval_every": 0, "save_every": 0, "lr": 1e-5, "device": "cpu",
}
COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor")
RANKS = (8, 64, 512)
TOKENS = 16384  # of a training pass
ROWS = 64  # of a rollout at a time
CONTEXT = 1024  # tokens of a prompt and its response, at most
FITS = 0.92  # part of a card's bytes that a run may use
# The time table assumes: bf16 FLOP/s that passes reach, bytes/s of HBM, of NVLink, of the network per GPU
FLOPS = 400e12
HBM = 3.0e12
NVLINK = 300e9
NETWORK = 40e9
LAUNCH = 1e-3  # seconds of a decode step that do not depend on the model
PROMPTS = 1024
PROMPT = 150
RESPONSE = 350
MINI_BATCHES = 4


@dataclass
class Shape:
    weights: float
    kv_bytes: int  # of keys and values per token, bf16
    layers: int
    hidden: int
    vocabulary: int


SHAPES = {
    "0.5B (Qwen2.5)": Shape(494e6, 12288, 24, 896, 151936),
    "7B (Qwen2.5)": Shape(7616e6, 57344, 28, 3584, 152064),
    "70B (Llama 3)": Shape(70554e6, 327680, 80, 8192, 128256),
}
TOO_LARGE = "70B (Llama 3)"


# ---- Bytes sent, counted ---------------------------------------------------------------------------------


def largest_bytes(values: list) -> int:
    """The bytes of the largest tensor: a gather's output and a scatter's input are the whole."""
    sizes = [x.numel() * x.element_size() for x in values if hasattr(x, "element_size")]
    return max(sizes, default=0)


def count_collectives() -> dict[str, float]:
    """Wraps the collectives of torch.distributed. Returns the dictionary in which their bytes add up."""
    import torch.distributed as dist

    sent = defaultdict(float)

    def wrap(name: str, real):
        def counted(*args, **options):
            sent[name] += largest_bytes([*args, *options.values()])
            return real(*args, **options)

        return counted

    for name in COLLECTIVES:
        setattr(dist, name, wrap(name, getattr(dist, name)))
    return sent


def count_rank(folder: Path, stages: list[str]) -> None:
    """One rank: a training step of each stage; rank 0 writes what was sent in rollout and update."""
    sent = count_collectives()  # before DeepSpeed takes hold of them
    sys.path.insert(0, str(ROOT))
    import ppo_llm_multigpu as script

    found = {}
    real_in_step = script.in_step
    real_collect = script.collect_rollout
    real_update = script.update

    def in_step(*args):
        passes = real_in_step(*args)
        found["passes"] += len(passes)
        found["steps"] += 1
        return passes

    def sent_in(real, *args):
        before = dict(sent)
        result = real(*args)
        return result, {name: total - before.get(name, 0) for name, total in sent.items()}

    def collect_rollout(*args):
        result, found["rollout"] = sent_in(real_collect, *args)
        return result

    def update(*args):
        result, found["update"] = sent_in(real_update, *args)
        return result

    script.in_step = in_step
    script.collect_rollout = collect_rollout
    script.update = update
    results = {}
    for stage in stages:
        found.update(passes=0, steps=0)
        run_dir = str(folder / stage.replace(" ", ""))
        script.main(dataclasses.replace(script.DEMO, **RUN, **STAGES[stage], output_dir=run_dir))
        results[stage] = dict(found)
    if script.RANK == 0:
        lm = script.AutoModelForCausalLM.from_pretrained(script.DEMO.model)
        results["weights"] = sum(weight.numel() for weight in lm.parameters())
        (folder / "counts.json").write_text(json.dumps(results, indent=2) + "\n")


def count(folder: Path, stages: list[str]) -> dict:
    """Starts two ranks, and reads what they counted. Raises RuntimeError if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
              "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--rank_folder", str(folder), "--stages", *stages]
    ranks = []
    for rank in ("0", "1"):
        environment = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}
        ranks.append(subprocess.Popen(command, env=environment))
    if [rank.wait(timeout=1800) for rank in ranks] != [0, 0]:
        raise RuntimeError("a rank failed")
    return json.loads((folder / "counts.json").read_text())


def sum_of(sent: dict[str, float], *beginnings: str) -> float:
    """Bytes of the collectives whose names begin so."""
    return sum(x for name, x in sent.items() if name.startswith(beginnings))


def count_table(counts: dict) -> list[list[str]]:
    """Bytes per weight: gradient per backward, weights per optimizer step and before the update."""
    rows = [["ZeRO", "backwards", "optimizer steps", "gradient: bytes per weight",
             "gathered per optimizer step", "for rollout and scoring"]]
    for stage in STAGES:
        found = counts[stage]
        gradient = sum_of(found["update"], "all_reduce", "reduce") / counts["weights"]
        gathered = sum_of(found["update"], "all_gather") / counts["weights"] / found["steps"]
        before = sum_of(found["rollout"], "all_gather") / counts["weights"]
        if stage.startswith("0"):
            share = f"{gradient / found['steps']:.2f} per optimizer step"
        else:
            share = f"{gradient / found['passes']:.2f} per backward"
        counted = [stage, str(found["passes"]), str(found["steps"])]
        rows.append([*counted, share, f"{gathered:.2f}", f"{before:.2f}"])
    return rows


# ---- Memory and time, by formula -------------------------------------------------------------------------


def memory_parts(shape: Shape, stage: int, ranks: int) -> dict[str, float]:
    """Bytes per GPU: training states, weights, and the peaks of a rollout and of an update."""
    p = shape.weights
    states = 2 * 12 * p / ranks  # fp32 masters and AdamW's two means, of policy and critic
    if stage == 2:
        weights = 3 * 2 * p  # policy, critic, reference
    else:
        weights = 3 * 2 * p / ranks + 2 * p  # one is whole at a time
    cache = ROWS * CONTEXT * shape.kv_bytes
    gradient = 4 * p / ranks + 2 * p  # the fp32 sum, split; the bf16 gradient of one backward, whole
    # Checkpointed: one bf16 state per layer, and about 60 bytes per hidden unit inside of the layer at work
    activations = TOKENS * shape.hidden * (2 * shape.layers + 60)
    head = memory.HEAD_CHUNKS_ALIVE * memory.HEAD_CHUNK
    rollout = states + weights + cache
    update = states + weights + gradient + activations + head
    return {"states": states, "weights": weights, "rollout": rollout, "update": update}


def memory_table() -> list[list[str]]:
    """GiB per GPU, and the cards on which a run fits."""
    rows = [["model", "ZeRO", "GPUs", "states", "weights", "rollout", "update", "fits on GPUs of … GB"]]
    for name, shape in SHAPES.items():
        for stage in (2, 3):
            for ranks in RANKS:
                parts = memory_parts(shape, stage, ranks)
                peak = max(parts.values())
                fits = [str(size) for size in (80, 141) if peak < FITS * 1e9 * size]
                cells = [f"{x / memory.GIB:.1f}" for x in parts.values()]
                rows.append([name, str(stage), str(ranks), *cells, " and ".join(fits) or "**neither**"])
    return rows


def seconds(shape: Shape, ranks: int, stage: int) -> dict[str, float]:
    """One PPO step: rollout, scoring, updates of policy and critic, and what is sent meanwhile."""
    p = shape.weights
    tokens = PROMPTS * (PROMPT + RESPONSE) / ranks  # of one rank
    rows = PROMPTS / ranks
    batches = max(1, rows / 256)  # that are generated one after the other
    cache = min(rows, 256) * shape.kv_bytes * (PROMPT + RESPONSE / 2)
    rollout = RESPONSE * batches * ((2 * p + cache) / HBM + LAUNCH)
    link = NVLINK if ranks <= 8 else NETWORK
    per_link = (ranks - 1) / ranks / link
    passes = max(MINI_BATCHES, tokens / TOKENS)  # at least one per mini-batch
    gradient = 2 * passes * 4 * p * per_link
    weights = 2 * MINI_BATCHES * 2 * p * per_link
    if stage == 2:
        gradient = 2 * gradient  # an all-reduce instead of a reduce-scatter
    else:
        weights += 4 * 2 * p * per_link
    return {"rollout": rollout, "scoring": 3 * 2 * p * tokens / FLOPS, "update": 2 * 6 * p * tokens / FLOPS,
            "sent": gradient + weights}


def time_table() -> list[list[str]]:
    """Seconds of a step and responses per second."""
    rows = [["model", "GPUs", "ZeRO", "rollout", "scoring", "update", "sent", "total",
             "responses per second"]]
    for name, shape in SHAPES.items():
        for ranks in RANKS if name != TOO_LARGE else ():
            for stage in (2, 3):
                parts = seconds(shape, ranks, stage)
                total = sum(parts.values())
                cells = [f"{x:.2f}" for x in parts.values()]
                rows.append([name, str(ranks), str(stage), *cells, f"{total:.1f}", f"{PROMPTS / total:.0f}"])
    return rows


def estimator_table() -> list[list[str]]:
    """What DeepSpeed's estimators say of one model's training state, beside the same by our formulas."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    rows = [["model", "GPUs", "ZeRO-2, DeepSpeed", "ZeRO-2, here", "ZeRO-3, DeepSpeed", "ZeRO-3, here"]]
    for name, shape in SHAPES.items():
        p = shape.weights
        for ranks in RANKS:
            options = {"num_gpus_per_node": 8, "num_nodes": ranks // 8, "cpu_offload": False}
            _, two, *_ = estimate_zero2_model_states_mem_needs(int(p), **options)
            _, three, *_ = estimate_zero3_model_states_mem_needs(
                int(p), shape.vocabulary * shape.hidden, cpu_offload_params=False, zero_init=True, **options)
            ours_two = 4 * p + 16 * p / ranks  # weights and one gradient; what is split
            ours_three = 4 * p + 18 * p / ranks
            cells = [f"{x / memory.GIB:.1f}" for x in (two, ours_two, three, ours_three)]
            rows.append([name, str(ranks), *cells])
    return rows


TEXT = """# What more GPUs bring, and what fits: arithmetic, and bytes that were counted

Made by `python scripts/scaling.py`. No machine with more than one GPU was at hand: only the first table
is measured, in two processes on a CPU. The others are formulas with the assumptions beside them; take
them as such.

## Bytes sent, counted

Two ranks, one PPO step (critic-free) on the demo model of {weights:,} weights, every collective of
`torch.distributed` wrapped (`python scripts/scaling.py --count`, counts in
[results/scaling](results/scaling/counts.json)). Bytes are those of the whole tensors, per weight; a ring
sends (W-1)/W of that per rank in a reduce-scatter or all-gather, and twice that in an all-reduce.

{counted}

So: gradients travel as fp32 (4 bytes per weight), under ZeRO-2 and 3 in every backward, under ZeRO-0
once per optimizer step. Large micro-batches (`--micro_batch_tokens`) make them rarer. ZeRO-2 gathers the
weights after each optimizer step, ZeRO-3 before each mini-batch, before the rollout and before each
scoring pass.

## Memory per GPU

GiB. P weights, W ranks, policy + critic + reference of the same size, bf16, AdamW, gradient
checkpointing. States 2 * 12 P / W; weights 6 P (ZeRO-2), 6 P / W + 2 P (ZeRO-3: one model is whole at a
time). Rollout: + KV cache of {rows} rows of {context} tokens. Update: + 4 P / W + 2 P of gradient +
activations of {tokens:,} tokens (one state per layer, and the inside of one layer, about 60 bytes per
token and hidden unit) + the head's chunks of logits, {head:.1f} GiB. "Fits": within {fits:.0%} of 80 or
141 GB. [memory.md](memory.md) has the same for one GPU.

{memory}

**70B does not fit at any number of GPUs**: a rollout and a pass of the update need its whole weights,
131 GiB, on each one. That would take tensor parallelism, in the passes and in the rollout, or weights
gathered layer by layer in the update and an inference engine of its own for the rollout; this file has
neither. `--offload` moves the states to CPU memory (12 bytes per trained weight and machine), and with
`all` the resting weights; the 2 P of the whole model stay.

## DeepSpeed's own estimate

GiB per GPU of one trained model's states, without activations and cache; ours: whole weights and one
gradient (4 P) and what is split (16 or 18 P / W). DeepSpeed counts under ZeRO-3 only the largest layer
as whole: it gathers one at a time.

{estimated}

## Time of a step, predicted

Seconds, for {prompts} prompts of {prompt} tokens, responses of {response}, one epoch of {mini_batches}
mini-batches. N tokens of one rank = prompts * (prompt + response) / W, rows of one rank = prompts / W.

* rollout = response tokens * max(1, rows / 256) * ((2 P + min(rows, 256) * KV bytes) / HBM + 1 ms). The
  plain loop of this file launches many small kernels per step: how near it comes to this was not
  measured
* scoring = 3 models * 2 P N / FLOPS; update = 2 models * 6 P N / FLOPS
* sent = 2 models * (backwards * 4 P * (2 for ZeRO-2) + mini-batches * 2 P) * (W-1)/W / link, + 4 * 2 P
  under ZeRO-3
* assumed: {flops:.0f} TFLOP/s reached, HBM {hbm:.1f} TB/s, link {nvlink:.0f} GB/s in a machine and
  {network:.0f} GB/s per GPU between machines. Not counted: the longest response of all ranks, for which
  all wait; overlap of sending and computing; evaluation.

{timed}

{too_large} is left out: it does not fit. What limits: with few rows per rank a decode step costs as much
as with many, so the rollout stops getting shorter, and between machines the fp32 gradients outweigh the
passes. More GPUs want more prompts per step, not the same divided.
"""


def document(counts: dict) -> str:
    """docs/scaling.md."""
    return TEXT.format(
        weights=counts["weights"], counted=memory.markdown(count_table(counts)),
        memory=memory.markdown(memory_table()), estimated=memory.markdown(estimator_table()),
        timed=memory.markdown(time_table()), rows=ROWS, context=CONTEXT, tokens=TOKENS,
        head=memory.HEAD_CHUNKS_ALIVE * memory.HEAD_CHUNK / memory.GIB, fits=FITS, prompts=PROMPTS,
        prompt=PROMPT, response=RESPONSE, mini_batches=MINI_BATCHES, flops=FLOPS / 1e12, hbm=HBM / 1e12,
        nvlink=NVLINK / 1e9, network=NETWORK / 1e9, too_large=TOO_LARGE)


def main(counting: bool) -> None:
    if counting:
        counts = {}
        for stage in STAGES:  # each in processes of its own
            with tempfile.TemporaryDirectory() as folder:
                counts |= count(Path(folder), [stage])
        COUNTS.parent.mkdir(parents=True, exist_ok=True)
        COUNTS.write_text(json.dumps(counts, indent=2) + "\n")
    DOCUMENT.write_text(document(json.loads(COUNTS.read_text())))


if __name__ == "__main__":
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--count", action="store_true", help="count the bytes sent anew")
    parser.add_argument("--rank_folder", type=Path, help="used by the script itself: this process is a rank")
    parser.add_argument("--stages", nargs="*", default=list(STAGES), help="used by the script itself")
    arguments = parser.parse_args()
    if arguments.rank_folder:
        count_rank(arguments.rank_folder, arguments.stages)
    else:
        main(arguments.count)
