"""Morphology of masks in mm: the same ball on every grid, exactly."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.kernels import ROUNDING

OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "and": torch.logical_and,
    "or": torch.logical_or,
}
"""How :func:`combine` joins two masks."""


def erode(mask: Tensor, zooms: Zooms, *, radius: float) -> Tensor:
    """Keep the voxels whose ball of ``radius`` mm lies in the mask; beyond the grid is outside.

    Parameters
    ----------
    mask : (X, Y, Z) bool tensor
        What to erode.
    zooms : tuple of float
        Voxel size (mm).
    radius : float
        Radius of the ball (mm); 0 keeps the mask.

    Returns
    -------
    (X, Y, Z) bool tensor
    """
    array, box = _cropped(mask, (0, 0, 0))
    if radius <= 0 or not array.any():
        return mask.clone()
    return _pasted(_over_ball(np.logical_and, array, zooms, radius), box, mask)


def dilate(mask: Tensor, zooms: Zooms, *, radius: float) -> Tensor:
    """Add the voxels within ``radius`` mm of the mask.

    Parameters
    ----------
    mask : (X, Y, Z) bool tensor
        What to dilate.
    zooms : tuple of float
        Voxel size (mm).
    radius : float
        Radius of the ball (mm); 0 keeps the mask.

    Returns
    -------
    (X, Y, Z) bool tensor
    """
    array, box = _cropped(mask, [math.ceil(radius / zoom) for zoom in zooms])
    if radius <= 0 or not array.any():
        return mask.clone()
    return _pasted(_over_ball(np.logical_or, array, zooms, radius), box, mask)


def _over_ball(operation: np.ufunc, array: np.ndarray, zooms: Zooms, radius: float) -> np.ndarray:
    """Join (X, Y, Z) bool over the ball around each voxel by "and" or "or"; beyond it is False.

    The ball is a bundle of rods along the last axis. Rods of each length are joined first, then
    those of one length at all their places, eight voxels to a byte.
    """
    reach = radius**2 * (1 + ROUNDING)
    beyond = [int(reach**0.5 / zoom) for zoom in zooms]
    x, y = (
        (zoom * np.arange(-most, most + 1)) ** 2
        for zoom, most in zip(zooms[:2], beyond[:2], strict=True)
    )
    room = reach - (x[:, None] + y)
    lengths = np.where(room < 0, -1, (np.maximum(room, 0) ** 0.5 / zooms[2]).astype(int))
    nx, ny, nz = array.shape
    bits = np.bitwise_and if operation is np.logical_and else np.bitwise_or
    rods = array.copy()
    joined = np.packbits(rods, axis=-1)
    for length in range(beyond[2] + 1):
        if length:
            _join_shifted(operation, rods, array, length)
        places = np.argwhere(lengths == length)
        if not len(places):
            continue
        packed = np.packbits(rods, axis=-1)
        padded = np.pad(packed, [(beyond[0], beyond[0]), (beyond[1], beyond[1]), (0, 0)])
        for i, j in places:
            bits(joined, padded[i : i + nx, j : j + ny], out=joined)
    return np.unpackbits(joined, axis=-1, count=nz).view(bool)


def _join_shifted(operation: np.ufunc, rods: np.ndarray, array: np.ndarray, shift: int) -> None:
    """Join ``rods`` with what ``array`` has ``shift`` voxels away along the last axis."""
    n = array.shape[-1]
    kept, moved = slice(min(shift, n), None), slice(max(n - shift, 0))
    operation(rods[..., kept], array[..., moved], out=rods[..., kept])
    operation(rods[..., moved], array[..., kept], out=rods[..., moved])
    if operation is np.logical_and:  # beyond the array is False
        rods[..., : min(shift, n)] = rods[..., max(n - shift, 0) :] = False


def fill_holes(mask: Tensor, zooms: Zooms, *, max_volume: float = math.inf) -> Tensor:
    """Fill what the mask encloses: background that reaches no face of the grid (6-connected).

    Parameters
    ----------
    mask : (X, Y, Z) bool tensor
        The mask.
    zooms : tuple of float
        Voxel size (mm).
    max_volume : float
        A larger hole (mL) stays open.

    Returns
    -------
    (X, Y, Z) bool tensor
    """
    array, box = _cropped(mask, (0, 0, 0))
    labels, _ = ndimage.label(~np.pad(array, 1))
    volumes = np.bincount(labels.ravel()) * math.prod(zooms) / 1000
    is_hole = volumes <= max_volume
    # Beyond the mask's own box all background is one piece, and it holds the padded corner.
    is_hole[[0, labels[0, 0, 0]]] = False
    return _pasted(array | is_hole[labels][1:-1, 1:-1, 1:-1], box, mask)


def depth_of(mask: Tensor, zooms: Zooms) -> Tensor:
    """Distance (mm) of (X, Y, Z) from what is outside the mask; beyond the grid is outside."""
    array, box = _cropped(mask, (0, 0, 0))
    distance = torch.zeros(mask.shape)
    if array.any():
        padded = ndimage.distance_transform_edt(np.pad(array, 1), sampling=zooms)
        distance[box] = torch.from_numpy(padded[1:-1, 1:-1, 1:-1].astype(np.float32))
    return distance.to(mask.device)


def largest_component(mask: Tensor) -> Tensor:
    """Keep the largest 6-connected piece; of equal ones, the first in memory order.

    Parameters
    ----------
    mask : (X, Y, Z) bool tensor
        Any mask; an empty one stays empty.

    Returns
    -------
    (X, Y, Z) bool tensor
        The piece alone.
    """
    array, box = _cropped(mask, (0, 0, 0))
    labels, count = ndimage.label(array)
    if count < 2:
        return mask.clone()
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return _pasted(labels == sizes.argmax(), box, mask)


def largest_core(mask: Tensor, zooms: Zooms, *, radius: float) -> Tensor:
    """Keep the largest piece that is held together by more than bridges.

    The mask is eroded by ``radius`` mm, its largest component is grown back, one voxel's diagonal
    farther so that no corner is rounded off, and what the mask itself held there is kept.

    Parameters
    ----------
    mask : (X, Y, Z) bool tensor
        The mask.
    zooms : tuple of float
        Voxel size (mm).
    radius : float
        Half the width (mm) of a bridge that is cut; 0 gives :func:`largest_component`.

    Returns
    -------
    (X, Y, Z) bool tensor
    """
    core = largest_component(erode(mask, zooms, radius=radius))
    if radius <= 0:
        return core
    return largest_component(mask & dilate(core, zooms, radius=radius + math.hypot(*zooms)))


def smooth(image: Tensor, zooms: Zooms, *, sigma: float) -> Tensor:
    """Gaussian mean of (X, Y, Z), ``sigma`` in mm; beyond the grid its outermost voxels go on."""
    widths = [sigma / zoom for zoom in zooms]
    array = ndimage.gaussian_filter(image.cpu().numpy(), widths, mode="nearest", truncate=3.0)
    return torch.from_numpy(array).to(image)


def majority(mask: Tensor, zooms: Zooms, *, sigma: float, level: float = 0.5) -> Tensor:
    """Keep a voxel where more than ``level`` of its Gaussian neighbourhood is in the mask."""
    if sigma <= 0:
        return mask.clone()
    return smooth(mask.float(), zooms, sigma=sigma) > level


def combine(masks: Sequence[Tensor], operation: str) -> Tensor:
    """Join masks of one grid.

    Parameters
    ----------
    masks : sequence of (X, Y, Z) bool tensors
        One or more masks.
    operation : {"and", "or"}
        Voxels of all masks, or of any.

    Returns
    -------
    (X, Y, Z) bool tensor

    Raises
    ------
    ValueError
        If there is no mask, the grids differ, or the operation is not known.
    """
    if operation not in OPERATIONS:
        msg = f"masks cannot be combined by {operation!r}: choose from {', '.join(OPERATIONS)}"
        raise ValueError(msg)
    if not masks:
        msg = "there is no mask to combine: give one or more"
        raise ValueError(msg)
    joined = _checked(masks[0]).clone()
    for number, mask in enumerate(masks[1:], start=2):
        if mask.shape != joined.shape:
            msg = (
                f"mask {number} {tuple(mask.shape)} and mask 1 {tuple(joined.shape)} are on "
                "different grids: resample one of them"
            )
            raise ValueError(msg)
        joined = OPERATIONS[operation](joined, _checked(mask))
    return joined


def _checked(mask: Tensor) -> Tensor:
    if mask.dtype is not torch.bool or mask.ndim != 3:
        msg = (
            f"a mask is bool (X, Y, Z), not {mask.dtype} {tuple(mask.shape)}: compare it with a "
            "threshold first"
        )
        raise ValueError(msg)
    return mask


def _cropped(mask: Tensor, margin: Sequence[int]) -> tuple[np.ndarray, tuple[slice, ...]]:
    """Box around the mask, ``margin`` voxels wider where the grid allows, and where it stands."""
    array = _checked(mask).cpu().numpy()
    if not array.any():
        return array, (slice(None),) * 3
    box = [slice(None)] * 3
    for axis, extra in enumerate(margin):
        others = tuple(other for other in range(3) if other != axis)
        found = np.nonzero(array[tuple(box)].any(axis=others))[0]
        box[axis] = slice(max(found[0] - extra, 0), found[-1] + 1 + extra)
    return array[tuple(box)], tuple(box)


def _pasted(array: np.ndarray, box: tuple[slice, ...], like: Tensor) -> Tensor:
    """Undo :func:`_cropped`."""
    whole = np.zeros(like.shape, dtype=bool)
    whole[box] = array
    return torch.from_numpy(whole).to(like.device)
