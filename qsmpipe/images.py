"""The door between NIfTI files and tensors: nothing else reads or writes an image."""

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import nibabel as nb
import numpy as np
import torch
from nibabel.affines import voxel_sizes
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms


class Header(NamedTuple):
    """What an image says of itself before its voxels are read."""

    shape: tuple[int, ...]
    """Grid size, all axes."""
    affine: np.ndarray
    """Voxel to scanner coordinates (mm), 4 x 4."""
    dtype: np.dtype
    """Type of the stored numbers."""
    is_placed: bool
    """Whether a qform or sform says where the grid lies in the scanner."""


def _open(path: str | Path) -> nb.Nifti1Image:
    try:
        image = cast(nb.Nifti1Image, nb.load(path))
    except FileNotFoundError:
        msg = f"{path}: no such image"
        raise ValueError(msg) from None
    except (nb.filebasedimages.ImageFileError, OSError, EOFError) as error:
        msg = f"{path}: not a readable NIfTI image ({error}); copy or convert it again"
        raise ValueError(msg) from error
    return image


def read(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Values (float32, slope and intercept applied) and affine of an image.

    Raises
    ------
    ValueError
        If the file is missing, not NIfTI, or truncated.
    """
    image = _open(path)
    try:
        values = np.asanyarray(image.dataobj, dtype=np.float32)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        msg = f"{path}: truncated or damaged, its voxels cannot be read ({error}); copy it again"
        raise ValueError(msg) from error
    return values, image.affine


def header(path: str | Path) -> Header:
    """Shape, affine and type of an image, without reading its voxels."""
    image = _open(path)
    fields = image.header
    placed = any(int(fields[f"{name}_code"]) > 0 for name in ("qform", "sform"))
    return Header(tuple(map(int, image.shape)), image.affine, image.get_data_dtype(), placed)


def shape_of(path: str | Path) -> tuple[int, ...]:
    """Grid size as in the header: (X, Y, Z[, E])."""
    return tuple(int(n) for n in _open(path).shape)


def affine_of(path: str | Path) -> np.ndarray:
    """Voxel to scanner coordinates (mm), 4 x 4."""
    return _open(path).affine


def zooms_of(path: str | Path) -> Zooms:
    """Voxel size (mm)."""
    x, y, z = voxel_sizes(affine_of(path)).tolist()
    return x, y, z


def b0_direction(affine: np.ndarray) -> tuple[float, float, float]:
    """Give the unit vector along B0 (scanner z) in voxel axes, from the affine's rotation.

    The columns are normalised first: with the voxel size left in, an oblique anisotropic grid
    would get a wrong direction.

    Parameters
    ----------
    affine : (4, 4) array
        Voxel to scanner coordinates.

    Raises
    ------
    ValueError
        If the voxel axes are not orthogonal (shear), where no rotation exists.

    Examples
    --------
    >>> b0_direction(np.diag([-1.0, 1.0, 2.0, 1.0]))
    (0.0, 0.0, 1.0)
    """
    x, y, z = (float(value) + 0.0 for value in rotation(affine)[2])
    return x, y, z


def rotation(affine: np.ndarray) -> np.ndarray:
    """Give the turn from voxel to scanner axes, (3, 3), from an affine.

    Raises
    ------
    ValueError
        If the voxel axes are not orthogonal (shear), where no rotation exists.
    """
    turn = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if not np.allclose(turn.T @ turn, np.eye(3), atol=1e-3):
        msg = (
            "the affine's voxel axes are not orthogonal (shear), so that it has no rotation to "
            "take the B0 direction from: give the image on the grid that it was acquired on"
        )
        raise ValueError(msg)
    return turn


def same_grid(path: str | Path, other: str | Path) -> bool:
    """Whether two images have the same spatial shape and the same affine (to 1e-3 mm)."""
    first, second = _open(path), _open(other)
    return first.shape[:3] == second.shape[:3] and np.allclose(
        first.affine, second.affine, atol=1e-3
    )


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

    Masks become uint8, all else float32. The header says mm and s, the affine's codes are those
    of ``like``, and the file's bytes depend on the data alone.
    """
    reference = _open(like)
    array = (data.movedim(0, -1) if data.ndim == 4 else data).cpu().numpy()
    array = array.astype(np.uint8 if data.dtype is torch.bool else np.float32)
    image = nb.Nifti1Image(array, reference.affine)
    for name in ("qform", "sform"):
        code = int(reference.header[f"{name}_code"])
        getattr(image, f"set_{name}")(reference.affine, code=code or 1)
    image.header.set_xyzt_units("mm", "sec")
    image.to_filename(path)
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
    packed = str(path).endswith(".gz")
    content = gzip.compress(image.to_bytes(), mtime=0) if packed else image.to_bytes()
    Path(path).write_bytes(content)
    return str(path)
