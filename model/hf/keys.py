"""The keys of a Hugging Face config.json: what each family reads, what has no effect, what has one value only.

No key is passed over in silence. One that a family reads has transformers' own default where the file lacks it; one in
WITHOUT_EFFECT changes nothing that a forward pass computes; one in ONE_VALUE must have that value; any other is refused
unless it is off (null, false, 0 or empty).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)

COMMON: dict[str, Any] = {
    "num_key_value_heads": None,  # None: as many as query heads
    "head_dim": None,  # None: hidden_size / num_attention_heads
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_parameters": None,
    "rope_scaling": None,  # where both are given, this one counts
    "original_max_position_embeddings": None,  # counts before the one inside rope_parameters
}
BIASES = {"attention_bias": False, "mlp_bias": False}
WINDOWED = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
MISTRAL = COMMON | {"num_key_value_heads": 8, "sliding_window": 4096, "layer_types": None}
GEMMA = COMMON | {"head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}
GEMMA |= {"attention_bias": False, "hidden_activation": "gelu_pytorch_tanh"}
GEMMA_2 = GEMMA | {"num_key_value_heads": 4, "sliding_window": 4096, "layer_types": None, "query_pre_attn_scalar": 256}


@dataclass(frozen=True)
class Family:
    """A model_type: its class in transformers, the keys that it reads with the values that transformers gives them
    where config.json has none, and what of a ModelConfig it is without saying so.

    scaled_embedding: the embedding times sqrt(hidden_size).  whole_heads: num_attention_heads must divide hidden_size.
    joined: q, k and v are one matrix in the files, gate and up another.
    """

    architecture: str
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    scaled_embedding: bool = False
    whole_heads: bool = False
    joined: bool = False


ONE_PLUS_W = {"norm_offset": 1.0}
SANDWICH = ONE_PLUS_W | {"norm_placement": "both"}

# save_hf writes the first that holds the model.
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", COMMON | BIASES, whole_heads=True),
    # transformers' AutoModel opens a Mistral whose layers are named as a Ministral, where they may differ
    "mistral": Family("MistralForCausalLM", MISTRAL),
    "ministral": Family("MinistralForCausalLM", MISTRAL),
    "qwen2": Family("Qwen2ForCausalLM", COMMON | {"num_key_value_heads": 32} | WINDOWED, {"qkv_bias": True}),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        COMMON | {"num_key_value_heads": 32, "head_dim": 128, "attention_bias": False} | WINDOWED,
        {"qk_norm": True},
    ),
    "gemma": Family("GemmaForCausalLM", GEMMA | {"num_key_value_heads": 16}, ONE_PLUS_W, scaled_embedding=True),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        GEMMA_2 | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        SANDWICH,
        scaled_embedding=True,
        whole_heads=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        GEMMA_2
        | {"final_logit_softcapping": None, "sliding_window_pattern": 6}  # its attention has no softcap, set or not
        | {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        SANDWICH | {"qk_norm": True},
        scaled_embedding=True,
        whole_heads=True,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        COMMON | {"rms_norm_eps": 1e-5, "attention_bias": False},
        {"norm_placement": "post", "qk_norm": "all"},
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        COMMON
        | BIASES
        | {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 2e6, "no_rope_layers": None}
        | {"no_rope_layer_interval": 4, "use_sliding_window": False, "sliding_window": None, "layer_types": None},
    ),
    "granite": Family(
        "GraniteForCausalLM",
        COMMON
        | BIASES
        | {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0, "logits_scaling": 1.0},
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        COMMON
        | {"rms_norm_eps": 1e-5, "sliding_window": None, "partial_rotary_factor": 1.0}
        | {"original_max_position_embeddings": 4096},
        joined=True,
    ),
}

# What a key that a family reads may be; the others' defaults say it. OPTIONAL: or null.
WHOLE = {*REQUIRED, "num_key_value_heads", "head_dim", "original_max_position_embeddings"}
NUMBERS = {"attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"}
OPTIONAL = {
    "num_key_value_heads", "head_dim", "original_max_position_embeddings", "attn_logit_softcapping",
    "final_logit_softcapping", "hidden_act", "hidden_activation",
}  # fmt: skip
ELSEWHERE = {"sliding_window", "layer_types", "no_rope_layers", "rope_parameters", "rope_scaling"}

# Families that read one of these list it in their defaults.
ONE_VALUE: dict[str, Any] = {
    "is_causal": True,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bidirectional_attention": False,
    "partial_rotary_factor": 1.0,
    "logits_scaling": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "hidden_activation": "silu",
}

WITHOUT_EFFECT = {
    # where it came from, and how it was stored
    "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "transformers.js_config", "architectures",
    "auto_map", "model_type", "dtype", "torch_dtype", "use_bfloat16", "tf_legacy_loss", "torchscript", "unsloth_fixed",
    "unsloth_version", "is_llama_config",
    # how transformers runs it
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset",
    "_experts_implementation_internal", "cache_implementation", "use_cache", "output_attentions",
    "output_hidden_states", "return_dict", "tie_last_hidden_states", "chunk_size_feed_forward", "pretraining_tp",
    "is_decoder", "gradient_checkpointing",
    # training: the start, and dropout, which this model has not
    "initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "classifier_dropout",
    # how layer_types, which stands beside it, was made
    "_sliding_window_pattern",
    # tokens, and other heads
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id",
    "tokenizer_class", "prefix", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
    "task_specific_params",
    # generation, as older files have it
    "max_length", "max_new_tokens", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "bad_words_ids", "encoder_no_repeat_ngram_size", "num_return_sequences",
    "return_dict_in_generate", "output_scores", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
}  # fmt: skip


def read(fields: Any, source: Path) -> tuple[str, dict[str, Any]]:
    """The model_type and the value of each key that its family reads.

    fields: what `source`, a config.json, holds.  Raises ValueError on another family, a required key that is missing
    and a key that asks for something that this model has not.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"{source}: expected a JSON object, got {type(fields).__name__}")
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"{source}: expected model_type {', '.join(FAMILIES)}, got {model_type!r}")
    values = dict(FAMILIES[model_type].defaults)
    for key in REQUIRED:
        if fields.get(key) is None:
            raise ValueError(f"{source}: {key} is missing")
    for key, value in fields.items():
        if key in values or key in REQUIRED:
            _check(key, value, values.get(key), source)
            values[key] = value
        elif key in WITHOUT_EFFECT:
            continue
        elif key in ONE_VALUE:
            if value is not None and value != ONE_VALUE[key]:
                raise ValueError(f"{source}: {key} {value!r} is not supported, only {ONE_VALUE[key]!r}")
        elif value:
            raise ValueError(f"{source}: {key} {value!r} is not supported; no such key is known for {model_type}")
    return model_type, values


def _check(key: str, value: Any, default: Any, source: Path) -> None:
    """ValueError unless the value is of the kind that the key has."""
    if key in ELSEWHERE or (value is None and key in OPTIONAL):
        return
    if isinstance(default, bool):
        kind, right = "true or false", value is None or isinstance(value, bool)
    elif isinstance(default, str):
        kind, right = "a name", isinstance(value, str)
    elif key in NUMBERS or isinstance(default, float):
        kind, right = "a finite number > 0", type(value) in (int, float) and 0 < value < math.inf
    else:
        least = 0 if key == "max_window_layers" else 1
        kind, right = f"a whole number >= {least}", type(value) is int and value >= least
    if not right:
        raise ValueError(f"{source}: {key}: expected {kind}{' or null' if key in OPTIONAL else ''}, got {value!r}")
