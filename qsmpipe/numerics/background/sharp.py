"""Background removal by the mean value property of harmonic fields: V-SHARP and RESHARP."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qsmpipe.numerics.background.common import (
    LocalField,
    bounding_box,
    in_place,
    known_field,
    least_radius,
)
from qsmpipe.numerics.fourier import Shape, Zooms, convolve, irfft, padded_shape, rfft
from qsmpipe.numerics.kernels import ball_mean, ball_voxels
from qsmpipe.numerics.solvers import Convergence, conjugate_gradient

DEFAULT_RADII = tuple(float(radius) for radius in range(12, 0, -1))
"""Ball radii of V-SHARP (mm)."""

DEFAULT_THRESHOLD = 0.05
"""Where the high-pass filter of V-SHARP is smaller, it is not inverted."""

DEFAULT_RADIUS = 6.0
"""Ball radius of RESHARP (mm)."""

DEFAULT_LAMBDA = 1e-4
DEFAULT_TOLERANCE = 1e-2
DEFAULT_MAX_ITERATIONS = 100


def fits(extent: Tensor, mean: Tensor, voxels: int, shape: Shape, crop: Sequence[int]) -> Tensor:
    """Where a ball of so many ``voxels`` lies inside a mask (the spectrum ``extent``).

    The transform is good to a few rounding errors of 1; one missing voxel weighs ``1 / voxels``.
    A ball of a million voxels may therefore miss one or two, which change no mean.
    """
    slack = max(0.5 / voxels, 16 * torch.finfo(mean.dtype).eps)
    return irfft(extent * mean, shape, crop) > 1 - slack


def vsharp(
    field: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    radii: Sequence[float] = DEFAULT_RADII,
    threshold: float = DEFAULT_THRESHOLD,
) -> LocalField:
    box = bounding_box(mask)
    known = known_field(field, mask)[(..., *box)]
    usable = sorted((radius for radius in radii if radius >= least_radius(zooms)), reverse=True)
    crop = known.shape[-3:]
    shape = padded_shape(crop, zooms, margin=usable[0])
    spectrum, extent = rfft(known, shape), rfft(mask[box].to(known), shape)

    filtered = torch.zeros_like(known)
    trusted = torch.zeros_like(mask[box])
    high_pass = None
    for radius in usable:
        mean = ball_mean(shape, zooms, radius, like=known)
        new = fits(extent, mean, ball_voxels(zooms, radius), shape, crop) & ~trusted
        if not new.any():
            continue
        if high_pass is None:
            high_pass = 1 - mean
        filtered = torch.where(new, known - irfft(spectrum * mean, shape, crop), filtered)
        trusted |= new
    inverse = torch.where(high_pass.abs() < threshold, 0.0, 1 / high_pass)
    local = convolve(filtered, inverse, shape) * trusted
    return LocalField(in_place(local, box, mask), in_place(trusted, box, mask), None)


def resharp(
    field: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    radius: float = DEFAULT_RADIUS,
    lambda_: float = DEFAULT_LAMBDA,
    tolerance: float = DEFAULT_TOLERANCE,
    max_iterations: int = DEFAULT_MAX_ITERATIONS,
) -> LocalField:
    box = bounding_box(mask)
    known = known_field(field, mask)[(..., *box)]
    crop = known.shape[-3:]
    wide = padded_shape(crop, zooms, margin=radius)
    extent = rfft(mask[box].to(known), wide)
    mean = ball_mean(wide, zooms, radius, like=known)
    trusted = fits(extent, mean, ball_voxels(zooms, radius), wide, crop)
    shape = padded_shape(crop, zooms, margin=0.0)
    high_pass = 1 - ball_mean(shape, zooms, radius, like=known)
    squared = high_pass**2
    def apply(y):
        return (convolve(y, squared, shape) * trusted).add_(y, alpha=lambda_)
    right = convolve(known, high_pass, shape) * trusted
    y, convergence = conjugate_gradient(apply, right, tolerance=tolerance, max_iterations=max_iterations)
    local = convolve(y, high_pass, shape) * trusted
    return LocalField(in_place(local, box, mask), in_place(trusted, box, mask), convergence)
