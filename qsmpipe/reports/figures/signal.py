"""Pictures of the signal: magnitude and wrapped phase of the echoes."""

from pathlib import Path

import numpy as np

from qsmpipe.reports.figures.mosaic import Mosaic, Paint, finite, render
from qsmpipe.reports.figures.slices import (
    RADIOLOGICAL,
    Picture,
    cut_planes,
    outline_legend,
    outline_words,
    outlines_of,
    panel_of,
    top_of,
)
from qsmpipe.reports.figures.view import AXIAL, CORONAL, SAGITTAL, View
from qsmpipe.reports.maps import Maps


def draw_magnitude(maps: Maps, view: View, folder: Path) -> Picture | None:
    """Draw the magnitude in three planes with the outlines of both masks."""
    if maps.magnitude is None:
        return None
    first = finite(maps.magnitude[0])
    several = len(maps.magnitude) > 1
    squares = (np.square(finite(echo)) for echo in maps.magnitude)
    values = np.sqrt(sum(squares)) if several else first
    values = values / top_of(values, maps.mask, 99.5, 1.15)
    paint = Paint("gray", (0.0, 1.0), "relative", (0, 0.25, 0.5, 0.75, 1))
    mosaic = Mosaic(legend=outline_legend(maps))
    mosaic.rows = cut_planes(values, view, paint, count=6, outlines=outlines_of(maps, view))
    path = folder / "magnitude.png"
    render(mosaic, paint, path)
    what = "Root of the sum of squares over echoes" if several else "Magnitude of the echo"
    return Picture(
        path,
        "Magnitude with the masks' outlines",
        f"{what}, in three planes. {outline_words(maps)}The brain mask should follow the "
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
    outlines = outlines_of(maps, view)[:1]
    panels = [
        panel_of(paint, view, view.crop(maps.phase[e]), AXIAL, cut, outlines, note=_echo(maps, e))
        for e in shown
    ]
    columns = len(panels) if len(panels) <= 6 else -(-len(panels) // 2)
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    path = folder / "phase-echoes.png"
    render(Mosaic(rows, outline_legend(maps)[:1]), paint, path)
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
    outlines = outlines_of(maps, view)[:1]
    rows = []
    for echo in echoes:
        cropped = view.crop(maps.phase[echo])
        rows.append(
            [
                panel_of(
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
    render(Mosaic(rows, outline_legend(maps)[:1]), paint, path)
    which = "first and last echo" if len(echoes) > 1 else "echo"
    return Picture(
        path,
        "Wrapped phase in three planes",
        f"Phase (rad) of the {which}, grey from -pi to pi. {RADIOLOGICAL}",
        "Phase",
    )


def _echo(maps: Maps, echo: int) -> str:
    time = f", TE {1000 * maps.echo_times[echo]:.4g} ms" if echo < len(maps.echo_times) else ""
    return f"echo {echo + 1}{time}"


def _phase_paint() -> Paint:
    return Paint(
        "gray", (-np.pi, np.pi), "rad", (-np.pi, 0, np.pi), ("-π", "0", "π"), nearest=True
    )
