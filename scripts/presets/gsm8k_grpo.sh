#!/usr/bin/env bash
# GSM8K with GRPO: no critic, five responses per prompt, KL as a loss, Qwen2.5-0.5B-Instruct; one GPU with 80 GB.
# Minutes and result: not measured here. Expected is what PPO reaches (0.50 is the bar).
set -euo pipefail
run=${1:-output/gsm8k_grpo}
python ppo_llm.py --model Qwen/Qwen2.5-0.5B-Instruct --adv_estimator grpo --rollout_n 5 \
    --train_batch_size 256 --ppo_mini_batch_size 320 --use_kl_loss --total_steps 435 --output_dir "$run"
python scripts/check_run.py "$run" eval/accuracy 0.50 --last 10
