from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from rooflight.training.data import batch_generator, get_batch, open_tokens, validation_batches


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_tokens_are_mapped_as_written(write_tokens, dtype):
    ids = [0, 7, 300, 65535] if dtype == "uint16" else [0, 7, 70_000, 2**32 - 1]
    file = open_tokens(write_tokens(ids, dtype=dtype, vocab_size=2**32, n_bytes=10))
    assert file.tokens.tolist() == ids
    assert isinstance(file.tokens, np.memmap)
    assert not file.tokens.flags.writeable
    assert (file.n_tokens, file.n_bytes, file.vocab_size, file.tokenizer_hash) == (4, 10, 2**32, "0" * 64)
    # 4 tokens for 10 bytes: ln 2 nats a token is 1 bit a token
    assert file.bits_per_byte(math.log(2)) == pytest.approx(0.4)


def test_bytes_are_little_endian(write_tokens):
    path = write_tokens([1, 256])
    assert path.read_bytes() == b"\x01\x00\x00\x01"
    assert open_tokens(path).tokens.tolist() == [1, 256]


def test_missing_files(write_tokens, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no token file at .*absent\.bin"):
        open_tokens(tmp_path / "absent.bin")
    path = write_tokens([1, 2])
    path.with_name("tokens.bin.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no header of the token file at .*tokens\.bin\.json; .*encode"):
        open_tokens(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "other"}, '"format": "rooflight-tokens"'),
        ({"version": 2}, "has version 2, expected 1"),
        ({"dtype": "int16"}, 'has dtype \'int16\', expected "uint16" or "uint32"'),
        ({"vocab_size": 0}, "has vocab_size 0, expected a positive integer"),
        ({"n_tokens": "4"}, "has n_tokens '4', expected a positive integer"),
        ({"n_bytes": True}, "has n_bytes True, expected a positive integer"),
        ({"tokenizer_hash": None}, "has no tokenizer_hash"),
        ({"n_tokens": 5}, "has 8 bytes, but its header promises 5 tokens of uint16, 10 bytes"),
        ({"dtype": "uint32"}, "has 16 bytes, but its header promises 4 tokens of uint16"),
    ],
)
def test_wrong_headers(write_tokens, fields, message):
    path = write_tokens([1, 2, 3, 4], dtype=fields.get("dtype") if fields == {"dtype": "uint32"} else "uint16")
    header = path.with_name("tokens.bin.json")
    fields = {"dtype": "uint16"} if fields == {"dtype": "uint32"} else fields
    header.write_text(json.dumps(json.loads(header.read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        open_tokens(path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_a_header_that_is_not_one(write_tokens, text):
    path = write_tokens([1, 2])
    path.with_name("tokens.bin.json").write_text(text)
    with pytest.raises(ValueError, match="is not a token file's header"):
        open_tokens(path)


def test_vocabulary_must_fit_the_model(write_tokens):
    path = write_tokens([1, 2], vocab_size=32)
    assert open_tokens(path, vocab_size=32).vocab_size == 32
    assert open_tokens(path, vocab_size=64).vocab_size == 32  # a padded model
    with pytest.raises(ValueError, match="vocabulary of 32 tokens, more than the model's vocab_size of 31"):
        open_tokens(path, vocab_size=31)


def test_batches_are_shifted_windows():
    tokens = np.arange(100, dtype=np.uint16)
    inputs, targets = get_batch(tokens, 16, 7, generator=np.random.default_rng(0))
    assert inputs.shape == targets.shape == (16, 7)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(7))


def test_every_window_is_drawn_about_equally_often():
    """CS336's test: 100 tokens, context 7 give 93 starts; 32,000 draws have 344 each, standard deviation 18.4."""
    tokens = np.arange(100)
    starts = [get_batch(tokens, 32, 7, generator=batch_generator(0, i))[0][:, 0] for i in range(1000)]
    counts = torch.bincount(torch.cat(starts), minlength=93)
    assert len(counts) == 93  # the last start is 92: targets end at token 99
    expected = 32_000 / 93
    assert (counts - expected).abs().max() < 5 * (expected * (1 - 1 / 93)) ** 0.5


def test_smallest_file_has_one_window():
    inputs, targets = get_batch(np.arange(8), 3, 7)
    assert inputs[:, 0].tolist() == [0, 0, 0]
    assert targets[:, -1].tolist() == [7, 7, 7]


def test_batches_depend_on_seed_and_step_alone():
    tokens = np.arange(10_000)

    def batch(seed: int, step: int) -> torch.Tensor:
        return get_batch(tokens, 8, 4, generator=batch_generator(seed, step))[0]

    assert torch.equal(batch(1, 5), batch(1, 5))
    assert not torch.equal(batch(1, 5), batch(1, 6))
    assert not torch.equal(batch(1, 5), batch(2, 5))
    assert not torch.equal(batch(1, 5), batch(5, 1))
    assert not torch.equal(batch(1, 5), batch(2, 4))


@pytest.mark.parametrize("n_tokens", [22, 21, 24])  # 3 windows of 7 and their last target; one short; a tail left over
def test_validation_covers_the_file_once(n_tokens):
    tokens = np.arange(n_tokens, dtype=np.uint16)
    batches = list(validation_batches(tokens, 2, 7))
    targets = torch.cat([t for _, t in batches]).flatten()
    assert torch.equal(targets, torch.arange(1, (n_tokens - 1) // 7 * 7 + 1))
    assert all(torch.equal(t, i + 1) for i, t in batches)
    assert [len(i) for i, _ in batches] == ([2, 1] if n_tokens >= 22 else [2])


def test_validation_batches_spread_over_the_file():
    tokens = np.arange(1001, dtype=np.uint16)
    starts = torch.cat([i[:, 0] for i, _ in validation_batches(tokens, 2, 10, max_batches=3)])
    assert starts.tolist() == [0, 200, 400, 590, 790, 990]  # 6 of the 100 windows, ends included
    assert len(list(validation_batches(tokens, 2, 10, max_batches=500))) == 50


@pytest.mark.parametrize("batches", [get_batch, lambda *a: list(validation_batches(*a))])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.arange(7), 1, 7), "context_length 7 needs at least 8 tokens, got 7"),
        ((np.arange(9), 0, 7), "batch_size must be at least 1, got 0"),
        ((np.arange(9), 1, 0), "context_length must be at least 1, got 0"),
    ],
)
def test_refuses(batches, arguments, message):
    with pytest.raises(ValueError, match=message):
        batches(*arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_reach_the_gpu_intact():
    tokens = np.arange(1000)
    for step in range(20):  # pinned buffers are recycled: a copy must not be overtaken by the next batch
        inputs, targets = get_batch(tokens, 4, 16, "cuda", generator=batch_generator(0, step))
        expected, _ = get_batch(tokens, 4, 16, generator=batch_generator(0, step))
        assert inputs.device.type == "cuda"
        assert torch.equal(inputs.cpu(), expected)
        assert torch.equal(targets.cpu(), expected + 1)


def test_ids_past_the_vocabulary_are_named():
    """Before they reach a device, where they would be an assertion in a kernel; by their place in the file."""
    tokens = np.arange(40, dtype=np.uint16)
    tokens[17] = 60000
    with pytest.raises(ValueError, match="tokens: token 17 is 60000, and the model's vocab_size 41"):
        get_batch(tokens, 64, 8, vocab_size=41)  # 64 of 32 places, 9 of which see it: missed once in 10^9
    with pytest.raises(ValueError, match="token 17 is 60000"):
        list(validation_batches(tokens, 4, 8, vocab_size=41))
    assert len(list(validation_batches(tokens, 4, 8, vocab_size=60001))) == 1
