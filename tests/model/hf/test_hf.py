"""Checkpoints in Hugging Face's layout, held against transformers' own models."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rooflight.kernels import reference
from rooflight.model import ModelConfig, Transformer, load_hf, save_hf
from rooflight.model.hf import keys
from rooflight.model.hf.config import from_hf
from rooflight.tokenizer import Tokenizer

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


def _theirs(family: str, change: dict | None = None) -> torch.nn.Module:
    name, fields = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**SHAPE | fields | (change or {}), attn_implementation="eager")
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


# What a folder says beside the plain case, where an ill-made reader goes wrong; the right value is transformers'.
FOLDERS = {
    "rope_scaling before rope_parameters": ("llama", {"rope_scaling": {"rope_type": "default", "rope_theta": 77.0}}),
    "rope_theta at the top": ("llama", {"rope_theta": 77.0, "rope_parameters": None}),
    "no sliding_window: 4096": ("mistral-window", {"sliding_window": ...}),
    "no num_key_value_heads: 8": ("mistral-window", {"num_attention_heads": 8, "num_key_value_heads": ...}),
    "sliding_window null": ("mistral-window", {"sliding_window": None}),
    "a ministral, all full": ("mistral-window", {"layer_types": ["full_attention"] * 2}),
    "a qwen3 with a window": (
        "qwen3-qk-norm",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    ),
    "a qwen3 whose window is off": ("qwen3-qk-norm", {"sliding_window": 4, "max_window_layers": 0}),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_what_a_folder_says_is_what_transformers_reads(name: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    family, change = FOLDERS[name]
    n_kv_head = 8 if "num_key_value_heads" in change else 2
    _theirs(
        family, {k: v for k, v in change.items() if v is not ...} | {"num_key_value_heads": n_kv_head}
    ).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text()) | change
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(load_hf(tmp_path, reference)(tokens), theirs(tokens).logits)


@pytest.mark.parametrize("same", [False, True])
def test_an_output_matrix_beside_tie_word_embeddings(same: bool, tokens: torch.Tensor, tmp_path: Path) -> None:
    theirs = _theirs("llama-mqa-tied")
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    head = weights["model.embed_tokens.weight"] + (0 if same else 1)
    save_file(weights | {"lm_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours, theirs = load_hf(tmp_path, reference), transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert ours.config.tie_embeddings is same
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits)


def test_saving_into_a_folder_of_shards_replaces_them(tokens: torch.Tensor, tmp_path: Path) -> None:
    _theirs("llama-gqa").save_pretrained(tmp_path, max_shard_size="40KB")
    (tmp_path / "notes.txt").write_text("mine")
    torch.manual_seed(1)
    new = Transformer(ModelConfig(97, 64, 1, 4, d_model=48), reference)
    save_hf(new, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "generation_config.json", "model.safetensors", "notes.txt"]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(load_hf(tmp_path, reference)(tokens), new(tokens), rtol=0, atol=0)
        torch.testing.assert_close(again(tokens).logits, new(tokens))


def test_a_single_file_comes_before_an_index(checkpoint: Path) -> None:
    """As for transformers: a crash between the two must leave what was written last."""
    (checkpoint / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    load_hf(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        {"d_model": 50, "n_head": 4, "head_dim": 8},  # a Llama must divide d_model; not so a Mistral
        {"head_dim": 44, "rope_dim": 30},  # 44 * (30 / 44) is less than 30, and theirs is cut
        {"attention_scale": 2.0},  # whose inverse square, as Gemma has it, rounds to 0
        {"window": 3},
        {"window": 3, "qk_norm": True},
    ],
    ids=str,
)
def test_a_shape_of_our_own_opens_in_transformers(change: dict, tokens: torch.Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = Transformer(
        ModelConfig(**{"vocab_size": 97, "context_length": 64, "n_layer": 2, "n_head": 4, "d_model": 48} | change)
    )
    save_hf(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, load_hf(tmp_path, reference)(tokens))


def test_a_model_inside_a_wrapper_saves_its_plain_weights(tmp_path: Path) -> None:
    model = Transformer(ModelConfig(31, 16, 1, 2, d_model=8))
    wrapped = torch.nn.Module()
    wrapped.module = torch.compile(model)  # as DistributedDataParallel holds it
    for name, outer in (("compiled", torch.compile(model)), ("both", wrapped)):
        save_hf(outer, tmp_path / name)
        assert torch.equal(load_hf(tmp_path / name).embedding.weight, model.embedding.weight)
    with pytest.raises(ValueError, match=r"^model: expected a Transformer, got Linear"):
        save_hf(torch.nn.Linear(2, 2), tmp_path / "linear")
    assert not (tmp_path / "linear").exists()


@pytest.mark.parametrize("tokenizer_first", [False, True])
def test_beside_a_tokenizer_the_models_type_does_not_choose_another(tokenizer_first: bool, tmp_path: Path) -> None:
    """A Qwen3's AutoTokenizer would be Qwen2's, with its own pattern and NFC, whatever tokenizer.json says."""
    tokenizer = Tokenizer({i: bytes([i]) for i in range(256)} | {256: b"<|endoftext|>"}, [], ["<|endoftext|>"])
    writers = [
        lambda: save_hf(Transformer(ModelConfig(257, 16, 1, 2, d_model=8, qk_norm=True)), tmp_path),
        lambda: tokenizer.export_hf(tmp_path / "tokenizer.json"),
    ]
    for write in reversed(writers) if tokenizer_first else writers:
        write()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "e\u0301 don't 1234 \u2126<|endoftext|>\n\n x"
    assert theirs(text)["input_ids"] == tokenizer.encode(text)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_hf(Transformer(ModelConfig(31, 16, 1, 2, d_model=8)), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "expected model_type llama, .*, got 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"is_causal": False}, "is_causal False is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config {'bits': 4} is not supported"),
        ({"some_future_switch": 0.5}, "some_future_switch 0.5 is not supported"),
        ({"sliding_window": 7}, "sliding_window 7 is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"model_type": "mistral", "mlp_bias": True}, "mlp_bias True is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not supported"),
        ({"model_type": "qwen3", "layer_types": ["chunked_attention"]}, "layer_types: expected 1 of sliding_attention"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window: expected a whole number >= 1 or null, got 0"),
        ({"attention_bias": True}, "self_attn.qkv_proj|self_attn.*bias: missing"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, "rope_type 'ntk' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "rope_type 'llama3' is not supported so: .* needs"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0, "tail": 1}}, "tail 1 is not supported"),
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


# Of every kind of JSON: what is none of a key's own.
JUNK: list[Any] = [True, 0, -1, 1.5, math.nan, math.inf, "", "x", [], [None], {}, {"a": 1}]
JUNK += [{"rope_type": ["x"]}, {"rope_type": "linear"}, {"rope_type": "yarn", "factor": 2, "mscale": "a"}]
JUNK += [{"rope_type": "longrope", "short_factor": 3, "long_factor": "x"}, {"full_attention": 3}, None]


@pytest.mark.parametrize("model_type", keys.FAMILIES)
def test_a_key_of_another_type_is_refused_or_read_as_off(model_type: str) -> None:
    """Never a TypeError of the arithmetic that it comes to."""
    shape = dict.fromkeys(keys.REQUIRED, 32) | {"model_type": model_type, "head_dim": 2}
    from_hf(shape, Path("config.json"))
    refused = 0
    for key in (*keys.FAMILIES[model_type].defaults, *keys.REQUIRED, "model_type"):
        for junk in JUNK:
            try:
                from_hf(shape | {key: junk}, Path("config.json"))
            except ValueError:
                refused += 1
        if isinstance(keys.FAMILIES[model_type].defaults.get(key), float):
            with pytest.raises(
                ValueError, match=f"config.json: {key}: expected a finite number > 0( or null)?, got 'x'"
            ):
                from_hf(shape | {key: "x"}, Path("config.json"))
    assert refused > 100


def test_a_key_that_transformers_does_not_apply_is_not_applied() -> None:
    """Gemma 3's attention has no softcap, whatever its configuration says: 5e-4 in the logits."""
    shape = dict.fromkeys(keys.REQUIRED, 4) | {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}
    with pytest.raises(ValueError, match=r"attn_logit_softcapping 50\.0 is not supported"):
        from_hf(shape, Path("config.json"))


def test_weights_that_are_no_floating_point_numbers_are_refused(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(weights | {name: weights[name].to(torch.int8)}, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{name}: expected floating-point numbers, got torch\.int8"):
        load_hf(checkpoint)


def test_an_unknown_weight_is_refused(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    save_file(weights | {"model.layers.0.extra": torch.zeros(1)}, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.extra: not a weight"):
        load_hf(checkpoint)


def test_keys_that_change_nothing_are_passed_over(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    harmless = {
        "pretraining_tp": 2,
        "bos_token_id": 1,
        "attention_dropout": 0.1,
        "temperature": 0.7,
        "some_switch": False,
    }
    (checkpoint / "config.json").write_text(json.dumps(config | harmless | {"rope_scaling": None}))
    load_hf(checkpoint)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b'{"model_type": ', "not JSON"),
        ("config.json", b"\xff\xfe", "not JSON"),
        ("config.json", b"[]", "expected a JSON object, got list"),
        ("model.safetensors", None, "not a whole safetensors file"),
        ("model.safetensors", b"", "not a whole safetensors file"),
        ("model.safetensors.index.json", b"{", "not JSON"),
        ("model.safetensors.index.json", b"{}", "expected a weight_map"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": 1}}', "expected a weight_map"),
    ],
)
def test_a_damaged_file_is_named(checkpoint: Path, name: str, content: bytes | None, message: str) -> None:
    file = checkpoint / name
    if name.endswith("index.json"):
        (checkpoint / "model.safetensors").unlink()
    file.write_bytes(file.read_bytes()[:-10] if content is None else content)  # None: cut off
    with pytest.raises(ValueError, match=f"^{file}: {message}"):
        load_hf(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_hf(checkpoint)


@pytest.mark.parametrize("change", [{"ffn": "gelu"}, {"softcap": 5.0}, {"rope_interleaved": True}], ids=str)
def test_what_the_layout_cannot_hold_is_not_saved(tmp_path: Path, change: dict) -> None:
    model = Transformer(replace(ModelConfig(31, 16, 1, 2, d_model=8), **change))
    with pytest.raises(ValueError, match=next(iter(change))):
        save_hf(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
