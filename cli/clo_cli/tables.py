"""Readable tables of results. Units are converted here, not before. Knows nothing about how results came about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from clo.units import MS_PER_S, format_bytes, format_seconds

if TYPE_CHECKING:
    from clo.choices import Choices
    from clo.results import Result
    from clo_sim.explore import Exploration

WIDE = 160
"""Columns when the output is not a terminal: wide enough that no table is folded."""

NUMBER_COLUMNS = (
    "TPOT",
    "tokens/s",
    "device\nmemory",
    "of it\nKV",
    "overlap",
    "hit\nrate",
    "h2d a\nstep",
    "link\nused",
    "CPU threads\nbusy",
    "stall",
    "of its\nroofline",
)

LEGEND = (
    "overlap: attended pages that the selector would choose for the real query; hit rate: attended pages that needed "
    "no transfer; link used: bytes over its peak; stall: time the main stream did not compute; of its roofline: "
    "the least time for what this design attends and moves, over its TPOT."
)

METRIC_NAMES = {
    "tpot_s": "TPOT",
    "tpot_p99_s": "TPOT p99",
    "tokens_per_s": "tokens/s",
    "gpu_tokens_per_s": "tokens/s a GPU",
    "hit_rate": "hit rate",
    "reuse_rate": "reuse",
    "h2d_bytes_per_step": "h2d/step",
    "device_bytes": "GPU mem",
    "kv_device_bytes": "of it KV",
    "host_bytes": "host mem",
    "slot_pages": "slots",
    "measured_share": "measured",
}

NARROW = 150
"""A terminal with fewer columns gets `NARROW_COLUMNS` only."""
NARROW_COLUMNS = ("TPOT", "of it\nKV", "overlap", "hit\nrate", "stall")
_NUMBERS, _NARROW_NUMBERS = 116, 53
"""What all columns of numbers take, with the lines between; and those of a narrow terminal."""
_NAME, _NARROW_NAME, _STALLS = (22, 44), (14, 14), (11, 60)
"""What a name, and what its stalls take: at least, and at most."""


def console() -> Console:
    """Standard output; a pipe or file gets wide, plain lines."""
    plain = Console(markup=False)
    return plain if plain.is_terminal else Console(width=WIDE, highlight=False, markup=False)


def design_table(results: Sequence[Result], title: str, width: int = WIDE) -> Table:
    """A row per design, fastest first; what does not fit `width` columns of text is left out, and said to be."""
    wide = width >= NARROW
    names = NUMBER_COLUMNS if wide else NARROW_COLUMNS
    legend = LEGEND if wide else f"{LEGEND} A window of {NARROW} columns, or --json, shows more."
    table = Table(title=title, title_justify="left", caption=legend, caption_justify="left")
    # a word of a name is a choice: names break between choices
    longest = max((len(result.design.name) for result in results), default=0)
    room = width - (_NUMBERS if wide else _NARROW_NUMBERS)
    least, most = _NAME if wide else _NARROW_NAME
    name_width = min(longest, max(least, min(most, room - 24)))
    # widths are set and not left to the library, which lets a table grow past the window
    table.add_column("design", overflow="fold", width=name_width)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("stalls on", overflow="fold", width=max(_STALLS[0], min(_STALLS[1], room - name_width)))
    for result in sorted(results, key=lambda one: one.tpot_s):
        name, *numbers, stalls = _design_row(result)
        shown = dict(zip(NUMBER_COLUMNS, numbers, strict=True))
        table.add_row(name, *(shown[column] for column in names), stalls)
    return table


def _design_row(result: Result) -> list[str]:
    return [
        result.design.name,
        format_seconds(result.tpot_s),
        f"{result.tokens_per_s:.0f}" if result.tokens_per_s >= 10 else f"{result.tokens_per_s:.2g}",
        format_bytes(result.device_bytes),
        format_bytes(result.kv_device_bytes),
        _share(result.overlap),
        f"{result.hit_rate:.1%}",
        format_bytes(result.h2d_bytes_per_step),
        _share(result.h2d_utilisation),
        f"{result.cpu_threads_s / result.tpot_s:.0%}",
        f"{result.total_stall_s / result.tpot_s:.0%}",
        _share(result.roofline.seconds / result.tpot_s if result.roofline else None),
        stall_text(result),
    ]


def _share(value: float | None) -> str:
    """A dash for what is not known of a machine."""
    return "-" if value is None else f"{value:.0%}"


def stall_text(result: Result) -> str:
    """Stalls above a percent of the step, largest first."""
    shares = {cause: seconds / result.tpot_s for cause, seconds in result.stall_s.items()}
    shares["contention"] = result.contention_s / result.tpot_s
    shown = sorted((item for item in shares.items() if item[1] >= 0.01), key=lambda item: -item[1])
    return ", ".join(f"{cause} {share:.0%}" for cause, share in shown) or "-"


def _short(reason: str) -> str:
    return reason.split(": ", 1)[-1]


def print_designs(results: Sequence[Result], reasons: Mapping[str, Sequence[str]], title: str) -> None:
    """Print the table of designs, and those that cannot run, by the reason."""
    out = console()
    if results:
        out.print(design_table(results, title, out.width))
    for reason, names in reasons.items():
        do = "does" if len(names) == 1 else "do"
        out.print(f"  {', '.join(names)} {do} not run: {reason}")


def print_intervals(results: Sequence[Result]) -> None:
    """Where each TPOT lies, of those that were asked, as far as spreads of costs are known."""
    known = sorted((one for one in results if "tpot_s" in one.intervals), key=lambda one: one.tpot_s)
    if not known:
        return
    spans = [(one.design.name, *one.intervals["tpot_s"]) for one in known]
    said = ", ".join(f"{name} {format_seconds(low)} to {format_seconds(high)}" for name, low, high in spans)
    shares = [one.interval_share for one in known if one.interval_share is not None]
    console().print(
        f"TPOT in nine of ten cases: {said}; costs of known spread are {_span(shares)} of {_whose(known)} busy time, "
        "the others do not vary."
    )


def _whose(results: Sequence[Result]) -> str:
    return "its" if len({one.design.name for one in results}) == 1 else "these designs'"


def _span(shares: Sequence[float]) -> str:
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return low if low == high else f"{low} to {high}"


def print_roofline(result: Result, what: str) -> None:
    """The least that must move, before any measured or simulated number, if that is known."""
    roof = result.roofline
    if roof is None:
        return
    console().print(
        f"Roofline of {what}: {format_bytes(roof.hbm_bytes)} of device memory take {format_seconds(roof.hbm_s)}, "
        f"{format_bytes(roof.h2d_bytes)} over the host link take {format_seconds(roof.h2d_s)}, "
        f"arithmetic takes {format_seconds(roof.compute_s)}: no step is shorter than {format_seconds(roof.seconds)}."
    )


def print_choices(choices: Choices) -> None:
    """What each choice of the best design is worth; in a narrow window notes stand below the table."""
    out = console()
    wide = out.width >= NARROW
    table = Table(title=f"One choice of {choices.best_name} changed at a time", title_justify="left")
    for name in ("choice", "chosen", "instead"):
        table.add_column(name, overflow="fold")
    for name in ("TPOT", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    notes: dict[str, int] = {}
    for row in sorted(choices.alternatives, key=lambda one: (one.field, one.tpot_s is None, one.tpot_s or 0.0)):
        note = _short(row.note) if row.tpot_s is None else row.note
        shown = note if wide or not note else f"[{notes.setdefault(note, len(notes) + 1)}]"
        times = ("-", "") if row.tpot_s is None else (format_seconds(row.tpot_s), _change(row.tpot_s, choices))
        table.add_row(row.field, row.chosen, row.value, *times, shown)
    out.print(table)
    for note, number in notes.items():
        out.print(f"  [{number}] {note}")


def _change(tpot_s: float, choices: Choices) -> str:
    return f"{tpot_s / choices.best_tpot_s - 1:+.1%}"


def print_trials(found: Exploration) -> None:
    """The finalists, simulated, best first: what was changed, objectives and bounds, and which make the front."""
    names = dict.fromkeys((*found.goals.objectives, *(bound.metric for bound in found.goals.bounds), "tpot_s"))
    table = Table(title="Finalists, simulated (*: none is better in every objective)", title_justify="left")
    table.add_column("")
    table.add_column("design", overflow="fold")
    for name in names:
        table.add_column(METRIC_NAMES.get(name, name), justify="right")
    front = {id(one) for one in found.goals.front(found.finalists)}
    allowed = found.goals.ranked(found.finalists)
    for one in allowed:
        values = [metric_text(name, one.metrics[name]) for name in names]
        table.add_row("*" if id(one) in front else "", one.task.label, *values)
    out = console()
    out.print(table)
    for one in found.finalists:
        if one.runs and not found.goals.allows(one):
            broken = [bound for bound in found.goals.bounds if bound.excess(one) > 0]
            texts = (f"{bound} ({metric_text(bound.metric, one.metrics[bound.metric])})" for bound in broken)
            out.print(f"  {one.task.label} breaks {', '.join(texts)} when simulated")


def print_measured(found: Exploration) -> None:
    """The finalists as the simulator has them and as they ran here, the fastest real run first."""
    table = Table(title="Finalists, run on this machine", title_justify="left")
    table.add_column("design", overflow="fold")
    for name in ("TPOT\nsimulated", "TPOT\nhere", "hit rate\nsimulated", "hit rate\nhere"):
        table.add_column(name, justify="right")
    simulated = {(one.task.design, one.task.changes): one for one in found.finalists}
    ran = sorted((one for one in found.measured if one.runs), key=lambda one: one.metrics["tpot_s"])
    for one in ran:
        pair = (simulated[one.task.design, one.task.changes], one)
        values = [metric_text(name, side.metrics[name]) for name in ("tpot_s", "hit_rate") for side in pair]
        table.add_row(one.task.label, *values)
    console().print(table)
    for one in found.measured:
        if not one.runs:
            console().print(f"  {one.task.label} does not run here: {one.problem}")


def metric_text(name: str, value: float) -> str:
    """A metric as people read it."""
    if name.endswith("_s") and not name.endswith("per_s"):
        return format_seconds(value)
    if "bytes" in name:
        return format_bytes(value)
    return f"{value:.1%}" if name in ("overlap", "hit_rate", "reuse_rate", "measured_share") else f"{value:.4g}"


def print_sources(results: Iterable[Result]) -> None:
    """How much of the results rests on measured costs, and what was assumed."""
    rows = list(results)
    low, high = min(row.measured_share for row in rows), max(row.measured_share for row in rows)
    span = f"{low:.0%}" if round(low, 2) == round(high, 2) else f"{low:.0%} (least) to {high:.0%} (most)"
    out = console()
    out.print(f"Measured costs account for {span} of {_whose(rows)} busy time; the rest is literature or assumed.")
    for note in sorted({note for row in rows for note in row.assumptions}):
        out.print(f"  assumed: {note}")


def print_result(result: Result) -> None:
    """One design in full."""
    out = console()
    load = result.workload
    out.print(
        f"{result.design.name} on {result.machine}: {result.model}, {load.label}, "
        f"{load.steps} steps on the {result.executor} executor"
    )
    print_roofline(result, "this design's memory")
    out.print(fields_table(_headline(result)))
    out.print(_time_table(result))
    print_sources([result])


def _headline(result: Result) -> dict[str, str]:
    spread = f"median {format_seconds(result.tpot_p50_s)}, p99 {format_seconds(result.tpot_p99_s)}"
    threads = format_seconds(result.cpu_threads_s)
    fields = {
        "TPOT": f"{format_seconds(result.tpot_s)} ({spread})",
        "tokens/s": f"{result.tokens_per_s:.1f}" + _of_each(result),
        "device memory": f"{format_bytes(result.device_bytes)}, of it KV {format_bytes(result.kv_device_bytes)}",
        "host memory": format_bytes(result.host_bytes),
        "pages": f"{result.num_pages} per head, budget {result.budget_pages}, slots {result.slot_pages}",
        "hit rate": f"{result.hit_rate:.1%} of attended pages; "
        f"{result.reuse_rate:.1%} of heads selected nothing on demand",
        "host to device": f"{format_bytes(result.h2d_bytes_per_step)} a step",
        "CPU": f"launching {format_seconds(result.cpu_launch_s)}, transfer threads {threads} a step",
    }
    if "tpot_s" in result.intervals:
        low, high = result.intervals["tpot_s"]
        fields["TPOT interval"] = (
            f"{format_seconds(low)} to {format_seconds(high)} with 90% probability, if the costs without a known "
            f"spread ({1 - (result.interval_share or 0.0):.0%} of busy time) are exact"
        )
    if result.overlap is not None:
        fields["overlap"] = f"{result.overlap:.1%} of the attended pages are what the selector would choose now"
    if result.h2d_utilisation is not None:
        fields["host to device"] += f", link {result.h2d_utilisation:.0%} busy"
    if result.roofline is not None:
        fields["of its roofline"] = f"{result.roofline.seconds / result.tpot_s:.0%}"
    return fields


def _of_each(result: Result) -> str:
    return f", {result.gpu_tokens_per_s:.1f} of each GPU" if result.num_gpus > 1 else ""


def _time_table(result: Result) -> Table:
    table = Table(title="Where a step's time goes (main stream)", title_justify="left")
    table.add_column("part")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    parts = {**result.busy_s, "contention": result.contention_s}
    parts |= {f"stall: {cause}": seconds for cause, seconds in result.stall_s.items()}
    for name, seconds in parts.items():
        if seconds > 1e-4 * result.tpot_s:
            table.add_row(name, f"{seconds * MS_PER_S:.3f}", f"{seconds / result.tpot_s:.1%}")
    return table


def fields_table(fields: Mapping[str, Any]) -> Table:
    """Names and values without a frame."""
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields.items():
        table.add_row(name, str(value))
    return table
