#!/usr/bin/env bash
# Qwen2.5-7B-Instruct on GSM8K, ZeRO-3, on the 8 GPUs (80 GB) of one machine; minutes and result: not measured.
# Expected: a strict accuracy of at least 0.80 in the last two evaluations.
# Other launchers (host files, torchrun on several machines, SLURM): scripts/multigpu.sh, docs/multigpu.md.
set -euo pipefail
run=${1:-output/gsm8k_7b}
deepspeed ppo_llm_multigpu.py --model Qwen/Qwen2.5-7B-Instruct --zero_stage 3 --gradient_checkpointing \
    --critic_warmup 5 --total_steps 105 --output_dir "$run"
python scripts/check_run.py "$run" eval/accuracy 0.80 --last 2
