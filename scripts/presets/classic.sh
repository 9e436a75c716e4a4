#!/usr/bin/env bash
# CartPole-v1 with ppo_classic.py, 500,000 steps on one CPU core: 0.8 minutes (docs/results/classic/benchmark.csv).
# Expected: a greedy return of 500; in training at least 475 in the mean of the last 100 episodes ("solved").
set -euo pipefail
run=${1:-output/classic_cartpole}
OMP_NUM_THREADS=1 python ppo_classic.py --env_id CartPole-v1 --total_timesteps 500000 --output_dir "$run"
python scripts/check_run.py "$run" rollout/return_100 475
