"""What the kernels are meant to reach, and whether the figures of a run reach it. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clo_kernels_bench.figures import Figure

GATHER, ATTENTION, TORCH, PAIR = "gather_pages", "sparse_decode_attention", "torch sdpa", "hit_test + resolve_pages"
LINK_SHARE, MEMORY_SHARE = 0.9, 0.8
LONG_BYTES = 256e6
"""Keys and values whose reading takes long beside launching two kernels: below, the share of the limit is no goal."""
FEW_PROGRAMS, PAGE_KIB, LAUNCH_MIB = 16, 8, 64


@dataclass(frozen=True, slots=True)
class Goal:
    """One goal and what was found; None: nothing was timed that says."""

    goal: str
    found: str
    met: bool | None

    def line(self) -> str:
        """For people."""
        return f"{'not timed' if self.met is None else 'met' if self.met else 'MISSED':9}  {self.goal}: {self.found}"

    def as_json(self) -> dict[str, Any]:
        """The whole record."""
        return asdict(self)


def goals(figures: Sequence[Figure]) -> Iterator[Goal]:
    """Each goal, by the medians. Of a goal that several figures must reach, the figure that is furthest from it."""
    yield _gathers(figures)
    attention = [figure for figure in figures if figure.operation == ATTENTION and "splits" not in figure.case]
    yield _furthest(
        f"{ATTENTION}, {LONG_BYTES / 1e6:.0f} MB and more: {MEMORY_SHARE:.0%} of device memory's rate",
        [(_share(figure) / MEMORY_SHARE, figure) for figure in attention if (figure.num_bytes or 0) >= LONG_BYTES],
    )
    beside = [(figure, _fastest(figures, TORCH, figure)) for figure in attention]
    yield _furthest(
        f"{ATTENTION}: no slower than torch's fastest over as many tokens",
        [(torch.median_us / figure.median_us, figure, torch) for figure, torch in beside if torch is not None],
    )
    pairs = [figure for figure in figures if figure.operation == PAIR and figure.limit_us is not None]
    yield _furthest(f"{PAIR}: 10 us a layer at batch 1", [(_share(figure), figure) for figure in pairs])


def _gathers(figures: Iterable[Figure]) -> Goal:
    """Of each page size the best number of programs counts."""
    timed = [figure for figure in figures if figure.operation == GATHER and _is_meant(figure)]
    best = {figure.case["page_KiB"]: figure for figure in sorted(timed, key=_share)}
    return _furthest(
        f"{GATHER}, pages of {PAGE_KIB} KiB up, at most {FEW_PROGRAMS} programs: {LINK_SHARE:.0%} of a pinned copy",
        [(_share(figure) / LINK_SHARE, figure) for figure in best.values()],
    )


def _is_meant(gather: Figure) -> bool:
    page_kib, programs, mib = (int(gather.case[name]) for name in ("page_KiB", "programs", "MiB"))
    is_random = "pages" not in gather.case
    return is_random and page_kib >= PAGE_KIB and programs <= FEW_PROGRAMS and mib == LAUNCH_MIB


def _share(figure: Figure) -> float:
    return figure.share_of_limit or 0.0


def _fastest(figures: Iterable[Figure], operation: str, like: Figure) -> Figure | None:
    """Of those whose name begins so and whose case is the same."""
    same = [figure for figure in figures if figure.operation.startswith(operation) and figure.case == like.case]
    return min(same, key=lambda figure: figure.median_us, default=None)


def _furthest(goal: str, reached: Sequence[tuple[Any, ...]]) -> Goal:
    """`reached`: how many times the goal, and the figures that say so."""
    if not reached:
        return Goal(goal, "-", None)
    times, *figures = min(reached, key=lambda entry: float(entry[0]))
    said = " against ".join(f"{f.operation} {dict(f.case)} {f.median_us:.2f} us" for f in figures)
    return Goal(goal, f"{times:.2f} times the goal in {said}", times >= 1)
