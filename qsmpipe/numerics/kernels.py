"""Convolution kernels as transfer functions on the half spectrum of :mod:`.fourier`."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qsmpipe.numerics.fourier import Shape, Zooms

AXIAL = (0.0, 0.0, 1.0)
"""B0 along the third voxel axis."""


def frequencies(shape: Shape, zooms: Zooms, *, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Spatial frequencies (1/mm) of the half spectrum, as three tensors that broadcast."""
    kx = torch.fft.fftfreq(shape[0], zooms[0], dtype=like.dtype, device=like.device)
    ky = torch.fft.fftfreq(shape[1], zooms[1], dtype=like.dtype, device=like.device)
    kz = torch.fft.rfftfreq(shape[2], zooms[2], dtype=like.dtype, device=like.device)
    return kx[:, None, None], ky[None, :, None], kz[None, None, :]


def dipole(
    shape: Shape, zooms: Zooms, b0_direction: Sequence[float] = AXIAL, *, like: Tensor
) -> Tensor:
    """Transfer function from susceptibility (ppm) to field (ppm), :math:`1/3 - (k.b)^2/k^2` [1]_.

    Parameters
    ----------
    shape, zooms
        Grid of the transform and its voxel size (mm).
    b0_direction : sequence of 3 floats
        Unit vector along B0 in voxel axes.
    like : Tensor
        Gives dtype and device.

    Returns
    -------
    (X, Y, Z // 2 + 1) real tensor
        0 at zero frequency.

    Raises
    ------
    ValueError
        If ``b0_direction`` is not a unit vector.

    References
    ----------
    .. [1] Salomir et al. Concepts Magn Reson B 19 (2003) 26, doi:10.1002/cmr.b.10083
    """
    length = math.dist(b0_direction, (0, 0, 0))
    if abs(length - 1) > 1e-3:
        msg = (
            f"b0_direction {tuple(b0_direction)} has length {length:g}, not 1: give the unit "
            "vector along B0 in voxel axes (the affine's rotation, columns normalised)"
        )
        raise ValueError(msg)
    kx, ky, kz = frequencies(shape, zooms, like=like)
    along = kx * b0_direction[0] + ky * b0_direction[1] + kz * b0_direction[2]
    squared = kx**2 + ky**2 + kz**2
    squared[0, 0, 0] = torch.inf
    transfer = 1 / 3 - along**2 / squared
    transfer[0, 0, 0] = 0.0
    return transfer


def ball_mean(shape: Shape, zooms: Zooms, radius: float, *, like: Tensor) -> Tensor:
    """Transfer function of the mean over a ball of ``radius`` mm: real, 1 at zero frequency."""
    x, y, z = (
        torch.fft.fftfreq(n, 1 / (n * zoom), dtype=like.dtype, device=like.device)
        for n, zoom in zip(shape, zooms, strict=True)
    )
    squared = x[:, None, None] ** 2 + y[None, :, None] ** 2 + z[None, None, :] ** 2
    ball = (squared <= radius**2 * (1 + 1e-5)).to(like)
    return torch.fft.rfftn(ball / ball.sum()).real.contiguous()


def gaussian(shape: Shape, zooms: Zooms, sigma: float, *, like: Tensor) -> Tensor:
    """Transfer function of a Gaussian of standard deviation ``sigma`` mm, 1 at zero frequency."""
    kx, ky, kz = frequencies(shape, zooms, like=like)
    return torch.exp(-2 * (math.pi * sigma) ** 2 * (kx**2 + ky**2 + kz**2))


def laplacian(shape: Shape, zooms: Zooms, *, like: Tensor) -> Tensor:
    """Eigenvalues (1/mm2, >= 0) of minus the periodic 7-point Laplacian."""
    total = torch.zeros((), dtype=like.dtype, device=like.device)
    for k, zoom in zip(frequencies(shape, zooms, like=like), zooms, strict=True):
        total = total + (2 - 2 * torch.cos(2 * math.pi * k * zoom)) / zoom**2
    return total
