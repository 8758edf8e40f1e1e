"""Which layers of a loaded model have linear attention. Knows nothing about what is done with them."""

from __future__ import annotations

from typing import Any

import transformers

from clo.engine.models.anatomy import attending
from clo.engine.versions import release_of
from clo.errors import SpecError
from clo.specs.hf_attention import linear_fields, linear_problem

OLDEST = (5, 7)
"""The version of `transformers` from which on linear attention takes up its state with several tokens at once.

Those before forgot it; the oldest had a cache of their own for such models.
"""


def linear_of(model: Any, layers: list[Any], config: Any) -> dict[str, Any]:
    """The fields of a `ModelSpec` about linear attention and the gate that comes with it, none for other models.

    Raises `SpecError` for linear attention of an unknown kind, or in every layer, and where the library is too old.
    """
    fields, name = config.to_dict(), f"model {type(model).__name__}"
    if problem := linear_problem(fields):
        raise SpecError(f"{name}: {problem}")
    found = linear_fields(fields)
    softmax = attending(layers)
    said = (found.get("linear") or {}).get("layers", [])
    if said != [index for index, layer in enumerate(layers) if layer not in softmax]:
        raise SpecError(
            f"{name}: which layers have linear attention is not what its config says (layer_types = {said})"
        )
    if said and release_of(transformers.__version__) < OLDEST:
        raise SpecError(
            f"{name}: linear attention needs transformers {'.'.join(map(str, OLDEST))} or newer, this is "
            f"{transformers.__version__}, where it forgets its state when several tokens follow"
        )
    return found
