"""Readable tables of a service and of fleets. Units are converted here. Knows nothing about how they came about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from clo.units import format_bytes, format_seconds
from clo_cli.tables import console

if TYPE_CHECKING:
    from clo_cli.fleet_prices import Priced
    from clo_sim.serving import ServiceResult
    from clo_sim.serving.crossover import CrossoverMap
    from clo_sim.serving.metrics import Latency
    from clo_sim.serving.plan import Fleet

_STATISTICS = ("mean", "p50", "p90", "p95", "p99", "max")
_LATENCIES = {
    "TTFT (arrival to first token)": "ttft_s",
    "TPOT (mean gap of a request)": "tpot_s",
    "ITL (every gap)": "itl_s",
    "E2E (arrival to last token)": "e2e_s",
}


def _of_replicas(result: ServiceResult) -> str:
    roles = _roles(result)
    if result.replica_gpus > 1:
        return f" ({_replicas(result)}{', ' * bool(roles)}{roles})"
    return f" ({roles or 'replicas'})" if result.gpus > 1 else ""


def _roles(result: ServiceResult) -> str:
    """What GPUs are for, if not for all: `1 to prefill, 3 to decode`."""
    of_prefill = result.prefill_gpus
    return f"{of_prefill} to prefill, {result.gpus - of_prefill} to decode" if of_prefill else ""


def _replicas(result: ServiceResult) -> str:
    count = result.gpus // result.replica_gpus
    return f"{count} replica{'' if count == 1 else 's'} of {result.replica_gpus}"


def print_service(result: ServiceResult, owners: int = 1) -> None:
    """One service in full. `owners`: GPUs of a replica that have sequences of their own."""
    out = console()
    gpus = f"{result.gpus} x {result.machine}{_of_replicas(result)}"
    out.print(f"{result.design} on {gpus}: {result.model}, {counted(result.requests)} of {result.trace}")
    for line in _lines(result, owners):
        out.print(line)
    table = Table(title="Latency", title_justify="left")
    table.add_column("")
    for name in _STATISTICS:
        table.add_column(name, justify="right")
    for title, field in _LATENCIES.items():
        table.add_row(title, *_row(getattr(result, field), bool(result.unstable)))
        if result.intervals:
            table.add_row("", *(_span(result, f"{field}_{name}") for name in _STATISTICS), style="dim")
    out.print(table)
    _print_slo(result)
    _print_intervals(result)
    if result.measured_share is not None:
        share = f"{result.measured_share:.0%} of the busy time"
        out.print(f"Measured kernel times account for {share}; the rest is literature or assumed (docs/serving.md).")


def counted(requests: int) -> str:
    """`1 request`, `2 requests`."""
    return f"{requests} request{'' if requests == 1 else 's'}"


def rate(per_s: float) -> str:
    """Of arrivals."""
    return "all at once" if math.isinf(per_s) else f"{per_s:.3g}/s"


def _row(latency: Latency, unstable: bool) -> list[str]:
    values = [getattr(latency, name) for name in _STATISTICS]
    missing = "unstable" if unstable else "-"
    return [missing if value is None else format_seconds(value) for value in values]


def _span(result: ServiceResult, name: str) -> str:
    ends = result.intervals.get(name)
    if ends is None:
        return ""
    return " to ".join(dict.fromkeys("unstable" if math.isinf(one) else format_seconds(one) for one in ends))


def _print_intervals(result: ServiceResult) -> None:
    if result.interval_share is None:
        return
    low, high = result.intervals["output_tokens_per_s"]
    console().print(
        f"Below each number is its 90% prediction interval; {low:.4g} to {high:.4g} tokens/s. Costs without a known "
        f"spread ({1 - result.interval_share:.0%} of busy time) are taken as exact."
    )


def _lines(result: ServiceResult, owners: int) -> list[str]:
    # memory is taken to fill evenly: with few sequences a GPU that has one needs more
    gpu = "GPU" if owners == 1 else f"GPU, in the mean of {owners} with sequences of their own"
    lines = [
        f"completed {result.completed}, rejected {result.rejected}{_reasons(result)}; arriving "
        f"{rate(result.rate_per_s)}, completing {result.completed_per_s:.3g}/s, "
        f"{result.output_tokens_per_s:.4g} tokens/s",
        f"busy {result.busy_share:.0%} of the time (prefill {result.prefill_share:.0%}); decoding together: "
        f"{result.mean_running:.1f} on average, {result.peak_running} at most, of "
        f"{result.mean_context_tokens:.0f} tokens each",
        f"KV needs at most {format_bytes(result.peak_device_bytes)} of {format_bytes(result.room_device_bytes)} on a "
        f"{gpu}, {format_bytes(result.peak_host_bytes)} of {format_bytes(result.room_host_bytes)} on its host, "
        f"prefixes {format_bytes(result.peak_prefix_bytes)} in what that leaves; "
        f"preemptions {result.preemptions}; prefix hits {result.prefix_hit_rate:.1%} of prompt tokens",
    ]
    if result.unstable:
        lines.append(
            f"UNSTABLE: about {result.excess_share:.0%} of the load stays behind for as long as requests come, so TTFT "
            "and E2E depend on how long that is. More GPUs, a lower --rate-scale or another design."
        )
    elif result.unstable is None:
        lines.append("Too few requests to tell whether the service keeps up with this load.")
    if result.requests_per_cpu_s is not None:
        lines.append(f"simulated {result.requests_per_cpu_s:,.0f} requests per CPU second")
    return lines


def _reasons(result: ServiceResult) -> str:
    from clo_sim.serving.metrics import reasons_of

    return f" ({reasons_of(result.rejected_by)})" if result.rejected_by else ""


def _print_slo(result: ServiceResult) -> None:
    if not result.slo:
        return
    out = console()
    if not result.completed:
        out.print(f"SLO {result.slo}: no request was served, so there is nothing to hold against it")
        return
    held = ", ".join(_held(name, met, result.slo_chance.get(name)) for name, met in result.slo_met.items())
    if result.chance is not None:
        held += f"; all of it, and keeping up, in {result.chance:.0%} of draws"
    out.print(f"SLO {result.slo}: {held}; goodput {result.goodput_per_s:.3g} requests/s within every limit")


def _held(name: str, met: bool, chance: float | None) -> str:
    return f"{name} {'holds' if met else 'FAILS'}" + ("" if chance is None else f" (it holds in {chance:.0%} of draws)")


def print_fleets(fleets: Sequence[Priced], slo: str, title: str, *, prices_given: bool) -> None:
    """Every machine and design: GPUs, cost, the SLO's values, head-room; best design of each machine first."""
    from clo_sim.serving.stability import MIN_REQUESTS

    out = console()
    table = Table(title=title, title_justify="left")
    for name in ("machine", "design"):
        table.add_column(name, no_wrap=True)
    costs = ("$/h", "$ per million\noutput tokens") if prices_given else ()
    for name in ("GPUs", f"{slo}\nworst term at", "head-room", *costs):
        table.add_column(name, justify="right")
    table.add_column("note", overflow="fold")
    for one in fleets:
        *numbers, note = _fleet_row(one)
        table.add_row(*numbers, *(_costs(one) if prices_given else ()), note)
    out.print(table)
    if any(one.fleet.gpus_interval is not None for one in fleets):
        out.print(
            "In brackets: the GPUs needed with a probability of 90% (the upper end is enough with 95%), as far as the "
            "spreads of costs are known. Other costs are taken as exact."
        )
    if any(one.fleet.result is not None and one.fleet.result.unstable is None for one in fleets):
        out.print(
            f"Too few requests ({MIN_REQUESTS} are needed) to tell whether these fleets keep up: a longer load may "
            "need more GPUs."
        )
    if not prices_given:
        out.print("For costs give prices, in $ per GPU and hour: --price h200=... --price l40s=...")


def _one(gpus: int) -> str:
    return "one" if gpus == 1 else str(gpus)


def _fleet_row(one: Priced) -> list[str]:
    fleet = one.fleet
    if fleet.gpus is None:
        return [fleet.machine, fleet.design, "-", "", "", fleet.problem]
    values = ", ".join(f"{name} {format_seconds(value)}" for name, value in fleet.values.items())
    # beyond the largest multiple that was tried nothing is known
    head = "" if fleet.head_room is None else f"{fleet.head_room:.2f}x{'' if fleet.breaks_by else ' or more'}"
    if head and fleet.result is not None and fleet.result.unstable is None:
        head = "not known"  # of so few requests nobody can say whether a fleet keeps up
    breaks = f"; beyond its head-room {fleet.breaks_by} fails first" if fleet.breaks_by else ""
    best = "BEST here: " if one.best else ""
    return [
        fleet.machine,
        fleet.design,
        str(fleet.gpus) + _count_span(fleet.gpus_interval),
        f"{fleet.margin:.0%}",
        head,
        f"{best}{_in_replicas(fleet)}{values}{breaks}{_chance(fleet)}{_rejected(fleet)}",
    ]


def _costs(one: Priced) -> tuple[str, str]:
    return (
        "" if one.cost_per_hour is None else f"{one.cost_per_hour:.2f}",
        "" if one.cost_per_million is None else f"{one.cost_per_million:.3g}",
    )


def _in_replicas(fleet: Fleet) -> str:
    """Where GPUs share the model, or do not do the same."""
    if fleet.result is None:
        return ""
    shared = _replicas(fleet.result) if fleet.result.replica_gpus > 1 else ""
    told = ", ".join(one for one in (shared, _roles(fleet.result)) if one)
    return f"{told}: " if told else ""


def _chance(fleet: Fleet) -> str:
    if fleet.chance is None or fleet.result is None:
        return ""
    share = fleet.result.interval_share
    known = "" if share is None else f" (of costs that are {share:.0%} of its time)"
    return f"; enough in {fleet.chance:.0%} of draws{known}"


def _rejected(fleet: Fleet) -> str:
    """What the values do not count."""
    result = fleet.result
    return f"; rejects {counted(result.rejected)}{_reasons(result)}" if result is not None and result.rejected else ""


def _count_span(ends: tuple[float, float] | None) -> str:
    if ends is None:
        return ""
    return "\n(" + " to ".join("no number" if math.isinf(one) else f"{one:.0f}" for one in ends) + ")"


def print_map(found: CrossoverMap) -> None:
    """Mean time of a request under the best offloading design, over that of the exact resident one, cell by cell."""
    out, exact = console(), found.residents[0]
    others = [f"*: also faster than {name}; " for name in found.residents[1:]]
    table = Table(
        title=f"When offloading helps: {found.model} on {_one(found.gpus)} {found.machine}, "
        f"answers of {found.output_tokens} tokens, {found.reused_share:.0%} of a prompt cached",
        title_justify="left",
        caption=f"mean E2E of the best of {', '.join(found.offloading)} over that of {exact} (below 1: "
        f"offloading is faster); {''.join(others)}only: {exact} does not keep up; -: neither does",
        caption_justify="left",
    )
    table.add_column("requests/s \\ tokens", justify="right")
    for context in found.contexts:
        table.add_column(str(context), justify="right")
    for row in reversed(range(len(found.rates_per_s))):
        cells = [_map_cell(found, row, column) for column in range(len(found.contexts))]
        table.add_row(f"{found.rates_per_s[row]:.3g}", *cells)
    out.print(table)


def _map_cell(found: CrossoverMap, row: int, column: int) -> str:
    ratio = found.ratio(row, column)
    if math.isnan(ratio):
        return "-"
    text = "only" if ratio == 0 else found.residents[0] if math.isinf(ratio) else f"{ratio:.2f}"
    return text + "".join("*" for name in found.residents[1:] if found.ratio(row, column, name) < 1)
