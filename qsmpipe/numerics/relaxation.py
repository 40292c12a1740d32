"""Effective transverse relaxation from the decay of the magnitude over the echoes."""

import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from scipy.special import gammaincinv
from torch import Tensor

from qsmpipe.numerics.grids import CHUNK, check_finite, check_grid, voxels_at_once, voxels_of
from qsmpipe.numerics.parameters import Count, NotNegative, checked
from qsmpipe.numerics.solvers import Convergence
from qsmpipe.numerics.units import check_echo_times

__all__ = ["Relaxation", "arlo", "loglinear", "nonlinear"]

MAX_T2STAR = 1.0
"""T2* (s) of voxels that do not measurably decay: longer ones are set to this."""

DEFAULT_TOLERANCE = 1e-5
"""A voxel of the nonlinear fit is done when a step moves its signal by less, as a fraction."""

DEFAULT_MAX_ITERATIONS = 100
"""Steps of the nonlinear fit at most; only voxels that are not done take them."""

STEEPEST = 5.0
"""R2* is at most this over the time between the first two echoes: the signal is gone by then."""

CLIPPED = 1e-3
"""Fraction of the voxels at a bound beyond which the nonlinear fit warns."""


class Relaxation(NamedTuple):
    """What a relaxation fit gives, all (X, Y, Z) and 0 outside the mask and where no signal is."""

    r2star: Tensor
    """R2* (1/s), 0 or above."""
    t2star: Tensor
    """T2* (s), the inverse of ``r2star``, at most :data:`MAX_T2STAR`."""
    s0: Tensor
    """Magnitude at echo time 0, in the unit of the magnitude."""
    convergence: Convergence | None = None
    """Of the voxel that took longest; None for a direct method."""


def loglinear(magnitude: Tensor, mask: Tensor, *, echo_times: Sequence[float]) -> Relaxation:
    """Fit a straight line to the logarithm of the magnitude, weighted by its square.

    The logarithm of a weak echo is noisier in proportion to the inverse of its magnitude: the
    square undoes that. Echoes without signal do not count; a voxel needs two with signal.

    Parameters
    ----------
    magnitude : (E, X, Y, Z) real tensor
        Magnitude of 2 or more echoes.
    mask : (X, Y, Z) bool tensor
        Where to fit.
    echo_times : sequence of float
        Echo times (s).

    Returns
    -------
    Relaxation

    Raises
    ------
    ValueError
        For a single echo.
    """
    times = check_echo_times(magnitude, echo_times, at_least=2)
    check_grid(magnitude, mask, ("magnitude", "mask"))
    check_finite(magnitude, mask, "magnitude")
    signal = _inside(magnitude, mask)
    fits = [_straight(part, times) for part in signal.split(voxels_at_once(signal), dim=1)]
    r2star, s0 = (torch.cat(values) for values in zip(*fits, strict=True))
    return _finish(mask, r2star, s0)


def _inside(magnitude: Tensor, mask: Tensor) -> Tensor:
    """Magnitude of the mask's voxels (E, N), 0 or above."""
    (signal,) = voxels_of(mask, magnitude)
    return signal.clamp_(min=0)


def _straight(signal: Tensor, times: Sequence[float]) -> tuple[Tensor, Tensor]:
    """R2* and S0 of signal (E, N), by a straight line through its logarithm."""
    largest = signal.amax(0).clamp_(min=torch.finfo(signal.dtype).tiny)
    total, mean, level = (torch.zeros_like(largest) for _ in range(3))
    for m, t in zip(signal, times, strict=True):
        weight, log = _weight_and_log(m / largest)
        total += weight
        mean += weight * t
        level += weight * log
    total.clamp_(min=1e-30)
    mean /= total
    level /= total
    slope, spread = torch.zeros_like(total), torch.zeros_like(total)
    for m, t in zip(signal, times, strict=True):
        weight, log = _weight_and_log(m / largest)
        slope += weight * (t - mean) * (log - level)
        spread += weight * (t - mean).square()
    # Two echoes that differ less than this in weight are one echo and rounding.
    known = spread > (1e-5 * times[-1]) ** 2
    r2star = torch.where(known, -slope / spread, 0.0).clamp_(min=0)
    s0 = torch.exp(level + r2star * mean) * largest
    return r2star, torch.where(signal.amax(0) > 0, s0, 0.0)


def _weight_and_log(ratio: Tensor) -> tuple[Tensor, Tensor]:
    return ratio.square(), torch.where(ratio > 0, ratio, 1.0).log_()


def arlo(magnitude: Tensor, mask: Tensor, *, echo_times: Sequence[float]) -> Relaxation:
    r"""Estimate R2* by auto-regression on linear operations (ARLO [1]_).

    Over any three echoes an exponential falls by R2* times its integral, taken by Simpson's rule;
    all triples together give one quotient, with no logarithm that noise could bias. The rule's
    relative error is :math:`(R_2^* \Delta t)^4 / 180`.

    Parameters
    ----------
    magnitude : (E, X, Y, Z) real tensor
        Magnitude of 3 or more echoes.
    mask : (X, Y, Z) bool tensor
        Where to fit.
    echo_times : sequence of float
        Echo times (s), evenly spaced to 1 %.

    Returns
    -------
    Relaxation
        ``s0`` is the least-squares amplitude for that R2*.

    Raises
    ------
    ValueError
        For fewer than 3 echoes, or unevenly spaced ones.

    References
    ----------
    .. [1] Pei et al. Magn Reson Med 73 (2015) 843, doi:10.1002/mrm.25137
    """
    if len(echo_times) < 3:
        msg = (
            "ARLO integrates over 3 neighbouring echoes at a time, and there are "
            f"{len(echo_times)}: use the log-linear fit"
        )
        raise ValueError(msg)
    times = check_echo_times(magnitude, echo_times, at_least=3)
    check_grid(magnitude, mask, ("magnitude", "mask"))
    check_finite(magnitude, mask, "magnitude")
    step = (times[-1] - times[0]) / (len(times) - 1)
    uneven = max(abs(b - a - step) for a, b in pairwise(times))
    if uneven > 0.01 * step:
        msg = (
            f"ARLO needs evenly spaced echoes, and the spacing of {times} s is off its mean "
            f"{step:g} s by up to {uneven:g} s: use the log-linear fit"
        )
        raise ValueError(msg)
    signal = _inside(magnitude, mask)
    fits = [_integrated(part, times, step) for part in signal.split(voxels_at_once(signal), dim=1)]
    r2star, s0 = (torch.cat(values) for values in zip(*fits, strict=True))
    return _finish(mask, r2star, s0)


def _integrated(signal: Tensor, times: Sequence[float], step: float) -> tuple[Tensor, Tensor]:
    """R2* and S0 of signal (E, N), by Simpson's rule."""
    largest = signal.amax(0).clamp_(min=torch.finfo(signal.dtype).tiny)
    signal = signal / largest
    fall, area = torch.zeros_like(largest), torch.zeros_like(largest)
    for first, second, third in zip(signal, signal[1:], signal[2:], strict=False):
        instrument = first + 2 * second
        fall += (first - third) * instrument
        area += (first + 4 * second + third) * instrument
    area *= step / 3
    r2star = torch.where(area > 0, fall / area, 0.0).clamp_(min=0)
    above, below = torch.zeros_like(area), torch.zeros_like(area)
    for m, t in zip(signal, times, strict=True):
        decay = torch.exp(-r2star * (t - times[0]))
        above += m * decay
        below += decay.square_()
    s0 = above / below * torch.exp(r2star * times[0]) * largest
    return r2star, torch.where(signal.amax(0) > 0, s0, 0.0)


@checked
def nonlinear(
    magnitude: Tensor,
    mask: Tensor,
    *,
    echo_times: Sequence[float],
    noise_floor: NotNegative | Literal["auto"] = 0.0,
    tolerance: NotNegative = DEFAULT_TOLERANCE,
    max_iterations: Count = DEFAULT_MAX_ITERATIONS,
) -> Relaxation:
    r"""Fit an exponential to the magnitude itself, by nonlinear least squares.

    .. math:: \min_{S_0, R_2^* \ge 0} \sum_e \left(M_e - \mu(S_0 e^{-R_2^* t_e})\right)^2

    Without a noise floor :math:`\mu(S) = S`. The noise of a magnitude does not average to 0 but to
    :math:`\sigma \sqrt{\pi / 2}` where there is no signal: late echoes decay too little. With a
    floor :math:`\mu` is the mean of the Rician distribution [1]_,

    .. math:: \mu(S) = \sigma \sqrt{\pi / 2} \, e^{-y} \left((1 + 2 y) I_0(y) + 2 y I_1(y)\right),
              \quad y = \frac{S^2}{4 \sigma^2}.

    By Levenberg-Marquardt [2]_ from the log-linear fit, in double precision.

    Parameters
    ----------
    magnitude : (E, X, Y, Z) real tensor
        Magnitude of 2 or more echoes.
    mask : (X, Y, Z) bool tensor
        Where to fit.
    echo_times : sequence of float
        Echo times (s).
    noise_floor : float or "auto"
        Standard deviation of the noise of real and imaginary part (in the unit of the magnitude);
        0 for no floor. ``"auto"`` takes it from the residuals, of which there have to be 3 or
        more in a voxel: from their median over the voxels, for which the typical voxel needs
        signal above the noise. The distribution is that of one coil, or of coils combined with
        their phases; a root of sums of squares over many coils has a higher floor.
    tolerance : float
        A voxel is done when a step moves its signal by less than this fraction of its largest
        magnitude.
    max_iterations : int
        Steps at most.

    Returns
    -------
    Relaxation
        ``convergence`` is that of the slowest voxel (``change``: its last step).

    Raises
    ------
    ValueError
        For a single echo; for ``"auto"`` with fewer than 3; for a floor below 0.

    Warns
    -----
    RuntimeWarning
        If more than :data:`CLIPPED` of the voxels with signal do not decay (R2* is 0) or decay so
        fast that R2* is held at :data:`STEEPEST` over the time between the first two echoes.

    References
    ----------
    .. [1] Gudbjartsson & Patz. Magn Reson Med 34 (1995) 910, doi:10.1002/mrm.1910340618
    .. [2] Marquardt. J Soc Indust Appl Math 11 (1963) 431, doi:10.1137/0111030
    """
    start = loglinear(magnitude, mask, echo_times=echo_times)
    times = check_echo_times(magnitude, echo_times, at_least=2)
    automatic = noise_floor == "auto"
    floor = 0.0 if isinstance(noise_floor, str) else float(noise_floor)
    if automatic and len(times) < 3:
        msg = (
            'noise_floor "auto" takes the noise from the residuals of 3 or more echoes, and there '
            f"are {len(times)}: give the noise, or 0 for no floor"
        )
        raise ValueError(msg)
    signal = _inside(magnitude, mask)
    lit = signal.amax(0) > 0
    signal = signal[:, lit]
    r2star, s0 = start.r2star[mask][lit], start.s0[mask][lit]
    limits = (tolerance, max_iterations)
    fit = _exponential(signal, times, r2star, s0, floor, *limits)
    for _ in range(2 if automatic else 0):  # the first fit had no floor
        floor = _noise(fit.squares, len(times))
        fit = _exponential(signal, times, fit.r2star, fit.s0, floor, *limits)
    _warn_of_clipped(fit.r2star, times)
    rates, amplitudes = (torch.zeros_like(lit, dtype=magnitude.dtype) for _ in range(2))
    rates[lit], amplitudes[lit] = fit.r2star.to(rates), fit.s0.to(rates)
    return _finish(mask, rates, amplitudes)._replace(convergence=fit.convergence)


class _Exponential(NamedTuple):
    """A fit to the voxels (N,)."""

    r2star: Tensor
    s0: Tensor
    squares: Tensor
    """Sum of the squared residuals."""
    convergence: Convergence
    """Of the slowest voxel."""


def _exponential(
    signal: Tensor,
    times: Sequence[float],
    r2star: Tensor,
    s0: Tensor,
    floor: float,
    tolerance: float,
    max_iterations: int,
) -> _Exponential:
    """Fit signal (E, N), :data:`CHUNK` voxels at a time."""
    fits = [
        _levenberg_marquardt(
            signal[:, part].double(), times, r2star[part].double(), s0[part].double(), floor,
            tolerance, max_iterations,
        )
        for begin in range(0, max(signal.shape[1], 1), CHUNK)
        for part in [slice(begin, begin + CHUNK)]
    ]  # fmt: skip
    rate, amplitude, squares, _ = zip(*fits, strict=True)
    slowest = max((fit.convergence for fit in fits), key=lambda c: (c.iterations, c.change))
    return _Exponential(torch.cat(rate), torch.cat(amplitude), torch.cat(squares), slowest)


def _levenberg_marquardt(
    signal: Tensor,
    times: Sequence[float],
    r2star: Tensor,
    s0: Tensor,
    floor: float,
    tolerance: float,
    max_iterations: int,
) -> _Exponential:
    """Fit a chunk.

    The unknowns are the signal of the first echo over the largest one (``a``) and the decay up to
    the last echo (``k``), so that both are near 1.
    """
    largest = signal.amax(0)
    m = signal / largest
    sigma = floor / largest
    span = times[-1] - times[0]
    u = [(time - times[0]) / span for time in times]
    most = STEEPEST / u[1]
    k = (r2star * span).clamp(0, most)
    a = s0 / largest * torch.exp(-r2star * times[0])
    damping = torch.full_like(a, 1e-3)
    cost, gradient, curvature = _normal_equations(m, u, a, k, sigma)
    done_a, done_k, done_cost = a.clone(), k.clone(), cost.clone()
    active = torch.arange(a.numel(), device=a.device)
    iterations, change = 0, 0.0
    while active.numel() and iterations < max_iterations:
        (ga, gk), (caa, cak, ckk) = gradient, curvature
        daa, dkk = (caa * (1 + damping)).clamp_(min=1e-30), ckk * (1 + damping)
        # A rate at its bound that pulls beyond it stays: then the amplitude alone moves.
        held = ((k <= 0) & (gk <= 0)) | ((k >= most) & (gk >= 0))
        area = daa * dkk - cak.square()
        held |= ~(area > 0)
        area = torch.where(held, 1.0, area)
        step_a = torch.where(held, ga / daa, (dkk * ga - cak * gk) / area)
        step_k = torch.where(held, 0.0, (daa * gk - cak * ga) / area)
        new_a, new_k = (a + step_a).clamp(min=0), (k + step_k).clamp(0, most)
        moved = torch.maximum((new_a - a).abs(), a * (new_k - k).abs())
        new_cost, new_gradient, new_curvature = _normal_equations(m, u, new_a, new_k, sigma)
        better = new_cost <= cost
        a, k = torch.where(better, new_a, a), torch.where(better, new_k, k)
        cost = torch.where(better, new_cost, cost)
        gradient = torch.where(better, new_gradient, gradient)
        curvature = torch.where(better, new_curvature, curvature)
        damping = torch.where(better, damping / 10, damping * 10)
        done_a[active], done_k[active], done_cost[active] = a, k, cost
        iterations += 1
        change = moved.max().item()
        going = moved >= tolerance
        active, a, k, cost = active[going], a[going], k[going], cost[going]
        m, sigma, damping = m[:, going], sigma[going], damping[going]
        gradient, curvature = gradient[:, going], curvature[:, going]
    return _Exponential(
        done_k / span,
        done_a * torch.exp(done_k * (times[0] / span)) * largest,
        done_cost * largest.square(),
        Convergence(active.numel() == 0, iterations, change, tolerance),
    )


def _normal_equations(
    m: Tensor, u: Sequence[float], a: Tensor, k: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of squares; minus half its gradient (2, N); J'J as (3, N): aa, ak, kk."""
    cost = torch.zeros_like(a)
    gradient, curvature = cost.new_zeros((2, len(a))), cost.new_zeros((3, len(a)))
    for echo, time in zip(m, u, strict=True):
        decay = torch.exp(-k * time)
        mean, slope = _rician_mean(a * decay, sigma)
        left = echo - mean
        by_a = slope * decay
        by_k = -time * a * by_a
        cost += left.square()
        gradient += torch.stack([left * by_a, left * by_k])
        curvature += torch.stack([by_a.square(), by_a * by_k, by_k.square()])
    return cost, gradient, curvature


def _rician_mean(signal: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the magnitude of ``signal`` in noise ``sigma``, and its derivative by the signal."""
    if not sigma.any():
        return signal, torch.ones_like(signal)
    ratio = signal / sigma
    y = ratio.square() / 4
    zeroth, first = torch.special.i0e(y), torch.special.i1e(y)
    mean = sigma * math.sqrt(math.pi / 2) * ((1 + 2 * y) * zeroth + 2 * y * first)
    return mean, math.sqrt(math.pi / 8) * ratio * (zeroth + first)


def _noise(squares: Tensor, echoes: int) -> float:
    """Noise of the magnitude, from the median over the voxels of their sums of squares.

    They follow a chi-squared distribution of E - 2 degrees of freedom; the median is blind to
    voxels where the model fails.
    """
    if squares.numel() == 0:
        return 0.0
    median = 2 * float(gammaincinv((echoes - 2) / 2, 0.5))
    return (squares.median().item() / median) ** 0.5


def _warn_of_clipped(r2star: Tensor, times: Sequence[float]) -> None:
    limit = STEEPEST / (times[1] - times[0])
    bounds = {
        "do not decay: their R2* is 0": r2star <= 0,
        f"decay so fast that their R2* is held at {limit:g} 1/s": r2star >= limit * (1 - 1e-9),
    }
    for what, where in bounds.items():
        if (clipped := int(where.sum())) > CLIPPED * len(r2star):
            msg = f"{clipped} of {len(r2star)} voxels with signal {what}"
            warnings.warn(msg, RuntimeWarning, stacklevel=3)


def _finish(mask: Tensor, r2star: Tensor, s0: Tensor) -> Relaxation:
    """From the mask's voxels (N,) to images."""
    t2star = torch.where(s0 > 0, 1 / r2star.clamp(min=1 / MAX_T2STAR), 0.0)
    r2star, t2star, s0 = (
        torch.zeros_like(mask, dtype=value.dtype).masked_scatter_(mask, value)
        for value in (r2star, t2star, s0)
    )
    return Relaxation(r2star, t2star, s0)
