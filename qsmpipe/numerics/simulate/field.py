"""Susceptibility to field in free space, split into local and background parts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from qsmpipe.numerics.fourier import SPACE, Shape, Zooms, padded_shape
from qsmpipe.numerics.kernels import AXIAL, check_direction

AIR = 9.4
"""Susceptibility of air relative to water (ppm)."""

NEAR = 12
"""Voxels within this many steps count as cuboids, those beyond as point dipoles."""

BLOCK = 1 << 21
"""Numbers that are worked on at once, so that memory stays near that of the image."""


class Fields(NamedTuple):
    """Field of a head, ppm of B0."""

    total: Tensor
    """``local + background`` everywhere."""
    local: Tensor
    """Of the sources inside the mask, relative to their mean."""
    background: Tensor
    """Of all else: harmonic inside the mask."""


def cuboid(offsets: int, zooms: Zooms, b0_direction: Sequence[float] = AXIAL) -> Tensor:
    r"""Field of one voxel of 1 ppm, seen from the centres of those around it.

    The demagnetising tensor of a cuboid, the integral of a dipole over it [1]_, seen along B0
    and with the sphere of Lorentz taken out: exact where a point dipole is not.

    Parameters
    ----------
    offsets : int
        How many voxels to go to each side.
    zooms : tuple of float
        Voxel size (mm).
    b0_direction : sequence of 3 floats
        Unit vector along B0 in voxel axes.

    Returns
    -------
    (n, n, n) float64 tensor
        Field (ppm), ``n = 2 * offsets + 1``, the voxel itself in the middle.

    References
    ----------
    .. [1] Newell et al. J Geophys Res 98 (1993) 9551, doi:10.1029/93JB00694
    """
    steps = torch.arange(-offsets, offsets + 1, dtype=torch.float64)
    bx, by, bz = b0_direction
    total = torch.zeros((), dtype=torch.float64)
    for signs in product((1, -1), repeat=3):
        x, y, z = ((steps + sign / 2) * zoom for sign, zoom in zip(signs, zooms, strict=True))
        x, y = x[:, None, None], y[:, None]
        r = (x**2 + y**2 + z**2).sqrt()
        total = total + math.prod(signs) * (
            bx**2 * torch.atan(y * z / (x * r))
            + by**2 * torch.atan(x * z / (y * r))
            + bz**2 * torch.atan(x * y / (z * r))
            - 2 * bx * by * torch.log(z + r)
            - 2 * bx * bz * torch.log(y + r)
            - 2 * by * bz * torch.log(x + r)
        )
    field = -total / (4 * math.pi)
    field[offsets, offsets, offsets] += 1 / 3
    return field


@dataclass(frozen=True)
class FreeSpace:
    """Linear convolution with the field of a voxel: no periodic images, any direction of B0.

    The kernel stands in image space, on twice the grid, so that nothing wraps around; the
    dipole of :mod:`qsmpipe.numerics.kernels`, sampled in k-space, repeats the head instead.
    Simulating with the one and inverting with the other also keeps a test honest.
    """

    shape: Shape
    """Padded grid."""
    transfer: Tensor
    """Half spectrum of the kernel on ``shape``, real because the kernel is even."""

    @classmethod
    def on_grid(
        cls, like: Tensor, zooms: Zooms, b0_direction: Sequence[float] = AXIAL
    ) -> "FreeSpace":
        """Make the kernel for images on the grid of ``like`` (X, Y, Z)."""
        check_direction(b0_direction)
        length = math.dist(b0_direction, (0, 0, 0))
        direction = [value / length for value in b0_direction]
        shape = padded_shape([2 * n for n in like.shape[-3:]], zooms, margin=0.0)
        spectrum = _kernel_spectrum(shape, zooms, direction, like)
        transfer = torch.empty_like(spectrum, dtype=like.dtype)
        step = max(1, BLOCK // (shape[0] * shape[1]))
        for k in range(0, transfer.shape[2], step):
            transfer[..., k : k + step] = torch.fft.fft2(
                spectrum[..., k : k + step], dim=(0, 1)
            ).real
        return cls(shape, transfer)

    def __call__(self, chi: Tensor) -> Tensor:
        """Field (ppm) of ``chi`` (ppm), both (X, Y, Z); beyond the grid ``chi`` is 0.

        The zeros of the padding are never stored: two axes are padded slab by slab.
        """
        nx, ny, nz = chi.shape
        px, py, pz = self.shape
        half = torch.fft.rfft(chi, n=pz, dim=2)
        step = max(1, BLOCK // (px * py))
        for k in range(0, half.shape[2], step):
            slab = torch.fft.fft2(half[..., k : k + step], s=(px, py), dim=(0, 1))
            slab *= self.transfer[..., k : k + step]
            half[..., k : k + step] = torch.fft.ifft2(slab, dim=(0, 1))[:nx, :ny]
        return torch.fft.irfft(half, n=pz, dim=2)[..., :nz].contiguous()


def _kernel_spectrum(
    shape: Shape, zooms: Zooms, b0_direction: Sequence[float], like: Tensor
) -> Tensor:
    """Kernel on ``shape``, origin in the corner, transformed along the last axis alone."""
    x, y, z = (
        torch.fft.fftfreq(n, 1 / (n * zoom), dtype=like.dtype, device=like.device)
        for n, zoom in zip(shape, zooms, strict=True)
    )
    bx, by, bz = b0_direction
    offsets = min(NEAR, *((n - 1) // 2 for n in shape))
    near = cuboid(offsets, zooms, b0_direction).to(like)
    steps = torch.arange(-offsets, offsets + 1)
    corner = [steps % n for n in shape]
    half = torch.empty(
        (shape[0], shape[1], shape[2] // 2 + 1), dtype=like.dtype.to_complex(), device=like.device
    )
    for i in range(shape[0]):
        squared = x[i] ** 2 + y[:, None] ** 2 + z**2
        squared.clamp_(min=min(zooms) ** 2)
        along = bx * x[i] + by * y[:, None] + bz * z
        plane = (3 * along**2 / squared - 1) * squared**-1.5
        plane *= math.prod(zooms) / (4 * math.pi)
        step = i if i <= offsets else i - shape[0]
        if abs(step) <= offsets:
            plane[corner[1][:, None], corner[2]] = near[step + offsets]
        half[i] = torch.fft.rfft(plane, dim=1)
    return half


def fields(
    chi: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    b0_direction: Sequence[float] = AXIAL,
    outside: float = AIR,
) -> Fields:
    """Field of a head: total, of the sources inside ``mask``, and of the rest.

    A field depends on differences of susceptibility alone: ``chi - outside`` is convolved, which
    is 0 beyond the grid, where ``outside`` goes on for ever. The local sources are ``chi`` less
    its mean over ``mask``, so that the shape of the mask makes no local field: its inversion is
    the map referenced to the whole mask. All else is background, and harmonic in ``mask``.

    Parameters
    ----------
    chi : (X, Y, Z) real tensor
        Susceptibility (ppm), relative to anything.
    mask : (X, Y, Z) bool tensor
        Where sources are local: the brain.
    zooms : tuple of float
        Voxel size (mm).
    b0_direction : sequence of 3 floats
        Unit vector along B0 in voxel axes.
    outside : float
        Susceptibility beyond the grid (ppm), relative to the same as ``chi``.

    Returns
    -------
    Fields
        In ppm.

    Raises
    ------
    ValueError
        If the grids differ, the mask is empty, or ``b0_direction`` is no unit vector.
    """
    if chi.shape != mask.shape:
        msg = f"chi {tuple(chi.shape)} and mask {tuple(mask.shape)} are on different grids"
        raise ValueError(msg)
    if not mask.any():
        msg = "mask is empty: there are no local sources to tell from the background"
        raise ValueError(msg)
    space = FreeSpace.on_grid(chi, zooms, b0_direction)
    total = space(chi - outside)
    local = space((chi - chi[mask].mean()) * mask)
    return Fields(total, local, total - local)


def shim(
    field: Tensor, mask: Tensor, zooms: Zooms, *, like: Tensor | None = None, factor: int = 1
) -> Tensor:
    """Field of ideal shim coils up to second order, which best cancels ``field`` in ``mask``.

    The nine solid harmonics of order 0, 1 and 2 are fitted by least squares. They are harmonic,
    so that what is added to the field is background, and stay one family under any rotation,
    so that voxel axes will do.

    Parameters
    ----------
    field : (X, Y, Z) real tensor
        Field before shimming, in any unit.
    mask : (X, Y, Z) bool tensor
        What to shim: the brain.
    zooms : tuple of float
        Voxel size (mm).
    like : (X', Y', Z') tensor, optional
        Evaluate on this grid, ``factor`` times finer, instead of that of ``field``.
    factor : int
        How many voxels of ``like`` make one of ``field``.

    Returns
    -------
    (X, Y, Z) or (X', Y', Z') tensor
        To be added to the field.
    """
    inside = torch.nonzero(mask, as_tuple=True)
    centre = [axis.double().mean().item() + 0.5 for axis in inside]
    size = max((axis.max() - axis.min() + 1).item() * zoom
               for axis, zoom in zip(inside, zooms, strict=True)) / 2  # fmt: skip
    x, y, z = (
        (axis.double() + 0.5 - middle) * (zoom / size)
        for axis, middle, zoom in zip(inside, centre, zooms, strict=True)
    )
    basis = torch.stack(_harmonics(x, y, z), dim=1)
    normal = torch.linalg.pinv(basis.T @ basis, hermitian=True)
    weights = (normal @ (basis.T @ -field[mask].double())).tolist()
    fine = field if like is None else like
    x, y, z = (
        (
            ((torch.arange(n, dtype=torch.float64, device=field.device) + 0.5) / factor - middle)
            * zoom
            / size
        ).to(field)
        for n, middle, zoom in zip(fine.shape, centre, zooms, strict=True)
    )
    result = torch.zeros(fine.shape, dtype=field.dtype, device=field.device)
    for weight, harmonic in zip(weights, _harmonics(x[:, None, None], y[:, None], z), strict=True):
        result += weight * harmonic
    return result


def _harmonics(x: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
    return [
        torch.ones_like(x), x, y, z, x * y, x * z, y * z, x**2 - y**2, 2 * z**2 - x**2 - y**2,
    ]  # fmt: skip


def block_mean(image: Tensor, factor: int) -> Tensor:
    """Average over cubes of voxels.

    Parameters
    ----------
    image : (..., X, Y, Z) tensor
        In any unit.
    factor : int
        Voxels a side of each cube.

    Returns
    -------
    (..., X / factor, Y / factor, Z / factor) tensor
        Mean of each cube, in the unit of ``image``.

    Raises
    ------
    ValueError
        If the grid does not divide into such cubes.

    Examples
    --------
    >>> block_mean(torch.arange(8.0).reshape(2, 2, 2), 2)
    tensor([[[3.5000]]])
    """
    for n in image.shape[-3:]:
        if n % factor:
            msg = f"a grid of {tuple(image.shape[-3:])} does not divide into blocks of {factor}"
            raise ValueError(msg)
    for axis in SPACE:
        image = image.unflatten(axis, (image.shape[axis] // factor, factor)).mean(axis)
    return image


def upsample(image: Tensor, factor: int) -> Tensor:
    """Repeat every voxel along each axis.

    Parameters
    ----------
    image : (..., X, Y, Z) tensor
        In any unit.
    factor : int
        How many times.

    Returns
    -------
    (..., factor X, factor Y, factor Z) tensor
        In the unit of ``image``.
    """
    for axis in SPACE:
        image = image.repeat_interleave(factor, axis)
    return image
