"""What ships with the package, found by name: models, machines, designs, profiles, traces. Knows not their use."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar

from clo.errors import NotFoundError, SpecError
from clo.profile import Profile, load_profile
from clo.specs import Design, MachineSpec, ModelSpec, model_from_hf_config
from clo.specs.base import Spec
from clo.trace import AttentionTrace

Kind = Literal["models", "machines", "designs", "profiles", "traces"]

DEFAULT_TRACE = "smollm2-135m-4k"
"""SmolLM2-135M-Instruct at 4,096 tokens."""

_OTHERS = {"models": "the path of a TOML file, config.json or model folder"}

_SUFFIX = {"models": ".toml", "machines": ".toml", "designs": ".toml", "profiles": ".json", "traces": ".npz"}

S = TypeVar("S", bound=Spec)

LeftOpen = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""From what a file says to the fields that it leaves open."""


def folder(kind: Kind) -> Path:
    """Where presets of one kind lie. Profiles come from the calibration folder of a checkout, if this is one."""
    here = Path(str(files("clo.presets")))
    checkout = here.parent.parent / "calibration" / "profiles"
    return checkout if kind == "profiles" and not (here / kind).is_dir() else here / kind


def names(kind: Kind) -> list[str]:
    """Preset names of one kind, sorted."""
    return sorted(path.stem for path in folder(kind).glob(f"*{_SUFFIX[kind]}"))


def load_model(name: str) -> ModelSpec:
    """A preset, a TOML file, a Hugging Face `config.json`, or a folder that holds one."""
    path = Path(name)
    if path.is_dir() or path.suffix == ".json":
        return model_from_hf_config(path)
    return _load(ModelSpec, "models", name)


def load_machine(name: str) -> MachineSpec:
    """A preset or a TOML file; a profile that the file names by a relative path is sought beside the file."""
    machine = _load(MachineSpec, "machines", name)
    given = name.endswith(_SUFFIX["machines"]) and machine.profile.endswith(_SUFFIX["profiles"])
    # an absolute path stays as it is
    return machine.with_fields(profile=str(Path(name).parent / machine.profile)) if given else machine


def load_design(name: str, model: ModelSpec | None = None, settings: Mapping[str, Any] | None = None) -> Design:
    """A preset or a TOML file.

    Of a `model` with an indexer what the file leaves open is as that model attends, and as suits the `settings` that
    are to be applied to it.
    """
    if model is None or model.indexer is None:
        return _load(Design, "designs", name)
    indexer = model.indexer
    return _load(Design, "designs", name, lambda said: indexer.design_fields({**said, **(settings or {})}))


def load_named_profile(name: str) -> Profile:
    """A preset or a JSON file."""
    return _cached_profile(_find("profiles", name))


def load_trace(name: str = DEFAULT_TRACE) -> AttentionTrace:
    """A preset, the same one every time (what it gives cannot be changed), or a trace file, whatever that is called."""
    if name in names("traces"):
        return _cached_trace(_find("traces", name))
    return AttentionTrace.load(Path(name) if Path(name).is_file() else _find("traces", name))


@cache
def _cached_trace(path: Path) -> AttentionTrace:
    return AttentionTrace.load(path)


@cache
def _cached_profile(path: Path) -> Profile:
    return load_profile(path)


def _load(cls: type[S], kind: Kind, name: str, left_open: LeftOpen = lambda _: {}) -> S:
    path = _find(kind, name)
    said = _read_toml(path)
    return cls.parse({**left_open(said), **said}, where=str(path) if Path(name) == path else f"{kind[:-1]} {name}")


def _find(kind: Kind, name: str) -> Path:
    """A preset's file, or the file itself when `name` is a path."""
    suffix = _SUFFIX[kind]
    if name.endswith(suffix):
        path = Path(name)
        if not path.is_file():
            raise NotFoundError(f"{kind[:-1]} {name}: no such file")
        return path
    path = folder(kind) / f"{name}{suffix}"
    if not path.is_file():
        raise NotFoundError(f"{kind[:-1]} {name!r} is unknown{_suggest(name, kind)}")
    return path


def _suggest(name: str, kind: Kind) -> str:
    known = names(kind)
    close = difflib.get_close_matches(name, known, n=1)
    listed = f": choose from {', '.join(known)}, or give {_OTHERS.get(kind, 'a path')}" if known else ""
    return f" (did you mean {close[0]}?){listed}" if close else listed


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFoundError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise SpecError(f"{path}: not TOML: {error}") from None
