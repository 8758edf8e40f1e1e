"""Which layers of a loaded model have a sliding window. Knows nothing about what is done with them."""

from __future__ import annotations

from typing import Any

from clo.errors import SpecError
from clo.specs.hf_attention import INDEXED, LINEAR, WINDOWED, WITH_INDEXER, WITH_LINEAR, WITH_WINDOWS
from clo.specs.hf_chunks import CHUNKED


def windows_of(config: Any) -> dict[str, Any]:
    """The fields of a `ModelSpec` about windows, none where no window is shorter than the positions that there are.

    Raises `SpecError` for layers that attend to a part of the context in another way, and where every layer does.
    """
    places, window = _places(config), getattr(config, "sliding_window", None)
    if not places or window >= config.max_position_embeddings:
        return {}
    if len(places) == config.num_hidden_layers:
        raise SpecError(
            f"model {config.model_type}: every layer has a sliding window, of {window} tokens: such layers need no "
            "offloading"
        )
    if config.model_type not in WITH_WINDOWS:
        raise SpecError(
            f"model {config.model_type}: a sliding window of {window} tokens in layers {places[0]}, ...: windows of "
            f"this kind of model are not known (known: {', '.join(WITH_WINDOWS)})"
        )
    return {"window_tokens": window, "windowed_layers": places}


def _places(config: Any) -> list[int]:
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    known = {"full_attention", WINDOWED, LINEAR if config.model_type in WITH_LINEAR else WINDOWED}
    known |= set(INDEXED) if config.model_type in WITH_INDEXER else set()
    if (size := _chunk(config)) is not None:
        if size < config.max_position_embeddings:
            raise SpecError(
                f"model {config.model_type}: layers attend within chunks of {size} tokens (attention_chunk_size): "
                "such models are simulated only (clo simulate)"
            )
        known.add(CHUNKED)
    if others := sorted({str(kind) for kind in kinds or ()} - known):
        raise SpecError(f"model {config.model_type}: {', '.join(others)} of layers is not supported")
    if window is None or not getattr(config, "use_sliding_window", True):
        return []
    # without a list the library gives every layer the window
    return [layer for layer, kind in enumerate(kinds or [WINDOWED] * config.num_hidden_layers) if kind == WINDOWED]


def _chunk(config: Any) -> int | None:
    """Tokens of the chunks that some layers attend within, if any do."""
    chunked = CHUNKED in (getattr(config, "layer_types", None) or ())
    return getattr(config, "attention_chunk_size", None) if chunked else None
