"""What the GPU's own counters say of one training step: tensor-core operations and bytes to and from DRAM.

Nsight Compute's command line, ncu, runs the step in a process of its own and replays each kernel for the counters. It
comes with the CUDA toolkit, and reading counters may need a permission that the machine's owner grants
(https://developer.nvidia.com/ERR_NVGPUCTRPERM): without either there are no counters, and nothing else changes.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress

import torch

from ...model import ModelConfig
from ...model.estimate import Estimate

TIMEOUT = 60.0  # seconds: replays slow a step down a hundredfold
LARGEST = 500e6  # parameters of a model whose step is counted: the counters save and restore memory at every kernel
BYTES = ("dram__bytes_read.sum", "dram__bytes_write.sum")
# Math operations on the tensor cores, two a multiply-add, by the operands' dtype.
TENSOR_OPERATIONS = {
    "bfloat16": "sm__ops_path_tensor_src_bf16_dst_fp32.sum",
    "float16": "sm__ops_path_tensor_src_fp16_dst_fp32.sum",
}  # fp32 products are IEEE, and pass the tensor cores by


def available(device: torch.device, dtype: str) -> bool:
    """Whether there are counters to ask."""
    return device.type == "cuda" and dtype in TENSOR_OPERATIONS and shutil.which("ncu") is not None


def count_step(e: Estimate, device: torch.device, *, timeout: float = TIMEOUT) -> tuple[float, float]:
    """(tensor-core operations, DRAM bytes) of one step of the estimate's model.

    Raises RuntimeError with ncu's last words where it fails or takes longer than `timeout` seconds, and for a model of
    more than LARGEST parameters, which would.
    """
    if e.parameters > LARGEST:
        raise RuntimeError(f"ncu: not asked for models of more than {LARGEST / 1e6:.0f} M parameters")
    operations = TENSOR_OPERATIONS[e.dtype]
    request = {
        "model": e.config.to_dict(),
        "batch_size": e.batch_size,
        "context_length": e.context_length,
        "dtype": e.dtype,
        "optimizer": e.optimizer,
        "device": str(device),
    }
    # ncu holds the clocks at their base by itself, and a card that it is stopped on keeps them there
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--print-units", "base"]
    command += ["--metrics", ",".join((operations, *BYTES)), sys.executable, "-P", "-c"]
    command += ["from rooflight.bench.predict.counters import main; main()", json.dumps(request)]
    status, output, errors = _bounded(command, timeout)
    if status != 0:
        words = (output + errors).strip().splitlines() or [f"exit status {status}"]
        raise RuntimeError(f"ncu: {words[-1]}")
    totals = sum_metrics(output.splitlines())
    missing = [name for name in (operations, *BYTES) if name not in totals]
    if missing:
        raise RuntimeError(f"ncu: its answer has no {missing[0]}")
    return totals[operations], sum(totals[name] for name in BYTES)


def _bounded(command: list[str], timeout: float) -> tuple[int, str, str]:
    """Exit status, output and errors of ncu; past the timeout it is ended, with the process that it watches.

    Raises RuntimeError then: the watched process alone would keep the GPU, and the pipes, for as long as it likes.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"ncu: no answer in {timeout:.0f} seconds") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output, errors


def sum_metrics(lines: Iterable[str]) -> dict[str, float]:
    """{metric: its sum over every kernel} of ncu's CSV, which follows lines of its own that begin with ==."""
    totals: dict[str, float] = defaultdict(float)
    for row in csv.DictReader(line for line in lines if line.startswith('"')):
        totals[row["Metric Name"]] += float(row["Metric Value"].replace(",", ""))
    return dict(totals)


def main() -> None:
    """In the process that ncu watches: one step, after one that allocates and compiles."""
    from .step import Step

    request = json.loads(sys.argv[1])
    step = Step(
        ModelConfig(**request["model"]),
        request["batch_size"],
        request["context_length"],
        getattr(torch, request["dtype"]),
        torch.device(request["device"]),
        optimizer=request["optimizer"],
    )
    step()
    torch.cuda.profiler.start()
    step()
    torch.cuda.profiler.stop()
