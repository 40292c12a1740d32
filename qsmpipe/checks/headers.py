"""Headers: one grid for all images, and the direction of B0."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qsmpipe import images
from qsmpipe.bids import Acquisition
from qsmpipe.checks.examination import Notebook


class Placed(NamedTuple):
    """The grid of an acquisition."""

    shape: tuple[int, ...]
    zooms: tuple[float, ...]
    b0_direction: tuple[float, ...]


def check_headers(acquisition: Acquisition, notes: Notebook) -> Placed | None:
    """One 3D grid for all images, with its direction of B0; None where it cannot be had."""
    headers: dict[Path, images.Header] = {}
    usable = True
    for path in acquisition.sources:
        name = acquisition.relative(path)
        try:
            headers[path] = header = images.header(path)
        except ValueError as error:
            usable = False
            lost = path.is_symlink() and not path.exists()
            remedy = " (its content is not here: datalad get, or git annex get)" if lost else ""
            notes.error("image", str(error).replace(str(path), name) + remedy)
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
    for path, header in headers.items():
        if header.shape[:3] != shape:
            notes.error(
                "grid",
                f"{acquisition.relative(path)} {header.shape[:3]} and {name} {shape} differ in "
                "size: all images of an acquisition must lie on one grid; convert it again",
            )
            usable = False
        elif not np.allclose(header.affine, first.affine, atol=1e-3):
            off = np.abs(header.affine - first.affine).max()
            notes.error(
                "grid",
                f"{acquisition.relative(path)} and {name} have affines that differ by up to "
                f"{off:.3g}: all images of an acquisition must lie on one grid; resample none of "
                "them, convert it again",
            )
            usable = False
    if min(shape) < 3:
        notes.error(
            "slices",
            f"{name}: {' x '.join(map(str, shape))} voxels: fewer than 3 slices hold no field "
            "that could be inverted; was the volume converted completely?",
        )
        usable = False
    return _place(name, first, notes) if usable else None


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
        f"{shape}: {extra} volumes, where one is expected: if they are receive coils, combine "
        "them first; if they are echoes, split them into one file per echo; if repetitions, into "
        "runs (run-1, run-2, ...)"
    )


def _place(name: str, header: images.Header, notes: Notebook) -> Placed | None:
    zooms = tuple(float(z) for z in np.linalg.norm(header.affine[:3, :3], axis=0))
    if not all(math.isfinite(zoom) and zoom > 0 for zoom in zooms):
        notes.error("geometry", f"{name}: voxel size {zooms} mm: correct the header")
        return None
    if not header.is_placed:
        notes.warn(
            "geometry",
            f"{name}: neither qform nor sform: where the head lay in the scanner is unknown, and "
            "B0 is assumed along the third axis; convert it again from DICOM",
        )
    if max(zooms) > 10 or min(zooms) < 0.05:
        notes.warn(
            "geometry",
            f"{name}: voxel size {' x '.join(f'{z:.3g}' for z in zooms)} mm is unusual: check "
            "that the header is in mm",
        )
    try:
        direction = images.b0_direction(header.affine)
    except ValueError as error:
        notes.error("geometry", f"{name}: {error}")
        return None
    return Placed(header.shape[:3], zooms, direction)
