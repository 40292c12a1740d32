"""Total field from the phase of all echoes, with how well it is known."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.special import gammaincinv
from torch import Tensor

from qsmpipe.numerics.grids import check_grid
from qsmpipe.numerics.phase import wrap
from qsmpipe.numerics.solvers import Convergence
from qsmpipe.numerics.units import check_echo_times, radians_per_ppm

ASSUMED_SNR = 50.0
"""Median magnitude of the strongest echo over the noise, where the data do not tell."""

DEFAULT_TOLERANCE = 1e-4
"""A voxel of the nonlinear fit is done when a step moves its phase by less (rad)."""

DEFAULT_MAX_ITERATIONS = 2000
"""Steps of the nonlinear fit at most; only voxels that are not done take them."""

CHUNK = 1 << 18
"""Voxels fitted at once: bounds the memory, and keeps the working set in the cache."""


class TotalField(NamedTuple):
    """What a field fit gives, all (X, Y, Z) and 0 outside the mask."""

    field: Tensor
    """Field (ppm of B0)."""
    noise: Tensor
    """Standard deviation of ``field`` (ppm), above 0 inside the mask.

    The noise of the images is estimated from the residuals of 3 or more echoes. With fewer it is
    taken as a :data:`ASSUMED_SNR`-th of the magnitude: then only ratios of ``noise`` mean
    something. No voxel has more than a phase at random in (-pi, pi] at the last echo would give.
    """
    convergence: Convergence | None
    """Of the voxel that took longest; None for a direct method."""
    residual: Tensor
    """Signal that the fit leaves over the signal itself, root mean square over the echoes."""


class _Echoes(NamedTuple):
    """The voxels of a mask."""

    phase: Tensor
    """(E, N), rad."""
    magnitude: Tensor
    """(E, N), 1 at the largest, and never so small that its square is 0."""
    times: list[float]
    """Echo times, 1 at the last."""
    radians_per_ppm: float
    """At the last echo."""


def weighted_mean(
    phase: Tensor,
    mask: Tensor,
    *,
    magnitude: Tensor,
    echo_times: Sequence[float],
    field_strength: float,
) -> TotalField:
    r"""Mean over echoes of phase over echo time, weighted by its inverse variance [1]_.

    .. math:: f = \frac{\sum_e M_e^2 t_e \varphi_e}{s \sum_e M_e^2 t_e^2}

    with :math:`s` rad per ppm and s. Phase must have no offset at echo time 0.

    Parameters
    ----------
    phase : (E, X, Y, Z) real tensor
        Unwrapped phase (rad).
    mask : (X, Y, Z) bool tensor
        Where to compute.
    magnitude : (E, X, Y, Z) real tensor
        Magnitude, in any unit.
    echo_times : sequence of float
        Echo times (s).
    field_strength : float
        B0 (T).

    Returns
    -------
    TotalField

    References
    ----------
    .. [1] Robinson et al. NMR Biomed 30 (2017) e3601, doi:10.1002/nbm.3601
    """
    echoes = _select(phase, mask, magnitude, echo_times, field_strength)
    _, slope, information = _line(echoes, offset=False)
    residuals = [wrap(p - t * slope) for p, t in zip(echoes.phase, echoes.times, strict=True)]
    return _finish(echoes, mask, slope, information, torch.stack(residuals), None)


def nonlinear(
    phase: Tensor,
    mask: Tensor,
    *,
    magnitude: Tensor,
    echo_times: Sequence[float],
    field_strength: float,
    offset: bool = False,
    tolerance: float = DEFAULT_TOLERANCE,
    max_iterations: int = DEFAULT_MAX_ITERATIONS,
) -> TotalField:
    r"""Fit the complex signal of all echoes by Gauss-Newton [1]_.

    .. math:: \min_{p_0, p_1} \sum_e |M_e e^{i \varphi_e} - M_e e^{i (p_0 + p_1 t_e)}|^2

    A voxel's start is the weighted straight line through its unwrapped phase. The fit then sees
    the signal alone, so that phase wraps left in single echoes and noise near the poles of the
    phase weigh less. :math:`J^T J` does not change from step to step and bounds the curvature from
    above: no step can make the fit worse.

    Parameters
    ----------
    phase : (E, X, Y, Z) real tensor
        Unwrapped phase (rad).
    mask : (X, Y, Z) bool tensor
        Where to compute.
    magnitude : (E, X, Y, Z) real tensor
        Magnitude, in any unit.
    echo_times : sequence of float
        Echo times (s).
    field_strength : float
        B0 (T).
    offset : bool
        Fit the phase at echo time 0 as well, for phase whose offset was not removed before;
        without it, it is 0. It costs precision: with echoes at 5, 10, ... 25 ms the field's noise
        more than doubles, with two echoes at t and 2 t it more than triples. One echo has none.
    tolerance : float
        A voxel is done when a step moves its phase by less than this at every echo (rad).
    max_iterations : int
        Stop here at the latest.

    Returns
    -------
    TotalField
        ``noise`` is the square root of the slope's entry of :math:`(J^T J)^{-1}`. ``convergence``
        is that of the slowest voxel (``change``: its last step, rad): voxels with signal take a
        few steps, some of those with noise alone take hundreds.

    References
    ----------
    .. [1] Liu et al. Magn Reson Med 69 (2013) 467, doi:10.1002/mrm.24272
    """
    echoes = _select(phase, mask, magnitude, echo_times, field_strength)
    offset = offset and len(echoes.times) > 1
    slope = torch.empty_like(echoes.phase[0])
    information = torch.empty_like(slope)
    residuals = torch.empty_like(echoes.phase)
    slowest = Convergence(True, 0, 0.0, tolerance)
    for begin in range(0, slope.numel(), CHUNK):
        part = slice(begin, begin + CHUNK)
        chunk = echoes._replace(phase=echoes.phase[:, part], magnitude=echoes.magnitude[:, part])
        intercept, slope[part], information[part], convergence = _gauss_newton(
            chunk, offset=offset, tolerance=tolerance, max_iterations=max_iterations
        )
        for p, t, residual in zip(chunk.phase, chunk.times, residuals[:, part], strict=True):
            residual.copy_(wrap(p - intercept - t * slope[part]))
        slowest = max(
            slowest, convergence, key=lambda c: (not c.converged, c.iterations, c.change)
        )
    return _finish(echoes, mask, slope, information, residuals, slowest)


def _select(
    phase: Tensor,
    mask: Tensor,
    magnitude: Tensor,
    echo_times: Sequence[float],
    field_strength: float,
) -> _Echoes:
    times = check_echo_times(phase, echo_times)
    check_grid(phase, mask, ("phase", "mask"))
    if magnitude.shape != phase.shape:
        msg = (
            f"magnitude {tuple(magnitude.shape)} and phase {tuple(phase.shape)} are on different "
            "grids or have not the same echoes"
        )
        raise ValueError(msg)
    inside = magnitude[:, mask]
    largest = inside.max().clamp(min=1e-30) if inside.numel() else 1.0
    return _Echoes(
        phase[:, mask],
        (inside / largest).clamp_(min=1e-6),
        [time / times[-1] for time in times],
        radians_per_ppm(field_strength, times[-1]),
    )


def _moments(echoes: _Echoes, *, offset: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the weights, their mean echo time (0 without offset), and spread of times about it.

    With time counted from the mean, J'J of intercept and slope is diagonal: its entries are the
    first and the last of these.
    """
    total = torch.zeros_like(echoes.magnitude[0])
    mean = torch.zeros_like(total)
    for m, t in zip(echoes.magnitude, echoes.times, strict=True):
        total += m * m
        mean += m * m * t
    mean = mean / total if offset else torch.zeros_like(total)
    spread = torch.zeros_like(total)
    for m, t in zip(echoes.magnitude, echoes.times, strict=True):
        spread += (m * (t - mean)).square_()
    return total, mean, spread


def _line(
    echoes: _Echoes, values: Sequence[Tensor] | Tensor | None = None, *, offset: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted straight line through ``values`` (the phase): intercept, slope and its spread."""
    total, mean, spread = _moments(echoes, offset=offset)
    level, slope = torch.zeros_like(total), torch.zeros_like(total)
    values = echoes.phase if values is None else values
    for p, m, t in zip(values, echoes.magnitude, echoes.times, strict=True):
        level += m * m * p
        slope += m * m * (t - mean) * p
    slope /= spread
    level = level / total - mean * slope if offset else torch.zeros_like(total)
    return level, slope, spread


def _gauss_newton(
    echoes: _Echoes, *, offset: bool, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor, Tensor, Convergence]:
    """Intercept, slope, its J'J entry, and how the slowest voxel ended."""
    intercept, slope, information = _line(echoes, offset=offset)
    total, mean, spread = _moments(echoes, offset=offset)
    active = torch.arange(slope.numel(), device=slope.device)
    p, m = echoes.phase, echoes.magnitude
    a, b = intercept, slope
    iterations, change = 0, 0.0
    while active.numel() and iterations < max_iterations:
        level, tilt = torch.zeros_like(a), torch.zeros_like(a)
        for e, t in enumerate(echoes.times):
            pull = torch.sin(p[e] - a - t * b).mul_(m[e] * m[e])
            level += pull
            tilt += pull * (t - mean)
        tilt /= spread
        level = level / total if offset else torch.zeros_like(a)
        # The line's phase moves by level + (t - mean) * tilt: most at one of the ends.
        moved = torch.maximum(
            (level + (echoes.times[0] - mean) * tilt).abs(), (level + (1 - mean) * tilt).abs()
        )
        a = a + level - mean * tilt
        b = b + tilt
        intercept[active], slope[active] = a, b
        iterations += 1
        change = moved.max().item()
        going = moved >= tolerance
        active, a, b = active[going], a[going], b[going]
        p, m = p[:, going], m[:, going]
        total, mean, spread = total[going], mean[going], spread[going]
    return (
        intercept,
        slope,
        information,
        Convergence(active.numel() == 0, iterations, change, tolerance),
    )


def _finish(
    echoes: _Echoes,
    mask: Tensor,
    slope: Tensor,
    information: Tensor,
    residuals: Tensor,
    convergence: Convergence | None,
) -> TotalField:
    """To ppm, and from the mask's voxels (N,) to images."""
    energy = echoes.magnitude.square()
    left = (2 - 2 * torch.cos(residuals)).mul_(energy).sum(0)
    noise = _noise_level(echoes, residuals) / information.sqrt()
    noise = noise.clamp(max=math.pi / 3**0.5)
    values = (
        slope / echoes.radians_per_ppm,
        noise / echoes.radians_per_ppm,
        (left / energy.sum(0)).sqrt_(),
    )
    field, spread, residual = (
        torch.zeros_like(mask, dtype=value.dtype).masked_scatter_(mask, value) for value in values
    )
    return TotalField(field, spread, convergence, residual)


def _noise_level(echoes: _Echoes, residuals: Tensor) -> float:
    """Noise of each of real and imaginary part, as a fraction of the largest magnitude.

    The residuals (rad) are freed of what is left of a straight line, so that a phase offset does
    not count as noise. Their weighted sum of squares follows a chi-squared distribution: its
    median over the voxels is blind to voxels where the model fails.
    """
    n = len(echoes.times)
    if residuals.numel() == 0:
        return 1.0
    if n < 3:
        return echoes.magnitude.amax(0).median().item() / ASSUMED_SNR
    level, slope, _ = _line(echoes, residuals, offset=True)
    squares = torch.zeros_like(level)
    for r, m, t in zip(residuals, echoes.magnitude, echoes.times, strict=True):
        squares += (m * (r - level - t * slope)).square_()
    median = 2 * float(gammaincinv((n - 2) / 2, 0.5))
    floor = torch.finfo(squares.dtype).eps
    return max((squares.median().item() / median) ** 0.5, floor)
