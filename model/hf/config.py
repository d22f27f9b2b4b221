"""A ModelConfig as the fields of a Hugging Face config.json, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from . import rope
from .keys import FAMILIES, read

# Ours, theirs: the same number under two names.
FIELDS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
SLIDING, FULL = "sliding_attention", "full_attention"
ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu"}


def from_hf(fields: Any, source: Path) -> tuple[str, ModelConfig]:
    """The model_type, and the model, that config.json (`source`, which holds `fields`) describes.

    Raises ValueError naming what is not ours.
    """
    model_type, values = read(fields, source)
    family = FAMILIES[model_type]
    found: dict[str, Any] = {ours: values[theirs] for ours, theirs in FIELDS.items() if values[theirs] is not None}
    found |= family.fixed
    n_head, d_model = values["num_attention_heads"], values["hidden_size"]
    head_dim = found.setdefault("head_dim", d_model // n_head)

    act = (
        values["hidden_activation"] if "hidden_activation" in values and model_type != "gemma" else values["hidden_act"]
    )
    if model_type == "gemma" and act == "gelu":  # of the first releases; transformers takes it for the other
        act = "gelu_pytorch_tanh"
    if act not in ACTIVATIONS:
        name = "hidden_act" if model_type not in ("gemma2", "gemma3_text") else "hidden_activation"
        raise ValueError(f"{source}: {name} {act!r} is not supported, only {' and '.join(map(repr, ACTIVATIONS))}")
    found["ffn"] = ACTIVATIONS[act]

    if values.get("attention_bias"):
        found["qkv_bias"] = found["output_bias"] = True
    found["ffn_bias"] = bool(values.get("mlp_bias"))
    found |= rope.from_hf(model_type, values, head_dim, source)
    windows = _windows(model_type, values, source)
    found["window"] = next((window for window in windows if window is not None), None)
    if found["window"] is not None:
        found["full_layers"] = [layer for layer, window in enumerate(windows) if window is None]
    elif "rope_local_theta" in found:
        del found["rope_local_theta"]  # no layer has a window
    if "no_rope_layers" in values:
        found["nope_layers"] = _layers_without_rope(values, source)

    found["softcap"] = values.get("attn_logit_softcapping") or 0.0
    found["logit_softcap"] = values.get("final_logit_softcapping") or 0.0
    scale = values.get("attention_multiplier")
    if "query_pre_attn_scalar" in values:
        scale = values["query_pre_attn_scalar"] ** -0.5
    found["attention_scale"] = None if scale is None or scale == head_dim**-0.5 else scale
    found["embedding_scale"] = d_model**0.5 if family.scaled_embedding else values.get("embedding_multiplier", 1.0)
    found["residual_scale"] = values.get("residual_multiplier", 1.0)
    found["logit_scale"] = 1 / values.get("logits_scaling", 1.0)
    try:
        return model_type, ModelConfig.from_dict(found)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _windows(model_type: str, values: dict[str, Any], source: Path) -> list[int | None]:
    """Each layer's window, ours: without the query itself."""
    n_layer, size = values["num_hidden_layers"], values.get("sliding_window")
    used = values.get("use_sliding_window", True)
    if size is not None and used and (type(size) is not int or size < 1):
        raise ValueError(f"{source}: sliding_window: expected a whole number >= 1 or null, got {size!r}")
    kinds = values.get("layer_types")
    if kinds is None:
        slides: Callable[[int], bool] = {
            "gemma2": lambda layer: (layer + 1) % 2 > 0,
            "gemma3_text": lambda layer: (layer + 1) % values["sliding_window_pattern"] > 0,
            "smollm3": lambda layer: layer in _layers_without_rope(values, source),
        }.get(model_type, lambda layer: layer >= values.get("max_window_layers", 0))
        kinds = [SLIDING if used and size is not None and slides(layer) else FULL for layer in range(n_layer)]
    if not isinstance(kinds, list) or len(kinds) != n_layer or not {SLIDING, FULL}.issuperset(kinds):
        raise ValueError(f"{source}: layer_types: expected {n_layer} of {SLIDING} and {FULL}, got {kinds!r}")
    if SLIDING in kinds and (size is None or not used):
        raise ValueError(f"{source}: layer_types: expected no {SLIDING} without a sliding_window, got {kinds!r}")
    return [size - 1 if kind == SLIDING and size is not None else None for kind in kinds]


def _layers_without_rope(values: dict[str, Any], source: Path) -> list[int]:
    n_layer, rotates = values["num_hidden_layers"], values["no_rope_layers"]
    if rotates is None:
        rotates = [(layer + 1) % values["no_rope_layer_interval"] for layer in range(n_layer)]
    if not isinstance(rotates, list) or len(rotates) < n_layer:
        raise ValueError(f"{source}: no_rope_layers: expected {n_layer} of 0 and 1, got {rotates!r}")
    return [layer for layer in range(n_layer) if not rotates[layer]]


# What a family writes for a key that it reads; those of FIELDS besides.
WRITERS: dict[str, Callable[[ModelConfig], Any]] = {
    "hidden_act": lambda c: next((theirs for theirs, ours in ACTIVATIONS.items() if ours == c.ffn), c.ffn),
    "hidden_activation": lambda c: WRITERS["hidden_act"](c),
    "attention_bias": lambda c: c.qkv_bias,
    "mlp_bias": lambda c: c.ffn_bias,
    "rope_theta": lambda c: c.rope_theta,
    "rope_local_base_freq": lambda c: c.rope_theta if c.rope_local_theta is None else c.rope_local_theta,
    "rope_scaling": rope.to_hf,
    "partial_rotary_factor": rope.part,
    "sliding_window": lambda c: None if c.window is None else c.window + 1,  # theirs counts the query's own position
    "use_sliding_window": lambda c: c.window is not None,
    "max_window_layers": lambda c: 0,
    "layer_types": lambda c: [FULL if c.layer_window(i) is None else SLIDING for i in range(c.n_layer)],
    "no_rope_layers": lambda c: [int(layer not in c.nope_layers) for layer in range(c.n_layer)],
    "attn_logit_softcapping": lambda c: c.softcap or None,
    "final_logit_softcapping": lambda c: c.logit_softcap or None,
    "query_pre_attn_scalar": lambda c: c.head_dim if c.attention_scale is None else round(c.attention_scale**-2),
    "attention_multiplier": lambda c: c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale,
    "embedding_multiplier": lambda c: c.embedding_scale,
    "residual_multiplier": lambda c: c.residual_scale,
    "logits_scaling": lambda c: 1 / c.logit_scale,
    "original_max_position_embeddings": lambda c: c.rope_scaling and c.rope_scaling.original_context_length,
}


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json in the first family that holds the model, which reading them back decides.

    Raises ValueError naming what the nearest family has no place for.
    """
    if config.ffn == "gelu":
        raise ValueError("ffn: no family's config.json has a place for 'gelu', an FFN without a gate")
    nearest: list[str] = [field.name for field in fields_of(ModelConfig)]
    for model_type, family in FAMILIES.items():
        if family.whole_heads and config.d_model % config.n_head:
            continue
        written: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
        written |= {key: WRITERS[key](config) for key in family.defaults if key in WRITERS}
        if model_type == "mistral":
            del written["layer_types"]  # by which transformers would take it for a Ministral
        if model_type.startswith("gemma") and config.window is None and "sliding_window" in written:
            written["sliding_window"] = family.defaults["sliding_window"]  # no layer has it, but a mask is made of it
        if config.rope_scaling is None or model_type != "phi3":
            written.pop("original_max_position_embeddings", None)
        written |= {"model_type": model_type, "architectures": [family.architecture]}
        try:
            found = from_hf(written, Path("config.json"))[1]
        except ValueError:
            continue
        differing = [f.name for f in fields_of(ModelConfig) if getattr(found, f.name) != getattr(config, f.name)]
        if not differing:
            return written
        nearest = min(nearest, differing, key=len)
    name = nearest[0]
    raise ValueError(
        f"{name}: no family's config.json has a place for {name} = {getattr(config, name)!r} in this model"
    )
