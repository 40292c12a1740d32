"""Slices side by side, with colours, outlines and letters, as one PNG file."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
from contourpy import LineType, contour_generator
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter
from PIL import Image

from qsmpipe.reports.figures.view import SAGITTAL

WIDTH, BAR = 1400, 96
"""Width of a figure and of the colour bar's column in it (pixels)."""
GAP = 8
"""Least space between two slices (pixels)."""
LINE = 26
"""Height of a line of text (pixels)."""
DPI = 100
FONT = 11.5
INK, PAPER, FAINT = "#e6e9ee", "#000000", "#9aa4b2"
BRAIN, QSM, ERODED = "#3fd0ff", "#ffb000", "#8a4b12"
"""Colours of the brain mask's outline, of the QSM mask's, and of what lies between them."""
BARS = "#5aa9e6"


@dataclass(frozen=True)
class Paint:
    """How values become colours."""

    colours: str
    window: tuple[float, float]
    label: str
    ticks: tuple[float, ...] = ()
    tick_labels: tuple[str, ...] = ()
    nearest: bool = False
    """Show voxels as they are; smoothing would blur wraps."""

    @property
    def colourmap(self) -> Colormap:
        """Colour map by its name."""
        return matplotlib.colormaps[self.colours]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Turn values into colours (..., 3)."""
        low, high = self.window
        scaled = np.clip((finite(values) - low) / (high - low), 0, 1)
        return self.colourmap(scaled)[..., :3]


@dataclass(frozen=True)
class Panel:
    """One slice of a mosaic."""

    image: np.ndarray
    plane: int
    size: tuple[float, float]
    note: str = ""
    outlines: tuple[tuple[np.ndarray, str], ...] = ()
    tint: np.ndarray | None = None
    dark: np.ndarray | None = None
    """Where nothing is known: black, whatever colour 0 has."""


@dataclass
class Mosaic:
    """Rows of slices at one scale, a colour bar on the right, a legend below."""

    rows: list[list[Panel]] = field(default_factory=list)
    legend: list[tuple[str, str]] = field(default_factory=list)
    """Colour and text."""
    tallest: int = 420
    """Greatest height of a slice (pixels)."""


def finite(values: np.ndarray) -> np.ndarray:
    """Take what is not finite for 0."""
    return np.nan_to_num(values, posinf=0.0, neginf=0.0)


def blank(height: int, share: float = 1.0) -> Figure:
    """Make an empty figure of this height (pixels) and this share of the common width."""
    size = round(WIDTH * share) / DPI, height / DPI
    figure = Figure(figsize=size, dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def _layout(rows: list[list[Panel]], width: int, tallest: int) -> Iterator[tuple[Panel, Any]]:
    """Place of each panel (left, top, width, height in pixels); one scale for all."""
    scales = [(width - GAP * (len(row) - 1)) / sum(panel.size[0] for panel in row) for row in rows]
    scale = min([*scales, *(tallest / panel.size[1] for row in rows for panel in row)])
    top = GAP / 2
    for row in rows:
        sizes = [(scale * panel.size[0], scale * panel.size[1]) for panel in row]
        space = (width - sum(w for w, _ in sizes)) / len(row)
        left = space / 2
        height = max(h for _, h in sizes)
        for panel, (w, h) in zip(row, sizes, strict=True):
            yield panel, (left, top, w, h)
            left += w + space
        top += height + LINE + GAP


def render(mosaic: Mosaic, paint: Paint, path: Path) -> None:
    """Draw a mosaic, its colour bar and its legend into a file."""
    placed = list(_layout(mosaic.rows, WIDTH - BAR, mosaic.tallest))
    body = max(top + h for _, (_, top, _, h) in placed) + LINE + GAP
    height = round(body + (LINE + 4 if mosaic.legend else 0))
    figure = blank(height)
    axes = figure.add_axes((0, 0, 1, 1))  # one for all slices, in pixels: many are slow
    axes.set_axis_off()
    for panel, place in placed:
        _fill(axes, panel, place, nearest=paint.nearest)
    left, middle = 14.0, body + LINE / 2 - 2
    for colour, text in mosaic.legend:
        axes.text(left, middle, "\N{BLACK SQUARE}", color=colour, fontsize=FONT + 2, va="center")
        axes.text(left + 20, middle, text, color=INK, fontsize=FONT, va="center")
        left += 50 + 8.6 * len(text)
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(height, 0)
    _colour_bar(figure, paint, body, height)
    save(figure, paint, path)


def _fill(
    axes: Any, panel: Panel, place: tuple[float, float, float, float], *, nearest: bool
) -> None:
    """Draw one slice with its outlines and letters."""
    left, top, w, h = place
    image = panel.image.copy()
    if panel.dark is not None:
        image[panel.dark] = 0
    if panel.tint is not None:
        image[panel.tint] = matplotlib.colors.to_rgb(ERODED)
    rows, columns = image.shape[:2]
    axes.imshow(
        image,
        interpolation="nearest" if nearest else "auto",
        aspect="auto",
        extent=(left, left + w, top + h, top),
    )
    for mask, colour in panel.outlines:
        if mask.any() and not mask.all() and min(mask.shape) > 1:
            contour = contour_generator(
                left + (np.arange(columns) + 0.5) * w / columns,
                top + (np.arange(rows) + 0.5) * h / rows,
                mask.astype(np.float32),
                line_type=LineType.Separate,
            )
            lines = cast(list[np.ndarray], contour.lines(0.5))
            axes.add_collection(LineCollection(lines, colors=[colour], linewidths=1.1))
    first, last = ("A", "P") if panel.plane == SAGITTAL else ("R", "L")
    halo = [withStroke(linewidth=2.5, foreground=PAPER)]
    style = {"color": INK, "fontsize": FONT - 1, "fontweight": "bold", "path_effects": halo}
    axes.text(left + 4, top + 4, first, ha="left", va="top", **style)
    axes.text(left + w - 4, top + 4, last, ha="right", va="top", **style)
    axes.text(
        left + w / 2, top + h + 5, panel.note, color=FAINT, fontsize=FONT - 1.5, ha="center",
        va="top",
    )  # fmt: skip


def _colour_bar(figure: Figure, paint: Paint, body: float, height: float) -> None:
    long = min(body - 2 * LINE, 360)
    middle = body / 2
    axes = figure.add_axes((
        1 - 88 / WIDTH, 1 - (middle + long / 2) / height, 16 / WIDTH, long / height
    ))  # fmt: skip
    bar = figure.colorbar(
        ScalarMappable(Normalize(*paint.window), paint.colourmap),
        cax=axes,
        ticks=list(paint.ticks) or None,
        format=FuncFormatter(lambda value, _: f"{value:.4g}".replace("-", "\N{MINUS SIGN}")),
    )
    if paint.tick_labels:
        bar.ax.set_yticklabels(paint.tick_labels)
    bar.outline.set_edgecolor(FAINT)
    bar.ax.tick_params(colors=INK, labelsize=FONT - 1)
    bar.ax.set_title(paint.label, color=INK, fontsize=FONT - 0.5, pad=8)


def save(figure: Figure, paint: Paint | None, path: Path) -> None:
    """Write a PNG of 256 colours without metadata: a third of the size, the same for all time."""
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined]
    palette = Image.new("P", (1, 1))
    palette.putpalette(_palette(paint).tobytes())
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.quantize(palette=palette, dither=Image.Dither.NONE).save(path)


def _palette(paint: Paint | None) -> np.ndarray:
    """List a figure's colours: its colour map, greys for text, shades of the outlines."""
    steps = np.linspace(0, 1, 184)
    shades = np.linspace(0, 1, 13)[1:, None]
    marks = [shades * matplotlib.colors.to_rgb(mark) for mark in (BRAIN, QSM, ERODED)]
    marks[2] = shades * matplotlib.colors.to_rgb(ERODED if paint else BARS)
    ramp = matplotlib.colormaps[paint.colours if paint else "gray"](steps)[:, :3]
    greys = np.repeat(np.linspace(0, 1, 36)[:, None], 3, axis=1)
    return np.rint(255 * np.concatenate([ramp, greys, *marks])).astype(np.uint8)
