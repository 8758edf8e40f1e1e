"""`gather_pages`: how near it comes to a copy engine, and what it costs a kernel that runs beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from clo_kernels.gather_pages import gather_pages
from clo_kernels.recorded_calls import Call, beside, recorded
from clo_kernels_bench import problems
from clo_kernels_bench.attention import attention_calls
from clo_kernels_bench.figures import Figure, scaled
from clo_kernels_bench.peaks import Peaks
from clo_kernels_bench.problems import Sizes
from clo_kernels_bench.timing import SLEEP_CYCLES, event_samples, graph_samples

KIB = 1024
HOST_BYTES = 1 << 30
LAUNCH_BYTES = 64 << 20
SMALLER_BYTES = tuple(mib << 20 for mib in (1, 2, 4, 8, 16, 32))
PAGE_KIB = (4, 8, 16, 32, 64)
PROGRAMS = (1, 2, 4, 8, 16, 32)
ALL_PROGRAMS = 128


def pinned_storage(device: torch.device) -> torch.Tensor:
    """Random bytes in pinned host memory. One allocation: torch rounds pinned sizes up to powers of two."""
    storage = torch.empty(HOST_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    storage.copy_(torch.randint(0, 255, (HOST_BYTES,), dtype=torch.uint8, device=device))
    return storage


def paged(storage: torch.Tensor, page_kib: int, device: torch.device) -> tuple[Sizes, torch.Tensor]:
    """The storage as pages of eight KV heads: with bfloat16 keys and values of 128 elements, 512 bytes a token."""
    page_size = page_kib * KIB // 512
    sizes = Sizes(device=device, page_size=page_size, num_pages=HOST_BYTES // (8 * page_kib * KIB))
    shape = (1, sizes.num_pages, sizes.kv_heads, 2, page_size, sizes.head_dim)
    return sizes, storage.view(torch.bfloat16).view(shape)


def gather_calls(
    storage: torch.Tensor,
    device: torch.device,
    page_kib: int,
    programs: int,
    launch_bytes: int,
    *,
    lists: int = 4,
    in_order: bool = False,
    gather: Callable[..., torch.Tensor] = gather_pages,
) -> list[Call]:
    """Launches of `launch_bytes` each, every one with random pages of its own; `in_order`: pages side by side."""
    sizes, pages = paged(storage, page_kib, device)
    per_head = max(1, launch_bytes // (sizes.kv_heads * sizes.page_bytes))
    slots = torch.empty((*sizes.rows, per_head, *pages.shape[3:]), dtype=pages.dtype, device=device)

    def call(seed: int) -> Call:
        torch.manual_seed(seed)
        fetch = problems.fetch_list(sizes, per_head)
        if in_order:
            fetch.fetch_pages.copy_(torch.arange(seed * per_head, (seed + 1) * per_head) % sizes.num_pages)
        return lambda: gather(pages, slots, fetch, num_programs=programs)

    return [call(seed) for seed in range(lists)]


def gather_figures(storage: torch.Tensor, device: torch.device, peaks: Peaks, *, quick: bool) -> Iterator[Figure]:
    """Pages and programs; then the bytes of a launch, at 8 KiB and 16 programs; then pages side by side.

    Where the last are faster, it is not the kernel that limits random pages but the translation of their addresses.
    The very last, by more programs than there is any use for, are what kernels can read of the host at all.
    """
    shapes = [(page, programs, LAUNCH_BYTES, False) for page in PAGE_KIB for programs in PROGRAMS]
    if quick:
        shapes = [(page, programs, LAUNCH_BYTES, False) for page in (8, 64) for programs in (4, 16)]
    shapes += [(8, 16, num_bytes, False) for num_bytes in (SMALLER_BYTES[::3] if quick else SMALLER_BYTES)]
    shapes += [(8, 16, LAUNCH_BYTES, True), (PAGE_KIB[-1], ALL_PROGRAMS, LAUNCH_BYTES, True)]
    for page_kib, programs, launch_bytes, in_order in shapes:
        num_bytes = launch_bytes if programs >= 4 else launch_bytes // 4
        calls = gather_calls(storage, device, page_kib, programs, num_bytes, in_order=in_order)
        case: dict[str, int | str] = {"page_KiB": page_kib, "programs": programs, "MiB": num_bytes >> 20}
        yield Figure(
            operation="gather_pages",
            case=case | ({"pages": "side by side"} if in_order else {}),
            samples_us=graph_samples(calls, repeats=10),
            num_bytes=float(num_bytes),
            limit_us=peaks.copy_us(num_bytes),
            limit=peaks.copy_limit,
        )


def interference_figures(storage: torch.Tensor, device: torch.device, *, quick: bool) -> Iterator[Figure]:
    """Attention of eight sequences beside nothing, a copy engine, and gathers of several program counts.

    The limit is the time beside nothing. A sample counts only if the transfer ran from before attention until after it.
    """
    sizes = Sizes(device=device, batch=8, slots=819)
    calls = attention_calls(sizes, copies=1) * 16
    attention = recorded(calls)
    alone = Figure(
        operation="sparse_decode_attention beside a transfer",
        case={"transfer": "nothing"},
        samples_us=scaled(event_samples(attention.replay), len(calls)),
    )
    yield alone
    room = 3 * alone.median_us * len(calls)  # the transfer is to last this long
    there = torch.empty(HOST_BYTES // 4, dtype=torch.uint8, device=device)
    here = storage[: HOST_BYTES // 4]
    transfers: dict[str, Call] = {"copy engine": lambda: there.copy_(here, non_blocking=True)}
    for programs in (8, 32) if quick else (4, 8, 16, 32, 64):
        gathers = gather_calls(storage, device, 8, programs, LAUNCH_BYTES)
        transfers[f"gather, {programs} programs"] = recorded(gathers).replay
    for name, transfer in transfers.items():
        once = min(event_samples(transfer, repeats=3))
        times, repeats = int(room // once) + 2, 5 if quick else 10
        seconds = beside(attention.replay, transfer, times=times, repeats=repeats, sleep_cycles=SLEEP_CYCLES)
        if seconds:
            yield replace(
                alone,
                case={"transfer": name},
                samples_us=scaled([sample * 1e6 for sample in seconds], len(calls)),
                limit_us=alone.median_us,
                limit="the same beside nothing",
            )
