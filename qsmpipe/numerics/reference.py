"""Referencing: susceptibility is known up to a constant, so say relative to what it is given."""

from typing import NamedTuple

import torch
from torch import Tensor


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
