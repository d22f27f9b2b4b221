"""The transformer against itself: other paths through the same mathematics, and the kernels against the oracles."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rooflight import kernels
from rooflight.kernels import reference
from rooflight.kernels.cross_entropy import count_targets
from rooflight.model import ModelConfig, Transformer
from rooflight.model.layers import Embedding, Linear
from rooflight.model.transformer import OPS

CONFIG = ModelConfig(61, 48, 2, 4, n_kv_head=2, d_model=32, d_ff=48)
# each path through the model once: both FFNs, tied, q/k norm with softcap, window, one key-value head
CONFIGS = {
    "swiglu": CONFIG,
    "gelu-tied": replace(CONFIG, ffn="gelu", tie_embeddings=True),
    "qk-norm-softcap": replace(CONFIG, qk_norm=True, softcap=3.0),
    "window-mqa": replace(CONFIG, window=5, n_kv_head=1, head_dim=12),
}


def _model(config: ModelConfig, ops=reference, **keywords) -> Transformer:
    torch.manual_seed(0)
    return Transformer(config, ops, **keywords)


def _tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(CONFIG.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def _gradients(model: Transformer, tokens: Tensor, targets: Tensor, **keywords) -> dict[str, Tensor]:
    model.zero_grad()
    model(tokens, targets, **keywords).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("op", OPS)
def test_kernels_and_oracles_share_signatures(op: str) -> None:
    ours, oracle = (inspect.signature(getattr(space, op)).parameters for space in (kernels, reference))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in oracle.values()
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_kernels_model_equals_the_oracle_model(name: str, device: torch.device) -> None:
    """Every op on real or interpreted kernels, in one model: fp32, at fp32's default tolerance."""
    config = replace(CONFIGS[name], n_layer=1)
    tokens, targets = _tokens(1, 19).to(device), _tokens(1, 19, seed=2).to(device)
    ours, oracle = _model(config, kernels).to(device), _model(config).to(device)
    torch.testing.assert_close(ours(tokens), oracle(tokens))
    torch.testing.assert_close(ours(tokens, targets), oracle(tokens, targets))
    expected = _gradients(oracle, tokens, targets)
    for name, gradient in _gradients(ours, tokens, targets).items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_learns_and_the_state_dict_is_what_it_says(name: str) -> None:
    model = _model(CONFIGS[name])
    gradients = _gradients(model, _tokens(2, 9), _tokens(2, 9, seed=2))
    for key, gradient in gradients.items():
        parts = getattr(model.get_submodule(key.removesuffix(".weight")), "rows", (len(gradient),))
        assert all(part.abs().sum() > 0 for part in gradient.split(parts)), key
    ffn = ["gate_proj", "up_proj", "down_proj"] if CONFIGS[name].ffn == "swiglu" else ["up_proj", "down_proj"]
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"] + (["q_norm", "k_norm"] if CONFIGS[name].qk_norm else [])
    names = ["attention_norm", *(f"attention.{p}" for p in attention), "ffn_norm", *(f"ffn.{p}" for p in ffn)]
    expected = {"embedding.weight", "norm.weight"} | {f"layers.{i}.{n}.weight" for i in (0, 1) for n in names}
    assert model.state_dict().keys() == expected | (set() if CONFIGS[name].tie_embeddings else {"lm_head.weight"})
    assert sum(x.numel() for x in model.state_dict().values()) == sum(x.numel() for x in gradients.values())


class TestJoinedMatrices:
    """q, k and v are one matrix, gate and up another; a state dict has each under its own name."""

    def test_a_state_dict_comes_back(self) -> None:
        model, other = _model(CONFIG), Transformer(CONFIG, reference)
        saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert saved["layers.1.attention.k_proj.weight"].shape == (16, 32)
        other.load_state_dict(saved)
        assert torch.equal(other(_tokens(1, 5)), model(_tokens(1, 5)))
        assert all(torch.equal(tensor, saved[name]) for name, tensor in other.state_dict().items())
        qkv = other.layers[1].attention.qkv_proj.weight
        assert torch.equal(qkv[32:48], saved["layers.1.attention.k_proj.weight"])
        with torch.device("meta"):
            empty = Transformer(CONFIG, reference)
        empty.load_state_dict(saved, assign=True)
        assert torch.equal(empty.layers[1].attention.qkv_proj.weight, qkv)

    def test_what_does_not_fit_is_named(self) -> None:
        model = _model(CONFIG)
        saved = dict(model.state_dict())
        key = "layers.0.attention.k_proj.weight"
        with pytest.raises(RuntimeError, match=rf"size mismatch for {key}: expected \(16, 32\), got \(32, 16\)"):
            model.load_state_dict(saved | {key: saved[key].T})
        del saved[key]
        with pytest.raises(RuntimeError, match=r"Missing.*qkv_proj.weight"):
            model.load_state_dict(saved)

    @pytest.mark.parametrize("name", CONFIGS)
    def test_each_matrix_starts_as_one_of_its_own_would(self, name: str) -> None:
        started = _model(CONFIGS[name]).state_dict()
        torch.manual_seed(0)
        for key, tensor in started.items():
            if tensor.dim() == 2 and "embedding" in key:
                Embedding(CONFIGS[name])
            elif tensor.dim() == 2:
                assert torch.equal(tensor, Linear(tensor.shape[1], tensor.shape[0]).weight), key


@pytest.mark.parametrize("name", CONFIGS)
def test_no_token_sees_a_later_one(name: str) -> None:
    model, tokens = _model(CONFIGS[name]).double(), _tokens(1, 20)
    changed = tokens.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % CONFIG.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_a_window_hides_what_lies_before_it() -> None:
    model, tokens = _model(replace(CONFIG, n_layer=1, window=5)).double(), _tokens(1, 20)
    changed = tokens.clone()
    changed[0, :10] = (changed[0, :10] + 1) % CONFIG.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, 15:], after[:, 15:], rtol=0, atol=1e-12)  # token 15 sees 10 .. 15
    assert not torch.allclose(before[:, 14], after[:, 14])


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_equal_documents_alone(name: str) -> None:
    model, tokens = _model(CONFIGS[name]).double(), _tokens(2, 24)
    bounds = [0, 1, 20, 41, 48]  # one document of a token, one across the two rows
    packed = model(tokens, cu_seqlens=torch.tensor(bounds, dtype=torch.int32)).flatten(0, 1)
    for start, end in pairwise(bounds):
        alone = model(tokens.flatten()[None, start:end])[0]
        torch.testing.assert_close(packed[start:end], alone, rtol=0, atol=1e-12)


def test_packed_documents_on_the_kernels_equal_the_oracles(device: torch.device) -> None:
    config = replace(CONFIG, n_layer=1, window=5)
    tokens, targets = _tokens(2, 10).to(device), _tokens(2, 10, seed=2).to(device)
    bounds = torch.tensor([0, 1, 8, 20], dtype=torch.int32, device=device)
    ours, oracle = (
        _gradients(_model(config, ops).to(device), tokens, targets, cu_seqlens=bounds) for ops in (kernels, reference)
    )
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, oracle[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("shape", [(2, 5), ()], ids=["a batch", "one token"])
def test_logits_of_a_cast_weight_are_those_of_the_plain_product(shape: tuple[int, ...]) -> None:
    """At a vocabulary that is no multiple of 64: of the copy's rows of zeros nothing shows, nor of their gradient."""
    model = Transformer(ModelConfig(61, 16, 1, 2, d_model=8), reference)
    x = torch.randn(*shape, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = model.output_weight
    ours, plain = model.logits(x), x @ weight.bfloat16().T
    assert (ours.shape, ours.dtype) == (plain.shape, plain.dtype) == ((*shape, 61), torch.bfloat16)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(*(torch.autograd.grad(y.float().square().sum(), (x, weight)) for y in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(model.logits(x.float()), x.float() @ weight.T)  # no cast, no copy


def test_the_loss_is_the_mean_cross_entropy_of_the_logits() -> None:
    model, tokens, targets = _model(CONFIG), _tokens(2, 9), _tokens(2, 9, seed=2)
    targets[0, :4] = -100
    expected = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(tokens, targets), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointing_changes_no_gradient(name: str) -> None:
    tokens, targets = _tokens(2, 9), _tokens(2, 9, seed=2)
    plain = _gradients(_model(CONFIGS[name]), tokens, targets)
    again = _gradients(_model(CONFIGS[name], checkpointing=True), tokens, targets)
    for key, gradient in plain.items():
        assert torch.equal(gradient, again[key]), key


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("default")  # torch's own
def test_one_graph_compiles_the_whole_model(checkpointing: bool) -> None:
    model = _model(replace(CONFIGS["qk-norm-softcap"], n_layer=1), checkpointing=checkpointing)
    tokens, targets = _tokens(2, 9), _tokens(2, 9, seed=2)
    expected = _gradients(model, tokens, targets)
    model.zero_grad()
    torch.compile(model, backend="aot_eager", fullgraph=True)(tokens, targets).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=lambda m, n=name: f"{n}: {m}")


class TestMixedPrecision:
    def test_the_stream_is_bf16_and_parameters_and_loss_are_fp32(self) -> None:
        model, tokens = _model(CONFIG), _tokens(2, 9)
        seen: dict[str, set[torch.dtype]] = {}
        for name, module in model.named_modules():
            if name.count(".") == 1:
                module.register_forward_hook(lambda m, i, out, name=name: seen.update({name: {x.dtype for x in out}}))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, tokens)
            logits = model(tokens)
        assert list(seen.values()) == [{torch.bfloat16}] * CONFIG.n_layer
        assert (loss.dtype, logits.dtype) == (torch.float32, torch.bfloat16)
        loss.backward()
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}

    @pytest.mark.parametrize("ops", [kernels, reference], ids=["kernels", "oracles"])
    def test_the_loss_is_near_fp32s(self, ops, device: torch.device) -> None:
        model, tokens = _model(replace(CONFIG, qk_norm=True), ops).to(device), _tokens(2, 19).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            low = model(tokens, tokens)
        low.backward()
        torch.testing.assert_close(low, model(tokens, tokens), rtol=2**-8, atol=0)  # one bf16 ulp
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_a_cast_of_the_model_leaves_the_rotation_tables_fp32(self, dtype: torch.dtype) -> None:
        model = _model(CONFIG)
        cos = model.cos.clone()
        assert model.to(dtype)(_tokens(1, 3)).dtype == dtype
        assert model.cos.dtype == torch.float32
        assert torch.equal(model.cos, cos)


class TestInitialisation:
    config = ModelConfig(3000, 8, 1, 4, n_kv_head=2, d_model=256, d_ff=512)

    def test_linears_are_normal_truncated_at_three_sigma(self) -> None:
        model = _model(self.config)
        matrices = {n: p for n, p in model.state_dict().items() if p.dim() == 2 and n != "embedding.weight"}
        assert len(matrices) == 8
        for name, p in matrices.items():
            std = math.sqrt(2 / sum(p.shape))
            assert p.abs().max() <= 3 * std
            assert p.abs().max() > 2.9 * std, name
            # truncation at 3 sigma leaves 0.9866 of the deviation; 30,000 samples know it to 0.5 %
            assert p.std().item() == pytest.approx(0.9866 * std, rel=0.02), name

    @pytest.mark.parametrize(("tied", "std"), [(False, 1.0), (True, 0.02)])
    def test_the_embedding_depends_on_tying(self, tied: bool, std: float) -> None:
        weight = _model(replace(self.config, tie_embeddings=tied)).embedding.weight
        assert weight.std().item() == pytest.approx(0.9866 * std, rel=0.01)
        assert weight.abs().max() <= 3 * std

    @pytest.mark.parametrize("tied", [False, True])
    def test_the_first_loss_is_near_that_of_a_uniform_guess(self, tied: bool) -> None:
        tokens = torch.arange(512).view(64, 8)
        loss = _model(replace(self.config, tie_embeddings=tied))(tokens, tokens + 1).item()
        assert loss == pytest.approx(math.log(self.config.vocab_size), abs=0.3)

    def test_meta_then_to_empty_then_reset_is_construction(self) -> None:
        expected = _model(CONFIG)
        with torch.device("meta"):
            model = Transformer(CONFIG)
        model.to_empty(device="cpu")
        torch.manual_seed(0)
        model.reset_parameters()
        assert torch.equal(model.cos, expected.cos)
        assert torch.equal(model.sin, expected.sin)
        for (name, p), (_, q) in zip(expected.named_parameters(), model.named_parameters(), strict=True):
            assert torch.equal(p, q), name


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_duplicate_computes_the_same(duplicate) -> None:
    model, tokens = _model(CONFIG), _tokens(1, 5)
    assert torch.equal(duplicate(model)(tokens), model(tokens))


class TestBadInput:
    def test_tokens(self) -> None:
        model = _model(CONFIG)
        with pytest.raises(ValueError, match=r"tokens: expected shape \(batch, tokens\), got \(5,\)"):
            model(_tokens(5))
        with pytest.raises(ValueError, match="tokens: expected at most context_length = 48 positions, got 49"):
            model(_tokens(1, 49))

    def test_targets(self) -> None:
        with pytest.raises(ValueError, match=r"targets: expected the shape of tokens \(2, 5\), got \(2, 4\)"):
            _model(CONFIG)(_tokens(2, 5), _tokens(2, 4))

    def test_cu_seqlens(self) -> None:
        model, tokens = _model(CONFIG), _tokens(2, 40)
        with pytest.raises(ValueError, match=r"cu_seqlens: expected .* int32, got torch.int64"):
            model(tokens, cu_seqlens=torch.tensor([0, 40, 80]))
        with pytest.raises(ValueError, match="cu_seqlens: expected documents of at most 48 tokens"):
            model(tokens, cu_seqlens=torch.tensor([0, 20, 80], dtype=torch.int32))


@pytest.mark.parametrize("shape", [(2, 0), (0, 4)], ids=str)
def test_an_empty_batch_gives_empty_logits_and_a_loss_of_zero(shape: tuple[int, ...], device: torch.device) -> None:
    model = _model(CONFIG, kernels).to(device)
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    assert model(tokens).shape == (*shape, model.config.vocab_size)
    loss = model(tokens, tokens)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad.eq(0).all() for p in model.parameters())


@pytest.mark.filterwarnings("default")  # torch's own
@pytest.mark.parametrize(("ops", "compiled"), [(kernels, False), (reference, True)], ids=["eager", "compiled"])
def test_each_tokens_own_loss(ops, compiled: bool, device: torch.device) -> None:
    """And gradients: each token has its own that arrives."""
    model = _model(replace(CONFIG, n_layer=1, n_head=2, n_kv_head=1, head_dim=16), ops).to(device)
    tokens, targets = _tokens(2, 3).to(device), _tokens(2, 3, seed=2).to(device)
    targets[0, 1] = -100
    upstream = torch.linspace(-1, 2, 6, device=device).view(2, 3)
    logits = model(tokens).float()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 3)
    gradients = torch.autograd.grad(expected, list(model.parameters()), upstream)
    forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    losses = forward(tokens, targets, reduction="none")
    torch.testing.assert_close(losses, expected)
    assert losses[0, 1] == 0
    for ours, theirs in zip(torch.autograd.grad(losses, list(model.parameters()), upstream), gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    if not compiled:
        torch.testing.assert_close(model(tokens, targets, reduction="sum"), expected.sum())


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
def test_micro_batches_of_unequal_counts_add_up_to_the_whole_batch(packed: bool, device: torch.device) -> None:
    """Their sums over the step's count of targets; one of them has none."""
    model = _model(replace(CONFIG, n_layer=1)).to(device)
    tokens, targets = _tokens(3, 6).to(device), _tokens(3, 6, seed=2).to(device)
    targets[0, 2:], targets[1] = -100, -100
    ends = [torch.tensor(e, dtype=torch.int32, device=device) for e in ([0, 4, 6], [0, 6], [0, 1, 6])]
    whole = torch.cat([e[(i > 0) :] + 6 * i for i, e in enumerate(ends)]).int()
    expected = _gradients(model, tokens, targets, cu_seqlens=whole if packed else None)
    mean = model(tokens, targets, cu_seqlens=whole if packed else None).detach()
    model.zero_grad()
    counted, total = count_targets(targets), 0.0
    for i in range(3):
        part = model(tokens[i : i + 1], targets[i : i + 1], cu_seqlens=ends[i] if packed else None, reduction="sum")
        (part / counted).backward()
        total += part.detach() / counted
    torch.testing.assert_close(total, mean)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=lambda m, n=name: f"{n}: {m}")


def test_padding_of_packed_documents_changes_nothing(device: torch.device) -> None:
    """Rows past the last document may be more than context_length."""
    model = _model(replace(CONFIG, n_layer=1, context_length=12), kernels).to(device)
    ends = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    tokens = _tokens(1, 9 + model.config.context_length + 3).to(device)
    targets = tokens.clone()
    targets[:, 9:] = -100
    padded = model(tokens, targets, cu_seqlens=ends)
    alone = model(tokens[:, :9], tokens[:, :9], cu_seqlens=ends)
    torch.testing.assert_close(padded, alone)
    padded.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
