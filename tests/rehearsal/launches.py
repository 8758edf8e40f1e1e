"""Kernels of Triton on a machine without a GPU, in a process that runtime.c and driver.c serve: `install` once.

`references`: wrappers check their tensors as ever, then have the reference done in their kernel's place. `compiled`:
Triton compiles, loads and launches as ever, and what it compiled is run instruction by instruction (tests/kernels/ptx).
`nothing`: the same, and it is not run.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

from .operations import on_cpu, submit

KINDS = ("references", "compiled", "nothing")
ARCHITECTURE = 90


def install(kind: str) -> None:
    """For all launches from now on."""
    if kind == "references":
        _install_references()
    else:
        _install_compiled(runs=kind == "compiled")


def _modules() -> list[ModuleType]:
    import clo_kernels

    return [importlib.import_module(f"clo_kernels.{one.name}") for one in pkgutil.iter_modules(clo_kernels.__path__)]


def _install_references() -> None:
    from clo_kernels import reference

    stand_in = SimpleNamespace(
        **{
            name: _submitted(value) if _is_its_own(value, reference) else value
            for name, value in vars(reference).items()
        }
    )
    for module in _modules():
        if hasattr(module, "runs_kernel"):
            module.runs_kernel = lambda _: False
        if getattr(module, "reference", None) is reference:
            module.reference = stand_in


def _is_its_own(value: Any, module: ModuleType) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


WRITTEN = {"rotate": ("out_query", "out_key"), "select_pages": ("selection",), "gather_pages": ("slots",)}
"""What references return; else `out`."""


def _submitted(reference: Callable[..., Any]) -> Callable[..., Any]:
    """In the order of the stream."""
    signature = inspect.signature(reference)

    def run(*given: Any, **named: Any) -> Any:
        seen, named_seen = _deep(given), _deep(named)
        submit(lambda: reference(*seen, **named_seen))
        known = signature.bind(*given, **named).arguments
        found = tuple(known.get(name) for name in WRITTEN.get(reference.__name__, ("out",)))
        return found if len(found) > 1 else found[0]

    return run


def _deep(value: Any) -> Any:
    """Also what dataclasses hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: _deep(getattr(value, name)) for name in names})
    if isinstance(value, tuple | list):
        return type(value)(_deep(one) for one in value)
    if isinstance(value, dict):
        return {name: _deep(one) for name, one in value.items()}
    return on_cpu(value)


def _install_compiled(*, runs: bool) -> None:
    import numpy as np
    from triton.compiler.compiler import CompiledKernel

    from tests.kernels.ptx.launches import Launch

    chance, theirs, seen = np.random.default_rng(0), CompiledKernel._init_handles, set[int]()
    # threads take turns: but one that waits for another's flag
    turn = threading.RLock()

    def prepare(kernel: Any) -> None:
        theirs(kernel)
        if id(kernel) not in seen:
            seen.add(id(kernel))
            kernel._run = _after(kernel._run, Launch(kernel, chance) if runs else _nothing, kernel.name)

    def _after(launch: Callable[..., None], run: Callable[..., None], name: str) -> Callable[..., None]:
        def both(*given: Any) -> None:
            launch(*given)
            seen = tuple(on_cpu(value) for value in given)
            submit(lambda: in_turn(run, seen) if "wait" not in name else run(*seen), stream=given[3])

        return both

    def in_turn(run: Callable[..., None], given: tuple[Any, ...]) -> None:
        with turn:
            run(*given)

    CompiledKernel._init_handles = prepare


def _nothing(*_: Any) -> None:
    pass
