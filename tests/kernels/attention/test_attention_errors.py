"""Bad input is refused with a ValueError that names the argument, what was given and what was expected."""

from __future__ import annotations

import pytest
import torch

from rooflight.kernels.attention import flash_attention, flash_attention_varlen


def dense(**changes):
    shapes = {"q": (2, 4, 8, 16), "k": (2, 2, 8, 16), "v": (2, 2, 8, 16)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()} | changes


def packed(**changes):
    ends = torch.tensor([0, 3, 8], dtype=torch.int32)
    shapes = {"q": (8, 4, 16), "k": (8, 2, 16), "v": (8, 2, 16)}
    bounds = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": 5, "max_seqlen_k": 5}
    return {name: torch.zeros(shape) for name, shape in shapes.items()} | bounds | changes


DENSE = {
    "rank of q": ({"q": torch.zeros(4, 8, 16)}, r"q: expected shape \(B, H, T, D\), got \(4, 8, 16\)"),
    "rank of k": ({"k": torch.zeros(2, 8, 16)}, r"k: expected shape \(B, K, S, D\), got \(2, 8, 16\)"),
    "shape of v": ({"v": torch.zeros(2, 2, 9, 16)}, r"v: expected k's shape \(2, 2, 8, 16\), got \(2, 2, 9, 16\)"),
    "batch": (dict.fromkeys("kv", torch.zeros(3, 2, 8, 16)), "k: expected batch size 2"),
    "head size": (dict.fromkeys("kv", torch.zeros(2, 2, 8, 32)), "k: expected head size 16"),
    "head size 0": (dict.fromkeys("qkv", torch.zeros(2, 2, 8, 0)), "q: expected a head size of 1 to 512"),
    "head size 513": (dict.fromkeys("qkv", torch.zeros(2, 2, 8, 513)), "q: expected a head size of 1 to 512"),
    "heads": (dict.fromkeys("kv", torch.zeros(2, 3, 8, 16)), "k: expected a number of heads that divides q's 4"),
    "no heads": (dict.fromkeys("kv", torch.zeros(2, 0, 8, 16)), "k: expected a number of heads that divides q's 4"),
    "integers": (dict.fromkeys("qkv", torch.zeros(2, 2, 8, 16, dtype=torch.int32)), "q: expected dtype .*, got int32"),
    "mixed dtypes": ({"v": torch.zeros(2, 2, 8, 16).half()}, "v: expected dtype torch.float32, as q"),
    "devices": ({"k": torch.zeros(2, 2, 8, 16, device="meta")}, "k: expected device cpu, as q, got meta"),
    "shape of sinks": ({"sinks": torch.zeros(2)}, r"sinks: expected shape \(4,\), one per query head, got \(2,\)"),
    "dtype of sinks": ({"sinks": torch.zeros(4, dtype=torch.long)}, "sinks: expected dtype .*, got int64"),
    "scale 0": ({"scale": 0.0}, "scale: expected a finite number above 0, got 0.0"),
    "scale inf": ({"scale": float("inf")}, "scale: expected a finite number above 0, got inf"),
    "scale nan": ({"scale": float("nan")}, "scale: expected a finite number above 0, got nan"),
    "softcap": ({"softcap": -1.0}, "softcap: expected a finite number, at least 0 .*, got -1.0"),
    "window": ({"window": -1}, r"window: expected a size or \(left, right\), at least 0, got -1"),
    "window of three": ({"window": (1, 2, 3)}, r"window: expected a size or \(left, right\), .*, got \(1, 2, 3\)"),
    "right window": ({"window": (3, -2), "causal": False}, r"window: expected .*, at least 0, got \(3, -2\)"),
}


@pytest.mark.parametrize("case", DENSE)
def test_dense(case):
    changes, message = DENSE[case]
    with pytest.raises(ValueError, match=message):
        flash_attention(**dense(**changes))


def _ends(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


VARLEN = {
    "rank": ({"q": torch.zeros(1, 8, 4, 16)}, r"q: expected shape \(total_q, H, D\)"),
    "int64": ({"cu_seqlens_q": _ends(0, 3, 8, dtype=torch.int64)}, "cu_seqlens_q: .*dtype int32, got .*int64"),
    "rank of bounds": ({"cu_seqlens_k": _ends(0, 3, 8)[None]}, r"cu_seqlens_k: expected shape \(sequences \+ 1,\)"),
    "no bounds": ({"cu_seqlens_k": _ends()}, r"cu_seqlens_k: expected shape \(sequences \+ 1,\)"),
    "start": ({"cu_seqlens_q": _ends(1, 3, 8)}, r"cu_seqlens_q: .*rise from 0 to at most 8, got \[1, 3, 8\]"),
    "end": ({"cu_seqlens_k": _ends(0, 3, 9)}, r"cu_seqlens_k: .*rise from 0 to at most 8, got \[0, 3, 9\]"),
    "falling": ({"cu_seqlens_q": _ends(0, 9, 8)}, r"cu_seqlens_q: .*rise from 0 to at most 8, got \[0, 9, 8\]"),
    "count": ({"cu_seqlens_k": _ends(0, 3, 5, 8)}, r"cu_seqlens_k: expected cu_seqlens_q's shape \(3,\), got \(4,\)"),
    "max too small": ({"max_seqlen_q": 4}, "max_seqlen_q: expected at least 5, got 4"),
    "max of keys": ({"max_seqlen_k": 1}, "max_seqlen_k: expected at least 5, got 1"),
    "negative max": ({"max_seqlen_k": -1}, "max_seqlen_k: expected at least 0, got -1"),
    "device of bounds": ({"cu_seqlens_q": _ends(0, 3, 8).to("meta")}, "cu_seqlens_q: expected device cpu"),
}


@pytest.mark.parametrize("case", VARLEN)
def test_varlen(case):
    changes, message = VARLEN[case]
    with pytest.raises(ValueError, match=message):
        flash_attention_varlen(**packed(**changes))


def test_the_unchanged_inputs_are_accepted():
    assert flash_attention(**dense()).shape == (2, 4, 8, 16)
    assert flash_attention_varlen(**packed()).shape == (8, 4, 16)
