"""The door between NIfTI files and tensors: nothing else reads or writes an image."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import nibabel as nb
import numpy as np
import torch
from isal import igzip
from nibabel.spatialimages import HeaderDataError
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms
from qsmpipe.placement import Place, Transform, b0_direction, place, same_place
from qsmpipe.pointers import not_fetched

UNITS = {1: ("m", 1000.0), 2: ("mm", 1.0), 3: ("micron", 0.001)}
"""Spatial part of ``xyzt_units`` to its name and its length in mm."""

COMPRESSION = 2
"""Level of written ``.nii.gz``: on masked maps 8 times as fast as zlib's level 1, and as small."""


@dataclass(frozen=True)
class Header:
    """What an image says of itself before its voxels are read."""

    shape: tuple[int, ...]
    """Grid size, all axes."""
    dtype: np.dtype
    """Type of the stored numbers."""
    unit: str
    """Of its lengths: m, mm, micron, or "" where it names none and mm is meant."""
    transforms: tuple[Transform, ...]
    """Its qform and sform (mm), or what its voxel size alone makes."""
    pixdim: tuple[float, ...]
    """Voxel size beside the transforms (mm)."""

    @cached_property
    def place(self) -> Place:
        """The transform that tells where the image lies in the scanner."""
        return place(self.transforms, self.pixdim)

    @property
    def affine(self) -> np.ndarray:
        """Voxel to scanner coordinates (mm), 4 x 4."""
        return self.place.affine

    def same_grid(self, other: "Header") -> bool:
        """Whether another image has the same voxels in the same place."""
        return self.shape[:3] == other.shape[:3] and same_place(self.transforms, other.transforms)


GEOMETRY = (
    "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip
"""Fields of a header that say where its image lies, beside the voxel size."""


def _open(path: str | Path) -> nb.Nifti1Image:
    try:
        image = nb.load(path)
    except FileNotFoundError:
        remedy = not_fetched(path)
        msg = f"{path}: no such image" + (f" ({remedy})" if remedy else "")
        raise ValueError(msg) from None
    except (
        nb.filebasedimages.ImageFileError, HeaderDataError, ValueError, OSError, EOFError
    ) as error:  # fmt: skip
        if remedy := not_fetched(path):
            msg = f"{path}: no image ({remedy})"
            raise ValueError(msg) from error
        msg = f"{path}: not a readable NIfTI image ({error}); copy or convert it again"
        raise ValueError(msg) from error
    if not isinstance(image, nb.Nifti1Image):
        msg = f"{path}: {type(image).__name__} and not NIfTI in one file; convert it to .nii.gz"
        raise ValueError(msg)
    return image


def read(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Values (float32, slope and intercept applied) and affine (mm) of an image.

    Raises
    ------
    ValueError
        If the file is missing, not NIfTI, damaged, or longer or shorter than its header says.
    """
    image = _open(path)
    try:
        values = np.asanyarray(_whole(path, image).dataobj, dtype=np.float32)
    except (OSError, EOFError, ValueError) as error:
        msg = f"{path}: truncated or damaged, its voxels cannot be read ({error}); copy it again"
        raise ValueError(msg) from error
    return values, header(path).affine


def _whole(path: str | Path, image: nb.Nifti1Image) -> nb.Nifti1Image:
    """Read the file to its end: a checksum stands behind the last voxel of a compressed one."""
    content = Path(path).read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = igzip.decompress(content)
    voxels = cast(nb.arrayproxy.ArrayProxy, image.dataobj)
    expected = voxels.offset + voxels.dtype.itemsize * math.prod(voxels.shape)
    if len(content) != expected:
        msg = f"it holds {len(content)} bytes, but its header speaks of {expected}"
        raise ValueError(msg)
    return type(image).from_bytes(content)


def header(path: str | Path) -> Header:
    """Shape, type, and place in the scanner of an image, without reading its voxels.

    Lengths are read in the unit that ``xyzt_units`` names.

    Raises
    ------
    ValueError
        If the file is missing or not NIfTI.
    """
    image = _open(path)
    fields = image.header
    unit, length = UNITS.get(int(fields["xyzt_units"]) & 7, ("", 1.0))
    scale = np.diag([length, length, length, 1.0])
    with image.file_map["image"].get_prepare_fileobj("rb") as stream:
        # As it is in the file: nibabel makes a voxel size of 0 into 1 as it loads a header.
        stored = type(fields).from_fileobj(stream, check=False)["pixdim"][1:4]
    pixdim = np.abs(np.asarray(stored, dtype=np.float64)) * length
    transforms = []
    for name in ("qform", "sform"):
        if code := int(fields[f"{name}_code"]):
            affine = _transform(fields, name)
            if name == "qform":
                affine[:3, :3] *= np.where(pixdim > 0, 1.0, 0.0)
            transforms.append(Transform(name, code, scale @ affine))
    if not transforms:
        base = fields.get_base_affine()
        base[:3, :3] *= np.where(pixdim > 0, 1.0, 0.0)
        transforms.append(Transform("pixdim", 0, scale @ base))
    return Header(
        tuple(map(int, image.shape)),
        fields.get_data_dtype(),
        unit,
        tuple(transforms),
        tuple(pixdim.tolist()),
    )


def _transform(fields: nb.Nifti1Header, name: str) -> np.ndarray:
    """Give a transform as it stands in the header, NaN where no matrix can be made of it."""
    try:
        return np.array(getattr(fields, f"get_{name}")(), dtype=np.float64)
    except (ValueError, HeaderDataError):
        return np.full((4, 4), np.nan)


def shape_of(path: str | Path) -> tuple[int, ...]:
    """Grid size as in the header: (X, Y, Z[, E])."""
    return tuple(int(n) for n in _open(path).shape)


def _usable(path: str | Path) -> Place:
    found = header(path).place
    if found.error:
        msg = f"{path}: {found.error}"
        raise ValueError(msg)
    return found


def affine_of(path: str | Path) -> np.ndarray:
    """Voxel to scanner coordinates (mm), 4 x 4.

    Raises
    ------
    ValueError
        If the header has no rotation and voxel size.
    """
    return _usable(path).affine


def zooms_of(path: str | Path) -> Zooms:
    """Voxel size (mm).

    Raises
    ------
    ValueError
        If the header has no rotation and voxel size.
    """
    x, y, z = _usable(path).transform.zooms.tolist()
    return x, y, z


def b0_direction_of(path: str | Path) -> tuple[float, float, float]:
    """Give the unit vector along B0 in the voxel axes of an image, as its header tells it.

    Raises
    ------
    ValueError
        If the header has no rotation, or two that both claim to be the scanner's and differ.
    """
    found = _usable(path)
    if found.contradiction:
        msg = f"{path}: {found.contradiction}"
        raise ValueError(msg)
    return b0_direction(found.affine)


def same_grid(path: str | Path, other: str | Path) -> bool:
    """Whether two images have the same spatial shape and a transform in common (to 1e-3 mm)."""
    return header(path).same_grid(header(other))


def load(
    path: str | Path,
    *,
    like: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Read (X, Y, Z[, E]) as a tensor ([E,] X, Y, Z); with ``like``, insist on its grid.

    Raises
    ------
    ValueError
        If the image cannot be read or is not on the grid of ``like``.
    """
    if like is not None and not same_grid(path, like):
        msg = (
            f"{path} {shape_of(path)[:3]} and {like} {shape_of(like)[:3]} are on different grids "
            "(shape or affine)"
        )
        raise ValueError(msg)
    values, _ = read(path)
    data = torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, 3, 0)) if values.ndim == 4
                            else np.ascontiguousarray(values))  # fmt: skip
    return data.to(device=device, dtype=dtype)


def stack(paths: Sequence[str | Path], *, device: str | torch.device = "cpu") -> Tensor:
    """Read one image per echo as (E, X, Y, Z); all must share the first one's grid."""
    return torch.stack([_volume(load(path, like=paths[0], device=device)) for path in paths])


def _volume(data: Tensor) -> Tensor:
    """(X, Y, Z) of an image that some tool gave a fourth axis of length 1."""
    return data[0] if data.ndim == 4 and data.shape[0] == 1 else data


def save(data: Tensor, path: str | Path, *, like: str | Path) -> str:
    """Write a tensor ([E,] X, Y, Z) on the grid of the image ``like``; give the path back.

    ``.nii.gz`` is compressed and takes its time; ``.nii`` is for what a next node reads at once.
    Masks become uint8, all else float32. Both transforms, their codes and the unit of length are
    those of ``like``, so that a viewer lays one image on the other. The file's bytes depend on the
    data and on ``like`` alone.
    """
    array = (data.movedim(0, -1) if data.ndim == 4 else data).cpu().numpy()
    array = array.astype(np.uint8 if data.dtype is torch.bool else np.float32)
    fields = nb.Nifti1Header()
    reference = _open(like).header
    for name in GEOMETRY:
        fields[name] = reference[name]
    fields["pixdim"][:4] = reference["pixdim"][:4]
    space, _ = UNITS.get(int(reference["xyzt_units"]) & 7, ("mm", 1.0))
    fields.set_xyzt_units("meter" if space == "m" else space, "sec")
    return _write(nb.Nifti1Image(array, None, fields), path)


def copy(source: str | Path, path: str | Path) -> str:
    """Copy an image, compressed if ``path`` ends in ``.gz``; give the path back."""
    if not _packed(path) or _packed(source):
        shutil.copyfile(source, path)
    else:
        Path(path).write_bytes(_compress(Path(source).read_bytes()))
    return str(path)


def store(
    stored: np.ndarray,
    path: str | Path,
    *,
    affine: np.ndarray,
    slope: float = 1.0,
    intercept: float = 0.0,
) -> str:
    """Write numbers as they are, in their own type, with a slope and intercept to read them by.

    Parameters
    ----------
    stored : (X, Y, Z) array
        What the file holds, integer or float.
    path : str or Path
        ``.nii`` or ``.nii.gz``.
    affine : (4, 4) array
        Voxel to scanner coordinates (mm).
    slope, intercept : float
        A reader makes ``slope * stored + intercept`` of them.

    Returns
    -------
    str
        The path.
    """
    image = nb.Nifti1Image(stored, affine, dtype=stored.dtype)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_slope_inter(slope, intercept)
    return _write(image, path)


def _write(image: nb.Nifti1Image, path: str | Path) -> str:
    content = image.to_bytes()
    Path(path).write_bytes(_compress(content) if _packed(path) else content)
    return str(path)


def _packed(path: str | Path) -> bool:
    return str(path).endswith(".gz")


def _compress(content: bytes) -> bytes:
    return igzip.compress(content, COMPRESSION, mtime=0)
