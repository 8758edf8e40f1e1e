"""Bits as numbers and back, as PTX rounds them."""

from __future__ import annotations

import numpy as np

DTYPES = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
    "pred": np.bool_,
}  # fmt: skip
SMALLEST = np.float32(2.0**-126)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """float32 of bfloat16 bits."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def halves(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lower and the upper 16 bits."""
    bits = np.asarray(bits, np.uint32)
    return (bits & np.uint32(0xFFFF)).astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)


def joined(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """32 bits of two times 16."""
    return np.asarray(low).astype(np.uint32) | (np.asarray(high).astype(np.uint32) << np.uint32(16))


def flushed(values: np.ndarray) -> np.ndarray:
    """Subnormal numbers are zero (.ftz)."""
    return np.where(np.abs(values) < SMALLEST, np.copysign(np.float32(0), values), values).astype(np.float32)


def approximate(values: np.ndarray) -> np.ndarray:
    """One unit in the last place off, up or down by the number: nothing may rely on more."""
    values = np.asarray(values, np.float32)
    up = (values.view(np.uint32) * np.uint32(2654435761)) >> np.uint32(31) == 1
    exact = (values == np.rint(values)) | ~np.isfinite(values)
    return np.where(exact, values, np.nextafter(values, np.where(up, np.inf, -np.inf).astype(np.float32)))


def to_integer(values: np.ndarray, kind: str) -> np.ndarray:
    """As `cvt` does it: beyond the range the nearest, no number is zero."""
    limits = np.iinfo(DTYPES[kind])
    clipped = np.clip(np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=2.0**70, neginf=-(2.0**70)), -9e18, 9e18)
    return np.clip(clipped.astype(np.int64), limits.min, min(limits.max, 2**63 - 1)).astype(DTYPES[kind])


def _from_f16(bits: np.ndarray) -> np.ndarray:
    return np.asarray(bits, np.uint16).view(np.float16).astype(np.float32)


def _to_f16(values: np.ndarray) -> np.ndarray:
    return np.asarray(values).astype(np.float16).view(np.uint16)


HALVES = {"bf16": (from_bf16, to_bf16), "f16": (_from_f16, _to_f16)}
"""float32 of 16 bits, and 16 bits of float32."""
