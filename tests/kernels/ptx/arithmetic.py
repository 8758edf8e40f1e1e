"""Sums, products and quotients, of integers and floats of every width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .block import Operands, Run, Threads
from .numbers import DTYPES, HALVES, approximate, flushed, from_bf16, halves, joined, to_bf16


def kind_of(modifiers: list[str]) -> str:
    """The last type named."""
    return next(each for each in reversed(modifiers) if each.removesuffix("x2") in DTYPES)


def of_kind(operands: Operands, modifiers: list[str], compute: Callable[..., Any], first: int = 1) -> Run:
    """`d, a, b, ...`, all of one kind: bfloat16 is computed in float32, which is exact before the rounding."""
    kind = kind_of(modifiers)
    if kind.endswith("x2"):
        reads = [operands.read(index, "b32") for index in range(first, len(operands))]
        put, (wide, narrow) = operands.write(0, "b32"), HALVES[kind.removesuffix("x2")]

        def packed(threads: Threads) -> None:
            both = [halves(read(threads)) for read in reads]
            parts = (narrow(compute(*(wide(each[side]) for each in both))) for side in (0, 1))
            put(threads, joined(*parts))

        return packed
    reads, put = [operands.read(index, kind) for index in range(first, len(operands))], operands.write(0, kind)
    if kind == "bf16":
        return lambda threads: put(threads, to_bf16(compute(*(from_bf16(read(threads)) for read in reads))))
    if kind == "f16":
        wide_reads = [lambda threads, read=read: np.asarray(read(threads), np.float32) for read in reads]
        return lambda threads: put(
            threads, np.asarray(compute(*(read(threads) for read in wide_reads))).astype(np.float16)
        )
    if "ftz" in modifiers:
        return lambda threads: put(threads, flushed(compute(*(flushed(read(threads)) for read in reads))))
    return lambda threads: put(threads, compute(*(read(threads) for read in reads)))


def plainly(compute: Callable[..., Any]) -> Callable[[Operands, list[str]], Run]:
    return lambda operands, modifiers: of_kind(operands, modifiers, compute)


def approximately(compute: Callable[..., Any]) -> Callable[[Operands, list[str]], Run]:
    return plainly(lambda *values: approximate(compute(*values)))


def divide(operands: Operands, modifiers: list[str]) -> Run:
    kind = kind_of(modifiers)
    if kind == "f32":
        exact = "rn" in modifiers
        return (plainly if exact else approximately)(np.divide)(operands, modifiers)
    return of_kind(operands, modifiers, lambda a, b: _truncated(a, b)[0])


def remainder(operands: Operands, modifiers: list[str]) -> Run:
    return of_kind(operands, modifiers, lambda a, b: _truncated(a, b)[1])


def _truncated(a: Any, b: Any) -> tuple[Any, Any]:
    """Quotient towards zero and the rest with the dividend's sign; by zero, all bits."""
    a, b = np.broadcast_arrays(a, b)
    wide_a, wide_b = a.astype(np.int64), np.where(b == 0, 1, b).astype(np.int64)
    quotient = np.where((wide_a < 0) != (wide_b < 0), -(np.abs(wide_a) // np.abs(wide_b)), wide_a // wide_b)
    quotient = np.where((wide_a < 0) & (wide_b < 0), np.abs(wide_a) // np.abs(wide_b), quotient)
    rest = wide_a - quotient * wide_b
    return np.where(b == 0, -1, quotient).astype(a.dtype), np.where(b == 0, a, rest).astype(a.dtype)


def minimum(operands: Operands, modifiers: list[str]) -> Run:
    if "relu" in modifiers:
        return of_kind(operands, modifiers, lambda a, b: np.maximum(np.minimum(a, b), 0))
    return plainly(np.minimum if "NaN" in modifiers else np.fmin)(operands, modifiers)


def maximum(operands: Operands, modifiers: list[str]) -> Run:
    return plainly(np.maximum if "NaN" in modifiers else np.fmax)(operands, modifiers)


def multiply(operands: Operands, modifiers: list[str]) -> Run:
    if "wide" in modifiers:
        return _widened(operands, kind_of(modifiers), lambda a, b: a * b)
    if "hi" in modifiers:
        return of_kind(operands, modifiers, _high_part)
    return plainly(np.multiply)(operands, modifiers)


def multiply_add(operands: Operands, modifiers: list[str]) -> Run:
    if "wide" in modifiers:
        return _widened(operands, kind_of(modifiers), lambda a, b, c: a * b + c)
    if "cc" in modifiers:
        return _low_and_carry(operands)
    return of_kind(operands, modifiers, lambda a, b, c: a * b + c)


def _widened(operands: Operands, kind: str, compute: Callable[..., Any]) -> Run:
    wide = kind[0] + str(2 * int(kind[1:]))
    factors, rest = (
        [operands.read(index, kind) for index in (1, 2)],
        [operands.read(3, wide)] if len(operands) > 3 else [],
    )
    put, dtype = operands.write(0, wide), DTYPES[wide]
    return lambda threads: put(
        threads,
        compute(*(np.asarray(read(threads)).astype(dtype) for read in factors), *(read(threads) for read in rest)),
    )


def _high_part(a: Any, b: Any) -> Any:
    a, b = np.broadcast_arrays(a, b)
    bits = 8 * a.dtype.itemsize
    if bits == 32:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)
    return ((a.astype(object) * b.astype(object)) >> bits).astype(a.dtype)


def _low_and_carry(operands: Operands) -> Run:
    """mad.lo.cc.u32"""
    a, b, c = (operands.read(index, "u32") for index in (1, 2, 3))
    put, carry = operands.write(0, "u32"), operands.block.carry

    def run(threads: Threads) -> None:
        product = np.asarray(a(threads), np.uint64) * np.asarray(b(threads), np.uint64)
        low = (product & np.uint64(0xFFFFFFFF)) + np.asarray(c(threads), np.uint64)
        carry[threads] = low >> np.uint64(32)
        put(threads, low.astype(np.uint32))

    return run


def high_and_carry(operands: Operands, modifiers: list[str]) -> Run:
    """madc.hi.u32"""
    a, b, c = (operands.read(index, "u32") for index in (1, 2, 3))
    put, carry = operands.write(0, "u32"), operands.block.carry

    def run(threads: Threads) -> None:
        product = np.asarray(a(threads), np.uint64) * np.asarray(b(threads), np.uint64)
        high = (product >> np.uint64(32)) + np.asarray(c(threads), np.uint64) + carry[threads]
        put(threads, high.astype(np.uint32))

    return run


def fused(operands: Operands, modifiers: list[str]) -> Run:
    def compute(a: Any, b: Any, c: Any) -> Any:
        exact = np.asarray(a, np.float64) * np.asarray(b, np.float64) + np.asarray(c, np.float64)
        return exact.astype(np.float32)

    return of_kind(operands, modifiers, compute)
