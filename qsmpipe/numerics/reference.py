"""Referencing: susceptibility is known up to a constant, so say relative to what it is given."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Referenced", "median_map", "reference"]


class Referenced(NamedTuple):
    """Susceptibility relative to the mean of a region."""

    chi: Tensor
    """(X, Y, Z), ppm; its mean over the region is 0, and it is 0 outside the mask."""
    value: float
    """What was subtracted: the mean over the region (ppm)."""
    deviation: float
    """Standard deviation over the region (ppm)."""
    voxels: int
    """Size of the region."""


def reference(chi: Tensor, mask: Tensor, *, region: Tensor | None = None) -> Referenced:
    """Subtract the mean of susceptibility over a region [1]_.

    Parameters
    ----------
    chi : (X, Y, Z) real tensor
        Susceptibility (ppm).
    mask : (X, Y, Z) bool tensor
        Where ``chi`` is known.
    region : (X, Y, Z) bool tensor, optional
        What becomes 0, the whole ``mask`` by default. Voxels of it outside ``mask`` are left out.

    Returns
    -------
    Referenced

    Raises
    ------
    ValueError
        If the grids differ, the mask or the region is empty, the region lies outside the mask, or
        ``chi`` is not finite in it.

    References
    ----------
    .. [1] QSM Consensus Organization Committee, Magn Reson Med 91 (2024) 1834,
       doi:10.1002/mrm.30006: the reference region has to be stated.
    """
    for name, other in {"mask": mask, "region": region}.items():
        if other is not None and other.shape != chi.shape:
            msg = (
                f"chi {tuple(chi.shape)} and {name} {tuple(other.shape)} are on different grids: "
                f"resample the {name} onto the grid of chi"
            )
            raise ValueError(msg)
        if other is not None and not other.any():
            msg = f"the reference has no voxel: {name} is empty; choose another one"
            raise ValueError(msg)
    inside = mask if region is None else mask & region
    if not inside.any():
        msg = (
            f"the reference region ({int(region.sum())} voxels) lies outside the mask "  # type: ignore[union-attr]
            f"({int(mask.sum())} voxels): choose another region, or a larger mask"
        )
        raise ValueError(msg)
    values = chi[inside].double()
    if not values.isfinite().all():
        msg = (
            f"susceptibility is not finite in {int((~values.isfinite()).sum())} of the "
            f"reference's {values.numel()} voxels: it has no mean there"
        )
        raise ValueError(msg)
    value = values.mean().item()
    referenced = torch.where(mask, chi - value, torch.zeros_like(chi))
    return Referenced(referenced, value, values.std(correction=0).item(), values.numel())


def median_map(maps: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Median of susceptibility over methods, referenced to the mean of all that it is known in.

    Parameters
    ----------
    maps : sequence of (X, Y, Z) real tensors
        Susceptibility (ppm) by each method. Of an even number, the mean of the middle two.
    masks : sequence of (X, Y, Z) bool tensors
        Where each is known.

    Returns
    -------
    chi : (X, Y, Z) tensor
        ppm; 0 outside ``mask``.
    mask : (X, Y, Z) bool tensor
        Where all are known.

    Raises
    ------
    ValueError
        If the numbers of maps and masks differ, the grids differ, or nowhere all are known.
    """
    if len(maps) != len(masks) or not maps:
        msg = f"{len(maps)} maps and {len(masks)} masks: give one mask for each of several maps"
        raise ValueError(msg)
    if len(shapes := {tuple(image.shape) for image in (*maps, *masks)}) > 1:
        msg = f"maps and masks are on different grids: {sorted(shapes)}"
        raise ValueError(msg)
    mask = torch.stack(list(masks)).all(0)
    ordered = torch.stack([torch.where(mask, chi, 0) for chi in maps]).sort(0).values
    middle = (ordered[(len(maps) - 1) // 2] + ordered[len(maps) // 2]) / 2
    return reference(middle, mask).chi, mask
