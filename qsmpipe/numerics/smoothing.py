"""Means over neighbourhoods: Gaussian ones much wider than a voxel, and boxes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms

PER_STEP = 2.0
"""Widths per step of the coarse grid: what is finer than that differs by 3e-9 of the image."""

REACH = 5.0
"""Widths at which the Gaussian ends: 4e-6 of its height."""


def wide_gaussian(images: Tensor, zooms: Zooms, *, sigma: float) -> Tensor:
    r"""Convolve with a Gaussian; beyond the grid is 0.

    A Gaussian is two narrower ones after each other, and what the first one leaves is told by a
    coarse grid. Along each axis they are one small matrix to the coarse grid and one back.

    Parameters
    ----------
    images : (..., X, Y, Z) real tensor
        Any unit.
    zooms : tuple of float
        Voxel size (mm).
    sigma : float
        Standard deviation of the Gaussian (mm), of integral 1.

    Returns
    -------
    (..., X, Y, Z) tensor
    """
    pairs = [
        _matrices(n, zoom, sigma, like=images)
        for n, zoom in zip(images.shape[-3:], zooms, strict=True)
    ]
    images = along_axes([there for there, _ in pairs], images)
    for axis, (_, back) in enumerate(pairs):
        images = images if back is None else _along(back, images, axis)
    return images


def along_axes(matrices: Sequence[Tensor], images: Tensor) -> Tensor:
    """Multiply the lines of (..., X, Y, Z) along each axis by a matrix (M, N) of its own."""
    for axis in (2, 1, 0):
        images = _along(matrices[axis], images, axis)
    return images


def _along(matrix: Tensor, images: Tensor, axis: int) -> Tensor:
    """Multiply the lines of (..., X, Y, Z) along a space axis by (M, N)."""
    if axis == 2:
        return images @ matrix.T
    if axis == 1:
        return matrix @ images
    return (matrix @ images.flatten(-2)).unflatten(-1, images.shape[-2:])


def _matrices(n: int, zoom: float, sigma: float, *, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """To a coarse grid (M, N) and back (N, M); without a way back where the grid is coarse."""
    step = int(sigma / PER_STEP / zoom)
    fine = zoom * torch.arange(n, dtype=torch.float64)
    if step < 2:
        return _gaussian(fine, fine, sigma, spacing=zoom).to(like), None
    half = sigma / math.sqrt(2)
    margin = math.ceil(REACH * half / zoom / step)
    places = torch.arange(-margin, (n - 1) // step + margin + 2, dtype=torch.float64)
    coarse = zoom * step * places
    there = _gaussian(coarse, fine, half, spacing=zoom)
    back = _gaussian(fine, coarse, half, spacing=zoom * step)
    return there.to(like), back.to(like)


def _gaussian(to: Tensor, of: Tensor, sigma: float, *, spacing: float) -> Tensor:
    """Weights (M, N) that points ``to`` give to points ``of``, which stand for ``spacing`` mm."""
    exponent = ((to[:, None] - of) / sigma).square_().mul_(-0.5)
    return exponent.exp_().mul_(spacing / (sigma * math.sqrt(2 * math.pi)))


def box_count(mask: Tensor, widths: Sequence[int]) -> Tensor:
    """How many voxels of a box around each voxel are in the mask; beyond the grid is outside.

    Parameters
    ----------
    mask : (X, Y, Z) bool tensor
        Any mask.
    widths : sequence of 3 int
        Odd edges of the box (voxels), which holds no more than 32767.

    Returns
    -------
    (X, Y, Z) int16 tensor
    """
    count = mask.to(torch.int16)
    for axis, width in enumerate(widths):
        n, single = count.shape[axis], count
        count = single.clone()
        for shift in range(1, min(width // 2 + 1, n)):
            count.narrow(axis, shift, n - shift).add_(single.narrow(axis, 0, n - shift))
            count.narrow(axis, 0, n - shift).add_(single.narrow(axis, shift, n - shift))
    return count
