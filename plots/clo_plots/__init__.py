"""Figures from results, sweeps and timelines. Knows nothing about how those came about."""

from clo_plots.choices import plot_choices
from clo_plots.crossover import plot_crossover
from clo_plots.fleets import plot_fleets
from clo_plots.load import plot_load
from clo_plots.pareto import DesignPoint, pareto_front, plot_pareto
from clo_plots.service import plot_service
from clo_plots.stalls import plot_stalls
from clo_plots.style import save_figure
from clo_plots.timelines import plot_timelines

__all__ = [
    "DesignPoint",
    "pareto_front",
    "plot_choices",
    "plot_crossover",
    "plot_fleets",
    "plot_load",
    "plot_pareto",
    "plot_service",
    "plot_stalls",
    "plot_timelines",
    "save_figure",
]
