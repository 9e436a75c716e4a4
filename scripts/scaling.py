"""Makes docs/scaling.md: what ppo_llm_multigpu.py sends and holds, and what to expect of more GPUs. Needs no GPU.

    python scripts/scaling.py            # counts in two processes on the CPU, a minute or two; the rest is arithmetic

Bytes sent are counted: every collective of torch.distributed is wrapped in a real run of two ranks. Memory and time are
formulas, printed with their results; nothing in them has been measured on several GPUs.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = {"0 (fp32)": {"zero_stage": 0, "dtype": "float32"}, "2 (fp32)": {"zero_stage": 2, "dtype": "float32"},
          "3 (fp32)": {"zero_stage": 3, "dtype": "float32"}, "2 (bf16)": {"zero_stage": 2, "dtype": "bfloat16"},
          "3 (bf16)": {"zero_stage": 3, "dtype": "bfloat16"}}
RUN = {"total_steps": 1, "train_batch_size": 16, "ppo_mini_batch_size": 8, "ppo_epochs": 1, "eval_every": 0, "lr": 1e-5,
       "device": "cpu", "max_response_length": 24, "ppo_micro_batch_size": 2, "save_every": 0, "adv_estimator": "rloo",
       "rollout_n": 2, "kl_ctrl_coef": 0.0}
# parameters, KV bytes per token (bf16), layers, hidden size, vocabulary
SIZES = {"0.5B (Qwen2.5)": (494e6, 12288, 24, 896, 151936), "7B (Qwen2.5)": (7616e6, 57344, 28, 3584, 152064),
         "70B (Llama 3)": (70554e6, 327680, 80, 8192, 128256)}
TOO_LARGE = "70B (Llama 3)"
COLLECTIVES = "all_reduce reduce broadcast all_gather_into_tensor reduce_scatter_tensor".split()
GIB, TOKENS, SLOTS, CONTEXT, LOGITS = 2**30, 16384, 64, 1024, 4 * 2**26
# assumptions of the time table: bf16 FLOP/s that passes reach, bytes/s of HBM, of NVLink and of the network per GPU
FLOPS, HBM, NVLINK, NETWORK = 400e12, 3.0e12, 300e9, 40e9
PROMPTS, PROMPT, RESPONSE, MINI_BATCHES = 1024, 150, 350, 4


def count_rank(folder: Path) -> None:
    """One rank: a training step of each stage, with the bytes that each kind of collective was given."""
    import dataclasses

    import torch.distributed as dist

    sent = defaultdict(float)

    def wrap(name: str):
        real = getattr(dist, name)

        def counted(*args, **options):  # the largest tensor is the whole: a gather's output, a scatter's input
            tensors = [x for x in (*args, *options.values()) if hasattr(x, "element_size")]
            sent[name] += max((x.numel() * x.element_size() for x in tensors), default=0)
            return real(*args, **options)

        setattr(dist, name, counted)

    for name in COLLECTIVES:
        wrap(name)
    sys.path.insert(0, str(ROOT))
    import ppo_llm_multigpu as script

    passes, real_in_step = [], script.in_step
    script.in_step = lambda *args: (lambda x: (passes.append(len(x)), x)[1])(real_in_step(*args))
    phases, real = {}, script.update

    def update(*args):
        before, _ = dict(sent), passes.clear()
        metrics = real(*args)
        phases["update"] = {name: sent[name] - before.get(name, 0) for name in sent}
        phases["passes"], phases["steps"] = sum(passes), len(passes)
        return metrics

    def collect(*args, real=script.collect_rollout):
        before = dict(sent)
        result = real(*args)
        phases["rollout"] = {name: sent[name] - before.get(name, 0) for name in sent}
        return result

    script.update, script.collect_rollout, results = update, collect, {}
    for stage, changes in STAGES.items():
        run_dir = str(folder / stage.replace(" ", ""))
        script.main(dataclasses.replace(script.DEMO, **RUN, **changes, output_dir=run_dir))
        results[stage] = dict(phases)
    if script.RANK == 0:
        import transformers

        lm = transformers.AutoModelForCausalLM.from_pretrained(script.DEMO.model)
        results["weights"] = sum(w.numel() for w in lm.parameters())
        (folder / "counts.json").write_text(json.dumps(results))


def count(folder: Path) -> dict:
    """Starts two ranks, and reads what they counted."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
                           "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--rank_folder", str(folder)]
    ranks = [subprocess.Popen(command, env=shared | {"RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(2)]
    if [rank.wait(timeout=900) for rank in ranks] != [0, 0]:
        sys.exit("a rank failed")
    return json.loads((folder / "counts.json").read_text())


def count_table(counts: dict) -> list[str]:
    """Bytes per weight: of the gradient per backward, of the weights per optimizer step, and per rollout."""
    n, rows = counts["weights"], []
    for stage in STAGES:
        update, rollout, passes, steps = (counts[stage][key] for key in ("update", "rollout", "passes", "steps"))
        reduced = sum(update.get(name, 0) for name in ("all_reduce", "reduce"))
        scattered = sum(x for name, x in update.items() if name.startswith("reduce_scatter"))
        gathered = sum(x for name, x in update.items() if name.startswith("all_gather"))
        before = sum(x for name, x in rollout.items() if name.startswith("all_gather"))
        per = (reduced + scattered) / n / (steps if stage.startswith("0") else passes)
        unit = "optimizer step" if stage.startswith("0") else "backward"
        weights = f"{gathered / n / steps:.2f} | {before / n:.2f}"
        rows.append(f"| {stage} | {passes} | {steps} | {per:.2f} per {unit} | {weights} |")
    return rows


def memory_table() -> list[str]:
    """GiB per GPU in a rollout and in an update, of P weights on W ranks."""
    rows = []
    for name, (p, kv, layers, hidden, _) in SIZES.items():
        cache, activations = SLOTS * CONTEXT * kv, TOKENS * hidden * (2 * layers + 60) + 3 * LOGITS
        for stage in (2, 3):
            for ranks in (8, 64, 512):
                states = 2 * 12 * p / ranks  # fp32 masters and AdamW's two means, of policy and critic
                weights = 3 * 2 * p if stage == 2 else 3 * 2 * p / ranks + 2 * p  # policy, critic, reference; one whole
                gradient = 4 * p / ranks + 2 * p  # the fp32 sum, split; the bf16 gradient of one backward, whole
                rollout, update = states + weights + cache, states + weights + gradient + activations
                fits = [str(size) for size in (80, 141) if max(rollout, update) < 0.92e9 * size]
                parts = " | ".join(f"{x / GIB:.1f}" for x in (states, weights, rollout, update))
                rows.append(f"| {name} | {stage} | {ranks} | {parts} | {' and '.join(fits) or '**neither**'} |")
    return rows


def seconds(p: float, kv: float, ranks: int, stage: int) -> dict[str, float]:
    """One PPO step: rollout, scoring, updates of policy and critic, and what is sent meanwhile."""
    tokens = PROMPTS * (PROMPT + RESPONSE) / ranks  # of one rank
    rows, link = PROMPTS / ranks, NVLINK if ranks <= 8 else NETWORK
    passes = max(MINI_BATCHES, tokens / TOKENS)  # at least one per mini-batch
    decode = RESPONSE * max(1, rows / 256) * ((2 * p + min(rows, 256) * kv * (PROMPT + RESPONSE / 2)) / HBM + 1e-3)
    ring = (ranks - 1) / ranks
    gradient = 2 * passes * 4 * p * ring / link * (2 if stage == 2 else 1)  # all-reduce in buckets, or reduce-scatter
    weights = 2 * MINI_BATCHES * 2 * p * ring / link + (0 if stage == 2 else 4 * 2 * p * ring / link)
    return {"rollout": decode, "scoring": 3 * 2 * p * tokens / FLOPS, "update": 2 * 6 * p * tokens / FLOPS,
            "sent": gradient + weights}


def time_table() -> list[str]:
    rows = []
    for name, (p, kv, *_) in SIZES.items():
        for ranks in (8, 64, 512) if name != TOO_LARGE else ():
            for stage in (2, 3):
                t = seconds(p, kv, ranks, stage)
                total = sum(t.values())
                parts = " | ".join(f"{x:.2f}" for x in t.values())
                rows.append(f"| {name} | {ranks} | {stage} | {parts} | {total:.1f} | {PROMPTS / total:.0f} |")
    return rows


def estimator_table() -> list[str]:
    """What DeepSpeed's estimators say of one model's training state."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    rows, options = [], {"num_gpus_per_node": 8, "cpu_offload": False}
    for name, (p, _, _, hidden, vocabulary) in SIZES.items():
        for nodes in (1, 8, 64):
            two = estimate_zero2_model_states_mem_needs(int(p), num_nodes=nodes, **options)[1]
            three = estimate_zero3_model_states_mem_needs(
                int(p), vocabulary * hidden, num_nodes=nodes, cpu_offload_params=False, zero_init=True, **options)[1]
            split = p / 8 / nodes
            ours = 2 * p + 2 * p + 16 * split, 2 * p + 2 * p + 18 * split  # weights, one gradient, what is split
            parts = " | ".join(f"{x / GIB:.1f}" for x in (two, ours[0], three, ours[1]))
            rows.append(f"| {name} | {8 * nodes} | {parts} |")
    return rows


TEXT = """# What more GPUs bring, and what fits: arithmetic, and bytes that were counted

Made by `python scripts/scaling.py`. No machine with more than one GPU was at hand: only the first table is measured, in
two processes on a CPU. The others are formulas with the assumptions beside them; take them as such.

## Bytes sent, counted

Two ranks, one PPO step (critic-free) on the demo model of {weights:,} weights, every collective of `torch.distributed`
wrapped. Bytes are those of the whole tensors, per weight; a ring sends (W-1)/W of that per rank in a reduce-scatter or
all-gather, and twice that in an all-reduce.

| ZeRO | backwards | optimizer steps | gradient: bytes per weight | gathered per optimizer step | for the rollout |
|---|---|---|---|---|---|
{counted}

So: gradients travel as fp32 (4 bytes per weight), under ZeRO-2 and 3 in every backward, under ZeRO-0 once per optimizer
step. Large micro-batches (`--micro_batch_tokens`) make them rarer. ZeRO-2 gathers the weights after each optimizer
step, ZeRO-3 before each mini-batch, before the rollout and before each scoring pass.

## Memory per GPU

GiB. P weights, W ranks, policy + critic + reference of the same size, bf16, AdamW, gradient checkpointing.
States 2 * 12 P / W; weights 6 P (ZeRO-2), 6 P / W + 2 P (ZeRO-3: one model is whole at a time). Rollout: + KV cache of
{slots} slots of {context} tokens. Update: + 4 P / W + 2 P of gradient + activations of {tokens:,} tokens (one state per
layer, one layer's inside, the head's chunks). "Fits": within 92 % of 80 or 141 GB.

| model | ZeRO | GPUs | states | weights | rollout | update | fits on GPUs of … GB |
|---|---|---|---|---|---|---|---|
{memory}

**70B does not fit at any number of GPUs**: a rollout and a pass of the update need its whole weights, 131 GiB, on each
one. That would take tensor parallelism, in the passes and in the rollout engine, or weights gathered layer by layer in
the update and an engine of its own for the rollout; this file has neither. `--offload` moves the states to CPU memory
(12 bytes per trained weight and machine), and with `all` the resting weights; the 2 P of the whole model stay.

## DeepSpeed's own estimate

GiB per GPU of one trained model's states, without activations and cache; ours: whole weights and one gradient (4 P) and
what is split (16 or 18 P / W). DeepSpeed counts under ZeRO-3 only the largest layer as whole: it gathers one at a time.

| model | GPUs | ZeRO-2, DeepSpeed | ZeRO-2, here | ZeRO-3, DeepSpeed | ZeRO-3, here |
|---|---|---|---|---|---|
{estimated}

## Time of a step, predicted

Seconds, for {prompts} prompts of {prompt} tokens, responses of {response}, one epoch of {mini_batches} mini-batches.
N tokens of one rank = prompts * (prompt + response) / W, rows of one rank = prompts / W.

* rollout = response tokens * max(1, rows / 256) * ((2 P + min(rows, 256) * KV bytes) / HBM + 1 ms)
* scoring = 3 models * 2 P N / FLOPS; update = 2 models * 6 P N / FLOPS
* sent = 2 models * (backwards * 4 P * (2 for ZeRO-2) + mini-batches * 2 P) * (W-1)/W / link, + 4 * 2 P under ZeRO-3
* assumed: {flops:.0f} TFLOP/s reached, HBM {hbm:.1f} TB/s, link {nvlink:.0f} GB/s in a machine and {network:.0f} GB/s
  per GPU between machines. Not counted: the longest response of all ranks, for which all wait; overlap of sending and
  computing; evaluation.

| model | GPUs | ZeRO | rollout | scoring | update | sent | total | responses per second |
|---|---|---|---|---|---|---|---|---|
{timed}

{too_large} is left out: it does not fit. What limits: with few rows per rank a decode step costs as much as with
many, so the rollout stops getting shorter, and between machines the fp32 gradients outweigh the passes. More GPUs want
more prompts per step, not the same divided.
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        counts = count(Path(folder))
    text = TEXT.format(
        weights=counts["weights"], counted="\n".join(count_table(counts)), memory="\n".join(memory_table()),
        estimated="\n".join(estimator_table()), timed="\n".join(time_table()), slots=SLOTS, context=CONTEXT,
        tokens=TOKENS, prompts=PROMPTS, prompt=PROMPT, response=RESPONSE, mini_batches=MINI_BATCHES, flops=FLOPS / 1e12,
        too_large=TOO_LARGE, hbm=HBM / 1e12, nvlink=NVLINK / 1e9, network=NETWORK / 1e9)
    (ROOT / "docs" / "scaling.md").write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank_folder", type=Path, help="used by the script itself: this process is a rank")
    arguments = parser.parse_args()
    count_rank(arguments.rank_folder) if arguments.rank_folder else main()
