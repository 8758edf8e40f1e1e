"""The real decoder: a model decodes with its KV cache on the host, under any design.

What is here is imported when it is first asked for: it needs torch and transformers, which recording a trace may lack.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clo.engine.decoder import Decoder
    from clo.engine.hf import OffloadedCache, offload

__all__ = ["Decoder", "OffloadedCache", "offload"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from clo.engine import decoder, hf

        return getattr(decoder if name == "Decoder" else hf, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
