"""`wait_ready`: returns when the number is there, gives up on any other, and says what it saw."""

import threading
import time

import pytest
import torch

from clo_kernels import reference
from clo_kernels.wait_ready import raise_if_late, wait_ready
from tests.kernels.helpers import DEVICE, needs_gpu
from tests.kernels.test_ring_doorbell import pinned, synchronize

BOTH = pytest.mark.parametrize("wait", [wait_ready, reference.wait_ready], ids=["kernel", "reference"])


def waiting(number, flag):
    report = torch.full((3,), -9, dtype=torch.int64, device=DEVICE)
    return torch.tensor([number], device=DEVICE), pinned(torch.tensor([flag])), report


@BOTH
def test_passes_at_once_when_ready(wait):
    sequence, ready, report = waiting(7, 7)
    wait(sequence, ready, report, max_spins=5)
    assert report.tolist() == [7, 7, 0]
    assert ready.item() == 7
    raise_if_late("ready flag", report)


@BOTH
@pytest.mark.parametrize("flag", [6, 8, 0], ids=["stale", "ahead", "never-set"])
def test_gives_up_on_another_number(flag, wait):
    sequence, ready, report = waiting(7, flag)
    wait(sequence, ready, report, max_spins=5)
    assert report.tolist() == [7, flag, 5]
    with pytest.raises(TimeoutError, match=f"layer 3: waited for 7, saw {flag} after 5 spins"):
        raise_if_late("layer 3", report)


def test_numbers_do_not_end_at_32_bits():
    sequence, ready, report = waiting(2**40 + 1, 1)
    wait_ready(sequence, ready, report, max_spins=2)
    assert report.tolist() == [2**40 + 1, 1, 2]


@BOTH
def test_waits_for_a_cpu_thread(wait):
    wait(*waiting(7, 7), max_spins=2**20)  # compiled: the thread's time is not spent on that
    synchronize()
    sequence, ready, report = waiting(7, 6)

    def answer():
        time.sleep(0.05)
        ready[0] = 7

    thread = threading.Thread(target=answer)
    thread.start()
    wait(sequence, ready, report, max_spins=2**20)
    thread.join()
    raise_if_late("ready flag", report)
    assert report[2] > 0


@needs_gpu
def test_later_launches_see_what_the_flag_announced():
    page = pinned(torch.zeros(2**16, dtype=torch.int32))
    for number in range(1, 101):
        sequence, ready, report = waiting(number, number - 1)
        torch.cuda.synchronize()
        wait_ready(sequence, ready, report)
        copied = page.to(DEVICE, non_blocking=True)
        page.fill_(number)
        ready[0] = number
        raise_if_late("ready flag", report)
        assert bool((copied == number).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_spins": -1}, "max_spins = -1, expected 0 to"),
        ({"report": torch.zeros(4).long()}, r"report: shape \[4\], expected \[3\]"),
        ({"ready": torch.zeros(1)}, "ready: dtype torch.float32, expected torch.int64"),
    ],
    ids=["spins", "report", "dtype"],
)
def test_refuses(change, message):
    arguments = {"sequence": torch.zeros(1).long(), "ready": torch.zeros(1).long(), "report": torch.zeros(3).long()}
    with pytest.raises(ValueError, match=message):
        wait_ready(**{**arguments, **change})
