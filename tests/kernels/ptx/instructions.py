"""What each PTX instruction does: those that Triton makes of these kernels. (PTX ISA)"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .accesses import copy, exchange, load, store
from .arithmetic import (
    approximately,
    divide,
    fused,
    high_and_carry,
    maximum,
    minimum,
    multiply,
    multiply_add,
    plainly,
    remainder,
)
from .bits import bit_field, compare, funnel_left, invert, permute, population, select, shift_left, shift_right
from .block import Block, Operands, Run, UnsupportedError
from .moves import convert, move, reduce, shuffle
from .program import Instruction
from .tensor_cores import group_product, load_matrices, matrix_product, store_matrices


def meaning(block: Block, instruction: Instruction) -> Run:
    """The function that an instruction is; its guard is looked at by whoever runs it."""
    name, *modifiers = instruction.opcode.split(".")
    made = _MEANINGS.get(name)
    if made is None:
        raise UnsupportedError(instruction.text)
    return made(Operands(block, instruction), modifiers)


def nothing(operands: Operands, modifiers: list[str]) -> Run:
    """What only orders is in order here."""
    return lambda threads: None


_MEANINGS: dict[str, Callable[[Operands, list[str]], Run]] = {
    "abs": plainly(np.abs), "add": plainly(np.add), "sub": plainly(np.subtract), "neg": plainly(np.negative),
    "and": plainly(np.bitwise_and), "or": plainly(np.bitwise_or), "xor": plainly(np.bitwise_xor), "not": invert,
    "mul": multiply, "mad": multiply_add, "madc": high_and_carry, "fma": fused,
    "div": divide, "rem": remainder, "min": minimum, "max": maximum,
    "ex2": approximately(np.exp2), "lg2": approximately(np.log2), "sqrt": approximately(np.sqrt),
    "rsqrt": approximately(lambda x: 1 / np.sqrt(x)), "rcp": approximately(lambda x: 1 / x),
    "shl": shift_left, "shr": shift_right, "shf": funnel_left, "bfe": bit_field, "prmt": permute,
    "popc": population, "selp": select, "setp": compare, "mov": move, "cvt": convert,
    "shfl": shuffle, "redux": reduce,
    "ld": load, "st": store, "atom": exchange, "cp": copy, "fence": nothing,
    "cvta": move, "mma": matrix_product, "wgmma": group_product, "ldmatrix": load_matrices, "stmatrix": store_matrices,
}  # fmt: skip
