"""Fleets with what they cost, and which of them is best. Knows nothing about how a fleet was found, or tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from clo.errors import SpecError

if TYPE_CHECKING:
    from clo_sim.serving.plan import Fleet


@dataclass(frozen=True, slots=True, kw_only=True)
class Priced:
    """A fleet with what it costs; costs are none where no price was given. `best`: the best design of its machine."""

    fleet: Fleet
    best: bool = False
    cost_per_hour: float | None = None
    cost_per_million: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: numbers that are infinite are left out."""
        data = asdict(self.fleet) | {"best": self.best, "cost_per_hour": self.cost_per_hour}
        data["cost_per_million_output_tokens"] = self.cost_per_million
        data["margin"] = None if math.isinf(self.fleet.margin) else self.fleet.margin
        ends = self.fleet.gpus_interval
        data["gpus_interval"] = ends and [None if math.isinf(end) else int(end) for end in ends]
        data["result"] = None if self.fleet.result is None else self.fleet.result.as_dict()
        return data


def prices_from(given: Sequence[str], machines: Sequence[str]) -> dict[str, float]:
    """From `--price MACHINE=DOLLARS`, by machine. Raises `SpecError` for what is none."""
    prices = {}
    for text in given:
        name, _, dollars = text.partition("=")
        try:
            value = float(dollars)
        except ValueError:
            value = math.nan
        if name not in machines or not (value > 0 and math.isfinite(value)):
            raise SpecError(
                f"--price {text}: expected MACHINE=DOLLARS per GPU and hour, MACHINE of {', '.join(machines)}"
            )
        prices[name] = value
    return prices


def with_price(one: Priced, prices: dict[str, float], machine: str) -> Priced:
    """With its cost, where the machine has a price, in dollars per GPU and hour."""
    fleet = one.fleet
    if fleet.gpus is None or machine not in prices or fleet.result is None:
        return one
    per_hour = fleet.gpus * prices[machine]
    per_million = per_hour / 3600 / fleet.result.output_tokens_per_s * 1e6
    return replace(one, cost_per_hour=per_hour, cost_per_million=per_million)


def best_of(priced: Iterable[Priced]) -> Priced | None:
    """The cheapest of the machines' best fleets; without prices for all of them, the one with the fewest GPUs."""
    able = [one for one in priced if one.best]
    if not able:
        return None
    if all(one.cost_per_hour is not None for one in able):
        return min(able, key=lambda one: one.cost_per_hour or 0.0)
    return min(able, key=lambda one: rank(one.fleet))


def rank(fleet: Fleet) -> tuple[float, float]:
    """Fewer GPUs, then more distance to the limits; what cannot be done comes last."""
    return (math.inf if fleet.gpus is None else fleet.gpus, fleet.margin)
