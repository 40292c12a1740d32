"""Grids: what must agree, and the box around a mask that the work is done in.

One rule holds for values that are NaN or infinite: outside the mask, and where a magnitude of 0
says that there is no signal, they have no effect; inside they are a ``ValueError`` that says how
many there are. Nothing is guessed for them.
"""

from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Box: TypeAlias = tuple[slice, slice, slice]
"""Where a part of a grid lies in it."""


def check_grid(images: Tensor, others: Tensor, names: tuple[str, str]) -> None:
    """Insist that two images share their space axes (and echoes, if both have them).

    Raises
    ------
    ValueError
        Naming both shapes.
    """
    n = min(images.ndim, others.ndim)
    if images.shape[-n:] != others.shape[-n:]:
        msg = (
            f"{names[0]} {tuple(images.shape)} and {names[1]} {tuple(others.shape)} are on "
            "different grids"
        )
        raise ValueError(msg)


def check_mask(field: Tensor, mask: Tensor) -> None:
    """Insist on a mask, not empty, on the grid of ``field``."""
    if field.shape[-3:] != mask.shape:
        msg = (
            f"field {tuple(field.shape)} and mask {tuple(mask.shape)} are on different grids: "
            "resample the mask to the field's grid"
        )
        raise ValueError(msg)
    if mask.dtype is not torch.bool:
        msg = f"mask is {mask.dtype}, not torch.bool: threshold it first"
        raise ValueError(msg)
    if not mask.any():
        msg = f"mask {tuple(mask.shape)} is empty: no voxel of the field is inside"
        raise ValueError(msg)


def all_finite(image: Tensor) -> bool:
    """Whether no voxel is NaN or infinite; mostly told by the sum, in one pass."""
    return bool(image.sum().isfinite()) or bool(image.isfinite().all())


def check_finite(image: Tensor, mask: Tensor, name: str) -> None:
    """Insist that ``image`` (..., X, Y, Z) is finite inside ``mask``.

    Raises
    ------
    ValueError
        Naming the number of voxels in which it is not.
    """
    if all_finite(image):
        return
    bad = (~image.isfinite()).reshape(-1, *mask.shape).any(0) & mask
    if lost := int(bad.sum()):
        msg = (
            f"{name} is not finite in {lost} of the mask's {int(mask.sum())} voxels: take them "
            "out of the mask"
        )
        raise ValueError(msg)


def check_signal(phase: Tensor, magnitude: Tensor) -> Tensor:
    """Give ``phase`` (E, X, Y, Z), which must be finite where ``magnitude`` is not 0, 0 elsewhere.

    Raises
    ------
    ValueError
        Naming the number of voxels in which one of the two is not finite.
    """
    if all_finite(phase) and all_finite(magnitude):
        return phase
    dark = magnitude == 0
    bad = ~(magnitude.isfinite() & (dark | phase.isfinite()))
    if lost := int(bad.reshape(-1, *bad.shape[-3:]).any(0).sum()):
        msg = (
            f"phase or magnitude is not finite in {lost} voxels with signal: set both to 0 there, "
            "which means no signal"
        )
        raise ValueError(msg)
    return torch.where(dark, 0, phase)


def known_field(field: Tensor, mask: Tensor) -> Tensor:
    """``field`` (..., X, Y, Z) with 0 outside ``mask``, whatever stood there.

    Raises
    ------
    ValueError
        If the grids differ, the mask is not bool or empty, or the field is not finite inside.
    """
    check_mask(field, mask)
    known = torch.where(mask, field, 0)
    check_finite(known, mask, "field")
    return known


def crop(field: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Box]:
    """Cut :func:`known_field` and its mask to the mask's bounding box; and say where it lies.

    Both are contiguous, however the images lie in memory.
    """
    check_mask(field, mask)
    box = bounding_box(mask)
    inside = mask[box].contiguous()
    return known_field(field[(..., *box)], inside).contiguous(), inside, box


def bounding_box(mask: Tensor) -> Box:
    """Smallest box around the true voxels of (X, Y, Z).

    >>> mask = torch.zeros(4, 5, 6, dtype=torch.bool)
    >>> mask[1:3, 2, 4:] = True
    >>> bounding_box(mask)
    (slice(1, 3, None), slice(2, 3, None), slice(4, 6, None))
    """
    array = mask.cpu().numpy()  # numpy's any stops where it knows
    ranges = [np.flatnonzero(array.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
    x, y, z = (slice(int(where[0]), int(where[-1]) + 1) for where in ranges)
    return x, y, z


def surrounded(inside: Tensor) -> Tensor:
    """Voxels of (X, Y, Z) bool that are inside with their six neighbours; beyond it is outside."""
    inner = inside.clone()
    for axis, n in enumerate(inside.shape):
        inner.narrow(axis, 0, n - 1).logical_and_(inside.narrow(axis, 1, n - 1))
        inner.narrow(axis, 1, n - 1).logical_and_(inside.narrow(axis, 0, n - 1))
        inner.select(axis, 0).fill_(False)
        inner.select(axis, -1).fill_(False)
    return inner


def in_place(part: Tensor, box: Box, like: Tensor) -> Tensor:
    """``part`` at its ``box`` in zeros of the grid of ``like``."""
    whole = part.new_zeros((*part.shape[:-3], *like.shape[-3:]))
    whole[(..., *box)] = part
    return whole


CHUNK, PIECE = 1 << 18, 1 << 14
"""Voxels fitted at once: what bounds the memory, and what a processor's cache holds."""


def voxels_at_once(values: Tensor) -> int:
    """How many voxels to fit at once: :data:`PIECE`, on CUDA :data:`CHUNK`."""
    return PIECE if values.device.type == "cpu" else CHUNK


def voxels_of(mask: Tensor, *images: Tensor) -> tuple[Tensor, ...]:
    """Give the voxels of images (E, X, Y, Z) that are in ``mask``, each (E, N)."""
    place = mask.reshape(-1).nonzero()[:, 0]
    return tuple(image.flatten(1).index_select(1, place) for image in images)


def along(values: Tensor, axis: int) -> Tensor:
    """Values (N,) of the planes along space axis ``axis``, to broadcast over (..., X, Y, Z).

    Parameters
    ----------
    values : (N,) tensor
        One number per plane.
    axis : int
        0, 1 or 2.

    Returns
    -------
    (N, 1, 1), (1, N, 1) or (1, 1, N) tensor
        A view of ``values``.
    """
    return values.reshape([-1 if each == axis else 1 for each in range(3)])
