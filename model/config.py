"""The model's configuration and its presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass, replace
from difflib import get_close_matches
from typing import Any

from ..kernels.rope_tables import RopeScaling

FFN_KINDS = ("swiglu", "gelu", "geglu")
NORM_PLACEMENTS = ("pre", "post", "both")
# A SwiGLU FFN has three matrices: 8/3 d_model gives it the parameters of a 4 d_model FFN with two (Shazeer 2020, §3).
D_FF_MULTIPLE = 64


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder-only transformer: RMSNorm around each sublayer, RoPE, grouped-query attention.

    vocab_size  tokens; at least as many as the tokenizer has
    context_length  tokens that a sequence may have
    n_layer     blocks
    n_head      query heads
    n_kv_head   key-value heads, a divisor of n_head (grouped-query attention); None: n_head
    d_model     width of the residual stream
    d_ff        FFN width; None: 4 d_model (gelu) or 8/3 d_model rounded up to a multiple of 64 (swiglu, geglu)
    head_dim    width of a head, even; None: d_model / n_head
    ffn         "swiglu", down(silu(gate x) * up x); "geglu", with gelu for silu; "gelu", down(gelu(up x)), of two
                matrices. gelu is its tanh approximation
    rope_theta  base of RoPE's wavelengths
    norm_eps    what RMSNorm adds to the mean square
    tie_embeddings  the embedding is the output's matrix too
    qk_norm     RMSNorm over head_dim on queries and keys, before RoPE; "all": over all heads at once
    window      a query sees itself and this many keys before it; None: all of them
    softcap     c > 0 replaces an attention score s by c tanh(s / c)

    What other families have, and none of it by default:
    qkv_bias            biases of q, k and v
    output_bias         a bias of attention's output projection
    ffn_bias            biases of the FFN's matrices
    norm_placement      "pre": x + f(norm(x)), "post": x + norm(f(x)), "both": x + norm(f(norm(x)))
    norm_offset         norms multiply by weight + norm_offset
    full_layers         layers, from 0, that the window does not bound
    nope_layers         layers whose queries and keys are not rotated
    rope_scaling        kernels.RopeScaling, or a table of its fields; "dynamic" is for sequences of context_length
    rope_local_theta    rope_theta of the layers with a window, which are then not scaled
    rope_dim            features of a head that rotate, the first ones; None: all
    rope_interleaved    pairs (2i, 2i + 1) rotate, in place of (i, i + rope_dim / 2)
    attention_scale     of the scores; None: 1 / sqrt(head_dim)
    embedding_scale     factor of the embedding
    residual_scale      factor of what a sublayer adds
    logit_scale         factor of the logits
    logit_softcap       c > 0 replaces a logit z by c tanh(z / c), after its scale

    None is resolved at construction, so every field reads as a number. Raises ValueError naming the argument.
    """

    vocab_size: int
    context_length: int
    n_layer: int
    n_head: int
    _: KW_ONLY
    n_kv_head: int = None  # type: ignore[assignment]
    d_model: int
    d_ff: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    ffn: str = "swiglu"
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qk_norm: bool | str = False
    window: int | None = None
    softcap: float = 0.0
    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    norm_placement: str = "pre"
    norm_offset: float = 0.0
    full_layers: tuple[int, ...] = ()
    nope_layers: tuple[int, ...] = ()
    rope_scaling: RopeScaling | None = None
    rope_local_theta: float | None = None
    rope_dim: int = None  # type: ignore[assignment]
    rope_interleaved: bool = False
    attention_scale: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0

    def __post_init__(self) -> None:
        _check_size("n_head", self.n_head)
        _check_size("d_model", self.d_model)
        if self.ffn not in FFN_KINDS:
            raise ValueError(f"ffn: expected one of {', '.join(FFN_KINDS)}, got {self.ffn!r}")
        if self.head_dim is None:
            if self.d_model % self.n_head:
                raise ValueError(
                    f"d_model: expected a multiple of n_head ({self.n_head}) unless head_dim is given, "
                    f"got {self.d_model}"
                )
            self._resolve("head_dim", self.d_model // self.n_head)
        if self.n_kv_head is None:
            self._resolve("n_kv_head", self.n_head)
        if self.d_ff is None:
            swiglu = -(-8 * self.d_model // (3 * D_FF_MULTIPLE)) * D_FF_MULTIPLE
            self._resolve("d_ff", 4 * self.d_model if self.ffn == "gelu" else swiglu)
        for name in ("vocab_size", "context_length", "n_layer", "n_kv_head", "d_ff", "head_dim"):
            _check_size(name, getattr(self, name))
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head: expected a divisor of n_head ({self.n_head}), got {self.n_kv_head}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even size (RoPE rotates pairs), got {self.head_dim}")
        if self.rope_dim is None:
            self._resolve("rope_dim", self.head_dim)
        _check_size("rope_dim", self.rope_dim)
        if self.rope_dim % 2 or self.rope_dim > self.head_dim:
            raise ValueError(f"rope_dim: expected an even size up to head_dim {self.head_dim}, got {self.rope_dim}")
        for name in ("tie_embeddings", "qkv_bias", "output_bias", "ffn_bias", "rope_interleaved"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected true or false, got {getattr(self, name)!r}")
        if not isinstance(self.qk_norm, bool) and self.qk_norm != "all":
            raise ValueError(f"qk_norm: expected true or false, got {self.qk_norm!r} (or 'all')")
        if self.norm_placement not in NORM_PLACEMENTS:
            raise ValueError(
                f"norm_placement: expected one of {', '.join(NORM_PLACEMENTS)}, got {self.norm_placement!r}"
            )
        for name, least in (
            ("rope_theta", "> 0"), ("norm_eps", "> 0"), ("softcap", ">= 0"), ("logit_softcap", ">= 0"),
            ("embedding_scale", "> 0"), ("residual_scale", "> 0"), ("logit_scale", "> 0"), ("norm_offset", ">= 0"),
            ("attention_scale", "> 0"), ("rope_local_theta", "> 0"),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None and name in ("attention_scale", "rope_local_theta"):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name}: expected a number, got {value!r}")
            if not (0 < value < float("inf") or (value == 0 and least == ">= 0")):
                raise ValueError(f"{name}: expected a finite number {least}, got {value!r}")
        if self.window is not None and (type(self.window) is not int or self.window < 0):
            raise ValueError(f"window: expected a number of keys >= 0 or None, got {self.window!r}")
        for name in ("full_layers", "nope_layers"):
            self._resolve(name, _layers(name, getattr(self, name), self.n_layer))
        if self.rope_scaling is not None:
            self._resolve("rope_scaling", RopeScaling.of(self.rope_scaling))

    def layer_window(self, layer: int) -> int | None:
        """The window of one layer."""
        return None if layer in self.full_layers else self.window

    def _resolve(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Every field, for JSON or TOML (TOML has no null: drop the Nones first)."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """The inverse of to_dict; fields may be left out where they have a default. ValueError on an unknown one."""
        if not isinstance(fields, Mapping):
            raise ValueError(f"fields: expected a table of the model's fields, got {fields!r}")
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                raise ValueError(f"{name}: not a field of the model{_suggestion(name, known)}")
        for name, field in known.items():
            if field.default is dataclasses.MISSING and name not in fields:
                raise ValueError(f"{name}: missing from the model's configuration")
        return cls(**fields)


def _check_size(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")


def _layers(name: str, value: object, n_layer: int) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not all(type(i) is int and 0 <= i < n_layer for i in value):
        raise ValueError(f"{name}: expected a list of layers from 0 to {n_layer - 1}, got {value!r}")
    return tuple(sorted(set(value)))


def _suggestion(name: str, known: Mapping[str, object]) -> str:
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(known)}"


def _gpt2(n_layer: int, d_model: int, n_head: int) -> ModelConfig:
    """GPT-2's shapes (Radford et al. 2019, table 2), with RMSNorm and RoPE for its LayerNorm and learned positions."""
    return ModelConfig(50257, 1024, n_layer, n_head, d_model=d_model, d_ff=4 * d_model, ffn="gelu", tie_embeddings=True)


_GPT2 = {
    "gpt2-small": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
}

PRESETS: dict[str, ModelConfig] = {
    # About a million parameters: trains on two CPU cores in minutes.
    "tiny": ModelConfig(1024, 256, 4, 4, n_kv_head=2, d_model=128, d_ff=384, tie_embeddings=True),
    **_GPT2,
    **{f"{name}-swiglu": replace(c, ffn="swiglu", tie_embeddings=False) for name, c in _GPT2.items()},
    # Llama 3.2 1B and Llama 3 8B (Grattafiori et al. 2024, table 3)
    "llama-1b": ModelConfig(
        128256, 8192, 16, 32, n_kv_head=8, d_model=2048, d_ff=8192,
        rope_theta=500000.0, norm_eps=1e-5, tie_embeddings=True,
    ),
    "llama-8b": ModelConfig(
        128256, 8192, 32, 32, n_kv_head=8, d_model=4096, d_ff=14336, rope_theta=500000.0, norm_eps=1e-5,
    ),
}  # fmt: skip


def preset(name: str) -> ModelConfig:
    """The preset of that name; ValueError with the nearest name on an unknown one."""
    if not isinstance(name, str):
        raise ValueError(f"preset: expected a preset's name, got {name!r}")
    if name not in PRESETS:
        raise ValueError(f"preset: no preset {name!r}{_suggestion(name, PRESETS)}")
    return PRESETS[name]


def hidden_matrices(c: ModelConfig) -> dict[tuple[int, int], int]:
    """The blocks' matrices, which Muon takes where it is the optimizer: {(shorter side, longer side): how many}."""
    q, kv = (c.n_head * c.head_dim, c.d_model), (c.n_kv_head * c.head_dim, c.d_model)
    found: dict[tuple[int, int], int] = {}
    for shape in [q, kv, kv, q] + [(c.d_ff, c.d_model)] * (2 if c.ffn == "gelu" else 3):
        short, long = sorted(shape)
        found[short, long] = found.get((short, long), 0) + c.n_layer
    return found
