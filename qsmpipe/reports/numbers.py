"""Key numbers of one acquisition: volumes, spreads, and what betrays a bad map."""

from collections.abc import Callable, Collection

import numpy as np
from scipy import ndimage

from qsmpipe.maps import MAPS
from qsmpipe.numerics.units import GAMMA
from qsmpipe.records import Number
from qsmpipe.reports.labels import (
    BRAIN_VOLUME,
    CHI_MEAN,
    CHI_SD,
    ECHOES,
    EDGE,
    EXTREME,
    JUMPS,
    LEFT,
    LOST,
    QSM_VOLUME,
    R2STAR,
    REFERENCE,
)
from qsmpipe.reports.maps import Maps

EDGE_WIDTH = 3.0
"""Thickness of the mask's outer shell (mm)."""


def summarise(maps: Maps, about: Collection[str] = MAPS) -> list[Number]:
    """Key numbers of an acquisition, as far as its maps are there.

    Parameters
    ----------
    maps : Maps
        The maps of one acquisition.
    about : collection of str
        Keys of the maps to measure; the other maps may be needed beside them.

    Returns
    -------
    numbers : list of Number
        In the order in which a report shows them.
    """
    return [number for key, take in _measures() if key in about for number in take(maps)]


def _measures() -> tuple[tuple[str, Callable[[Maps], list[Number]]], ...]:
    return (
        ("brain_mask", _masks),
        ("phase", _signal),
        ("field", lambda maps: _field(maps, maps.field, "Total field")),
        ("noise", _noise),
        ("field", _jumps),
        ("local_field", lambda maps: _field(maps, maps.local_field, "Local field")),
        ("local_field", _leftover),
        ("chi", _susceptibility),
        ("r2star", _relaxation),
    )


def phase_noise(phase: np.ndarray, mask: np.ndarray) -> float:
    """Estimate the standard deviation of wrapped phase (rad), from second differences.

    A smooth phase has none, and independent noise of variance s^2 leaves 6 s^2; the median
    keeps vessels and edges out. Uniformly random phase reads about 1.

    Parameters
    ----------
    phase : (X, Y, Z) array
        Wrapped phase (rad).
    mask : (X, Y, Z) bool array
        Where to look.
    """
    inside = mask[2:] & mask[1:-1] & mask[:-2]
    change = phase[2:][inside] - 2 * phase[1:-1][inside] + phase[:-2][inside]
    values = np.abs((change + np.pi) % (2 * np.pi) - np.pi)
    return float(1.4826 * np.median(values) / np.sqrt(6)) if values.size else float("nan")


def phase_jumps(field: np.ndarray, mask: np.ndarray, step: float) -> int:
    """Count neighbours whose field differs by more than half of one 2 pi ``step``.

    Parameters
    ----------
    field : (X, Y, Z) array
        Total field, in the unit of ``step``.
    mask : (X, Y, Z) bool array
        Where to look.
    step : float
        What one wrap between two echoes adds to the field.
    """
    count = 0
    for axis in range(3):
        front = np.moveaxis(mask, axis, 0)
        values = np.moveaxis(field, axis, 0)
        both = front[1:] & front[:-1]
        count += int((np.abs(values[1:] - values[:-1])[both] > step / 2).sum())
    return count


def edge_ratio(field: np.ndarray, mask: np.ndarray, zooms: np.ndarray) -> float:
    """Compare the size of a field in the mask's outer shell with that in its deeper half.

    The size is the median distance from the mask's median. A harmonic field is largest at the
    rim, but so may be that of veins and bone: on a simulated whole head without any leftover the
    ratio is 1.6, so that it only tells acquisitions of one kind from each other.

    Parameters
    ----------
    field : (X, Y, Z) array
        Local field.
    mask : (X, Y, Z) bool array
        Where it is trusted.
    zooms : (3,) array
        Voxel size (mm).
    """
    box = ndimage.find_objects(mask.astype(np.uint8))
    if not box:
        return float("nan")
    field, mask = field[box[0]], mask[box[0]]
    padded = np.pad(mask, 1)
    depth = ndimage.distance_transform_edt(padded, sampling=zooms)[1:-1, 1:-1, 1:-1]
    shell = mask & (depth <= max(EDGE_WIDTH, float(np.max(zooms))))
    centre = mask & ~shell
    if not shell.any() or not centre.any():
        return float("nan")
    centre &= depth >= np.median(depth[centre])
    size = np.abs(field - np.median(field[mask]))
    inner = float(np.median(size[centre]))
    return float(np.median(size[shell])) / inner if inner > 0 else float("nan")


def background_left(total: np.ndarray, local: np.ndarray, mask: np.ndarray) -> float:
    """Estimate which share of the background field is still in the local field.

    What was removed is ``total - local``. With the share ``a`` of a background left behind, the
    local field holds ``a / (1 - a)`` times what was removed, which is the slope of one over the
    other, as tissue and background have next to nothing in common. Leftovers of another shape
    than the whole background, as at a badly cut rim, escape it.

    Parameters
    ----------
    total, local : (X, Y, Z) array
        Total and local field, in one unit.
    mask : (X, Y, Z) bool array
        Where the local field is trusted.

    Returns
    -------
    share : float
        0: none; negative where too much was removed.
    """
    removed = (total - local)[mask].astype(np.float64)
    left = local[mask].astype(np.float64)
    known = np.isfinite(removed) & np.isfinite(left)
    removed, left = removed[known], left[known]
    if not removed.size:
        return float("nan")
    removed = removed - removed.mean()
    power = float(removed @ removed)
    slope = float(left @ removed) / power if power > 0 else float("nan")
    return slope / (1 + slope) if slope > -1 else float("nan")


def _number(label: str, value: float | tuple[float, ...], unit: str = "") -> Number:
    known = isinstance(value, tuple) or np.isfinite(value)
    return Number(label, value if known else None, unit)


def _inside(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    inside = values[mask].astype(np.float64)
    return inside[np.isfinite(inside)]


def _masks(maps: Maps) -> list[Number]:
    voxel = float(np.prod(maps.zooms)) / 1000
    numbers = []
    for label, mask in ((BRAIN_VOLUME, maps.brain_mask), (QSM_VOLUME, maps.qsm_mask)):
        if mask is not None:
            numbers.append(_number(label, float(mask.sum() * voxel), "mL"))
    if maps.brain_mask is not None and maps.eroded is not None and maps.brain_mask.any():
        lost = 100 * maps.eroded.sum() / maps.brain_mask.sum()
        numbers.append(_number(LOST, float(lost), "%"))
    return numbers


def _signal(maps: Maps) -> list[Number]:
    numbers = []
    series = maps.phase if maps.phase is not None else maps.magnitude
    if series is not None:
        numbers.append(_number(ECHOES, len(series)))
    if maps.phase is not None:
        for echo in sorted({0, len(maps.phase) - 1}):
            value = phase_noise(maps.phase[echo], maps.mask)
            numbers.append(_number(f"Phase noise, echo {echo + 1}", value, "rad"))
    return numbers


def _field(maps: Maps, field: np.ndarray | None, name: str) -> list[Number]:
    if field is None:
        return []
    mask = maps.mask
    if name == "Total field" and maps.brain_mask is not None and maps.brain_mask.any():
        mask = maps.brain_mask
    values = _inside(field, mask)
    if not values.size:
        return []
    units = [("ppm", 1.0)]
    if maps.field_strength:
        units.append(("Hz", GAMMA * maps.field_strength))
    low, median, high = np.percentile(values, (1, 50, 99))
    numbers = []
    for unit, scale in units:
        numbers += [
            _number(f"{name}, median", float(median * scale), unit),
            _number(f"{name}, SD", float(values.std() * scale), unit),
            _number(f"{name}, 1 to 99 %", (float(low * scale), float(high * scale)), unit),
        ]
    return numbers


def _noise(maps: Maps) -> list[Number]:
    if maps.noise is None or not (values := _inside(maps.noise, maps.mask)).size:
        return []
    median = float(np.median(values))
    numbers = [_number("Field noise, median SD", median, "ppm")]
    if maps.field_strength:
        scaled = median * GAMMA * maps.field_strength
        numbers.append(_number("Field noise, median SD", scaled, "Hz"))
    return numbers


def _jumps(maps: Maps) -> list[Number]:
    times = sorted(maps.echo_times)
    if maps.field is None or not maps.field_strength or not times:
        return []
    spacing = min(np.diff(times)) if len(times) > 1 else times[0]
    if spacing <= 0:
        return []
    step = 1 / (GAMMA * maps.field_strength * spacing)
    return [_number(JUMPS, phase_jumps(maps.field, maps.mask, step), "pairs")]


def _leftover(maps: Maps) -> list[Number]:
    if maps.local_field is None:
        return []
    numbers = []
    if maps.field is not None:
        share = background_left(maps.field, maps.local_field, maps.mask)
        numbers.append(_number(LEFT, 100 * share, "%"))
    ratio = edge_ratio(maps.local_field, maps.mask, maps.zooms)
    return [*numbers, _number(EDGE, ratio)]


def _susceptibility(maps: Maps) -> list[Number]:
    numbers = []
    if maps.chi is not None and (values := _inside(maps.chi, maps.mask)).size:
        p1, p5, p50, p95, p99 = (float(v) for v in np.percentile(values, (1, 5, 50, 95, 99)))
        numbers += [
            _number(CHI_MEAN, float(values.mean()), "ppm"),
            _number(CHI_SD, float(values.std()), "ppm"),
            _number("Susceptibility, median", p50, "ppm"),
            _number("Susceptibility, 5 to 95 %", (p5, p95), "ppm"),
            _number("Susceptibility, 1 to 99 %", (p1, p99), "ppm"),
            _number(EXTREME, float(100 * np.mean(np.abs(values) > 1)), "%"),
            _number("Voxels not finite", int(maps.mask.sum() - values.size), "voxels"),
        ]
    if maps.reference_value is not None:
        numbers.append(_number(REFERENCE, float(maps.reference_value), "ppm"))
    return numbers


def _relaxation(maps: Maps) -> list[Number]:
    if maps.r2star is None or not (values := _inside(maps.r2star, maps.mask)).size:
        return []
    p5, median, p95 = (float(v) for v in np.percentile(values, (5, 50, 95)))
    return [
        _number(R2STAR, median, "1/s"),
        _number("R2*, 5 to 95 %", (p5, p95), "1/s"),
    ]
