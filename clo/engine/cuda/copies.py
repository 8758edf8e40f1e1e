"""Copies of single rows from pinned memory to a CUDA device, each submitted by the driver's own call.

No tensor is made for a row. Not yet run on a GPU.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator

import torch

from clo.errors import EngineError

DRIVER = "libcuda.so.1"


def copy_rows(device: torch.Tensor, targets: torch.Tensor, host: torch.Tensor, sources: torch.Tensor) -> None:
    """Rows `sources` of pinned `host` to rows `targets` of `device`, `[rows, values]` both, on the current stream.

    The caller keeps both tensors until the stream has done them. Raises `EngineError` with the driver's code.
    """
    submit_rows(_driver(DRIVER), use(device.device), device, targets, host, sources)


def use(device: torch.device) -> int:
    """Let this thread, which may not have used `device` before, call the driver; the current stream's handle.

    The driver wants a context in each thread. `set_device` makes none where the device is the current one already, as
    the first is in a new thread; a question to its stream does.
    """
    torch.cuda.set_device(device)
    stream = torch.cuda.current_stream(device)
    stream.query()
    return int(stream.cuda_stream)


def submit_rows(
    driver: ctypes.CDLL,
    stream: int,
    device: torch.Tensor,
    targets: torch.Tensor,
    host: torch.Tensor,
    sources: torch.Tensor,
) -> None:
    """The same on a stream given by its handle."""
    for to, source, num_bytes in moves(device, device.data_ptr(), targets, host, sources):
        if code := driver.cuMemcpyHtoDAsync_v2(to, source, num_bytes, stream):
            raise EngineError(f"cuMemcpyHtoDAsync failed with code {code}")


def moves(
    device: torch.Tensor, first: int, targets: torch.Tensor, host: torch.Tensor, sources: torch.Tensor
) -> Iterator[tuple[int, int, int]]:
    """Where each row goes, where it is, and its bytes; `first` is the address by which `device` is written."""
    row_bytes, begin = host.nbytes // len(host), host.data_ptr()
    assert device.is_contiguous(), "rows of the device lie one after another"
    assert host.is_contiguous(), "rows of the host lie one after another"
    assert device.nbytes == row_bytes * len(device), "rows are of one length"
    for target, source in zip(targets.tolist(), sources.tolist(), strict=True):
        yield first + target * row_bytes, begin + source * row_bytes, row_bytes


@functools.cache
def _driver(name: str) -> ctypes.CDLL:
    return declared(ctypes.CDLL(name))


def declared(driver: ctypes.CDLL) -> ctypes.CDLL:
    """The function's types, after cuda.h."""
    driver.cuMemcpyHtoDAsync_v2.argtypes = (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return driver
