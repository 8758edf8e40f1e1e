"""The members of a trace file: their names, types and shapes, and how plain arrays become them.

Checks arrays against the header on the way in. The codes themselves are `clo.trace_file`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clo import trace_file
from clo.errors import TraceError
from clo.trace_file import NO_PAGE
from clo.trace_header import TraceHeader

# weight, in quarters, of the previous step in predicting codes: real queries drift slower than approximation errors
REAL_QUARTERS, AHEAD_QUARTERS = 2, 1

PageArray = NDArray[np.uint16]


def query_member(distance: int) -> str:
    """Name of the queries approximated `distance` layers ahead, 0 for the real ones."""
    return f"query_ahead{distance}" if distance else "query"


def page_member(selector: str, distance: int = 0) -> str:
    """Name of the page lists for the queries of `query_member`."""
    return f"pages_{selector}_ahead{distance}" if distance else f"pages_{selector}"


def nearer(header: TraceHeader, distance: int) -> int:
    """The next more exact query: fewer layers ahead, or 0 for the real one."""
    return max((known for known in header.lookaheads if known < distance), default=0)


def expected_members(header: TraceHeader) -> dict[str, tuple[np.dtype[Any], tuple[int, ...] | None]]:
    """Type and shape of every member but the optional `page_mass`; None for streams, whose length is free."""
    steps, layers, heads, dim = header.query_shape
    expected: dict[str, tuple[np.dtype[Any], tuple[int, ...] | None]] = {
        "query_scale": (np.dtype(np.float16), (steps, layers, heads)),
        "resident_mass": (np.dtype(np.float16), header.page_shape[:3]),
        "head_importance": (np.dtype(np.float32), (layers, heads)),
    }
    for distance in (0, *header.lookaheads):
        expected[query_member(distance)] = (np.dtype(np.uint8), None)
        expected[f"{query_member(distance)}_mean"] = (np.dtype(np.int8), (layers, heads, dim))
        for selector in header.selectors:
            expected[page_member(selector, distance)] = (np.dtype(np.uint8), None)
    return expected


def check_member(name: str, array: NDArray[Any], dtype: np.dtype[Any], shape: tuple[int, ...] | None) -> None:
    """Raise `TraceError` unless the member has this type and shape (None: a stream) and finite values."""
    if array.dtype != dtype:
        raise TraceError(f"{name}: type {array.dtype}, expected {dtype}")
    if array.shape != shape if shape is not None else array.ndim != 1:
        raise TraceError(f"{name}: shape {array.shape} disagrees with the header ({shape or 'one dimension'} expected)")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise TraceError(f"{name}: holds values that are not finite")


def check_values(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Raise `TraceError` unless the array has this shape and finite values."""
    if array.shape != shape:
        raise TraceError(f"{name}: shape {array.shape} disagrees with the header ({shape} expected)")
    if not np.isfinite(array).all():
        raise TraceError(f"{name}: holds values that are not finite")


def code_queries(
    header: TraceHeader, queries: NDArray[Any], lookahead_queries: Mapping[int, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Members for real and approximate queries, float [steps, layers, query heads, head_dim] each."""
    ahead = [(header.first_predicted(distance), lookahead_queries[distance]) for distance in header.lookaheads]
    scale = trace_file.query_scale(queries, ahead)
    members: dict[str, NDArray[Any]] = {"query_scale": scale}
    codes: dict[int, NDArray[np.int8]] = {}
    for distance in (0, *header.lookaheads):
        if distance == 0:
            codes[0] = part = trace_file.to_codes(queries, scale)
        else:
            closest = codes[nearer(header, distance)]
            codes[distance] = trace_file.to_codes(lookahead_queries[distance], scale)
            unpredicted = slice(header.first_predicted(distance))
            codes[distance][:, unpredicted] = closest[:, unpredicted]
            part = codes[distance] - closest
        name, mean = query_member(distance), trace_file.mean_code(part)
        members[f"{name}_mean"] = mean
        quarters = AHEAD_QUARTERS if distance else REAL_QUARTERS
        members[name] = trace_file.pack(trace_file.encode_codes(part, mean, quarters))
    return members


def code_pages(
    header: TraceHeader,
    selector: str,
    real: NDArray[Any],
    approximate: Mapping[tuple[str, int], NDArray[Any]],
) -> dict[str, NDArray[Any]]:
    """Members for one selector's page lists. Raises `TraceError` for ids out of range, repeated or too many."""
    complete = _complete(header, f"pages[{selector}]", real, 0)
    series = complete.reshape(header.num_steps, -1, complete.shape[-1])
    members = {page_member(selector): trace_file.pack(trace_file.encode_series(series, header.universe))}
    rows = complete.reshape(-1, complete.shape[-1])
    for distance in header.lookaheads:
        name = f"lookahead_pages[{selector}, {distance}]"
        first = header.first_predicted(distance)
        ahead = _complete(header, name, approximate[selector, distance], first)
        ahead[:, :first] = complete[:, :first]
        code = trace_file.encode_lists(ahead.reshape(rows.shape), rows, header.universe)
        members[page_member(selector, distance)] = trace_file.pack(code)
    return members


def _valid_entries(header: TraceHeader) -> NDArray[np.bool_]:
    """Which list entries a step fills, [steps, entries]."""
    counts = np.array([header.num_candidate_pages(step) for step in range(header.num_steps)])
    entries: NDArray[np.bool_] = np.arange(header.list_shape[0]) < counts[:, None]
    return entries


def _complete(header: TraceHeader, name: str, pages: NDArray[Any], first_layer: int) -> PageArray:
    """Checked page lists, counted from 0, padding replaced by pages not named: [steps, layers, KV heads, entries]."""
    if pages.shape != header.page_shape or pages.dtype != np.uint16:
        raise TraceError(
            f"{name}: {pages.dtype} of shape {pages.shape} disagrees with the header (uint16 of {header.page_shape})"
        )
    entries, valid = header.list_shape[0], _valid_entries(header)
    for step in range(header.num_steps):
        lists = pages[step, first_layer:]
        named, count = lists[..., :entries][..., valid[step]], header.num_candidate_pages(step)
        if named.min(initial=1) < 1 or named.max(initial=1) > count:
            raise TraceError(f"{name}: step {step} has page ids out of range 1 to {count}")
        if (np.diff(np.sort(named, axis=-1), axis=-1) == 0).any():
            raise TraceError(f"{name}: step {step} names a page twice")
        if (lists[..., named.shape[-1] :] != NO_PAGE).any():
            raise TraceError(f"{name}: step {step} names more pages than there are candidates")
    counted = np.where(pages == NO_PAGE, NO_PAGE, pages - 1)[..., :entries].astype(np.uint16)
    complete = trace_file.complete_lists(counted.reshape(-1, entries), header.universe)
    return complete.reshape(*header.page_shape[:3], entries)


def padded(header: TraceHeader, complete: PageArray) -> PageArray:
    """Undo `_complete`: page ids from 1, `NO_PAGE` beyond a step's candidates and up to `max_budget_pages`."""
    entries, valid = header.list_shape[0], _valid_entries(header)
    pages = np.full(header.page_shape, NO_PAGE, np.uint16)
    named = complete.reshape(*header.page_shape[:3], entries) + np.uint16(1)
    pages[..., :entries] = np.where(valid[:, None, None], named, NO_PAGE)
    return pages
