"""Figures from results, sweeps, timelines, services and calibrations. Knows nothing about how those came about."""

from clo_plots.answers import parse_answers, plot_answers
from clo_plots.choices import plot_choices
from clo_plots.crossover import plot_crossover
from clo_plots.fits import plot_fits
from clo_plots.fleets import plot_fleets
from clo_plots.load import plot_load
from clo_plots.pareto import DesignPoint, pareto_front, plot_pareto
from clo_plots.service import plot_service
from clo_plots.stalls import plot_stalls
from clo_plots.style import save_figure
from clo_plots.timelines import plot_timelines
from clo_plots.verdicts import Judged, plot_ablation, plot_verdict

__all__ = [
    "DesignPoint",
    "Judged",
    "pareto_front",
    "parse_answers",
    "plot_ablation",
    "plot_answers",
    "plot_choices",
    "plot_crossover",
    "plot_fits",
    "plot_fleets",
    "plot_load",
    "plot_pareto",
    "plot_service",
    "plot_stalls",
    "plot_timelines",
    "plot_verdict",
    "save_figure",
]
