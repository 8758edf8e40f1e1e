"""An attention trace: what a real model's decode steps asked of its KV cache. Making, saving and loading it.

A trace holds queries, the pages each KV head would choose for them, and the same for queries approximated some layers
ahead. Arrays are kept in their coded form and decoded when asked for. Knows nothing about designs, machines or time,
nor about the model beyond its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from clo import trace_file
from clo.errors import TraceError
from clo.trace_file import NO_PAGE
from clo.trace_header import SCHEMA_VERSION, TraceHeader, candidate_pages, parse_header
from clo.trace_members import (
    AHEAD_QUARTERS,
    REAL_QUARTERS,
    PageArray,
    check_member,
    check_values,
    code_pages,
    code_queries,
    expected_members,
    nearer,
    padded,
    page_member,
    query_member,
)

__all__ = ["NO_PAGE", "AttentionTrace", "LazyArrays", "TraceHeader", "candidate_pages"]

Key = TypeVar("Key")
FloatArray = NDArray[np.float32]


class LazyArrays(Mapping[Key, NDArray[Any]]):
    """Arrays by key, decoded on first use and read-only. An unknown key raises `TraceError` naming those there are."""

    def __init__(self, what: str, keys: tuple[Key, ...], decode: Callable[[Key], NDArray[Any]]) -> None:
        self._what, self._keys, self._decode = what, keys, decode
        self._known: dict[Key, NDArray[Any]] = {}

    def __getitem__(self, key: Key) -> NDArray[Any]:
        if key not in self._keys:
            raise TraceError(f"trace: no {self._what} {key}: it has {', '.join(map(str, self._keys)) or 'none'}")
        if key not in self._known:
            self._known[key] = _frozen(self._decode(key))
        return self._known[key]

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


@dataclass(frozen=True, eq=False)
class AttentionTrace:
    """Header and coded arrays. Make one with `load` or `from_arrays`; the arrays it gives are read-only."""

    header: TraceHeader
    members: Mapping[str, NDArray[Any]]

    @classmethod
    def from_arrays(
        cls,
        header: TraceHeader,
        *,
        queries: NDArray[Any],
        lookahead_queries: Mapping[int, NDArray[Any]],
        pages: Mapping[str, NDArray[Any]],
        lookahead_pages: Mapping[tuple[str, int], NDArray[Any]],
        resident_mass: NDArray[Any],
        head_importance: NDArray[Any],
        page_mass: NDArray[Any] | None = None,
    ) -> AttentionTrace:
        """Check plain arrays against the header and code them. Shapes as the properties of the same names.

        Approximate queries and pages of layers below `header.first_predicted` are ignored. Raises `TraceError` for a
        shape that disagrees with the header, values that are not finite, or page ids out of range or repeated.
        """
        plain = {
            "queries": queries,
            **{f"lookahead_queries[{key}]": lookahead_queries[key] for key in header.lookaheads},
        }
        for name, array in plain.items():
            check_values(name, array, header.query_shape)
        check_values("resident_mass", resident_mass, header.page_shape[:3])
        check_values("head_importance", head_importance, (header.num_layers, header.num_query_heads))
        members: dict[str, NDArray[Any]] = {
            "head_importance": head_importance.astype(np.float32),
            "resident_mass": resident_mass.astype(np.float16),
            **code_queries(header, queries, lookahead_queries),
        }
        if page_mass is not None:
            check_values("page_mass", page_mass, header.page_shape)
            members["page_mass"] = trace_file.pack(trace_file.encode_mass(page_mass), repeats=True)
        for selector in header.selectors:
            members |= code_pages(header, selector, pages[selector], lookahead_pages)
        return cls(header, members)

    @classmethod
    def load(cls, path: str | Path) -> AttentionTrace:
        """Read and check a trace file; decoding waits until an array is asked for.

        Raises `TraceError`, one line with the file and the problem: missing, truncated or corrupt, of another schema,
        or with arrays that disagree with the header.
        """
        path = Path(path)
        members = trace_file.read_members(path)
        try:
            trace = cls(parse_header(members.pop("header", None)), members)
            trace._check_members()
        except TraceError as error:
            raise TraceError(f"{path}: {error}") from None
        return trace

    def save(self, path: str | Path) -> None:
        """Write the trace as an `.npz` file, whole or not at all. Raises `TraceError` if it cannot be written."""
        header = np.frombuffer(self.header.model_dump_json().encode(), np.uint8)
        trace_file.write_members(Path(path), {"header": header, **self.members})

    def num_candidate_pages(self, step: int) -> int:
        """Pages a head may choose from at `step`: 1 to this number."""
        return self.header.num_candidate_pages(step)

    @cached_property
    def queries(self) -> FloatArray:
        """Rotated queries, float32 [steps, layers, query heads, head_dim]."""
        return _frozen(trace_file.from_codes(self._codes[0], self.members["query_scale"]))

    @cached_property
    def lookahead_queries(self) -> LazyArrays[int]:
        """By layers ahead: what the query would be if computed from that many layers below; shape of `queries`."""
        return LazyArrays("lookahead", self.header.lookaheads, self._lookahead)

    @cached_property
    def pages(self) -> LazyArrays[str]:
        """By selector: uint16 [steps, layers, KV heads, max_budget_pages], best first, `NO_PAGE` after the last."""
        return LazyArrays("selector", self.header.selectors, self._pages)

    @cached_property
    def lookahead_pages(self) -> LazyArrays[tuple[str, int]]:
        """By selector and layers ahead: as `pages`, for approximate queries; `NO_PAGE` where there are none."""
        keys = tuple((selector, ahead) for selector in self.header.selectors for ahead in self.header.lookaheads)
        return LazyArrays("selector and lookahead", keys, self._lookahead_pages)

    @cached_property
    def page_mass(self) -> FloatArray | None:
        """Attention mass of the pages in `pages["exact"]`, mean over the group; float32, None if not recorded."""
        if "page_mass" not in self.members:
            return None
        stream = self.members["page_mass"]
        codes = trace_file.unpack(stream, np.dtype(np.uint8), self.header.page_shape, "page_mass")
        return _frozen(trace_file.decode_mass(codes))

    @property
    def resident_mass(self) -> NDArray[np.float16]:
        """Attention mass outside candidate pages (page 0, window, page between); [steps, layers, KV heads]."""
        return _frozen(self.members["resident_mass"])

    @property
    def head_importance(self) -> FloatArray:
        """Mean norm of a query head's contribution to the residual stream over the model's mean; [layers, heads]."""
        return _frozen(self.members["head_importance"])

    @cached_property
    def _codes(self) -> LazyArrays[int]:
        return LazyArrays("query", (0, *self.header.lookaheads), self._decode_codes)

    def _decode_codes(self, distance: int) -> NDArray[np.int8]:
        steps, layers, heads, dim = self.header.query_shape
        name = query_member(distance)
        differences = trace_file.unpack(self.members[name], np.dtype(np.int8), (layers, heads, steps, dim), name)
        quarters = AHEAD_QUARTERS if distance else REAL_QUARTERS
        codes = trace_file.decode_codes(differences, self.members[f"{name}_mean"], quarters)
        return codes + self._codes[nearer(self.header, distance)] if distance else codes

    def _lookahead(self, distance: int) -> FloatArray:
        queries = trace_file.from_codes(self._codes[distance], self.members["query_scale"])
        queries[:, : self.header.first_predicted(distance)] = 0.0
        return queries

    def _coded_list(self, name: str) -> NDArray[Any]:
        shape = self.header.list_shape
        code = trace_file.unpack(self.members[name], trace_file.code_dtype(self.header.universe), shape, name)
        return code.reshape(shape[0], -1)

    @cached_property
    def _complete_pages(self) -> LazyArrays[str]:
        return LazyArrays("selector", self.header.selectors, self._decode_pages)

    def _decode_pages(self, selector: str) -> PageArray:
        header = self.header
        return trace_file.decode_series(self._coded_list(page_member(selector)), header.num_steps, header.universe)

    def _pages(self, selector: str) -> PageArray:
        return padded(self.header, self._complete_pages[selector])

    def _lookahead_pages(self, key: tuple[str, int]) -> PageArray:
        selector, distance = key
        real = self._complete_pages[selector]
        code = self._coded_list(page_member(selector, distance))
        lists = trace_file.decode_lists(code, real.reshape(-1, real.shape[-1]), self.header.universe)
        pages = padded(self.header, lists)
        pages[:, : self.header.first_predicted(distance)] = NO_PAGE
        return pages

    def _check_members(self) -> None:
        expected = expected_members(self.header)
        if missing := expected.keys() - self.members.keys():
            raise TraceError(f"{min(missing)}: missing")
        if unknown := self.members.keys() - expected.keys() - {"page_mass"}:
            raise TraceError(f"{min(unknown)}: not part of a trace of schema {SCHEMA_VERSION}")
        for name, (dtype, shape) in expected.items():
            check_member(name, self.members[name], dtype, shape)
        for distance in (0, *self.header.lookaheads):
            self._check_stream(query_member(distance), np.dtype(np.int8), self.header.query_shape)
        if "page_mass" in self.members:
            check_member("page_mass", self.members["page_mass"], np.dtype(np.uint8), None)
            self._check_stream("page_mass", np.dtype(np.uint8), self.header.page_shape)
        for selector in self.header.selectors:
            for distance in (0, *self.header.lookaheads):
                self._check_list(page_member(selector, distance))

    def _check_stream(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        trace_file.unpack(self.members[name], dtype, shape, name)

    def _check_list(self, name: str) -> None:
        # entry j skips the j pages named before it, so this bound is the same as every id being in range
        worst = self._coded_list(name).max(1).astype(np.int64) + np.arange(self.header.list_shape[0])
        if worst.max() >= self.header.universe:
            raise TraceError(f"{name}: page ids out of range: at most {self.header.universe} pages are candidates")


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    array.setflags(write=False)
    return array
