#!/usr/bin/env bash
# On a machine with a GPU: the kernels' correctness suite, then the benchmarks; results as JSON and logs in OUT.
# Uses the torch, triton and pytest that python3 already has, and installs nothing.
#   usage: bench/on_gpu.sh OUT
set -uo pipefail
out=$(mkdir -p "${1:?usage: bench/on_gpu.sh OUT}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."

# The folders under their import name, as an installation would place them.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir "$site/rooflight"
for room in kernels model tokenizer training bench; do ln -s "$PWD/$room" "$site/rooflight/$room"; done
export PYTHONPATH="$site" PYTHONUNBUFFERED=1
rooflight() { timeout "$1" python3 -P -c 'from rooflight.bench.cli import main; main()' "${@:2}"; }

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv | tee "$out/gpu.csv"
# Each part has its own time limit: a kernel that hangs costs minutes, not the whole loan of a machine.
timeout 240 python3 -P -m pytest tests/kernels -m "not slow" -q --timeout 120 --junitxml "$out/kernels.xml" 2>&1 |
    tee "$out/kernels.log"
status=${PIPESTATUS[0]}
rooflight 90 bench ceilings 2>&1 | tee "$out/ceilings.log"
rooflight 240 bench kernels --json "$out/kernels.json" 2>&1 | tee "$out/bench.log"
exit "$status"
