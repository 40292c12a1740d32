"""Convolution kernels as transfer functions on the half spectrum of :mod:`.fourier`."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from qsmpipe.numerics.fourier import PLANES, Shape, Zooms

AXIAL = (0.0, 0.0, 1.0)
"""B0 along the third voxel axis."""

ROUNDING = 1e-5
"""What is at a ball's surface, up to this fraction of its squared distance, is in the ball."""


def frequencies(shape: Shape, zooms: Zooms, *, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Spatial frequencies (1/mm) of the half spectrum, as three tensors that broadcast."""
    kx = torch.fft.fftfreq(shape[0], zooms[0], dtype=like.dtype, device=like.device)
    ky = torch.fft.fftfreq(shape[1], zooms[1], dtype=like.dtype, device=like.device)
    kz = torch.fft.rfftfreq(shape[2], zooms[2], dtype=like.dtype, device=like.device)
    return kx[:, None, None], ky[None, :, None], kz[None, None, :]


def check_direction(b0_direction: Sequence[float]) -> None:
    """Insist on a unit vector.

    Raises
    ------
    ValueError
        If it is none, to one in a thousand.
    """
    length = math.dist(b0_direction, (0, 0, 0))
    if abs(length - 1) > 1e-3:
        msg = (
            f"b0_direction {tuple(b0_direction)} has length {length:g}, not 1: give the unit "
            "vector along B0 in voxel axes (the affine's rotation, columns normalised)"
        )
        raise ValueError(msg)


def dipole(
    shape: Shape,
    zooms: Zooms,
    b0_direction: Sequence[float] = AXIAL,
    *,
    tapered: bool = True,
    planes: slice = slice(None),
    like: Tensor,
) -> Tensor:
    r"""Transfer function from susceptibility (ppm) to field (ppm), :math:`1/3 - (k.b)^2/k^2` [1]_.

    Where B0 is oblique, the products :math:`b_i b_j k_i k_j` jump from one end of the spectrum to
    the other, which are one frequency: the field of every edge would ring over the whole image.
    Voxels themselves have no such field. Every factor :math:`k_i` of a product is therefore
    multiplied by :math:`h \cot h`, :math:`h = \pi k_i \Delta_i`: 1 at low frequencies, 0 at the
    highest. That is what the exact field of a cuboid has, but for a few percent; and better maps
    come of it also where voxels are no cuboids, but cut out of k-space as scanners do. With B0
    along an axis there are no products.

    Parameters
    ----------
    shape, zooms
        Grid of the transform and its voxel size (mm).
    b0_direction : sequence of 3 floats
        Unit vector along B0 in voxel axes.
    tapered : bool
        Whether the products end at 0. Not for a field that was measured on other axes and
        resampled: it has them all.
    planes : slice
        Frequencies of the first axis that are wanted.
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
    check_direction(b0_direction)
    waves = frequencies(shape, zooms, like=like)
    kx, ky, kz = waves
    along = [b * k for b, k in zip(b0_direction, waves, strict=True)]
    factors = along
    if tapered:
        factors = [a * _taper(k, zoom) for a, k, zoom in zip(along, waves, zooms, strict=True)]
    a, b, c = factors
    # (a + b + c)^2 less what the taper takes from the squares, of which each axis has its own.
    slope = 2 * (a + b)
    level = 2 * a * b + along[0] ** 2 + along[1] ** 2
    depth, squared, last = along[2] ** 2, kx**2 + ky**2, kz**2
    chosen = range(shape[0])[planes]
    transfer = like.new_empty((len(chosen), shape[1], shape[2] // 2 + 1))
    for part in pieces(len(chosen)):
        here = slice(chosen[part.start], chosen[part.stop - 1] + 1)
        torch.add(level[here], depth, out=transfer[part])
        transfer[part].addcmul_(slope[here], c).div_(squared[here] + last)
    if chosen.start == 0:
        transfer[0, 0, 0] = 1 / 3
    return transfer.neg_().add_(1 / 3)


def pieces(planes: int) -> Iterator[slice]:
    """Cut the planes of the first axis into pieces, to work on what the cache holds."""
    for start in range(0, planes, PLANES):
        yield slice(start, min(start + PLANES, planes))


def scale(spectrum: Tensor, transfer: Tensor) -> Tensor:
    """Multiply a half spectrum by a real transfer function, in place.

    By numpy on the CPU, where torch would make complex numbers of all factors first.
    """
    if spectrum.device.type == "cpu":
        values = spectrum.numpy()
        np.multiply(values, transfer.numpy(), out=values)
        return spectrum
    return spectrum.mul_(transfer)


def _taper(k: Tensor, zoom: float) -> Tensor:
    """1 at low frequencies, 0 at the highest."""
    half = math.pi * zoom * k
    return torch.where(half == 0, 1.0, half / torch.tan(torch.where(half == 0, 1.0, half)))


def _octant(zooms: Zooms, radius: float) -> tuple[Tensor, Tensor]:
    """How often a ball holds each voxel at offsets >= 0, mirrored; squared offsets (mm2).

    (X, Y, Z) and (3, X, Y, Z). A voxel off the centre along n axes counts 2 ** n times, one on
    the ball's surface is inside.
    """
    most = radius**2 * (1 + ROUNDING)
    axes = [zoom * torch.arange(int(most**0.5 / zoom) + 1, dtype=torch.float64) for zoom in zooms]
    squared = torch.stack(torch.meshgrid(*axes, indexing="ij")).square_()
    copies = (2.0 ** (squared > 0).sum(0)) * (squared.sum(0) <= most)
    return copies.to(torch.float64), squared


def ball_mean(
    shape: Shape, zooms: Zooms, radius: float, *, balanced: bool = False, like: Tensor
) -> Tensor:
    """Transfer function of the mean over a ball of ``radius`` mm: real, 1 at zero frequency.

    The ball is even along every axis and small beside the grid: three sums of cosines over its
    octant are exact, and cheaper than a transform of the whole grid.

    Parameters
    ----------
    shape, zooms
        Grid of the transform and its voxel size (mm).
    radius : float
        Radius (mm); voxels whose centre lies in the ball belong to it.
    balanced : bool
        Weight the voxels such that the second moments along the three axes agree, as they do for
        a true ball: the mean of a harmonic field of second order is then exact in voxels that are
        not cubes, too. It must reach a neighbour along every axis.
    like : Tensor
        Gives dtype and device.

    Returns
    -------
    (X, Y, Z // 2 + 1) real tensor
    """
    copies, squared = _octant(zooms, radius)
    weight = copies / copies.sum()
    if balanced:
        terms = torch.cat([torch.ones_like(copies)[None], squared]).flatten(1)
        moments = (terms * weight.flatten()) @ terms.T
        wanted = torch.cat([moments[0, :1], moments[0, 1:].mean().expand(3)])
        weight = weight * (torch.linalg.solve(moments, wanted) @ terms).reshape(copies.shape)
    waves = []
    for n, count, reach in zip(shape, (*shape[:2], shape[2] // 2 + 1), weight.shape, strict=True):
        turns = torch.arange(count)[:, None] * torch.arange(reach) % n
        waves.append(torch.cos(turns.to(torch.float64) * (2 * math.pi / n)))
    x, y, z = waves
    planes = (y @ (weight @ z.T)).to(like)
    return (x.to(like) @ planes.flatten(1)).unflatten(1, planes.shape[1:])


def gaussian(shape: Shape, zooms: Zooms, sigma: float, *, like: Tensor) -> Tensor:
    """Transfer function of a Gaussian of standard deviation ``sigma`` mm, 1 at zero frequency."""
    kx, ky, kz = frequencies(shape, zooms, like=like)
    return torch.exp(-2 * (math.pi * sigma) ** 2 * (kx**2 + ky**2 + kz**2))


def laplacian(shape: Shape, zooms: Zooms, *, like: Tensor) -> Tensor:
    """Eigenvalues (1/mm2, >= 0) of minus the periodic 7-point Laplacian."""
    x, y, z = laplacian_lines(shape, zooms, like=like)
    return x + y + z


def laplacian_lines(shape: Shape, zooms: Zooms, *, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give what each axis adds to :func:`laplacian`, shaped to broadcast."""
    x, y, z = (
        (2 - 2 * torch.cos(2 * math.pi * k * zoom)) / zoom**2
        for k, zoom in zip(frequencies(shape, zooms, like=like), zooms, strict=True)
    )
    return x, y, z
