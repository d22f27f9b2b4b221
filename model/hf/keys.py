"""The keys of a Hugging Face config.json: what each family reads, what has no effect, what has one value only.

No key is passed over in silence. One that a family reads has transformers' own default where the file lacks it; one in
WITHOUT_EFFECT changes nothing that a forward pass computes; one in ONE_VALUE must have that value; any other is refused
unless it is off (null, false, 0 or empty).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
}


@dataclass(frozen=True)
class Family:
    """A model_type: its class in transformers, and the keys that it reads with the values that transformers gives them
    where config.json has none."""

    architecture: str
    defaults: Mapping[str, Any]


MISTRAL = COMMON | {"num_key_value_heads": 8, "sliding_window": 4096, "layer_types": None}
WINDOWED = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", COMMON),
    # transformers' AutoModel opens a Mistral whose layers are named as a Ministral, where they may differ
    "mistral": Family("MistralForCausalLM", MISTRAL),
    "ministral": Family("MinistralForCausalLM", MISTRAL),
    "qwen3": Family("Qwen3ForCausalLM", COMMON | {"num_key_value_heads": 32, "head_dim": 128} | WINDOWED),
}

# Families that read one of these list it in their defaults.
ONE_VALUE: dict[str, Any] = {
    "is_causal": True,
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
    if model_type not in FAMILIES:
        raise ValueError(f"{source}: expected model_type {', '.join(FAMILIES)}, got {model_type!r}")
    values = dict(FAMILIES[model_type].defaults)
    for key in REQUIRED:
        if fields.get(key) is None:
            raise ValueError(f"{source}: {key} is missing")
    for key, value in fields.items():
        if key in values or key in REQUIRED:
            values[key] = value
        elif key in WITHOUT_EFFECT:
            continue
        elif key in ONE_VALUE:
            if value is not None and value != ONE_VALUE[key]:
                raise ValueError(f"{source}: {key} {value!r} is not supported, only {ONE_VALUE[key]!r}")
        elif value:
            raise ValueError(f"{source}: {key} {value!r} is not supported; no such key is known for {model_type}")
    return model_type, values
