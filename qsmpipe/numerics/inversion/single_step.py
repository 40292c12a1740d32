"""Dipole inversion of the total field with total variation: the background never enters."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms, convolve, irfft, rfft
from qsmpipe.numerics.fused.spectral import draw_step, settle_step
from qsmpipe.numerics.inversion.admm import Grid, TotalVariation, squared_misfit
from qsmpipe.numerics.inversion.common import Susceptibility, Window, follow_noise
from qsmpipe.numerics.inversion.edges import Edges
from qsmpipe.numerics.inversion.tv import (
    DEFAULT_EDGES,
    DEFAULT_MAX_ITERATIONS,
    DEFAULT_MU,
    DEFAULT_RHO,
    DEFAULT_TOLERANCE,
    PADDING,
    REACH,
    smooth_where,
)
from qsmpipe.numerics.kernels import AXIAL, ball_mean, laplacian
from qsmpipe.numerics.masks.morphology import erode
from qsmpipe.numerics.noise import data_weight
from qsmpipe.numerics.parameters import Count, NotNegative, Positive, checked

DEFAULT_RADII = (12.0, 6.0, 3.0)
"""Ball radii (mm). Large ones keep slow local fields, small ones reach the edge."""

LAMBDA_PER_NOISE = 0.14
"""Weight of the total variation over the noise of the field (mm): twice that of :func:`.tv.tv`.
On a whole simulated head of 1 mm, 0.07, 0.14 and 0.28 left 34.7, 33.9 and 36.3 % of error; on a
second one 0.14 and 0.28 left 36.7 and 37.4 %."""

SMALLEST = 1.5
"""Least radius, in units of the largest edge of a voxel: smaller balls are a stencil of
neighbours, whose difference to the mean is mostly noise."""


@checked
def sstv(
    field: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    b0_direction: Sequence[float] = AXIAL,
    noise: Tensor | None = None,
    magnitude: Tensor | None = None,
    edges: Edges = DEFAULT_EDGES,
    radii: Sequence[float] = DEFAULT_RADII,
    lambda_: Positive | Literal["auto"] = "auto",
    rho: Positive = DEFAULT_RHO,
    mu: Positive = DEFAULT_MU,
    tolerance: NotNegative = DEFAULT_TOLERANCE,
    max_iterations: Count = DEFAULT_MAX_ITERATIONS,
) -> Susceptibility:
    r"""Invert the total field in a single step, by spherical means and total variation [1]_.

    .. math::
        \min_\chi \tfrac12 \sum_r \|W M_r (1 - S_r) (D \chi - f)\|^2 + \lambda \|\nabla \chi\|_1

    over the maps that are 0 farther than :data:`.tv.REACH` from the mask. A harmonic field is its
    own mean :math:`S_r` over any ball: what sources outside the mask add to the field is gone on
    both sides, so that no background has to be removed before, and none can be removed badly.
    :math:`M_r` are the voxels of the mask for which the ball of radius r is the largest that
    fits. The field is not deconvolved as in V-SHARP, which takes it for 0 where no ball fits.

    The voxels nearest to the edge, which no ball fits around, have no data of their own: the
    field around them tells of them. Solved by ADMM as :func:`.tv.tv`; a step costs one pair of
    Fourier transforms, and one more for each radius.

    Parameters
    ----------
    field : (X, Y, Z) real tensor
        Total field (ppm), or one whose background is removed in part.
    mask : (X, Y, Z) bool tensor
        Where ``field`` is known, and susceptibility is wanted.
    zooms : tuple of float
        Voxel size (mm).
    b0_direction : sequence of 3 floats
        Unit vector along B0 in voxel axes.
    noise : (X, Y, Z) real tensor, optional
        Standard deviation of ``field`` (ppm), for W and ``lambda_`` as in :func:`.tv.tv`.
    magnitude : (X, Y, Z) real tensor, optional
        Of all echoes combined, any unit: where its edges lie.
    edges : float
        Share of the gradient's components that cost nothing, being edges of ``magnitude``.
    radii : sequence of float
        Ball radii, r (mm). Those below 1.5 times the largest edge of a voxel are raised to that.
    lambda_ : float or "auto"
        Weight of the total variation, :math:`\lambda` (ppm mm), or "auto", which follows the
        noise. It is :data:`LAMBDA_PER_NOISE` times the median of ``noise``, or
        :data:`qsmpipe.numerics.noise.ASSUMED_NOISE` without a noise map.
    rho : float
        Penalty of the gradient's split over ``lambda_`` (mm/ppm): speed only.
    mu : float
        Penalty of the fields' splits, without unit: speed only.
    tolerance : float
        Stop when the map changes by less than this fraction of its norm inside the mask.
    max_iterations : int
        Iterations at most.

    Returns
    -------
    Susceptibility
        ``change`` is the relative change of the map.

    Raises
    ------
    ValueError
        If the grids differ, the mask is empty or not bool, the field is not finite inside, or no
        ball fits into the mask.

    References
    ----------
    .. [1] Chatnuntawech et al. NMR Biomed 30 (2017) e3570, doi:10.1002/nbm.3570
    """
    lambda_, chosen = follow_noise(lambda_, LAMBDA_PER_NOISE, mask, noise)
    smooth = smooth_where(magnitude, mask, zooms, edges)
    grid = Grid.around(
        field, mask, zooms, b0_direction, padding=PADDING, reach=REACH, smooth=smooth
    )
    balls, fitting = fitting_balls(grid.window, zooms, radii)
    weight = grid.window.place(data_weight(mask, noise, field)) * (fitting > 0)
    measured = high_passed(grid.window, balls, fitting)
    solver = SingleStep(grid, balls, fitting, rho=rho, mu=mu)
    convergence = solver.run(
        squared_misfit(measured, weight, mu=mu),
        lambda_=lambda_,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    return Susceptibility(solver.map(), convergence, chosen)


def fitting_balls(
    window: Window, zooms: Zooms, radii: Sequence[float]
) -> tuple[list[Tensor], Tensor]:
    """Find for every voxel the largest ball that fits into the mask.

    Returns
    -------
    balls : list of real tensors
        High-pass 1 - S of each ball that fits somewhere, half spectra on the window's grid.
    fitting : (X, Y, Z) uint8 tensor
        In the window's box: which of them is the largest that fits, from 1 on; 0 for none.

    Raises
    ------
    ValueError
        If none fits anywhere, or there is none.
    """
    least = SMALLEST * max(zooms)
    sizes = sorted({max(float(radius), least) for radius in radii}, reverse=True)
    balls: list[Tensor] = []
    fitting = torch.zeros_like(window.mask, dtype=torch.uint8)
    for radius in sizes:
        fits = erode(window.mask, zooms, radius=radius) & (fitting == 0)
        if fits.any():
            mean = ball_mean(window.shape, zooms, radius, balanced=True, like=window.field)
            balls.append(1 - mean)
            fitting[fits] = len(balls)
    if not balls:
        msg = (
            f"no ball of the radii {list(radii)} mm fits into the mask "
            f"({int(window.mask.sum())} voxels of {tuple(zooms)} mm; radii below {least:g} mm are "
            "raised to that): give smaller radii, or a larger mask"
        )
        raise ValueError(msg)
    return balls, fitting


def high_passed(window: Window, balls: Sequence[Tensor], fitting: Tensor) -> Tensor:
    """Field minus its mean over the ball that fits, in the window's box; 0 where none does."""
    filtered = torch.zeros_like(window.field)
    for n, ball in enumerate(balls, 1):
        part = convolve(window.field, ball, window.shape)
        filtered = torch.where(fitting == n, part, filtered)
    return filtered


class SingleStep(TotalVariation):
    r"""ADMM for :math:`g(K \chi) + \lambda \|\nabla \chi\|_1` with a field K made of several.

    In each voxel it is that of the ball that fits, :math:`(1 - S_r) D \chi`. Each of these fields
    is split off as a whole, but has data only where its ball fits: elsewhere its dual stays 0.
    """

    def __init__(
        self, grid: Grid, balls: Sequence[Tensor], fitting: Tensor, *, rho: float, mu: float
    ) -> None:
        self.kernels, self.fitting = [ball * grid.kernel for ball in balls], fitting
        super().__init__(grid, rho=rho, mu=mu)

    def _prepare(self) -> None:
        grid = self.grid
        self.gain = torch.zeros_like(grid.kernel)
        for kernel in self.kernels:
            self.gain.addcmul_(kernel, kernel, value=self.mu)
        inverse = laplacian(grid.window.shape, grid.zooms, like=grid.kernel)
        inverse.mul_(self.lambda_ * self.rho).add_(self.gain)
        self.inverse = inverse.add_(self.support).reciprocal_()

    def _solve(self) -> Tensor:
        """Find the map of the next step; ``predicted`` is its spectrum here."""
        shape = self.grid.window.shape
        for n, kernel in enumerate(self.kernels, 1):
            lacking = torch.where(self.fitting == n, self.residual, 0)
            draw_step(self.right, rfft(lacking, shape), kernel, self.mu)
        settle_step(self.right, self.predicted, self.gain, self.inverse)
        self.predicted = self.right
        del self.right
        return irfft(self.predicted, shape, shape)

    def field(self) -> Tensor:
        """Field of the map minus its mean over the ball that fits, in the window's box."""
        window = self.grid.window
        total = torch.zeros_like(window.field)
        for n, kernel in enumerate(self.kernels, 1):
            part = irfft(self.predicted * kernel, window.shape, window.mask.shape, overwrite=True)
            total = torch.where(self.fitting == n, part, total)
        return total
