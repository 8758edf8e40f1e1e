"""Loads a `transformers` model and its tokenizer, from a folder, from the hub, or SmolLM2 from a package index.

Knows nothing about what is done with them.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clo.engine.models.smollm2 import MODEL_NAME, ensure_smollm2
from clo.errors import NotFoundError

if TYPE_CHECKING:
    import torch

HUB_PATIENCE_S = 5.0


def load_model(model: str | Path, *, attention: str | None = None, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """A `transformers` model in `dtype` (none: float32) and its tokenizer.

    `attention` is a name in the library's attention registry, none the library's choice (SDPA, "eager" where a model's
    attention has sinks).

    Raises `NotFoundError` if there is no such folder or hub model, or the `models` extra is not installed.
    """
    check_packages("loading a model")
    import torch
    import transformers

    source = str(ensure_smollm2()) if str(model) == MODEL_NAME else str(model)
    transformers.utils.logging.disable_progress_bar()
    folder = Path(source).is_dir()
    if isinstance(model, Path) and not folder:
        raise NotFoundError(f"model {model}: no such model folder")
    if folder and not (Path(source) / "config.json").is_file():
        raise NotFoundError(f"model {model}: not a model folder: no config.json in it")
    away = not folder and not _hub_answers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=away)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype or torch.float32, attn_implementation=attention, local_files_only=away
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if away:
            reason = "the hub does not answer, and its cache here has no such model"
        raise NotFoundError(f"model {model}: no model folder, and no hub model that can be loaded: {reason}") from None
    if str(model) == MODEL_NAME:
        loaded.config.name_or_path = MODEL_NAME  # not the folder that it was converted into
    return loaded.eval(), tokenizer


def hush() -> None:
    """`transformers` says nothing but errors from now on: for commands, whose own output it would break into."""
    if find_spec("transformers") is None:
        return
    import transformers

    transformers.utils.logging.set_verbosity_error()


def check_packages(doing: str) -> None:
    """Raises `NotFoundError` that says what to install for `doing` something with a model."""
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise NotFoundError(f'{doing} needs {" and ".join(missing)}: pip install "clo-offload[models]"')


def _hub_answers() -> bool:
    """Asked once: its own client would ask for most of a minute where there is no network."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_PATIENCE_S)
    except Exception:  # of whichever library the client uses
        return False
    return True
