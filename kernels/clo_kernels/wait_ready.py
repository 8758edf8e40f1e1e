"""Waits on the device until the CPU has stored this sequence number as the ready flag, or gives up and says so.

The flag must be exactly the number: one left from the last replay of a graph is another. What the flag announces is
read by later launches. The spin is bounded. Knows nothing about what it waits for. Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from clo_kernels import reference
from clo_kernels.checks import check_host_tensor, check_tensor, require
from clo_kernels.dispatch import FUSED, on_device, runs_kernel

MAX_SPINS = 2**22
"""At about a microsecond a look over the link, some seconds."""


# a bound of 1 or a multiple of 16 would compile anew, perhaps while the CPU waits for the launch
@triton.jit(do_not_specialize=["max_spins"])
def wait_ready_kernel(sequence, ready, report, max_spins):
    number = tl.load(sequence)
    nothing = tl.full([], 0, tl.int64)
    spins = tl.full([], 0, tl.int64)
    # an atomic that adds nothing: Triton makes it the acquiring load that it stands for, and test_ptx.py insists on
    # that, since a read-modify-write would not be atomic with the CPU's store across the link
    seen = tl.atomic_add(ready, nothing, sem="acquire", scope="sys")
    while (seen != number) & (spins < max_spins):
        seen = tl.atomic_add(ready, nothing, sem="acquire", scope="sys")
        spins += 1
    tl.debug_barrier()
    tl.store(report, number)
    tl.store(report + 1, seen)
    tl.store(report + 2, spins)


def wait_ready(
    sequence: torch.Tensor, ready: torch.Tensor, report: torch.Tensor, *, max_spins: int = MAX_SPINS
) -> None:
    """Return, in stream order, once `ready` equals `sequence` (int64 [1]) or after `max_spins` more looks.

    `ready` is in pinned memory (or on the device). `report`, int64 [3] on the device, gets the number waited for, the
    flag last seen and the looks beyond the first; `raise_if_late` reads it. One report per wait, or a later wait
    overwrites it.
    """
    check_tensor("sequence", sequence, (1,), torch.int64)
    check_tensor("ready", ready, (1,), torch.int64)
    check_host_tensor("ready", ready, sequence.device)
    check_tensor("report", report, (3,), torch.int64, sequence.device)
    require(0 <= max_spins < 2**31, f"max_spins = {max_spins}, expected 0 to 2**31 - 1")
    if not runs_kernel(sequence):
        reference.wait_ready(sequence, ready, report, max_spins=max_spins)
        return
    with on_device(sequence):
        wait_ready_kernel[(1,)](sequence, ready, report, max_spins, num_warps=1, **FUSED)


def raise_if_late(flag: str, report: torch.Tensor) -> None:
    """Raise `TimeoutError` with `flag`'s name and the numbers if the wait that wrote `report` gave up. Synchronises."""
    number, seen, spins = report.tolist()
    if seen != number:
        raise TimeoutError(f"{flag}: waited for {number}, saw {seen} after {spins} spins")
