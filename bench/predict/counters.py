"""What the GPU's own counters say of one training step: tensor-core operations and bytes to and from DRAM.

Nsight Compute's command line, ncu, runs the step in a process of its own and replays each kernel for the counters. It
comes with the CUDA toolkit, and reading counters may need a permission that the machine's owner grants
(https://developer.nvidia.com/ERR_NVGPUCTRPERM): without either there are no counters, and nothing else changes.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable

import torch

from ...model import ModelConfig
from ...model.estimate import Estimate

TIMEOUT = 300.0  # seconds: replays slow a step down a hundredfold
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

    Raises RuntimeError with ncu's last words where it fails or takes longer than `timeout` seconds.
    """
    operations = TENSOR_OPERATIONS[e.dtype]
    request = {
        "model": e.config.to_dict(),
        "batch_size": e.batch_size,
        "context_length": e.context_length,
        "dtype": e.dtype,
        "optimizer": e.optimizer,
        "device": str(device),
    }
    command = ["ncu", "--profile-from-start", "off", "--csv", "--print-units", "base"]
    command += ["--metrics", ",".join((operations, *BYTES)), sys.executable, "-P", "-c"]
    command += ["from rooflight.bench.predict.counters import main; main()", json.dumps(request)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"ncu: no answer in {timeout:.0f} seconds") from None
    if done.returncode != 0:
        words = (done.stdout + done.stderr).strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"ncu: {words[-1]}")
    totals = sum_metrics(done.stdout.splitlines())
    missing = [name for name in (operations, *BYTES) if name not in totals]
    if missing:
        raise RuntimeError(f"ncu: its answer has no {missing[0]}")
    return totals[operations], sum(totals[name] for name in BYTES)


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
