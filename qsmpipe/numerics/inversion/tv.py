"""Dipole inversion with total variation, the data weighted by mask and noise."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.inversion.admm import Grid, TotalVariation, squared_misfit
from qsmpipe.numerics.inversion.choice import (
    Trial,
    choose,
    expected_residual,
    geometric,
)
from qsmpipe.numerics.inversion.common import (
    Susceptibility,
    auto_lambda,
    follow_noise,
)
from qsmpipe.numerics.inversion.edges import Edges, smooth_parts
from qsmpipe.numerics.kernels import AXIAL
from qsmpipe.numerics.noise import data_weight
from qsmpipe.numerics.parameters import Count, NotNegative, Positive, checked

PADDING = 0.25
"""Zeros beyond the mask's box and :data:`REACH`, as a fraction of both. On a head-like phantom of
64 mm with noise, more changed the map by 1 % of its norm."""

LAMBDA_PER_NOISE = 0.07
"""Weight of the total variation over the noise of the field (mm). Best on head-like phantoms of
1 mm with noise of 0.001 to 0.005 ppm; on two whole simulated heads, with noise of 0.0005 and
0.0007 ppm and PDF before, 5e-5 was the best of five weights from 5e-5 to 8e-4 ppm mm."""
DEFAULT_RHO = 100.0
"""Penalty of the gradient's split over lambda (mm/ppm)."""
DEFAULT_MU = 0.1
"""Penalty of the field's split."""
DEFAULT_TOLERANCE = 1e-3
DEFAULT_MAX_ITERATIONS = 200

CANDIDATES = geometric(1 / 16, 16.0, 9)
"""Weights over that of "auto" that a rule chooses from."""
TRIAL_ITERATIONS = 15
"""Steps for each of them, from the map of the one before."""

REACH = 8.0
"""Distance from the mask (mm) up to which there may be sources.

What is left of the background must go somewhere: without sources outside it ends up inside, and
with sources everywhere the far ones, of which the data say next to nothing, never settle. On
phantoms with sources in a shell of 3 mm around the mask, 5 to 12 mm had the error of no limit
(33 %, against 44 % without any reach) in half the iterations.
"""

DEFAULT_EDGES = 0.0
"""Share of the gradient's components that cost nothing. 0.1 lowered the error from 39 to 37 % on a
whole simulated head after PDF, but raised it on phantoms whose magnitude has other edges than the
susceptibility (16 to 18 %), and hardly helped on those that share them."""


def smooth_where(
    magnitude: Tensor | None, mask: Tensor, zooms: Zooms, edges: float
) -> Tensor | None:
    """Where the magnitude has no edge; None without magnitude or edges."""
    if magnitude is None or not edges:
        return None
    return smooth_parts(magnitude, mask, zooms, edges=edges)


@checked
def tv(
    field: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    b0_direction: Sequence[float] = AXIAL,
    noise: Tensor | None = None,
    magnitude: Tensor | None = None,
    lambda_: Positive | Literal["auto", "l-curve", "discrepancy"] = "auto",
    edges: Edges = DEFAULT_EDGES,
    rho: Positive = DEFAULT_RHO,
    mu: Positive = DEFAULT_MU,
    tolerance: NotNegative = DEFAULT_TOLERANCE,
    max_iterations: Count = DEFAULT_MAX_ITERATIONS,
) -> Susceptibility:
    r"""Invert the dipole with total variation as regularisation, by ADMM [1]_.

    .. math:: \min_\chi \tfrac12 \|W (D \chi - f)\|^2 + \lambda \|\nabla \chi\|_1

    over the maps that are 0 farther than :data:`REACH` from the mask. :math:`\nabla \chi`,
    :math:`D \chi` and :math:`\chi` beyond that distance are split off: every step solves for
    :math:`\chi` by one division in k-space, shrinks the gradient, and draws the field to the data
    where they are to be trusted. A step costs two pairs of Fourier transforms.

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
        Standard deviation of ``field``, in ppm: W is its median inside ``mask`` over itself.
        Voxels where it is 0 or not finite count as unknown. W = 1 without it.
    magnitude : (X, Y, Z) real tensor, optional
        For ``edges``, in any unit.
    lambda_ : float, "auto", "l-curve" or "discrepancy"
        Weight of the total variation, :math:`\lambda` (ppm mm), or how it is chosen; the data have
        1. "auto" is :data:`LAMBDA_PER_NOISE` times the median of ``noise``, which must be in ppm
        for it, or :data:`qsmpipe.numerics.noise.ASSUMED_NOISE` without a noise map. A field in
        another unit needs it scaled alike. The other rules (:func:`.choice.choose`) choose from
        :data:`CANDIDATES` times what "auto" gives; "discrepancy" needs ``noise``.
    edges : float
        Share of the gradient's components that cost nothing, being edges of ``magnitude``. They
        are those inside ``mask`` where it is steepest (:func:`.edges.smooth_parts`), as in the
        weighted variant of [1]_. Without a magnitude there are none.
    rho : float
        Penalty of the gradient's split over ``lambda_`` (mm/ppm): speed only. Gradients below 1 /
        rho are shrunk to 0 in a step.
    mu : float
        Penalty of the field's split, without unit: speed only.
    tolerance : float
        Stop when the map changes by less than this fraction of its norm inside the mask.
    max_iterations : int
        Iterations at most.

    Returns
    -------
    Susceptibility
        ``change`` is the relative change of the map.

    References
    ----------
    .. [1] Bilgic et al. Magn Reson Med 72 (2014) 1444, doi:10.1002/mrm.25029
    """
    chosen: dict[str, float] = {}
    if not isinstance(lambda_, str) or lambda_ == "auto":
        lambda_, chosen = follow_noise(lambda_, LAMBDA_PER_NOISE, mask, noise)
    smooth = smooth_where(magnitude, mask, zooms, edges)
    grid = Grid.around(
        field, mask, zooms, b0_direction, padding=PADDING, reach=REACH, smooth=smooth
    )

    def weight() -> Tensor:  # a volume that is not held on to
        return grid.window.place(data_weight(mask, noise, field))

    split = squared_misfit(grid.window.field, weight(), mu=mu)
    solver = TotalVariation(grid, rho=rho, mu=mu)
    curve = None
    if isinstance(lambda_, str):
        auto = auto_lambda(LAMBDA_PER_NOISE, mask, noise)

        def tried(candidate: float) -> Trial:
            solver.run(split, lambda_=candidate, tolerance=0.0, max_iterations=TRIAL_ITERATIONS)
            residual = (solver.field() - grid.window.field).mul_(weight())
            return Trial(residual.norm(dtype=torch.float64).item(), solver.variation())

        curve = choose(
            tried,
            [auto * factor for factor in CANDIDATES],
            lambda_,
            expected=expected_residual(mask, noise),
            fallback=auto,
        )
        lambda_ = chosen["lambda_"] = curve.lambda_
        # From 0 again, so that the weight given as a number gives this very map.
        solver.restart()
    convergence = solver.run(
        split, lambda_=lambda_, tolerance=tolerance, max_iterations=max_iterations
    )
    return Susceptibility(solver.map(), convergence, chosen, curve)
