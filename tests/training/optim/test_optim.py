from __future__ import annotations

import copy
import doctest

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rooflight.kernels import reference
from rooflight.kernels.cost import muon_cost
from rooflight.model import ModelConfig, Transformer
from rooflight.model.layers import JoinedLinear, Linear
from rooflight.training.optim import AdamW, Muon, build_optimizers, clip_grad_norm, split_parameters
from rooflight.training.optim import muon as muon_module


def _problem(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Matrices wide, tall, square and repeated, a table and vectors: every path of the grouped updates."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 10), nn.Linear(10, 6), nn.Linear(6, 6), nn.Linear(6, 10))
    return model.to(dtype)


def _run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, skip: int | None = None) -> list[torch.Tensor]:
    """`steps` updates on fixed gradients that differ per step; parameter `skip` has none on even steps."""
    history = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) * 10.0 ** (i % 5 - 2)
            if i == skip and step % 2 == 0:
                p.grad = None
        optimizer.step()
        history.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return history


@pytest.mark.parametrize(
    ("dtype", "triton", "weight_decay", "skip"),  # a parameter that sits out counts fewer steps than its group
    [*((dtype, False, decay, skip) for dtype in (torch.float32, torch.float64) for decay in (0.0, 0.3)
       for skip in (None, 2)), (torch.float32, True, 0.3, 2)],
)  # fmt: skip
def test_adamw_is_torchs_step_for_step(dtype, triton, weight_decay, skip):
    ours, theirs = _problem(dtype=dtype), _problem(dtype=dtype)
    arguments = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    got = _run(ours, AdamW(ours.parameters(), **arguments, triton=triton), 12, skip)
    expected = _run(theirs, torch.optim.AdamW(theirs.parameters(), **arguments, foreach=False), 12, skip)
    # values of order 1; a step moves them by lr = 1e-2, so one lost digit in a moment would show
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_adamw_by_hand():
    """One parameter, two steps, by pencil: the first step is lr times the sign of the gradient."""
    w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = AdamW([w], lr=0.1, betas=(0.5, 0.5), eps=0.0, weight_decay=0.5)
    w.grad = torch.tensor([4.0], dtype=torch.float64)
    optimizer.step()
    assert w.item() == pytest.approx(0.95 - 0.1)
    w.grad = torch.tensor([0.0], dtype=torch.float64)
    optimizer.step()  # m = 1, v = 4, corrections 3/4
    assert w.item() == pytest.approx(0.85 * 0.95 - 0.1 * (1 / 0.75) / (4 / 0.75) ** 0.5)


def _muon_by_svd(steps: int, lr: float, momentum: float, weight_decay: float, nesterov: bool) -> list[torch.Tensor]:
    """Muon one matrix at a time in float64, its quintic iterated on the singular values themselves."""
    weights = [p.detach() for p in _problem(dtype=torch.float64).parameters() if p.ndim == 2]
    means = [torch.zeros_like(w) for w in weights]
    history = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for i, (w, m) in enumerate(zip(weights, means, strict=True)):
            gradient = torch.randn(w.shape, generator=generator).double() * 10.0 ** (i % 5 - 2)
            m.copy_(momentum * m + (1 - momentum) * gradient)
            u, s, vh = torch.linalg.svd(
                momentum * m + (1 - momentum) * gradient if nesterov else m, full_matrices=False
            )
            s = s / s.norm()
            for _ in range(5):
                s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
            w.mul_(1 - lr * weight_decay).sub_(lr * max(1, w.shape[0] / w.shape[1]) ** 0.5 * (u * s) @ vh)
        history.append(torch.cat([w.flatten() for w in weights]))
    return history


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_step_for_step(nesterov):
    """Batches of both orientations change nothing: float64 against one matrix at a time."""
    parameters = [p for p in _problem(dtype=torch.float64).parameters() if p.ndim == 2]
    arguments = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.2, "nesterov": nesterov}
    got = _run(nn.ParameterList(parameters), Muon(parameters, **arguments, dtype=torch.float64), 6)
    for a, b in zip(got, _muon_by_svd(6, **arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_muons_products_are_those_of_its_cost(dtype):
    shapes = [(8, 24), (24, 8), (8, 8), (24, 40), (8, 16)]
    matrices = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    with FlopCounterMode(display=False) as counter:
        Muon(matrices, dtype=getattr(torch, dtype)).step()
    assert counter.get_total_flops() == sum(muon_cost(*shape, dtype).flops for shape in shapes)


def test_muon_in_bfloat16_is_as_accurate_as_torchs():
    """torch.optim.Muon works in bfloat16 too; ours may be at most twice as far from the float64 result."""
    arguments = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.2, "nesterov": True}
    truth = _muon_by_svd(6, **arguments)[-1]
    errors = []
    for muon in (Muon, torch.optim.Muon):
        parameters = [p for p in _problem().parameters() if p.ndim == 2]
        errors.append((_run(nn.ParameterList(parameters), muon(parameters, **arguments), 6)[-1] - truth).norm())
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize(("optimizer", "triton"), [("adamw", False), ("adamw", True), ("muon", False)])
def test_state_dict_round_trip(optimizer, triton):
    """Three steps, through a state dict, three more: bitwise the same as six."""
    whole, first = _problem(), _problem()
    whole_optimizers = build_optimizers(whole, optimizer=optimizer, triton=triton)
    first_optimizers = build_optimizers(first, optimizer=optimizer, triton=triton)
    for step in range(6):
        for model, optimizers in ((whole, whole_optimizers), (first, first_optimizers)):
            for i, p in enumerate(model.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
            for o in optimizers:
                o.step()
        if step == 2:
            states = copy.deepcopy([o.state_dict() for o in first_optimizers])
            first_optimizers = build_optimizers(first, optimizer=optimizer, triton=triton)
            for o, state in zip(first_optimizers, states, strict=True):
                o.load_state_dict(state)
    for a, b in zip(whole.parameters(), first.parameters(), strict=True):
        assert torch.equal(a, b)


LOW = torch.bfloat16
CONFIG = ModelConfig(61, 16, 2, 4, n_kv_head=2, d_model=32, d_ff=48)


def _train(optimizer: str, steps: int, accumulate: int = 1, resume_at: int | None = None, **options) -> dict:
    """A tiny transformer in bf16 for some steps; its weights. resume_at: the step before which all but states go."""
    model, optimizers = None, []
    for step in range(steps):
        if model is None or step == resume_at:
            torch.manual_seed(0)
            saved = model and (model.state_dict(), [o.state_dict() for o in optimizers])
            model = Transformer(CONFIG, reference)
            optimizers = build_optimizers(model, optimizer=optimizer, lr=0.01, **options)
            if saved:
                model.load_state_dict(saved[0])
                for o, state in zip(optimizers, saved[1], strict=True):
                    o.load_state_dict(state)
        for i in range(accumulate):
            tokens = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(10 * step + i))
            with torch.autocast("cpu", LOW):
                loss = model(tokens, tokens)
            loss.backward()
        clip_grad_norm(model.parameters(), 0.1, optimizers)
        for o in optimizers:
            o.step()
            o.zero_grad()
    for layer in model.modules():
        if getattr(layer, "copy", None) is not None:
            written = layer.copy.tensor.clone()
            assert torch.equal(written, layer.weight.to(LOW))
            assert torch.equal(layer.copy.of(layer.weight), written)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("optimizer", "accumulate"), [("adamw", 1), ("adamw", 2), ("muon", 1)])
def test_copies_and_low_gradients_change_nothing_but_the_last_digits(optimizer, accumulate):
    """Forward, backward and gradients are the same bits; the norm that clips adds gradients up by their dtypes."""
    plain = _train(optimizer, 3, accumulate, triton=True)
    low = _train(optimizer, 3, accumulate, triton=True, copy_dtype=LOW, low_gradients=accumulate == 1)
    for name, weight in low.items():
        torch.testing.assert_close(weight, plain[name], rtol=0, atol=1e-6, msg=name)


def test_a_run_with_copies_resumes_exactly():
    options = {"triton": True, "copy_dtype": LOW, "low_gradients": True}
    whole, resumed = _train("adamw", 3, **options), _train("adamw", 3, resume_at=2, **options)
    assert all(torch.equal(whole[name], weight) for name, weight in resumed.items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_learning_rate_may_be_a_tensor(optimizer):
    plain, ours = (_problem() for _ in range(2))
    results = []
    for model, tensor in ((plain, False), (ours, True)):
        optimizers = build_optimizers(model, optimizer=optimizer, triton=True)
        groups = [group for o in optimizers for group in o.param_groups]
        rates = [torch.tensor(g["lr"]) for g in groups]
        if tensor:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
        for lr in (0.1, 0.02):
            for group, rate in zip(groups, rates, strict=True):
                rate.fill_(lr)  # as the schedule does, on the device
                group["lr"] = rate if tensor else lr
            for o in optimizers:
                results += _run(model, o, 1)
    half = len(results) // 2
    for a, b in zip(results[:half], results[half:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    state = optimizers[0].state_dict()  # plain numbers, and loading one writes into the tensor
    assert state["param_groups"][0]["lr"] == pytest.approx(0.02)
    state["param_groups"][0]["lr"] = 0.5
    optimizers[0].load_state_dict(state)
    assert optimizers[0].param_groups[0]["lr"] is rates[0]
    assert rates[0].item() == 0.5


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_matrices_joined_in_a_parameter_step_as_they_would_apart(optimizer):
    """Bit for bit, three steps; then each goes on from the other's state dict, as from a checkpoint of either model."""
    torch.manual_seed(0)
    sizes = {"q": 24, "k": 8, "v": 8}  # taller and wider than their 16 columns
    joined = nn.ModuleList([JoinedLinear(16, **sizes), Linear(16, 24), nn.LayerNorm(16)])
    apart = nn.ModuleList([*(Linear(16, rows) for rows in sizes.values()), Linear(16, 24), nn.LayerNorm(16)])

    def weights(model):  # in the order of both models' parameters
        return [part for p in model.parameters() for part in (p.split((24, 8, 8)) if len(p) == 40 else [p])]

    with torch.no_grad():
        for a, b in zip(weights(apart), weights(joined), strict=True):
            a.copy_(b)
    models = joined, apart

    def steps(optimizers, first):
        for step in range(first, first + 3):
            for model, some in zip(models, optimizers, strict=True):
                generator = torch.Generator().manual_seed(step)
                for p in model.parameters():
                    p.grad = torch.randn(p.shape, generator=generator)
                for o in some:
                    o.step()
            assert all(torch.equal(a, b) for a, b in zip(*map(weights, models), strict=True))

    first = [build_optimizers(model, optimizer=optimizer) for model in models]
    steps(first, 0)
    then = [build_optimizers(model, optimizer=optimizer) for model in models]
    for new, old in zip(then, reversed(first), strict=True):
        for n, o in zip(new, old, strict=True):
            n.load_state_dict(copy.deepcopy(o.state_dict()))
    steps(then, 3)

    with pytest.raises(ValueError, match=r"state_dict must hold groups of .*, got \[1\]"):
        then[0][0].load_state_dict({"state": {}, "param_groups": [{"params": [0]}]})
    with pytest.raises(ValueError, match=r"rows must add up to those of \(40, 16\), got \(24, 8\)"):
        AdamW([{"params": [joined[0].weight], "rows": [(24, 8)]}])


def test_parameters_are_split_by_role():
    model = nn.Module()
    model.embedding = nn.Embedding(11, 6)
    model.body = nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 6, bias=False))
    model.lm_head = nn.Linear(6, 11, bias=False)
    model.frozen = nn.Linear(2, 2).requires_grad_(False)
    hidden, tables, vectors = split_parameters(model)
    assert [id(p) for p in hidden] == [id(model.body[0].weight), id(model.body[2].weight)]
    assert [id(p) for p in tables] == [id(model.embedding.weight), id(model.lm_head.weight)]
    assert [p.ndim for p in vectors] == [1, 1, 1]

    model.lm_head.weight = model.embedding.weight  # tied: once
    assert [id(p) for p in split_parameters(model)[1]] == [id(model.embedding.weight)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_optimized_once_and_vectors_never_decay(optimizer):
    model = _problem()
    optimizers = build_optimizers(model, optimizer=optimizer, weight_decay=0.3)
    grouped = [(p, group) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(id(p) for p, _ in grouped) == sorted(id(p) for p in model.parameters())
    assert all(group["weight_decay"] == (0.3 if p.ndim == 2 else 0.0) for p, group in grouped)
    assert [type(o) for o in optimizers] == ([AdamW, Muon] if optimizer == "muon" else [AdamW])


@pytest.mark.parametrize("optimizer", [AdamW, Muon])
def test_closure_and_missing_gradients(optimizer):
    w, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    o = optimizer([w, unused], lr=0.1)

    def closure():
        o.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    assert o.step(closure).item() == 4.0
    assert w.sum() < 4.0
    assert torch.equal(unused, torch.ones(2, 2))
    assert optimizer([unused]).step() is None


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_is_torchs(max_norm):
    ours, theirs = _problem(), _problem()
    for model in (ours, theirs):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    norm = clip_grad_norm(ours.parameters(), max_norm)
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    torch.testing.assert_close(norm, expected)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_clipping_inside_the_optimizer_is_clipping_before_it():
    models, results = (_problem(), _problem()), []
    for model, inside in zip(models, (False, True), strict=True):
        optimizer = AdamW(model.parameters(), lr=0.01, triton=True)
        for step in range(2):
            for i, p in enumerate(model.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
            before = [p.grad.clone() for p in model.parameters()]
            clip_grad_norm(model.parameters(), 1.0, [optimizer] if inside else [])
            assert inside == all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))
            optimizer.step()
            assert optimizer.factor is None
        results.append([p.detach() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_clipping_edges():
    w = nn.Parameter(torch.ones(3))
    assert clip_grad_norm([w], 1.0).item() == 0.0  # no gradient at all
    w.grad = torch.tensor([1.0, float("inf"), 0.0])
    assert clip_grad_norm([w], 1.0).item() == float("inf")
    with pytest.raises(ValueError, match="max_norm must be positive, got 0"):
        clip_grad_norm([w], 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w: AdamW([w], lr=-1.0), "lr must be at least 0.0, got -1.0"),
        (lambda w: AdamW([w], betas=(0.9, 1.0)), r"betas\[1\] must be in \[0.0, 1.0\), got 1.0"),
        (lambda w: AdamW([w], eps=float("nan")), "eps must be at least 0.0, got nan"),
        (lambda w: AdamW([w], weight_decay=-0.1), "weight_decay must be at least 0.0, got -0.1"),
        (lambda w: AdamW([nn.Parameter(w.bfloat16())]), "float32 or float64, got torch.bfloat16"),
        (lambda w: Muon([w], momentum=1.0), r"momentum must be in \[0.0, 1.0\), got 1.0"),
        (lambda w: Muon([nn.Parameter(torch.ones(3))]), r"must be matrices, got shape \(3,\)"),
        (
            lambda w: build_optimizers(nn.Linear(2, 2), optimizer="sgd"),
            "optimizer must be one of muon, adamw, got 'sgd'",
        ),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make(nn.Parameter(torch.ones(2, 2)))


def test_matrices_are_divided_as_the_example_says():
    failed, tried = doctest.testmod(muon_module)
    assert (failed, tried) == (0, 1)
