#!/usr/bin/env bash
# One node's part of a job: its caches, its log folder, and torchrun, which starts the ranks. The arguments are those of
# `riverrun train`; everything else comes from the variables that riverrun.sh exports.
set -euo pipefail

# Compilers' caches lie on the node: thousands of small files, which ranks of all nodes would write at once. The folder
# is kept for the next start, but never taken over from another user.
caches="${RIVERRUN_CACHE_DIR:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/riverrun-$(id -u)}"
(umask 077 && mkdir -p "$caches") 2>/dev/null || true
if [[ -L "$caches" || ! -d "$caches" || ! -O "$caches" || ! -w "$caches" ]]; then
    caches=$(mktemp -d)
fi
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$caches/triton}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$caches/inductor}"

ranks="${RIVERRUN_NPROC:-${SLURM_GPUS_ON_NODE:-}}"
if [[ -z "$ranks" ]]; then
    echo "error: SLURM gave this job no GPUs: say --gpus-per-node G, or --gpus-per-node 0 --nproc N for CPUs" >&2
    exit 2
fi
threads=$(( ${SLURM_CPUS_ON_NODE:-1} / ranks ))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( threads > 0 ? threads : 1 ))}"

# shellcheck disable=SC2016 # torchrun fills it in
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank ${rank}] '
# --max-restarts 0: a rank's end is the end of the step, and the batch script decides. Ranks that were told to save by
# SIGUSR1 or SIGTERM are left the time to do it.
exec "$RIVERRUN_PYTHON" -m torch.distributed.run \
    --nnodes "$SLURM_NNODES" \
    --node-rank "$SLURM_NODEID" \
    --nproc-per-node "$ranks" \
    --rdzv-backend static \
    --rdzv-endpoint "$RIVERRUN_RENDEZVOUS" \
    --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --max-restarts 0 \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --shutdown-timeout "$RIVERRUN_GRACE" \
    --log-dir "$RIVERRUN_LOGS/$SLURMD_NODENAME" \
    --tee 3 --local-ranks-filter 0 \
    -m riverrun.launch.cli train "$@"
