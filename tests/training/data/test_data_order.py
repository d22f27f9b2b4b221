"""Where a run's samples lie: turns of sources, permutations of windows, rows of ranks."""

from __future__ import annotations

import doctest
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from rooflight.training.data import Batches, batch_generator, get_batch, open_corpus, order
from rooflight.training.data.order import permuted, turns

CPU = torch.device("cpu")


def permutation(n: int, seed: int = 0, source: int = 0, epoch: int = 0) -> list[int]:
    places = order.Places([[n + 1]] * (source + 1), [1.0] * (source + 1), 1, order="epochs", seed=seed)
    key = order._key(seed, np.full(n, source), np.full(n, epoch))
    assert places.sizes[source] == n
    return permuted(np.arange(n), np.full(n, n), key).tolist()


def test_the_example():
    failed, tried = doctest.testmod(order, report=True)
    assert (failed, tried) == (0, 1)


@pytest.mark.parametrize(
    "weights", [[1.0], [2.0, 1.0], [0.3, 0.5, 0.2], [1.0, 1.0, 1.0], [0.9998, 0.0002], [7.0, 1e-3]]
)
def test_every_stretch_has_its_shares(weights):
    source, nth, counts = turns(weights)
    share = np.array(weights) / sum(weights)
    assert counts.sum() == len(source) == (1 if len(weights) == 1 else 10_000)
    assert np.abs(counts / len(source) - share).max() <= 1e-4
    for i, n in enumerate(counts):
        mine = source == i
        assert nth[mine].tolist() == list(range(n))
        so_far = np.cumsum(mine)
        expected = np.arange(1, len(source) + 1) * (n / len(source))
        assert np.abs(so_far - expected).max() < len(weights)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 10, 16, 97, 1000, 10_007])  # squares, primes, and what is neither
def test_an_epoch_is_a_permutation(n):
    first, second = permutation(n), permutation(n, epoch=1)
    assert sorted(first) == sorted(second) == list(range(n))
    if n >= 97:
        others = [second, permutation(n, seed=1), permutation(n, source=1), permutation(n, seed=2**64 - 1)]
        for other in others:  # two random orders agree in one place, on average
            assert sum(a == b for a, b in zip(first, other, strict=True)) < 10
        assert sum(b - a == 1 for a, b in itertools.pairwise(first)) < 10


def test_orders_of_few_windows_are_even():
    """4 windows have 24 orders; of 12,000 epochs 500 each, standard deviation 21.9."""
    epochs = np.repeat(np.arange(12_000), 4)
    key = order._key(3, np.zeros(48_000, np.int64), epochs)
    rows = permuted(np.tile(np.arange(4), 12_000), np.full(48_000, 4), key).reshape(-1, 4)
    counts = Counter(map(tuple, rows.tolist()))
    assert len(counts) == 24
    assert max(abs(count - 500) for count in counts.values()) < 5 * 21.9


def test_the_order_stays_what_it_is():
    """A run goes on under a later version."""
    assert permutation(10, seed=7, source=1, epoch=2) == [1, 9, 8, 5, 3, 0, 7, 2, 6, 4]
    assert turns([3.0, 2.0])[0][:10].tolist() == [0, 1, 0, 1, 0, 0, 1, 0, 1, 0]


def test_sources_have_epochs_of_their_own(write_tokens):
    """11 and 12 windows, two samples in three of the first source; not a turn is lost."""
    paths = [
        write_tokens(range(1, 47), "a.bin", vocab_size=200),
        write_tokens(range(101, 153), "b.bin", vocab_size=200),
    ]
    corpus = open_corpus({str(paths[0]): 2.0, str(paths[1]): 1.0})
    batches = Batches(corpus, 9, 4, CPU, seed=5, order="epochs", step=1110)  # the table of turns ends at sample 10,000
    seen = torch.cat([next(batches)[0][:, 0] for _ in range(20)])
    for mine, n in ((seen[seen < 100], 11), (seen[seen > 100], 12)):
        first = next(i for i in range(n) if len(set(mine[i : i + n].tolist())) == n)
        epochs = [frozenset(mine[i : i + n].tolist()) for i in range(first, len(mine) - n, n)]
        assert len(epochs) >= 4
        assert len(set(epochs)) == 1
        assert len(epochs[0]) == n


@pytest.mark.parametrize("batch_size", [1, 6, 64])
def test_every_window_once_an_epoch(write_tokens, tmp_path, batch_size):
    """23 windows of 4 in two shards, whose tails of 1 and 3 tokens are in none; epochs end within batches."""
    write_tokens(range(1, 47), "s/a.bin", vocab_size=200)  # 11
    write_tokens(range(101, 153), "s/b.bin", vocab_size=200)  # 12
    windows = [*range(1, 45, 4), *range(101, 149, 4)]
    batches = Batches(open_corpus(tmp_path / "s"), batch_size, 4, CPU, seed=5, order="epochs")
    seen = torch.cat([next(batches)[0][:, 0] for _ in range(-(-4 * 23 // batch_size))]).tolist()
    epochs = [seen[i : i + 23] for i in range(0, 4 * 23, 23)]
    assert all(sorted(epoch) == windows for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("options", [
    {}, {"order": "epochs"}, {"weights": True}, {"order": "epochs", "weights": True}, {"order": "epochs", "eod": 9},
])  # fmt: skip
def test_ranks_share_the_batch_that_one_process_has(write_tokens, options):
    options = dict(options)
    rng = np.random.default_rng(0)
    paths = [str(write_tokens(rng.integers(0, 32, n), f"{n}.bin")) for n in (300, 200)]
    corpus = open_corpus(dict(zip(paths, (1.0, 2.0), strict=True)) if options.pop("weights", False) else paths)
    whole = Batches(corpus, 12, 8, CPU, seed=3, **options)
    expected = [next(whole) for _ in range(4)]
    for world in (1, 2, 3, 4):
        ranks = [
            Batches(corpus, 12, 8, CPU, seed=3, rows=slice(r * 12 // world, (r + 1) * 12 // world), step=1, **options)
            for r in range(world)
        ]
        for step in (1, 2, 3):
            parts = [next(rank) for rank in ranks]
            for i in (0, 1):
                assert torch.equal(torch.cat([part[i] for part in parts]), expected[step][i])
                assert torch.equal(torch.cat([rank.at(step)[i] for rank in ranks]), expected[step][i])


def test_another_batch_size_goes_on_where_the_samples_were(write_tokens):
    corpus = open_corpus(write_tokens(np.random.default_rng(0).integers(0, 32, 500)))
    whole = torch.cat([Batches(corpus, 6, 8, CPU, seed=3, order="epochs").at(i)[0] for i in range(10)])
    resumed = Batches(corpus, 4, 8, CPU, seed=3, order="epochs", step=5, samples=30)
    again = torch.cat([next(resumed)[0] for _ in range(7)])
    assert torch.equal(again, whole[30:58])


def test_random_places_of_one_file_are_get_batchs(write_tokens):
    """As they have always been: a run of an earlier version goes on with the same batches."""
    tokens = np.random.default_rng(0).integers(0, 32, 500).astype(np.uint16)
    batches = Batches(open_corpus(write_tokens(tokens)), 8, 16, CPU, seed=11, step=3)
    for step in (3, 4):
        for a, b in zip(next(batches), get_batch(tokens, 8, 16, generator=batch_generator(11, step)), strict=True):
            assert torch.equal(a, b)


def test_the_network_has_room_for_the_largest_corpora():
    """2^45 tokens in windows of 8: 64-bit products of places do not overflow, and no float rounds a size."""
    n = 2**42 - 1
    places = permuted(np.arange(n - 1000, n), np.full(1000, n), order._key(0, np.zeros(1000, int), np.zeros(1000, int)))
    assert len(set(places.tolist())) == 1000
    assert 0 <= min(places) < max(places) < n
    assert math.isclose(np.mean(places), n / 2, rel_tol=0.1)
