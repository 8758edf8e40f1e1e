"""From register to register: as it is, as another kind of number, and from thread to thread of a warp."""

from __future__ import annotations

import functools

import numpy as np

from .arithmetic import kind_of
from .block import WARP, Operands, Run, Threads
from .numbers import DTYPES, HALVES, from_bf16, joined, to_bf16, to_integer


def move(operands: Operands, modifiers: list[str]) -> Run:
    kind = kind_of(modifiers)
    if operands.text(0).startswith("{"):
        return _taken_apart(operands, kind)
    if operands.text(1).startswith("{"):
        return _put_together(operands, kind)
    value, put = operands.read(1, kind), operands.write(0, kind)
    return lambda threads: put(threads, value(threads))


def _taken_apart(operands: Operands, kind: str) -> Run:
    texts, value = operands.parts(0), operands.read(1, kind)
    bits = int(kind[1:]) // len(texts)
    puts = [operands.writer(text, f"u{bits}") for text in texts]

    def run(threads: Threads) -> None:
        whole = np.asarray(value(threads)).astype(np.uint64)
        for number, put in enumerate(puts):
            put(threads, ((whole >> np.uint64(number * bits)) & np.uint64(2**bits - 1)).astype(DTYPES[f"u{bits}"]))

    return run


def _put_together(operands: Operands, kind: str) -> Run:
    texts, put = operands.parts(1), operands.write(0, kind)
    bits = int(kind[1:]) // len(texts)
    reads = [operands.reader(text, f"u{bits}") for text in texts]

    def run(threads: Threads) -> None:
        parts = [np.asarray(read(threads)).astype(np.uint64) << np.uint64(at * bits) for at, read in enumerate(reads)]
        put(threads, functools.reduce(np.bitwise_or, parts).astype(DTYPES[kind]))

    return run


def convert(operands: Operands, modifiers: list[str]) -> Run:
    source = modifiers[-1]
    kind = modifiers[-2]
    rounding = modifiers[0] if len(modifiers) > 2 else ""
    if kind.endswith("x2"):
        high, low, put = operands.read(1, source), operands.read(2, source), operands.write(0, "b32")
        narrow = HALVES[kind.removesuffix("x2")][1]
        return lambda threads: put(threads, joined(narrow(low(threads)), narrow(high(threads))))
    value, put = operands.read(1, source), operands.write(0, kind)
    return lambda threads: put(threads, _converted(np.asarray(value(threads)), source, kind, rounding))


ROUNDINGS = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def _converted(values: np.ndarray, source: str, kind: str, rounding: str) -> np.ndarray:
    if source == "bf16":
        values = from_bf16(values)
    values = ROUNDINGS[rounding](values) if rounding in ROUNDINGS else values
    if kind == "bf16":
        return to_bf16(values.astype(np.float32))
    if "f" in source and "f" not in kind:
        return to_integer(values, kind)
    return values.astype(DTYPES[kind])


def shuffle(operands: Operands, modifiers: list[str]) -> Run:
    """shfl.sync.mode.b32 d, a, lane, clamp, mask"""
    mode, block = modifiers[1], operands.block
    every = slice(0, block.threads)
    value, lane, clamp = operands.read(1, "u32"), operands.read(2, "u32"), operands.read(3, "u32")
    put = operands.write(0, "u32")

    def run(threads: Threads) -> None:
        numbers, by, limit = block.numbers(threads), np.asarray(lane(threads), np.int64), int(np.max(clamp(threads)))
        own, segment = numbers % WARP, (limit >> 8) & 31
        least, most = own & segment, (own & segment) | (limit & 31 & ~segment)
        if mode == "bfly":
            source, valid = own ^ by, (own ^ by) <= most
        elif mode == "up":
            source, valid = own - by, own - by >= most
        elif mode == "down":
            source, valid = own + by, own + by <= most
        else:
            source = (by & ~segment & 31) | least
            valid = source <= most
        source = np.where(valid, source, own)
        put(threads, np.asarray(value(every))[numbers - own + source])

    return run


def reduce(operands: Operands, modifiers: list[str]) -> Run:
    """redux.sync.op.s32 d, a, mask"""
    combine = {"add": np.add, "max": np.maximum, "min": np.minimum, "or": np.bitwise_or, "and": np.bitwise_and}
    block, kind, ufunc = operands.block, kind_of(modifiers), combine[modifiers[1]]
    value, put = operands.read(1, kind), operands.write(0, kind)

    def run(threads: Threads) -> None:
        values, warps = np.asarray(value(threads)), block.numbers(threads) // WARP
        starts = np.flatnonzero(np.diff(warps, prepend=-1))
        found = ufunc.reduceat(np.broadcast_to(values, warps.shape), starts)
        put(threads, np.repeat(found, np.diff(starts, append=len(warps))))

    return run
