#!/usr/bin/env bash
# CartPole-v1 with ppo_classic.py, 500,000 steps on one CPU core; minutes and results are in docs/classic.md.
# Expected: a greedy return of 500 (475 is the bar of Gymnasium's "solved").
set -euo pipefail
run=${1:-output/classic_cartpole}
OMP_NUM_THREADS=1 python ppo_classic.py --env_id CartPole-v1 --total_timesteps 500000 --output_dir "$run"
