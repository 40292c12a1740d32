"""Pictures of susceptibility, and of images weighted by it."""

from pathlib import Path

import numpy as np

from qsmpipe.reports.figures.mosaic import ERODED, Mosaic, Paint, finite, render
from qsmpipe.reports.figures.slices import RADIOLOGICAL, Picture, cut_planes, name_row, top_of
from qsmpipe.reports.figures.view import AXIAL, CORONAL, SAGITTAL, View
from qsmpipe.reports.maps import Maps

CHI_WINDOW = (-0.1, 0.1)
WIDE_WINDOW = (-0.2, 0.2)


def draw_susceptibility(maps: Maps, view: View, folder: Path) -> Picture | None:
    """Draw the susceptibility from -0.1 to 0.1 ppm, and what was eroded away."""
    if maps.chi is None:
        return None
    paint = Paint("gray", CHI_WINDOW, "ppm", (-0.1, -0.05, 0, 0.05, 0.1))
    chi = np.where(maps.mask, finite(maps.chi), 0)
    tint = maps.eroded
    rows = cut_planes(chi, view, paint, count=10, planes=(AXIAL,), known=maps.mask, tint=tint)
    axial = [rows[0][:5], rows[0][5:]]
    others = cut_planes(
        chi, view, paint, count=5, planes=(CORONAL, SAGITTAL), known=maps.mask, tint=tint
    )
    mosaic = Mosaic([row for row in axial if row] + others)
    words = ""
    if tint is not None and tint.any():
        mosaic.legend.append((ERODED, "brain mask, eroded away: no susceptibility"))
        words = "Brown: part of the brain mask that was eroded away. "
    path = folder / "susceptibility.png"
    render(mosaic, paint, path)
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
    chi = np.where(maps.mask, finite(maps.chi), 0)
    rows = [
        panel
        for row in cut_planes(chi, view, paint, count=1, known=maps.mask, tint=maps.eroded)
        for panel in row
    ]
    path = folder / "susceptibility-wide.png"
    render(Mosaic([rows]), paint, path)
    return Picture(
        path,
        "Susceptibility, -0.2 to 0.2 ppm",
        "The same map in a window twice as wide, for haemorrhage, calcification and streaks. "
        f"{RADIOLOGICAL}",
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
        known = finite(chi) != 0
        planes = cut_planes(np.where(known, finite(chi), 0), view, paint, count=2, known=known)
        row = [panel for plane in planes for panel in plane]
        rows.append(name_row(name, row))
    path = folder / "susceptibility-compared.png"
    render(Mosaic(rows), paint, path)
    return Picture(
        path,
        "Inversions side by side",
        f"Grey from -0.1 to 0.1 ppm, from top to bottom: {', '.join(shown)}. What all of them "
        "show is in the data; streaks and shades that one shows alone are its own. "
        f"{RADIOLOGICAL}",
        "Susceptibility",
    )


def draw_swi(maps: Maps, view: View, folder: Path) -> Picture | None:
    """Draw the susceptibility-weighted image and its minimum projection, in axial slices."""
    shown = {"SWI": maps.swi, "minIP": maps.minip}
    known = {name: finite(image) for name, image in shown.items() if image is not None}
    if not known:
        return None
    paint = Paint("gray", (0.0, 1.0), "relative", (0, 0.25, 0.5, 0.75, 1))
    rows = []
    for name, image in known.items():
        image = image / top_of(image, maps.mask, 99.5)
        (row,) = cut_planes(image, view, paint, count=5, planes=(AXIAL,), known=maps.mask)
        rows.append(name_row(name, row))
    path = folder / "swi.png"
    render(Mosaic(rows), paint, path)
    return Picture(
        path,
        "Susceptibility-weighted image",
        f"{' and '.join(known)}, relative to the 99.5th percentile. Veins and iron are dark; so "
        f"is what lies near air, where the filter leaves background behind. {RADIOLOGICAL}",
        "Susceptibility weighting",
    )
