"""Headers: one grid for all images, and the direction of B0."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qsmpipe import images
from qsmpipe.bids import Acquisition
from qsmpipe.checks.examination import Notebook
from qsmpipe.placement import MAX_ANGLE, SCANNER, b0_direction

FINEST, COARSEST = 0.01, 20.0
"""Voxels of any scan (mm); beyond, the unit of the header cannot be right."""

SMALL_HEAD = 100.0
"""Field of view (mm) that no human brain fits into: it is some 170 mm long."""

WIDEST = 1000.0
"""Field of view of any scan of a head or an animal (mm)."""


class Placed(NamedTuple):
    """The grid of an acquisition."""

    shape: tuple[int, ...]
    zooms: tuple[float, ...]
    b0_direction: tuple[float, ...]
    b0_source: str


def check_headers(
    acquisition: Acquisition,
    notes: Notebook,
    given: Sequence[float] = (),
    *,
    for_human_heads: bool = True,
) -> Placed | None:
    """One 3D grid for all images, with its direction of B0; None where it cannot be had.

    The direction is the user's where it is ``given``, a unit vector in voxel axes.
    """
    headers: dict[Path, images.Header] = {}
    usable = True
    for path in acquisition.sources:
        name = acquisition.relative(path)
        try:
            headers[path] = header = images.header(path)
        except ValueError as error:
            usable = False
            notes.error("image", str(error).replace(str(path), name))
            continue
        wrong = _wrong_shape(header, acquisition.sidecars.get(path, {}))
        if wrong:
            usable = False
            notes.error("image", f"{name}: {wrong}")
    if not usable:
        return None
    reference = acquisition.signal[0]
    first, name = headers[reference], acquisition.relative(reference)
    shape = first.shape[:3]
    if displaced := [path for path in headers if headers[path].place.error]:
        more = f" and {len(displaced) - 1} more" if len(displaced) > 1 else ""
        notes.error(
            "geometry",
            f"{acquisition.relative(displaced[0])}{more}: {headers[displaced[0]].place.error}",
        )
        return None
    for path, header in headers.items():
        if header.shape[:3] != shape:
            notes.error(
                "grid",
                f"{acquisition.relative(path)} {header.shape[:3]} and {name} {shape} differ in "
                "size: all images of an acquisition must lie on one grid; convert it again",
            )
            usable = False
        elif not _same_scan(header, first):
            off = np.abs(header.affine - first.affine).max()
            notes.error(
                "grid",
                f"{acquisition.relative(path)} ({header.place.transform}) and {name} "
                f"({first.place.transform}) have affines that differ by up to {off:.3g}: all "
                "images of an acquisition must lie on one grid; resample none of them, convert "
                "it again",
            )
            usable = False
    if min(shape) < 3:
        notes.error(
            "slices",
            f"{name}: {' x '.join(map(str, shape))} voxels: fewer than 3 slices hold no field "
            "that could be inverted; was the volume converted completely?",
        )
        usable = False
    placed = _place(name, first, notes, given) if usable else None
    if placed and for_human_heads:
        _check_head(name, placed, notes)
    return placed


def _same_scan(one: images.Header, other: images.Header) -> bool:
    """Whether two images lie on one grid, in the scanner where both tell their place there."""
    places = (one.place, other.place)
    if all(place.transform.code == SCANNER for place in places):
        return np.allclose(one.affine, other.affine, atol=1e-3)
    return one.same_grid(other)


def _wrong_shape(header: images.Header, metadata: Mapping[str, Any]) -> str:
    """Say what is wrong with an image's size or type; "" if nothing is."""
    shape = " x ".join(map(str, header.shape))
    if header.dtype.kind not in "iuf":
        kind = "complex" if header.dtype.kind == "c" else str(header.dtype)
        return f"holds {kind} numbers: write part-mag and part-phase as real numbers"
    if len(header.shape) < 3:
        return f"{shape} voxels: fewer than 3 slices; was the volume converted completely?"
    extra = math.prod(header.shape[3:])
    if extra == 1:
        return ""
    times = metadata.get("EchoTime")
    if isinstance(times, list) and len(times) == extra:
        return (
            f"{shape}: all {extra} echoes in one file, which BIDS does not know: split it into "
            "one file per echo (echo-1, echo-2, ...), each with its own EchoTime"
        )
    return (
        f"{shape}: {extra} volumes, where one is expected: if they are echoes, split them into "
        "one file per echo; if magnitude and phase, into part-mag and part-phase; if receive "
        "coils, combine them first; if repetitions, split them into runs (run-1, run-2, ...)"
    )


def _place(
    name: str, header: images.Header, notes: Notebook, given: Sequence[float]
) -> Placed | None:
    place = header.place
    zooms = tuple(place.transform.zooms.tolist())
    if not _check_size(name, header, zooms, notes):
        return None
    own = b0_direction(place.affine)
    source = str(place.transform)
    if given:
        direction = tuple(float(component) for component in given)
        if place.transform.code == SCANNER and not place.contradiction:
            _check_given(name, direction, own, source, notes)
        return Placed(header.shape[:3], zooms, direction, "--b0-direction")
    for remark in place.remarks:
        notes.warn("geometry", f"{name}: {remark}")
    if place.contradiction:
        notes.error("geometry", f"{name}: {place.contradiction}")
        return None
    return Placed(header.shape[:3], zooms, own, source)


def _check_size(
    name: str, header: images.Header, zooms: tuple[float, ...], notes: Notebook
) -> bool:
    """Voxel size and field of view that a scan can have; False where the unit must be wrong."""
    extent = [n * zoom for n, zoom in zip(header.shape, zooms, strict=False)]
    sizes = " x ".join(f"{zoom:.3g}" for zoom in zooms)
    unit = f"in {header.unit}" if header.unit else "in no unit, which is read as mm"
    if not FINEST <= min(zooms) <= max(zooms) <= COARSEST or max(extent) > WIDEST:
        notes.error(
            "geometry",
            f"{name}: voxels of {sizes} mm and a field of view of "
            f"{' x '.join(f'{length:.4g}' for length in extent)} mm (its header gives lengths "
            f"{unit}): no scan has them; correct the voxel size, or the unit in xyzt_units (1 is "
            "m, 2 mm, 3 micron)",
        )
        return False
    if header.unit not in ("", "mm"):
        notes.note(
            "geometry", f"{name}: its header gives lengths in {header.unit}: voxels of {sizes} mm"
        )
    if max(zooms) > 10 or min(zooms) < 0.05:
        notes.warn(
            "geometry",
            f"{name}: voxel size {sizes} mm is unusual: check that the header's unit is right "
            f"({unit})",
        )
    return True


def _check_head(name: str, placed: Placed, notes: Notebook) -> None:
    """Say that default lengths do not fit an animal or a sample."""
    extent = [n * zoom for n, zoom in zip(placed.shape, placed.zooms, strict=True)]
    if max(extent) < SMALL_HEAD:
        notes.warn(
            "geometry",
            f"{name}: a field of view of {' x '.join(f'{length:.3g}' for length in extent)} mm is "
            "too small for a human head, for which the lengths of all methods are meant (radii, "
            "margins, brain extraction): for an animal give --preset small-animal, or set the "
            "lengths yourself and give a mask of yours (--mask given)",
        )


def _check_given(
    name: str,
    given: Sequence[float],
    own: Sequence[float],
    source: str,
    notes: Notebook,
) -> None:
    """Say where the user's direction of B0 and the scanner's differ."""
    angle = math.degrees(math.acos(min(1.0, abs(float(np.dot(given, own))))))
    if angle > MAX_ANGLE:
        one, other = (", ".join(f"{b:.2f}" for b in vector) for vector in (given, own))
        notes.warn(
            "geometry",
            f"{name}: B0 along ({one}), as --b0-direction says; its {source} says ({other}), "
            f"{angle:.1f} degrees off: leave --b0-direction out if the header is right",
        )
