#!/usr/bin/env bash
# On a machine with a GPU: the kernels' correctness suite, then the benchmarks; results as JSON and logs in OUT.
# Uses the torch, triton and pytest that python3 already has, and installs nothing from outside.
#   usage: bench/on_gpu.sh OUT
set -uo pipefail
out=$(mkdir -p "${1:?usage: bench/on_gpu.sh OUT}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv --system-site-packages "$scratch" || exit 1
# python3's packages may themselves live in an environment, which the new one does not see.
own=$("$scratch/bin/python" -c 'import site; print(site.getsitepackages()[0])')
python3 -c 'import site; print("\n".join(site.getsitepackages()))' >"$own/parent.pth"
"$scratch/bin/python" -m pip install --quiet --no-index --no-deps --no-build-isolation --editable . || exit 1

export PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv | tee "$out/gpu.csv"
# A hang costs four minutes, not the machine's whole loan.
timeout 240 "$scratch/bin/python" -P -m pytest tests/kernels -m "not slow" -q --timeout 120 --junitxml="$out/kernels.xml" 2>&1 | tee "$out/kernels.log"
status=${PIPESTATUS[0]}
timeout 120 "$scratch/bin/rooflight" bench ceilings 2>&1 | tee "$out/ceilings.log"
timeout 180 "$scratch/bin/rooflight" bench kernels --json "$out/kernels.json" 2>&1 | tee "$out/bench.log"
timeout 120 "$scratch/bin/rooflight" bench validate --json "$out/validate.json" 2>&1 | tee "$out/validate.log"
exit "$status"
