"""CPU stores into device memory through the PCIe BAR, by GDRCopy where it is installed. Knows nothing about designs.

Not yet run with GDRCopy: tested against a stand-in of its library. Kernels that begin after such stores see them; for a
kernel that polls a flag meanwhile they are flushed to the device before the flag is raised.
"""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass

import torch

from clo.engine.cuda.copies import DRIVER, moves, use
from clo.errors import EngineError

LIBRARIES = ("libgdrapi.so.2", "libgdrapi.so")
DEVICE_PAGE = 1 << 16
"""Device memory is mapped in pages of 64 KiB."""
CURRENT_CONTEXT, TO_OWNER = 0, 100
"""Of `cuFlushGPUDirectRDMAWrites`: which writes, and to whom they must be visible."""


class _Handle(ctypes.Structure):
    """`gdr_mh_t`: passed by value."""

    _fields_ = (("number", ctypes.c_ulong),)


@dataclass(frozen=True, slots=True)
class _Window:
    """One tensor's memory as the CPU sees it; it is not freed while mapped."""

    tensor: torch.Tensor
    handle: _Handle
    mapped: int
    size: int
    first: int


class Bar:
    """Tensors on one device that CPU threads write. Close it; windows open at the first write to a tensor."""

    def __init__(self, gdr: ctypes.CDLL, driver: ctypes.CDLL, device: torch.device) -> None:
        self._gdr, self._driver, self._device = _declared(gdr), driver, device
        self._windows: dict[int, _Window] = {}
        self._session = self._gdr.gdr_open()
        if not self._session:
            raise EngineError("GDRCopy: gdr_open failed: is its driver, gdrdrv, loaded?")
        self.close = weakref.finalize(self, _close, self._gdr, self._session, self._windows)

    def prepare(self, tensor: torch.Tensor) -> None:
        """Open the window of `tensor` `[rows, values]`. Raises `EngineError` if it cannot be mapped."""
        address = tensor.data_ptr()
        if address in self._windows:
            return
        start = address - address % DEVICE_PAGE
        size = -(-(address + tensor.nbytes - start) // DEVICE_PAGE) * DEVICE_PAGE
        handle, mapped = _Handle(), ctypes.c_void_p()
        _check("gdr_pin_buffer", self._gdr.gdr_pin_buffer(self._session, start, size, 0, 0, ctypes.byref(handle)))
        try:
            _check("gdr_map", self._gdr.gdr_map(self._session, handle, ctypes.byref(mapped), size))
        except EngineError:
            self._gdr.gdr_unpin_buffer(self._session, handle)
            raise
        base = mapped.value or 0
        self._windows[address] = _Window(tensor, handle, base, size, base + address - start)

    def write(self, tensor: torch.Tensor, targets: torch.Tensor, host: torch.Tensor, sources: torch.Tensor) -> None:
        """Rows `sources` of `host` to rows `targets` of a prepared `tensor`, both int64; from any thread."""
        window = self._windows[tensor.data_ptr()]
        for to, source, num_bytes in moves(tensor, window.first, targets, host, sources):
            _check("gdr_copy_to_mapping", self._gdr.gdr_copy_to_mapping(window.handle, to, source, num_bytes))

    def flush(self) -> None:
        """What was written is visible to kernels of the device, those that run already too."""
        if self._device.type == "cuda":
            use(self._device)
        _check("cuFlushGPUDirectRDMAWrites", self._driver.cuFlushGPUDirectRDMAWrites(CURRENT_CONTEXT, TO_OWNER))


def open_bar(device: torch.device) -> Bar | None:
    """None where GDRCopy or its driver is not installed."""
    for name in LIBRARIES:
        try:
            return Bar(ctypes.CDLL(name), ctypes.CDLL(DRIVER), device)
        except (OSError, EngineError):
            continue
    return None


def is_installed(device: torch.device) -> bool:
    """Whether there is a GDRCopy to use."""
    bar = open_bar(device)
    if bar is not None:
        bar.close()
    return bar is not None


def _declared(gdr: ctypes.CDLL) -> ctypes.CDLL:
    """The functions' types, after gdrapi.h."""
    session, address, handle = ctypes.c_void_p, ctypes.c_void_p, _Handle
    gdr.gdr_open.argtypes, gdr.gdr_open.restype = (), session
    gdr.gdr_close.argtypes = (session,)
    gdr.gdr_pin_buffer.argtypes = (
        session,
        ctypes.c_ulong,
        ctypes.c_size_t,
        ctypes.c_uint64,
        ctypes.c_uint32,
        ctypes.POINTER(handle),
    )
    gdr.gdr_unpin_buffer.argtypes = (session, handle)
    gdr.gdr_map.argtypes = (session, handle, ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t)
    gdr.gdr_unmap.argtypes = (session, handle, address, ctypes.c_size_t)
    gdr.gdr_copy_to_mapping.argtypes = (handle, address, address, ctypes.c_size_t)
    return gdr


def _close(gdr: ctypes.CDLL, session: int, windows: dict[int, _Window]) -> None:
    """Unmap, then unpin, then end the session."""
    for window in windows.values():
        gdr.gdr_unmap(session, window.handle, window.mapped, window.size)
        gdr.gdr_unpin_buffer(session, window.handle)
    windows.clear()
    gdr.gdr_close(session)


def _check(what: str, code: int) -> None:
    if code:
        raise EngineError(f"GDRCopy: {what} failed with code {code}")
