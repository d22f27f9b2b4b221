"""rope_parameters, as transformers has them, or rope_scaling and rope_theta, as it had them; and ours of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ...kernels import RopeScaling
from ..config import ModelConfig

# Ours, theirs.
FIELDS = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "attention_factor": "attention_factor",
    "short_factor": "short_factor",
    "long_factor": "long_factor",
}
NUMBERS = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "mscale", "mscale_all_dim")
OF_LAYERS = ("full_attention", "sliding_attention")


def from_hf(model_type: str, values: dict[str, Any], head_dim: int, source: Path) -> dict[str, Any]:
    """The fields of ModelConfig that say how positions rotate."""
    parameters, scaling = values["rope_parameters"] or {}, values["rope_scaling"] or {}
    if not isinstance(parameters, dict) or not isinstance(scaling, dict):
        raise ValueError(f"{source}: rope_parameters: expected an object, got {parameters or scaling!r}")
    if "rope_local_base_freq" in values:  # each kind of layer has its own
        # "default" stays beside a scaling that has "type" for rope_type, as the oldest do
        full, local = (parameters.get(kind) or {"rope_type": "default"} for kind in OF_LAYERS)
        if set(parameters) - set(OF_LAYERS) or not isinstance(full, dict) or not isinstance(local, dict):
            raise ValueError(f"{source}: rope_parameters: expected {' and '.join(OF_LAYERS)}, got {parameters!r}")
        rope = full | scaling
        if _kind(model_type, local) != "default":
            raise ValueError(f"{source}: rope_type {_kind(model_type, local)!r} of sliding_attention is not supported")
        found = {"rope_local_theta": local.get("rope_theta", values["rope_local_base_freq"])}
    else:
        rope, found = scaling or parameters, {}
    for key in NUMBERS:
        if rope.get(key) is not None and not (type(rope[key]) in (int, float) and 0 <= rope[key] < math.inf):
            raise ValueError(f"{source}: rope_parameters: {key}: expected a finite number, got {rope[key]!r}")
    theta = rope.get("rope_theta", values["rope_theta"])
    turning = rope.get("partial_rotary_factor")
    if turning is None:
        turning = values.get("partial_rotary_factor", 1.0)
    if turning != 1.0 and "partial_rotary_factor" not in values:
        raise ValueError(f"{source}: partial_rotary_factor {turning!r} is not supported for {model_type}, only 1.0")
    found |= {"rope_theta": theta, "rope_dim": int(head_dim * turning)}
    kind = _kind(model_type, rope)
    if kind == "default":
        return found
    length = values["max_position_embeddings"]
    given = {ours: rope[theirs] for ours, theirs in FIELDS.items() if rope.get(theirs) is not None}
    original = values["original_max_position_embeddings"] or given.get("original_context_length") or length
    if kind == "dynamic":
        original = length  # what transformers' growth is measured from
    if kind != "linear":
        given["original_context_length"] = original
    if kind in ("yarn", "longrope"):
        given.setdefault("factor", length / original)
    if kind == "yarn" and "attention_factor" not in given and rope.get("mscale") and rope.get("mscale_all_dim"):
        given["attention_factor"] = _mscale(given["factor"], rope["mscale"]) / _mscale(
            given["factor"], rope["mscale_all_dim"]
        )
    known = {*FIELDS.values(), "rope_type", "type", "rope_theta", "partial_rotary_factor", "mscale", "mscale_all_dim"}
    if unknown := {key for key in rope if key not in known and rope[key]}:
        raise ValueError(f"{source}: {min(unknown)} {rope[min(unknown)]!r} is not supported in rope_parameters")
    readable = {"linear": {"factor"}, "dynamic": {"factor", "original_context_length"}}.get(kind, set(FIELDS))
    try:
        return found | {"rope_scaling": RopeScaling.of({"kind": kind, **{k: given[k] for k in given if k in readable}})}
    except ValueError as error:
        raise ValueError(f"{source}: rope_type {kind!r} is not supported so: {error}") from None


def _kind(model_type: str, rope: dict[str, Any]) -> str:
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    return "longrope" if kind == "su" or (model_type == "phi3" and kind == "yarn") else kind


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1


def part(config: ModelConfig) -> float:
    """partial_rotary_factor: the float whose product with head_dim, cut to a whole number as theirs is, is rope_dim."""
    factor = config.rope_dim / config.head_dim
    return factor if int(config.head_dim * factor) == config.rope_dim else math.nextafter(factor, 1.0)


def to_hf(config: ModelConfig) -> dict[str, Any] | None:
    """rope_scaling, or None where nothing is scaled."""
    scaling = config.rope_scaling
    if scaling is None:
        return None
    named = {theirs: getattr(scaling, ours) for ours, theirs in FIELDS.items() if getattr(scaling, ours) is not None}
    lists = {key: list(value) for key, value in named.items() if isinstance(value, tuple)}
    return {"rope_type": scaling.kind, **named, **lists}
