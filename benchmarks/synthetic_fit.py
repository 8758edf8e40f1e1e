"""How well the synthetic workload keeps what it was fitted to: the table of docs/stand-in.md."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from clo import presets
from clo.trace_stats import describe
from clo_sim.synthetic import fit_synthetic


def rows(statistics: dict[str, Any]) -> dict[str, float]:
    """The statistics worth comparing, flat."""
    flat = {f"cosine at lag {lag}": value for lag, value in statistics["cosine_at_lag"].items()}
    flat |= {f"hit rate at tau {tau}": value for tau, value in statistics["hit_rate_at_tau"].items()}
    for selector, overlaps in statistics["adjacent_overlap"].items():
        flat |= {f"{selector}: adjacent overlap of {budget} pages": value for budget, value in overlaps.items()}
    for selector, by_distance in statistics["lookahead_overlap"].items():
        flat |= {f"{selector}: overlap of 32 pages predicted {d} ahead": one["32"] for d, one in by_distance.items()}
    return flat


def main() -> None:
    trace = presets.load_trace()
    generated = fit_synthetic(trace).generate(num_steps=trace.header.num_steps)
    recorded, synthetic = rows(describe(trace)), rows(describe(generated))
    for name, value in recorded.items():
        print(f"| {name} | {value:.2f} | {synthetic[name]:.2f} |")


if __name__ == "__main__":
    main()
