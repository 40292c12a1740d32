"""Dipole inversion at two levels of regularisation: strong sources first, then all others."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.grids import bounding_box, check_mask, in_place
from qsmpipe.numerics.inversion.common import Susceptibility, follow_noise
from qsmpipe.numerics.inversion.tv import (
    DEFAULT_MAX_ITERATIONS,
    DEFAULT_RHO,
    DEFAULT_TOLERANCE,
    LAMBDA_PER_NOISE,
    tv,
)
from qsmpipe.numerics.kernels import AXIAL
from qsmpipe.numerics.operators import Dipole
from qsmpipe.numerics.parameters import Count, NotNegative, Positive, checked
from qsmpipe.numerics.solvers import Convergence

DEFAULT_RATIO = 10.0
"""Weight of the total variation for strong sources over that for the others."""
DEFAULT_STRONG = 0.2
"""Susceptibility (ppm) from which on a source counts as strong; nuclei stay below, haemorrhage
and calcification are above."""


@checked
def two_level(
    field: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    b0_direction: Sequence[float] = AXIAL,
    noise: Tensor | None = None,
    lambda_: Positive | Literal["auto"] = "auto",
    ratio: Positive = DEFAULT_RATIO,
    strong: NotNegative = DEFAULT_STRONG,
    rho: Positive = DEFAULT_RHO,
    tolerance: NotNegative = DEFAULT_TOLERANCE,
    max_iterations: Count = DEFAULT_MAX_ITERATIONS,
) -> Susceptibility:
    r"""Invert the dipole by total variation at two levels, after STAR-QSM [1]_.

    Where a source is strong its field is often wrong, and the errors make streaks through the
    whole map. So its map is made first with much regularisation, by :func:`.tv.tv` with
    ``ratio`` times ``lambda_``; what is beyond ``strong`` in it is kept. Its field is taken from
    the data, from what is left the others are mapped with ``lambda_``, and the two maps are
    added. Without a strong source the map is that of total variation.

    The formula of STAR-QSM is not published: this is in its spirit, not its code.

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
        Standard deviation of ``field`` (ppm), as in :func:`.tv.tv`.
    lambda_ : float or "auto"
        Weight of the total variation (ppm mm) at the second level, as in :func:`.tv.tv`.
    ratio : float
        Weight at the first level over ``lambda_``.
    strong : float
        Least size of a strong source in the first map (ppm). 0: all of it is kept.
    rho : float
        Penalty of the gradient's split over ``lambda_`` (mm/ppm): speed only.
    tolerance : float
        Stop each level when the map changes by less than this fraction of its norm.
    max_iterations : int
        Iterations at most, at each level.

    Returns
    -------
    Susceptibility
        ``iterations`` are those of both levels, ``change`` is the larger one of the two.

    References
    ----------
    .. [1] Wei et al. NMR Biomed 28 (2015) 1294, doi:10.1002/nbm.3383
    """
    check_mask(field, mask)
    lambda_, chosen = follow_noise(lambda_, LAMBDA_PER_NOISE, mask, noise)

    def level(field: Tensor, weight: float) -> tuple[Tensor, Convergence]:
        chi, convergence, *_ = tv(
            field,
            mask,
            zooms,
            b0_direction=b0_direction,
            noise=noise,
            lambda_=weight,
            rho=rho,
            tolerance=tolerance,
            max_iterations=max_iterations,
        )
        assert convergence is not None
        return chi, convergence

    first, one = level(field, ratio * lambda_)
    kept = torch.where(first.abs() > strong, first, 0)
    if not kept.any():
        chi, convergence = level(field, lambda_)
        return Susceptibility(chi, convergence, chosen)
    box = bounding_box(mask)
    cause = kept[box]
    effect = in_place(Dipole.on_grid(cause, zooms, b0_direction)(cause), box, like=field)
    second, two = level(field - effect, lambda_)
    convergence = Convergence(
        one.converged and two.converged,
        one.iterations + two.iterations,
        max(one.change, two.change),
        tolerance,
    )
    return Susceptibility(kept + second, convergence, chosen)
