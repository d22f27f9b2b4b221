"""Models of transformers with our kernels under them, against themselves without."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from rooflight.integrations.transformers import patch, unpatch
from rooflight.kernels import dispatch

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

SHAPE: dict[str, Any] = {
    "vocab_size": 37, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"sliding_window": 3, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3Text", {"sliding_window": 3, "layer_types": [SLIDING, FULL]}),
}


def _model(name: str, **fields: Any) -> torch.nn.Module:
    family, own = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**(SHAPE | own | fields), attn_implementation="eager")
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(0.15 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1) * 0.5)
    return model


def _run(model: torch.nn.Module, tokens: Tensor, **inputs: Any) -> list[Tensor]:
    """Logits, loss and gradients."""
    model.zero_grad()
    out = model(tokens, labels=inputs.pop("labels", tokens), **inputs)
    out.loss.backward()
    return [out.logits.detach(), out.loss.detach(), *(p.grad.clone() for p in model.parameters())]


def _tokens(*shape: int) -> Tensor:
    return torch.randint(1, 37, shape, generator=torch.Generator().manual_seed(1))


def _close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


@pytest.fixture
def _plain_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", False)


# of the kernels' path, two: what differs in the others are masks and sizes
@pytest.mark.parametrize(
    ("name", "kernels"), [(name, False) for name in FAMILIES] + [("qwen2", True), ("gemma2", True)]
)
def test_a_patched_model_is_what_it_was(name: str, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", dispatch.INTERPRETED and kernels)
    model, tokens = _model(name), _tokens(2, 7)
    labels = tokens.clone()
    labels[0, :3] = -100
    padding = torch.ones(2, 7, dtype=torch.long)
    padding[1, :3] = 0  # on the left, as for generation
    unpadded = tokens.masked_fill(padding == 0, -100)
    unpadded[1, 3] = -100  # padding would predict it
    cases: list[dict[str, Any]] = [{"labels": labels, "num_items_in_batch": torch.tensor(5)}]
    if not kernels:
        cases += [{}, {"attention_mask": padding, "labels": unpadded}]
    expected = [_run(model, tokens, **case) for case in cases]
    patched = patch(model)
    assert model.config._attn_implementation == "rooflight"
    assert patched.replaced["attention"] == 2
    assert patched.replaced["RMSNorm"] == sum("RMSNorm" in type(m).__name__ for m in model.modules())
    assert patched.replaced["RoPE"] == 2
    assert patched.replaced["loss"] == 1
    assert patched.replaced["SwiGLU"] == (0 if "gemma" in name else 2)
    assert set(patched.left.values()) == ({"its activation is GELUTanh, not SiLU"} if "gemma" in name else set())
    for case, wanted in zip(cases, expected, strict=True):
        found = _run(model, tokens, **case)
        if "attention_mask" in case:
            keep = case["attention_mask"].bool()
            found[0], wanted[0] = found[0][keep], wanted[0][keep]
        _close(found, wanted)
    unpatch(model)
    assert model.config._attn_implementation == "eager"
    assert not any("forward" in m.__dict__ for m in model.modules())
    _close(_run(model, tokens, **cases[0]), expected[0])


@pytest.mark.usefixtures("_plain_cpu")
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_generation_with_a_cache_and_padding(name: str) -> None:
    model, tokens = _model(name), _tokens(2, 6)
    padding = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    expected = [model.generate(tokens, attention_mask=mask, **options) for mask in (padding, torch.ones_like(padding))]
    patch(model)
    for mask, text in zip((padding, torch.ones_like(padding)), expected, strict=True):
        assert torch.equal(model.generate(tokens, attention_mask=mask, **options), text)


@pytest.mark.usefixtures("_plain_cpu")
def test_packed_sequences_are_as_each_alone() -> None:
    model, tokens = _model("mistral"), _tokens(1, 12)
    expected = torch.cat([model(tokens[:, :5]).logits, model(tokens[:, 5:]).logits], 1)
    patch(model)
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    position = torch.cat((torch.arange(5), torch.arange(7)))[None]
    bounds = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 7, "max_length_k": 7}
    torch.testing.assert_close(model(tokens, position_ids=position, **bounds).logits, expected, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(
        model(tokens, position_ids=position, use_cache=False).logits, expected, rtol=1e-4, atol=2e-6
    )


@pytest.mark.usefixtures("_plain_cpu")
def test_only_the_patched_model_changes_and_positions_differ_by_row() -> None:
    model = _model("llama")
    other = copy.deepcopy(model)
    tokens, position = _tokens(2, 5), torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    expected = model(tokens, position_ids=position).logits
    patch(patched := model)
    assert not any("forward" in m.__dict__ for m in other.modules())
    torch.testing.assert_close(patched(tokens, position_ids=position).logits, expected, rtol=1e-4, atol=2e-6)
    assert torch.equal(other(tokens, position_ids=position).logits, expected)
    patch(model)  # again: from the beginning, not on top
    unpatch(model)
    unpatch(model)
    assert torch.equal(model(tokens, position_ids=position).logits, expected)


@pytest.mark.usefixtures("_plain_cpu")
def test_logits_are_made_when_they_are_read() -> None:
    model, tokens = _model("llama"), _tokens(1, 5)
    patch(model)
    calls: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    out = model(tokens, labels=tokens)
    assert not calls
    assert out.logits.shape == (1, 5, 37)
    assert out.logits is out.logits
    assert len(calls) == 1


@pytest.mark.parametrize(
    "read",
    [
        lambda out: out["logits"],
        lambda out: out.get("logits"),
        lambda out: out[1],
        lambda out: out[:2][1],
        lambda out: out.to_tuple()[1],
        lambda out: next(v for k, v in out.items() if k != "loss"),  # Trainer's, for what it evaluates
        lambda out: list(out.values())[1],
        lambda out: dict(zip(out.keys(), out.to_tuple(), strict=True))["logits"],
    ],
)
def test_logits_are_where_an_output_has_them(read: Any) -> None:
    model, tokens = _model("llama"), _tokens(1, 5)
    expected = model(tokens, labels=tokens).logits
    patch(model)
    with torch.no_grad():
        torch.testing.assert_close(read(model(tokens, labels=tokens)), expected, rtol=1e-5, atol=1e-5)


def test_a_loss_alone_and_a_recorded_pass_leave_the_logits_out() -> None:
    model, tokens = _model("llama"), _tokens(1, 5)
    patch(model)
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the logits were made"))
    out = model(tokens, labels=tokens)
    assert out[0] is out["loss"] is out.loss is dict(out.items())["loss"]
    assert "logits" in out


def test_what_is_not_known_is_left_alone_and_named() -> None:
    config = transformers.GPTNeoXConfig(
        vocab_size=37, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model, tokens = transformers.GPTNeoXForCausalLM(config).eval(), _tokens(1, 5)
    expected = model(tokens).logits
    result = patch(model)
    assert not result.replaced
    assert result.left["attention"] == "of GPTNeoXAttention, is not known"
    assert "left alone: gpt_neox.layers.0.attention: GPTNeoXAttention is not known" in str(result)
    assert torch.equal(model(tokens).logits, expected)

    dropping = _model("llama", attention_dropout=0.1, hidden_act="gelu")
    result = patch(dropping)
    assert result.left["attention"] == "has dropout 0.1"
    assert result.left["model.layers.0.mlp"].startswith("its activation is GELU")
    with pytest.raises(ValueError, match=r"^model: expected a model of transformers, got Linear"):
        patch(torch.nn.Linear(2, 2))
