"""Shifts, fields and choices of bits, and comparisons."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from .arithmetic import kind_of, of_kind
from .block import Operands, Run, Threads
from .numbers import DTYPES, HALVES, from_bf16, halves


def shift_left(operands: Operands, modifiers: list[str]) -> Run:
    kind = kind_of(modifiers)
    value, count, put = operands.read(1, kind.replace("b", "u")), operands.read(2, "u32"), operands.write(0, kind)
    bits = int(kind[1:])

    def run(threads: Threads) -> None:
        by = np.asarray(count(threads), np.uint64)
        moved = np.asarray(value(threads)).astype(np.uint64) << np.minimum(by, np.uint64(63))
        put(threads, np.where(by < bits, moved, 0).astype(DTYPES["u" + kind[1:]]).view(DTYPES[kind]))

    return run


def shift_right(operands: Operands, modifiers: list[str]) -> Run:
    kind = kind_of(modifiers)
    value, count, put = operands.read(1, kind), operands.read(2, "u32"), operands.write(0, kind)
    bits, signed = int(kind[1:]), kind[0] == "s"

    def run(threads: Threads) -> None:
        by = np.asarray(count(threads), np.int64)
        values = np.asarray(value(threads))
        moved = values >> np.minimum(by, bits - 1).astype(values.dtype)
        put(threads, moved if signed else np.where(by < bits, moved, 0).astype(values.dtype))

    return run


def funnel_left(operands: Operands, modifiers: list[str]) -> Run:
    """shf.l.wrap.b32 d, low, high, count"""
    low, high, count = (operands.read(index, "u32") for index in (1, 2, 3))
    put = operands.write(0, "u32")

    def run(threads: Threads) -> None:
        both = (np.asarray(high(threads), np.uint64) << np.uint64(32)) | np.asarray(low(threads), np.uint64)
        by = np.asarray(count(threads), np.uint64) & np.uint64(31)
        put(threads, ((both << by) >> np.uint64(32)).astype(np.uint32))

    return run


def bit_field(operands: Operands, modifiers: list[str]) -> Run:
    """bfe d, a, first, count"""
    kind = kind_of(modifiers)
    value, first, count = operands.read(1, "u32"), operands.read(2, "u32"), operands.read(3, "u32")
    put, signed = operands.write(0, "u32"), kind == "s32"

    def run(threads: Threads) -> None:
        wide = np.asarray(value(threads), np.int64)
        begin, size = (np.asarray(read(threads), np.int64) & 255 for read in (first, count))
        if signed:
            wide = np.where(wide >= 2**31, wide - 2**32, wide)
        found = (wide >> np.minimum(begin, 32)) & ((1 << size) - 1)
        if signed:
            found = np.where(found & (1 << np.maximum(size - 1, 0)), found - (1 << size), found)
        put(threads, (found & 0xFFFFFFFF).astype(np.uint32))

    return run


def permute(operands: Operands, modifiers: list[str]) -> Run:
    """prmt.b32 d, a, b, choice of bytes"""
    low, high, choice, put = (*(operands.read(index, "u32") for index in (1, 2, 3)), operands.write(0, "u32"))

    def run(threads: Threads) -> None:
        both = (np.asarray(high(threads), np.uint64) << np.uint64(32)) | np.asarray(low(threads), np.uint64)
        chosen, result = np.asarray(choice(threads), np.uint64), np.uint64(0)
        for place in range(4):
            nibble = (chosen >> np.uint64(4 * place)) & np.uint64(15)
            byte = (both >> (np.uint64(8) * (nibble & np.uint64(7)))) & np.uint64(255)
            byte = np.where(nibble & np.uint64(8), np.where(byte & np.uint64(128), 255, 0).astype(np.uint64), byte)
            result = result | (byte << np.uint64(8 * place))
        put(threads, result.astype(np.uint32))

    return run


def population(operands: Operands, modifiers: list[str]) -> Run:
    value, put = operands.read(1, "u32"), operands.write(0, "u32")
    return lambda threads: put(threads, np.bitwise_count(np.asarray(value(threads))).astype(np.uint32))


def invert(operands: Operands, modifiers: list[str]) -> Run:
    return of_kind(operands, modifiers, np.logical_not if modifiers == ["pred"] else np.invert)


def select(operands: Operands, modifiers: list[str]) -> Run:
    kind = kind_of(modifiers)
    yes, no, which, put = (
        operands.read(1, kind),
        operands.read(2, kind),
        operands.read(3, "pred"),
        operands.write(0, kind),
    )
    return lambda threads: put(threads, np.where(which(threads), yes(threads), no(threads)))


ORDERED: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip


def compare(operands: Operands, modifiers: list[str]) -> Run:
    relation, kind = modifiers[0], kind_of(modifiers)
    compute = _relation(relation, kind)
    if kind.endswith("x2"):
        wide = HALVES[kind.removesuffix("x2")][0]
        puts = [operands.writer(name, "pred") for name in operands.text(0).split("|")]
        pair = [operands.read(index, "b32") for index in (1, 2)]

        def both(threads: Threads) -> None:
            sides = [halves(read(threads)) for read in pair]
            for side, put in enumerate(puts):
                put(threads, compute(wide(sides[0][side]), wide(sides[1][side])))

        return both
    one, other, put = operands.read(1, kind), operands.read(2, kind), operands.write(0, "pred")
    if kind == "bf16":
        return lambda threads: put(threads, compute(from_bf16(one(threads)), from_bf16(other(threads))))
    return lambda threads: put(threads, compute(one(threads), other(threads)))


def _relation(relation: str, kind: str) -> Callable[[Any, Any], Any]:
    if relation == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if relation == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if "f" not in kind:
        return ORDERED[relation]
    if relation == "ne":
        return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    if relation in ORDERED:
        return ORDERED[relation]
    ordered = ORDERED[relation[:-1]]
    return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)
