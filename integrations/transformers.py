"""Our kernels under a model of Hugging Face's transformers.

    patched = patch(model)      # rms_norm, RoPE, SwiGLU, attention and the fused loss, in place
    print(patched)              # what runs ours now, and what was left alone, with the reason
    unpatch(model)              # as it was

The model computes what it did before, up to rounding: weights, caches, generate and Trainer are transformers' own.
transformers is imported when patch is called.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import flash_attention, flash_attention_varlen, linear_cross_entropy, rms_norm, rope, swiglu

__all__ = ["Patched", "patch", "unpatch"]

ATTENTION = "rooflight"  # our name in transformers' registries of attention and of masks
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3")
_BEFORE = "_rooflight_before"  # the attribute of a patched model that says what it had


@dataclass
class Patched:
    """replaced: {operation: modules that run ours now}.  left: {module's name: why it is as it was}."""

    replaced: Counter[str] = field(default_factory=Counter)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        done = ", ".join(f"{n} {name}" for name, n in self.replaced.items()) or "nothing"
        return "\n".join([f"replaced: {done}", *(f"left alone: {name}: {why}" for name, why in self.left.items())])


def patch(model: nn.Module) -> Patched:
    """Put our kernels under a Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma 2 or Gemma 3 of transformers, in place.

    With labels the loss never holds the logits; they are computed when they are read from the output. Where every label
    is -100 the loss is 0, not NaN.
    Modules of other classes, activations that are not SiLU and dropout in attention are left alone, and named in what
    is returned. A model that is patched already is patched anew.
    Raises ValueError on a module that is none of transformers' models.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model: expected a model of transformers, got {type(model).__name__}")
    unpatch(model)
    result = Patched()
    before: dict[str, Any] = {"attention": model.config._attn_implementation, "modules": []}
    setattr(model, _BEFORE, before)
    for name, module in model.named_modules():
        kind = type(module).__name__
        family = next((f for f in sorted(FAMILIES, key=len, reverse=True) if kind.startswith(f)), None)
        operation = next((o for o in ("RMSNorm", "MLP", "Attention", "ForCausalLM") if kind.endswith(o)), None)
        if family is None or operation is None or kind != family + operation:
            if kind.endswith(("Norm", "MLP", "Attention", "ForCausalLM", "Experts")):
                result.left[name or kind] = f"{kind} is not known"
            continue
        found = REPLACEMENTS[operation](module)
        if isinstance(found, str):
            result.left[name or kind] = found
            continue
        label, forward = found
        module.forward = MethodType(forward, module)
        before["modules"].append(module)
        result.replaced[label] += 1
    _take_over_attention(model, result)
    return result


def unpatch(model: nn.Module) -> None:
    """Undo patch(model); nothing where there is nothing to undo."""
    before = model.__dict__.pop(_BEFORE, None)
    if before is None:
        return
    for module in before["modules"]:
        del module.forward  # the class's own is found again
    model.set_attn_implementation(before["attention"])  # type: ignore[operator]


Replacement = tuple[str, Callable[..., Any]] | str  # the operation's name and the new forward, or why there is none


def _norm(module: Any) -> Replacement:
    offset = 1.0 if type(module).__name__.startswith("Gemma") else 0.0
    eps = module.eps if offset else module.variance_epsilon

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, eps, weight_offset=offset)  # type: ignore[return-value]

    return "RMSNorm", forward


def _mlp(module: Any) -> Replacement:
    if not isinstance(module.act_fn, nn.SiLU) and type(module.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return f"its activation is {type(module.act_fn).__name__}, not SiLU"

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

    return "SwiGLU", forward


def _rotation(module: Any) -> Replacement:
    """The module's own forward, in which the function that rotates is ours: other models of its class keep theirs."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or inspect.unwrap(forward) is not forward or forward.__closure__:
        return "its forward is wrapped: RoPE stays"
    if "apply_rotary_pos_emb" not in forward.__code__.co_names:
        return "its forward does not call apply_rotary_pos_emb: RoPE stays"
    names = forward.__globals__ | {"apply_rotary_pos_emb": _rotate}
    ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__)
    ours.__kwdefaults__ = forward.__kwdefaults__
    return "RoPE", ours


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """q (B, H, T, D), k (B, K, T, D); cos, sin (B or 1, T, D), each half twice. unsqueeze_dim 2: heads after tokens."""
    if unsqueeze_dim == 2:
        q, k = _rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)
    half = cos.shape[-1] // 2
    rows = cos.shape[0] * cos.shape[1]
    positions = None if cos.shape[0] == 1 else torch.arange(rows, device=q.device).view(cos.shape[:2])
    tables = (table[..., :half].reshape(rows, half) for table in (cos, sin))
    return rope(q, k, *tables, positions=positions)


def _take_over_attention(model: Any, result: Patched) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    kinds = {type(m).__name__ for m in model.modules() if type(m).__name__.endswith("Attention")}
    text = model.config.get_text_config()
    if not kinds or not kinds <= {f"{family}Attention" for family in FAMILIES}:
        result.left["attention"] = f"of {', '.join(sorted(kinds)) or 'no class'}, is not known"
    elif getattr(text, "attention_dropout", 0):
        result.left["attention"] = f"has dropout {text.attention_dropout}"
    elif getattr(text, "use_bidirectional_attention", False):
        result.left["attention"] = "is bidirectional"
    else:
        AttentionInterface.register(ATTENTION, _attention)
        AttentionMaskInterface.register(ATTENTION, _mask)
        model.set_attn_implementation(ATTENTION)
        result.replaced["attention"] = sum(type(m).__name__ in kinds for m in model.modules())


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: q (B, H, T, D), k and v (B, K, S, D) to (B, T, H, D), no weights.

    attention_mask: None where causality, the window and cu_seq_lens say all; else bool, as _mask makes it.
    """
    if dropout:
        raise ValueError(f"dropout: expected 0, got {dropout}; unpatch the model, or set attention_dropout to 0")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap or 0.0}
    window = None if sliding_window is None else (sliding_window - 1, 0)  # theirs counts the query itself
    within: dict[str, Any] = {"causal": causal, "window": window}
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (total, heads, D)
        ends = (cu_seq_lens_q.to(torch.int32), cu_seq_lens_k.to(torch.int32))
        longest = [
            int(given if given is not None else bounds.diff().max())
            for given, bounds in ((max_length_q, ends[0]), (max_length_k, ends[1]))
        ]
        out = flash_attention_varlen(q, k, v, ends[0], ends[1], longest[0], longest[1], **within, **options)
        return out[None], None  # type: ignore[call-overload]
    if attention_mask is None:
        out = flash_attention(query, key, value, **within, **options)
    else:
        if attention_mask.dtype != torch.bool:
            raise ValueError(f"attention_mask: expected bool in four dimensions, got {attention_mask.dtype}")
        out = flash_attention(query, key, value, causal=False, mask=attention_mask, **options)
    return out.transpose(1, 2), None  # type: ignore[union-attr]


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask function: None where the kernels' own masks say all, else (B, 1, T, S), bool.

    They do when the last query stands at the last key and no token is padding.
    """
    from transformers.masking_utils import sdpa_mask

    aligned = q_offset + q_length == kv_offset + kv_length
    if allow_is_causal_skip and aligned and (attention_mask is None or bool(attention_mask.all())):
        return None
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        attention_mask=attention_mask, allow_is_causal_skip=False, **kwargs,
    )  # fmt: skip


def _loss(module: Any) -> Replacement:
    from transformers.loss.loss_utils import ForCausalLMLoss

    if getattr(module.lm_head, "bias", None) is not None:
        return "its lm_head has a bias: the loss stays"
    original = type(module).forward

    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        plain = args[1:] or any(kwargs.get(k) is not None for k in ("shift_labels", "return_dict"))
        if plain or labels is None or kwargs.get("logits_to_keep") or self.loss_function is not ForCausalLMLoss:
            return original(self, *args, labels=labels, **kwargs)
        n_item = kwargs.pop("num_items_in_batch", None)
        kwargs.pop("logits_to_keep", None)
        outputs = self.model(*args, **kwargs)
        x = outputs.last_hidden_state
        softcap = getattr(self.config.get_text_config(), "final_logit_softcapping", None) or 0.0
        target = F.pad(labels, (0, 1), value=-100)[..., 1:]  # token t predicts label t + 1
        reduction = "mean" if n_item is None else "sum"
        loss = linear_cross_entropy(
            x.flatten(0, -2), self.lm_head.weight, target.flatten().to(x.device), softcap=softcap, reduction=reduction
        )

        def logits() -> Tensor:
            z = self.lm_head(x)
            return softcap * torch.tanh(z / softcap) if softcap else z

        return _output(loss if n_item is None else loss / n_item, outputs, logits)

    return "loss", forward


def _output(loss: Tensor, outputs: Any, make_logits: Callable[[], Tensor]) -> Any:
    output = _lazy_output()(
        loss=loss,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
    output.__dict__["make_logits"] = make_logits
    return output


@cache
def _lazy_output() -> type:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class WithLazyLogits(CausalLMOutputWithPast):
        """CausalLMOutputWithPast whose logits are made when they are first read: by name, by place, or in passing.

        Who goes through all of it while gradients are recorded, as accelerate does, is not given them.
        """

        def _make(self) -> None:
            if (make := self.__dict__.pop("make_logits", None)) is not None:
                self["logits"] = make()
                for name in [name for name in self if name not in ("loss", "logits")]:
                    self.move_to_end(name)  # the second, as ever

        def __getattribute__(self, name: str) -> Any:
            if name == "logits":
                self._make()
            return super().__getattribute__(name)

        def __getitem__(self, key: Any) -> Any:
            if key in ("loss", 0):
                return self.loss
            self._make()
            return super().__getitem__(key)

        def get(self, key: Any, default: Any = None) -> Any:
            try:
                return self[key]
            except KeyError:
                return default

        def __contains__(self, key: Any) -> bool:
            return (key == "logits" and "make_logits" in self.__dict__) or super().__contains__(key)

        def to_tuple(self) -> tuple[Any, ...]:
            self._make()
            return super().to_tuple()

        def items(self) -> Any:
            if not torch.is_grad_enabled():
                self._make()
            return super().items()

        def keys(self) -> Any:
            if not torch.is_grad_enabled():
                self._make()
            return super().keys()

        def values(self) -> Any:
            if not torch.is_grad_enabled():
                self._make()
            return super().values()

    return WithLazyLogits


REPLACEMENTS: dict[str, Callable[[Any], Replacement]] = {
    "RMSNorm": _norm,
    "MLP": _mlp,
    "Attention": _rotation,
    "ForCausalLM": _loss,
}
