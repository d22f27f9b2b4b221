"""Every family that is held, with random weights, against transformers' own model: logits, gradients, greedy text."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from rooflight.kernels import reference
from rooflight.model import generate, load_hf, save_hf
from rooflight.model.hf.weights import places

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

SHAPE: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **fields}}


LLAMA_3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 3.0], "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}
SLIDING, FULL = "sliding_attention", "full_attention"
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("Llama", _rope("llama3", **LLAMA_3)),
    "linear": ("Llama", _rope("linear", factor=3.0)),
    "dynamic": ("Llama", _rope("dynamic", factor=3.0)),
    "yarn": ("Llama", _rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4.0)),
    "yarn, mscale": (
        "Llama",
        _rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.3, truncate=False),
    ),
    "longrope": ("Llama", _rope("longrope", factor=4.0, original_max_position_embeddings=16, **LONG)),
    "mistral": ("Mistral", {"sliding_window": 5, "tie_word_embeddings": True}),
    "ministral": ("Ministral", {"head_dim": 12, "sliding_window": 5, "layer_types": [FULL, SLIDING, SLIDING]}),
    "qwen2": ("Qwen2", {}),
    "qwen2, mixed windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma": ("Gemma", {"head_dim": 12}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 20}),
    "gemma2, no caps": (
        "Gemma2",
        {"head_dim": 16, "attn_logit_softcapping": None, "final_logit_softcapping": None, "layer_types": [FULL] * 3},
    ),
    "gemma3": ("Gemma3Text", {"head_dim": 16, "sliding_window": 5, "layer_types": [SLIDING, FULL, SLIDING]}),
    "gemma3, stretched": (
        "Gemma3Text",
        {
            "head_dim": 12, "sliding_window": 7, "layer_types": [SLIDING, FULL, FULL], "final_logit_softcapping": 9.0,
            "rope_parameters": {
                FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
                SLIDING: {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "gemma3, type": (
        "Gemma3Text",  # transformers reads no "type" here, so nothing is scaled
        {"head_dim": 12, "rope_scaling": {"type": "linear", "factor": 8.0}, "layer_types": [FULL, SLIDING, FULL]},
    ),
    "olmo2": ("Olmo2", {"attention_bias": True}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "smollm3, window": (
        "SmolLM3", {"no_rope_layers": [1, 0, 0], "use_sliding_window": True, "sliding_window": 4, "mlp_bias": True},
    ),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0, "logits_scaling": 5.0, "residual_multiplier": 0.3,
            "attention_multiplier": 0.11,
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 9}),
    "phi3, partial": ("Phi3", _rope("default", partial_rotary_factor=0.5)),
    "phi3, longrope": ("Phi3", {"original_max_position_embeddings": 16, **_rope("longrope", **LONG)}),
}  # fmt: skip


def _theirs(name: str) -> torch.nn.Module:
    family, fields = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**(SHAPE | fields), attn_implementation="eager")
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # norms and biases too: ones would hide a norm that is not loaded
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(0.15 * noise + (0.5 if parameter.dim() == 1 else 0.0))
    return model.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_transformers_own_both_ways(name: str, tmp_path: Path) -> None:
    theirs = _theirs(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_hf(tmp_path / "theirs", reference)
    tokens = torch.randint(67, (2, 23), generator=torch.Generator().manual_seed(1))  # longer than 16: longrope's long
    for length in (23, 11):
        logits, expected = ours(tokens[:, :length]), theirs(tokens[:, :length]).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    loss = torch.nn.functional.cross_entropy(theirs(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    ours(tokens[:, :-1], tokens[:, 1:]).backward()
    gradient = copy.deepcopy(ours)  # a model of gradients: they have the weights' names in the files
    for place, p in zip(gradient.parameters(), ours.parameters(), strict=True):
        place.data.copy_(p.grad)
    found = places(gradient.state_dict(), ours.config.norm_placement, name.startswith("phi3"))
    for key, parameter in theirs.named_parameters():
        torch.testing.assert_close(torch.cat(found[key]), parameter.grad, rtol=1e-5, atol=1e-5)

    greedy = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "use_cache": False}
    text = theirs.generate(tokens[:, :9], attention_mask=torch.ones(2, 9, dtype=torch.long), **greedy)
    assert torch.equal(generate(ours, tokens[:, :9], 12, temperature=0), text)

    save_hf(ours, tmp_path / "ours")
    assert load_hf(tmp_path / "ours", reference).config == ours.config
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)
