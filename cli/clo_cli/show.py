"""`clo show`: what is at hand, and how each number is known. Knows nothing about running anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from clo.specs import Spec

KINDS = ("models", "machines", "designs", "profiles", "traces")
SPECS = KINDS[:3]
"""What people describe themselves, in TOML."""


@click.command()
@click.argument("kind", type=click.Choice(KINDS), required=False)
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def show(kind: str | None, name: str | None, as_json: bool) -> None:
    """List what is at hand, or all fields of one thing, each with its source.

    \b
    clo show                     everything, a line each
    clo show designs clo         each field: value, meaning, choices
    clo show profiles h200       every cost with its source
    """
    kinds = (kind,) if kind else KINDS
    data = {one: _records(one, name) for one in kinds}
    if as_json:
        click.echo(json.dumps(data, indent=1))
    elif name and kind in SPECS:
        _print_spec(f"{kind} {name}", _spec(kind, name))
    elif name:
        from clo_cli.tables import print_fields

        print_fields(f"{kind} {name}", data[kinds[0]][name])
    else:
        from clo_cli.tables import print_listing

        for one in kinds:
            print_listing(one, data[one])


def _print_spec(title: str, spec: Spec) -> None:
    from rich.table import Table

    from clo_cli.tables import console

    table = Table(title=title, title_justify="left", box=None)
    table.add_column("field", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("meaning", overflow="fold")
    for row in _fields(spec):
        table.add_row(*row)
    console().print(table)


def _fields(spec: Spec, above: str = "") -> Iterator[tuple[str, str, str]]:
    """Every field as `--set` and TOML name it, its value, and what it means."""
    from clo.specs import Spec

    for name, field in type(spec).model_fields.items():
        value = getattr(spec, name)
        if isinstance(value, Spec):
            yield from _fields(value, f"{above}{name}.")
            continue
        choices = [choice.value for choice in type(value)] if isinstance(value, Enum) else []
        meaning = [field.description or name.replace("_", " "), *([" | ".join(choices)] if choices else [])]
        yield f"{above}{name}", f"{value:g}" if isinstance(value, float) else str(value), ": ".join(meaning)


def _records(kind: str, name: str | None) -> dict[str, dict[str, Any]]:
    from clo import presets

    chosen = [name] if name else presets.names(kind)  # type: ignore[arg-type]
    return {one: _record(kind, one) for one in chosen}


def _record(kind: str, name: str) -> dict[str, Any]:
    if kind == "traces":
        return _trace_record(name)
    if kind == "profiles":
        return _profile_record(name)
    record: dict[str, Any] = _spec(kind, name).model_dump(mode="json")
    return record


def _spec(kind: str, name: str) -> Spec:
    from clo import presets

    load = {"models": presets.load_model, "machines": presets.load_machine, "designs": presets.load_design}[kind]
    return load(name)


def _trace_record(name: str) -> dict[str, Any]:
    from clo import presets

    header: dict[str, Any] = presets.load_trace(name).header.model_dump(mode="json")
    return header


def _profile_record(name: str) -> dict[str, Any]:
    """Costs without the packed tables, and how many of them are measured."""
    from clo import presets
    from clo.kernel_tables import KernelTable

    profile = presets.load_named_profile(name)
    tables = [name for name in type(profile).model_fields if isinstance(getattr(profile, name), KernelTable)]
    packed = {name: {"log_latency"} for name in tables}
    data: dict[str, Any] = profile.model_dump(mode="json", exclude=packed)
    sources = [source.value for source in profile.sources().values()]
    return data | {"sources": {source: sources.count(source) for source in sorted(set(sources))}}
