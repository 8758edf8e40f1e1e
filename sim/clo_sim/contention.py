"""How fast operations run beside each other: shared links, device memory, and SMs taken by copies.

Rates are relative: 1 is the speed of an operation alone. Knows nothing about time or order.
"""

from __future__ import annotations

from dataclasses import dataclass

from clo.pricing import Demand
from clo.profile import InterferenceCost

SHARED = ("h2d", "d2h", "hbm", "host_memory")
"""Capacities that are shared by those who use them at the same time."""


@dataclass(frozen=True, slots=True)
class Contention:
    """The rules of sharing. Each switch can be turned off to see what it earns."""

    interference: InterferenceCost
    share_links: bool = True
    interfere: bool = True

    def rates(self, demands: tuple[Demand, ...]) -> tuple[float, ...]:
        """Relative rate of each of the concurrent operations.

        Progressive filling: all rates rise together; whoever uses a capacity that becomes full stops rising. Users of
        one link thus slow by the same factor (processor sharing), and nobody runs faster than alone or than what
        interference leaves.
        """
        caps = [self._cap(index, demands) if self.interfere else 1.0 for index in range(len(demands))]
        return fill(demands, caps) if self.share_links else tuple(caps)

    def _cap(self, index: int, demands: tuple[Demand, ...]) -> float:
        if not demands[index].is_kernel:
            return 1.0
        others = [demand for other, demand in enumerate(demands) if other != index]
        taken = min(1.0, sum(demand.sms_taken for demand in others))
        slowed = self.interference.per_sm_share * taken
        if any(demand.is_dma for demand in others):
            slowed += self.interference.dma
        slowed += demands[index].slowed * sum(demand.host_share for demand in others)
        # `slowed` is the relative growth of the duration: 0.47 means 1.47 times as long
        return 1.0 / (1.0 + slowed)


def fill(demands: tuple[Demand, ...], caps: list[float]) -> tuple[float, ...]:
    """Max-min fair relative rates under `caps` and unit capacities."""
    rates = [0.0] * len(demands)
    rising = set(range(len(demands)))
    while rising:
        level = min(_level(resource, demands, rates, rising) for resource in SHARED)
        lowest_cap = min(caps[index] for index in rising)
        reached = min(level, lowest_cap)
        for index in rising:
            rates[index] = reached
        full = [resource for resource in SHARED if _level(resource, demands, rates, rising) <= reached * (1 + 1e-12)]
        stopped = {
            index
            for index in rising
            if caps[index] <= reached or any(getattr(demands[index], resource) > 0 for resource in full)
        }
        rising -= stopped
    return tuple(rates)


def _level(resource: str, demands: tuple[Demand, ...], rates: list[float], rising: set[int]) -> float:
    """The common rate at which `resource` becomes full."""
    stopped = set(range(len(demands))) - rising
    fixed = sum(getattr(demands[index], resource) * rates[index] for index in stopped)
    growing = sum(getattr(demands[index], resource) for index in rising)
    return max(0.0, 1.0 - fixed) / growing if growing > 0 else float("inf")
