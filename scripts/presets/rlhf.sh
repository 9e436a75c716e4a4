#!/usr/bin/env bash
# Preference pairs, a reward model, PPO against it with and without KL: the demo model on a CPU with 2 cores.
# About 20 minutes (docs/results.md). Expected: with KL the policy beats its start in >= 60 % of the cases.
set -euo pipefail
folder=${1:-output/rlhf}
scripts/rlhf_demo.sh "$folder"
python - "$folder/report.csv" <<'PY'
import sys, pandas
report = pandas.read_csv(sys.argv[1])
best = report[report["policy"] == "ppo_kl"].iloc[-1]
print(best.to_string())
sys.exit(int(not best["win_rate"] >= 0.6))
PY
