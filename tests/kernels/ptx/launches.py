"""Triton launches kernels as ever, and what it has compiled runs here: `install` once.

Blocks run one after another in random order, the warps of a block in turns of random length between barriers.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver

from clo_kernels import dispatch

from .block import WARP, Block, Run, Threads
from .instructions import meaning
from .memory import FaultError, Memory, of_process
from .program import Instruction, Program, parse

SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
LONGEST_TURN = 200


class NoDriver:
    """Says which GPU kernels are compiled for."""

    def __init__(self, architecture: int) -> None:
        self._target = GPUTarget("cuda", architecture, WARP)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def install(architecture: int, seed: int = 0) -> None:
    """Launches on any tensor run what is compiled for GPUs of `architecture`."""
    chance = np.random.default_rng(seed)

    def prepare(kernel: Any) -> None:
        if kernel.metadata.shared > SHARED_BYTES[architecture]:
            raise FaultError(f"{kernel.name}: {kernel.metadata.shared} bytes of shared memory")
        kernel._run = Launch(kernel, chance)

    driver.set_active(NoDriver(architecture))
    CompiledKernel._init_handles = prepare
    # machine code takes long and is not needed here: kept apart from what a GPU may find later
    CUDABackend.make_cubin = lambda *_: b""
    os.environ["TRITON_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"clo-ptx-{os.getuid()}")
    for module in list(sys.modules.values()):
        if getattr(module, "runs_kernel", None) is dispatch.runs_kernel and module is not dispatch:
            module.runs_kernel = _always
    dispatch.runs_kernel = _always


def _always(_: torch.Tensor) -> bool:
    """Wrappers run the kernel, not the reference."""
    return True


class Launch:
    """One compiled kernel."""

    def __init__(self, kernel: Any, chance: np.random.Generator) -> None:
        self.name, self._program, self._chance = kernel.name, parse(kernel.asm["ptx"]), chance
        self._threads, self._shared_bytes = kernel.metadata.num_warps * WARP, kernel.metadata.shared
        self._kinds = list(kernel.src.signature.values())

    def __call__(self, wide: int, high: int, deep: int, *given: Any) -> None:
        """As Triton calls its launcher: grid, stream, function, metadata twice, two hooks, arguments."""
        arguments = [value for value, kind in zip(given[6:], self._kinds, strict=True) if kind != "constexpr"]
        tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
        constants, kept = _constants(self._program)
        regions = [_region(tensor) for tensor in tensors] + kept
        block = Block(
            self._program,
            self._threads,
            _bound(self._program, arguments),
            (wide, high, deep),
            {
                "global": of_process(regions),
                "shared": _own("shared", self._shared_bytes),
                "local": _own("local", self._threads * self._program.local_bytes),
            },
            self._chance,
            constants,
        )
        run = Grid(block)
        for number in self._chance.permutation(wide * high * deep):
            run.block(int(number))


def _own(name: str, count: int) -> Memory:
    return Memory(name, np.zeros(count, np.uint8), [(0, count)])


def _region(tensor: torch.Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _bound(program: Program, arguments: list[Any]) -> dict[str, int]:
    """Parameters as bits; those that Triton adds are null."""
    bound = {name: 0 for name, _ in program.parameters}
    for (name, kind), value in zip(program.parameters, arguments, strict=False):
        if isinstance(value, torch.Tensor):
            bound[name] = value.data_ptr()
        elif kind.startswith("f"):
            bound[name] = int(np.float32(value).view(np.uint32))
        else:
            bound[name] = int(value)
    return bound


KEPT: dict[str, np.ndarray] = {}


def _constants(program: Program) -> tuple[dict[str, int], list[tuple[int, int]]]:
    """What names stand for: shared memory begins at 0, parameters are numbered, tables are where they are."""
    found = {"global_smem": 0, "__local_depot0": 0}
    found |= {name: 1 << 20 | number for number, (name, _) in enumerate(program.parameters)}
    regions = []
    for name, (kind, values) in program.constants.items():
        table = KEPT.setdefault(name, np.array(values, f"u{int(kind[1:]) // 8}"))
        found[name] = table.ctypes.data
        regions.append((table.ctypes.data, table.nbytes))
    return found, regions


class Grid:
    """Runs the blocks of one launch."""

    def __init__(self, block: Block) -> None:
        self._block, self._chance = block, block.chance
        self._runs: list[Run | None] = [None] * len(block.program.instructions)

    def block(self, number: int) -> None:
        """One after the other: shared memory holds nothing that means anything, nor do registers."""
        for name in ("shared", "local"):
            self._block.memory[name].forget(self._chance)
        self._block.begin(number)
        with np.errstate(all="ignore"):
            self._go()

    def _go(self) -> None:
        warps = [_Warp(slice(first, first + WARP)) for first in range(0, self._block.threads, WARP)]
        while any(warp.strands or warp.waiting for warp in warps):
            ready = [warp for warp in warps if warp.strands]
            if ready:
                self._turn(ready[self._chance.integers(len(ready))])
            else:
                self._block.who.epoch += 1
                for warp in warps:
                    warp.pass_barrier()

    def _turn(self, warp: _Warp) -> None:
        """Some instructions of a warp; of threads that have parted, those that are behind go first."""
        left = int(self._chance.integers(1, LONGEST_TURN))
        code, labels = self._block.program.instructions, self._block.program.labels
        while warp.strands and left > 0:
            place, threads = warp.behind()
            meeting = min(warp.strands, default=len(code))
            while left > 0:
                left -= 1
                instruction = code[place]
                some = self._guarded(instruction, threads)
                if instruction.opcode.startswith("bra"):
                    target = labels[instruction.operands[0]]
                    warp.add(target, some)
                    warp.add(place + 1, _without(self._block, threads, some))
                    break
                if instruction.opcode == "ret":
                    warp.add(place + 1, _without(self._block, threads, some))
                    break
                if instruction.opcode.startswith("bar.sync"):
                    warp.waiting.append((place + 1, threads))
                    break
                if some is not None:
                    self._run(place)(some)
                place += 1
                if place >= meeting:
                    warp.add(place, threads)
                    break
            else:
                warp.add(place, threads)

    def _run(self, place: int) -> Run:
        run = self._runs[place]
        if run is None:
            run = self._runs[place] = meaning(self._block, self._block.program.instructions[place])
        return run

    def _guarded(self, instruction: Instruction, threads: Threads) -> Threads | None:
        if instruction.guard is None:
            return threads
        holds = self._block.registers[instruction.guard][threads] == instruction.guard_is
        if holds.all():
            return threads
        return self._block.numbers(threads)[holds] if holds.any() else None


def _without(block: Block, threads: Threads, some: Threads | None) -> Threads | None:
    if some is None:
        return threads
    if some is threads:
        return None
    return np.setdiff1d(block.numbers(threads), some, assume_unique=True)


class _Warp:
    """Where its threads are."""

    def __init__(self, threads: slice) -> None:
        self._all = threads
        self.strands: dict[int, Threads] = {0: threads}
        self.waiting: list[tuple[int, Threads]] = []

    def behind(self) -> tuple[int, Threads]:
        """Those at the first place, taken out."""
        place = min(self.strands)
        return place, self.strands.pop(place)

    def add(self, place: int, threads: Threads | None) -> None:
        """They meet who is there."""
        if threads is None:
            return
        if place not in self.strands:
            self.strands[place] = threads
            return
        both = np.union1d(self.strands[place], threads)
        self.strands[place] = self._all if len(both) == WARP else both

    def pass_barrier(self) -> None:
        """All that wait go on."""
        for place, threads in self.waiting:
            self.add(place, threads)
        self.waiting.clear()
