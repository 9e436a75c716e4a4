#!/usr/bin/env bash
# GSM8K with PPO, the published settings (verl, Qwen2.5-0.5B-Instruct): 435 steps on one GPU with 80 GB.
# Minutes: not measured. Expected: strict accuracy >= 0.45 at step 30, >= 0.55 in the mean of the last ten.
set -euo pipefail
run=${1:-output/gsm8k_ppo}
python ppo_llm.py --model Qwen/Qwen2.5-0.5B-Instruct --total_steps 435 --output_dir "$run"
python scripts/check_run.py "$run" eval/accuracy 0.45 --step 30
python scripts/check_run.py "$run" eval/accuracy 0.55 --last 10
