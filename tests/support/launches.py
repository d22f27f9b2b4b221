"""What test_launching.py looks into, run in one process without the interpreter: each case returns what JSON can hold.

Triton's driver is a stand-in (bench/measure/host.py) whose launcher is Triton's own, down to the call into C.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from typing import Any

import calls
from calls import a_known_call_that_fails, comparable, new_kinds, passes, random_call, told

CASES: dict[str, Callable[[Any], Any]] = {}


def apart(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Run by the process without the interpreter; what it returns must survive JSON."""
    CASES[function.__name__] = function
    return function


# ---------------------------------------------------------------- variants


@apart
def variants(stand_in: Any) -> dict[str, dict[str, int]]:
    """How many variants of each kernel a generation of 300 tokens compiles, and each function over 50 lengths. What the
    calls before it compiled counts there.
    """
    import random

    import torch

    from rooflight.model import ModelConfig, Transformer, generate

    known = dict(stand_in.kernels)

    def compiled() -> dict[str, int]:
        new = {function: kernel for function, kernel in stand_in.kernels.items() if function not in known}
        known.update(new)
        return dict(Counter(kernel.name for kernel in new.values()))

    config = ModelConfig(vocab_size=64, context_length=512, n_layer=1, n_head=4, n_kv_head=2, d_model=64)
    model = Transformer(config).to(torch.bfloat16).eval()
    compiled()
    with torch.no_grad():
        generate(model, torch.zeros(1, 7, dtype=torch.int64), 300, temperature=0.0)
    found = {"generation": compiled()}
    lengths = random.Random(0).sample(range(2, 3000), 50)
    for name in passes(2):
        for T in lengths:
            passes(T)[name]()
        found[name] = compiled()
    return found


# ---------------------------------------------------------------- the key


@apart
def random_arguments(stand_in: Any) -> list[int]:
    """Launch a kernel of every kind of argument; variants by our key, by Triton's, and keys of ours with two of its."""
    import random

    import torch
    from triton.runtime.jit import compute_cache_key

    from rooflight.kernels.launching import variant

    rng = random.Random(0)
    memory = torch.zeros(64, dtype=torch.float32)
    pointers = [None, *(memory[i:].view(dtype) for i in (0, 1, 4) for dtype in (torch.float32, torch.int32))]
    pointers.append(torch.nn.Parameter(memory[4:]))
    integers = [0, 1, 2, 16, 17, 2**31 - 1, 2**31, 2**31 + 16, 2**63, -16, -1, True, False]
    floats = [0.0, -0.0, 1.0, 0.5, 1, 0, True]
    tuples = [(1, 16), (1, 17), (True, 16), (1, 16, None), (memory, 1), (memory[1:], 1), ((1, 2), 3), (1.0, 16)]
    tuples += [Pair(memory, 1), Pair(memory[4:], 2), Pair(1, 16)]
    constants = [1, True, 1.0, 16, "a"]
    ours: dict[Any, set[Any]] = defaultdict(set)
    *_, binder = _every_kind.device_caches[0]

    def pick(pool: list[Any]) -> Any:
        return pool[1] if rng.random() < 0.7 else rng.choice(pool)  # most calls differ in an argument or two

    for _ in range(20000):
        args = tuple(pick(pool) for pool in (pointers, integers, integers, floats, tuples))
        options = {"FIRST": pick(constants), "SECOND": pick(constants), "num_warps": pick([4, 8])}
        known = variant(_every_kind, args, options)
        assert known is not None
        _, specialization, left = binder(*args, **options)
        # Triton's table of its own keys takes True for 1; what it compiles for does not
        ours[known[0]].add(repr(specialization) + compute_cache_key({}, specialization, left))
    return [len(ours), len(set.union(*ours.values())), sum(len(found) > 1 for found in ours.values())]


# ---------------------------------------------------------------- the arguments


@apart
def what_reaches_the_driver(stand_in: Any) -> dict[str, Any]:
    """Random calls, through Triton and through handles: how many launches, and the first that differs."""
    import random

    from rooflight.kernels import launching

    n_handled, n_launched, names = 0, 0, Counter()
    handle = launching._handle

    def counting(compiled: Any, n_constant: int) -> Any:
        made = handle(compiled, n_constant)
        assert made is not None
        name, start = compiled.name, made.start

        def counted(*args: Any) -> None:
            nonlocal n_handled
            n_handled += 1
            names[name] += 1
            start(*args)

        made.start = counted
        return made

    launching._handle = counting
    calls.ALIVE = deque()
    try:
        for seed in range(300):
            traces = []
            for direct in (False, True, True, True):  # the last by what was written down in the one before
                stand_in.launched.clear()
                with launching.direct(direct):
                    random_call(random.Random(seed))()
                places: dict[int, int] = {}
                traces.append([comparable(stand_in, call, places) for call in stand_in.launched])
                calls.ALIVE.clear()
            n_launched += len(traces[0])
            for trace in traces[1:]:
                for ours, theirs in zip(trace, traces[0], strict=True):
                    if ours != theirs:
                        return {"seed": seed, "ours": str(ours), "theirs": str(theirs)}
    finally:
        launching._handle = handle
        calls.ALIVE = deque(maxlen=0)
    return {"handled": n_handled, "launched": n_launched, "kernels": sorted(names)}


apart(a_known_call_that_fails)
apart(new_kinds)


# ---------------------------------------------------------------- Triton's own way


@apart
def who_is_told(stand_in: Any) -> dict[str, Any]:
    """Whether Triton launches under each circumstance in which it does more than hand the arguments over."""
    import torch
    from triton import knobs
    from triton.runtime.jit import JITFunction

    from rooflight.kernels import launching

    x = torch.zeros(16)
    by_triton = 0
    run = JITFunction.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal by_triton
        by_triton += 1
        return run(self, *args, **kwargs)

    def launched() -> bool:
        before, n = by_triton, len(stand_in.launched)
        launching.launch(_every_kind, (1,), x, 3, 4, 0.5, (1, 2), FIRST=1, SECOND=2)
        assert len(stand_in.launched) == n + 1
        return by_triton > before

    JITFunction.run = counted
    told: list[Any] = []
    found = {}
    try:
        found["first"], found["again"] = launched(), launched()
        for name in ("launch_enter_hook", "launch_exit_hook"):
            hook = lambda metadata, name=name: told.append(name)  # noqa: E731
            chain = getattr(knobs.runtime, name)
            if hasattr(chain, "add"):
                chain.add(hook)
                found[name] = launched()
                chain.remove(hook)
            with knobs.runtime.scope():
                setattr(knobs.runtime, name, hook)
                found[f"{name}, replaced"] = launched()
        _every_kind.add_pre_run_hook(lambda *args, **kwargs: None)
        found["pre_run_hook"] = launched()
        _every_kind.pre_run_hooks.clear()
        with launching.direct(False):
            found["direct(False)"] = launched()
        with knobs.runtime.scope():
            knobs.runtime.debug = True
            found["debug, first"], found["debug, again"] = launched(), launched()
        with knobs.compilation.scope():
            knobs.compilation.instrumentation_mode = "fpsan"
            found["instrumented, first"] = launched()
        stand_in.device = 1
        found["another device, first"], found["another device, again"] = launched(), launched()
        stand_in.device = 0
        found["at last"] = launched()
    finally:
        JITFunction.run = run
    return found


# ---------------------------------------------------------------- what a graph's capture allows


@apart
def a_known_launch(stand_in: Any) -> dict[str, Any]:
    """What a launch that was seen before asks of torch and of the driver."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from rooflight.kernels import launching

    ops: list[str] = []
    asked: set[str] = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ops.append(str(func))
            return func(*args, **(kwargs or {}))

    class Asked:
        def __getattr__(self, name: str) -> Any:
            asked.add(name)
            return getattr(stand_in, name)

    x, y = torch.zeros(17)[1:], torch.zeros(16)  # told apart by their addresses modulo 16
    plan = launching.Plan(
        _every_kind, (1,), (launching.TENSOR, 2), 3, 4, 0.5, launching.TENSOR, FIRST=1, SECOND=2
    )  # fmt: skip
    for _ in range(2):
        launching.launch(_every_kind, (1,), (x, 2), 3, 4, 0.5, y, FIRST=1, SECOND=2)
        plan(x, y)
    stand_in.launched.clear()
    import triton

    triton.runtime.driver.set_active(Asked())
    with Seen():
        launching.launch(_every_kind, (1,), (x, 2), 3, 4, 0.5, y, FIRST=1, SECOND=2)
        plan(x, y)
    triton.runtime.driver.set_active(stand_in)
    first, second = (comparable(stand_in, call) for call in stand_in.launched)
    return {"ops": ops, "asked": sorted(asked), "alike": first == second}


@apart
def subclasses(stand_in: Any) -> list[bool]:
    """Whether a plan and a launch take a subclass of Tensor as they take the tensor itself."""
    import torch

    from rooflight.kernels import launching

    x, alike = torch.zeros(16), []
    plan = launching.Plan(_every_kind, (1,), launching.TENSOR, 3, 4, 0.5, (1, 2), FIRST=1, SECOND=2)
    for call in (plan, lambda x: launching.launch(_every_kind, (1,), x, 3, 4, 0.5, (1, 2), FIRST=1, SECOND=2)):
        for y in (x, x, x.as_subclass(torch.nn.parameter.Buffer)):
            call(y)
        *_, one, other = (comparable(stand_in, launched) for launched in stand_in.launched)
        alike.append(one == other)
    return alike


@apart
def what_a_capture_sees(stand_in: Any) -> dict[str, dict[str, Any]]:
    """By function, of a call of both passes that was made before: its operators, its launches, and what it asks of the
    driver.
    """
    import triton
    from torch.utils._python_dispatch import TorchDispatchMode

    from rooflight.kernels import dispatch

    ops: set[str] = set()
    asked: set[str] = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ops.add(func._schema.name)
            if func not in dispatch._launchers:
                return func(*args, **(kwargs or {}))
            with self:  # what it calls in turn
                return dispatch._launchers[func](*args)

    class Asked:
        def __getattr__(self, name: str) -> Any:
            asked.add(name)
            return getattr(stand_in, name)

    found = {}
    for name, call in passes(200).items():
        for _ in range(2):
            call()
        ops.clear()
        asked.clear()
        n = len(stand_in.launched)
        triton.runtime.driver.set_active(Asked())
        with Seen():
            call()
        triton.runtime.driver.set_active(stand_in)
        found[name] = {"ops": sorted(ops), "asked": sorted(asked), "launches": len(stand_in.launched) - n}
    return found


@apart
def descriptors(stand_in: Any) -> dict[str, bool]:
    """Descriptors are kept by address, sizes and strides, and hold no memory."""
    import gc
    import weakref

    import torch

    from rooflight.kernels.attention.hopper import blocks

    x = torch.zeros(2, 4, 32, 128, dtype=torch.bfloat16)
    one = blocks.boxes(64, False).describe(x)
    found = {
        "the same": blocks.boxes(64, False).describe(x.view(x.shape)) is one,
        "other rows": blocks.boxes(128, False).describe(x) is not one,
        "other strides": blocks.boxes(64, False).describe(x.transpose(1, 2)) is not one,
        "other address": blocks.boxes(64, False).describe(x[1:]) is not one,
        "other type": blocks.boxes(64, False).describe(x.view(torch.float16)) is not one,
        "encodes the address": one.base.data_ptr() == x.data_ptr(),
    }
    alive = weakref.ref(x)
    del x
    gc.collect()
    return found | {"holds no memory": alive() is None}


def main() -> None:
    import torch

    from rooflight.bench.measure.host import standing_in

    data_ptr = torch.Tensor.data_ptr
    torch.Tensor.data_ptr = lambda x: told(x, data_ptr(x))  # type: ignore[method-assign]
    with standing_in() as stand_in:
        print(json.dumps({name: case(stand_in) for name, case in CASES.items()}))


if __name__ == "__main__":
    import typing

    import triton
    import triton.language as tl

    class Pair(typing.NamedTuple):
        first: Any
        second: Any

    @triton.jit(do_not_specialize=["m"])
    def _every_kind(x_ptr, n, m, scale, parts, FIRST: tl.constexpr, SECOND: tl.constexpr):
        pass

    main()
