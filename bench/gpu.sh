#!/usr/bin/env bash
# Everything that needs a GPU, in parts that each fit into a short slot: bench/gpu.py says which.
#
#   bash bench/gpu.sh [tests | sample | train | kernels ...] [--out FOLDER] [--dry-run]
#
# Compile caches lie in one folder, $MOSTGAN_BENCH_CACHE or ~/.cache/mostgan/bench: keep it between parts.
set -euo pipefail
cache=${MOSTGAN_BENCH_CACHE:-$HOME/.cache/mostgan/bench}
mkdir -p "$cache"
export TRITON_CACHE_DIR=$cache/triton TORCHINDUCTOR_CACHE_DIR=$cache/inductor XDG_CACHE_HOME=$cache
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu.py" "$@"
