"""What is run on a machine to learn its costs, and what is run to check them. Knows nothing about fitting.

Calibration times every operation alone, and beside others, at the corners of a range of sizes. Validation runs designs
at those sizes and at sizes and choices in between, from which nothing was fitted.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import torch

from clo import presets
from clo.engine.cuda import bar
from clo.engine.decoder import Decoder
from clo.engine.measure import MachineRun, run_steps
from clo.engine.models.network import Network
from clo.engine.random_weights import random_prompt
from clo.errors import SpecError
from clo.operation_costs import GEMM_ROWS
from clo.plan import DecodePlan
from clo.specs import Cache, Design, ModelSpec, Transfer

DESIGNS = (
    "resident",
    "resident-sparse",
    "streamed",
    "staged",
    "lru-cpu",
    "recall",
    "resolve",
    "clo-v1",
    "clo-v2",
    "clo",
)

Size = tuple[int, int, float]
"""Context tokens, sequences, budget as a share of the context."""

SHORT_CONTEXT = 256


@dataclass(frozen=True, slots=True)
class Grid:
    """Sizes to fit from, sizes to be judged by, and the one that comes back to show how calm the machine is."""

    fitted: tuple[Size, ...]
    held_out: tuple[Size, ...]
    baseline: Size

    @property
    def short(self) -> tuple[Size, ...]:
        """For the GEMMs of every batch that their costs tell apart and no fitted size has."""
        batches = {batch for _, batch, _ in self.fitted}
        return tuple((SHORT_CONTEXT, rows, 0.1) for rows in GEMM_ROWS if rows not in batches)

    @property
    def longest_context(self) -> int:
        """Of every size."""
        return max(context for context, _, _ in (*self.fitted, *self.held_out, self.baseline))

    def halved(self) -> Grid:
        """Every context half as long."""
        return Grid(
            fitted=tuple(map(_halved, self.fitted)),
            held_out=tuple(map(_halved, self.held_out)),
            baseline=_halved(self.baseline),
        )


def _halved(size: Size) -> Size:
    context, batch, budget = size
    return context // 2, batch, budget


CPU_GRID = Grid(
    fitted=((512, 1, 0.1), (4096, 1, 0.1), (1024, 4, 0.2), (2048, 2, 0.05)),
    held_out=((640, 1, 0.2), (2560, 1, 0.08), (1280, 3, 0.15), (1792, 2, 0.06)),
    baseline=(2048, 1, 0.1),
)
CUDA_GRID = Grid(
    fitted=((4096, 1, 0.1), (32768, 1, 0.1), (8192, 4, 0.2), (16384, 2, 0.05)),
    held_out=((6144, 1, 0.15), (24576, 1, 0.07), (12288, 3, 0.1), (8192, 2, 0.12)),
    baseline=(16384, 1, 0.1),
)


SPARE_TOKENS = 48
"""Room for the tokens of a run."""


def grid_of(device: torch.device, model: ModelSpec) -> Grid:
    """Longer contexts where a device is worth them; halved until `model` has positions for the longest.

    Raises `SpecError` where that would leave less than `SHORT_CONTEXT`, which some runs have anyhow.
    """
    grid = CUDA_GRID if device.type == "cuda" else CPU_GRID
    while grid.longest_context + SPARE_TOKENS > model.max_positions:
        grid = grid.halved()
        if grid.longest_context < SHORT_CONTEXT:
            raise SpecError(
                f"{model.name} has {model.max_positions} positions: "
                f"calibration takes {SHORT_CONTEXT + SPARE_TOKENS} and more"
            )
    return grid


WARMUP_STEPS = {"cpu": 1, "cuda": 2}
"""Steps that do not count: on a CPU the second takes as long as later ones; on CUDA it records graphs."""

STEPS = 5
"""Steps of a run that count."""


def designs_of(device: torch.device, model: ModelSpec) -> tuple[str, ...]:
    """Presets that run on `device`, where storing through the BAR needs GDRCopy on CUDA, and with `model`."""
    stores = device.type != "cuda" or bar.is_installed(device)
    chosen = {name: presets.load_design(name, model) for name in DESIGNS}
    return tuple(
        name
        for name, design in chosen.items()
        if (stores or design.transfer is not Transfer.CPU_ZERO_COPY) and _suits(design, model)
    )


def _suits(design: Design, model: ModelSpec) -> bool:
    """A model with an indexer attends to what that chooses; who shares one has no query to choose ahead by."""
    indexer = model.indexer
    return indexer is None or (design.selects and not (design.prefetches_layers and indexer.shared_layers))


def plain_design(model: ModelSpec) -> str:
    """The preset that moves nothing and chooses nothing but what the model itself does."""
    return "resident" if model.indexer is None else "resident-sparse"


def quick_designs(model: ModelSpec) -> tuple[str, ...]:
    """Few that differ much."""
    return plain_design(model), "resolve", "clo"


def named(designs: str | None, device: torch.device, model: ModelSpec) -> tuple[str, ...]:
    """Presets from a comma-separated list, all if there is none. Raises `SpecError` for one that cannot be run."""
    possible = designs_of(device, model)
    if designs is None:
        return possible
    chosen = tuple(name.strip() for name in designs.split(",") if name.strip())
    if not chosen or not set(chosen) <= set(possible):
        raise SpecError(f"--designs {designs}: choose from {', '.join(possible)}")
    return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One run: a design at a size. `alone`: nothing overlaps. `fitted`: costs may be learnt from it.

    `turn` tells apart runs of the same that come back later on purpose.
    """

    design: Design
    size: Size
    alone: bool
    fitted: bool
    steps: int
    turn: int = 0

    @property
    def label(self) -> str:
        """For people."""
        context, batch, budget = self.size
        how = " alone" if self.alone else ""
        return f"{self.design.name}{how}, {batch} x {context} tokens, budget {budget:.0%}"

    @property
    def place(self) -> str:
        """Design and size, whenever it is run."""
        context, batch, budget = self.size
        return f"{self.design.name}, {batch} x {context}, {budget:g}"

    @property
    def key(self) -> str:
        """For file names: the same probe has the same key."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def local_design(name: str, size: Size, model: ModelSpec) -> Design:
    """A preset as it runs without a head profile: one threshold, slots for two budgets, threads this machine has.

    A model's own indexer chooses no more than it does, whatever the budget.
    """
    context, _, budget = size
    design = presets.load_design(name, model)
    fields: dict[str, object] = {"transfer_threads": min(design.transfer_threads, os.cpu_count() or 1)}
    if design.asks_indexer and model.indexer is not None:
        tokens = min(model.indexer.older_tokens, round(budget * context))
        fields["budget_pages"] = max(1, tokens // design.page_size)
    elif design.selects:
        fields["budget_fraction"] = budget
    if design.offloads and design.selects and design.cache is not Cache.NONE and not design.replaces_sets:
        fields |= {"slot_pages": None, "slot_budgets": 2.0}
    return design.as_without_head_profile().with_fields(**fields)


def calibration_probes(
    model: ModelSpec, designs: Sequence[str] = DESIGNS, *, steps: int = STEPS, grid: Grid = CPU_GRID
) -> list[Probe]:
    """Every design at every fitted size, alone and beside others; the baseline comes back to show how calm it is."""
    probes: list[Probe] = []
    # after every third design, and three times where there are fewer: two say nothing of a spread
    every = max(1, min(3, len(designs) // 3))
    for number, name in enumerate(designs):
        if number % every == 0:
            plain = local_design(plain_design(model), grid.baseline, model)
            probes.append(_fitted(plain, grid.baseline, alone=False, steps=steps, turn=number))
        for size in grid.fitted:
            design = local_design(name, size, model)
            probes += [_fitted(design, size, alone=alone, steps=steps) for alone in (True, False)]
    for size in grid.short:
        probes += [_fitted(design, size, alone=True, steps=steps) for design in _every_gemm(designs, size, model)]
    for size in grid.fitted:
        for design in _fitted_variants(designs, size, model):
            probes += [_fitted(design, size, alone=alone, steps=steps) for alone in (True, False)]
    return probes


def validation_probes(
    model: ModelSpec, designs: Sequence[str] = DESIGNS, *, steps: int = STEPS, grid: Grid = CPU_GRID
) -> list[Probe]:
    """Half at the fitted sizes, half at others, where some choices of a design are others too.

    In turn, so that what disturbs the machine for minutes meets both: the fitted ones say how much slower it became.
    """
    probes: list[Probe] = []
    for size in chain.from_iterable(zip_longest(grid.fitted, grid.held_out)):
        if size is None:
            continue
        fitted = size in grid.fitted
        chosen = _fitted_designs(designs, size, model)
        if not fitted:
            chosen += _variants(designs, size, model)
        probes += [Probe(design=design, size=size, alone=False, fitted=fitted, steps=steps) for design in chosen]
    return probes


def _fitted_designs(designs: Sequence[str], size: Size, model: ModelSpec) -> list[Design]:
    return [local_design(name, size, model) for name in designs] + _fitted_variants(designs, size, model)


def _fitted_variants(designs: Sequence[str], size: Size, model: ModelSpec) -> list[Design]:
    """What no preset does beside other operations: fetching ahead only what is missing."""
    ahead = local_design("clo", size, model).with_fields(name="clo, fetching ahead", prefetch_depth=1)
    return [ahead] if "clo" in designs and _suits(ahead, model) else []


def _every_gemm(designs: Sequence[str], size: Size, model: ModelSpec) -> list[Design]:
    """Few designs that run every GEMM: those of the model, and one that predicts the next layer's query."""
    ahead = [design for design in _fitted_designs(designs, size, model) if design.prefetches_layers and design.selects]
    return [local_design(plain_design(model), size, model), *ahead[:1]]


def _variants(designs: Sequence[str], size: Size, model: ModelSpec) -> list[Design]:
    """Designs that nothing was fitted from."""
    changes: dict[str, dict[str, object]] = {
        "clo": {"name": "clo, fetching two ahead", "prefetch_depth": 2},
        "resolve": {"name": "resolve, one budget", "slot_budgets": 1.0},
        "clo-v2": {"name": "clo-v2, tau 0.95", "tau": 0.95},
    }
    chosen = [local_design(name, size, model).with_fields(**changes[name]) for name in changes if name in designs]
    return [design for design in chosen if _suits(design, model)]


def _fitted(design: Design, size: Size, *, alone: bool, steps: int, turn: int = 0) -> Probe:
    return Probe(design=design, size=size, alone=alone, fitted=True, steps=steps, turn=turn)


def run_probe(network: Network, probe: Probe) -> MachineRun:
    """Decode; contexts are made up, so that a long one costs its memory only."""
    context, batch, _ = probe.size
    with Decoder(network, probe.design, max_new_tokens=SPARE_TOKENS, one_at_a_time=probe.alone) as decoder:
        prompts = [random_prompt(network, context - probe.steps, seed=seed) for seed in range(batch)]
        warmup_steps = WARMUP_STEPS[network.device.type]
        return run_steps(decoder, prompts, steps=probe.steps, warmup_steps=warmup_steps)


def plan_of(network: Network, probe: Probe) -> DecodePlan:
    """The plan that `run_probe` decodes under."""
    context, batch, _ = probe.size
    with Decoder(network, probe.design, max_new_tokens=SPARE_TOKENS) as decoder:
        return decoder.make_plan([context - probe.steps] * batch)
