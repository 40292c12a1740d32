"""Background removal by the mean value property of harmonic fields: the SHARP family, iSMV."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qsmpipe.numerics.background.common import LocalField, one_by_one
from qsmpipe.numerics.fourier import Shape, Zooms, irfft, padded_shape, rfft
from qsmpipe.numerics.grids import crop, in_place
from qsmpipe.numerics.kernels import ball_mean, scale
from qsmpipe.numerics.masks.morphology import erode
from qsmpipe.numerics.parameters import Count, NotNegative, Positive, Share, checked
from qsmpipe.numerics.solvers import Convergence, conjugate_gradient

SHARP_RADIUS = 6.0
"""Ball radius of SHARP (mm), and what the mask loses at its edge."""

SHARP_THRESHOLD = 0.05
"""Where the high-pass filter of SHARP is smaller, it is not inverted."""

VSHARP_RADII = tuple(float(radius) for radius in range(12, 0, -1))
"""Ball radii of V-SHARP (mm)."""

VSHARP_THRESHOLD = 0.05
"""Where the high-pass filter of V-SHARP is smaller, it is not inverted."""

RESHARP_RADIUS = 6.0
"""Ball radius of RESHARP (mm), and what the mask loses at its edge."""

RESHARP_LAMBDA = 1e-4
"""Beside the squared high-pass filter (0 to 1.5): dimensionless, whatever the field's unit."""

RESHARP_FLOOR = 1e-3
"""Added to the squared high-pass filter before it preconditions: smaller ones want more steps."""

RESHARP_TOLERANCE = 1e-2
RESHARP_MAX_ITERATIONS = 100

ISMV_RADIUS = 4.0
"""Ball radius of iSMV (mm), and what the mask loses at its edge."""

ISMV_FLOOR = 0.3
"""Likewise for iSMV, in deviations of the longest wave in the mask's box."""

ISMV_TOLERANCE = 1e-3
ISMV_MAX_ITERATIONS = 200


@checked
def sharp(
    field: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    radius: Positive = SHARP_RADIUS,
    threshold: Share = SHARP_THRESHOLD,
) -> LocalField:
    r"""Remove the background field by SHARP [1]_.

    A field is harmonic where it has no sources, and a harmonic field equals its own mean over any
    ball: what is left of ``field - mean`` comes from local sources. That filter is inverted where
    it is well above 0, with :math:`M_r` where the ball fits and :math:`S` the mean over it:

    .. math:: x = M_r \mathcal F^{-1} \frac{\mathcal F M_r (1 - S) f}{1 - \hat S}.

    This is :func:`vsharp` with a single ball, and weighted like its balls.

    Parameters
    ----------
    field : (..., X, Y, Z) real tensor
        Total field, in any unit; what stands outside ``mask`` does not matter.
    mask : (X, Y, Z) bool tensor
        Where ``field`` is known.
    zooms : tuple of float
        Voxel size (mm).
    radius : float
        Ball radius (mm); what the mask loses.
    threshold : float
        Smallest value of the high-pass filter that is inverted. Frequencies where :math:`|1 - \hat
        S|` is smaller are set to 0.

    Returns
    -------
    LocalField
        ``mask`` is the one that went in, eroded by the ball; ``convergence`` is None.

    Raises
    ------
    ValueError
        If the grids differ, the mask is empty or not bool, the field is not finite inside, or the
        ball reaches no neighbour or does not fit into the mask.

    References
    ----------
    .. [1] Schweser et al. NeuroImage 54 (2011) 2789, doi:10.1016/j.neuroimage.2010.10.070
    """
    return vsharp(field, mask, zooms, radii=(radius,), threshold=threshold)


@checked
def vsharp(
    field: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    radii: Sequence[float] = VSHARP_RADII,
    threshold: Share = VSHARP_THRESHOLD,
) -> LocalField:
    r"""Remove the background field by V-SHARP [1]_ [2]_.

    A field is harmonic where it has no sources, and a harmonic field equals its own mean over any
    ball: ``field - mean`` keeps the local sources alone. Every voxel takes the largest ball that
    fits into ``mask``; the filter of the largest ball is then inverted where it is well above 0.
    Balls of voxels that are not cubes are weighted to have the second moments of a ball.

    Parameters
    ----------
    field : (..., X, Y, Z) real tensor
        Total field, in any unit; what stands outside ``mask`` does not matter.
    mask : (X, Y, Z) bool tensor
        Where ``field`` is known.
    zooms : tuple of float
        Voxel size (mm).
    radii : sequence of float
        Ball radii (mm). Those below the largest edge of a voxel are left out: such a ball reaches
        no neighbour along that axis, and over a disc a harmonic field has no mean value property.
    threshold : float
        Smallest value of the high-pass filter that is inverted. Frequencies where :math:`|1 -
        \hat{ball}|` is smaller are set to 0.

    Returns
    -------
    LocalField
        ``mask`` is the one that went in, eroded by the smallest ball; ``convergence`` is None.

    Raises
    ------
    ValueError
        If the grids differ, the mask is empty or not bool, the field is not finite inside, or no
        ball reaches a neighbour or fits into the mask.

    References
    ----------
    .. [1] Schweser et al. NeuroImage 54 (2011) 2789, doi:10.1016/j.neuroimage.2010.10.070
    .. [2] Wu et al. Magn Reson Med 67 (2012) 137, doi:10.1002/mrm.23000
    """
    known, inside, box = crop(field, mask)
    sizes = _usable(radii, inside, zooms)
    shape = padded_shape(inside.shape, zooms, margin=sizes[0])
    spectrum = rfft(known, shape)
    part = torch.empty_like(spectrum)

    filtered = torch.zeros_like(known)
    trusted = torch.zeros_like(inside)
    high_pass = None
    for radius in sizes:
        new = erode(inside, zooms, radius=radius).logical_and_(~trusted)
        if not new.any():
            continue
        mean = ball_mean(shape, zooms, radius, balanced=True, like=known)
        smooth = irfft(scale(part.copy_(spectrum), mean), shape, inside.shape, overwrite=True)
        torch.where(new, torch.sub(known, smooth, out=smooth), filtered, out=filtered)
        if high_pass is None:
            high_pass = mean.neg_().add_(1)
        trusted |= new
    if high_pass is None:
        raise ValueError(_too_large(sizes[-1], inside, zooms))
    inverse = torch.where(high_pass.abs() < threshold, 0.0, 1 / high_pass)
    local = _filter(filtered, inverse, shape).masked_fill_(~trusted, 0)
    return LocalField(in_place(local, box, mask), in_place(trusted, box, mask), None)


@checked
def resharp(
    field: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    radius: Positive = RESHARP_RADIUS,
    lambda_: NotNegative = RESHARP_LAMBDA,
    tolerance: NotNegative = RESHARP_TOLERANCE,
    max_iterations: Count = RESHARP_MAX_ITERATIONS,
) -> LocalField:
    r"""Remove the background field by RESHARP [1]_.

    As V-SHARP with one ball, but the high-pass filter is inverted by regularised least squares,
    with :math:`M_r` where the ball fits into ``mask`` and :math:`S` the mean over it:

    .. math:: \min_x \| M_r (1 - S)(f - x) \|^2 + \lambda \| x \|^2.

    With :math:`A = M_r (1 - S)` the minimum is :math:`x = A^T y`, :math:`(A A^T + \lambda) y =
    A f`. That is half the work of the normal equations in :math:`x`, as :math:`A A^T = M_r
    (1 - S)^2 M_r` takes one pair of transforms, and its inverse without :math:`M_r`, which
    preconditions it, another. Balls are weighted as in :func:`vsharp`.

    Parameters
    ----------
    field : (..., X, Y, Z) real tensor
        Total field, in any unit; what stands outside ``mask`` does not matter.
    mask : (X, Y, Z) bool tensor
        Where ``field`` is known.
    zooms : tuple of float
        Voxel size (mm).
    radius : float
        Ball radius (mm); what the mask loses. On a simulated head at 2 mm, 4, 6, 8 and 12 mm left
        24, 19, 16 and 14 % of error inside.
    lambda_ : float
        Weight of the local field's norm. There, 1e-2 left 33 %, 1e-3 22 %, 1e-4 and less 19 %.
    tolerance : float
        Stop when the relative residual of the equations in ``y`` is this small. On a head at 1 mm
        1e-2 took 15 steps.
    max_iterations : int
        Iterations at most.

    Returns
    -------
    LocalField
        ``mask`` is the one that went in, eroded by the ball; ``convergence.change`` is the
        relative residual.

    Raises
    ------
    ValueError
        If the grids differ, the mask is empty or not bool, the field is not finite inside, or the
        ball reaches no neighbour or does not fit into the mask.

    References
    ----------
    .. [1] Sun and Wilman, Magn Reson Med 71 (2014) 1151, doi:10.1002/mrm.24765
    """
    known, inside, box = crop(field, mask)
    deviation = Deviation.on_grid(inside, zooms, radius, like=known)
    inverse = 1 / (deviation.squared + RESHARP_FLOOR)

    def solve(total: Tensor) -> tuple[Tensor, Convergence]:
        dual, convergence = conjugate_gradient(
            lambda y: deviation.gram(y).add_(y, alpha=lambda_),
            deviation(total),
            precondition=lambda residual: deviation.filtered(residual, inverse),
            tolerance=tolerance,
            max_iterations=max_iterations,
        )
        return deviation.adjoint(dual).mul_(deviation.trusted), convergence

    local, convergence = one_by_one(solve, known)
    return LocalField(
        in_place(local, box, mask), in_place(deviation.trusted, box, mask), convergence
    )


@checked
def ismv(
    field: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    radius: Positive = ISMV_RADIUS,
    tolerance: NotNegative = ISMV_TOLERANCE,
    max_iterations: Count = ISMV_MAX_ITERATIONS,
) -> LocalField:
    r"""Remove the background field by iterative spherical mean values (iSMV) [1]_.

    The background is what repeated means over a ball leave of the field, which is held at its
    value where the ball does not fit: the fixed point of

    .. math:: f_b \leftarrow M_r S f_b + (M - M_r) f,

    with :math:`M_r` where the ball fits into ``mask`` :math:`M` and :math:`S` the mean over it.
    At the fixed point :math:`x = f - f_b`, which is 0 outside :math:`M_r`, solves

    .. math:: M_r (1 - S) M_r \, x = M_r (1 - S) f.

    The system is symmetric and positive definite: conjugate gradients, preconditioned by the
    inverse of :math:`1 - S` on the mask's box, reach in about ten steps, two pairs of transforms
    each, what the fixed point takes hundreds for. Their residual is the change that one step of
    the paper would make. Balls are weighted as in :func:`vsharp`. The local field at the edge
    of :math:`M_r` goes into the background.

    Parameters
    ----------
    field : (..., X, Y, Z) real tensor
        Total field, in any unit; what stands outside ``mask`` does not matter.
    mask : (X, Y, Z) bool tensor
        Where ``field`` is known.
    zooms : tuple of float
        Voxel size (mm).
    radius : float
        Ball radius (mm); what the mask loses.
    tolerance : float
        Stop when a step of the fixed point would change the background by this fraction of
        what it changes in the first step from ``f_b = f``. The paper compares it with the norm
        of ``field``, which an offset of the field would change.
    max_iterations : int
        Iterations at most.

    Returns
    -------
    LocalField
        ``mask`` is the one that went in, eroded by the ball; ``convergence.change`` is the
        relative residual.

    Raises
    ------
    ValueError
        If the grids differ, the mask is empty or not bool, the field is not finite inside, or the
        ball reaches no neighbour or does not fit into the mask.

    References
    ----------
    .. [1] Wen et al. Magn Reson Med 72 (2014) 1065, doi:10.1002/mrm.24998
    """
    known, inside, box = crop(field, mask)
    deviation = Deviation.on_grid(inside, zooms, radius, like=known)
    # The deviation of the longest wave that the box holds, from the second moment of a ball.
    extent = [n * zoom for n, zoom in zip(inside.shape, zooms, strict=True)]
    lowest = radius**2 / 10 * sum((math.pi / length) ** 2 for length in extent)
    inverse = 1 / (deviation.high_pass.abs() + ISMV_FLOOR * lowest)

    def solve(total: Tensor) -> tuple[Tensor, Convergence]:
        return conjugate_gradient(
            deviation,
            deviation(total),
            precondition=lambda residual: deviation.filtered(residual, inverse),
            tolerance=tolerance,
            max_iterations=max_iterations,
        )

    local, convergence = one_by_one(solve, known)
    return LocalField(
        in_place(local, box, mask), in_place(deviation.trusted, box, mask), convergence
    )


def _usable(radii: Sequence[float], inside: Tensor, zooms: Zooms) -> list[float]:
    """Radii, largest first, of the balls that reach a neighbour and are no wider than the grid."""
    reaching = sorted((radius for radius in radii if radius >= max(zooms)), reverse=True)
    if not reaching:
        raise ValueError(too_small(max(radii, default=0.0), zooms))
    widest = min((n + 1) / 2 * zoom for n, zoom in zip(inside.shape, zooms, strict=True))
    usable = [radius for radius in reaching if radius < widest]
    if not usable:
        raise ValueError(_too_large(reaching[-1], inside, zooms))
    return usable


@dataclass(frozen=True)
class Deviation:
    """Deviation of a field in a mask from its mean over a ball, where the ball fits.

    No ball leaves the mask and so none wraps around: the grid needs no padding.
    """

    shape: Shape
    high_pass: Tensor
    """One minus the transfer function of the mean."""
    trusted: Tensor
    """Where the ball fits, (X, Y, Z) bool."""

    @cached_property
    def outside(self) -> Tensor:
        """Where it does not fit."""
        return ~self.trusted

    @cached_property
    def squared(self) -> Tensor:
        """Square of ``high_pass``."""
        return self.high_pass.square()

    @classmethod
    def on_grid(cls, inside: Tensor, zooms: Zooms, radius: float, *, like: Tensor) -> "Deviation":
        """Prepare for the mask ``inside`` and a ball of ``radius`` mm."""
        if radius < max(zooms):
            raise ValueError(too_small(radius, zooms))
        trusted = erode(inside, zooms, radius=radius)
        if not trusted.any():
            raise ValueError(_too_large(radius, inside, zooms))
        shape = padded_shape(inside.shape, zooms, margin=0.0)
        mean = ball_mean(shape, zooms, radius, balanced=True, like=like)
        return cls(shape, mean.neg_().add_(1), trusted)

    def __call__(self, field: Tensor) -> Tensor:
        """Apply A: ``field`` in the mask, 0 elsewhere, to its deviation where trusted."""
        return self.filtered(field, self.high_pass)

    def adjoint(self, dual: Tensor) -> Tensor:
        """Apply A' to values that are 0 but where trusted; 0 outside the mask but for rounding."""
        return _filter(dual, self.high_pass, self.shape)

    def gram(self, dual: Tensor) -> Tensor:
        """Apply A A' to values that are 0 but where trusted, in one pair of transforms."""
        return self.filtered(dual, self.squared)

    def filtered(self, image: Tensor, transfer: Tensor) -> Tensor:
        """Apply a transfer function; 0 but where trusted."""
        return self._where_trusted(_filter(image, transfer, self.shape))

    def _where_trusted(self, image: Tensor) -> Tensor:
        return image.masked_fill_(self.outside, 0)


def _filter(image: Tensor, transfer: Tensor, shape: Shape) -> Tensor:
    spectrum = scale(rfft(image, shape), transfer)
    return irfft(spectrum, shape, image.shape[-3:], overwrite=True)


def too_small(radius: float, zooms: Zooms) -> str:
    """Say that a ball reaches no neighbour."""
    return (
        f"a ball of radius {radius:g} mm reaches no neighbour in voxels of "
        f"{' x '.join(f'{zoom:g}' for zoom in zooms)} mm: take at least {max(zooms):g} mm"
    )


def _too_large(radius: float, inside: Tensor, zooms: Zooms) -> str:
    extent = (f"{n * zoom:g}" for n, zoom in zip(inside.shape, zooms, strict=True))
    return (
        f"no ball of radius {radius:g} mm fits into the mask, {' x '.join(extent)} mm wide: "
        "take a smaller radius or a fuller mask"
    )
