"""Dipole inversion in two steps: what the field determines well, then total variation."""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from qsmpipe.numerics.fourier import SPACE, Shape, Zooms, irfft, rfft
from qsmpipe.numerics.fused.gradient import ALLOWED, OBSERVED, clip, gradient_split
from qsmpipe.numerics.inversion.common import Susceptibility, Window
from qsmpipe.numerics.kernels import AXIAL, dipole, laplacian
from qsmpipe.numerics.parameters import Count, NotNegative, Positive, checked
from qsmpipe.numerics.solvers import Convergence, lsmr

PADDING = 0.5
"""Zeros beyond the mask's box, as a fraction of it. On a head-like phantom of 64 mm with noise,
more changed the map by 2 % of its norm, half of it by 4 %."""

DEFAULT_DELTA = 0.15
"""Least dipole kernel whose frequencies the first step determines."""
DEFAULT_MU = 1e5
"""Weight of those frequencies against the total variation (1/(ppm mm))."""
DEFAULT_RHO = 10.0
"""First penalty of the split (mm/ppm)."""
DEFAULT_TOLERANCE = 1e-2
DEFAULT_MAX_ITERATIONS = 20

FIRST_STEP = 4
"""Iterations of LSMR: their small number is the regularisation of the first step."""

SLOW, FASTER = 0.7, 5.0
"""When the gap is above this fraction of the last one, the penalty grows by this factor."""


def well_conditioned(field: Tensor, kernel: Tensor, shape: Shape) -> Tensor:
    """Spectrum after :data:`FIRST_STEP` iterations of LSMR on ``kernel * X = rfft(field)``.

    The half spectrum stands for the whole one: frequencies that it leaves out count through
    their mirror images.
    """
    depth = shape[2]
    twice = field.new_full((depth // 2 + 1, 1), 2**0.5)
    twice[0] = 1.0
    if depth % 2 == 0:
        twice[-1] = 1.0
    right = torch.view_as_real(rfft(field, shape)) * twice
    times = kernel.unsqueeze(-1)
    x, _ = lsmr(
        lambda image: times * image,
        lambda image: times * image,
        right,
        tolerance=0.0,
        max_iterations=FIRST_STEP,
    )
    return torch.view_as_complex(x.div_(twice))


@checked
def rts(
    field: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    b0_direction: Sequence[float] = AXIAL,
    delta: Annotated[float, Interval(ge=0, le=2 / 3)] = DEFAULT_DELTA,
    mu: Positive = DEFAULT_MU,
    rho: Positive = DEFAULT_RHO,
    tolerance: NotNegative = DEFAULT_TOLERANCE,
    max_iterations: Count = DEFAULT_MAX_ITERATIONS,
) -> Susceptibility:
    r"""Invert the dipole in two rapid steps [1]_.

    Four iterations of LSMR give the frequencies that the field determines well,
    :math:`|D| > \delta`; total variation fills in the others:

    .. math:: \min_\chi \|\nabla \chi\|_1 + \tfrac{\mu}{2} \|A F (\chi - \chi_1)\|^2

    by ADMM, with A = 1 where :math:`|D| > \delta`. The penalty grows while the split lags behind.

    Parameters
    ----------
    field : (X, Y, Z) real tensor
        Field of the sources inside ``mask`` (ppm: ``mu`` and ``rho`` mean that unit).
    mask : (X, Y, Z) bool tensor
        Where ``field`` is known.
    zooms : tuple of float
        Voxel size (mm).
    b0_direction : sequence of 3 floats
        Unit vector along B0 in voxel axes.
    delta : float
        Least size of the dipole kernel, without unit, at frequencies that the first step
        determines: :math:`\delta`.
    mu : float
        Weight of those frequencies against the total variation, :math:`\mu` (1/(ppm mm)). The data
        carry it, the total variation has 1.
    rho : float
        Penalty of the split at the start (mm/ppm): gradients below 1 / rho are shrunk to 0.
    tolerance : float
        Stop when the map changes by less than this fraction of its norm inside the mask, and the
        gap between its gradient and the split is below this fraction of the first one.
    max_iterations : int
        Iterations at most.

    Returns
    -------
    Susceptibility
        ``change`` is the relative change of the map or the relative gap, whichever is larger.

    References
    ----------
    .. [1] Kames, Wiggermann, Rauscher. NeuroImage 167 (2018) 276,
       doi:10.1016/j.neuroimage.2017.11.018
    """
    window = Window.around(field, mask, zooms, padding=PADDING)
    shape = window.shape
    kernel = dipole(shape, zooms, b0_direction, like=window.field)
    first = irfft(well_conditioned(window.field, kernel, shape), shape, window.mask.shape)
    known = mu * (kernel.abs() > delta).to(field)
    fixed = known * rfft(torch.where(window.mask, first, 0.0), shape)
    del kernel, first
    smooth = laplacian(shape, zooms, like=window.field)

    x, y, z = window.mask.shape
    zone = torch.full(shape, ALLOWED, dtype=torch.uint8, device=field.device)
    zone[:x, :y, :z] += OBSERVED * window.mask.to(torch.uint8)
    state = field.new_zeros((3, *shape))
    right, chi = field.new_zeros(shape), field.new_zeros(shape)
    inverse = _inverse(known, rho, smooth)
    gaps: list[float] = []
    change, iterations = float("inf"), 0
    while iterations < max_iterations and change > tolerance:
        spectrum = rfft(right, shape).add_(fixed).mul_(inverse)
        image = irfft(spectrum, shape, shape, overwrite=True)
        del spectrum
        sums = gradient_split(
            image, chi, state, zone, zooms, threshold=1 / rho, weight=rho, out=right
        )
        del image
        iterations += 1
        gaps.append(sums.gap**0.5)
        # At the start the split may stand still at 0: the change alone would stop it there.
        change = max(sums.relative_change, gaps[-1] / gaps[0] if gaps[0] > 0 else 0.0)
        if len(gaps) > 1 and gaps[-1] > SLOW * gaps[-2]:
            # The dual variable is in units of 1 / rho; clipped at 1 / rho, it holds the state.
            for component in state:
                component.sub_(clip(component, 1 / rho), alpha=1 - 1 / FASTER)
            rho *= FASTER
            inverse = _inverse(known, rho, smooth)
            right.zero_()
            for component, axis, zoom in zip(state, SPACE, zooms, strict=True):
                now = component - 2 * clip(component, 1 / rho)
                right.add_(now.roll(1, axis).sub_(now), alpha=rho / zoom)
    return Susceptibility(
        window.back(chi), Convergence(change <= tolerance, iterations, change, tolerance)
    )


def _inverse(known: Tensor, rho: float, smooth: Tensor) -> Tensor:
    """Inverse of the system in k-space; 0 at zero frequency, of which nothing is known."""
    denominator = known + rho * smooth
    denominator[0, 0, 0] = torch.inf
    return denominator.reciprocal_()
