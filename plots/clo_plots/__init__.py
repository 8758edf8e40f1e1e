"""Figures from results, sweeps and timelines. Knows nothing about how those came about."""

from clo_plots.choices import plot_choices
from clo_plots.pareto import DesignPoint, pareto_front, plot_pareto
from clo_plots.stalls import plot_stalls
from clo_plots.style import save_figure
from clo_plots.timelines import plot_timelines

__all__ = [
    "DesignPoint",
    "pareto_front",
    "plot_choices",
    "plot_pareto",
    "plot_stalls",
    "plot_timelines",
    "save_figure",
]
