"""The first layers of a model. Knows nothing about what runs them."""

from __future__ import annotations

from clo.errors import SpecError
from clo.specs.model import ModelSpec


def first_layers(model: ModelSpec, count: int) -> ModelSpec:
    """`model` with its first `count` layers only.

    Raises `SpecError` where none of these keeps the whole context, and so nothing could be offloaded.
    """
    if 1 <= count <= model.whole_layers[0]:
        raise SpecError(
            f"{count} layers of {model.name}: the first that keeps the whole context is layer {model.whole_layers[0]}: "
            f"take at least {model.whole_layers[0] + 1}"
        )
    windowed = [layer for layer in model.windowed_layers if layer < count]
    linear = [layer for layer in model.linear.layers if layer < count] if model.linear else []
    shared = [layer for layer in model.indexer.shared_layers if layer < count] if model.indexer else []
    experts = model.experts if model.experts and any(map(model.experts_in, range(count))) else None
    if experts and experts.layers:
        experts = experts.with_fields(layers=[layer for layer in experts.layers if layer < count])
    return model.with_fields(
        num_layers=count,
        experts=experts and experts.model_dump(),
        windowed_layers=windowed,
        window_tokens=model.window_tokens if windowed else None,
        linear=model.linear.with_fields(layers=linear).model_dump() if model.linear and linear else None,
        indexer=model.indexer and model.indexer.with_fields(shared_layers=shared).model_dump(),
    )
