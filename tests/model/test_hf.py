"""Checkpoints in Hugging Face's layout, held against transformers' own models."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rooflight.kernels import reference
from rooflight.model import ModelConfig, Transformer, load_hf, save_hf

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
# what each differs in: grouped heads, one shared key-value head, tied, a head size of its own, another rotation base
FAMILIES = {
    "llama": ("Llama", {}),
    "llama-gqa": ("Llama", {"num_key_value_heads": 2}),
    "llama-mqa-tied": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-head-dim": ("Llama", {"head_dim": 20, "num_key_value_heads": 2}),
    "llama-rope": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "mistral-window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 5}),
    "qwen3-qk-norm": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
}


def _theirs(family: str) -> torch.nn.Module:
    name, fields = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**SHAPE, **fields, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():  # norms too: ones would hide a norm that is not loaded
        torch.nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0.0, 0.2)
    return model.eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(SHAPE["vocab_size"], (2, 23), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    theirs = _theirs(family)
    theirs.save_pretrained(tmp_path)
    ours = load_hf(tmp_path, reference)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits)  # default fp32 tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_what_we_save(family: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    _theirs(family).save_pretrained(tmp_path / "theirs")
    ours = load_hf(tmp_path / "theirs", reference)
    save_hf(ours, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, ours(tokens))


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_comes_back_bit_for_bit(tied: bool, tmp_path: Path) -> None:
    config = ModelConfig(31, 16, 2, 4, n_kv_head=2, d_model=16, tie_embeddings=tied, rope_theta=1234.5)
    saved = Transformer(config)
    save_hf(saved, tmp_path / "new" / "folder")
    loaded = load_hf(tmp_path / "new" / "folder")
    assert loaded.config == config
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["config.json", "model.safetensors"]
    for (name, a), (_, b) in zip(saved.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(saved.cos, loaded.cos)
    half = load_hf(tmp_path / "new" / "folder", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.cos.dtype == torch.float32


def test_shards_are_read_through_their_index(tokens: torch.Tensor, tmp_path: Path) -> None:
    theirs = _theirs("llama-gqa")
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    with torch.no_grad():
        torch.testing.assert_close(load_hf(tmp_path, reference)(tokens), theirs(tokens).logits)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_hf(Transformer(ModelConfig(31, 16, 1, 2, d_model=8)), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "expected model_type llama, mistral, qwen3, got 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"mlp_bias": True}, "mlp_bias True is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": 30}, "weight: expected shape"),
        ({"num_hidden_layers": 2}, "model.layers.1.input_layernorm.weight: missing"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_configuration_that_is_not_ours_is_refused(checkpoint: Path, change: dict, message: str) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        load_hf(checkpoint)


def test_an_unknown_weight_is_refused(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    save_file(weights | {"model.layers.0.extra": torch.zeros(1)}, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.extra: not a weight"):
        load_hf(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_hf(checkpoint)


@pytest.mark.parametrize("change", [{"ffn": "gelu"}, {"softcap": 5.0}, {"window": 4, "qk_norm": True}], ids=str)
def test_what_the_layout_cannot_hold_is_not_saved(tmp_path: Path, change: dict) -> None:
    model = Transformer(replace(ModelConfig(31, 16, 1, 2, d_model=8), **change))
    with pytest.raises(ValueError, match=next(iter(change))):
        save_hf(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
