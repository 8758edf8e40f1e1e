"""What commands that run a real model share: loading it, its designs. Knows nothing about what they do."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

from clo.errors import NotFoundError, SpecError

if TYPE_CHECKING:
    from clo.engine.heads import HeadProfile
    from clo.specs import Design, ModelSpec


def need_engine(doing: str, extra: str = "models", also: tuple[str, ...] = ()) -> None:
    """Raises `NotFoundError` that says what to install if a library is missing for `doing` something.

    Libraries that are there stay quiet.
    """
    missing = [name for name in ("torch", "transformers", "triton", *also) if importlib.util.find_spec(name) is None]
    if "triton" in missing and sys.platform != "linux":
        raise NotFoundError(f"{doing} needs triton, which there is for Linux only")
    if missing:
        raise NotFoundError(f'{doing} needs {", ".join(missing)}: pip install "clo-offload[{extra}]"')
    from clo.engine.models.loading import hush

    hush()


def load_for_decoding(name: str, device: str = "cpu") -> tuple[Any, Any]:
    """A model on `device`, in what models run in there, and its tokenizer."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    need_engine("decoding")
    from clo.engine.models.loading import load_model
    from clo.engine.random_weights import dtype_on, need_device

    need_device(device)
    model, tokenizer = load_model(name, dtype=dtype_on(device))
    return model.to(device), tokenizer


def cut_to(shape: ModelSpec, layers: int | None) -> ModelSpec:
    """The shape with so many of its layers. Raises `SpecError` for more than it has."""
    from clo.specs.cut import first_layers

    if layers is not None and layers > shape.num_layers:
        raise SpecError(f"--layers {layers}: {shape.name} has {shape.num_layers}")
    return shape if layers is None else first_layers(shape, layers)


def heads_from(design: Design, model: Any, trace_path: str | None) -> HeadProfile | None:
    """The head profile that a design needs of a loaded model, or none; from a trace, or the shipped one."""
    from clo import presets
    from clo.engine.heads import heads_for
    from clo.engine.models.network import spec_of

    trace = presets.load_trace(trace_path) if trace_path else None
    return heads_for(design, spec_of(model), trace)
