"""When does offloading help? Designs against keeping everything on the GPU, over context length and load.

Every cell is a service of one worker under the same Poisson arrivals of prompts of one length. Knows no figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from clo.specs import Design
from clo_sim.run import Executor
from clo_sim.scene import Scene
from clo_sim.serving.load import generate
from clo_sim.serving.metrics import summarise_service
from clo_sim.serving.requests import BLOCK_TOKENS, NS_PER_S, RequestTrace
from clo_sim.serving.service import ServiceSettings, serve
from clo_sim.serving.worker import WorkerCosts, worker_costs

NUM_REQUESTS = 300
RATES = 12

Progress = Callable[[int, int], None]


Rows = tuple[tuple[float | None, ...], ...]
"""Mean time of a request, `[rate][context]`: none where the design does not keep up or cannot hold a single request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossoverMap:
    """Mean times of requests by design; `residents` keep everything on the GPU, the first of them is exact."""

    machine: str
    gpus: int
    model: str
    residents: tuple[str, ...]
    output_tokens: int
    reused_share: float
    contexts: tuple[int, ...]
    rates_per_s: tuple[float, ...]
    e2e_s: dict[str, Rows]

    @property
    def offloading(self) -> tuple[str, ...]:
        """The designs that are held against the resident ones."""
        return tuple(name for name in self.e2e_s if name not in self.residents)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: mean times by design, `[rate][context]` (none: does not keep up), and ratios to `residents`.

        A ratio is none where neither keeps up, 0 where only offloading does, and -1 where only the resident one does.
        """
        places = [[(row, column) for column in range(len(self.contexts))] for row in range(len(self.rates_per_s))]
        return {
            "machine": self.machine,
            "gpus": self.gpus,
            "model": self.model,
            "residents": list(self.residents),
            "offloading": list(self.offloading),
            "output_tokens": self.output_tokens,
            "reused_share": self.reused_share,
            "contexts": list(self.contexts),
            "rates_per_s": list(self.rates_per_s),
            "e2e_s": {name: [list(row) for row in rows] for name, rows in self.e2e_s.items()},
            "best": [[self.best(*place) for place in row] for row in places],
            "ratio": {
                name: [[_plain(self.ratio(*at, name)) for at in row] for row in places] for name in self.residents
            },
        }

    def best(self, row: int, column: int) -> str:
        """The design with the least mean time there; empty where none keeps up."""
        serving = {name: rows[row][column] for name, rows in self.e2e_s.items()}
        known = {name: seconds for name, seconds in serving.items() if seconds is not None}
        return min(known, key=lambda name: known[name]) if known else ""

    def ratio(self, row: int, column: int, resident: str = "") -> float:
        """Best offloading design's mean time over that of a resident one (the first, if none is named): 0 where only
        the former keeps up, infinite where only the latter does, NaN where neither."""
        ours = [self.e2e_s[name][row][column] for name in self.offloading]
        least = min((seconds for seconds in ours if seconds is not None), default=None)
        theirs = self.e2e_s[resident or self.residents[0]][row][column]
        if least is None:
            return math.nan if theirs is None else math.inf
        return 0.0 if theirs is None else least / theirs


def _plain(ratio: float) -> float | None:
    """JSON has no infinity."""
    return None if math.isnan(ratio) else -1.0 if math.isinf(ratio) else ratio


def crossover_map(
    scene: Scene,
    designs: Sequence[Design],
    *,
    residents: Sequence[Design],
    contexts: Sequence[int],
    output_tokens: int,
    reused_share: float = 0.0,
    rates_per_s: Sequence[float] | None = None,
    settings: ServiceSettings | None = None,
    chunk_tokens: int = 2048,
    num_requests: int = NUM_REQUESTS,
    executor: Executor = "clock",
    seed: int = 0,
    progress: Progress | None = None,
) -> CrossoverMap:
    """Serve `num_requests` at every context and rate under every design.

    `reused_share` of each prompt is one prefix that all share, found in the prefix cache after the first. Rates default
    to a geometric row from a tenth of what one request after the other makes of the longest context, to twice what
    prefill allows of the shortest.
    """
    chosen = replace(settings or ServiceSettings(), gpus=scene.machine.tensor_parallel)
    longest = _load(max(contexts), output_tokens, reused_share, 1.0, 1, seed)
    every = {design.name: design for design in (*residents, *designs)}
    priced = {
        name: worker_costs(scene, design, longest, chunk_tokens=chunk_tokens, executor=executor)
        for name, design in every.items()
    }
    rates = tuple(rates_per_s or _rates(priced[residents[0].name], contexts, output_tokens, reused_share))
    e2e_s: dict[str, Rows] = {}
    for number, (name, costs) in enumerate(priced.items()):
        columns = []
        for place, context in enumerate(contexts):
            loads = [_load(context, output_tokens, reused_share, rate, num_requests, seed) for rate in rates]
            columns.append(_column(costs, loads, chosen))
            if progress is not None:
                progress(number * len(contexts) + place + 1, len(every) * len(contexts))
        e2e_s[name] = tuple(zip(*columns, strict=True))
    return CrossoverMap(
        machine=scene.machine.name,
        gpus=chosen.gpus,
        model=scene.model.name,
        residents=tuple(design.name for design in residents),
        output_tokens=output_tokens,
        reused_share=reused_share,
        contexts=tuple(contexts),
        rates_per_s=rates,
        e2e_s=e2e_s,
    )


def _rates(costs: WorkerCosts, contexts: Sequence[int], output_tokens: int, reused_share: float) -> tuple[float, ...]:
    short, long = min(contexts), max(contexts)
    slowest = costs.alone_ns(long) + costs.clock(1).total(long, output_tokens)
    fastest = costs.alone_ns(short, int(reused_share * (short - 1)))
    low, high = 0.1 * NS_PER_S / slowest, 2.0 * NS_PER_S / fastest
    return tuple(low * (high / low) ** (step / (RATES - 1)) for step in range(RATES))


def _load(context: int, output_tokens: int, reused_share: float, rate: float, count: int, seed: int) -> RequestTrace:
    """Poisson arrivals of equal requests, the first blocks of whose prompts are the same."""
    drawn = generate("poisson", rate_per_s=rate, num_requests=count, lengths=[(context, output_tokens)], seed=seed)
    blocks = tuple(range(int(reused_share * context) // BLOCK_TOKENS))
    return replace(drawn, requests=tuple(one._replace(prefix_blocks=blocks) for one in drawn.requests))


def _column(costs: WorkerCosts, loads: Sequence[RequestTrace], settings: ServiceSettings) -> tuple[float | None, ...]:
    """One context under rising load; beyond the first that is too much, all are."""
    times = list(takewhile(lambda seconds: seconds is not None, (_mean_e2e_s(load, costs, settings) for load in loads)))
    return (*times, *[None] * (len(loads) - len(times)))


def _mean_e2e_s(load: RequestTrace, costs: WorkerCosts, settings: ServiceSettings) -> float | None:
    result = summarise_service(serve(load, costs, settings))
    return None if result.rejected or result.unstable else result.e2e_s.mean


def contexts_up_to(longest: int, *, shortest: int = 4096) -> tuple[int, ...]:
    """Powers of two from `shortest`, and `longest` at the end."""
    sizes, size = [], shortest
    while size < longest:
        sizes.append(size)
        size *= 2
    return (*sizes, longest)
