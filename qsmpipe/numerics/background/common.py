"""What every method of the stage shares: its result, its checks, the box it works in."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from qsmpipe.numerics.solvers import Convergence

Box: TypeAlias = tuple[slice, slice, slice]
"""Where a part of a grid lies in it."""


class LocalField(NamedTuple):
    """A field without its background."""

    field: Tensor
    """Field (..., X, Y, Z) of the sources inside ``mask``, in the unit that went in; 0 outside."""
    mask: Tensor
    """Where ``field`` is trusted, (X, Y, Z) bool; never larger than the mask that went in."""
    convergence: Convergence | None
    """How the iteration ended; None for a direct method."""


def check_grids(field: Tensor, mask: Tensor) -> None:
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


def known_field(field: Tensor, mask: Tensor) -> Tensor:
    """``field`` (..., X, Y, Z) with 0 outside ``mask``, whatever stood there.

    Raises
    ------
    ValueError
        If the grids differ, the mask is not bool or empty, or the field is not finite inside.
    """
    check_grids(field, mask)
    known = torch.where(mask, field, 0)
    if not known.isfinite().all():
        lost = int((~known.isfinite()).reshape(-1, *mask.shape).any(0).sum())
        msg = (
            f"field is not finite in {lost} of the mask's {int(mask.sum())} voxels: "
            "take them out of the mask"
        )
        raise ValueError(msg)
    return known


def crop(field: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Box]:
    """Cut :func:`known_field` and its mask to the mask's bounding box; and say where it lies."""
    check_grids(field, mask)
    box = bounding_box(mask)
    inside = mask[box]
    return known_field(field[(..., *box)], inside), inside, box


def bounding_box(mask: Tensor) -> Box:
    """Smallest box around the true voxels of (X, Y, Z).

    >>> mask = torch.zeros(4, 5, 6, dtype=torch.bool)
    >>> mask[1:3, 2, 4:] = True
    >>> bounding_box(mask)
    (slice(1, 3, None), slice(2, 3, None), slice(4, 6, None))
    """
    ranges = [mask.any(dim=others).nonzero() for others in ((1, 2), (0, 2), (0, 1))]
    x, y, z = (slice(int(where[0]), int(where[-1]) + 1) for where in ranges)
    return x, y, z


def in_place(part: Tensor, box: Box, like: Tensor) -> Tensor:
    """``part`` at its ``box`` in zeros of the grid of ``like``."""
    whole = part.new_zeros((*part.shape[:-3], *like.shape[-3:]))
    whole[(..., *box)] = part
    return whole


def one_by_one(
    solve: Callable[[Tensor], tuple[Tensor, Convergence]], fields: Tensor
) -> tuple[Tensor, Convergence]:
    """Solve for each (X, Y, Z) of (..., X, Y, Z); tell how the slowest of them ended."""
    if fields.ndim == 3:
        return solve(fields)
    results = [solve(field) for field in fields.reshape(-1, *fields.shape[-3:])]
    ends = [end for _, end in results]
    slowest = Convergence(
        all(end.converged for end in ends),
        max(end.iterations for end in ends),
        max(end.change for end in ends),
        ends[0].tolerance,
    )
    return torch.stack([local for local, _ in results]).reshape(fields.shape), slowest
