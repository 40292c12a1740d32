"""Voxels: one reading of every image, and a look at its values."""

import math
from collections.abc import Iterable
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


class Scan(NamedTuple):
    """What one reading of the images left behind."""

    extremes: list[tuple[float, float]]
    """Least and greatest phase of each echo, in the scanner's unit."""
    phase: list[Views]
    """In the scanner's unit; of real and imaginary parts in rad."""
    head: Views
    """Where there is signal."""


def read_scan(acquisition: Acquisition, notes: Notebook) -> Scan | None:
    """Read every image once; None where any of them is useless."""
    partner = acquisition.imag if acquisition.is_complex else acquisition.magnitude
    extremes: list[tuple[float, float]] = []
    phase: list[Views] = []
    head: Views | None = None
    before = len(notes)
    for i, path in enumerate(acquisition.signal):
        values = _read(acquisition, path, notes)
        if values is None:
            continue
        finite = values[np.isfinite(values)] if not np.isfinite(values).all() else values
        extremes.append((float(finite.min()), float(finite.max())))
        views = _views(values)
        del values, finite
        magnitude: Views | None = None
        if i < len(partner):
            other = _read(acquisition, partner[i], notes, signed=acquisition.is_complex)
            magnitude = None if other is None else _views(other)
            del other
        if acquisition.is_complex and magnitude is not None:
            pairs = list(zip(views, magnitude, strict=True))
            views = triple(np.arctan2(imag, real) for real, imag in pairs)
            magnitude = triple(np.hypot(real, imag) for real, imag in pairs)
        elif magnitude is not None and np.array_equal(views[0], magnitude[0]):
            notes.error(
                "values",
                f"{acquisition.relative(path)} and {acquisition.relative(partner[i])} hold the "
                "same numbers: one of magnitude and phase was exported twice; convert them again",
            )
        if phase and np.array_equal(views[0], phase[-1][0]):
            notes.error(
                "values",
                f"{acquisition.relative(path)} holds the same numbers as the echo before: convert "
                "the echoes again",
            )
        phase.append(views)
        if head is None and magnitude is not None:
            head = _head(magnitude)
    if notes.refused_since(before) or head is None or not phase:
        return None
    return Scan(extremes, phase, head)


def _read(
    acquisition: Acquisition, path: Path, notes: Notebook, *, signed: bool = True
) -> np.ndarray | None:
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
    if not signed and np.count_nonzero(values < 0) > 0.001 * values.size:
        notes.error(
            "values",
            f"{name}: a magnitude with values down to {np.nanmin(values):g}: are magnitude and "
            "phase swapped? rename the files, or convert them again",
        )
    return values


def triple(arrays: Iterable[np.ndarray]) -> Views:
    """Make views of three arrays."""
    x, y, z = arrays
    return x, y, z


def _views(values: np.ndarray) -> Views:
    """Lines along each axis, about SAMPLES voxels each, without NaN and infinity."""
    step = max(1, round(math.sqrt(values.size / SAMPLES)))
    parts = (values[:, ::step, ::step], values[::step, :, ::step], values[::step, ::step, :])
    return triple(np.nan_to_num(part, nan=0.0, posinf=0.0, neginf=0.0) for part in parts)


def _head(magnitude: Views) -> Views:
    """Voxels with signal: above a fifth of the bright ones."""
    bright = np.percentile(magnitude[2][magnitude[2] > 0], 98)
    return triple(view > 0.2 * bright for view in magnitude)
