"""Dipole inversion in two stages, of which the first finds the voxels not to be trusted."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import Tensor

from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.fused.data import limit_split
from qsmpipe.numerics.inversion.admm import Grid, TotalVariation, squared_misfit
from qsmpipe.numerics.inversion.common import Susceptibility, follow_noise
from qsmpipe.numerics.inversion.l1 import DEFAULT_LAMBDA as DEFAULT_L1_LAMBDA
from qsmpipe.numerics.inversion.tv import (
    DEFAULT_MAX_ITERATIONS,
    DEFAULT_MU,
    DEFAULT_RHO,
    DEFAULT_TOLERANCE,
    LAMBDA_PER_NOISE,
    PADDING,
    REACH,
)
from qsmpipe.numerics.kernels import AXIAL
from qsmpipe.numerics.noise import data_weight
from qsmpipe.numerics.parameters import Count, NotNegative, Positive, checked

DEFAULT_L1_ITERATIONS = 20
"""Steps of the first stage."""


@checked
def hdqsm(
    field: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    b0_direction: Sequence[float] = AXIAL,
    noise: Tensor | None = None,
    lambda_: Positive | Literal["auto"] = "auto",
    l1_lambda: Positive = DEFAULT_L1_LAMBDA,
    l1_iterations: Count = DEFAULT_L1_ITERATIONS,
    rho: Positive = DEFAULT_RHO,
    mu: Positive = DEFAULT_MU,
    tolerance: NotNegative = DEFAULT_TOLERANCE,
    max_iterations: Count = DEFAULT_MAX_ITERATIONS,
) -> Susceptibility:
    r"""Invert the dipole with total variation and two data terms in turn, by ADMM [1]_.

    A few steps from 0 towards

    .. math:: \min_\chi \|W (D \chi - f)\|_1 + \lambda_1 \|\nabla \chi\|_1

    leave a misfit :math:`\delta = |D \chi - f|` over its maximum in the mask, which is large where
    the field contradicts itself. From there

    .. math:: \min_\chi \tfrac12 \|W (1 - \delta) (D \chi - f)\|^2 + \lambda \|\nabla \chi\|_1

    over the maps that are 0 farther than :data:`.tv.REACH` from the mask. The largest misfit
    alone decides what counts as large: the method forgives voxels that are all about as wrong.

    Parameters
    ----------
    field : (X, Y, Z) real tensor
        Field of the sources inside ``mask`` (ppm).
    mask : (X, Y, Z) bool tensor
        Where ``field`` is known.
    zooms : tuple of float
        Voxel size (mm).
    b0_direction : sequence of 3 floats
        Unit vector along B0 in voxel axes.
    noise : (X, Y, Z) real tensor, optional
        Standard deviation of ``field`` (ppm), for W and ``lambda_`` as in :func:`.tv.tv`.
    lambda_ : float or "auto"
        Weight of the total variation, :math:`\lambda` (ppm mm), or "auto", which follows the
        noise. Both are those of :func:`.tv.tv`.
    l1_lambda : float
        Weight of the total variation in the first stage, :math:`\lambda_1` (mm). It is that of
        :func:`.l1.l1qsm`. (The paper's is the root of its :math:`\lambda`, which has another
        unit.)
    l1_iterations : int
        Iterations of the first stage.
    rho : float
        Penalty of the gradient's split over ``lambda_`` (mm/ppm): speed only.
    mu : float
        Penalty of the field's split, without unit: speed only.
    tolerance : float
        Stop when the map changes by less than this fraction of its norm inside the mask.
    max_iterations : int
        Iterations of the second stage at most.

    Returns
    -------
    Susceptibility
        ``change`` is the relative change of the map; steps are those of the second stage.

    References
    ----------
    .. [1] Lambert et al. Magn Reson Med 87 (2022) 3059, doi:10.1002/mrm.29218
    """
    lambda_, chosen = follow_noise(lambda_, LAMBDA_PER_NOISE, mask, noise)
    grid = Grid.around(field, mask, zooms, b0_direction, padding=PADDING, reach=REACH)
    measured, weight = grid.window.field, grid.window.place(data_weight(mask, noise, field))
    solver = TotalVariation(grid, rho=rho, mu=mu)

    # The first objective times lambda / lambda_1: penalties and duals mean the same in both.
    split = partial(limit_split, measured=measured, limit=weight * (lambda_ / (l1_lambda * mu)))
    solver.run(split, lambda_=lambda_, tolerance=0.0, max_iterations=l1_iterations)

    misfit = (solver.field() - measured).abs_().mul_(grid.window.mask)
    largest = misfit.max()
    if largest > 0:
        weight *= 1 - misfit.div_(largest)
    convergence = solver.run(
        squared_misfit(measured, weight, mu=mu),
        lambda_=lambda_,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    return Susceptibility(solver.map(), convergence, chosen)
