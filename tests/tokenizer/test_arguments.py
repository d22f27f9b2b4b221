"""What the methods of a tokenizer take and refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rooflight.tokenizer import Tokenizer
from support import bpe_reference

END = "<|endoftext|>"
VOCAB, MERGES = bpe_reference.train("the cat sat on the mat; the cat's hat", 20)


@pytest.mark.parametrize("n", [3, 900])
@pytest.mark.parametrize("bad", [1 << 63, (1 << 64) - 1, 1 << 64, -1, 10_000, 1.0, None])
def test_lists_and_arrays_refuse_the_same_ids(n: int, bad: object) -> None:
    tokenizer = Tokenizer(VOCAB, MERGES)
    for ids in [[65] * n + [bad], np.array([65] * n + [bad])]:
        with pytest.raises(ValueError, match="ids: "):
            tokenizer.decode(ids)


def test_tensors_and_arrays_of_any_shape_and_type_decode_alike() -> None:
    tokenizer = Tokenizer(VOCAB, MERGES)
    ids = np.arange(65, 89)
    text = tokenizer.decode(ids.tolist())
    for dtype in ("<u2", ">i4", "<u8", ">u8", "<i8"):
        for shape in ((24,), (1, 24), (4, 6), (2, 3, 4)):
            assert tokenizer.decode(ids.astype(dtype).reshape(shape)) == text
    assert tokenizer.decode(torch.from_numpy(ids).reshape(4, 6)) == text


@pytest.mark.parametrize("text", [b"the", ["a"], None, 3])
def test_what_is_no_text_is_refused_by_name(text: object) -> None:
    tokenizer = Tokenizer(VOCAB, MERGES, [END])
    kind = type(text).__name__
    for call in (
        lambda: tokenizer.encode(text),
        lambda: tokenizer.encode_many([text]),
        lambda: tokenizer.encode_batch([text]),
        lambda: tokenizer.encode_many([text], allowed_special="none_raise"),
        lambda: tokenizer.encode_batch([text], allowed_special="none_raise"),
        lambda: list(tokenizer.encode_iterable([text])),
    ):
        with pytest.raises(ValueError, match=rf"texts?: got {kind}, expected str"):
            call()
    with pytest.raises(ValueError, match="texts: got str, expected a sequence of str"):
        tokenizer.encode_many("the")
    with pytest.raises(ValueError, match="texts: got str, expected an iterable of str"):
        tokenizer.encode_batch("the")


def test_an_id_beyond_the_arrays_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocab: the id 1099511627776 of b'<x>', expected one below 2\^31 - 1"):
        Tokenizer(VOCAB, MERGES, {"<x>": 2**40})


def test_every_way_to_encode_heeds_allowed_special() -> None:
    tokenizer = Tokenizer(VOCAB, MERGES, [END])
    text = f"the cat{END}"
    for call in (
        lambda: tokenizer.encode_many([text], allowed_special="none_raise"),
        lambda: tokenizer.encode_batch([text], allowed_special="none_raise"),
        lambda: list(tokenizer.encode_iterable([text], allowed_special="none_raise")),
    ):
        with pytest.raises(ValueError, match="none_raise"):
            call()
    # A set is looked into once.
    assert tokenizer._allowed({END}) is tokenizer._allowed(frozenset([END]))
