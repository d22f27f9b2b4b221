"""Calls of the public functions and of what trains by them, on tensors that a stand-in for the driver launches.

For a process without the interpreter (launches.py): nothing of torch is imported before it is asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any

ADDRESSES: set[int] = set()  # that tensors have told; where they lie is up to this Python
ALIVE: deque[Any] = deque(maxlen=0)  # of them, where one's memory is not to become another's


@cache
def _tables() -> Any:
    from rooflight.kernels.adamw import AdamWTables

    return AdamWTables()


def passes(T: int) -> dict[str, Callable[[], None]]:
    """Every function of the room over T tokens, both passes; by name."""
    import torch

    from rooflight import kernels
    from rooflight.kernels.adamw import adamw_update
    from rooflight.kernels.attention import paths

    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype).requires_grad_()

    def both(*outputs: torch.Tensor) -> None:
        torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])

    ends = torch.tensor([0, T // 2, T], dtype=torch.int32)
    angles = torch.empty(3000, 32)
    labels = torch.zeros(T, dtype=torch.int64)
    x, weight = make(1, T, 256), make(256, dtype=torch.float32)
    dense = [make(1, T, heads, 64).transpose(1, 2) for heads in (4, 2, 2)]
    packed = [make(T, heads, 64) for heads in (4, 2, 2)]
    weights = [torch.zeros(T, 16), torch.zeros(16)]
    gradients = [torch.zeros_like(w, dtype=torch.bfloat16) for w in weights]
    means, squares = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    steps = [torch.ones(()) for _ in weights]
    rate = torch.ones(())
    head = make(128, 256)

    def attend(path: str) -> None:
        with paths.use(path):
            both(kernels.flash_attention(*dense))

    def attend_packed(path: str) -> None:
        with paths.use(path):
            both(kernels.flash_attention_varlen(*packed, ends, ends, T, T, window=9))

    def update() -> None:
        adamw_update(
            weights, gradients, means, squares, steps, [None, gradients[1]], _tables(),
            lr=rate, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
        )  # fmt: skip

    return {
        "attention, portable": lambda: attend("portable"),
        "attention, hopper": lambda: attend("hopper"),
        "packed attention, portable": lambda: attend_packed("portable"),
        "packed attention, hopper": lambda: attend_packed("hopper"),
        "rms_norm": lambda: both(kernels.rms_norm(x, weight)),
        "rms_norm of a sum": lambda: both(*kernels.rms_norm(x, weight, residual=x)),
        "swiglu": lambda: both(kernels.swiglu(x, x)),
        "swiglu of one": lambda: both(kernels.swiglu(x)),
        "gelu": lambda: both(kernels.gelu(x)),
        "rope": lambda: both(*kernels.rope(dense[0], dense[1], angles, angles)),
        "rope_qkv": lambda: both(*kernels.rope_qkv(x, angles, angles, 2, 1)),
        "cross_entropy": lambda: kernels.cross_entropy(x[0], labels).backward(),
        "linear_cross_entropy": lambda: kernels.linear_cross_entropy(x[0], head, labels).backward(),
        "fp8_linear": lambda: both(kernels.fp8_linear(make(-(-T // 16) * 16, 256), head)),
        "adamw": update,
    }


def random_call(rng: Any) -> Callable[[], None]:
    """One random call of a random public function, forward and backward."""
    import torch

    from rooflight import kernels
    from rooflight.kernels.attention import paths

    def tensor(*shape: int) -> torch.Tensor:
        dtype = rng.choice([torch.bfloat16, torch.float16])
        shift = rng.choice([0, 0, 1])
        flat = torch.zeros(torch.Size(shape).numel() + shift, dtype=dtype)
        return flat[shift:].view(shape).requires_grad_()

    def attention(path: str | None, head_dim: int, varlen: bool) -> None:
        dtype, shift = rng.choice([torch.bfloat16, torch.float16]), rng.choice([0, 0, 1]) if path is None else 0
        T, S, H, K = rng.choice([1, 5, 16, 128]), rng.choice([1, 16, 100]), 4, rng.choice([1, 2, 4])
        T = rng.choice([T, T, 2200]) if path == "hopper" else T  # more tiles than multiprocessors

        def make(heads: int, rows: int) -> torch.Tensor:
            shape = (rows, heads, head_dim) if varlen else (2, rows, heads, head_dim)
            flat = torch.zeros(torch.Size(shape).numel() + shift, dtype=dtype)
            x = flat[shift:].view(shape)
            return (x if varlen else x.transpose(1, 2)).requires_grad_()

        q, k, v = make(H, T), make(K, S), make(K, S)
        options = {"causal": rng.choice([True, False]), "window": rng.choice([None, 3])}
        if path is None:
            options |= {"softcap": rng.choice([0.0, 3.0]), "sinks": rng.choice([None, torch.zeros(H)])}
            options |= {"alibi_slopes": rng.choice([None, None, torch.zeros(H)])}
        with paths.use(path or "portable"):
            if varlen:
                ends = [torch.tensor([0, n], dtype=torch.int32) for n in (T, S)]
                out = kernels.flash_attention_varlen(q, k, v, *ends, T, S, **options)
            else:
                out = kernels.flash_attention(q, k, v, **options)
            out.backward(torch.zeros_like(out))

    def rms_norm() -> None:
        N = rng.choice([1, 8, 16, 100, 4096, 40000])
        x = tensor(rng.choice([1, 3, 16]), N)
        residual = rng.choice([None, torch.zeros_like(x).requires_grad_()])
        out = kernels.rms_norm(x, rng.choice([None, tensor(N)]), residual=residual)
        (out if residual is None else out[0]).sum().backward()

    def swiglu() -> None:
        gate, up = tensor(rng.choice([1, 5]), 2 * rng.choice([16, 33])).chunk(2, dim=1)
        kernels.swiglu(gate, up).sum().backward()

    def rope() -> None:
        q, k = tensor(1, 2, rng.choice([1, 16]), 16), None
        k = torch.zeros_like(q).requires_grad_()
        positions = rng.choice([None, torch.zeros(q.shape[2], dtype=torch.int64)])
        angles = torch.zeros(32, 8)
        sum(x.sum() for x in kernels.rope(q, k, angles, angles, positions=positions)).backward()

    def cross_entropy() -> None:
        x = tensor(rng.choice([1, 4]), rng.choice([16, 1000]))
        kernels.cross_entropy(x, torch.zeros(x.shape[0], dtype=torch.int64), z_loss=rng.choice([0.0, 1.0])).backward()

    choices: list[Callable[[], None]] = [rms_norm, swiglu, rope, cross_entropy]
    for varlen in (False, True):
        for path, head_dim in ((None, 40), (None, 64), ("hopper", 64), ("hopper", 128)):
            choices.append(lambda *args, given=(path, head_dim, varlen): attention(*given))
    return rng.choice(choices)


def told(x: Any, address: int) -> int:
    """address, which x has told."""
    ADDRESSES.add(address)
    ALIVE.append(x)
    return address


def comparable(stand_in: Any, call: tuple[Any, ...], places: dict[int, int] | None = None) -> Any:
    """A call of the C launcher as what it makes of it: constants stepped over, tensors as addresses.

    Addresses differ from run to run, since each allocates anew: they count by their value modulo 16, and by which one
    of those in `places` it is, the addresses that came before.
    """
    places = {} if places is None else places

    def plain(x: Any) -> Any:
        if hasattr(x, "data_ptr"):
            x = x.data_ptr()
        if isinstance(x, (tuple, list)):
            return [plain(part) for part in x]
        if type(x) is int and x > 0 and x in ADDRESSES:
            return ["address", x % 16, places.setdefault(x, len(places))]
        return repr(x)

    def taken(annotations: Any, args: Any) -> list[Any]:
        pairs = zip(annotations, args, strict=True)
        return [taken(a.nested_tuple, x) if a.type == 2 else plain(x) for a, x in pairs if a.type > 0]

    grid, stream, function, flags = call[:3], call[3], call[4], call[5:7]
    if len(call) == 16 and isinstance(call[14], bytes):  # from 3.7 on
        scratch, packed, signature = call[11:13], call[7], call[14]
        args = taken(call[13], call[15])
    else:
        scratch, packed, signature = call[7:9], call[9], b""
        args = plain(call[13 : len(call) - len(stand_in.kernels[function].src.fn.constexprs)])
    return [repr(part) for part in (grid, stream, function, flags, scratch, packed, signature)] + args


# ---------------------------------------------------------------- calls of a kind seen before


def a_known_call_that_fails(stand_in: Any) -> dict[str, Any]:
    """What attention launches when its hopper path, which served such calls before, fails; and what it warns of."""
    import warnings
    from unittest import mock

    import torch

    from rooflight.kernels import flash_attention
    from rooflight.kernels.attention import paths
    from rooflight.kernels.attention.hopper import blocks

    def launched() -> list[str]:
        x = torch.empty(1, 1, 512, 128, dtype=torch.bfloat16)
        inputs = [x.clone().requires_grad_() for _ in range(3)]
        kept.append(inputs)  # the next ones lie elsewhere
        stand_in.launched.clear()
        out = flash_attention(*inputs)
        torch.autograd.grad(out, inputs, torch.ones_like(out))
        return [stand_in.kernels[call[4]].name for call in stand_in.launched]

    kept: list[Any] = []
    paths.forget()
    found: dict[str, Any] = {"before": [launched() for _ in range(3)][-1]}
    with mock.patch.object(blocks, "_prototype", side_effect=RuntimeError("broken")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found["failing"] = launched()
        found["warned"] = [str(warning.message) for warning in caught]
        found["after"] = launched()
    paths.forget()
    return found | {"again": launched()}


def new_kinds(stand_in: Any) -> dict[str, Any]:
    """What a kind of call hangs on: not on where its first tensors lie; and what new ones leave behind."""
    import gc
    from unittest import mock

    import torch
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from rooflight.kernels import flash_attention, rms_norm
    from rooflight.kernels import known as known_calls
    from rooflight.kernels.attention import paths, prepared
    from rooflight.kernels.attention.hopper import blocks

    def attend(T: int, first: int = 0) -> list[str]:
        """A call of both passes on tensors that lie so many elements behind a multiple of 16 bytes."""
        inputs = [torch.empty(T * 128 + first, dtype=torch.bfloat16)[first:].view(1, 1, T, 128) for _ in range(3)]
        stand_in.launched.clear()
        out = flash_attention(*(x.requires_grad_() for x in inputs))
        known.append(type(out.grad_fn).__name__)
        gradient = torch.empty(T * 128 + first, dtype=torch.bfloat16)[first:].view(out.shape)
        with mock.patch.object(prepared, "call", side_effect=lambda *args: known.append("the long way") or call(*args)):
            torch.autograd.grad(out, inputs, gradient)
        return [stand_in.kernels[call[4]].name for call in stand_in.launched]

    known: list[str] = []
    call = prepared.call
    paths.forget()
    found: dict[str, Any] = {"unaligned": attend(1040, 1), "aligned": attend(1040), "known": known.copy()}

    def norm(rows: int) -> None:
        x = torch.empty(rows, 64, dtype=torch.bfloat16).requires_grad_()
        for _ in range(2):
            rms_norm(x, None).backward(torch.empty_like(x))

    norm(700)
    before = known_calls._code.cache_info().currsize
    for n in range(1, 20):
        norm(700 + n)
        attend(1040 + 16 * n)
    found["codes"] = known_calls._code.cache_info().currsize - before
    describers = []
    for T in range(200):
        of = blocks.boxes(64, False).describer(torch.empty(1, 1, 512 + T, 128, dtype=torch.bfloat16))
        describers.append(of)
        for address in range(0, 64 << 12, 1 << 12):
            of(address)
    return found | {"descriptors": sum(type(x) is TensorDescriptor for x in gc.get_objects())}
