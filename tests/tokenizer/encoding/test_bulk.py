"""What other processes get of a tokenizer gives the same ids, and is small."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from rooflight.tokenizer import Tokenizer
from rooflight.tokenizer.definition import Options
from rooflight.tokenizer.encoding.text import TextEncoder
from rooflight.tokenizer.tokenizer import _build
from support import bpe_reference

END = "<|endoftext|>"
TEXT = "the cat sat on the mat; naïve café, e\u0301 日本語日本語 aaaaaaaa  \t\n 1234 they'll see\n" * 3
VOCAB, MERGES = bpe_reference.train(TEXT, 60)
PLAIN = Tokenizer(VOCAB, MERGES, [END])
TOKENIZERS = {
    "plain": PLAIN,
    "custom pattern": Tokenizer(VOCAB, MERGES, [END], pattern=r"\S+|\s+"),
    "whole words": Tokenizer(VOCAB | {len(VOCAB): b" zzz"}, MERGES, [END], pattern="llama3", ignore_merges=True),
    "options": _build(replace(PLAIN.definition, options=Options(nfc=True, prefix_space=True))),
    "gaps": Tokenizer(VOCAB | {1000: END.encode()}, MERGES, [END]),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_pickled_encoder_gives_the_same_ids(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    # Words for the arrays, for windows, and one at a time.
    texts = [TEXT, TEXT + END + TEXT, "", "cat" * 500, "x", "a zzz", END]
    cutter = tokenizer._all
    sent = pickle.dumps((tokenizer._encoder.bulk, cutter), pickle.HIGHEST_PROTOCOL)
    bulk, its_cutter = pickle.loads(sent)
    ids, counts = bulk.encode_many(texts, its_cutter.specials)
    assert counts == [len(tokenizer.encode(text)) for text in texts]
    assert ids.tolist() == [i for text in texts for i in tokenizer.encode(text)]
    data = "".join(texts).encode() + b"\xe6\x97"
    assert bulk.encode_bytes(data, its_cutter).tolist() == tokenizer.encode(data.decode(errors="replace"))
    # It has met words by now; they are not sent on.
    again = pickle.dumps((bulk, its_cutter), pickle.HIGHEST_PROTOCOL)
    assert len(again) < len(sent) + 1000


def test_a_byte_without_a_token_is_refused_by_the_copy_too() -> None:
    vocab = dict(enumerate(token for token in VOCAB.values() if token != b"\x04"))
    definition = replace(PLAIN.definition, vocab=vocab, pairs=PLAIN.definition.pairs[:0], special_tokens={})
    bulk = pickle.loads(pickle.dumps(_build(definition)._encoder.bulk))
    with pytest.raises(ValueError, match="has no token in this vocabulary"):
        bulk.encode_many(["a\x04"], PLAIN._none.specials)


def test_a_byte_without_a_token_is_refused_while_another_thread_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    vocab = dict(enumerate(token for token in VOCAB.values() if token != b"\x04"))
    definition = replace(PLAIN.definition, vocab=vocab, pairs=PLAIN.definition.pairs[:0], special_tokens={})
    bulk = _build(definition)._encoder.bulk
    encode, refused = TextEncoder.encode, []

    def meanwhile(encoder: TextEncoder, data: bytes, special_ids: np.ndarray) -> np.ndarray:
        with pytest.raises(ValueError, match="has no token in this vocabulary"):
            bulk.encode_many(["a\x04"], PLAIN._none.specials)
        refused.append(data)
        return encode(encoder, data, special_ids)

    monkeypatch.setattr(TextEncoder, "encode", meanwhile)
    bulk.warm_up(b"\x04")
    assert refused == [b"\x04"]
