#!/usr/bin/env bash
# From preferences to a policy, on a CPU and without a network: preference pairs from the demo model, with a rule as the
# human; a reward model; PPO against it with and without KL; a report (FOLDER/report.csv, report.png), see docs/results.md.
#
#     scripts/rlhf_demo.sh [FOLDER]        # default output/rlhf
#
# SEED is that of all parts. STEPS, BATCH, PROMPTS, PAIR_PROMPTS and EPOCHS shorten it: the tests run it that way.
set -euo pipefail
folder=${1:+$(realpath -m "$1")}
cd "$(dirname "$0")/.."
folder=${folder:-output/rlhf}
model=assets/demo
seed=${SEED:-1}
if [ -e "$folder" ]; then
    echo "error: $folder exists: choose another folder" >&2
    exit 2
fi
python scripts/rlhf_demo.py pairs --folder "$folder" --prompts "${PAIR_PROMPTS:-4000}" --seed "$seed"
python scripts/train_reward_model.py --model "$model" --dataset "$folder/pairs.jsonl" --lr 3e-4 \
    --total_epochs "${EPOCHS:-2}" --seed "$seed" --output_dir "$folder/reward_model"
for run in "kl 0.1" "no_kl 0"; do
    read -r name coefficient <<<"$run"
    python ppo_llm.py --dataset "$folder/prompts.jsonl" --reward "$folder/reward_model/model" \
        --kl_ctrl_coef "$coefficient" --lr 1e-4 --total_steps "${STEPS:-50}" \
        --train_batch_size "${BATCH:-128}" --save_every 10 --save_total_limit 9 --eval_every 0 --seed "$seed" \
        --output_dir "$folder/ppo_$name"
done
python scripts/rlhf_demo.py report --folder "$folder" --prompts "${PROMPTS:-600}" --seed "$seed"
