"""A block's threads: what each has in registers, what they share, and what an instruction names of both."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .memory import Memory, Who
from .numbers import DTYPES
from .program import Instruction, Program

Threads = Any
"""A slice or sorted numbers."""
Read = Callable[[Threads], Any]
Run = Callable[[Threads], None]
WARP = 32
FLOAT = re.compile(r"^0([fd])([0-9A-Fa-f]+)$")


class UnsupportedError(Exception):
    """An instruction that is not written here."""


@dataclass(slots=True)
class Block:
    """What the threads of one block share, and what each has."""

    program: Program
    threads: int
    arguments: dict[str, int]
    grid: tuple[int, int, int]
    memory: dict[str, Memory]
    chance: np.random.Generator
    constants: dict[str, int]
    place: list[int] = field(default_factory=lambda: [0, 0, 0])
    who: Who = field(init=False)
    registers: dict[str, np.ndarray] = field(init=False)
    carry: np.ndarray = field(init=False)
    under_way: dict[int, list[list[Run]]] = field(default_factory=dict)
    """By warp, groups of copies that nobody has waited for; the last one is not committed."""

    def __post_init__(self) -> None:
        self.who = Who(0, np.arange(self.threads) // WARP)
        self.registers = {
            name: np.zeros(self.threads, np.bool_ if kind == "pred" else DTYPES[kind])
            for name, kind in self.program.registers.items()
        }
        self.carry = np.zeros(self.threads, np.uint64)

    def begin(self, number: int) -> None:
        """Block `number` of the grid; registers hold nothing that means anything."""
        wide, high, _ = self.grid
        self.place[:] = number % wide, number // wide % high, number // (wide * high)
        self.who.block, self.who.epoch = number, 0
        self.under_way.clear()
        for register in self.registers.values():
            raw = register.view(np.uint8)
            raw[:] = self.chance.integers(0, 2 if register.dtype == np.bool_ else 256, len(raw), np.uint8)

    def numbers(self, threads: Threads) -> np.ndarray:
        """Of these threads."""
        return np.arange(self.threads)[threads]


@dataclass(frozen=True, slots=True)
class Operands:
    """Of one instruction."""

    block: Block
    instruction: Instruction

    def __len__(self) -> int:
        return len(self.instruction.operands)

    def text(self, index: int) -> str:
        return self.instruction.operands[index]

    def parts(self, index: int) -> list[str]:
        """Of `{a, b}`, or of `a` alone."""
        return [part.strip() for part in self.text(index).strip("{} ").split(",")]

    def read(self, index: int, kind: str) -> Read:
        return self.reader(self.text(index), kind)

    def reader(self, text: str, kind: str) -> Read:
        """Of a register, a number or a name, as numbers of this kind."""
        dtype = np.dtype(DTYPES[kind])
        special = _special(self.block, text)
        if special is not None:
            return special
        if text in self.block.registers:
            register = self.block.registers[text]
            if kind == "pred" or register.dtype.itemsize == dtype.itemsize:
                seen = register.view(dtype)
                return lambda threads: seen[threads]
            narrow = register.view(f"u{register.dtype.itemsize}")
            return lambda threads: narrow[threads].astype(f"u{dtype.itemsize}").view(dtype)
        constant = self._constant(text, dtype)
        return lambda threads: constant

    def _constant(self, text: str, dtype: np.dtype[Any]) -> Any:
        if found := FLOAT.match(text):
            bits = np.array(int(found[2], 16), np.uint32 if found[1] == "f" else np.uint64)
            return bits.view(dtype)[()]
        if text in self.block.constants:
            return np.array(self.block.constants[text], np.uint64).astype(f"u{dtype.itemsize}").view(dtype)[()]
        number = int(text.rstrip("U"), 0)
        if dtype == np.bool_:
            return np.bool_(number)
        return np.array(number & ((1 << 8 * dtype.itemsize) - 1), f"u{dtype.itemsize}").view(dtype)[()]

    def write(self, index: int, kind: str) -> Callable[[Threads, Any], None]:
        return self.writer(self.text(index), kind)

    def writer(self, text: str, kind: str) -> Callable[[Threads, Any], None]:
        """Into a register, as wide as it is: what is narrower is extended by its kind."""
        if text == "_":
            return lambda threads, values: None
        register, dtype = self.block.registers[text], np.dtype(DTYPES[kind])
        if register.dtype.itemsize == dtype.itemsize:
            seen = register.view(dtype)
        else:
            seen = register.view(f"{'i' if dtype.kind == 'i' else 'u'}{register.dtype.itemsize}")

        def put(threads: Threads, values: Any) -> None:
            seen[threads] = values

        return put

    def address(self, index: int) -> Read:
        """`[register + number]`: int64."""
        first, _, offset = (part.strip() for part in self.text(index).strip("[] ").partition("+"))
        wide = self.block.registers[first].dtype.itemsize == 8 if first in self.block.registers else True
        base, more = self.reader(first, "u64" if wide else "u32"), int(offset or "0", 0)

        def at(threads: Threads) -> np.ndarray:
            count = len(self.block.numbers(threads))
            return np.broadcast_to(np.asarray(base(threads)).astype(np.int64) + more, (count,))

        return at


def _special(block: Block, text: str) -> Read | None:
    if text == "%tid.x":
        return lambda threads: block.numbers(threads).astype(np.uint32)
    name, _, axis = text.rpartition(".")
    if name in ("%ctaid", "%nctaid"):
        values = block.place if name == "%ctaid" else block.grid
        return lambda threads: np.uint32(values["xyz".index(axis)])
    return None
