"""How far off kernel times are that were measured on another GPU: the table of docs/kernel-costs.md.

Each GPU's table stands in for each other's, as it is and carried over along the roofline, at shapes of decode steps:
every power of two of rows up to 64, layers as wide as those of models from 1B to 70B, contexts from 2K to 64K tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from clo import presets
from clo.kernel_scaling import measured_on, scaled_seconds
from clo.kernel_tables import KernelTable
from clo.specs import MachineSpec

GEMMS = ((1, 2, 4, 8, 16, 32, 64), (2048, 4096, 6144, 8192, 14336, 28672), (2048, 4096, 8192, 14336))
"""m, n, k"""
ATTENTION = ((1, 2, 4, 8, 16, 32), (32,), (8,), (128,), (2048, 4096, 8192, 16384, 32768, 65536))
"""batch, query heads, KV heads, head_dim, KV tokens"""


def main() -> None:
    machines = {name: machine for name in presets.names("profiles") if _measured(machine := presets.load_machine(name))}
    for kind, sizes in _KINDS:
        print(f"\n{kind}: carried over (in brackets: as it is)\n")
        print(f"| Measured on | {' | '.join(machines)} |\n|---|{'---|' * len(machines)}")
        for source in machines:
            row = (
                "" if source == name else _errors(source, machine, kind, sizes) for name, machine in machines.items()
            )
            print(f"| {source} | {' | '.join(row)} |")


def _measured(machine: MachineSpec) -> bool:
    return measured_on(_table(machine.profile, "gemm"), machine.gpu)


_KINDS = (("gemm", GEMMS), ("decode_attention", ATTENTION))


def _errors(source: str, machine: MachineSpec, kind: str, sizes: tuple[tuple[int, ...], ...]) -> str:
    points = [axis.ravel() for axis in np.meshgrid(*(np.array(axis, dtype=float) for axis in sizes), indexing="ij")]
    borrowed = _table(source, kind)
    truth = _table(machine.profile, kind).seconds(*points)
    as_it_is, carried_over = borrowed.seconds(*points), scaled_seconds(borrowed, machine.gpu, *points)
    return f"{_error(carried_over, truth)} ({np.median(np.abs(as_it_is / truth - 1)):.0%})"


def _table(profile: str, kind: str) -> KernelTable:
    table: KernelTable = getattr(presets.load_named_profile(profile), kind)
    return table


def _error(seconds: Any, truth: Any) -> str:
    relative = np.abs(seconds / truth - 1)
    return f"{np.median(relative):.0%} / {np.percentile(relative, 90):.0%}"


if __name__ == "__main__":
    main()
