#!/usr/bin/env bash
# Trains on NGPU processes of this machine: on its GPUs where there is one for each, else on the CPU.
#   NGPU=4 ./run_train.sh --module llama3 --config debugmodel \
#       --parallelism.data_parallel_shard_degree=2 --parallelism.tensor_parallel_degree=2
# MODULE (or MODEL) and CONFIG in the environment stand for --module and --config; a flag wins. PYTHON names the interpreter;
# without it, that of the active environment. A mistake is told before anything is started; of ranks that fail, the first.
set -euo pipefail

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # ranks of one machine share its cores; without a limit each would take them all

exec "${PYTHON:-python}" -m torchspan.train.launch "${NGPU:-1}" "$@"
