#!/usr/bin/env bash
# On a machine with a GPU: results first, hang-safe, then speed; results as JSON and logs in OUT, in under 10 minutes.
# Uses the torch, triton and pytest that python3 already has, and installs nothing. One part that fails loses no other.
#   usage: bench/on_gpu.sh OUT [kernels|tests|tune ...]       (all but tune when left out)
set -uo pipefail
out=$(mkdir -p "${1:?usage: bench/on_gpu.sh OUT [part ...]}" && cd "$1" && pwd)
parts=" ${*:2} "
cd "$(dirname "$0")/.."

# The folders under their import name, as an installation would place them.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir "$site/rooflight"
for room in kernels model tokenizer training bench; do ln -s "$PWD/$room" "$site/rooflight/$room"; done
export PYTHONPATH="$site" PYTHONUNBUFFERED=1 COLUMNS=150
rooflight() { timeout -k 10 "$1" python3 -P -c 'from rooflight.bench.cli import main; main()' "${@:2}"; }
wanted() { [[ $parts == "  " || $parts == *" $1 "* ]]; }
status=0

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit --format=csv | tee "$out/gpu.csv"
rooflight 60 bench paths 2>&1 | tee "$out/paths.log"

# Ceilings, then small cases of every kind in a process that may hang, 100 backward runs compared to the last bit, then
# each large case: checked, timed, written down before the next begins.
if wanted kernels; then
    rooflight 560 bench kernels --seconds "${KERNEL_SECONDS:-500}" --json "$out/kernels.json" 2>&1 | tee "$out/bench.log"
    [[ -s $out/kernels.json ]] || status=1
fi
# The suite as it runs on a CPU, on the GPU.
if wanted tests; then
    timeout -k 10 "${TEST_SECONDS:-300}" python3 -P -m pytest tests/kernels -m "not slow" -q --timeout 120 \
        --junitxml "$out/kernels.xml" 2>&1 | tee "$out/kernels.log"
    status=$((status | PIPESTATUS[0]))
    if command -v compute-sanitizer > /dev/null; then
        timeout -k 10 200 compute-sanitizer --error-exitcode 9 python3 -P -m rooflight.bench.measure.worker \
            "$(python3 -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')" sanitized '[]' 2>&1 |
            tee "$out/sanitizer.log"
        status=$((status | PIPESTATUS[0]))
    fi
fi
if [[ $parts == *" tune "* ]]; then
    rooflight 500 bench tune 2>&1 | tee "$out/tune.log"
    cp "${XDG_CACHE_HOME:-$HOME/.cache}"/rooflight/attention-*.json "$out/" || status=1
fi
exit "$status"
