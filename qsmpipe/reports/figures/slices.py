"""The picture of a map: slices in three planes; and what pictures of slices have in common."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qsmpipe.maps import MAPS, Percentile, Shown
from qsmpipe.numerics.units import GAMMA
from qsmpipe.reports.figures.mosaic import BRAIN, QSM, Mosaic, Paint, Panel, render
from qsmpipe.reports.figures.view import AXIAL, CORONAL, SAGITTAL, View, slice_of
from qsmpipe.reports.maps import Maps

RADIOLOGICAL = "Radiological view: the patient's right (R) is on the left."


class Picture(NamedTuple):
    """A figure, with what the report says of it."""

    file: Path
    title: str
    caption: str
    section: str


def draw_map(key: str, shown: Shown, maps: Maps, view: View, folder: Path) -> Picture | None:
    """Draw a map as its row in the table of maps says."""
    values = getattr(maps, key)
    if values is None:
        return None
    known = {"head": None, "brain": maps.head_mask, "qsm": maps.mask}[shown.within]
    low, high = _window(values, maps.mask if known is None else known, shown.window)
    paint = Paint(
        shown.colours,
        (low, high),
        shown.label or MAPS[key].units,
        () if isinstance(shown.window, Percentile) else tuple(np.linspace(low, high, 5)),
    )
    outlined = shown.within == "head"
    mosaic = Mosaic(legend=outline_legend(maps) if outlined else [])
    mosaic.rows = cut_planes(
        values,
        view,
        paint,
        count=shown.slices,
        outlines=outlines_of(maps, view) if outlined else (),
        known=known,
    )
    path = folder / f"{shown.file or key.replace('_', '-')}.png"
    render(mosaic, paint, path)
    caption = shown.caption.format(
        low=low, high=high, hertz=_hertz((low, high), maps), outlines=outline_words(maps)
    )
    return Picture(path, shown.title, f"{caption.rstrip()} {RADIOLOGICAL}", shown.section)


def _window(
    values: np.ndarray, known: np.ndarray, window: tuple[float, float] | Percentile
) -> tuple[float, float]:
    """Find the ends of a window that follows the values."""
    if not isinstance(window, Percentile):
        return window
    high = top_of(np.abs(values) if window.signed else values, known, window.percent)
    return (-high if window.signed else 0.0), high


def name_row(name: str, row: list[Panel]) -> list[Panel]:
    """Put a name to a row, in the note of its first slice."""
    return [replace(row[0], note=f"{name} \N{MIDDLE DOT} {row[0].note}"), *row[1:]]


def top_of(values: np.ndarray, mask: np.ndarray, percentile: float, factor: float = 1.0) -> float:
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


def outlines_of(maps: Maps, view: View) -> tuple[tuple[np.ndarray, str], ...]:
    """Masks to be outlined, each with its colour: the brain mask and the QSM mask."""
    masks = ((maps.brain_mask, BRAIN), (maps.qsm_mask, QSM))
    return tuple((view.crop(mask), colour) for mask, colour in masks if mask is not None)


def outline_legend(maps: Maps) -> list[tuple[str, str]]:
    """Colours of the masks' outlines, each with its name."""
    masks = ((maps.brain_mask, BRAIN, "brain mask"), (maps.qsm_mask, QSM, "QSM mask"))
    return [(colour, text) for mask, colour, text in masks if mask is not None]


def outline_words(maps: Maps) -> str:
    """Say in a caption which colour outlines what."""
    words = {"brain mask": "Blue: brain mask. ", "QSM mask": "Orange: where susceptibility is "
             "trusted (QSM mask). "}  # fmt: skip
    return "".join(words[text] for _, text in outline_legend(maps))


def panel_of(
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
    """Paint one slice of a cropped map; its place is noted unless there is a ``note``."""
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


def cut_planes(
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
            panel_of(paint, view, cropped, plane, cut, outlines, known=known, tint=tint)
            for cut in view.cuts(plane, count)
        ]
        for plane in planes
    ]
