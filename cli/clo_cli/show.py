"""`clo show`: what is at hand, and how each number is known. Knows nothing about running anything."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

import click

from clo.units import format_bytes

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
        _print_fields(f"{kind} {name}", data[kinds[0]][name])
    else:
        for one in kinds:
            _print_listing(one, data[one])


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


def _print_fields(title: str, fields: Mapping[str, Any]) -> None:
    """All fields of one record; nested ones on a line."""
    from clo_cli.tables import console, fields_table

    out = console()
    out.print(title, style="bold")
    shown = {name: _flat(value) for name, value in fields.items()}
    out.print(fields_table(shown))


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(inner)}" for name, inner in value.items() if inner not in ("", 0))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _print_listing(kind: str, records: Mapping[str, Mapping[str, Any]]) -> None:
    """One line per preset: its name, what it is, and its source."""
    from rich.table import Table

    from clo_cli.tables import console

    table = Table(title=kind, title_justify="left", box=None)
    table.add_column("name", no_wrap=True)
    table.add_column("what", overflow="fold")
    table.add_column("source", overflow="fold")
    for name, record in records.items():
        table.add_row(name, _what(kind, record), _source(kind, record))
    console().print(table)


def _what(kind: str, record: Mapping[str, Any]) -> str:
    if kind == "models":
        from clo.specs import ModelSpec

        queries, width = f"{record['num_query_heads']} query", record["head_dim"]
        heads = f"{queries} and {record['num_kv_heads']} KV heads of {width}"
        if record["latent"]:
            heads = f"{queries} heads that share a vector of {width} values (MLA)"
        per_token = f"{format_bytes(ModelSpec.parse(dict(record)).kv_bytes_per_token)} of KV per token"
        experts = record["experts"]
        mixed = f"{experts['experts_per_token']} of {experts['num_experts']} experts, " if experts else ""
        limited, linear = len(record["windowed_layers"]), record["linear"]
        windows = f" ({limited} with a window of {record['window_tokens']})" if limited else ""
        if linear:
            windows = f" ({len(linear['layers'])} with linear attention)"
        most = record["max_positions"]
        return f"{record['num_layers']} layers{windows}, {heads}, {mixed}{per_token}, up to {most} tokens"
    if kind == "machines":
        gpu, link = record["gpu"], record["link"]
        rates = f"HBM {format_bytes(gpu['hbm_bytes_per_s'])}/s, link {format_bytes(link['h2d_bytes_per_s'])}/s"
        return f"{format_bytes(gpu['memory_bytes'])}, {rates}"
    if kind == "designs":
        return str(record["description"])
    if kind == "profiles":
        return ", ".join(f"{count} costs {source}" for source, count in record["sources"].items())
    size = f"{record['num_layers']} layers x {record['num_kv_heads']} KV heads, {record['context_tokens']} tokens"
    return f"{record['model']}: {size}, {record['num_steps']} steps"


def _source(kind: str, record: Mapping[str, Any]) -> str:
    if kind == "designs":
        return f"clo/presets/designs/{record['name']}.toml"
    if kind == "profiles":
        return f"{record['date']}, {record['gemm']['device']}"
    if kind == "traces":
        return f"recorded {record['recorded_at']} over {record['text_source']}"
    return str(record["source"])
