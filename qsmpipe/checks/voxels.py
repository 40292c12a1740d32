"""Voxels: one reading of every image, and a look at its values."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qsmpipe import images
from qsmpipe.bids import Acquisition
from qsmpipe.checks.examination import Notebook

SAMPLES = 200_000
"""Voxels of one image that statistics of neighbours look at, along each axis."""

Views = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Lines of an image along each axis, taken at a stride from the other two."""


class Parts(NamedTuple):
    """What real and imaginary part of an echo hold."""

    least: tuple[float, float]
    """Least value of each."""
    noise: tuple[float, float] | None
    """Standard deviation of each where there is no signal, if that can be seen."""


class Echo(NamedTuple):
    """What one reading of an echo's images left behind."""

    extremes: tuple[float, float]
    """Least and greatest phase, in the scanner's unit."""
    phase: Views
    """In the scanner's unit; of real and imaginary parts in rad."""
    magnitude: Views
    """0 where the image is below."""
    negative: tuple[float, float] = (0.0, 0.0)
    """Least magnitude, if below 0, and the share of voxels below 0."""
    parts: Parts | None = None
    """Of real and imaginary parts."""


class Scan(NamedTuple):
    """What one reading of the images left behind."""

    echoes: list[Echo]
    head: Views
    """Where there is signal."""
    stride: int
    """Planes from one to the next that views along another axis hold."""

    @property
    def extremes(self) -> tuple[float, float]:
        """Least and greatest phase of all echoes, in the scanner's unit."""
        lows, highs = zip(*(echo.extremes for echo in self.echoes), strict=True)
        return min(lows), max(highs)


def read_scan(acquisition: Acquisition, shape: Sequence[int], notes: Notebook) -> Scan | None:
    """Read every image once; None where any of them is useless or has no partner."""
    partner = acquisition.imag if acquisition.is_complex else acquisition.magnitude
    if partner == acquisition.signal:  # magnitudes alone, which are no partners of themselves
        partner = ()
    echoes: list[Echo] = []
    before = len(notes)
    for i, path in enumerate(acquisition.signal):
        other = partner[i] if i < len(partner) else None
        echo = _read_echo(acquisition, path, other, notes)
        if echo is None:
            continue
        if echoes and np.array_equal(echo.phase[0], echoes[-1].phase[0]):
            notes.error(
                "values",
                f"{acquisition.relative(path)} holds the same numbers as the echo before: convert "
                "the echoes again",
            )
        echoes.append(echo)
    if notes.refused_since(before) or len(echoes) < len(acquisition.signal):
        return None
    return Scan(echoes, _head(echoes[0].magnitude), _stride(math.prod(shape)))


def _read_echo(
    acquisition: Acquisition, path: Path, partner: Path | None, notes: Notebook
) -> Echo | None:
    values = _read(acquisition, path, notes)
    if values is None:
        return None
    finite = values[np.isfinite(values)] if not np.isfinite(values).all() else values
    extremes = float(finite.min()), float(finite.max())
    views = _views(values)
    del values, finite
    other = None if partner is None else _read(acquisition, partner, notes)
    if partner is None or other is None:
        return None
    seconds = _views(other)
    if acquisition.is_complex:
        pairs = list(zip(views, seconds, strict=True))
        return Echo(
            extremes,
            triple(np.arctan2(imag, real) for real, imag in pairs),
            triple(np.hypot(real, imag) for real, imag in pairs),
            parts=_look_at_parts(views[2], seconds[2]),
        )
    below = other < 0
    negative = (min(0.0, float(np.nanmin(other))), float(below.mean()))
    return Echo(extremes, views, triple(view.clip(min=0) for view in seconds), negative)


def _look_at_parts(real: np.ndarray, imag: np.ndarray) -> Parts:
    size = np.hypot(real, imag)
    dark = size < 0.2 * np.percentile(size, 98)
    return Parts(
        (float(real.min()), float(imag.min())),
        (float(real[dark].std()), float(imag[dark].std())) if dark.sum() > 500 else None,
    )


def _read(acquisition: Acquisition, path: Path, notes: Notebook) -> np.ndarray | None:
    """Voxels of an image, after a look at them; None where it has none to speak of."""
    name = acquisition.relative(path)
    try:
        values, _ = images.read(path)
    except ValueError as error:
        notes.error("image", str(error).replace(str(path), name))
        return None
    values = values.reshape(values.shape[:3])
    nan = int(np.isnan(values).sum())
    infinite = int(np.isinf(values).sum())
    if nan + infinite == values.size:
        notes.error("values", f"{name}: all voxels are NaN or infinite: convert it again")
        return None
    if nan or infinite:
        share = 100 * (nan + infinite) / values.size
        notes.warn(
            "values",
            f"{name}: {nan} voxels are NaN and {infinite} infinite ({share:.2g} %): they are set "
            "to 0; check how the image was made",
        )
    if not values.any():
        notes.error("values", f"{name}: all voxels are 0: convert it again, or leave the echo out")
        return None
    return values


def padding(views: Views) -> float:
    """Value that fills the background of a masked image; NaN where none is that common."""
    found, count = np.unique(views[2], return_counts=True)
    most = int(count.argmax())
    return float(found[most]) if count[most] > 0.05 * views[2].size else math.nan


def long_steps(views: Views, known: Views, *, length: float = 0.75) -> float:
    """Share of neighbours, both ``known``, that differ by over ``length`` of the whole range.

    A phase that wraps, or noise that fills one turn, has many; a magnitude has them at sharp
    edges alone.
    """
    steps = [step[there] for step, there in _steps(views, known)]
    return _share([np.abs(step) > length for step in steps])


def zigzags(views: Views, known: Views, *, length: float = 0.5) -> float:
    """Share of voxels that both neighbours along an axis exceed, or fall below, by ``length``.

    In the whole range; noise that fills one turn has many, an image with edges none.
    """
    turns = []
    for step, there in _steps(views, known):
        before, after = step[:-1], step[1:]
        both = np.minimum(np.abs(before), np.abs(after)) > length
        turns.append((both & (before * after < 0))[there[:-1] & there[1:]])
    return _share(turns)


def _steps(views: Views, known: Views) -> list[tuple[np.ndarray, np.ndarray]]:
    """Differences of neighbours along each axis, over the whole range, and where both are known.

    The axis comes first.
    """
    inside = views[2][known[2]]
    span = float(np.ptp(inside)) if inside.size else 0.0
    if span == 0:
        return []
    found = []
    for axis, (view, mask) in enumerate(zip(views, known, strict=True)):
        lines, there = np.moveaxis(view, axis, 0), np.moveaxis(mask, axis, 0)
        found.append((np.diff(lines, axis=0) / span, there[1:] & there[:-1]))
    return found


def _share(found: list[np.ndarray]) -> float:
    total = sum(each.size for each in found)
    return sum(int(each.sum()) for each in found) / total if total else 0.0


def triple(arrays: Iterable[np.ndarray]) -> Views:
    """Make views of three arrays."""
    x, y, z = arrays
    return x, y, z


def _stride(voxels: int) -> int:
    return max(1, round(math.sqrt(voxels / SAMPLES)))


def _views(values: np.ndarray) -> Views:
    """Lines along each axis, about SAMPLES voxels each, without NaN and infinity."""
    step = _stride(values.size)
    parts = (values[:, ::step, ::step], values[::step, :, ::step], values[::step, ::step, :])
    return triple(np.nan_to_num(part, nan=0.0, posinf=0.0, neginf=0.0) for part in parts)


def _head(magnitude: Views) -> Views:
    """Voxels with signal: above a fifth of the bright ones."""
    bright = np.percentile(magnitude[2][magnitude[2] > 0], 98)
    return triple(view > 0.2 * bright for view in magnitude)
