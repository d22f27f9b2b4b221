"""Cached generation against a forward pass over the whole sequence for every token."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rooflight import kernels
from rooflight.kernels import reference
from rooflight.model import ModelConfig, Transformer, generate
from rooflight.model.generate import KVCache, sampling_probabilities, stream

CONFIG = ModelConfig(61, 40, 2, 4, n_kv_head=2, d_model=32, d_ff=48)
CONFIGS = {
    "plain": CONFIG,
    "one head each": replace(CONFIG, n_kv_head=4),
    "window": replace(CONFIG, window=5),
    "window of itself": replace(CONFIG, window=0),
    "qk-norm, softcap, tied": replace(CONFIG, qk_norm=True, softcap=3.0, tie_embeddings=True),
    "layers of two kinds": replace(
        CONFIG, window=5, full_layers=(1,), nope_layers=(0,), rope_local_theta=50.0, logit_softcap=2.0
    ),
}


def _model(config: ModelConfig = CONFIG, ops=reference) -> Transformer:
    torch.manual_seed(0)
    return Transformer(config, ops).double()


def _tokens(*shape: int) -> Tensor:
    return torch.randint(CONFIG.vocab_size, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_cache_changes_no_logit(name: str, batch_size: int) -> None:
    model, tokens = _model(CONFIGS[name]), _tokens(batch_size, 20)
    cache = KVCache(model, batch_size, 20)
    pieces = tokens.split([7, 1, 1, 4, 1, 6], dim=1)  # a prompt, single tokens, and pieces in between
    cached = torch.cat([model(piece, cache=cache) for piece in pieces], dim=1)
    torch.testing.assert_close(cached, model(tokens), rtol=0, atol=1e-12)
    assert cache.length == 20


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_generation_equals_the_uncached(name: str) -> None:
    model, rows = _model(CONFIGS[name]), _tokens(3, 6)
    generated = generate(model, rows, 34, temperature=0)  # to the last position
    assert generated.shape == (3, 40)
    with torch.no_grad():
        while rows.shape[1] < 40:
            rows = torch.cat((rows, model(rows)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(generated, rows)


def test_longrope_turns_to_its_other_frequencies_with_all_keys() -> None:
    scaling = {
        "kind": "longrope",
        "original_context_length": 12,
        "short_factor": [1.0] * 4,
        "long_factor": [1, 3, 5, 9],
    }
    model, rows = _model(replace(CONFIG, rope_scaling=scaling)), _tokens(2, 6)
    generated = generate(model, rows, 20, temperature=0)
    with torch.no_grad():
        while rows.shape[1] < 26:
            rows = torch.cat((rows, model(rows)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(generated, rows)


def test_the_kernels_generate_what_the_oracles_do(device: torch.device) -> None:
    tokens = _tokens(2, 5).to(device)
    ours, oracle = (_model(CONFIGS["window"], ops).float().to(device) for ops in (kernels, reference))
    assert torch.equal(generate(ours, tokens, 4, temperature=0), generate(oracle, tokens, 4, temperature=0))


def test_a_generator_makes_draws_repeatable() -> None:
    model, tokens = _model(), _tokens(2, 4)
    first, again, other = (
        generate(model, tokens, 12, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first[:, :4], tokens)


def test_draws_follow_the_models_distribution() -> None:
    model, prompt, n = _model(replace(CONFIG, vocab_size=5)), torch.tensor([[1, 2]]), 4000
    drawn = generate(model, prompt.expand(n, 2), 1, generator=torch.Generator().manual_seed(0))[:, -1]
    counts = torch.bincount(drawn, minlength=5)
    expected = model(prompt)[0, -1].softmax(-1) * n
    chi2 = ((counts - expected).square() / expected).sum().item()
    assert chi2 < 18.5  # 4 degrees of freedom: passed by 99.9 % of seeds, and this seed is fixed


def test_autocast_caches_in_its_dtype() -> None:
    model, tokens = _model().float(), _tokens(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert KVCache(model, 2, 8).keys.dtype == torch.bfloat16
        assert generate(model, tokens, 3, temperature=0).shape == (2, 9)
    assert KVCache(model, 2, 8).keys.dtype == torch.float32
    assert KVCache(model, 2, 8).keys.shape == (2, 2, 2, 8, 8)  # L, B, K, not H: grouped heads share


def test_a_stream_yields_each_token_when_it_is_drawn() -> None:
    model, tokens = _model(), _tokens(2, 5)
    calls = []
    model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    drawn = stream(model, tokens, 6, temperature=0)
    assert not calls
    first = next(drawn)
    assert len(calls) == 1
    assert torch.is_grad_enabled()
    assert torch.equal(torch.cat((tokens, first, *drawn), 1), generate(model, tokens, 6, temperature=0))
    with pytest.raises(ValueError, match=r"^top_k"):
        stream(model, tokens, 6, top_k=0)


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {}, {"temperature": 50.0, "top_k": 60}, {"top_p": 0.9}], ids=str
)
def test_a_token_that_is_not_allowed_is_never_drawn(options: dict) -> None:
    """A vocabulary padded past the tokenizer's, or with a hole in it."""
    model = _model()
    with torch.no_grad():  # the forbidden ones are the likeliest
        model.output_weight[40:] *= 20
        model.output_weight[7] *= 20
    allowed = torch.arange(61) < 40
    allowed[7] = False
    drawn = generate(model, _tokens(8, 3), 30, allowed=allowed, generator=torch.Generator().manual_seed(0), **options)[
        :, 3:
    ]
    assert bool(allowed[drawn].all())
    free = generate(model, _tokens(8, 3), 30, generator=torch.Generator().manual_seed(0), **options)[:, 3:]
    assert not bool(allowed[free].all())


class TestStopToken:
    def test_a_row_that_has_drawn_it_repeats_it_and_the_last_one_ends(self) -> None:
        model, tokens = _model(), _tokens(6, 3)
        free = generate(model, tokens, 30, temperature=0)
        # a token that some rows draw and others do not, or not as soon
        stop = Counter(free[:, 3:].flatten().tolist()).most_common(1)[0][0]
        stopped = generate(model, tokens, 30, temperature=0, stop_token=stop)
        ends = [row.index(stop) if stop in row else 30 for row in free[:, 3:].tolist()]
        assert len(set(ends)) > 1
        assert stopped.shape[1] == 3 + min(30, max(ends) + 1)
        for row, whole, end in zip(stopped[:, 3:].tolist(), free[:, 3:].tolist(), ends, strict=True):
            assert row[: end + 1] == whole[: len(row)][: end + 1]
            assert set(row[end:]) <= {stop}

    def test_one_in_the_prompt_does_not_count(self) -> None:
        model = _model()
        tokens = torch.full((1, 3), 7)
        assert generate(model, tokens, 5, temperature=0, stop_token=7).shape[1] > 4


class TestSamplingProbabilities:
    logits = torch.tensor([2.0, 1.0, 0.0, 1.0, -1.0])

    def test_plain_is_the_softmax(self) -> None:
        torch.testing.assert_close(sampling_probabilities(self.logits), self.logits.softmax(-1))
        torch.testing.assert_close(sampling_probabilities(self.logits, temperature=2), (self.logits / 2).softmax(-1))

    def test_temperature_0_takes_the_greatest(self) -> None:
        assert sampling_probabilities(self.logits, temperature=0).tolist() == [1, 0, 0, 0, 0]
        assert sampling_probabilities(torch.tensor([0.0, 3.0, 3.0]), temperature=0).tolist() == [0, 1, 0]

    @pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-37, 1e-38, 1e-40, 1e-45, 5e-324])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_small_temperature_is_greedy(self, temperature: float, dtype: torch.dtype) -> None:
        logits = torch.tensor([[-3.0, 88.0, 1e4], [float("-inf"), -7.0, -8.0]], dtype=dtype)
        for options in ({}, {"top_k": 2}, {"top_p": 0.5}):
            p = sampling_probabilities(logits, temperature=temperature, **options)
            assert p.tolist() == [[0, 0, 1], [0, 1, 0]]

    @pytest.mark.parametrize(
        ("k", "kept"), [(1, [0]), (2, [0, 1, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3]), (99, range(5))]
    )
    def test_top_k_keeps_the_greatest_and_their_equals(self, k: int, kept: list[int]) -> None:
        p = sampling_probabilities(self.logits, top_k=k)
        assert p.nonzero().flatten().tolist() == list(kept)
        torch.testing.assert_close(p[p > 0], self.logits[p > 0].softmax(-1))

    @pytest.mark.parametrize(
        ("p", "kept"),
        # probabilities 0.50, 0.25, 0.125, 0.0625, 0.0625, exact in binary
        [(1e-9, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.875, 3), (0.9, 4), (0.94, 5), (1.0, 5)],
    )
    def test_top_p_keeps_the_smallest_set_that_reaches_p(self, p: float, kept: int) -> None:
        probabilities = torch.tensor([0.125, 0.5, 0.0625, 0.25, 0.0625])
        got = sampling_probabilities(probabilities.log(), top_p=p)
        keep = probabilities.sort(descending=True, stable=True).indices[:kept]
        expected = torch.zeros(5).index_copy(0, keep, probabilities[keep])
        torch.testing.assert_close(got, expected / expected.sum())

    def test_top_k_comes_before_top_p(self) -> None:
        p = sampling_probabilities(torch.tensor([0.4, 0.3, 0.2, 0.1]).log(), top_k=2, top_p=0.5)
        torch.testing.assert_close(p, torch.tensor([1.0, 0, 0, 0]))  # 0.4 / 0.7 reaches 0.5 by itself


class TestShapesAndBadInput:
    def test_one_sequence_without_a_batch(self) -> None:
        model, tokens = _model(), _tokens(4)
        assert torch.equal(
            generate(model, tokens, 3, temperature=0), generate(model, tokens[None], 3, temperature=0)[0]
        )

    def test_nothing_new_is_the_prompt(self) -> None:
        assert torch.equal(generate(_model(), _tokens(2, 40), 0), _tokens(2, 40))

    def test_gradients_are_not_recorded(self) -> None:
        model = _model()
        cache = KVCache(model, 1, 4)
        generate(model, _tokens(1, 2), 2)
        assert not cache.keys.requires_grad
        assert all(p.grad is None for p in model.parameters())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"tokens": torch.zeros(1, 0, dtype=torch.long)}, r"tokens: expected .* got \(1, 0\)"),
            ({"tokens": torch.zeros(1, 1, 1, dtype=torch.long)}, r"tokens: expected .* got \(1, 1, 1\)"),
            (
                {"max_new_tokens": 37},
                r"max_new_tokens: expected 0 \.\. 36 \(context_length 40 less a prompt of 4\), got 37",
            ),
            ({"max_new_tokens": -1}, r"max_new_tokens: expected 0 \.\. 36"),
            ({"temperature": -0.1}, "temperature: expected a finite number >= 0, got -0.1"),
            ({"temperature": float("nan")}, "temperature: expected a finite number >= 0, got nan"),
            ({"top_k": 0}, "top_k: expected a whole number >= 1 or None, got 0"),
            ({"top_p": 0.0}, r"top_p: expected a number in \(0, 1\] or None, got 0.0"),
            ({"top_p": 1.5}, r"top_p: expected a number in \(0, 1\] or None, got 1.5"),
            ({"stop_token": 61}, "stop_token: expected a token id below 61 or None, got 61"),
            (
                {"allowed": torch.ones(60, dtype=torch.bool)},
                r"allowed: expected bool, shape \(61,\), .* got torch.bool",
            ),
            ({"allowed": torch.zeros(61, dtype=torch.bool)}, r"allowed: expected bool, shape \(61,\), true for one"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_a_bad_argument_is_named(self, arguments: dict, message: str) -> None:
        with pytest.raises(ValueError, match=f"^{message}"):
            generate(_model(), **({"tokens": _tokens(1, 4), "max_new_tokens": 3} | arguments))
