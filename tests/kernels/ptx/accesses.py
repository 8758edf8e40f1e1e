"""Loads, stores, exchanges, and copies that go on while threads do."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .arithmetic import kind_of
from .block import Block, Operands, Read, Run, Threads, UnsupportedError
from .memory import Memory
from .numbers import DTYPES


def _space(modifiers: list[str]) -> str:
    named = (each.removesuffix("::cta") for each in modifiers if each.split("::")[0] in ("global", "shared", "local"))
    return next(named, "local")  # of no space: these kernels have such addresses of spilled registers only


def load(operands: Operands, modifiers: list[str]) -> Run:
    kind, block = kind_of(modifiers), operands.block
    if "param" in modifiers:
        return _load_parameter(operands, kind)
    count = next((int(each[1:]) for each in modifiers if re.fullmatch(r"v\d", each)), 1)
    size, at = np.dtype(DTYPES[kind]).itemsize, _placed(operands, 1, modifiers)
    puts, memory = [operands.writer(part, kind) for part in operands.parts(0)], _memory(operands, modifiers)
    text = operands.instruction.text

    def run(threads: Threads) -> None:
        found = memory.load(at(threads), size * count, size * count, block.who, block.who.warps[threads], text)
        for values, put in zip(found.view(DTYPES[kind]).T, puts, strict=True):
            put(threads, values)

    return run


def _memory(operands: Operands, modifiers: list[str]) -> Memory:
    return operands.block.memory[_space(modifiers)]


def _placed(operands: Operands, index: int, modifiers: list[str]) -> Read:
    """Addresses; of local memory, which each thread has a part of, within all threads' parts."""
    at, block = operands.address(index), operands.block
    if _space(modifiers) != "local":
        return at
    return lambda threads: at(threads) + block.numbers(threads) * block.program.local_bytes


def _load_parameter(operands: Operands, kind: str) -> Run:
    name, put, dtype = operands.text(1).strip("[] "), operands.write(0, kind), np.dtype(DTYPES[kind])
    arguments, block = operands.block.arguments, operands.block
    size = dtype.itemsize if kind[0] != "s" else 4
    if name not in arguments:
        at = operands.reader(name, "u32")
        order = list(arguments)

        def by_place(threads: Threads) -> None:
            place = int(np.max(at(threads))) - block.constants[order[0]]
            put(threads, np.array(arguments[order[place]] & (2**64 - 1), np.uint64).astype(f"u{size}").view(dtype))

        return by_place
    value = np.array(arguments[name] & (2 ** (8 * size) - 1), f"u{size}")
    extended = value.view(f"i{size}").astype(np.int64) if kind[0] == "s" else value
    return lambda threads: put(threads, extended[()])


def store(operands: Operands, modifiers: list[str]) -> Run:
    kind, block = kind_of(modifiers), operands.block
    size, at = np.dtype(DTYPES[kind]).itemsize, _placed(operands, 0, modifiers)
    reads, memory = [operands.reader(part, kind) for part in operands.parts(1)], _memory(operands, modifiers)
    text = operands.instruction.text

    def run(threads: Threads) -> None:
        addresses = at(threads)
        values = np.stack([np.broadcast_to(read(threads), addresses.shape) for read in reads], 1)
        given = np.ascontiguousarray(values).view(np.uint8).reshape(len(addresses), -1)
        memory.store(addresses, given, size * len(reads), block.who, block.who.warps[threads], text)

    return run


def exchange(operands: Operands, modifiers: list[str]) -> Run:
    """atom.global.sys.release.exch.b64 d, [a], b: by one thread."""
    if "exch" not in modifiers:
        raise UnsupportedError(operands.instruction.text)
    kind, block, memory = kind_of(modifiers), operands.block, operands.block.memory["global"]
    put, at, value = operands.write(0, kind), operands.address(1), operands.read(2, kind)
    size, text = np.dtype(DTYPES[kind]).itemsize, operands.instruction.text

    def run(threads: Threads) -> None:
        addresses, warps = at(threads), block.who.warps[threads]
        put(threads, memory.load(addresses, size, size, block.who, warps, text).view(DTYPES[kind])[:, 0])
        given = np.ascontiguousarray(np.broadcast_to(value(threads), addresses.shape)).view(np.uint8)
        memory.store(addresses, given.reshape(len(addresses), -1), size, block.who, warps, text)

    return run


def copy(operands: Operands, modifiers: list[str]) -> Run:
    """cp.async: read at once, written when somebody waits, so that who does not wait sees the old."""
    if modifiers[1] == "commit_group":
        return lambda threads: _each_warp(operands.block, threads, lambda groups: groups.append([]))
    if modifiers[1] == "wait_group":
        left = int(operands.text(0))
        return lambda threads: _each_warp(operands.block, threads, lambda groups: _finish(groups, left, threads))
    if modifiers[1] == "wait_all":
        raise UnsupportedError(operands.instruction.text)
    return _start_copy(operands)


def _each_warp(block: Block, threads: Threads, do: Callable[[list[list[Run]]], None]) -> None:
    for warp in np.unique(block.who.warps[threads]):
        do(block.under_way.setdefault(int(warp), [[]]))


def _finish(groups: list[list[Run]], left: int, threads: Threads) -> None:
    while len(groups) - 1 > left:
        for arrive in groups.pop(0):
            arrive(threads)


def _start_copy(operands: Operands) -> Run:
    block, text = operands.block, operands.instruction.text
    target, source, size = operands.address(0), operands.address(1), int(operands.text(2), 0)
    taken = operands.read(3, "u32") if len(operands) > 3 else None
    shared, memory = block.memory["shared"], block.memory["global"]

    def run(threads: Threads) -> None:
        to, of, warps = target(threads), source(threads), block.who.warps[threads]
        count = np.broadcast_to(size if taken is None else np.asarray(taken(threads), np.int64), to.shape)
        values = np.zeros((len(to), size), np.uint8)
        for some in np.unique(count[count > 0]):
            which = count == some
            values[which, :some] = memory.load(of[which], int(some), size, block.who, warps[which], text)
        for warp in np.unique(warps):
            mine = warps == warp
            given = (to[mine], values[mine], size, block.who, warps[mine], text)
            groups = block.under_way.setdefault(int(warp), [[]])
            groups[-1].append(lambda _, given=given: shared.store(*given))

    return run
