#!/usr/bin/env bash
# A value model before the policy learns: in a first run, with --lr 0, only the critic does; a second run starts from
# the folder critic/ that it leaves, a third one without it. Prints the explained variance of their first rollouts, whose
# responses the critic has not seen. Leave out --total_steps 1 in the second run to train the policy.
set -euo pipefail
cd "$(dirname "$0")/.."
output=${1:-output/pretrain_critic}
common="--critic_lr 3e-4 --lam_critic 1 --eval_every 0"  # lam_critic 1: the returns are scores, not the critic's own guesses
python ppo_llm.py $common --lr 0 --ppo_epochs 1 --critic_ppo_epochs 4 --total_steps 12 --output_dir "$output/critic"
python ppo_llm.py $common --seed 2 --total_steps 1 --critic_model "$output/critic/critic" --output_dir "$output/with"
python ppo_llm.py $common --seed 2 --total_steps 1 --output_dir "$output/without"
for run in with without; do
    python -c "import pandas; print('$run:', pandas.read_csv('$output/$run/training_metrics.csv')['value/explained_variance'][0])"
done
