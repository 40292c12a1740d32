"""From wrapped phase to susceptibility in one step: TGV under the wave equation of the dipole."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.fused.primal_dual import (
    KNOWN,
    SOLVED,
    State,
    Steps,
    dual_step,
    primal_step,
    stencil_sum,
)
from qsmpipe.numerics.grids import bounding_box, check_grid, check_mask, in_place
from qsmpipe.numerics.inversion.common import (
    ASSUMED_ECHO_TIME,
    ASSUMED_FIELD_STRENGTH,
    Susceptibility,
    phase_scale,
)
from qsmpipe.numerics.kernels import AXIAL, check_direction
from qsmpipe.numerics.masks.morphology import erode
from qsmpipe.numerics.parameters import Count, NotNegative, Positive, checked
from qsmpipe.numerics.solvers import Convergence
from qsmpipe.numerics.units import check_echo_times, radians_per_ppm

BALANCE = 0.01
"""Steps of the duals over those of the maps. On a phantom of 40 mm the map had settled after 1000
steps; with 1 it took more than 3000."""

DEFAULT_ALPHA1 = 1e-3
"""Weight of the gradient minus its smooth part (rad mm)."""
DEFAULT_ALPHA0 = 3e-3
"""Weight of that part's derivative (rad mm2)."""
DEFAULT_EROSION = 0.0
"""What the equation keeps away from the mask's edge (mm)."""
DEFAULT_TOLERANCE = 3e-4
DEFAULT_MAX_ITERATIONS = 2000


def laplacian_stencil(zooms: Zooms) -> Tensor:
    """7-point Laplacian (1/mm2), (3, 3, 3)."""
    stencil = torch.zeros(3, 3, 3, dtype=torch.float64)
    for axis, zoom in enumerate(zooms):
        for side in (0, 2):
            place = [1, 1, 1]
            place[axis] = side
            stencil[tuple(place)] = 1 / zoom**2
    stencil[1, 1, 1] = -stencil.sum()
    return stencil


def wave_stencil(zooms: Zooms, b0_direction: Sequence[float]) -> Tensor:
    r"""Stencil of :math:`\tfrac13 \Delta - (b \cdot \nabla)^2` (1/mm2), (3, 3, 3).

    Second differences along the axes, central mixed ones between them. A stencil of 27 points
    fitted to the dipole over all frequencies is nearer to it at high ones and farther at low
    ones: its maps of a phantom had errors of 0.32 and 0.51 (B0 tilted by 30 degrees), these 0.28.
    """
    check_direction(b0_direction)
    stencil = laplacian_stencil(zooms) / 3
    for a in range(3):
        for side, count in ((-1, 1), (0, -2), (1, 1)):
            here = [1, 1, 1]
            here[a] += side
            stencil[tuple(here)] -= count * (b0_direction[a] / zooms[a]) ** 2
        for b in range(a + 1, 3):
            mixed = b0_direction[a] * b0_direction[b] / (2 * zooms[a] * zooms[b])
            for i, j in itertools.product((-1, 1), repeat=2):
                here = [1, 1, 1]
                here[a] += i
                here[b] += j
                stencil[tuple(here)] -= i * j * mixed
    stencil[stencil.abs() < 1e-6 * stencil.abs().max()] = 0  # rounding reaches for no neighbour
    return stencil


def phase_laplacian(
    phase: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    echo_times: Sequence[float],
    field_strength: float,
    magnitude: Tensor | None = None,
) -> Tensor:
    r"""Laplacian (ppm/mm2) of the field, from wrapped phase of one or several echoes.

    The phase's Laplacian is the divergence of the wrapped differences between neighbours. That of
    each echo over its phase of 1 ppm is one measurement of the same quantity; their mean is
    weighted by the inverse of its variance, :math:`(M_e t_e)^2`.

    Parameters
    ----------
    phase : (E, X, Y, Z) real tensor
        Wrapped phase (rad).
    mask : (X, Y, Z) bool tensor
        Where it is read.
    zooms : tuple of float
        Voxel size (mm).
    echo_times : sequence of float
        s.
    field_strength : float
        T.
    magnitude : (E, X, Y, Z) or (X, Y, Z) real tensor, optional
        Magnitude; one for all echoes, or none, leaves :math:`t_e^2` as weights.

    Returns
    -------
    (X, Y, Z) tensor
        0 outside ``mask``; in voxels that have a neighbour outside it, that neighbour's
        difference is left out.
    """
    total = phase.new_zeros(mask.shape)
    weights = phase.new_zeros(mask.shape)
    turn = 2 * math.pi
    for echo, time in enumerate(echo_times):
        image = torch.where(mask, phase[echo], 0)
        flow = torch.zeros_like(total)
        for axis, zoom in enumerate(zooms):
            n = mask.shape[axis] - 1
            both = mask.narrow(axis, 0, n) & mask.narrow(axis, 1, n)
            rise = image.diff(dim=axis)
            rise = torch.where(both, rise - turn * (rise / turn).round(), 0).div_(zoom**2)
            flow.narrow(axis, 0, n).add_(rise)
            flow.narrow(axis, 1, n).sub_(rise)
        weight = torch.full_like(total, time**2)
        if magnitude is not None and magnitude.ndim == 4:
            weight *= torch.where(mask, magnitude[echo], 0).square()
        total.addcmul_(weight, flow, value=1 / radians_per_ppm(field_strength, time))
        weights += weight
    return torch.where(mask & (weights > 0), total / weights, 0)


@checked
def tgvqsm(
    phase: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    echo_times: Sequence[float] | None = None,
    field_strength: float | None = None,
    b0_direction: Sequence[float] = AXIAL,
    magnitude: Tensor | None = None,
    alpha1: Positive = DEFAULT_ALPHA1,
    alpha0: Positive = DEFAULT_ALPHA0,
    erosion: NotNegative = DEFAULT_EROSION,
    tolerance: NotNegative = DEFAULT_TOLERANCE,
    max_iterations: Count = DEFAULT_MAX_ITERATIONS,
) -> Susceptibility:
    r"""Invert wrapped phase with total generalised variation, in one step [1]_.

    The field f of the tissue is a solution of :math:`\Delta f = \square \chi` with
    :math:`\square = \tfrac13 \Delta - (b \cdot \nabla)^2`; a background field adds nothing to
    its Laplacian, and neither do wraps (:func:`phase_laplacian`):

    .. math:: \min_{\chi, w, r} \tfrac12 \|r\|^2 + \alpha_1 \|\nabla \chi - w\|_1 +
       \alpha_0 \|E w\|_1 \quad \text{where} \quad \Delta r = \square \chi - \Delta f

    in ``mask``, with :math:`E` the symmetrised derivative; the norms sum the lengths of vectors
    and tensors. By the primal-dual steps of Chambolle and Pock, each variable with a step of its
    own [2]_. The equation counts where all voxels of its stencil lie in ``mask``; the map is
    continued from there to the mask's edge by the regularisation.

    Parameters
    ----------
    phase : (E, X, Y, Z) or (X, Y, Z) real tensor
        Phase (rad), wrapped or not.
    mask : (X, Y, Z) bool tensor
        Where it is read.
    zooms : tuple of float
        Voxel size (mm).
    echo_times : sequence of float, optional
        s, one for each echo; :data:`.common.ASSUMED_ECHO_TIME` for one echo without.
    field_strength : float, optional
        T; :data:`.common.ASSUMED_FIELD_STRENGTH` without.
    b0_direction : sequence of 3 floats
        Unit vector along B0 in voxel axes: the wave operator is turned, not the image.
    magnitude : (E, X, Y, Z) or (X, Y, Z) real tensor, optional
        Weights of the echoes (:func:`phase_laplacian`).
    alpha1 : float
        Weight of the gradient less its smooth part, :math:`\alpha_1` (rad mm), for phase at the
        mean echo time.
    alpha0 : float
        Weight of the derivative of that part, :math:`\alpha_0` (rad mm2), likewise.
    erosion : float
        Rim of the mask without data (mm). Phase is noisy there.
    tolerance : float
        Stop when a step changes the map by less than this fraction of its norm.
    max_iterations : int
        Iterations at most.

    Returns
    -------
    Susceptibility
        ``change`` is the relative change of the map in a step.

    Raises
    ------
    ValueError
        If grids, echoes or the direction of B0 do not fit, the phase is not finite inside, or
        the equation counts nowhere.

    References
    ----------
    .. [1] Langkammer et al. NeuroImage 111 (2015) 622, doi:10.1016/j.neuroimage.2015.02.041
    .. [2] Pock, Chambolle. ICCV (2011) 1762, doi:10.1109/ICCV.2011.6126441
    """
    if phase.ndim == 3:
        phase = phase[None]
    if magnitude is not None:
        check_grid(phase, magnitude, ("phase", "magnitude"))
    check_mask(phase, mask)
    if not phase[:, mask].isfinite().all():
        lost = int((~phase.isfinite()).any(0)[mask].sum())
        msg = (
            f"phase is not finite in {lost} of the mask's {int(mask.sum())} voxels: "
            "take them out of the mask"
        )
        raise ValueError(msg)
    times = check_echo_times(phase, echo_times or [ASSUMED_ECHO_TIME])
    strength = field_strength or ASSUMED_FIELD_STRENGTH
    scale = phase_scale(strength, times)
    box = bounding_box(mask)
    known = torch.nn.functional.pad(mask[box], (1,) * 6)
    rim = tuple(slice(1, -1) for _ in range(3))
    measured = phase.new_zeros(known.shape)
    measured[rim] = phase_laplacian(
        phase[(..., *box)],
        mask[box],
        zooms,
        echo_times=times,
        field_strength=strength,
        magnitude=None if magnitude is None else magnitude[(..., *box)],
    )
    wave, laplacian = wave_stencil(zooms, b0_direction), laplacian_stencil(zooms)
    zone = _zone(known, zooms, wave, laplacian, erosion)
    state = State.zeros(measured)
    steps = _steps(wave, laplacian, zooms)
    change, iterations = float("inf"), 0
    while iterations < max_iterations and change > tolerance:
        dual_step(
            state, measured, zone, wave, laplacian, zooms, alpha1 / scale, alpha0 / scale, steps
        )
        change = primal_step(state, zone, wave, laplacian, zooms, steps)
        iterations += 1
    chi = in_place(state.chi[rim].contiguous(), box, mask)
    return Susceptibility(chi, Convergence(change <= tolerance, iterations, change, tolerance))


def _zone(mask: Tensor, zooms: Zooms, wave: Tensor, laplacian: Tensor, erosion: float) -> Tensor:
    """Voxels of the mask, and those whose whole equation lies in it, off its edge."""
    reach = ((wave != 0) | (laplacian != 0)).to(torch.float32)
    whole = stencil_sum(mask.to(torch.float32), reach) > reach.sum() - 0.5
    solved = whole & mask & erode(mask, zooms, radius=erosion)
    if not solved.any():
        msg = (
            f"no voxel of the mask ({int(mask.sum())} voxels) has all its neighbours in it and "
            f"lies {erosion:g} mm from its edge: give a smaller erosion, or another mask"
        )
        raise ValueError(msg)
    return KNOWN * mask.to(torch.uint8) + SOLVED * solved.to(torch.uint8)


def _steps(wave: Tensor, laplacian: Tensor, zooms: Zooms) -> Steps:
    """Lengths of the steps, from the sums of the operator's rows and columns."""
    field, source = laplacian.abs().sum().item(), wave.abs().sum().item()
    x, y, z = (1 / zoom for zoom in zooms)
    return Steps(
        chi=1 / (BALANCE * (source + 2 * (x + y + z))),
        rest=1 / (BALANCE * field),
        slope=(1 / (BALANCE * (1 + 2 * (x + y + z))),) * 3,
        wave=BALANCE / (field + source),
        first=tuple(BALANCE / (2 * per + 1) for per in (x, y, z)),
        second=tuple(BALANCE / per for per in (2 * x, 2 * y, 2 * z, x + y, x + z, y + z)),
    )
