"""`ring_doorbell`: the message is there, the number grows; on a GPU, the CPU never sees one without the other."""

import threading

import pytest
import torch

from clo_kernels import reference
from clo_kernels.checks import check_host_tensor
from clo_kernels.ring_doorbell import ring_doorbell
from tests.kernels.helpers import DEVICE, needs_gpu


def pinned(tensor):
    return tensor.pin_memory() if DEVICE == "cuda" else tensor


def flags(words):
    mailbox = pinned(torch.full((words,), -1, dtype=torch.int32))
    return torch.full((1,), 41, device=DEVICE), mailbox, pinned(torch.zeros(1, dtype=torch.int64))


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("ring", [ring_doorbell, reference.ring_doorbell], ids=["kernel", "reference"])
@pytest.mark.parametrize("words", [0, 1, 3, 4, 1026, 1500])
def test_message_and_number_arrive(words, ring):
    sequence, mailbox, doorbell = flags(words)
    for number in (42, 43):
        message = torch.randint(-(2**31), 2**31, (words,), dtype=torch.int64).to(DEVICE, torch.int32)
        ring(sequence, message, mailbox, doorbell)
        synchronize()
        assert (sequence.item(), doorbell.item()) == (number, number)
        assert torch.equal(mailbox, message.cpu())


def test_an_empty_mailbox_need_not_be_pinned():
    """Torch calls no empty tensor pinned."""
    check_host_tensor("mailbox", torch.empty(0), torch.device("cuda", 0))
    with pytest.raises(ValueError, match="mailbox: on cpu, expected cuda:0 or pinned host memory"):
        check_host_tensor("mailbox", torch.empty(1), torch.device("cuda", 0))


@needs_gpu
def test_cpu_sees_the_whole_message_with_the_number():
    sequence, mailbox, doorbell = flags(20_000)
    torn = []

    def listen(number):
        while doorbell.item() != number:
            pass
        torn.append((mailbox != number).sum().item())

    for number in range(42, 142):
        message = torch.full((20_000,), number, dtype=torch.int32, device=DEVICE)
        synchronize()
        listener = threading.Thread(target=listen, args=(number,), daemon=True)
        listener.start()
        ring_doorbell(sequence, message, mailbox, doorbell)
        listener.join(timeout=10)
    assert torn == [0] * 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"doorbell": torch.zeros(1).int()}, "doorbell: dtype torch.int32, expected torch.int64"),
        ({"mailbox": torch.zeros(5).int()}, r"mailbox: shape \[5\], expected \[4\]"),
        ({"sequence": torch.zeros(2).long()}, r"sequence: shape \[2\], expected \[1\]"),
    ],
    ids=["dtype", "sizes", "sequence"],
)
def test_refuses(change, message):
    arguments = {
        "sequence": torch.zeros(1).long(),
        "message": torch.zeros(4).int(),
        "mailbox": torch.zeros(4).int(),
        "doorbell": torch.zeros(1).long(),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        ring_doorbell(**arguments)
