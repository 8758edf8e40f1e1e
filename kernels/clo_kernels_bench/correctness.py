"""Every operation against its reference: the kernel on the device, the reference on a copy of the inputs on the CPU.

Everything that either wrote is compared, also what should not have changed. No figure is printed for what fails here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from clo_kernels import reference
from clo_kernels.append_kv import append_kv
from clo_kernels.gather_pages import gather_pages
from clo_kernels.hit_test import hit_test
from clo_kernels.layout import Resolved
from clo_kernels.page_index import IndexKind, entry_shape, hash_planes, page_index
from clo_kernels.resolve_pages import resolve_pages
from clo_kernels.ring_doorbell import ring_doorbell
from clo_kernels.rotate import rotate
from clo_kernels.score_pages import score_pages
from clo_kernels.select_pages import select_pages
from clo_kernels.sparse_decode_attention import sparse_decode_attention
from clo_kernels.wait_ready import wait_ready
from clo_kernels_bench import problems
from clo_kernels_bench.figures import Verdict
from clo_kernels_bench.problems import Sizes

Arguments = Mapping[str, Any]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Absolute and relative."""
NORM_TOLERANCE = {torch.float32: 1e-2, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Of the whole tensor's difference to its norm: an average over thousands of tokens is less than TOLERANCE itself."""


def verdicts(device: torch.device) -> Iterator[Verdict]:
    """One for each operation and dtype."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        sizes = Sizes(device=device, batch=2, kv_heads=2, head_dim=64, num_pages=64, budget=12, slots=20, dtype=dtype)
        label = str(dtype).removeprefix("torch.")
        for name, (operation, arguments) in cases(sizes).items():
            yield verdict(name, label, operation, arguments)
        for name, variant, operation, arguments in variants(sizes):
            yield verdict(name, f"{label}, {variant}", operation, arguments)
        shared = dataclasses.replace(sizes, group=37, head_dim=112, value_dim=96)
        yield from verdicts_of_shared_vectors(shared, f"{label}, shared vectors")
    if device.type == "cuda":
        for name, (operation, arguments) in cases(timed_sizes(device)).items():
            yield verdict(name, "bfloat16, as timed", operation, arguments)
        yield from verdicts_of_shared_vectors(wide_sizes(device), "bfloat16, shared vectors as timed")


def timed_sizes(device: torch.device) -> Sizes:
    """A layer as it is timed: the same machine code, and threads that share as much. But of fewer pages on the host."""
    return Sizes(device=device, num_pages=1664)


def wide_sizes(device: torch.device) -> Sizes:
    """Two sequences' layers of DeepSeek-V3."""
    return Sizes(
        device=device, kv_heads=2, group=128, head_dim=576, value_dim=512, num_pages=1664, budget=400, slots=500
    )


def verdicts_of_shared_vectors(sizes: Sizes, label: str) -> Iterator[Verdict]:
    """The operations that read or write vectors, plain and coded."""
    given = cases(sizes)
    for name in ("hit_test", "score_pages", "gather_pages", "sparse_decode_attention", "append_kv", "rotate"):
        yield verdict(name, label, *given[name])
    for name, variant, operation, arguments in variants(sizes):
        if name != "resolve_pages":
            yield verdict(name, f"{label}, {variant}", operation, arguments)


def verdict(name: str, case: str, operation: Callable[..., Any], arguments: Arguments) -> Verdict:
    """Run both and compare all of their tensors."""
    mirror = {key: on_cpu(value) for key, value in arguments.items()}
    try:
        operation(**arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # some outputs are in host memory
        getattr(reference, name)(**mirror)
        for path, found, wanted in pairs(arguments, mirror):
            _compare(path, found.cpu(), wanted)
    except Exception as error:  # whatever the compiler, the driver or the comparison raises: the others go on
        return Verdict(name, case, False, " ".join(str(error).split())[:300])
    return Verdict(name, case, True)


def _compare(path: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    if torch.equal(found, wanted):
        return
    assert wanted.is_floating_point(), f"{path} differs"
    tolerance = TOLERANCE[wanted.dtype]
    torch.testing.assert_close(
        found, wanted, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m: f"{path}: {m}"
    )
    error, norm = ((x.nan_to_num(0, 0, 0)).norm().item() for x in (found.float() - wanted.float(), wanted.float()))
    most = NORM_TOLERANCE[wanted.dtype] * norm
    assert error <= most, f"{path}: the difference has a norm of {error:.3g}, expected at most {most:.3g}"


def on_cpu(value: Any) -> Any:
    """A copy with all tensors on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.cpu().clone()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: on_cpu(getattr(value, f.name)) for f in dataclasses.fields(value)})
    return value


def pairs(first: Arguments, second: Arguments, path: str = "") -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Tensors of two argument sets, by name."""
    for key, value in first.items():
        other, name = second[key], f"{path}{key}"
        if isinstance(value, torch.Tensor):
            yield name, value, other
        elif dataclasses.is_dataclass(value):
            fields = [f.name for f in dataclasses.fields(value)]
            inside = ({n: getattr(record, n) for n in fields} for record in (value, other))
            yield from pairs(next(inside), next(inside), f"{name}.")


def cases(sizes: Sizes) -> dict[str, tuple[Callable[..., Any], Arguments]]:
    """Operation and arguments by name; outputs are poisoned."""
    first, second = problems.selections(sizes, 2)
    table, pages = problems.page_table(sizes), problems.host_pages(sizes)
    missed = problems.everyone(sizes)
    # the second selection then finds part of itself
    reference.resolve_pages(first, missed, table, out=Resolved.like(first))
    missed[0, 1] = False
    query, kv = problems.random_query(sizes), problems.device_kv(sizes)
    nan = {"fill_value": float("nan"), "device": sizes.device}
    index = torch.randn((*sizes.rows, sizes.num_pages, 2, sizes.head_dim), device=sizes.device).to(sizes.dtype)
    scores = torch.randn((*sizes.rows, sizes.num_pages), device=sizes.device)
    value = torch.randn((*sizes.rows, sizes.head_dim), device=sizes.device).to(sizes.dtype)
    return {
        "hit_test": (hit_test, _hit_test_arguments(sizes)),
        "score_pages": (
            score_pages,
            {
                "query": query,
                "index": index.sort(3).values,
                "num_candidates": problems.candidates(sizes),
                "missed": missed,
                "scale": sizes.head_dim**-0.5,
                "out": torch.full(scores.shape, **nan),
            },
        ),
        "select_pages": (
            select_pages,
            {
                "scores": scores,
                "num_candidates": problems.candidates(sizes),
                "missed": missed,
                "selection": problems.empty_selection(sizes),
            },
        ),
        "resolve_pages": (
            resolve_pages,
            {"selection": second, "missed": missed, "table": table, "out": _poisoned(second)},
        ),
        "gather_pages": (
            gather_pages,
            {"host_pages": pages, "slots": kv.slots.clone(), "fetch": problems.fetch_list(sizes, 9)},
        ),
        "sparse_decode_attention": (
            sparse_decode_attention,
            {
                "query": query,
                "kv": kv,
                "selected": problems.random_slots(sizes),
                "lengths": problems.lengths(sizes) - 3,
                "scale": sizes.head_dim**-0.5,
                "out": problems.no_attention(sizes),
            },
        ),
        "append_kv": (
            append_kv,
            {
                "key": torch.randn((*sizes.rows, sizes.head_dim), device=sizes.device).to(sizes.dtype),
                "value": value if sizes.value_dim is None else None,
                # a page leaves the window with this token
                "lengths": problems.lengths(sizes) - sizes.page_size,
                "kv": problems.device_kv(sizes),
                "host_pages": problems.host_pages(sizes),
                "index": torch.full(index.shape, dtype=sizes.dtype, **nan),
            },
        ),
        "rotate": (rotate, _rotation_arguments(sizes)),
        "ring_doorbell": (ring_doorbell, _doorbell_arguments(sizes.device)),
        "wait_ready": (wait_ready, _waiting_arguments(sizes.device)),
    }


def variants(sizes: Sizes) -> Iterator[tuple[str, str, Callable[..., Any], Arguments]]:
    """Operation, variant, and the call: indexes of single tokens, whole-set replacement, coded pages."""
    given = cases(sizes)
    keys = torch.randn((*sizes.rows, sizes.num_pages, sizes.page_size, sizes.head_dim))
    for kind in (IndexKind.KEY_4BIT, IndexKind.SIGN_HASH):
        planes = hash_planes(sizes.head_dim) if kind is IndexKind.SIGN_HASH else None
        index = page_index(keys, kind, planes).to(sizes.device)
        known = {"index": index, "planes": None if planes is None else planes.to(sizes.device)}
        yield "score_pages", str(kind), score_pages, {**given["score_pages"][1], **known}
    # a sign hash is left out: the side of a key that lies in a plane is a matter of rounding
    entry = entry_shape(IndexKind.KEY_4BIT, sizes.page_size, sizes.head_dim)
    index = torch.full((*sizes.rows, sizes.num_pages, *entry), -7, dtype=torch.int32, device=sizes.device)
    yield "append_kv", str(IndexKind.KEY_4BIT), append_kv, {**given["append_kv"][1], "index": index}
    yield "resolve_pages", "replace", resolve_pages, {**given["resolve_pages"][1], "replace": True}
    coded = dataclasses.replace(sizes, coded=True)
    for operation in (append_kv, sparse_decode_attention):
        known = {"kv": problems.device_kv(coded)}
        if operation is append_kv:
            known["host_pages"] = problems.host_pages(coded)
        yield operation.__name__, "coded", operation, {**given[operation.__name__][1], **known}


def _hit_test_arguments(sizes: Sizes) -> Arguments:
    """Half of the heads drift far, half do not move: no rounding decides."""
    anchor = problems.random_query(sizes)
    query = anchor.clone()
    query[:, ::2] = -query[:, ::2]
    out = torch.zeros(sizes.rows, dtype=torch.bool, device=sizes.device)
    tau = torch.tensor([0.2, -0.2], device=sizes.device).repeat(sizes.kv_heads // 2)
    return {"query": query, "anchor": anchor, "tau": tau, "out": out}


def _rotation_arguments(sizes: Sizes) -> Arguments:
    """All values, in halves; of a vector that is key and value in one its last values, in pairs."""
    query, key = problems.random_query(sizes), torch.randn((*sizes.rows, sizes.head_dim), device=sizes.device)
    key, rotated = key.to(sizes.dtype), sizes.head_dim - (sizes.value_dim or 0)
    angles = torch.rand(sizes.batch, rotated, device=sizes.device) * torch.pi
    return {
        "query": query,
        "key": key,
        "cosines": angles.cos().to(sizes.dtype),
        "sines": angles.sin().to(sizes.dtype),
        "first": sizes.head_dim - rotated,
        "paired": sizes.value_dim is not None,
        "out_query": torch.full_like(query, float("nan")),
        "out_key": torch.full_like(key, float("nan")),
    }


def _poisoned(selection: torch.Tensor) -> Resolved:
    out = Resolved.like(selection)
    for field in dataclasses.fields(out):
        getattr(out, field.name).fill_(-12345)
    return out


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """In memory that the device can read."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _doorbell_arguments(device: torch.device) -> Arguments:
    return {
        "sequence": torch.full((1,), 41, device=device),
        "message": torch.randint(-(2**31), 2**31 - 1, (1500,), device=device).to(torch.int32),
        "mailbox": pinned(torch.full((1500,), -1, dtype=torch.int32), device),
        "doorbell": pinned(torch.zeros(1, dtype=torch.int64), device),
    }


def _waiting_arguments(device: torch.device) -> Arguments:
    return {
        "sequence": torch.full((1,), 7, device=device),
        "ready": pinned(torch.full((1,), 7), device),
        "report": torch.full((3,), -9, device=device),
        "max_spins": 5,
    }
