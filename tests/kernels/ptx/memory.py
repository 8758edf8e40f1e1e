"""Memory of a GPU that is watched: what lies outside, what is not aligned, and what threads do to each other's bytes.

Two accesses of one byte by different warps, one of them a write that changes it, need a barrier between them; those of
different blocks must not happen in one launch at all. Atomics and loads that acquire are for that, and not watched.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

NOBODY, SEVERAL = -1, -2


class FaultError(Exception):
    """What a GPU, or its memory or race checker, would complain about."""


@dataclass(slots=True)
class Who:
    """The block that runs, its threads' warps, and how many barriers it has passed."""

    block: int
    warps: np.ndarray
    epoch: int = 0


class Watch:
    """Of each byte, who wrote and who read it last, and when.

    With `copies` one instruction may write a byte in several warps, and differently: what a compiler keeps of a number
    in several threads may differ in its last bit.
    """

    def __init__(self, count: int, *, copies: bool) -> None:
        self._copies = copies
        self._writer, self._reader = (np.full((count, 4), NOBODY, np.int32) for _ in range(2))
        self._numbers: dict[str, int] = {}

    def read(self, at: np.ndarray, who: Who, warps: np.ndarray, what: str) -> str:
        """What else wrote bytes `at` that may be read before or after that, if anything. `warps`: of each byte."""
        race = self._others(self._writer[at], who, warps)
        found = self._said(self._writer[at], race)
        before = self._reader[at]
        fresh = (before[:, 0] == NOBODY) | ((before[:, 0] == who.block) & (before[:, 2] != who.epoch))
        same = (before[:, 0] == who.block) & (before[:, 1] == warps)
        block = np.where((before[:, 0] == NOBODY) | (before[:, 0] == who.block), who.block, SEVERAL)
        self._reader[at] = self._entry(block, np.where(fresh | same, warps, SEVERAL), who, what)
        return found

    def write(self, at: np.ndarray, who: Who, warps: np.ndarray, changes: np.ndarray, what: str) -> str:
        """What else read or wrote bytes `at`, of which some change."""
        written, read = self._writer[at], self._reader[at]
        unlike = changes & (written[:, 3] != self._number(what)) if self._copies else changes
        found = self._said(written, self._others(written, who, warps) & unlike)
        found = found or self._said(read, self._others(read, who, warps) & changes)
        self._writer[at] = self._entry(np.full(len(at), who.block), warps, who, what)
        return found

    @staticmethod
    def _others(entries: np.ndarray, who: Who, warps: np.ndarray) -> np.ndarray:
        block, warp, epoch, _ = entries.T
        others: np.ndarray = (block != NOBODY) & ((block != who.block) | ((warp != warps) & (epoch == who.epoch)))
        return others

    def _entry(self, block: np.ndarray, warps: np.ndarray, who: Who, what: str) -> np.ndarray:
        return np.stack([block, warps, np.full(len(warps), who.epoch), np.full(len(warps), self._number(what))], 1)

    def _number(self, what: str) -> int:
        return self._numbers.setdefault(what, len(self._numbers))

    def _said(self, entries: np.ndarray, race: np.ndarray) -> str:
        if not race.any():
            return ""
        block, warp, epoch, number = entries[race][0]
        return f"{list(self._numbers)[number]} (block {block}, warp {warp}, after {epoch} barriers)"


class Memory:
    """Bytes at addresses within `regions` (first address and size of each), of which `data` has all from `base` on."""

    def __init__(self, name: str, data: np.ndarray, regions: list[tuple[int, int]], base: int = 0) -> None:
        self.name, self._data, self._base = name, data, base
        joined: list[list[int]] = []
        for start, size in sorted({region for region in regions if region[1]}):
            if joined and start <= joined[-1][1]:
                joined[-1][1] = max(joined[-1][1], start + size)
            else:
                joined.append([start, start + size])
        self._starts, self._ends = (np.array([each[side] for each in joined], np.int64) for side in (0, 1))
        sizes = self._ends - self._starts
        self._first = np.cumsum(sizes) - sizes
        self._watch = Watch(int(sizes.sum()), copies=name == "shared")

    def forget(self, chance: np.random.Generator) -> None:
        """What it holds now means nothing."""
        self._data[:] = chance.integers(0, 256, len(self._data), np.uint8)
        self._watch = Watch(len(self._data), copies=self.name == "shared")

    def _bytes(self, addresses: np.ndarray, size: int, align: int, what: str) -> tuple[np.ndarray, np.ndarray]:
        """Addresses `[n, size]` of bytes, and their places in the watch."""
        first = addresses.astype(np.int64)
        if (first % align).any():
            raise FaultError(
                f"{what}: {self.name} address {int(first[first % align != 0][0]):#x} is no multiple of {align}"
            )
        region = np.searchsorted(self._starts, first, side="right") - 1
        outside = (region < 0) | (first + size > self._ends[region])
        if outside.any():
            raise FaultError(
                f"{what}: {int(outside.sum())} {self.name} addresses outside, {int(first[outside][0]):#x} say"
            )
        at = first[:, None] + np.arange(size)
        return at - self._base, (at - (self._starts - self._first)[region][:, None]).ravel()

    def load(self, addresses: np.ndarray, size: int, align: int, who: Who, warps: np.ndarray, what: str) -> np.ndarray:
        """Bytes `[n, size]`."""
        at, places = self._bytes(addresses, size, align, what)
        if "acquire" not in what and "atom" not in what:
            self._refuse(what, who, warps, self._watch.read(places, who, np.repeat(warps, size), what))
        return self._data[at]

    def store(
        self, addresses: np.ndarray, values: np.ndarray, align: int, who: Who, warps: np.ndarray, what: str
    ) -> None:
        """Bytes `[n, size]`."""
        size = values.shape[1]
        at, places = self._bytes(addresses, size, align, what)
        changes = (self._data[at] != values).ravel()
        if "atom" not in what:
            self._refuse(what, who, warps, self._watch.write(places, who, np.repeat(warps, size), changes, what))
        self._data[at] = values

    def _refuse(self, what: str, who: Who, warps: np.ndarray, other: str) -> None:
        if other:
            here = f"block {who.block}, warps {sorted(set(warps.tolist()))}, after {who.epoch} barriers"
            raise FaultError(f"race: {what} ({here}) with {other}")


def of_process(regions: list[tuple[int, int]]) -> Memory:
    """Memory that others have allocated, where it is."""
    there = [(start, size) for start, size in regions if size]
    base, end = min(start for start, _ in there), max(start + size for start, size in there)
    data = np.ctypeslib.as_array((ctypes.c_uint8 * (end - base)).from_address(base))
    return Memory("global", data, there, base)
