"""What a config says of quantised weights and caches: how wide those of attention, of MLPs and of experts are."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

BF16, FP8 = 2.0, 1.0
NVFP4, MXFP4 = 0.5 + 1 / 16, 0.5 + 1 / 32
"""Bytes of a weight of four bits, with its share of a scale of a byte for every 16 or 32."""
_ALGORITHMS = {"FP8": FP8, "MXFP8": FP8, "NVFP4": NVFP4, "W4A16_NVFP4": NVFP4, "MXFP4": MXFP4}
"""By ModelOpt's names. Scales of 8-bit weights are not counted: they are 3% at most."""
_FLOAT8 = (8, "float")
_FLOAT_GROUPS = {16: NVFP4, 32: MXFP4}
_CACHES = ("kv_cache_quant_algo", "kv_cache_scheme")
_OF_CACHES = (None, "modelopt", "compressed-tensors")
"""Methods that may quantise the cache alone."""
_EXCLUDED = ("exclude_modules", "ignore", "modules_to_not_convert", "ignored_layers")
_MIXED = "MIXED_PRECISION"

_ATTENTION = re.compile(r"self_attn|linear_attn|\.attn\b")
_SHARED = re.compile(r"shared_experts?(?!_gate)")
_MLP = re.compile(r"(mlp|ffn)(\*|\\?\.\(?(gate_up|gate_proj|gate\||up|down|w\d))")
_EXPERTS = re.compile(r"experts")


class Widths(NamedTuple):
    """Bytes of a weight: of what is around attention, of MLPs and shared experts, of the other experts."""

    attention: float
    mlp: float
    experts: float


class UnknownWidthError(ValueError):
    """A quantisation that is not known here; says what it is, and which `field` of a model to give instead."""

    field = "weight_bytes_per_value"


class UnknownCacheError(UnknownWidthError):
    """That of a cache."""

    field = "kv_bytes_per_value"


def weight_widths(config: dict[str, Any]) -> Widths:
    """As the config says, or as it does not: bf16. Raises `UnknownWidthError` that names field and value."""
    quantized = config.get("quantization_config")
    if not quantized:
        return Widths(BF16, BF16, BF16)
    if not isinstance(quantized, dict):
        raise UnknownWidthError(f"{quantized!r}: a JSON object is expected")
    if quantized.get("quant_algo") == _MIXED:
        return _of_each(quantized)
    width, excluded = _width(quantized), _excluded(quantized)
    if width == FP8:
        return Widths(FP8, FP8, FP8)  # what such a list holds beyond norms, routers and the head is little
    return Widths(
        BF16 if any(map(_ATTENTION.search, excluded)) else width,
        BF16 if any(_SHARED.search(name) or _MLP.search(name) for name in excluded) else width,
        width,
    )


def cache_width(config: dict[str, Any]) -> float:
    """Bytes of a value in the KV cache that the weights were prepared for, and that vLLM then serves them with: bf16
    unless the config says fp8. Raises `UnknownCacheError`."""
    quantized = config.get("quantization_config") or {}
    algorithm, scheme = (quantized.get(name) for name in _CACHES)
    if algorithm not in (None, "FP8"):
        raise UnknownCacheError(f"kv_cache_quant_algo = {algorithm!r}")
    bits = (scheme.get("num_bits"), scheme.get("type")) if isinstance(scheme, dict) else scheme
    if bits not in (None, "FP8", _FLOAT8):
        raise UnknownCacheError(f"kv_cache_scheme = {scheme!r}")
    return BF16 if algorithm is None and scheme is None else FP8


def _width(quantized: dict[str, Any]) -> float:
    """Of all that is quantised."""
    method, algorithm = quantized.get("quant_method"), quantized.get("quant_algo")
    if algorithm:
        return _algorithm(algorithm)
    if method in _OF_CACHES and not quantized.get("config_groups") and any(map(quantized.get, _CACHES)):
        return BF16  # nothing but the cache is quantised
    if method == "fp8":
        return FP8
    if method == "mxfp4":
        return MXFP4
    if method in ("awq", "gptq"):
        group = quantized.get("group_size", 128)
        if quantized.get("bits") == 4 and isinstance(group, int) and group > 0:
            return 0.5 + 2.5 / group  # a scale of two bytes and a zero of four bits
        raise UnknownWidthError(f"quant_method = {method!r}: known with 4 bits in groups only")
    if method == "compressed-tensors":
        return _compressed(quantized)
    raise UnknownWidthError(f"quant_method = {method!r}")


def _algorithm(name: Any) -> float:
    if name not in _ALGORITHMS:
        raise UnknownWidthError(f"quant_algo = {name!r}")
    return _ALGORITHMS[name]


def _compressed(quantized: dict[str, Any]) -> float:
    groups = quantized.get("config_groups")
    weights = [each.get("weights") for each in groups.values()] if isinstance(groups, dict) else []
    if len(weights) != 1 or not isinstance(weights[0], dict):
        raise UnknownWidthError("config_groups: one with weights is expected")
    bits, kind, size = (weights[0].get(name) for name in ("num_bits", "type", "group_size"))
    if (bits, kind) == _FLOAT8:
        return FP8
    if (bits, kind) == (4, "float") and size in _FLOAT_GROUPS:
        return _FLOAT_GROUPS[size]
    if (bits, kind) == (4, "int") and isinstance(size, int) and size > 0:
        return 0.5 + 2.0 / size
    raise UnknownWidthError(f"config_groups: weights of num_bits = {bits!r}, type = {kind!r}, group_size = {size!r}")


def _excluded(quantized: dict[str, Any]) -> list[str]:
    found: Any = next((quantized[name] for name in _EXCLUDED if quantized.get(name)), [])
    if not isinstance(found, list):
        raise UnknownWidthError(f"{found!r}: a list of what is not quantised is expected")
    return [str(each) for each in found]


def _of_each(quantized: dict[str, Any]) -> Widths:
    """Of weights whose widths are said for every layer."""
    layers = quantized.get("quantized_layers")
    if not isinstance(layers, dict) or not all(isinstance(each, dict) for each in layers.values()):
        raise UnknownWidthError(f"quant_algo = {_MIXED}: no quantized_layers say which")
    parts: dict[str, set[float]] = {"attention": set(), "mlp": set(), "experts": set()}
    for name, each in layers.items():
        if part := _part(name):
            parts[part].add(_algorithm(each.get("quant_algo")))
    return Widths(*(_one(part, widths) for part, widths in parts.items()))


def _part(name: str) -> str:
    if _EXPERTS.search(name) and not _SHARED.search(name):
        return "experts"
    if _ATTENTION.search(name):
        return "attention"
    return "mlp" if _SHARED.search(name) or _MLP.search(name) else ""


def _one(part: str, widths: Iterable[float]) -> float:
    found = sorted(widths)
    if len(found) > 1:
        raise UnknownWidthError(f"quantized_layers: weights of {part} have {len(found)} widths")
    return found[0] if found else BF16
