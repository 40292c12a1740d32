"""Background removal through the Laplacian, which background does not have: LBV, HARPERELLA."""

import math

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qsmpipe.numerics.background.common import LocalField, one_by_one
from qsmpipe.numerics.background.sharp import too_small
from qsmpipe.numerics.compiled import compiled
from qsmpipe.numerics.fourier import Zooms, convolve, irfft, padded_shape, rfft
from qsmpipe.numerics.grids import check_mask, crop, in_place, surrounded
from qsmpipe.numerics.kernels import ball_mean
from qsmpipe.numerics.kernels import laplacian as eigenvalues
from qsmpipe.numerics.masks.morphology import erode
from qsmpipe.numerics.parameters import Count, NotNegative, Positive, checked
from qsmpipe.numerics.solvers import Convergence, conjugate_gradient

LBV_PEEL = 0.0
"""What LBV takes off the mask before it starts (mm)."""

LBV_TOLERANCE = 1e-3
LBV_MAX_ITERATIONS = 100

HARPERELLA_RADIUS = 10.0
"""Ball over which HARPERELLA wants the Laplacian to be even (mm)."""

HARPERELLA_LAMBDA = 1e-3
"""Beside the squared mean over the ball (0 to 1): dimensionless, whatever the field's unit."""

HARPERELLA_TOLERANCE = 1e-2
HARPERELLA_MAX_ITERATIONS = 100


@checked
def lbv(
    field: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    peel: NotNegative = LBV_PEEL,
    tolerance: NotNegative = LBV_TOLERANCE,
    max_iterations: Count = LBV_MAX_ITERATIONS,
) -> LocalField:
    r"""Remove the background field by solving its Laplacian boundary value problem [1]_.

    The background is harmonic in the mask, and the local field is taken to be small beside it at
    the mask's edge: the background is the harmonic field that has the values of ``field`` in the
    outermost voxels. What is left, 0 in those voxels, solves

    .. math:: \Delta x = \Delta f

    where all six neighbours of a voxel are in the mask, with the Laplacian of seven points.
    Conjugate gradients, preconditioned by the Fourier inverse of the Laplacian on the mask's box,
    take 10 to 30 steps of one pair of transforms.

    The outermost voxels decide: one that is wrong by noise, wraps or air shows in its
    surroundings, and local field at the edge counts as background.

    Parameters
    ----------
    field : (..., X, Y, Z) real tensor
        Total field, in any unit; what stands outside ``mask`` does not matter.
    mask : (X, Y, Z) bool tensor
        Where ``field`` is known.
    zooms : tuple of float
        Voxel size (mm).
    peel : float
        Radius (mm) of the ball that erodes ``mask`` first; 0 keeps it.
    tolerance : float
        Stop when the relative residual of the Laplacian is this small.
    max_iterations : int
        Iterations at most.

    Returns
    -------
    LocalField
        ``mask`` is the one that went in, peeled; ``convergence.change`` is the relative residual.

    Raises
    ------
    ValueError
        If the grids differ, the mask is empty or not bool, the field is not finite inside, or no
        voxel of the peeled mask has its six neighbours in it.

    References
    ----------
    .. [1] Zhou et al. NMR Biomed 27 (2014) 312, doi:10.1002/nbm.3064
    """
    check_mask(field, mask)
    kept = erode(mask, zooms, radius=peel)
    if not surrounded(kept).any():
        raise ValueError(_too_thin(f"the mask, peeled by {peel:g} mm," if peel else "the mask"))
    known, inside, box = crop(field, kept)
    inner = surrounded(inside)
    extent = [n * zoom for n, zoom in zip(inner.shape, zooms, strict=True)]
    shape = padded_shape(inner.shape, zooms, margin=max(zooms))
    lowest = sum((math.pi / length) ** 2 for length in extent)
    inverse = 1 / (eigenvalues(shape, zooms, like=known) + lowest)

    def solve(total: Tensor) -> tuple[Tensor, Convergence]:
        return conjugate_gradient(
            lambda image: outflow(image, inner, zooms),
            outflow(total, inner, zooms),
            precondition=lambda residual: convolve(residual, inverse, shape).mul_(inner),
            tolerance=tolerance,
            max_iterations=max_iterations,
        )

    local, convergence = one_by_one(solve, known)
    return LocalField(in_place(local, box, mask), kept, convergence)


@checked
def harperella(
    field: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    radius: Positive = HARPERELLA_RADIUS,
    lambda_: NotNegative = HARPERELLA_LAMBDA,
    tolerance: NotNegative = HARPERELLA_TOLERANCE,
    max_iterations: Count = HARPERELLA_MAX_ITERATIONS,
) -> LocalField:
    r"""Remove the background field by completing the Laplacian outside the mask (HARPERELLA) [1]_.

    Sources outside have no part in the Laplacian :math:`L` of the field inside, and its inverse
    would be the local field, were it known up to the last source: the Laplacian of a dipole adds
    up to 0, and one that the mask's edge cuts leaves monopoles whose field reaches far. What
    stands in for the missing part is the Laplacian :math:`x` outside, the smallest that makes
    means over balls even, with :math:`S` the mean over a ball:

    .. math:: \min_x \| S (x + L) - \delta \|^2 + \lambda \| x \|^2,
        \qquad x = 0 \text{ inside}; \qquad f_l = \Delta^{-1} (x + L),

    :math:`\delta` the mean of :math:`S L` inside. Conjugate gradients take one pair of transforms
    a step. In the paper few steps are the regularisation, as :math:`S` forgets what is smaller
    than its ball; here :math:`\lambda` is, whenever the iteration stops.

    Parameters
    ----------
    field : (..., X, Y, Z) real tensor
        Total field, in any unit; what stands outside ``mask`` does not matter.
    mask : (X, Y, Z) bool tensor
        Where ``field`` is known.
    zooms : tuple of float
        Voxel size (mm).
    radius : float
        Radius of the ball over which means are even (mm).
    lambda_ : float
        Weight of the Laplacian outside, beside the squared mean over the ball (0 to 1).
    tolerance : float
        Stop when the relative residual of the normal equations is this small.
    max_iterations : int
        Iterations at most.

    Returns
    -------
    LocalField
        ``mask`` is the one that went in where all six neighbours are in it, too;
        ``convergence.change`` is the relative residual of the normal equations.

    Raises
    ------
    ValueError
        If the grids differ, the mask is empty or not bool, the field is not finite inside, the
        ball reaches no neighbour, or no voxel of the mask has its six neighbours in it.

    References
    ----------
    .. [1] Li et al. NMR Biomed 27 (2014) 219, doi:10.1002/nbm.3056
    """
    known, inside, box = crop(field, mask)
    inner = surrounded(inside)
    if not inner.any():
        raise ValueError(_too_thin("the mask"))
    if radius < max(zooms):
        raise ValueError(too_small(radius, zooms))
    shape = padded_shape(inner.shape, zooms, margin=2 * radius)
    mean = ball_mean(shape, zooms, radius, like=known)
    squared = mean**2
    inverse = eigenvalues(shape, zooms, like=known)
    inverse[0, 0, 0] = torch.inf
    inverse.reciprocal_()
    x, y, z = inner.shape

    def outside(image: Tensor) -> Tensor:
        image[:x, :y, :z].masked_fill_(inner, 0)
        return image

    def solve(total: Tensor) -> tuple[Tensor, Convergence]:
        spectrum = rfft(outflow(total, inner, zooms), shape)
        level = irfft(spectrum * mean, shape, inner.shape)[inner].mean()
        right = irfft(spectrum * squared, shape, shape).neg_().add_(level)
        rest, convergence = conjugate_gradient(
            lambda image: outside(convolve(image, squared, shape)).add_(image, alpha=lambda_),
            outside(right),
            tolerance=tolerance,
            max_iterations=max_iterations,
        )
        spectrum += rfft(rest, shape)
        local = irfft(spectrum.mul_(inverse), shape, inner.shape, overwrite=True)
        return local * inner, convergence

    local, convergence = one_by_one(solve, known)
    return LocalField(in_place(local, box, mask), in_place(inner, box, mask), convergence)


def outflow(image: Tensor, inner: Tensor, zooms: Zooms) -> Tensor:
    """Minus the Laplacian (per mm2) of seven points of (X, Y, Z) at ``inner`` voxels, 0 elsewhere.

    ``inner`` holds no voxel of the outermost planes. In one pass over the grid on the CPU.
    """
    factors = [1 / zoom**2 for zoom in zooms]
    if image.device.type != "cpu":
        return _outflow_torch(image, inner, factors)
    out = torch.empty_like(image, memory_format=torch.contiguous_format)
    values = image.contiguous().numpy()
    _outflow_loops(
        values, inner.contiguous().numpy(), np.array(factors, values.dtype), out.numpy()
    )
    return out


def _outflow_torch(image: Tensor, inner: Tensor, factors: list[float]) -> Tensor:
    out = image * (2 * sum(factors))
    for axis, factor in enumerate(factors):
        n = image.shape[axis] - 1
        out.narrow(axis, 0, n).sub_(image.narrow(axis, 1, n), alpha=factor)
        out.narrow(axis, 1, n).sub_(image.narrow(axis, 0, n), alpha=factor)
    return out.mul_(inner)


@compiled(parallel=True)
def _outflow_loops(image: NDArray, inner: NDArray, factors: NDArray, out: NDArray) -> None:
    nx, ny, nz = image.shape
    x, y, z = factors
    centre = x + x + y + y + z + z
    for i in numba.prange(nx):
        for j in range(ny):
            if i == 0 or j == 0 or i == nx - 1 or j == ny - 1:
                out[i, j] = 0
                continue
            here, there, result = image[i, j], inner[i, j], out[i, j]
            left, right, down, up = (
                image[i - 1, j],
                image[i + 1, j],
                image[i, j - 1],
                image[i, j + 1],
            )
            result[0] = result[nz - 1] = 0
            for k in range(1, nz - 1):
                value = (
                    centre * here[k]
                    - x * (left[k] + right[k])
                    - y * (down[k] + up[k])
                    - z * (here[k - 1] + here[k + 1])
                )
                result[k] = value if there[k] else value * 0


def _too_thin(what: str) -> str:
    return f"no voxel of {what} has its six neighbours inside: take a fuller mask or peel less"
