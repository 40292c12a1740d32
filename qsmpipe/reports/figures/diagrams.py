"""Diagrams of numbers: the histogram of susceptibility, and how lambda was chosen."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from qsmpipe.reports.figures.mosaic import BARS, FAINT, FONT, INK, PAPER, QSM, blank, save
from qsmpipe.reports.figures.slices import Picture
from qsmpipe.reports.figures.susceptibility import CHI_WINDOW
from qsmpipe.reports.figures.view import View
from qsmpipe.reports.maps import Maps


def draw_histogram(maps: Maps, view: View, folder: Path) -> Picture | None:
    """Draw the histogram of the susceptibility in its mask, linear and logarithmic."""
    if maps.chi is None:
        return None
    values = maps.chi[maps.mask]
    values = values[np.isfinite(values)].astype(np.float64)
    if not values.size:
        return None
    path = folder / "susceptibility-histogram.png"
    figure = blank(420)
    reach = max(float(np.abs(values).max()), 0.2)
    median = float(np.median(values))
    for place, limit, scale, title in (
        ((0.07, 0.17, 0.41, 0.68), 0.2, "linear", "-0.2 to 0.2 ppm"),
        ((0.56, 0.17, 0.41, 0.68), reach, "log", "All values, logarithmic"),
    ):
        axes = figure.add_axes(place)
        counts, edges = np.histogram(values, bins=161, range=(-limit, limit))
        axes.axvspan(*CHI_WINDOW, color="#ffffff", alpha=0.09, lw=0)
        axes.stairs(counts, edges, fill=True, color=BARS, alpha=0.5)
        axes.stairs(counts, edges, color=BARS, lw=1.3)
        axes.axvline(median, color=QSM, lw=1.6)
        axes.set_yscale(scale)
        axes.set_xlim(-limit, limit)
        axes.set_ylim(0.7 if scale == "log" else 0, max(counts.max() * 1.1, 2))
        _dress(axes, title, "susceptibility (ppm)", "voxels")
    save(figure, None, path)
    return Picture(
        path,
        "Histogram of susceptibility",
        f"All {values.size:,} voxels of the QSM mask. The pale band is the window of the "
        f"pictures (-0.1 to 0.1 ppm), the orange line the median ({median:+.4f} ppm).",
        "Susceptibility",
    )


def draw_curves(maps: Maps, view: View, folder: Path) -> Picture | None:
    """Draw what the weights of regularisations were chosen from: penalty over residual."""
    curves = {name: curve for name, curve in maps.curves.items() if _drawable(curve)}
    if not curves:
        return None
    path = folder / "susceptibility-lambda.png"
    columns = len(curves)
    figure = blank(420, min(columns, 2) / 2)
    words = []
    for place, (name, curve) in enumerate(curves.items()):
        axes = figure.add_axes(((place + 0.16) / columns, 0.17, 0.74 / columns, 0.68))
        x, y, chosen = curve["residuals"], curve["penalties"], curve["chosen"]
        weights = curve["lambdas"]
        axes.loglog(x, y, color=BARS, lw=1.6, marker="o", ms=4)
        axes.plot(x[chosen], y[chosen], color=QSM, marker="o", ms=12, mfc="none", mew=2)
        for end in sorted({0, chosen, len(weights) - 1}):
            axes.annotate(
                f"{weights[end]:.2g}", (x[end], y[end]), (9, 6), textcoords="offset points",
                color=QSM if end == chosen else INK, fontsize=FONT,
            )  # fmt: skip
        axes.margins(0.12)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
            axis.set_minor_formatter(NullFormatter())
        _dress(axes, name, "norm of the weighted residual (ppm)", "penalty without its weight")
        how = "by" if curve["found"] else "as none was found by"
        words.append(f"{name}: {weights[chosen]:.3g}, {how} the rule {curve['rule']}.")
    save(figure, None, path)
    return Picture(
        path,
        "Choice of lambda",
        "Misfit of the data against the size of what the regularisation penalises, for the values "
        f"of lambda that were tried. The circle marks the chosen one. {' '.join(words)}",
        "Susceptibility",
    )


def _drawable(curve: Mapping[str, Any]) -> bool:
    values = [*curve["residuals"], *curve["penalties"]]
    return bool(values) and all(np.isfinite(value) and value > 0 for value in values)


def _dress(axes: Any, title: str, x: str, y: str) -> None:
    """Colours and frame of a diagram."""
    axes.set_facecolor(PAPER)
    axes.set_title(title, color=INK, fontsize=FONT + 1, loc="left")
    axes.set_xlabel(x, color=INK, fontsize=FONT)
    axes.set_ylabel(y, color=INK, fontsize=FONT)
    axes.tick_params(which="both", colors=FAINT, labelsize=FONT - 0.5, labelcolor=INK)
    axes.grid(color="#ffffff", alpha=0.12, lw=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
