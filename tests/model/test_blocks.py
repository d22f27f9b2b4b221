"""What a configuration may change of the plain model, on every path: packed, checkpointed, compiled, by the kernels."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rooflight import kernels
from rooflight.kernels import reference
from rooflight.model import ModelConfig, Transformer, estimate

BASE = ModelConfig(61, 24, 2, 4, n_kv_head=2, d_model=32, d_ff=24)
LONG = {"kind": "longrope", "original_context_length": 9, "short_factor": [1.0] * 4, "long_factor": [1, 2, 3, 4]}
CONFIGS = {
    "both norms, geglu, two kinds of layer": replace(
        BASE, norm_placement="both", norm_offset=1.0, ffn="geglu", window=3, full_layers=(1,), rope_local_theta=50.0,
        qk_norm=True, embedding_scale=5.0, logit_softcap=3.0, softcap=5.0, attention_scale=0.3, tie_embeddings=True,
    ),
    "norms after, over all heads": replace(BASE, norm_placement="post", qk_norm="all", qkv_bias=True),
    "biases, scales, no rotation": replace(
        BASE, qkv_bias=True, output_bias=True, ffn_bias=True, residual_scale=0.4, logit_scale=0.2, nope_layers=(0,)
    ),
    "interleaved, partial": replace(BASE, rope_interleaved=True, rope_dim=4),
    "longrope": replace(BASE, rope_scaling=LONG),
}  # fmt: skip


def _model(name: str, ops=reference, **options) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(CONFIGS[name], ops, **options)
    with torch.no_grad():
        for p in model.parameters():  # biases and norms too
            p.add_(0.1 * torch.randn(p.shape))
    return model


def _tokens(*shape: int) -> Tensor:
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(1))


def _loss_and_gradients(model: Transformer, tokens: Tensor, **options) -> list[Tensor]:
    loss = model(tokens[:, :-1], tokens[:, 1:], **options)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_path_is_the_same_model(name: str, device: torch.device) -> None:
    tokens = _tokens(2, 14)
    expected = _loss_and_gradients(_model(name), tokens)
    checkpointed = _loss_and_gradients(_model(name, checkpointing=True), tokens)
    for a, b in zip(checkpointed, expected, strict=True):
        torch.testing.assert_close(a, b)

    model = _model(name)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens[:, :-1], tokens[:, 1:]), expected[0])

    if "norms after" in name or "biases" in name:
        return  # nothing in them is new to a kernel
    ours = _model(name, kernels).to(device)
    found = _loss_and_gradients(ours, tokens[:1, :6].to(device))
    for a, b in zip(found, _loss_and_gradients(_model(name), tokens[:1, :6]), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_are_as_each_alone(name: str) -> None:
    """LongRoPE turns by the longest document of the batch."""
    model, tokens = _model(name), _tokens(1, 20)
    ends = [0, 5, 20] if name != "longrope" else [0, 10, 20]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    packed = model(tokens, cu_seqlens=cu_seqlens)
    alone = torch.cat([model(tokens[:, a:b]) for a, b in pairwise(ends)], 1)
    torch.testing.assert_close(packed, alone)


def test_interleaved_pairs_are_the_others_with_rows_in_another_order() -> None:
    """Feature 2 i of one is feature i of the other, 2 i + 1 is i + D / 2: GGUF's order and transformers'."""
    torch.manual_seed(0)
    halves, pairs = Transformer(BASE, reference), Transformer(replace(BASE, rope_interleaved=True), reference)
    state = halves.state_dict()
    order = torch.arange(8).view(2, 4).T.flatten()  # of a head of 8: 0 4 1 5 2 6 3 7
    for name, weight in state.items():
        if "q_proj" in name or "k_proj" in name:
            state[name] = weight.unflatten(0, (-1, 8))[:, order].flatten(0, 1)
    pairs.load_state_dict(state)
    torch.testing.assert_close(pairs(_tokens(2, 20)), halves(_tokens(2, 20)))


def test_a_configuration_comes_back_from_plain_values() -> None:
    for config in CONFIGS.values():
        assert ModelConfig.from_dict(config.to_dict()) == config
        assert hash(config) == hash(ModelConfig.from_dict(config.to_dict()))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_estimate_counts_its_parameters(name: str) -> None:
    with torch.device("meta"):
        model = Transformer(CONFIGS[name], reference)
    assert estimate(model.config, batch_size=1).parameters == sum(p.numel() for p in model.parameters())


def test_a_layer_without_the_window_costs_what_one_without_it_does() -> None:
    config = replace(BASE, n_layer=4, window=2)
    mixed, full = replace(config, full_layers=(0, 3)), replace(config, window=None)
    windowed, between, whole = (estimate(c, batch_size=1).forward_flops for c in (config, mixed, full))
    assert windowed < between == (windowed + whole) / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_placement": "middle"}, "norm_placement: expected one of pre, post, both, got 'middle'"),
        ({"full_layers": [2]}, r"full_layers: expected a list of layers from 0 to 1, got \[2\]"),
        ({"nope_layers": "0"}, "nope_layers: expected a list"),
        ({"rope_dim": 5}, "rope_dim: expected an even size up to head_dim 8, got 5"),
        ({"rope_dim": 10}, "rope_dim: expected an even size"),
        ({"rope_scaling": {"kind": "linear"}}, "rope_scaling: linear needs factor"),
        ({"logit_scale": 0.0}, "logit_scale: expected a finite number > 0, got 0.0"),
        ({"qk_norm": 1}, "qk_norm: expected true or false, got 1"),
        ({"qkv_bias": 1}, "qkv_bias: expected true or false, got 1"),
    ],
    ids=str,
)
def test_an_impossible_one_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        replace(BASE, **change)
