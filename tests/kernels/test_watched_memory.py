"""What `ptx/` says of kernels that do what no kernel may: the faults it is there to find."""

import os

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif("CLO_TEST_COMPILED" not in os.environ, reason="for compiled kernels: test_compiled.py")
THREADS = 128


@pytest.fixture
def fault():
    from tests.kernels.ptx.memory import FaultError

    return FaultError


@triton.jit
def neighbours(values, out, barrier: tl.constexpr, count: tl.constexpr):
    """Each thread reads what another has written."""
    at = tl.arange(0, count)
    tl.store(values + at, at)
    if barrier:
        tl.debug_barrier()
    tl.store(out + at, tl.load(values + (at + 37) % count))


@triton.jit
def counted(total):
    """Blocks that all change one number."""
    tl.store(total, tl.load(total) + tl.program_id(0))


@triton.jit
def copied(source, target, count, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(target + at, tl.load(source + at, mask=at < count), mask=at < count)


def test_a_barrier_is_missed(fault):
    values, out = (torch.zeros(THREADS, dtype=torch.int32) for _ in range(2))
    with pytest.raises(fault, match=r"race: .*test_watched_memory\.py:\d+.* with .*test_watched_memory\.py:\d+"):
        neighbours[(1,)](values, out, barrier=False, count=THREADS)
    neighbours[(1,)](values, out, barrier=True, count=THREADS)
    assert torch.equal(out, (torch.arange(THREADS, dtype=torch.int32) + 37) % THREADS)


def test_blocks_must_not_share_what_one_changes(fault):
    total = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(fault, match=r"race: .*block \d"):
        counted[(3,)](total)


def test_what_is_outside_is_neither_read_nor_written(fault):
    source, target = torch.arange(100, dtype=torch.int32), torch.zeros(100, dtype=torch.int32)
    copied[(4,)](source, target, 100, block=32)
    assert torch.equal(source, target)
    with pytest.raises(fault, match="28 global addresses outside"):
        copied[(4,)](source, target, 128, block=32)


def test_wide_loads_are_aligned(fault):
    """A pointer that is said to be a multiple of 16 and is not: Triton looks at the first launch's only."""
    from tests.kernels.ptx.launches import Launch

    launched = []
    source, target = torch.arange(128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    before = Launch.__call__
    try:
        Launch.__call__ = lambda self, *given: launched.append((self, given))
        copied[(1,)](source, target, 64, block=128, num_warps=1)
    finally:
        Launch.__call__ = before
    kernel, given = launched[0]
    moved = [each[1:] if each is source else each for each in given]
    with pytest.raises(fault, match="no multiple of 16"):
        kernel(*moved)
