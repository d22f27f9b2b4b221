"""The estimate against published figures, torch's FLOP counter, and a machine small enough for arithmetic by hand."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from rooflight.kernels import reference
from rooflight.kernels.cost import muon_cost
from rooflight.model import PRESETS, Ceilings, ModelConfig, Transformer, estimate
from rooflight.model.estimate import Estimate, largest_batch

XL = PRESETS["gpt2-xl"]
# every option that changes a product: grouped heads, a head size of its own, a window, q/k norm, no square FFN
ODD = ModelConfig(61, 64, 3, 6, n_kv_head=2, d_model=40, d_ff=56, head_dim=10, window=9, qk_norm=True)


def _one(config: ModelConfig, causal: str = "full") -> Estimate:
    return estimate(config, batch_size=1, causal=causal)


def _share(e: Estimate, name: str) -> float:
    return next(c for c in e.components if c.name == name).forward.flops / e.forward_flops


def _meta(config: ModelConfig, batch_size: int, **keywords) -> tuple[Transformer, torch.Tensor]:
    with torch.device("meta"):
        return Transformer(config, reference, **keywords), torch.zeros(batch_size, config.context_length).long()


def _counted(model: Transformer, tokens: torch.Tensor) -> tuple[int, int]:
    with FlopCounterMode(display=False) as forward:
        loss = model(tokens, tokens)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


class TestAgainstTorch:
    """Parameters and the products' FLOPs on tensors without storage: not one more or less."""

    @pytest.mark.parametrize("name", [*PRESETS, "odd"])
    def test_parameters_and_flops(self, name: str) -> None:
        config = PRESETS.get(name, ODD)
        model, tokens = _meta(config, 2)
        e = estimate(config, batch_size=2, causal="full")
        assert e.parameters == sum(p.numel() for p in model.parameters())
        assert (e.forward_flops, e.backward_flops) == _counted(model, tokens)

    def test_parameters_of_each_component(self) -> None:
        config = replace(ODD, tie_embeddings=False)
        model, _ = _meta(config, 1)
        kinds = {
            "embedding": "embedding", "_norm": "norms", "norm.weight": "norms", "o_proj": "output projection",
            "ffn.": "FFN", "qkv_proj": "QKV", "lm_head": "logits",
        }  # fmt: skip
        expected = dict.fromkeys(kinds.values(), 0)
        for name, p in model.named_parameters():
            expected[next(kind for part, kind in kinds.items() if part in name)] += p.numel()
        assert {c.name: c.parameters for c in _one(config).components if c.parameters} == expected

    @pytest.mark.parametrize("config", [PRESETS["tiny"], ODD], ids=["tiny", "odd"])
    def test_checkpointing_runs_what_the_estimate_says_once_more(self, config: ModelConfig) -> None:
        plain, checkpointed = (_counted(*_meta(config, 2, checkpointing=again)) for again in (False, True))
        again = sum(work.executed for work in _again(config) if not work.kernel.startswith("attention"))
        # the oracle's attention computes every pair
        attention = next(c for c in estimate(config, batch_size=2).components if c.name.startswith("scores"))
        assert checkpointed[0] == plain[0]
        assert checkpointed[1] - plain[1] == again + attention.forward.full_flops


def _again(config: ModelConfig) -> list:
    from rooflight.model.parts import parts

    once, twice = (
        parts(config, 2, config.context_length, "bfloat16", checkpointing=again, gpus=1) for again in (False, True)
    )
    extra = []
    for a, b in zip(once, twice, strict=True):
        if a.name in ("norms", "residual sums"):  # a block that runs again makes its last sum by itself
            continue
        assert a.forward == b.forward
        assert b.backward[len(b.backward) - len(a.backward) :] == a.backward
        extra += b.backward[: len(b.backward) - len(a.backward)]
    assert all(work.full == work.exact == 0 for work in extra)
    return extra


class TestPublishedFigures:
    """GPT-2's sizes by hand, as in the literature: forward of one sequence, every pair counted."""

    def test_gpt2_xl_by_the_textbook_formula(self) -> None:
        L, T, d, V = XL.n_layer, XL.context_length, XL.d_model, XL.vocab_size
        assert _one(XL).forward_flops == L * (24 * T * d**2 + 4 * T**2 * d) + 2 * T * d * V == 3_506_703_564_800
        assert _one(XL).backward_flops == 2 * _one(XL).forward_flops
        assert _one(XL).parameters == L * (12 * d**2 + 2 * d) + V * d + d == 1_555_126_400

    def test_the_original_gpt2_xl_has_positions_and_biases_more(self) -> None:
        L, T, d = XL.n_layer, XL.context_length, XL.d_model
        positions = T * d
        biases_of_products = L * (3 * d + d + 4 * d + d)  # QKV, output projection, FFN up, FFN down
        biases_of_layer_norms = L * 2 * d + d
        assert (positions, biases_of_products, biases_of_layer_norms) == (1_638_400, 691_200, 155_200)
        original = _one(XL).parameters + positions + biases_of_products + biases_of_layer_norms
        assert original == 1_557_611_200
        assert original - _one(XL).parameters == 2_484_800
        assert round(4 * original / 1e9, 2) == 6.23  # GB in fp32

    def test_swiglu_of_the_same_width_and_untied(self) -> None:
        e = _one(PRESETS["gpt2-xl-swiglu"])
        L, T, d, V = XL.n_layer, XL.context_length, XL.d_model, XL.vocab_size
        assert e.parameters == 2_127_057_600
        assert round(4 * e.parameters / 1e9, 2) == 8.51
        assert e.forward_flops == L * (32 * T * d**2 + 4 * T**2 * d) + 2 * T * d * V == 4_513_336_524_800
        assert round(e.forward_flops / _one(XL).forward_flops - 1, 3) == 0.287
        assert round(_share(e, "FFN"), 3) == 0.669

    @pytest.mark.parametrize(
        ("name", "ffn", "logits", "scores"),
        [("gpt2-small", 0.398, 0.271, 0.133), ("gpt2-xl", 0.574, 0.047, 0.092)],
    )
    def test_shares_from_small_to_xl(self, name: str, ffn: float, logits: float, scores: float) -> None:
        e = _one(PRESETS[name])
        shares = [round(_share(e, part), 3) for part in ("FFN", "logits", "scores and weighted sum")]
        assert shares == [ffn, logits, scores]

    def test_xl_at_16384_tokens(self) -> None:
        long = replace(XL, context_length=16384)
        full, exact = _one(long), _one(long, "exact")
        assert round(full.forward_flops / 1e12, 1) == 133.4
        assert round(full.forward_flops / _one(XL).forward_flops, 2) == 38.05
        assert round(_share(full, "scores and weighted sum"), 3) == 0.618
        assert round(exact.forward_flops / 1e12, 1) == 92.2
        assert round(_share(exact, "scores and weighted sum"), 3) == 0.447

    @pytest.mark.parametrize(("name", "excess"), [("gpt2-xl", 0.048), ("gpt2-small", 0.071)])
    def test_counting_every_pair_overstates_a_causal_model(self, name: str, excess: float) -> None:
        full, exact = (_one(PRESETS[name], causal).forward_flops for causal in ("full", "exact"))
        assert round(full / exact - 1, 3) == excess


class TestLedgers:
    def test_exact_counts_visible_pairs_and_executed_counts_tiles(self) -> None:
        config = ModelConfig(61, 300, 2, 4, d_model=64, window=99)
        T, ledgers = 300, estimate(config, batch_size=3).ledgers
        per_pair = 2 * 3 * 4 * 4 * 16  # layers, sequences, heads, 4 D
        visible = T * 100 - 100 * 99 // 2
        tiles = (1 + 2 + 2) * 128 * 128  # rows of tiles, each from the window's first tile to the diagonal's
        full, exact, executed = (ledgers[name]["forward"] for name in ("full", "exact", "executed"))
        assert full - exact == per_pair * (T * T - visible)
        assert ledgers["exact"]["backward"] == 2 * exact
        logits = 2 * 3 * 300 * 64 * 61
        early = 2 * logits  # the gradients of the logits' product, made in the forward
        assert executed - exact == per_pair * (tiles - visible) + early
        assert ledgers["executed"]["backward"] == 2 * (executed - early) + per_pair * tiles // 2 - early
        again = estimate(config, batch_size=3, dtype="float16").ledgers["executed"]  # where they are not kept
        assert again["forward"] == executed - early
        assert again["backward"] == 2 * again["forward"] + per_pair * tiles // 2 + logits

    def test_the_argument_chooses_the_totals(self) -> None:
        for causal in ("full", "exact"):
            e = _one(XL, causal)
            assert {"forward": e.forward_flops, "backward": e.backward_flops} == e.ledgers[causal]
            assert e.flops == sum(c.flops for c in e.components)

    def test_checkpointing_changes_executed_alone(self) -> None:
        plain, again = (estimate(XL, batch_size=2, checkpointing=c).ledgers for c in (False, True))
        assert plain["full"] == again["full"]
        assert plain["exact"] == again["exact"]
        assert plain["executed"]["forward"] == again["executed"]["forward"]
        assert plain["executed"]["backward"] < again["executed"]["backward"]


class TestTime:
    """A machine whose rates make every term a round number."""

    ceilings = Ceilings({"float32": 1e9, "bfloat16": 2e9}, 1e6)
    config = ModelConfig(64, 16, 1, 2, d_model=32, ffn="gelu", d_ff=128)

    def _component(self, name: str, ceilings: Ceilings, **keywords):
        e = estimate(self.config, batch_size=1, dtype="float32", ceilings=ceilings, **keywords)
        return next(c for c in e.components if c.name == name)

    def test_a_product_takes_the_longer_of_its_flops_and_its_bytes(self) -> None:
        flops, moved = 2 * 16 * 32 * 32, 4 * (16 * 32 + 32 * 32 + 16 * 32)
        slow_memory = self._component("output projection", self.ceilings)
        assert slow_memory.forward.seconds == pytest.approx(moved / 1e6)
        assert slow_memory.bound_by == "memory"
        fast_memory = self._component("output projection", replace(self.ceilings, copy_bandwidth=1e12))
        assert fast_memory.seconds == pytest.approx(3 * flops / 1e9)
        assert fast_memory.bound_by == "products"

    def test_attention_uses_its_own_rate_or_exponentials(self) -> None:
        pairs = 2 * 16 * 17 // 2
        fast = replace(self.ceilings, copy_bandwidth=1e15)
        rates = {"attention float32": {(16, 16): 1e6}, "attention backward float32": {(16, 16): 5e5}}
        measured = replace(fast, kernels=rates)
        attention = self._component("scores and weighted sum", measured)
        assert attention.forward.seconds == pytest.approx(4 * pairs * 16 / 1e6)
        assert attention.backward.seconds == pytest.approx(10 * pairs * 16 / 5e5)
        assert attention.bound_by == "products"
        slow_exp = self._component("scores and weighted sum", replace(fast, exp_rate=1e3))
        assert slow_exp.forward.seconds == pytest.approx(pairs / 1e3)
        assert slow_exp.bound_by == "exponentials"

    def test_adamw_is_28_bytes_for_a_parameter(self) -> None:
        e = estimate(self.config, batch_size=1, dtype="float32", ceilings=self.ceilings)
        assert e.components[-1].name == "AdamW"
        assert e.components[-1].seconds == pytest.approx(28 * e.parameters / 1e6)

    def test_a_gpus_optimizer_writes_what_would_be_cast(self) -> None:
        """28 bytes still: the matrices' gradients and copies have two each. Muon's gradients are cast."""
        plain, adamw, muon = (
            estimate(self.config, batch_size=1, ceilings=self.ceilings, ops=ops, optimizer=name)
            for ops, name in (("cpu", "adamw"), ("triton", "adamw"), ("triton", "muon"))
        )
        matrices = 4 * 32 * 32 + 2 * 32 * 128
        names = [[c.name for c in e.components if c.name == "casts"] for e in (plain, adamw, muon)]
        assert names == [["casts"], [], ["casts"]]
        assert adamw.components[-1].bytes == plain.components[-1].bytes == 28 * adamw.parameters
        assert adamw.memory.casts == plain.memory.casts == muon.memory.casts == 2 * matrices
        assert adamw.memory.gradients == plain.memory.gradients - 2 * matrices
        assert muon.memory.gradients == plain.memory.gradients
        casts = {e.optimizer: next(c for c in e.components if c.name == "casts") for e in (plain, muon)}
        assert casts["muon"].forward.bytes == 0
        assert casts["muon"].backward.bytes == casts["adamw"].backward.bytes == 6 * matrices
        again = estimate(self.config, batch_size=1, ceilings=self.ceilings, dtype="float32", optimizer="muon")
        assert muon.components[-1].bytes > 6 * matrices
        assert again.memory.casts == 0

    def test_muon_takes_the_blocks_matrices(self) -> None:
        plain, muon = (
            estimate(self.config, batch_size=1, dtype="float32", ceilings=self.ceilings, optimizer=name)
            for name in ("adamw", "muon")
        )
        with torch.device("meta"):
            matrices = Transformer(self.config, reference).layers.state_dict().values()
        hidden = [p for p in matrices if p.dim() == 2]  # q, k and v each by themselves
        assert plain.flops == muon.flops  # the optimizer's products are none of the model's
        assert [c.name for c in muon.components[-2:]] == ["AdamW", "Muon"]
        rest = muon.parameters - sum(p.numel() for p in hidden)
        assert muon.components[-2].bytes == 28 * rest
        products = sum(muon_cost(*p.shape, "float32").flops for p in hidden)
        assert muon.components[-1].update.executed_flops == products
        assert muon.components[-1].bound_by == "memory"  # at 1e6 bytes/s
        assert muon.memory.optimizer == 8 * rest + 4 * (muon.parameters - rest)

    def test_totals(self) -> None:
        e = estimate(self.config, batch_size=3, ceilings=self.ceilings)
        assert e.seconds == pytest.approx(sum(c.seconds or 0 for c in e.components))
        assert e.seconds is not None
        assert e.tokens_per_second == pytest.approx(3 * 16 / e.seconds)
        assert e.utilization is not None
        assert e.utilization["full"] == pytest.approx(sum(e.ledgers["full"].values()) / e.seconds / 2e9)
        assert estimate(self.config, batch_size=3).seconds is None

    def test_checkpointing_takes_longer(self) -> None:
        plain, again = (
            estimate(XL, batch_size=1, ceilings=self.ceilings, checkpointing=c).seconds for c in (False, True)
        )
        assert plain is not None
        assert again is not None
        assert plain < again < 1.4 * plain


class TestCeilings:
    def test_a_rate_is_log_linear_between_its_points_and_level_beyond(self) -> None:
        c = Ceilings({"float32": 1.0}, 1.0, kernels={"add": {(256,): 100.0, (4096,): 1600.0, (1024,): 400.0}})
        assert [c.rate("add", (n,)) for n in (1, 256, 1024, 4096, 10**6)] == [100, 100, 400, 1600, 1600]
        assert c.rate("add", (512,)) == pytest.approx(200)
        assert c.rate("gelu", (512,)) is None

    def test_a_rate_of_several_sizes_is_taken_one_after_another(self) -> None:
        points = {(n, k): float(n * k**2) for n in (4, 64) for k in (2, 32)}
        c = Ceilings({"float32": 1.0}, 1.0, kernels={"gemm": points})
        assert c.rate("gemm", (16, 8)) == pytest.approx(16 * 8**2)
        assert c.rate("gemm", (1, 8)) == pytest.approx(4 * 8**2)

    def test_json(self) -> None:
        kernels = {"attention float32": {(256, 64): 4.0, (512, 64): 5.0}}
        c = Ceilings({"float32": 1.0}, 2.0, 3.0, kernels, "CPU", "2026-01-01", {"torch": "2"}, 2**34)
        assert Ceilings.from_dict(json.loads(json.dumps(c.to_dict()))) == c

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"copy_bandwidth": 0}, "copy_bandwidth: expected a finite rate > 0, got 0"),
            ({"exp_rate": -1.0}, "exp_rate: expected a finite rate"),
            ({"gemm_flops": {"float32": float("nan")}}, r"gemm_flops\['float32'\]: expected a finite rate"),
            ({"kernels": {"gelu": {"64": None}}}, r"kernels\['gelu'\]\[\(64,\)\]: expected a finite rate"),
            ({"kernels": {"gelu": {"64": 1.0, "8x8": 1.0}}}, r"kernels\['gelu'\]: expected rates at sizes >= 1"),
            ({"peak": 1.0}, "ceilings: 'peak' is not one of gemm_flops, "),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_bad_fields_are_named(self, change: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Ceilings.from_dict({"gemm_flops": {"float32": 1.0}, "copy_bandwidth": 1.0} | change)
        with pytest.raises(ValueError, match="'copy_bandwidth' is missing"):
            Ceilings.from_dict({"gemm_flops": {}})


XL_PARAMETERS = 1_555_126_400


class TestOutput:
    ceilings = Ceilings({"bfloat16": 8e14}, 4e12, memory_bytes=141 * 10**9, device="a GPU")

    def _text(self, e: Estimate) -> str:
        console = Console(width=160, record=True, file=io.StringIO())
        console.print(e.table())
        return console.export_text()

    def test_the_table_has_every_component_and_the_totals(self) -> None:
        e = estimate(XL, batch_size=16, ceilings=self.ceilings)
        text = self._text(e)
        for component in e.components:
            assert component.name in text
        for figure in (
            "1,555,126,400",
            "MFU",
            "HFU",
            "tokens/s",
            "peak memory",
            "largest batch in the device's 141 GB",
        ):
            assert figure in text
        untimed = self._text(_one(XL))
        told = "no times: this machine's bfloat16 ceilings are not measured yet; `rooflight bench ceilings --dtype b"
        assert told in untimed
        assert ("time" in text.split("embedding")[0], "time" in untimed.split("embedding")[0]) == (True, False)

    def test_a_column_names_its_unit_and_holds_three_figures(self) -> None:
        table = _one(XL).table()
        columns = {str(c.header): list(c.cells) for c in table.columns}
        ffn = columns["component"].index("FFN")
        assert (columns["params, M"][ffn], columns["forward, GFLOP"][ffn]) == ("983", "2,013")
        assert columns["params, M"][columns["component"].index("norms")] == "0.155"
        assert columns["backward, GFLOP"][-1] == "7,013"  # forward's unit, whatever its own would be

    def test_json_holds_what_the_table_does(self) -> None:
        e = estimate(XL, batch_size=16, ceilings=self.ceilings)
        fields = json.loads(json.dumps(e.to_dict()))
        assert fields["parameters"] == XL_PARAMETERS
        assert fields["ledgers"] == e.ledgers
        assert ModelConfig.from_dict(fields["config"]) == XL
        assert Ceilings.from_dict(fields["ceilings"]) == self.ceilings
        assert [c["name"] for c in fields["components"]] == [c.name for c in e.components]
        assert sum(c["forward"]["flops"] for c in fields["components"]) == e.forward_flops
        moved = sum(c[key]["unfused_bytes"] for c in fields["components"] for key in ("forward", "backward", "update"))
        assert moved == sum(c.unfused_bytes for c in e.components) > sum(c.bytes for c in e.components)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_the_largest_batch_is_the_last_that_fits(self, checkpointing: bool) -> None:
        limit = 141 * 10**9
        n = largest_batch(XL, limit, checkpointing=checkpointing)
        sizes = [estimate(XL, batch_size=b, checkpointing=checkpointing).memory_bytes for b in (n, n + 1)]
        assert sizes[0] <= limit < sizes[1]
        assert largest_batch(PRESETS["llama-8b"], limit) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected a whole number >= 1, got 0"),
        ({"context_length": 1025}, "context_length: expected at most the model's 1024 positions, got 1025"),
        ({"context_length": 0}, "context_length: expected a whole number >= 1, got 0"),
        ({"gpus": 0}, "gpus: expected a whole number >= 1, got 0"),
        ({"optimizer": "sgd"}, "optimizer: expected one of adamw, muon, got 'sgd'"),
        ({"gpus": 8, "parallel": "dp"}, "parallel: expected one of ddp, fsdp, got 'dp'"),
        ({"link": 5e10}, r"link: expected bytes per second > 0, between 2 gpus or more, got 5e\+10 and gpus 1"),
        ({"gpus": 2, "link": 0.0}, "link: expected bytes per second > 0, between 2 gpus or more, got 0 and gpus 2"),
        ({"causal": "yes"}, "causal: expected 'exact' or 'full', got 'yes'"),
        ({"dtype": "int8"}, "dtype: expected a floating-point dtype such as 'bfloat16', got 'int8'"),
        ({"dtype": "float16", "ceilings": TestOutput.ceilings}, "ceilings: no GEMM rate for dtype 'float16'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_argument_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        estimate(XL, **({"batch_size": 1} | arguments))
