"""Bytes: what crosses the boundary of every kernel that a training step launches, against the estimate's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rooflight import kernels
from rooflight.model import ModelConfig, Transformer, estimate
from support.traffic import Traffic

pytestmark = pytest.mark.cpu  # a GPU's operators have the same arguments

CONFIG = ModelConfig(48, 16, 2, 4, n_kv_head=2, d_model=64, d_ff=96)
CONFIGS = {"swiglu": CONFIG, "gelu": replace(CONFIG, ffn="gelu"), "qk-norm": replace(CONFIG, qk_norm=True)}


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("name", CONFIGS)
def test_the_estimate_counts_what_crosses_the_kernels_boundaries(name: str, dtype: str, device: torch.device) -> None:
    config, low = CONFIGS[name], dtype != "float32"
    model = Transformer(config, kernels).to(device)
    tokens = torch.zeros(1, 16, dtype=torch.long, device=device)
    with Traffic() as forward, torch.autocast(device.type, getattr(torch, dtype), enabled=low):
        loss = model(tokens, tokens)
    with Traffic() as backward:
        loss.backward()
    e = {c.name: c for c in estimate(config, batch_size=1, dtype=dtype, ops="cpu").components}
    products = ("QKV", "output projection", "FFN")
    ffn = {"gelu": ("rooflight::gelu_fwd", "rooflight::gelu_bwd")}.get(
        config.ffn, ("rooflight::swiglu_joined_fwd", "rooflight::swiglu_joined_bwd")
    )
    for i, traced in enumerate((forward.bytes, backward.bytes)):
        expected = {key: (component.forward, component.backward)[i].bytes for key, component in e.items()}
        attention, norm, loss = (f"rooflight::{op}" for op in (
            ("flash_attention_fwd", "rms_norm_fwd", "linear_cross_entropy_kept"),
            ("flash_attention_bwd", "rms_norm_bwd", "linear_cross_entropy_scale"),
        )[i])  # fmt: skip
        assert traced[attention] == expected["scores and weighted sum"]
        assert traced["rooflight::rope_turn" if config.qk_norm else "rooflight::rope_join"] == expected["RoPE"]
        assert traced["aten::add"] == expected["residual sums"]
        # with autocast a norm's weights and their gradients are fp32; the estimate takes them for the rows' bf16
        assert traced[norm] == expected["norms"] + low * (1 + i) * 2 * e["norms"].parameters
        assert traced["aten::mm"] + traced["aten::cat"] + traced[ffn[i]] == sum(expected[key] for key in products)
        if low:  # and the embedding's rows, to the stream's dtype
            assert traced["aten::_to_copy"] == expected["casts"] + 6 * 16 * config.d_model
        else:  # the loss itself, which the scaling takes and does not read
            assert traced[loss] == expected["logits"] + i * 4
