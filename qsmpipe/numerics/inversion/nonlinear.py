"""Dipole inversion with total variation and the signal's phase for data."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

from torch import Tensor

from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.fused.data import limit_split, phase_split
from qsmpipe.numerics.inversion.admm import Grid, TotalVariation
from qsmpipe.numerics.inversion.common import (
    Susceptibility,
    follow_noise,
    phase_scale,
)
from qsmpipe.numerics.inversion.edges import Edges
from qsmpipe.numerics.inversion.l1 import DEFAULT_LAMBDA as L1_LAMBDA
from qsmpipe.numerics.inversion.l1 import LINEAR_STEPS
from qsmpipe.numerics.inversion.tv import (
    DEFAULT_EDGES,
    DEFAULT_MAX_ITERATIONS,
    DEFAULT_RHO,
    DEFAULT_TOLERANCE,
    LAMBDA_PER_NOISE,
    PADDING,
    REACH,
    smooth_where,
)
from qsmpipe.numerics.kernels import AXIAL
from qsmpipe.numerics.noise import data_weight
from qsmpipe.numerics.parameters import Count, NotNegative, Positive, checked

DEFAULT_MU = 1.0
"""Penalty of the field's split. The data term is not convex; below 0.3 the iteration did not come
to rest on phantoms with phase beyond half a turn."""

LIMIT = 0.3
"""Residual (rad) that the first steps shrink to 0."""


@checked
def nltv(
    field: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    b0_direction: Sequence[float] = AXIAL,
    noise: Tensor | None = None,
    magnitude: Tensor | None = None,
    echo_times: Sequence[float] | None = None,
    field_strength: float | None = None,
    lambda_: Positive | Literal["auto"] = "auto",
    edges: Edges = DEFAULT_EDGES,
    rho: Positive = DEFAULT_RHO,
    mu: Positive = DEFAULT_MU,
    tolerance: NotNegative = DEFAULT_TOLERANCE,
    max_iterations: Count = DEFAULT_MAX_ITERATIONS,
) -> Susceptibility:
    r"""Invert the dipole with total variation and the phase for data, by ADMM [1]_.

    .. math::
        \min_\chi \tfrac{1}{2 s^2} \|W (e^{i s D \chi} - e^{i s f})\|^2
        + \lambda \|\nabla \chi\|_1

    over the maps that are 0 farther than :data:`.tv.REACH` from the mask, with s the phase
    (rad) of 1 ppm. It is :func:`.tv.tv` where residuals are small, loses interest in those near
    half a turn, and knows no whole turns: places that were unwrapped wrongly do no harm.
    :data:`.l1.LINEAR_STEPS` steps towards the least absolute residual of the field go first. Other
    programs start from the field itself, and keep its jumps.

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
    magnitude : (X, Y, Z) real tensor, optional
        For ``edges``, in any unit.
    echo_times : sequence of float, optional
        Echo times (s); with ``field_strength`` they give s (:func:`.common.phase_scale`).
    field_strength : float, optional
        B0 (T).
    lambda_ : float or "auto"
        Weight of the total variation, :math:`\lambda` (ppm mm), or "auto", which follows the
        noise. Both are those of :func:`.tv.tv`, at any s.
    edges : float
        Share of the gradient's components that cost nothing, being edges of ``magnitude``. They
        are found as in :func:`.tv.tv`.
    rho : float
        Penalty of the gradient's split over ``lambda_`` (mm/ppm): speed only.
    mu : float
        Penalty of the field's split, without unit: speed only.
    tolerance : float
        Stop when the map changes by less than this fraction of its norm inside the mask.
    max_iterations : int
        Iterations at most, the linear steps not counted.

    Returns
    -------
    Susceptibility
        ``change`` is the relative change of the map.

    References
    ----------
    .. [1] Milovic et al. Magn Reson Med 80 (2018) 814, doi:10.1002/mrm.27073
    """
    lambda_, chosen = follow_noise(lambda_, LAMBDA_PER_NOISE, mask, noise)
    per_ppm = phase_scale(field_strength, echo_times)
    smooth = smooth_where(magnitude, mask, zooms, edges)
    grid = Grid.around(
        per_ppm * field, mask, zooms, b0_direction, padding=PADDING, reach=REACH, smooth=smooth
    )
    solver = TotalVariation(grid, rho=rho / per_ppm, mu=mu)
    return run_on_phase(
        solver,
        data_weight(mask, noise, field),
        per_ppm,
        chosen,
        lambda_=lambda_,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )


def run_on_phase(
    solver: TotalVariation,
    weight: Tensor,
    per_ppm: float,
    chosen: Mapping[str, float],
    *,
    lambda_: float,
    tolerance: float,
    max_iterations: int,
) -> Susceptibility:
    r"""Run with :math:`\tfrac12 \|W (e^{iy} - e^{if})\|^2` for data, after the linear steps.

    Parameters
    ----------
    solver : TotalVariation
        Its field is phase (rad).
    weight : (X, Y, Z) real tensor
        W on the image's grid.
    per_ppm : float
        Phase (rad) of 1 ppm.
    chosen : mapping
        Parameters that were chosen, to be told with the map.
    lambda_ : float
        In ppm, as of :func:`.tv.tv`.
    tolerance, max_iterations
        Of what follows on the linear steps.
    """
    phase, w = solver.grid.window.field, solver.grid.window.place(weight)
    del weight  # volumes are large: hold none longer than needed
    # The objective of absolute residuals, times whatever makes this limit.
    solver.run(
        partial(limit_split, measured=phase, limit=w.mul_(LIMIT)),
        lambda_=LIMIT * solver.mu * L1_LAMBDA,
        tolerance=0.0,
        max_iterations=LINEAR_STEPS,
    )
    convergence = solver.run(
        partial(phase_split, measured=phase, weight=w.div_(LIMIT).square_().div_(solver.mu)),
        lambda_=per_ppm * lambda_,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    return Susceptibility(solver.map() / per_ppm, convergence, chosen)
