"""Conversions at the edges: everything inside is SI seconds and bytes. Knows nothing about what is converted."""

US_PER_S = 1e6
MS_PER_S = 1e3
GB = 1e9


def format_seconds(seconds: float) -> str:
    """`0.0123` -> `12.3 ms`: three significant digits in the unit a reader expects."""
    for scale, unit in ((1.0, "s"), (MS_PER_S, "ms"), (US_PER_S, "us")):
        if abs(seconds) * scale >= 1.0:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * US_PER_S:.3g} us" if seconds else "0 s"


def format_bytes(num_bytes: float) -> str:
    """`2.75e11` -> `275 GB` (decimal units, as link and memory vendors count)."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(num_bytes) >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes:.0f} B"
