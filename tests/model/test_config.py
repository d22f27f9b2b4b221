from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from typing import Any

import pytest

from rooflight.model import PRESETS, ModelConfig, preset

BASE: dict[str, Any] = {"vocab_size": 100, "context_length": 32, "n_layer": 2, "n_head": 4, "d_model": 64}


def test_what_is_left_out_is_resolved() -> None:
    config = ModelConfig(100, 32, 2, 4, d_model=64)
    assert (config.n_kv_head, config.head_dim, config.d_ff) == (4, 16, 192)  # 8/3 x 64 = 170.7, a multiple of 64
    assert ModelConfig(**BASE, ffn="gelu").d_ff == 256
    assert ModelConfig(**(BASE | {"d_model": 768})).d_ff == 2048
    assert ModelConfig(**BASE, head_dim=40).head_dim == 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: expected a whole number >= 1, got 0"),
        ({"context_length": -1}, "context_length: expected a whole number >= 1, got -1"),
        ({"n_layer": 2.0}, "n_layer: expected a whole number >= 1, got 2.0"),
        ({"n_head": True}, "n_head: expected a whole number >= 1, got True"),
        ({"n_head": "4"}, "n_head: expected a whole number >= 1, got '4'"),
        ({"d_model": 0}, "d_model: expected a whole number >= 1, got 0"),
        ({"d_model": 66}, r"d_model: expected a multiple of n_head \(4\) unless head_dim is given, got 66"),
        ({"d_model": 12}, r"head_dim: expected an even size \(RoPE rotates pairs\), got 3"),
        ({"n_kv_head": 3}, r"n_kv_head: expected a divisor of n_head \(4\), got 3"),
        ({"n_kv_head": 8}, r"n_kv_head: expected a divisor of n_head \(4\), got 8"),
        ({"n_kv_head": 0}, "n_kv_head: expected a whole number >= 1, got 0"),
        ({"d_ff": 0}, "d_ff: expected a whole number >= 1, got 0"),
        ({"head_dim": 15}, "head_dim: expected an even size"),
        ({"ffn": "relu"}, "ffn: expected one of swiglu, gelu, geglu, got 'relu'"),
        ({"rope_theta": 0}, "rope_theta: expected a finite number > 0, got 0"),
        ({"norm_eps": float("nan")}, "norm_eps: expected a finite number > 0, got nan"),
        ({"norm_eps": "small"}, "norm_eps: expected a number, got 'small'"),
        ({"softcap": -1.0}, "softcap: expected a finite number >= 0, got -1.0"),
        ({"softcap": float("inf")}, "softcap: expected a finite number >= 0, got inf"),
        ({"window": -1}, "window: expected a number of keys >= 0 or None, got -1"),
        ({"window": (1, 0)}, "window: expected a number of keys >= 0 or None"),
        ({"tie_embeddings": 1}, "tie_embeddings: expected true or false, got 1"),
        ({"qk_norm": "yes"}, "qk_norm: expected true or false, got 'yes'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_an_impossible_configuration_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        ModelConfig(**(BASE | change))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_passes_through_json_and_toml(name: str) -> None:
    fields = PRESETS[name].to_dict()
    assert ModelConfig.from_dict(json.loads(json.dumps(fields))) == PRESETS[name]
    toml = "\n".join(f"{key} = {json.dumps(value)}" for key, value in fields.items() if value is not None)
    assert ModelConfig.from_dict(tomllib.loads(toml)) == PRESETS[name]


def test_from_dict_names_the_wrong_field() -> None:
    assert ModelConfig.from_dict(BASE) == ModelConfig(**BASE)
    with pytest.raises(ValueError, match=r"^n_heads: not a field of the model; did you mean 'n_head'"):
        ModelConfig.from_dict(BASE | {"n_heads": 4})
    with pytest.raises(ValueError, match=r"^xyzzy: not a field of the model; expected one of vocab_size, "):
        ModelConfig.from_dict(BASE | {"xyzzy": 4})
    with pytest.raises(ValueError, match=r"^d_model: missing"):
        ModelConfig.from_dict({key: value for key, value in BASE.items() if key != "d_model"})


def test_an_unknown_preset_suggests_the_nearest() -> None:
    assert preset("gpt2-xl") is PRESETS["gpt2-xl"]
    with pytest.raises(ValueError, match="no preset 'gpt2-xxl'; did you mean 'gpt2-xl'"):
        preset("gpt2-xxl")
    with pytest.raises(ValueError, match="no preset 'llama8b'; did you mean 'llama-8b'"):
        preset("llama8b")
    with pytest.raises(ValueError, match="no preset 'q'; expected one of tiny, gpt2-small"):
        preset("q")


def test_swiglu_presets_differ_from_gpt2_in_ffn_and_tying_alone() -> None:
    for size in ("small", "medium", "large", "xl"):
        gelu = PRESETS[f"gpt2-{size}"]
        assert (gelu.ffn, gelu.tie_embeddings, gelu.d_ff) == ("gelu", True, 4 * gelu.d_model)
        assert PRESETS[f"gpt2-{size}-swiglu"] == replace(gelu, ffn="swiglu", tie_embeddings=False)
