#!/usr/bin/env bash
# ppo_llm_multigpu.py on all GPUs of this machine, or on those of the machines in a host file:
#   scripts/multigpu.sh --model Qwen/Qwen2.5-7B-Instruct --zero_stage 3 --gradient_checkpointing
#   HOSTFILE=hosts scripts/multigpu.sh --model …       lines of the file: NAME slots=8
#   NODES=2 NODE=0 MASTER=10.0.0.1 scripts/multigpu.sh --model …     and the same with NODE=1 on the second machine
# The last form needs no ssh between the machines. All machines must see --output_dir under the same path.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -n "${HOSTFILE:-}" ]; then
    exec deepspeed --hostfile "$HOSTFILE" ppo_llm_multigpu.py "$@"
fi
if [ -n "${NODES:-}" ]; then
    gpus=${GPUS:-$(python -c "import torch; print(torch.cuda.device_count())")}
    exec torchrun --nnodes "$NODES" --node_rank "$NODE" --nproc_per_node "$gpus" \
        --master_addr "$MASTER" --master_port "${MASTER_PORT:-29500}" ppo_llm_multigpu.py "$@"
fi
exec deepspeed ppo_llm_multigpu.py "$@"
