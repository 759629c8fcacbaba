#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under 9 minutes: every kernel checked against its twin, then timings of
# kernels, sampling and training. Needs torch, triton, numpy, safetensors and pytest, nothing else.
#
#   bash bench/gpu.sh [--out bench/results]
#
# Writes <out>/<device>.json and the logs beside it; ends by printing what failed, and fails if anything did.
set -uo pipefail
started_in=$PWD
cd "$(dirname "$0")/.."
out=$PWD/bench/results
if [ $# = 2 ] && [ "$1" = --out ]; then out=$(cd "$started_in" && realpath -m "$2")
elif [ $# != 0 ]; then echo "usage: bash bench/gpu.sh [--out FOLDER]"; exit 2; fi
python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || { echo "gpu.sh: there is no GPU"; exit 1; }
mkdir -p "$out/logs"
failed=()

part() {  # name, seconds it may take, command
    local name=$1 limit=$2 started=$SECONDS
    shift 2
    echo "== $name: $*"
    timeout "$limit" "$@" 2>&1 | tee "$out/logs/$name.log"
    local status=${PIPESTATUS[0]}
    echo "== $name: $((SECONDS - started)) s, exit $status"
    [ "$status" = 0 ] || failed+=("$name (exit $status, see $out/logs/$name.log)")
}

part tests 170 python3 -m pytest -q tests/test_kernels.py -p no:cacheprovider -k "not compiles and not fits and not spill"
part train_step 120 python3 bench/train_step.py --kernels triton --out "$out/logs/train_step.json"
part ms_per_frame 100 python3 bench/ms_per_frame.py --frames 64 --repeats 3 --out "$out/logs/ms_per_frame.json"
part small_windows 60 python3 bench/ms_per_frame.py --frames 1 16 --repeats 3 \
    --variants eager "triton compiled, CUDA graphs" --out "$out/logs/small_windows.json"
part kernels 80 python3 bench/kernels.py --frames 64 --out "$out/logs/kernels.json"

python3 - "$out" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch

out = Path(sys.argv[1])
parts = {p.stem: json.loads(p.read_text()) for p in sorted((out / "logs").glob("*.json"))}
name = torch.cuda.get_device_name().lower().replace(" ", "-")
(out / f"{name}.json").write_text(json.dumps(parts, indent=1) + "\n")
print(f"wrote {out / f'{name}.json'}: {', '.join(parts) or 'nothing'}")
PYTHON
if [ ${#failed[@]} = 0 ]; then echo "nothing failed"; else printf 'failed: %s\n' "${failed[@]}"; exit 1; fi
