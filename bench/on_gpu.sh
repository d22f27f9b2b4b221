#!/usr/bin/env bash
# On a machine with a GPU: correctness, then speed. Uses the torch, triton and pytest that python3 already has, and
# installs nothing. One part that fails loses no other, and every part keeps what it has found when its time is up.
#   usage: bench/on_gpu.sh OUT [tests|lengths|ceilings|validate|kernels|norms|cubins|tune|sanitize ...]
# Without parts: tests, ceilings, validate and kernels, in 9 minutes. Of the Hopper attention first `lengths` alone, then
# `kernels` alone: right at every length by every schedule, then the tables. OUT: log.txt with all that was printed, and a JSON file for each part.
set -uo pipefail
out=$(mkdir -p "${1:?usage: bench/on_gpu.sh OUT [part ...]}" && cd "$1" && pwd)
parts=" ${*:2} "
[[ $parts == "  " ]] && parts=" tests ceilings validate kernels "
cd "$(dirname "$0")/.."

export PYTHONPATH="$PWD/src" PYTHONUNBUFFERED=1 COLUMNS=150

status=0
deadline=$((SECONDS + ${TOTAL_SECONDS:-530}))
# left SECONDS: so many, or what is left of them all.
left() { echo $((SECONDS >= deadline ? 0 : deadline - SECONDS < $1 ? deadline - SECONDS : $1)); }
# run NAME SECONDS COMMAND ...: for that long at most; then Ctrl-C, on which a command tells what it has, then an end.
run() {
    local seconds
    seconds=$(left "$2")
    echo "== $(date +%T) $1, at most $seconds s" | tee -a "$out/log.txt"
    ((seconds > 0)) || { status=1 && return; }
    timeout -s INT -k 10 "$seconds" "${@:3}" 2>&1 | tee -a "$out/log.txt"
    status=$((status | PIPESTATUS[0]))
}
# A shell in the background has its children ignore Ctrl-C: take it back.
ctrl_c='import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)'
rooflight() { run "$3" "$1" python3 -P -c "$ctrl_c; from rooflight.bench.cli import main; main()" "${@:2}"; }
wanted() { [[ $parts == *" $1 "* ]]; }
has() { python3 -P -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }
cached() { cp "${XDG_CACHE_HOME:-$HOME/.cache}/rooflight"/$1 "$out/" || status=1; }

: > "$out/log.txt"
run GPU 20 nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit --format=csv
rooflight 60 bench paths

# The suite as it runs on a CPU, on the GPU, a process on each core: each failure's name and first line as it happens.
if wanted tests; then
    options=(-p no:benchmark -m "not slow and not cpu" -q --tb=short --announce)
    has xdist && options+=(-n "$(($(nproc) < 16 ? $(nproc) : 16))" --dist worksteal)
    has pytest_timeout && options+=(--timeout 90 -o timeout_method=thread) # ends the process: a GPU can hang
    # Sixteen processes need no threads of their own, nor as many processes again to compile.
    OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 run tests "${TEST_SECONDS:-140}" \
        python3 -P -c "$ctrl_c; import pytest; sys.exit(pytest.main(sys.argv[1:]))" \
        "${options[@]}" tests/kernels tests/model tests/training
fi
# The Hopper attention at every length from 1 to 300 and at longer ones, both passes, every schedule of the forward.
wanted lengths && run lengths "${LENGTH_SECONDS:-300}" \
    python3 -P -m rooflight.bench.measure.lengths "$(($(left "${LENGTH_SECONDS:-300}") - 20))"
if wanted sanitize; then
    run sanitize 200 compute-sanitizer --error-exitcode 9 python3 -P -m rooflight.bench.measure.worker \
        "$(python3 -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')" sanitized '[]'
fi
if wanted ceilings; then
    rooflight 45 bench ceilings
    cached 'ceilings-*.json'
fi
wanted validate && rooflight 150 bench validate --json "$out/validate.json"
# Small cases of every kind in a process that may hang, 100 backward runs compared to the last bit, then each large case:
# checked, timed, written down before the next begins. It takes what time is left.
if wanted kernels; then
    rooflight 520 bench kernels --seconds "${KERNEL_SECONDS:-$(($(left 520) - 20))}" --json "$out/kernels.json"
    [[ -s $out/kernels.json ]] || status=1
fi
# RMSNorm's tiles beside others that may be faster.
wanted norms && run norms 70 python3 -P -m rooflight.bench.measure.norms 50
# Another triton's machine code, from the folder $CUBINS (`python -m rooflight.bench.measure.cubins build` there).
wanted cubins && run cubins 70 python3 -P -m rooflight.bench.measure.cubins check "${CUBINS:-cubins}" 60
if wanted tune; then
    rooflight 500 bench tune
    cached 'attention-*.json'
fi
exit "$status"
