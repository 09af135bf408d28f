"""Draws a report: for each panel the distribution over the rounds, with the median marked."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

from .report import quartiles

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from .report import Curves, Panel, Report

__all__ = ("draw",)

WIDTH = 9.0
"""Inches."""

STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "sessionmgr",  # the same figures give the same file
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
INK, POINTS = "#222222", "#4477aa"
LINES = ("#4477aa", "#222222", "#cc6677", "#117733", "#aa7744", "#999999")


def draw(report: Report, path: Path) -> None:
    """Write a report's picture as SVG."""
    heights = [0.8 + 0.4 * len(panel.samples) for panel in report.panels]
    heights += [3.2 for _ in report.curves]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, sum(heights) + 0.5), layout="constrained")
        grid = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)
        axes = list(grid[:, 0])
        for panel in report.panels:
            _draw_panel(axes.pop(0), panel)
        for curves in report.curves:
            _draw_curves(axes.pop(0), curves)
        figure.suptitle(report.name.replace("_", " "))
        figure.savefig(path, format="svg", metadata={"Date": None})


def _draw_panel(axes: Axes, panel: Panel) -> None:
    """Draw a row of points for each contender, its quartiles as a bar and its median as a line."""
    for row, figures in enumerate(panel.samples.values()):
        low, high = quartiles(figures)
        middle = median(figures)
        spread = [row + 0.22 * (number % 5 - 2) / 2 for number in range(len(figures))]
        axes.barh(row, high - low, left=low, height=0.6, color="#dddddd")
        axes.plot(figures, spread, ".", color=POINTS, markersize=3, alpha=0.5)
        axes.vlines(middle, row - 0.35, row + 0.35, color=INK, linewidth=2)
    labels = [f"{name}  {median(figures):.3g}" for name, figures in panel.samples.items()]
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    # a few rounds that were disturbed from outside must not flatten all the others
    axes.set_xlim(0, 1.15 * max(_most_of(figures) for figures in panel.samples.values()))
    axes.set_title(panel.title, loc="left", fontsize=10)
    axes.set_xlabel(panel.unit)


def _most_of(figures: list[float]) -> float:
    return sorted(figures)[int(0.95 * (len(figures) - 1))]


def _draw_curves(axes: Axes, curves: Curves) -> None:
    medians = curves.medians()
    for number, (name, rounds) in enumerate(curves.samples.items()):
        color = LINES[number % len(LINES)]
        axes.plot(curves.steps, medians[name], "-", color=color, label=name, linewidth=1.5)
        for figures in rounds:
            axes.plot(curves.steps, figures, ".", color=color, markersize=4, alpha=0.5)
    axes.set_title(curves.title, loc="left", fontsize=10)
    axes.set_xlabel(curves.along)
    axes.set_ylabel(curves.unit)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
