"""Susceptibility from fields at several head orientations (COSMOS)."""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from qsmpipe.numerics.fourier import Shape, Zooms, convolve, irfft, padded_shape, rfft
from qsmpipe.numerics.grids import crop, in_place
from qsmpipe.numerics.inversion.common import Susceptibility
from qsmpipe.numerics.kernels import dipole
from qsmpipe.numerics.parameters import Count, NotNegative, checked
from qsmpipe.numerics.solvers import conjugate_gradient

PADDING = 0.5
"""Zeros beyond the mask's box, as a fraction of it. On a phantom of 60 mm, four times as much
changed the map by 2 % and its error not at all; none changed them by 8 % and 12 %."""

DEFAULT_LAMBDA = 1e-3
"""Weight of the squared susceptibility (no unit). It adds to the sum of squared kernels, which is
0.04 or more for three heads 25 degrees apart."""

DEFAULT_TOLERANCE = 1e-3
"""Relative residual that stops the weighted solution."""

DEFAULT_MAX_ITERATIONS = 100

CLOSE = 10.0
"""Directions that are all nearer to one another than this (degrees) are refused: they say little
more than one does, and an error of registration is no longer small beside their differences."""

LEAST = 1e-3
"""Smallest sum of squared kernels that may be divided by."""

FLOOR = 1e-2
"""Least sum of squared kernels that the preconditioner divides by."""

SAMPLES = 20_000
"""Directions of k-space that are looked at for the smallest sum."""


class Conditioning(NamedTuple):
    """How well orientations determine a map; the grid plays no part in it."""

    smallest: float
    """Smallest sum of squared kernels over all directions of k-space; the mean of one is 4/45."""
    angles: tuple[float, ...]
    """Between the axes of B0 (degrees, 0 to 90): 1 and 2, 1 and 3, ..., 2 and 3, ..."""


def conditioning(b0_directions: Sequence[Sequence[float]]) -> Conditioning:
    """Find how well orientations determine a map.

    >>> conditioning([(0.0, 0.0, 1.0), (0.0, 0.6, 0.8)]).angles
    (36.9,)
    """
    b = torch.tensor([list(direction) for direction in b0_directions], dtype=torch.float64)
    # points that cover a half sphere evenly, along a spiral
    height = (torch.arange(SAMPLES, dtype=torch.float64) + 0.5) / SAMPLES
    turn = torch.arange(SAMPLES, dtype=torch.float64) * math.pi * (3 - math.sqrt(5))
    ring = (1 - height**2).sqrt()
    k = torch.stack([ring * torch.cos(turn), ring * torch.sin(turn), height])
    smallest = (1 / 3 - (b @ k) ** 2).square().sum(0).min().item()
    angles = tuple(
        round(math.degrees(math.acos(min(1.0, abs((first @ second).item())))), 1)
        for first, second in combinations(b, 2)
    )
    return Conditioning(smallest, angles)


@checked
def cosmos(
    fields: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    b0_directions: Sequence[Sequence[float]],
    noise: Tensor | None = None,
    lambda_: NotNegative = DEFAULT_LAMBDA,
    tolerance: NotNegative = DEFAULT_TOLERANCE,
    max_iterations: Count = DEFAULT_MAX_ITERATIONS,
) -> Susceptibility:
    r"""Calculate susceptibility through multiple orientation sampling (COSMOS [1]_).

    The cones on which the dipole of one orientation is 0 are cut out by those of the others:

    .. math:: \min_\chi \sum_t \tfrac12 \|W_t (D_t \chi - f_t)\|^2
              + \tfrac{\lambda}{2} \|\chi\|^2

    Without ``noise`` the field counts as 0 outside the mask and the solution is one division in
    k-space, :math:`\sum_t D_t f_t / (\sum_t D_t^2 + \lambda)`. With it, :math:`W_t` is the median
    noise over the noise inside the mask and 0 outside, where nothing is known; :math:`\chi` is 0
    outside the mask, where there are no sources of a local field; and the normal equations are
    solved by conjugate gradients, with the division as preconditioner. That is worth its time
    even where the noise is the same everywhere.

    Parameters
    ----------
    fields : (N, X, Y, Z) real tensor
        Fields of the sources inside ``mask`` (ppm) at 2 or more orientations, on one grid.
    mask : (X, Y, Z) bool tensor
        Where all of them are known.
    zooms : tuple of float
        Voxel size (mm).
    b0_directions : sequence of N sequences of 3 floats
        Unit vectors along B0 in the voxel axes of that grid.
    noise : (N, X, Y, Z) real tensor, optional
        Standard deviations of ``fields`` (ppm). A voxel in which one is 0 or not finite does not
        count at that orientation.
    lambda_ : float
        Weight of the squared susceptibility, :math:`\lambda` (no unit).
    tolerance : float
        Relative residual at which the iteration stops.
    max_iterations : int
        Iterations at most.

    Returns
    -------
    Susceptibility
        ``convergence`` is None without ``noise``.

    Raises
    ------
    ValueError
        If there are fewer than 2 orientations, if all are within :data:`CLOSE` degrees of one
        another, or if ``lambda_`` is 0 and the sum of squared kernels falls below :data:`LEAST`,
        as it does for any 2.

    References
    ----------
    .. [1] Liu et al. Magn Reson Med 61 (2009) 196, doi:10.1002/mrm.21828
    """
    _check_shapes(fields, b0_directions, noise)
    known, inside, box = crop(fields, mask)
    i, j, k = (math.ceil((1 + PADDING) * n) for n in inside.shape)
    shape = padded_shape((i, j, k), zooms, margin=0.0)
    kernels = [  # not tapered: all but the first were measured on axes of their own
        dipole(shape, zooms, direction, tapered=False, like=known) for direction in b0_directions
    ]
    _check_orientations(b0_directions, lambda_)
    total = torch.zeros_like(kernels[0])
    for kernel in kernels:
        total.addcmul_(kernel, kernel)

    if noise is None:
        collected = _collected(known, kernels, shape)
        total.add_(lambda_)
        total[0, 0, 0] = torch.inf
        chi = irfft(collected / total, shape, inside.shape)
        return Susceptibility(in_place(torch.where(inside, chi, 0), box, like=mask), None)

    trust = _trust(noise[(..., *box)], inside)
    scale = trust[:, inside].mean().item()
    inverse = 1 / (scale * total.clamp_(min=FLOOR) + lambda_)

    def normal(chi: Tensor) -> Tensor:
        spectrum = rfft(chi, shape)
        collected = torch.zeros_like(spectrum)
        for kernel, weight in zip(kernels, trust, strict=True):
            field = irfft(spectrum * kernel, shape, inside.shape, overwrite=True).mul_(weight)
            collected += rfft(field, shape) * kernel
        return torch.where(inside, irfft(collected, shape, inside.shape), 0).add_(
            chi, alpha=lambda_
        )

    right = irfft(_collected(known * trust, kernels, shape), shape, inside.shape)
    chi, convergence = conjugate_gradient(
        normal,
        torch.where(inside, right, 0),
        precondition=lambda residual: torch.where(inside, convolve(residual, inverse, shape), 0),
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    return Susceptibility(in_place(chi, box, like=mask), convergence)


def _collected(fields: Tensor, kernels: Sequence[Tensor], shape: Shape) -> Tensor:
    """Half spectrum of the sum of all fields, each convolved with its dipole."""
    collected = rfft(fields[0], shape) * kernels[0]
    for field, kernel in zip(fields[1:], kernels[1:], strict=True):
        collected += rfft(field, shape) * kernel
    return collected


def _trust(noise: Tensor, mask: Tensor) -> Tensor:
    """Squared weights (N, X, Y, Z): median of all noise over the noise, squared; 0 if unknown."""
    usable = mask & noise.isfinite() & (noise > 0)
    if not usable.flatten(1).any(1).all():
        lost = int((~usable.flatten(1).any(1)).nonzero()[0]) + 1
        msg = (
            f"the noise of orientation {lost} is positive and finite in no voxel of the mask "
            f"({int(mask.sum())} voxels): give a standard deviation, or leave it out"
        )
        raise ValueError(msg)
    level = noise[usable].median()
    return torch.where(usable, level / noise, 0.0).square_()


def _check_shapes(
    fields: Tensor, b0_directions: Sequence[Sequence[float]], noise: Tensor | None
) -> None:
    count = len(b0_directions)
    if fields.ndim != 4 or len(fields) != count:
        msg = (
            f"fields {tuple(fields.shape)} and {count} directions of B0 do not match: give "
            "(N, X, Y, Z) with one direction for each of the N orientations"
        )
        raise ValueError(msg)
    if noise is not None and noise.shape != fields.shape:
        msg = (
            f"noise {tuple(noise.shape)} and fields {tuple(fields.shape)} differ: give one map "
            "for each field, on its grid"
        )
        raise ValueError(msg)


def _check_orientations(b0_directions: Sequence[Sequence[float]], lambda_: float) -> None:
    count = len(b0_directions)
    if count < 2:
        msg = f"COSMOS needs 2 orientations or more, and there is {count}: invert a single field"
        raise ValueError(msg)
    smallest, angles = conditioning(b0_directions)
    pairs = combinations(range(1, count + 1), 2)
    found = ", ".join(f"{i}-{j} {a:g}" for (i, j), a in zip(pairs, angles, strict=True))
    stand = f"angles between the directions of B0 (degrees): {found}; "
    stand += f"smallest sum of squared kernels {smallest:.2g}"
    if max(angles) < CLOSE:
        msg = (
            f"the orientations are too close, all within {CLOSE:g} degrees ({stand}): acquire "
            "the head further apart, or invert a single field"
        )
        raise ValueError(msg)
    if lambda_ == 0 and smallest < LEAST:
        msg = (
            f"lambda is 0, and the orientations leave directions of k-space undetermined ({stand},"
            f" below {LEAST:g}): give lambda above 0, or acquire another orientation"
        )
        raise ValueError(msg)
