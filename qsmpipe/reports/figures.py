"""Pictures of one acquisition's maps, as PNG files; the only place that knows Matplotlib.

Slices lie in the voxel axes nearest to the anatomical ones (no resampling), in radiological
order: right on the left, anterior on top or on the left.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from qsmpipe.numerics.units import GAMMA
from qsmpipe.reports.maps import Maps

SAGITTAL, CORONAL, AXIAL = 0, 1, 2
WIDTH, BAR = 1400, 96
"""Width of a figure and of the colour bar's column in it (pixels)."""
WIDE, TIGHT = 14.0, 2.0
"""What is shown around the brain mask (mm): of images of the head, of maps known inside it."""
STRAY = 0.001
"""Share of a mask, at each end of an axis, that does not widen what is shown."""
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

CHI_WINDOW = (-0.1, 0.1)
WIDE_WINDOW = (-0.2, 0.2)
R2STAR_WINDOW = (0.0, 100.0)

RADIOLOGICAL = "Radiological view: the patient's right (R) is on the left."


class Picture(NamedTuple):
    """A figure, with what the report says of it."""

    file: Path
    title: str
    caption: str
    section: str


@dataclass(frozen=True)
class View:
    """How a grid is looked at: which voxel axis runs to the right, to the front and up.

    Attributes
    ----------
    order : tuple of int
        The voxel axes nearest to right, anterior and superior.
    signs : tuple of int
        -1 where such an axis runs the other way.
    zooms : tuple of float
        Voxel size along right, anterior and superior (mm).
    box : tuple of slice
        What is shown, in reordered voxels.
    span : tuple of (int, int)
        First and last slice worth showing on each axis, counted in the box.
    origin, pitch : tuple of float
        Scanner coordinate of the box's first slice on each axis, and what a slice adds (mm).
    """

    order: tuple[int, int, int]
    signs: tuple[int, int, int]
    zooms: tuple[float, float, float]
    box: tuple[slice, slice, slice]
    span: tuple[tuple[int, int], ...]
    origin: tuple[float, float, float]
    pitch: tuple[float, float, float]

    @classmethod
    def of(
        cls, affine: np.ndarray, mask: np.ndarray, margin: float, target: np.ndarray | None = None
    ) -> "View":
        """View of a grid, cropped to a mask.

        Parameters
        ----------
        affine : (4, 4) array
            Voxel to scanner coordinates (mm).
        mask : (X, Y, Z) bool array
            What is to be seen.
        margin : float
            What to show around it (mm).
        target : (X, Y, Z) bool array, optional
            What the slices go through; ``mask`` by default.
        """
        shape = mask.shape
        size = np.linalg.norm(affine[:3, :3], axis=0)
        rotation = affine[:3, :3] / size
        order = max(
            itertools.permutations(range(3)),
            key=lambda axes: sum(abs(rotation[world, axis]) for world, axis in enumerate(axes)),
        )
        signs = tuple(1 if rotation[world, axis] >= 0 else -1 for world, axis in enumerate(order))
        zooms = tuple(float(size[axis]) for axis in order)
        turned = _turn(mask, order, signs)
        aim = turned if target is None else _turn(target, order, signs)
        box, span = [], []
        for axis, (length, zoom) in enumerate(zip(turned.shape, zooms, strict=True)):
            others = tuple({0, 1, 2} - {axis})
            first, last = _extent(turned.sum(others))
            rim = round(margin / zoom)
            start, stop = max(first - rim, 0), min(last + rim + 1, length)
            box.append(slice(start, stop))
            first, last = np.clip(_extent(aim.sum(others)), start, stop - 1)
            span.append((int(first) - start, int(last) - start))
        centre = [
            (shape[axis] - 1) / 2 if axis != order[world] else 0.0
            for world in range(3)
            for axis in range(3)
        ]
        origin = []
        for world, axis in enumerate(order):
            voxel = np.array(centre[3 * world : 3 * world + 3])
            start = box[world].start
            voxel[axis] = start if signs[world] > 0 else shape[axis] - 1 - start
            origin.append(float(affine[world, :3] @ voxel + affine[world, 3]))
        pitch = [abs(float(affine[world, axis])) for world, axis in enumerate(order)]
        return cls(order, signs, zooms, tuple(box), tuple(span), tuple(origin), tuple(pitch))  # type: ignore[arg-type]

    def crop(self, volume: np.ndarray) -> np.ndarray:
        """Cut out what is shown, axes towards right, anterior and superior."""
        return _turn(volume, self.order, self.signs)[self.box]

    def cuts(self, plane: int, count: int) -> list[int]:
        """At most ``count`` slices, evenly spread over the mask without its ends."""
        first, last = self.span[plane]
        positions = first + (last - first) * (np.arange(count) + 0.8) / (count + 0.6)
        if count == 1 or last - first < 2:
            return [(first + last) // 2]
        return sorted({int(np.floor(p + 0.5)) for p in positions})

    def place(self, plane: int, cut: int) -> str:
        """Scanner coordinate of a slice, as in ``R 12 mm``."""
        where = round(self.origin[plane] + cut * self.pitch[plane])
        return f"{('RL', 'AP', 'SI')[plane][where < 0]} {abs(where)} mm"

    def size(self, plane: int) -> tuple[float, float]:
        """Width and height of a slice (mm)."""
        across, up = (axis for axis in range(3) if axis != plane)
        lengths = [(cut.stop - cut.start) * z for cut, z in zip(self.box, self.zooms, strict=True)]
        return lengths[across], lengths[up]


def _turn(volume: np.ndarray, order: Sequence[int], signs: Sequence[int]) -> np.ndarray:
    turned = np.transpose(volume, order)
    return turned[tuple(slice(None, None, sign) for sign in signs)]


def _extent(profile: np.ndarray) -> tuple[int, int]:
    """First and last place of a profile, a few stray counts at its ends left out."""
    total = np.cumsum(profile, dtype=np.float64)
    if not total[-1]:
        return 0, len(profile) - 1
    first, last = np.searchsorted(total, (STRAY * total[-1], (1 - STRAY) * total[-1]), "right")
    return int(first), min(int(last), len(profile) - 1)


def slice_of(cropped: np.ndarray, plane: int, cut: int) -> np.ndarray:
    """Take a slice as it is seen: first row on top, right (or anterior) on the left."""
    return np.take(cropped, cut, axis=plane).T[::-1, ::-1]


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
        scaled = np.clip((_finite(values) - low) / (high - low), 0, 1)
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


def draw(maps: Maps, folder: Path) -> list[Picture]:
    """Draw every figure that the maps allow.

    Parameters
    ----------
    maps : Maps
        The maps of one acquisition.
    folder : Path
        Where the PNG files go; names do not depend on the data.

    Returns
    -------
    pictures : list of Picture
        In the order in which a report shows them.
    """
    frame = maps.brain_mask if maps.brain_mask is not None else maps.mask
    views = {margin: View.of(maps.affine, frame, margin, maps.mask) for margin in (WIDE, TIGHT)}
    painters: list[tuple[Callable[[Maps, View, Path], Picture | None], float]] = [
        (draw_magnitude, WIDE),
        (draw_echoes, WIDE),
        (draw_wraps, WIDE),
        (draw_quality, WIDE),
        (draw_total_field, TIGHT),
        (draw_local_field, TIGHT),
        (draw_noise, TIGHT),
        (draw_susceptibility, TIGHT),
        (draw_susceptibility_wide, TIGHT),
        (draw_deviation, TIGHT),
        (draw_compared, TIGHT),
        (draw_histogram, TIGHT),
        (draw_curves, TIGHT),
        (draw_cosmos, TIGHT),
        (draw_swi, TIGHT),
        (draw_r2star, TIGHT),
    ]
    with matplotlib.style.context("default"):
        pictures = [painter(maps, views[margin], Path(folder)) for painter, margin in painters]
    return [picture for picture in pictures if picture is not None]


def draw_magnitude(maps: Maps, view: View, folder: Path) -> Picture | None:
    """Draw the magnitude in three planes with the outlines of both masks."""
    if maps.magnitude is None:
        return None
    first = _finite(maps.magnitude[0])
    several = len(maps.magnitude) > 1
    squares = (np.square(_finite(echo)) for echo in maps.magnitude)
    values = np.sqrt(sum(squares)) if several else first
    values = values / _top(values, maps.mask, 99.5, 1.15)
    paint = Paint("gray", (0.0, 1.0), "relative", (0, 0.25, 0.5, 0.75, 1))
    mosaic = Mosaic(legend=_outline_legend(maps))
    mosaic.rows = _planes(values, view, paint, count=6, outlines=_outlines(maps, view))
    path = folder / "magnitude.png"
    _render(mosaic, paint, path)
    what = "Root of the sum of squares over echoes" if several else "Magnitude of the echo"
    return Picture(
        path,
        "Magnitude with the masks' outlines",
        f"{what}, in three planes. {_outline_words(maps)}The brain mask should follow the "
        f"cortex without skull or sinus. {RADIOLOGICAL}",
        "Magnitude and masks",
    )


def draw_echoes(maps: Maps, view: View, folder: Path) -> Picture | None:
    """Draw the wrapped phase of every echo, in one axial slice."""
    if maps.phase is None:
        return None
    paint = _phase_paint()
    count = len(maps.phase)
    shown = sorted({round(e) for e in np.linspace(0, count - 1, min(count, 12))})
    (cut,) = view.cuts(AXIAL, 1)
    outlines = _outlines(maps, view)[:1]
    panels = [
        _panel(paint, view, view.crop(maps.phase[e]), AXIAL, cut, outlines, note=_echo(maps, e))
        for e in shown
    ]
    columns = len(panels) if len(panels) <= 6 else -(-len(panels) // 2)
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    path = folder / "phase-echoes.png"
    _render(Mosaic(rows, _outline_legend(maps)[:1]), paint, path)
    some = "" if len(shown) == count else f" ({len(shown)} of {count} echoes)"
    return Picture(
        path,
        "Wrapped phase of each echo",
        f"Phase (rad) in the axial slice {view.place(AXIAL, cut)}{some}: grey runs from -pi to "
        "pi. Wraps should grow denser with echo time and stay smooth lines inside the brain; "
        f"open-ended lines or salt and pepper mean lost phase. {RADIOLOGICAL}",
        "Phase",
    )


def draw_wraps(maps: Maps, view: View, folder: Path) -> Picture | None:
    """Draw the wrapped phase of the first and the last echo, in three planes."""
    if maps.phase is None:
        return None
    paint = _phase_paint()
    echoes = sorted({0, len(maps.phase) - 1})
    outlines = _outlines(maps, view)[:1]
    rows = []
    for echo in echoes:
        cropped = view.crop(maps.phase[echo])
        rows.append(
            [
                _panel(
                    paint,
                    view,
                    cropped,
                    plane,
                    cut,
                    outlines,
                    note=f"{_echo(maps, echo)} \N{MIDDLE DOT} {view.place(plane, cut)}",
                )
                for plane in (AXIAL, CORONAL, SAGITTAL)
                for cut in view.cuts(plane, 1)
            ]
        )
    path = folder / "phase-planes.png"
    _render(Mosaic(rows, _outline_legend(maps)[:1]), paint, path)
    which = "first and last echo" if len(echoes) > 1 else "echo"
    return Picture(
        path,
        "Wrapped phase in three planes",
        f"Phase (rad) of the {which}, grey from -pi to pi. {RADIOLOGICAL}",
        "Phase",
    )


def draw_quality(maps: Maps, view: View, folder: Path) -> Picture | None:
    """Draw the phase quality, in three planes."""
    if maps.quality is None:
        return None
    paint = Paint("gray", (0.0, 1.0), "quality", (0, 0.25, 0.5, 0.75, 1))
    mosaic = Mosaic(legend=_outline_legend(maps))
    mosaic.rows = _planes(maps.quality, view, paint, count=6, outlines=_outlines(maps, view))
    path = folder / "quality.png"
    _render(mosaic, paint, path)
    return Picture(
        path,
        "Phase quality",
        "How coherent the phase is over space and echoes: 0 none, 1 perfect. Low values inside "
        f"the mask (sinuses, large veins, haemorrhage) are where fields are least sure. "
        f"{_outline_words(maps)}{RADIOLOGICAL}",
        "Phase",
    )


def draw_total_field(maps: Maps, view: View, folder: Path) -> Picture | None:
    """Draw the total field, in three planes."""
    known = maps.brain_mask if maps.brain_mask is not None else maps.mask
    return _draw_field(
        maps,
        view,
        folder / "field-total.png",
        maps.field,
        known,
        "Total field",
        "Field of all sources, the air around included: smooth and strongest near sinuses and "
        "ear canals. Sharp steps are unwrapping errors.",
    )


def draw_local_field(maps: Maps, view: View, folder: Path) -> Picture | None:
    """Draw the local field, in three planes."""
    return _draw_field(
        maps,
        view,
        folder / "field-local.png",
        maps.local_field,
        maps.mask,
        "Local field",
        "Field of the tissue alone. Veins, nuclei and cortex should show; broad shades towards "
        "the mask's edge are background that was left behind.",
    )


def draw_noise(maps: Maps, view: View, folder: Path) -> Picture | None:
    """Draw the standard deviation of the total field, in three planes."""
    if maps.noise is None:
        return None
    known = maps.brain_mask if maps.brain_mask is not None else maps.mask
    high = _top(maps.noise, known, 98, 1.0)
    paint = Paint("magma", (0.0, high), "ppm")
    mosaic = Mosaic(rows=_planes(maps.noise, view, paint, count=6, known=known))
    path = folder / "field-noise.png"
    _render(mosaic, paint, path)
    return Picture(
        path,
        "Field noise",
        "Standard deviation of the total field (ppm), as its fit gives it, up to the 98th "
        f"percentile{_hertz((0, high), maps)}. The inversion trusts dark voxels most. "
        f"{RADIOLOGICAL}",
        "Field",
    )


def draw_susceptibility(maps: Maps, view: View, folder: Path) -> Picture | None:
    """Draw the susceptibility from -0.1 to 0.1 ppm, and what was eroded away."""
    if maps.chi is None:
        return None
    paint = Paint("gray", CHI_WINDOW, "ppm", (-0.1, -0.05, 0, 0.05, 0.1))
    chi = np.where(maps.mask, _finite(maps.chi), 0)
    tint = maps.eroded
    rows = _planes(chi, view, paint, count=10, planes=(AXIAL,), known=maps.mask, tint=tint)
    axial = [rows[0][:5], rows[0][5:]]
    others = _planes(
        chi, view, paint, count=5, planes=(CORONAL, SAGITTAL), known=maps.mask, tint=tint
    )
    mosaic = Mosaic([row for row in axial if row] + others)
    words = ""
    if tint is not None and tint.any():
        mosaic.legend.append((ERODED, "brain mask, eroded away: no susceptibility"))
        words = "Brown: part of the brain mask that was eroded away. "
    path = folder / "susceptibility.png"
    _render(mosaic, paint, path)
    return Picture(
        path,
        "Susceptibility, -0.1 to 0.1 ppm",
        "Grey from -0.1 to 0.1 ppm: iron-rich nuclei and veins bright "
        f"(paramagnetic), myelin and calcium dark (diamagnetic). {words}{RADIOLOGICAL}",
        "Susceptibility",
    )


def draw_susceptibility_wide(maps: Maps, view: View, folder: Path) -> Picture | None:
    """Draw the susceptibility from -0.2 to 0.2 ppm, one slice a plane."""
    if maps.chi is None:
        return None
    paint = Paint("gray", WIDE_WINDOW, "ppm", (-0.2, -0.1, 0, 0.1, 0.2))
    chi = np.where(maps.mask, _finite(maps.chi), 0)
    rows = [
        panel
        for row in _planes(chi, view, paint, count=1, known=maps.mask, tint=maps.eroded)
        for panel in row
    ]
    path = folder / "susceptibility-wide.png"
    _render(Mosaic([rows]), paint, path)
    return Picture(
        path,
        "Susceptibility, -0.2 to 0.2 ppm",
        "The same map in a window twice as wide, for haemorrhage, calcification and streaks. "
        f"{RADIOLOGICAL}",
        "Susceptibility",
    )


def draw_deviation(maps: Maps, view: View, folder: Path) -> Picture | None:
    """Draw the standard deviation of the susceptibility, in three planes."""
    if maps.deviation is None:
        return None
    high = _top(maps.deviation, maps.mask, 98, 1.0)
    paint = Paint("magma", (0.0, high), "ppm")
    mosaic = Mosaic(rows=_planes(maps.deviation, view, paint, count=6, known=maps.mask))
    path = folder / "susceptibility-deviation.png"
    _render(mosaic, paint, path)
    return Picture(
        path,
        "Uncertainty of susceptibility",
        "Standard deviation (ppm) that the noise of the field gives the map, up to the 98th "
        f"percentile ({high:.4f} ppm). Errors of the method itself, such as too smooth a map or "
        f"background left behind, are not in it. {RADIOLOGICAL}",
        "Susceptibility",
    )


def draw_compared(maps: Maps, view: View, folder: Path) -> Picture | None:
    """Draw the maps of several inversions and their median, one row each."""
    if len(maps.compared) < 2:
        return None
    paint = Paint("gray", CHI_WINDOW, "ppm", (-0.1, -0.05, 0, 0.05, 0.1))
    shown = dict(maps.compared) | ({"median": maps.median} if maps.median is not None else {})
    rows = []
    for name, chi in shown.items():
        known = _finite(chi) != 0
        planes = _planes(np.where(known, _finite(chi), 0), view, paint, count=2, known=known)
        row = [panel for plane in planes for panel in plane]
        rows.append(_named(name, row))
    path = folder / "susceptibility-compared.png"
    _render(Mosaic(rows), paint, path)
    return Picture(
        path,
        "Inversions side by side",
        f"Grey from -0.1 to 0.1 ppm, from top to bottom: {', '.join(shown)}. What all of them "
        "show is in the data; streaks and shades that one shows alone are its own. "
        f"{RADIOLOGICAL}",
        "Susceptibility",
    )


def draw_cosmos(maps: Maps, view: View, folder: Path) -> Picture | None:
    """Draw the susceptibility by several orientations, in three planes."""
    if maps.cosmos is None:
        return None
    paint = Paint("gray", CHI_WINDOW, "ppm", (-0.1, -0.05, 0, 0.05, 0.1))
    chi = np.where(maps.mask, _finite(maps.cosmos), 0)
    path = folder / "susceptibility-cosmos.png"
    _render(Mosaic(rows=_planes(chi, view, paint, count=5, known=maps.mask)), paint, path)
    return Picture(
        path,
        "Susceptibility by COSMOS",
        "All orientations inverted together, on the grid of the first, where every one of them "
        "has a field. Grey from -0.1 to 0.1 ppm. Edges that look doubled come from a registration "
        f"that failed. {RADIOLOGICAL}",
        "Susceptibility",
    )


def draw_swi(maps: Maps, view: View, folder: Path) -> Picture | None:
    """Draw the susceptibility-weighted image and its minimum projection, in axial slices."""
    shown = {"SWI": maps.swi, "minIP": maps.minip}
    known = {name: _finite(image) for name, image in shown.items() if image is not None}
    if not known:
        return None
    paint = Paint("gray", (0.0, 1.0), "relative", (0, 0.25, 0.5, 0.75, 1))
    rows = []
    for name, image in known.items():
        image = image / _top(image, maps.mask, 99.5, 1.0)
        (row,) = _planes(image, view, paint, count=5, planes=(AXIAL,), known=maps.mask)
        rows.append(_named(name, row))
    path = folder / "swi.png"
    _render(Mosaic(rows), paint, path)
    return Picture(
        path,
        "Susceptibility-weighted image",
        f"{' and '.join(known)}, relative to the 99.5th percentile. Veins and iron are dark; so "
        f"is what lies near air, where the filter leaves background behind. {RADIOLOGICAL}",
        "Susceptibility weighting",
    )


def draw_histogram(maps: Maps, view: View, folder: Path) -> Picture | None:
    """Draw the histogram of the susceptibility in its mask, linear and logarithmic."""
    if maps.chi is None:
        return None
    values = maps.chi[maps.mask]
    values = values[np.isfinite(values)].astype(np.float64)
    if not values.size:
        return None
    path = folder / "susceptibility-histogram.png"
    figure = _figure(WIDTH, 420)
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
    _save(figure, None, path)
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
    figure = _figure(WIDTH // 2 * min(columns, 2), 420)
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
    _save(figure, None, path)
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


def draw_r2star(maps: Maps, view: View, folder: Path) -> Picture | None:
    """Draw R2*, in three planes."""
    if maps.r2star is None:
        return None
    known = maps.brain_mask if maps.brain_mask is not None else maps.mask
    paint = Paint("inferno", R2STAR_WINDOW, "1/s", (0, 25, 50, 75, 100))
    path = folder / "r2star.png"
    mosaic = Mosaic(rows=_planes(maps.r2star, view, paint, count=6, known=known))
    _render(mosaic, paint, path)
    return Picture(
        path,
        "R2*",
        "Effective transverse relaxation rate, 0 to 100 1/s. Nuclei, veins and places near air "
        f"are high; a rise towards sinuses is through-slice dephasing. {RADIOLOGICAL}",
        "Relaxation",
    )


def _named(name: str, row: list[Panel]) -> list[Panel]:
    """Put a name to a row, in the note of its first slice."""
    return [replace(row[0], note=f"{name} \N{MIDDLE DOT} {row[0].note}"), *row[1:]]


def _draw_field(
    maps: Maps,
    view: View,
    path: Path,
    values: np.ndarray | None,
    known: np.ndarray,
    title: str,
    words: str,
) -> Picture | None:
    if values is None:
        return None
    high = _top(np.abs(values), known, 99, 1.0)
    paint = Paint("RdBu_r", (-high, high), "ppm")
    _render(Mosaic(rows=_planes(values, view, paint, count=6, known=known)), paint, path)
    return Picture(
        path,
        title,
        f"{words} Red is above and blue below the scanner's frequency; the scale ends at the "
        f"99th percentile, {-high:.3g} to {high:.3g} ppm{_hertz((-high, high), maps)}. "
        f"{RADIOLOGICAL}",
        "Field",
    )


def _finite(values: np.ndarray) -> np.ndarray:
    """Take what is not finite for 0."""
    return np.nan_to_num(values, posinf=0.0, neginf=0.0)


def _top(values: np.ndarray, mask: np.ndarray, percentile: float, factor: float) -> float:
    """Upper end of a window; 1 where a map holds nothing."""
    inside = values[mask]
    inside = inside[np.isfinite(inside)]
    top = float(np.percentile(inside, percentile)) * factor if inside.size else 0.0
    return top if top > 0 else 1.0


def _hertz(window: tuple[float, float], maps: Maps) -> str:
    if not maps.field_strength:
        return ""
    low, high = (value * GAMMA * maps.field_strength for value in window)
    return f" ({low:.3g} to {high:.3g} Hz at {maps.field_strength:.4g} T)"


def _echo(maps: Maps, echo: int) -> str:
    time = f", TE {1000 * maps.echo_times[echo]:.4g} ms" if echo < len(maps.echo_times) else ""
    return f"echo {echo + 1}{time}"


def _phase_paint() -> Paint:
    return Paint(
        "gray", (-np.pi, np.pi), "rad", (-np.pi, 0, np.pi), ("-π", "0", "π"), nearest=True
    )


def _outlines(maps: Maps, view: View) -> tuple[tuple[np.ndarray, str], ...]:
    masks = ((maps.brain_mask, BRAIN), (maps.qsm_mask, QSM))
    return tuple((view.crop(mask), colour) for mask, colour in masks if mask is not None)


def _outline_legend(maps: Maps) -> list[tuple[str, str]]:
    masks = ((maps.brain_mask, BRAIN, "brain mask"), (maps.qsm_mask, QSM, "QSM mask"))
    return [(colour, text) for mask, colour, text in masks if mask is not None]


def _outline_words(maps: Maps) -> str:
    words = {"brain mask": "Blue: brain mask. ", "QSM mask": "Orange: where susceptibility is "
             "trusted (QSM mask). "}  # fmt: skip
    return "".join(words[text] for _, text in _outline_legend(maps))


def _panel(
    paint: Paint,
    view: View,
    cropped: np.ndarray,
    plane: int,
    cut: int,
    outlines: Sequence[tuple[np.ndarray, str]] = (),
    *,
    known: np.ndarray | None = None,
    tint: np.ndarray | None = None,
    note: str = "",
) -> Panel:
    place = view.place(plane, cut)
    return Panel(
        paint(slice_of(cropped, plane, cut)),
        plane,
        view.size(plane),
        note or place,
        tuple((slice_of(mask, plane, cut), colour) for mask, colour in outlines),
        None if tint is None else slice_of(tint, plane, cut),
        None if known is None else ~slice_of(known, plane, cut),
    )


def _planes(
    values: np.ndarray,
    view: View,
    paint: Paint,
    *,
    count: int,
    planes: Sequence[int] = (AXIAL, CORONAL, SAGITTAL),
    outlines: Sequence[tuple[np.ndarray, str]] = (),
    known: np.ndarray | None = None,
    tint: np.ndarray | None = None,
) -> list[list[Panel]]:
    """Paint a row of slices for each plane."""
    cropped = view.crop(values)
    known = None if known is None else view.crop(known)
    tint = None if tint is None else view.crop(tint)
    return [
        [
            _panel(paint, view, cropped, plane, cut, outlines, known=known, tint=tint)
            for cut in view.cuts(plane, count)
        ]
        for plane in planes
    ]


def _figure(width: int, height: int) -> Figure:
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=PAPER)
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


def _render(mosaic: Mosaic, paint: Paint, path: Path) -> None:
    placed = list(_layout(mosaic.rows, WIDTH - BAR, mosaic.tallest))
    body = max(top + h for _, (_, top, _, h) in placed) + LINE + GAP
    height = round(body + (LINE + 4 if mosaic.legend else 0))
    figure = _figure(WIDTH, height)
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
    _save(figure, paint, path)


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
            axes.contour(
                left + (np.arange(columns) + 0.5) * w / columns,
                top + (np.arange(rows) + 0.5) * h / rows,
                mask.astype(np.float32),
                levels=[0.5],
                colors=[colour],
                linewidths=1.1,
            )
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


def _save(figure: Figure, paint: Paint | None, path: Path) -> None:
    """Write a PNG of 256 colours without metadata: a third of the size, the same for all time."""
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined]
    palette = Image.new("P", (1, 1))
    palette.putpalette(_palette(paint).tobytes())
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.quantize(palette=palette, dither=Image.Dither.NONE).save(path, optimize=True)


def _palette(paint: Paint | None) -> np.ndarray:
    """List a figure's colours: its colour map, greys for text, shades of the outlines."""
    steps = np.linspace(0, 1, 184)
    shades = np.linspace(0, 1, 13)[1:, None]
    marks = [shades * matplotlib.colors.to_rgb(mark) for mark in (BRAIN, QSM, ERODED)]
    marks[2] = shades * matplotlib.colors.to_rgb(ERODED if paint else BARS)
    ramp = matplotlib.colormaps[paint.colours if paint else "gray"](steps)[:, :3]
    greys = np.repeat(np.linspace(0, 1, 36)[:, None], 3, axis=1)
    return np.rint(255 * np.concatenate([ramp, greys, *marks])).astype(np.uint8)
