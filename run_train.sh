#!/usr/bin/env bash
# Trains on NGPU processes of this machine, on gloo where there is no GPU:
#   NGPU=4 ./run_train.sh --module llama3 --config debugmodel \
#       --parallelism.data_parallel_shard_degree=2 --parallelism.tensor_parallel_degree=2
# PYTHON names the interpreter; without it, that of the active environment.
set -euo pipefail

NGPU="${NGPU:-1}"
PYTHON="${PYTHON:-python}"
# ranks of one machine share its cores; without a limit each would take them all
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$NGPU" --local-ranks-filter=0 -m torchspan train "$@"
