"""Effective transverse relaxation from the decay of the magnitude over the echoes."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from qsmpipe.numerics.grids import check_grid
from qsmpipe.numerics.units import check_echo_times

MAX_T2STAR = 1.0
"""T2* (s) of voxels that do not measurably decay: longer ones are set to this."""


class Relaxation(NamedTuple):
    """What a relaxation fit gives, all (X, Y, Z) and 0 outside the mask and where no signal is."""

    r2star: Tensor
    """R2* (1/s), 0 or above."""
    t2star: Tensor
    """T2* (s), the inverse of ``r2star``, at most :data:`MAX_T2STAR`."""
    s0: Tensor
    """Magnitude at echo time 0, in the unit of the magnitude."""


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
    signal = magnitude[:, mask].clamp_(min=0)
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
    return _finish(mask, r2star, torch.where(signal.amax(0) > 0, s0, 0.0))


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
    step = (times[-1] - times[0]) / (len(times) - 1)
    uneven = max(abs(b - a - step) for a, b in pairwise(times))
    if uneven > 0.01 * step:
        msg = (
            f"ARLO needs evenly spaced echoes, and the spacing of {times} s is off its mean "
            f"{step:g} s by up to {uneven:g} s: use the log-linear fit"
        )
        raise ValueError(msg)
    signal = magnitude[:, mask].clamp_(min=0)
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
    return _finish(mask, r2star, torch.where(signal.amax(0) > 0, s0, 0.0))


def _finish(mask: Tensor, r2star: Tensor, s0: Tensor) -> Relaxation:
    """From the mask's voxels (N,) to images."""
    t2star = torch.where(s0 > 0, 1 / r2star.clamp(min=1 / MAX_T2STAR), 0.0)
    images = (
        torch.zeros_like(mask, dtype=value.dtype).masked_scatter_(mask, value)
        for value in (r2star, t2star, s0)
    )
    return Relaxation(*images)
