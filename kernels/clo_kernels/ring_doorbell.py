"""Asks the CPU's transfer threads for pages: a message into pinned memory, then a new sequence number as the doorbell.

The sequence number lives on the device and grows with every launch, so that replays of a graph ring anew. Stores of the
message are ordered before the doorbell by a barrier and a release at system scope. Knows nothing about what the message
means or when it is answered. Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from clo_kernels import reference
from clo_kernels.checks import check_host_tensor, check_tensor
from clo_kernels.dispatch import FUSED, on_device, runs_kernel
from clo_kernels.layout import INT32

MESSAGE_BLOCK = 1024


@triton.jit
def ring_doorbell_kernel(sequence, message, mailbox, doorbell, num_words, BLOCK: tl.constexpr):
    whole = num_words // 4 * 4  # 16 bytes at a time over the link, whatever the number of words
    for start in range(0, whole, BLOCK):
        word = start + tl.arange(0, BLOCK)
        tl.store(mailbox + word, tl.load(message + word, mask=word < whole, other=0), mask=word < whole)
    rest = whole + tl.arange(0, 4)
    tl.store(mailbox + rest, tl.load(message + rest, mask=rest < num_words, other=0), mask=rest < num_words)
    number = tl.load(sequence) + 1
    tl.debug_barrier()  # every thread's part of the message is stored
    tl.store(sequence, number)
    tl.atomic_xchg(doorbell, number, sem="release", scope="sys")


def ring_doorbell(sequence: torch.Tensor, message: torch.Tensor, mailbox: torch.Tensor, doorbell: torch.Tensor) -> None:
    """Copy `message` to `mailbox` (int32, same size), add 1 to `sequence` and store it to `doorbell` (int64 [1]).

    `sequence` and `message` are on the device, `mailbox` and `doorbell` in pinned memory (or on the device). Ring again
    only when the last message was answered: there is one mailbox.
    """
    check_tensor("sequence", sequence, (1,), torch.int64)
    check_tensor("message", message, (-1,), INT32, sequence.device)
    check_tensor("mailbox", mailbox, tuple(message.shape), INT32)
    check_tensor("doorbell", doorbell, (1,), torch.int64)
    check_host_tensor("mailbox", mailbox, sequence.device)
    check_host_tensor("doorbell", doorbell, sequence.device)
    if not runs_kernel(sequence):
        reference.ring_doorbell(sequence, message, mailbox, doorbell)
        return
    with on_device(sequence):
        ring_doorbell_kernel[(1,)](
            sequence, message, mailbox, doorbell, message.shape[0], BLOCK=MESSAGE_BLOCK, num_warps=4, **FUSED
        )
