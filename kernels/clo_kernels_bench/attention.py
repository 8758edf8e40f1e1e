"""`sparse_decode_attention` against the rate of device memory, and against torch's own attention on the same tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from clo_kernels.coded_pages import coded_width
from clo_kernels.layout import window_start
from clo_kernels.recorded_calls import Call
from clo_kernels.sparse_decode_attention import MAX_SPLITS, default_splits, sparse_decode_attention
from clo_kernels_bench import problems
from clo_kernels_bench.figures import Figure
from clo_kernels_bench.peaks import Peaks
from clo_kernels_bench.problems import RECENT, SINKS, Sizes
from clo_kernels_bench.timing import copies_beyond_cache, graph_samples

SHARES_OF_SPLITS = (1 / 3, 2 / 3, 4 / 3)
"""One and two programs of a multiprocessor in place of three; and more than run at once."""
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)


def attended_tokens(sizes: Sizes) -> int:
    """Of one KV head: sinks, selected pages, window."""
    length = sizes.num_pages * sizes.page_size
    return SINKS + sizes.budget * sizes.page_size + length - window_start(length, RECENT, sizes.page_size)


def attended_bytes(sizes: Sizes) -> float:
    """Keys and values that one call reads."""
    rows, in_pages = sizes.batch * sizes.kv_heads, sizes.budget * sizes.page_size
    plain = sizes.head_dim * sizes.dtype.itemsize
    kept = coded_width(sizes.head_dim) if sizes.coded else plain
    return float(rows * sizes.rows_per_token * (in_pages * kept + (attended_tokens(sizes) - in_pages) * plain))


def attention_calls(sizes: Sizes, copies: int, num_splits: int | None = None) -> list[Call]:
    """One call for each copy of the KV."""

    def call() -> Call:
        query, kv, selected = problems.random_query(sizes), problems.device_kv(sizes), problems.random_slots(sizes)
        lengths, out = problems.lengths(sizes), problems.no_attention(sizes)
        return lambda: sparse_decode_attention(query, kv, selected, lengths, num_splits=num_splits, out=out)

    return [call() for _ in range(copies)]


def other_splits(sizes: Sizes) -> list[int]:
    """Numbers of splits to be tried beside the one that is used."""
    usual = default_splits(problems.random_query(sizes), problems.device_kv(sizes), problems.random_slots(sizes))
    tried = {min(MAX_SPLITS, max(1, round(share * usual))) for share in SHARES_OF_SPLITS}
    return sorted(tried - {usual})


def dense_calls(sizes: Sizes, backend: SDPBackend, copies: int, *, packed: bool) -> list[Call]:
    """Torch's attention over as many tokens, contiguous. Packed: a group's query heads as the rows of one head."""
    tokens = attended_tokens(sizes)

    def call() -> Call:
        shape = (*sizes.rows, tokens, sizes.head_dim)
        keys, values = (torch.randn(shape, device=sizes.device, dtype=sizes.dtype) for _ in range(2))
        query = problems.random_query(sizes)
        query = query.unflatten(1, (sizes.kv_heads, sizes.group)) if packed else query[:, :, None]

        def attend() -> object:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(query, keys, values, enable_gqa=not packed)

        return attend

    return [call() for _ in range(copies)]


def attention_figures(
    device: torch.device, peaks: Peaks, *, quick: bool, note: Callable[[str], None]
) -> Iterator[Figure]:
    """A tenth and all of 131,072 tokens; 1 and 16 sequences; pages of 16 and 64 tokens; slots of coded pages."""
    shapes = [
        Sizes(device=device, slots=819),
        Sizes(device=device, batch=16, slots=819),
        Sizes(device=device, budget=8176, slots=8176),
        Sizes(device=device, batch=4, group=8, slots=819),
        Sizes(device=device, batch=4, page_size=64, num_pages=2048, budget=205, slots=205),
    ]
    for sizes in shapes[:2] if quick else shapes:
        copies = copies_beyond_cache(attended_bytes(sizes), device)
        base = untimed("sparse_decode_attention", sizes, peaks)
        yield replace(base, samples_us=graph_samples(attention_calls(sizes, copies)))
        for splits in () if quick else other_splits(sizes):
            calls = attention_calls(sizes, copies, splits)
            yield replace(base, case={**base.case, "splits": splits}, samples_us=graph_samples(calls))
        for backend, packed in itertools.product(BACKENDS, (True, False)):
            name = backend.name.lower().removesuffix("_attention") + (", packed" if packed else ", gqa")
            try:
                samples = graph_samples(dense_calls(sizes, backend, copies, packed=packed))
            except RuntimeError as error:
                note(f"torch sdpa ({name}): {str(error).splitlines()[0]}")
            else:
                yield replace(base, operation=f"torch sdpa ({name})", samples_us=samples)
    yield from _coded_figures(device, peaks)


def _coded_figures(device: torch.device, peaks: Peaks) -> Iterator[Figure]:
    """A tenth of 131,072 tokens; the goals are those of pages as computed."""
    for batch in (1, 16):
        sizes = Sizes(device=device, batch=batch, slots=819, coded=True)
        calls = attention_calls(sizes, copies_beyond_cache(attended_bytes(sizes), device))
        yield replace(untimed("attention over coded pages", sizes, peaks), samples_us=graph_samples(calls))


def untimed(operation: str, sizes: Sizes, peaks: Peaks) -> Figure:
    """A figure without samples."""
    num_bytes = attended_bytes(sizes)
    return Figure(
        operation=operation,
        case={
            "batch": sizes.batch,
            "group": sizes.group,
            "page_size": sizes.page_size,
            "tokens": attended_tokens(sizes),
        },
        samples_us=(),
        num_bytes=num_bytes,
        limit_us=peaks.memory_us(num_bytes),
        limit=f"device memory, {peaks.hbm / 1e12:.2f} TB/s in this run",
    )
