"""What this machine can do at best: the limits that figures stand beside, measured in the same run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clo_kernels_bench.figures import Figure
from clo_kernels_bench.timing import event_samples

COPY_BYTES = 256 << 20
MEMORY_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Peaks:
    """Bytes per second."""

    h2d: float
    hbm: float

    def copy_us(self, num_bytes: float) -> float:
        """A copy of pinned host memory by a copy engine."""
        return num_bytes / self.h2d * 1e6

    @property
    def copy_limit(self) -> str:
        """What figures that `copy_us` limits say of it."""
        return f"pinned copy, {self.h2d / 1e9:.1f} GB/s in this run"

    def memory_us(self, num_bytes: float) -> float:
        """Reading device memory."""
        return num_bytes / self.hbm * 1e6


def sheet_bytes_per_s(device: torch.device) -> float | None:
    """Device memory rate from clock and bus width as the driver reports them; None where it does not."""
    properties = torch.cuda.get_device_properties(device)
    clock_khz = getattr(properties, "memory_clock_rate", 0)
    bus_bits = getattr(properties, "memory_bus_width", 0)
    return 2e3 * clock_khz * bus_bits / 8 or None


def measure_peaks(device: torch.device, *, quick: bool) -> tuple[Peaks, list[Figure]]:
    """Pinned copies both ways, a device copy (reads and writes counted), a reduction (reads)."""
    there = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device=device)
    host = there.cpu().pin_memory()
    source = torch.randn((MEMORY_BYTES >> (2 if quick else 0)) // 4, device=device)
    target = torch.empty_like(source)
    memory_bytes = float(source.numel() * 4)
    sheet = sheet_bytes_per_s(device)
    measured = {
        "pinned_copy_h2d": (COPY_BYTES, event_samples(lambda: there.copy_(host, non_blocking=True), repeats=10)),
        "pinned_copy_d2h": (COPY_BYTES, event_samples(lambda: host.copy_(there, non_blocking=True), repeats=10)),
        "device_copy": (2 * memory_bytes, event_samples(lambda: target.copy_(source), repeats=10)),
        "device_read": (memory_bytes, event_samples(lambda: source.sum(), repeats=10)),
    }
    figures = [
        Figure(
            operation=name,
            case={"MiB": int(num_bytes) >> 20},
            samples_us=samples,
            num_bytes=float(num_bytes),
            limit_us=num_bytes / sheet * 1e6 if sheet and name.startswith("device") else None,
            limit="memory clock times bus width" if sheet and name.startswith("device") else "",
        )
        for name, (num_bytes, samples) in measured.items()
    ]
    rate = {figure.operation: figure.bytes_per_s or 0.0 for figure in figures}
    return Peaks(h2d=rate["pinned_copy_h2d"], hbm=max(rate["device_copy"], rate["device_read"])), figures
