"""Mutation check: plant bugs in the kernels, one at a time, and see that the suite catches each.

`python tests/mutants.py [name ...]` copies the repository's kernels and tests aside, edits the copy, and runs the one
test that is there to notice, stopping at its first failure. It exits non-zero when a mutant survives. A survivor means
that a test is missing or has moved, not that the mutant is wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutant:
    """One bug: in `file`, `original` (which stands there exactly `times` times) becomes `bug`; `test` must notice.

    The test is a node id under tests/kernels: a whole file costs a mutant up to a minute before it fails.
    """

    name: str
    file: str
    original: str
    bug: str
    test: str
    times: int = 1


MUTANTS = (
    Mutant("rms: eps outside the root", "rms_norm_kernels.py", "1.0 / tl.sqrt(tl.sum(squares, axis=1) / N + eps)",
           "1.0 / (tl.sqrt(tl.sum(squares, axis=1) / N) + eps)",
           "test_rms_norm.py::test_shapes"),
    Mutant("rms: dw partial sum lost", "rms_norm.py",
           "TENSOR, TENSOR, programs, N,", "TENSOR, TENSOR, programs - 1, N,",
           "test_rms_norm.py::test_shapes"),
    Mutant("rms: last row not masked", "rms_norm_kernels.py", "live = (row >= 0) & (row < M)  #",
           "live = (row >= 0) & (row <= M)  #",
           "test_rms_norm.py::test_shapes"),
    Mutant("rms: column mask missing", "rms_norm_kernels.py",
           "        mask = live[:, None] & (cols < N)[None, :]\n        KEPT",
           "        mask = live[:, None] & (cols < BLOCK_N)[None, :]\n        KEPT",
           "test_rms_norm.py::test_shapes"),
    Mutant("rms: stream's gradient dropped", "rms_norm_kernels.py", "        dh += tl.load(dstream_ptr",
           "        dh += 0 * tl.load(dstream_ptr",
           "test_rms_norm.py::test_strided_gradients"),
    Mutant("rms: weight offset forgotten in the backward", "rms_norm_kernels.py",
           "held = _load_scale(w_ptr, offset, cols, N, DTYPE) if w_ptr is not None and HOLD_SCALE",
           "held = _load_scale(w_ptr, 0.0, cols, N, DTYPE) if w_ptr is not None and HOLD_SCALE",
           "test_rms_norm.py::test_offset_and_eps"),
    Mutant("rms: stream not rounded before the norm", "rms_norm_kernels.py",
           "h = h.to(stream_ptr.dtype.element_ty).to(DTYPE)", "h = h.to(DTYPE)",
           "test_rms_norm.py::test_the_residual_stream_is_rounded_before_it_is_normalised"),
    Mutant("rms: first row left out of long ones", "rms_norm_kernels.py", "tiles - 1 - step", "tiles - step",
           "test_rms_norm.py::test_long_rows[torch.float16-(5, 16385)-{}]"),
    Mutant("rms: mean without the first tile", "rms_norm_kernels.py",
           "for start in range(0, N, BLOCK_N):\n        cols =",
           "for start in range(BLOCK_N, N, BLOCK_N):\n        cols =",
           "test_rms_norm.py::test_long_rows[torch.float16-(5, 16385)-{}]"),
    Mutant("rms: a weight that is not held left out", "rms_norm_kernels.py", "if tile >= 0:  #", "if tile < 0:  #",
           "test_rms_norm.py::test_long_rows"),
    Mutant("rows: 32-bit row offset", "rows.py",
           "(outer // layout[0]).to(tl.int64) * layout[2]", "(outer // layout[0]) * layout[2]",
           "test_rms_norm_torch.py::test_offsets_are_64_bit"),
    Mutant("rows: 32-bit column offset", "rows.py", "cols.to(tl.int64)[None, :]", "cols[None, :]",
           "test_rms_norm_torch.py::test_offsets_are_64_bit"),
    Mutant("rows: dimensions merged that do not", "rows.py", "groups[-1][1] == size * stride",
           "groups[-1][1] >= size * stride",
           "test_rms_norm.py::test_strided_inputs"),
    Mutant("rope: backward not inverted", "rope.py",
           "ctx.interleaved, not ctx.inverse)", "ctx.interleaved, ctx.inverse)",
           "test_rope.py::test_turning_back_gives_the_input"),
    Mutant("rope: features past the rotation not copied", "rope.py", "if BLOCK_REST > 1:", "if BLOCK_REST > 99:",
           "test_rope.py::test_rows_of_one_product"),
    Mutant("swiglu: derivative of silu is sigmoid", "swiglu.py",
           "dy * up * s * (1.0 + gate * (1.0 - s))", "dy * up * s",
           "test_swiglu.py::test_mixed_dtypes"),
    Mutant("cross-entropy: running sum not rescaled", "cross_entropy.py", "total * tl.exp(top - base) +", "total +",
           "test_cross_entropy.py::test_cross_entropy"),
    Mutant("cross-entropy: z-loss gradient halved", "cross_entropy.py", "1.0 + 2.0 * z_loss * lse",
           "1.0 + z_loss * lse",
           "test_cross_entropy.py::test_z_loss_and_ignore_index"),
    Mutant("cross-entropy: softcap's slope missing", "cross_entropy.py", "dx *= 1.0 - ratio * ratio", "dx *= 1.0",
           "test_linear_cross_entropy.py::test_smoothed_and_weighted_labels[5.0-smoothed-kept]"),
    Mutant("cross-entropy: gradient past the vocabulary", "cross_entropy.py", "!= ignore_index)[:, None] & mask, dx",
           "!= ignore_index)[:, None], dx",
           "test_cross_entropy.py::test_what_lies_past_the_vocabulary_is_not_read_and_its_gradient_is_zero"),
    Mutant("cross-entropy: smoothed labels of unweighted classes", "cross_entropy.py",
           "weighted += tl.sum(x * w[None, :], axis=1)", "weighted += tl.sum(x + 0.0, axis=1)",
           "test_cross_entropy.py::test_labels_are_torchs"),
    Mutant("cross-entropy: slope of a smoothed, weighted row", "cross_entropy.py", "own * (slope - smoothing)",
           "own * slope",
           "test_cross_entropy.py::test_labels_are_torchs"),
    Mutant("cross-entropy: mean over the count, not the weights", "cross_entropy.py",
           "return total.masked_fill(total == 0, 1)", "return kept.sum().clamp(min=1).float()",
           "test_cross_entropy.py::test_labels_are_torchs"),
    Mutant("linear cross-entropy: a chunk's dweight lost", "linear_cross_entropy.py", "self.dweight += a @ b",
           "self.dweight = a @ b",
           "test_linear_cross_entropy.py::test_smoothed_and_weighted_labels"),
    Mutant("linear cross-entropy: kept gradients of a sum", "linear_cross_entropy.py",
           "dloss /= count_targets(target, ignore_index, class_weight)", "dloss /= 1",
           "test_linear_cross_entropy.py::test_smoothed_and_weighted_labels"),
    Mutant("linear cross-entropy: rows of the copy not zeroed", "linear_cross_entropy.py", "copy[V:] = 0",
           "copy[V:] = float('nan')",
           "test_linear_cross_entropy.py::test_the_copy_of_a_weight_has_rows_of_zeros"),
    Mutant("linear cross-entropy: the factor rounded to the gradient's dtype", "linear_cross_entropy.py",
           "factor = dloss.reshape(1)", "factor = dloss.to(dx.dtype)",
           "test_linear_cross_entropy.py::test_the_gradient_that_arrives_is_not_rounded_before_the_product"),
    Mutant("attention: mask off by one", "attention/blocks.py",
           "visible & (j <= i + upper)", "visible & (j < i + upper)",
           "attention/test_attention.py::test_masks"),
    Mutant("attention: accumulator not rescaled", "attention/portable/forward.py",
           "v, acc * rescale[:, None],", "v, acc,",
           "attention/test_attention.py::test_masks"),
    Mutant("attention: row sum not rescaled", "attention/portable/forward.py",
           "l_i * rescale + tl.sum(p, 1)", "l_i + tl.sum(p, 1)",
           "attention/test_attention.py::test_masks"),
    Mutant("attention: scale missing in dk", "attention/portable/backward.py",
           "dk * scale, HEAD_DIM", "dk, HEAD_DIM",
           "attention/test_attention.py::test_masks"),
    Mutant("attention: scale missing in dq", "attention/portable/backward.py",
           "dq * scale, HEAD_DIM", "dq, HEAD_DIM",
           "attention/test_attention.py::test_masks"),
    Mutant("attention: wrong key head", "attention/portable/forward.py",
           "k_ptr = head_pointer(k_ptr, k_strides, b, h // (H // K), start_k)",
           "k_ptr = head_pointer(k_ptr, k_strides, b, h % K, start_k)",
           "attention/test_attention.py::test_each_query_head_reads_its_own_key_value_head"),
    Mutant("attention: a query head of the group lost in dk", "attention/portable/backward.py",
           "tl.range(h_kv * group, h_kv * group + group)", "tl.range(h_kv * group + 1, h_kv * group + group)",
           "attention/test_attention.py::test_masks"),
    Mutant("attention: stale log-sum-exp", "attention/portable/forward.py", "lse = (m_i + tl.math.log2(l_i)) * LN2",
           "lse = m_i * LN2",
           "attention/test_attention.py::test_masks"),
    Mutant("attention: delta dropped", "attention/portable/backward.py",
           "ds = p * (dp - delta[None, :])", "ds = p * dp",
           "attention/test_attention.py::test_masks"),
    Mutant("attention: softcap's slope missing in dq", "attention/portable/backward.py",
           "            ds *= slope\n        dq", "            ds *= 1.0\n        dq",
           "attention/test_attention.py::test_softcap_and_sinks[0.7-False-torch.float32]"),
    Mutant("attention: rows past the end stored", "attention/blocks.py",
           "mask = (first + rows < length)[:, None] & (cols < HEAD_DIM)[None, :]\n    tl.store",
           "mask = (first + rows <= length)[:, None] & (cols < HEAD_DIM)[None, :]\n    tl.store",
           "attention/test_attention.py::test_masks"),
    Mutant("attention: log-sum-exp's rounding left in dv", "attention/portable/backward.py",
           "            p *= _load_rows(unround_ptr", "            p *= 1.0 + 0 * _load_rows(unround_ptr",
           "attention/test_attention.py::test_the_backward_of_fp32_recomputes_rows_that_sum_to_one"),
    Mutant("alibi: distances from the first key, not the last", "attention/portable/backward.py",
           "distance(j - (m + S - T), rows)", "distance(j - m, rows)",
           "attention/test_alibi.py::test_against_the_oracle"),
    Mutant("alibi: one query head's slope for its group", "attention/portable/backward.py",
           "        alibi = alibi_slope(slopes_ptr, slopes_strides, b, h, exp_scale, ACC)\n        dk",
           "        alibi = alibi_slope(slopes_ptr, slopes_strides, b, h_kv, exp_scale, ACC)\n        dk",
           "attention/test_alibi.py::test_against_the_oracle"),
    Mutant("alibi: the bias of the first sequence for all", "attention/blocks.py",
           "tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1]\n        slope",
           "tl.cast(h, tl.int64) * strides[1]\n        slope",
           "attention/test_alibi.py::test_packed_sequences"),
)  # fmt: skip


# Imports what takes 3 s, once for all mutants; a fork of it then runs the tests of each folder that it is told of.
STARTER = """
import json, os, sys
import torch, triton.language

for line in sys.stdin:
    folder, arguments = json.loads(line)
    if (child := os.fork()) == 0:
        os.chdir(folder)
        for stream, path in enumerate((os.devnull, "out.txt", "out.txt")):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), stream)
        sys.path.insert(0, folder + "/src")  # ahead of the installed package: `rooflight.kernels` is the copy's
        import pytest
        status = pytest.main(arguments)
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def starter() -> subprocess.Popen[str]:
    """In the interpreter, which planted bugs are for. Ends when its input does, with this process."""
    return subprocess.Popen(
        [sys.executable, "-c", STARTER],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONSAFEPATH": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def survives(mutant: Mutant) -> tuple[bool, str]:
    """Plant the mutant in a copy, run its tests; whether they all passed, and the last lines they printed."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        for name in {"src", "tests", *(file.parent.name for file in ROOT.glob("*/__init__.py"))}:
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("conftest.py", "pyproject.toml"):
            shutil.copy(ROOT / name, copy / name)
        source = copy / "kernels" / mutant.file
        text = source.read_text(encoding="utf-8")
        assert text.count(mutant.original) == mutant.times, f"{mutant.name}: its original is not in {mutant.file}"
        source.write_text(text.replace(mutant.original, mutant.bug), encoding="utf-8")
        arguments = ["-x", "-q", "-p", "no:cacheprovider", f"tests/kernels/{mutant.test}"]
        tell, hear = starter().stdin, starter().stdout
        assert tell is not None
        assert hear is not None
        print(json.dumps([directory, arguments]), file=tell, flush=True)
        status = hear.readline().strip()
        printed = (copy / "out.txt").read_text(encoding="utf-8")
        assert status in ("0", "1"), f"{mutant.name}: pytest could not run\n{printed[-4000:]}"
        failures = [line for line in printed.splitlines() if line.startswith("FAILED")]
        return status == "0", failures[0].removeprefix("FAILED ") if failures else ""


def main(names: list[str]) -> int:
    chosen = [m for m in MUTANTS if not names or any(name in m.name for name in names)]
    survivors = []
    for mutant in chosen:
        start = time.monotonic()
        alive, caught_by = survives(mutant)
        survivors += [mutant.name] if alive else []
        verdict = "SURVIVED" if alive else f"caught by {caught_by[:90]}"
        print(f"{mutant.name:50s} {time.monotonic() - start:5.0f} s  {verdict}", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
