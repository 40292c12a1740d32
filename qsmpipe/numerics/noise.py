"""How far the field of each voxel is to be trusted, by its standard deviation."""

import math

import torch
from torch import Tensor

ASSUMED_NOISE = 0.003
"""Noise where no noise map is given (ppm)."""

LARGEST_WEIGHT = 5.0
"""In medians of all weights: for the methods in which one voxel of tiny noise would outweigh the
others."""


def noise_level(mask: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Voxels of ``mask`` whose noise is known, and the median of it.

    Raises
    ------
    ValueError
        If ``noise`` is on another grid, or nowhere positive and finite inside ``mask``.
    """
    if noise.shape != mask.shape:
        msg = (
            f"noise {tuple(noise.shape)} and mask {tuple(mask.shape)} are on different grids: "
            "resample the noise map to the field's grid"
        )
        raise ValueError(msg)
    usable = mask & noise.isfinite() & (noise > 0)
    if not usable.any():
        msg = (
            f"noise {tuple(noise.shape)} is positive and finite in no voxel of the mask "
            f"({int(mask.sum())} voxels): give a standard deviation, or leave it out"
        )
        raise ValueError(msg)
    return usable, noise[usable].median()


def data_weight(
    mask: Tensor, noise: Tensor | None, like: Tensor, *, largest: float = math.inf
) -> Tensor:
    """Weight W of each voxel's field: median noise over noise inside ``mask``, 0 outside.

    At most ``largest``; 0 where the noise is 0 or not finite, 1 without a noise map.
    """
    if noise is None:
        return mask.to(like)
    usable, level = noise_level(mask, noise)
    return torch.where(usable, (level / noise).clamp(max=largest), 0.0).to(like)
