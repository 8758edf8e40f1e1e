"""PTX as Triton writes it, taken apart: registers, parameters, labels, instructions. Knows no meaning of any."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

COMMENT = re.compile(r"//.*")
SOURCE = re.compile(r"\.loc.*// (\S.*)")
STATEMENT = re.compile(r"^(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*?);?$")
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
REGISTERS = re.compile(r"\.reg \.(\w+)\s+(%?\w+)(?:<(\d+)>)?;")
PARAMETER = re.compile(r"\.param \.(\w+).*?(\w+),?$")
CONSTANT = re.compile(r"\.global .*?\.(b\d+) (\S+)\[\d+\] = \{(.*)\};")
LOCAL = re.compile(r"\.local .*?\.b8\s+(\w+)\[(\d+)\];")


@dataclass(frozen=True, slots=True)
class Instruction:
    """`@guard opcode operands;`"""

    opcode: str
    operands: tuple[str, ...]
    guard: str | None
    guard_is: bool
    text: str


@dataclass(frozen=True, slots=True)
class Program:
    """One kernel."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    registers: dict[str, str]
    """Type by name."""
    parameters: tuple[tuple[str, str], ...]
    """Name and type, in order."""
    constants: dict[str, tuple[str, tuple[int, ...]]]
    local_bytes: int


@dataclass
class _Parts:
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    parameters: list[tuple[str, str]] = field(default_factory=list)
    constants: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    local_bytes: int = 0
    source: str = ""


def parse(ptx: str) -> Program:
    """Of one entry point."""
    parts, depth = _Parts(), 0
    for written in ptx.splitlines():
        if found := SOURCE.search(written):
            parts.source = found[1]
        line = COMMENT.sub("", written).strip()
        depth += (line == "{") - (line == "}")
        if line == "}" and not depth:
            break
        _take(line, parts)
    given = (parts.labels, parts.registers, tuple(parts.parameters), parts.constants, parts.local_bytes)
    return Program(tuple(parts.instructions), *given)


def _take(line: str, parts: _Parts) -> None:
    if line.endswith(":"):
        parts.labels[line[:-1]] = len(parts.instructions)
    elif line.startswith("."):
        _declare(line, parts)
    elif found := STATEMENT.match(line):
        negated, guard, opcode, rest = found.groups()
        operands = tuple(part.strip() for part in OPERAND.findall(rest))
        parts.instructions.append(Instruction(opcode, operands, guard, not negated, f"{line} <{parts.source}>"))
    elif line not in ("", "{", "}", ")"):
        raise ValueError(f"not understood: {line}")


def _declare(line: str, parts: _Parts) -> None:
    if found := REGISTERS.match(line):
        kind, name, count = found.groups()
        names = [name] if count is None else [f"{name}{number}" for number in range(int(count))]
        parts.registers |= dict.fromkeys(names, kind)
    elif found := PARAMETER.match(line):
        parts.parameters.append((found[2], found[1]))
    elif found := CONSTANT.match(line):
        parts.constants[found[2]] = found[1], tuple(int(number) for number in found[3].split(","))
    elif found := LOCAL.match(line):
        parts.local_bytes = int(found[2])
