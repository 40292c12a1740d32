"""Pictures of one acquisition's maps, as PNG files.

:mod:`~qsmpipe.reports.figures.slices` draws whatever map has a picture in its row of
:data:`qsmpipe.maps.MAPS`; :mod:`~qsmpipe.reports.figures.signal`,
:mod:`~qsmpipe.reports.figures.susceptibility` and :mod:`~qsmpipe.reports.figures.diagrams` hold
the pictures that need more than that.
"""

from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import TypeAlias

import matplotlib
import matplotlib.style

from qsmpipe.maps import MAPS
from qsmpipe.reports.figures.diagrams import draw_curves, draw_histogram
from qsmpipe.reports.figures.signal import draw_echoes, draw_magnitude, draw_wraps
from qsmpipe.reports.figures.slices import Picture, draw_map
from qsmpipe.reports.figures.susceptibility import (
    draw_compared,
    draw_susceptibility,
    draw_susceptibility_wide,
    draw_swi,
)
from qsmpipe.reports.figures.view import TIGHT, WIDE, View
from qsmpipe.reports.maps import Maps

Painter: TypeAlias = Callable[[Maps, View, Path], Picture | None]

OWN: dict[str, tuple[float, tuple[Painter, ...]]] = {
    "magnitude": (WIDE, (draw_magnitude,)),
    "phase": (WIDE, (draw_echoes, draw_wraps)),
    "chi": (TIGHT, (draw_susceptibility, draw_susceptibility_wide)),
    "swi": (TIGHT, (draw_swi,)),
}
"""Map to the margin (mm) and the painters of its own pictures."""

LAST: dict[str, tuple[Painter, ...]] = {
    "compared": (draw_compared,), "chi": (draw_histogram, draw_curves),
}  # fmt: skip
"""Map to the painters whose pictures come after all others."""


def draw(maps: Maps, folder: Path, about: Collection[str] = MAPS) -> list[Picture]:
    """Draw every figure that the maps allow.

    Parameters
    ----------
    maps : Maps
        The maps of one acquisition.
    folder : Path
        Where the PNG files go; names do not depend on the data.
    about : collection of str
        Keys of the maps to draw; the other maps may be needed beside them.

    Returns
    -------
    pictures : list of Picture
        Within a section, in the order in which a report shows them.
    """
    views = {
        margin: View.of(maps.affine, maps.head_mask, margin, maps.mask) for margin in (WIDE, TIGHT)
    }
    with matplotlib.style.context("default"):
        pictures = [
            painter(maps, views[margin], Path(folder)) for margin, painter in _painters(about)
        ]
    return [picture for picture in pictures if picture is not None]


def _painters(about: Collection[str]) -> Iterator[tuple[float, Painter]]:
    for key in (key for key in MAPS if key in about):
        margin, painters = OWN.get(key, (TIGHT, ()))
        yield from ((margin, painter) for painter in painters)
        if shown := MAPS[key].shown:
            yield WIDE if shown.within == "head" else TIGHT, partial(draw_map, key, shown)
    for key, painters in LAST.items():
        if key in about:
            yield from ((TIGHT, painter) for painter in painters)
