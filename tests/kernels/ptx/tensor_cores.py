"""Matrix products, and matrices from and to shared memory (PTX ISA: figures of matrix fragments)."""

from __future__ import annotations

import re

import numpy as np

from .block import WARP, Operands, Run, Threads, UnsupportedError
from .memory import FaultError
from .numbers import HALVES, halves, joined


def _fragments(operands: Operands, threads: Threads, texts: list[str], kind: str) -> np.ndarray:
    """Registers `[warps, registers, 32]` of whole warps."""
    block = operands.block
    if len(block.numbers(threads)) % WARP:
        raise FaultError(f"{operands.instruction.text}: not by whole warps")
    values = [np.broadcast_to(operands.reader(text, kind)(threads), block.numbers(threads).shape) for text in texts]
    return np.stack([each.reshape(-1, WARP) for each in values], 1)


LANE = np.arange(WARP)
GROUP, IN_GROUP = LANE // 4, LANE % 4


def _numbers_of(bits: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    low, high = halves(bits)
    return HALVES[kind][0](low), HALVES[kind][0](high)


def _left_matrix(bits: np.ndarray, kind: str) -> np.ndarray:
    """`[warps, 16, 16]` of the registers `[warps, 4, 32]` of a product's left matrix."""
    matrix = np.zeros((len(bits), 16, 16))
    for register in range(4):
        rows, columns = GROUP + 8 * (register % 2), 2 * IN_GROUP + 8 * (register // 2)
        for side, values in enumerate(_numbers_of(bits[:, register], kind)):
            matrix[:, rows, columns + side] = values
    return matrix


def matrix_product(operands: Operands, modifiers: list[str]) -> Run:
    """mma.sync.m16n8k16, of bfloat16 or float16 into float32."""
    if "m16n8k16" not in modifiers or modifiers[-1] != "f32" or modifiers[-2] not in ("bf16", "f16"):
        raise UnsupportedError(operands.instruction.text)
    kind = modifiers[-2]
    texts = [operands.parts(index) for index in range(4)]
    puts = [operands.writer(text, "f32") for text in texts[0]]

    def run(threads: Threads) -> None:
        left, right, start = (
            _fragments(operands, threads, texts[1], "b32"),
            _fragments(operands, threads, texts[2], "b32"),
            _fragments(operands, threads, texts[3], "f32"),
        )
        warps = len(left)
        b, c = np.zeros((warps, 16, 8)), np.zeros((warps, 16, 8))
        for register in range(2):
            for side, values in enumerate(_numbers_of(right[:, register], kind)):
                b[:, 2 * IN_GROUP + 8 * register + side, GROUP] = values
        for register in range(4):
            c[:, GROUP + 8 * (register // 2), 2 * IN_GROUP + register % 2] = start[:, register]
        found = (_left_matrix(left, kind) @ b + c).astype(np.float32)
        for register, put in enumerate(puts):
            put(threads, found[:, GROUP + 8 * (register // 2), 2 * IN_GROUP + register % 2].reshape(-1))

    return run


SWIZZLES = {1: (128, 7), 2: (64, 3), 3: (32, 1)}
"""Of a descriptor of a matrix in shared memory: bytes of a row, and which bits of a row's number move its 16 bytes."""


def group_product(operands: Operands, modifiers: list[str]) -> Run:
    """wgmma.mma_async.m64nNk16 of registers with a matrix in shared memory whose rows have 16 neighbours of k."""
    if modifiers[0] != "mma_async":
        return lambda threads: None  # computed at once
    shape = next(found for each in modifiers if (found := re.fullmatch(r"m64n(\d+)k16", each)))
    if "{" not in operands.text(1) or operands.text(6) != "0":
        raise UnsupportedError(operands.instruction.text)
    kind, columns, block, text = modifiers[-1], int(shape[1]), operands.block, operands.instruction.text
    sums, left = operands.parts(0), operands.parts(1)
    puts, descriptor, adds = (
        [operands.writer(each, "f32") for each in sums],
        operands.read(2, "u64"),
        operands.read(3, "pred"),
    )

    def run(threads: Threads) -> None:
        a_bits, start = _fragments(operands, threads, left, "b32"), _fragments(operands, threads, sums, "f32")
        rows = _swizzled_rows(int(np.max(descriptor(threads))), columns)
        warps = np.repeat(block.who.warps[threads][:1], rows.size)
        found = block.memory["shared"].load(rows.ravel(), 16, 16, block.who, warps, text)
        b = HALVES[kind][0](found.view(np.uint16).reshape(columns, 16)).T
        product = _left_matrix(a_bits, kind) @ b.astype(np.float64)
        for register, put in enumerate(puts):
            row, column = GROUP + 8 * (register % 4 // 2), 8 * (register // 4) + 2 * IN_GROUP + register % 2
            before = start[:, register] if np.all(adds(threads)) else 0.0
            put(threads, (product[:, row, column] + before).astype(np.float32).ravel())

    return run


def _swizzled_rows(descriptor: int, rows: int) -> np.ndarray:
    """Addresses `[rows, 2]` of the 16 bytes that hold eight numbers each."""
    mode = descriptor >> 62
    if mode not in SWIZZLES:
        raise UnsupportedError("matrices in shared memory that are not swizzled")
    first, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    width, moved = SWIZZLES[mode]
    row = np.arange(rows)[:, None]
    at = first + row % 8 * width + row // 8 * stride + 16 * np.arange(2)
    found: np.ndarray = at ^ ((at >> 7 & moved) << 4)
    return found


def load_matrices(operands: Operands, modifiers: list[str]) -> Run:
    """ldmatrix.m8n8.xN[.trans]"""
    block, at, text = operands.block, operands.address(1), operands.instruction.text
    puts, across, memory = (
        [operands.writer(part, "b32") for part in operands.parts(0)],
        "trans" in modifiers,
        block.memory,
    )

    def run(threads: Threads) -> None:
        addresses, warps = at(threads).reshape(-1, WARP), block.who.warps[threads].reshape(-1, WARP)
        for number, put in enumerate(puts):
            rows, of = addresses[:, 8 * number : 8 * number + 8], warps[:, :8]
            found = memory["shared"].load(rows.ravel(), 16, 16, block.who, of.ravel(), text)
            matrix = found.view(np.uint16).reshape(-1, 8, 8)
            matrix = matrix.transpose(0, 2, 1) if across else matrix
            put(threads, joined(matrix[:, GROUP, 2 * IN_GROUP], matrix[:, GROUP, 2 * IN_GROUP + 1]).ravel())

    return run


def store_matrices(operands: Operands, modifiers: list[str]) -> Run:
    """stmatrix.m8n8.xN[.trans]"""
    block, at, text = operands.block, operands.address(0), operands.instruction.text
    texts, across, memory = operands.parts(1), "trans" in modifiers, block.memory

    def run(threads: Threads) -> None:
        addresses, warps = at(threads).reshape(-1, WARP), block.who.warps[threads].reshape(-1, WARP)
        given = _fragments(operands, threads, texts, "b32")
        for number in range(len(texts)):
            matrix = np.zeros((len(given), 8, 8), np.uint16)
            for side, values in enumerate(halves(given[:, number])):
                matrix[:, GROUP, 2 * IN_GROUP + side] = values
            matrix = np.ascontiguousarray(matrix.transpose(0, 2, 1) if across else matrix)
            rows, of = addresses[:, 8 * number : 8 * number + 8], warps[:, :8]
            memory["shared"].store(rows.ravel(), matrix.view(np.uint8).reshape(-1, 16), 16, block.who, of.ravel(), text)

    return run
