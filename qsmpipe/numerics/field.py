"""Total field from the phase of all echoes, with how well it is known."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import gammaincinv
from torch import Tensor

from qsmpipe.numerics.compiled import compiled, in_pieces
from qsmpipe.numerics.grids import CHUNK, check_finite, check_grid, voxels_at_once, voxels_of
from qsmpipe.numerics.parameters import Count, NotNegative, checked
from qsmpipe.numerics.phase import wrap
from qsmpipe.numerics.solvers import Convergence
from qsmpipe.numerics.units import check_echo_times, radians_per_ppm

__all__ = ["TotalField", "linear", "nonlinear", "weighted_mean"]

ASSUMED_SNR = 50.0
"""Median magnitude of the strongest echo over the noise, where the data do not tell."""

DEFAULT_TOLERANCE = 1e-4
"""A voxel of the nonlinear fit is done when a step moves its phase by less (rad)."""

DEFAULT_MAX_ITERATIONS = 500
"""Steps of the nonlinear fit at most; only voxels that are not done take them."""


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
    fit = _in_chunks(lambda part, _: _with_rest(part, *_line(part, offset=False)), echoes)
    return _finish(echoes, mask, fit, None)


def linear(
    phase: Tensor,
    mask: Tensor,
    *,
    magnitude: Tensor,
    echo_times: Sequence[float],
    field_strength: float,
) -> TotalField:
    r"""Fit a straight line with offset through the phase, weighted by its inverse variance [1]_.

    .. math:: f = \frac{\sum_e M_e^2 (t_e - \bar t) \varphi_e}
                       {s \sum_e M_e^2 (t_e - \bar t)^2}, \quad
              \bar t = \frac{\sum_e M_e^2 t_e}{\sum_e M_e^2}

    with :math:`s` rad per ppm and s: the best linear estimate where each voxel has its own offset.
    The mean of the differences to the first echo with "optimum weights" answers the same question,
    but takes the noise of the first echo, which all differences share, for independent: with 5
    even echoes of equal magnitude its field is noisier by a fifth. It is not offered.

    Parameters
    ----------
    phase : (E, X, Y, Z) real tensor
        Unwrapped phase (rad).
    mask : (X, Y, Z) bool tensor
        Where to compute.
    magnitude : (E, X, Y, Z) real tensor
        Magnitude, in any unit.
    echo_times : sequence of float
        Echo times (s). With one echo the offset is taken as 0.
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
    several = len(echoes.times) > 1
    fit = _in_chunks(lambda part, _: _with_rest(part, *_line(part, offset=several)), echoes)
    return _finish(echoes, mask, fit, None)


@checked
def nonlinear(
    phase: Tensor,
    mask: Tensor,
    *,
    magnitude: Tensor,
    echo_times: Sequence[float],
    field_strength: float,
    offset: bool = False,
    tolerance: NotNegative = DEFAULT_TOLERANCE,
    max_iterations: Count = DEFAULT_MAX_ITERATIONS,
) -> TotalField:
    r"""Fit the complex signal of all echoes by least squares [1]_.

    .. math:: \min_{p_0, p_1} \sum_e |M_e e^{i \varphi_e} - M_e e^{i (p_0 + p_1 t_e)}|^2

    A voxel's start is the weighted straight line through its unwrapped phase. The fit then sees
    the signal alone, so that phase wraps left in single echoes and noise near the poles of the
    phase weigh less. :math:`J^T J` does not change from step to step and bounds the curvature from
    above. A step goes along Newton's direction where the curvature is positive (that of
    Gauss-Newton elsewhere, and where there is one unknown), as far as the fit is certain to get
    better: to the best point of gain and curvature less the most that all other terms can take,
    :math:`\sum_e M_e^2 |\delta_e|^3 / 6` for a phase that moves by :math:`\delta_e` [2]_.

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
        Fit the phase at echo time 0 as well. That is for phase whose offset was not removed
        before; without it, it is 0. It costs precision: with echoes at 5, 10, ... 25 ms the
        field's noise more than doubles, with two echoes at t and 2 t it more than triples. One
        echo has none.
    tolerance : float
        A voxel is done when a step moves its phase by less than this at every echo (rad).
    max_iterations : int
        Steps at most.

    Returns
    -------
    TotalField
        ``noise`` is the square root of the slope's entry of :math:`(J^T J)^{-1}`. ``convergence``
        is that of the slowest voxel (``change``: its last step, rad): voxels with signal take a
        few steps, some of those with noise alone take tens.

    References
    ----------
    .. [1] Liu et al. Magn Reson Med 69 (2013) 467, doi:10.1002/mrm.24272
    .. [2] Nesterov & Polyak. Math Program 108 (2006) 177, doi:10.1007/s10107-006-0706-8
    """
    echoes = _select(phase, mask, magnitude, echo_times, field_strength)
    offset = offset and len(echoes.times) > 1
    newton = _newton_loops if echoes.phase.device.type == "cpu" else _newton_torch
    *line, convergence = newton(
        echoes, offset=offset, tolerance=tolerance, max_iterations=max_iterations
    )
    fit = _in_chunks(lambda part, here: _with_rest(part, *(x[here] for x in line)), echoes)
    return _finish(echoes, mask, fit, convergence)


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
    check_finite(phase, mask, "phase")
    check_finite(magnitude, mask, "magnitude")
    values, inside = voxels_of(mask, phase, magnitude)
    if inside.numel():
        inside.div_(inside.max().clamp(min=1e-30)).clamp_(min=1e-6)
    return _Echoes(
        values,
        inside,
        [time / times[-1] for time in times],
        radians_per_ppm(field_strength, times[-1]),
    )


def _moments(echoes: _Echoes, *, offset: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the weights, their mean echo time (0 without offset), and spread of times about it.

    With time counted from the mean, J'J of intercept and slope is diagonal: its entries are the
    first and the last of these.
    """
    weight = echoes.magnitude.square()
    times = weight.new_tensor(echoes.times)[:, None]
    total = weight.sum(0)
    mean = (weight * times).sum(0).div_(total) if offset else torch.zeros_like(total)
    return total, mean, (times - mean).square_().mul_(weight).sum(0)


def _line(
    echoes: _Echoes, values: Tensor | None = None, *, offset: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted straight line through ``values`` (the phase): intercept, slope and its spread."""
    total, mean, spread = _moments(echoes, offset=offset)
    weighted = echoes.magnitude.square().mul_(echoes.phase if values is None else values)
    level = weighted.sum(0).div_(total) if offset else torch.zeros_like(total)
    times = weighted.new_tensor(echoes.times)[:, None]
    slope = weighted.mul_(times - mean).sum(0).div_(spread)
    return level - mean * slope, slope, spread


class _Fit(NamedTuple):
    """A straight line through the phase of each voxel and what it leaves, all (N,)."""

    slope: Tensor
    """Phase at the last echo without the intercept (rad)."""
    information: Tensor
    """The slope's entry of J'J."""
    residual: Tensor
    """Signal left over the signal itself."""
    squares: Tensor
    """Weighted sum of squares of the residuals, freed of what is left of a straight line."""


def _with_rest(echoes: _Echoes, level: Tensor, slope: Tensor, information: Tensor) -> _Fit:
    """Take the residuals of a line; a phase offset does not count as noise in their squares."""
    times = slope.new_tensor(echoes.times)[:, None]
    rest = wrap(echoes.phase - level - times * slope)
    energy = echoes.magnitude.square()
    left = rest.cos().mul_(-2).add_(2).mul_(energy).sum(0).div_(energy.sum(0)).sqrt_()
    if len(echoes.times) < 3:
        return _Fit(slope, information, left, torch.zeros_like(slope))
    level, tilt, _ = _line(echoes, rest, offset=True)
    rest.sub_(level).sub_(times * tilt).mul_(echoes.magnitude)
    return _Fit(slope, information, left, rest.square_().sum(0))


def _in_chunks(fit: Callable[[_Echoes, slice], _Fit], echoes: _Echoes) -> _Fit:
    """Fit some voxels at a time (:func:`.grids.voxels_at_once`)."""
    voxels = echoes.phase.shape[1]
    size = voxels_at_once(echoes.phase)
    fits = [
        fit(
            echoes._replace(phase=echoes.phase[:, here], magnitude=echoes.magnitude[:, here]), here
        )
        for begin in range(0, max(voxels, 1), size)
        for here in [slice(begin, begin + size)]
    ]
    return _Fit(*(torch.cat(values) for values in zip(*fits, strict=True)))


class _Newton(NamedTuple):
    """What a nonlinear fit gives, all (N,)."""

    intercept: Tensor
    """Phase at echo time 0 (rad)."""
    slope: Tensor
    """Phase at the last echo without the intercept (rad)."""
    information: Tensor
    """The slope's entry of J'J."""
    convergence: Convergence


def _newton_loops(
    echoes: _Echoes, *, offset: bool, tolerance: float, max_iterations: int
) -> _Newton:
    """Fit voxel by voxel, in double precision."""
    intercept, slope, information = (torch.empty_like(echoes.phase[0]) for _ in range(3))
    steps = np.zeros(slope.numel(), np.int32)
    moved = np.zeros(slope.numel())
    in_pieces(
        _newton_voxels, slope.numel(),
        echoes.phase.numpy(), echoes.magnitude.numpy(), np.array(echoes.times), offset, tolerance,
        max_iterations, intercept.numpy(), slope.numpy(), information.numpy(), steps, moved,
    )  # fmt: skip
    iterations = int(steps.max(initial=0))
    change = float(moved[steps == iterations].max(initial=0.0))
    return _Newton(
        intercept,
        slope,
        information,
        Convergence(change < tolerance or iterations == 0, iterations, change, tolerance),
    )


@compiled(nogil=True, error_model="numpy")
def _newton_voxels(
    start: int,
    stop: int,
    phase: np.ndarray,
    magnitude: np.ndarray,
    times: np.ndarray,
    offset: bool,
    tolerance: float,
    max_iterations: int,
    intercept: np.ndarray,
    slope: np.ndarray,
    information: np.ndarray,
    steps: np.ndarray,
    moved: np.ndarray,
) -> None:
    echoes = len(phase)
    for n in range(start, stop):
        total, mean, spread, level, tilt = 0.0, 0.0, 0.0, 0.0, 0.0
        for e in range(echoes):
            weight = np.float64(magnitude[e, n]) ** 2
            total += weight
            mean += weight * times[e]
        mean = mean / total if offset else 0.0
        for e in range(echoes):
            weight, time = np.float64(magnitude[e, n]) ** 2, times[e] - mean
            spread += weight * time * time
            level += weight * phase[e, n]
            tilt += weight * time * phase[e, n]
        level = level / total if offset else 0.0
        tilt /= spread
        step, change = 0, np.inf
        while step < max_iterations and change >= tolerance:
            pull0, pull1, curve00, curve01, curve11 = 0.0, 0.0, 0.0, 0.0, 0.0
            for e in range(echoes):
                weight, time = np.float64(magnitude[e, n]) ** 2, times[e] - mean
                residual = phase[e, n] - level - time * tilt
                sine, cosine = weight * math.sin(residual), weight * math.cos(residual)
                pull0 += sine
                pull1 += sine * time
                curve00 += cosine
                curve01 += cosine * time
                curve11 += cosine * time * time
            area = curve00 * curve11 - curve01 * curve01
            if offset and area > 0 and curve00 > 0:
                up = (curve11 * pull0 - curve01 * pull1) / area
                turn = (curve00 * pull1 - curve01 * pull0) / area
            else:
                up, turn = pull0 / total if offset else 0.0, pull1 / spread
            gain = up * pull0 + turn * pull1
            # The line moves most at one of its ends.
            far = max(abs(up + (times[0] - mean) * turn), abs(up + (times[-1] - mean) * turn))
            if gain > 0:
                bend = up * up * curve00 + 2 * up * turn * curve01 + turn * turn * curve11
                most = far * ((total * up * up if offset else 0.0) + spread * turn * turn)
                length = 2 * gain / (bend + math.sqrt(bend * bend + 2 * gain * most))
                up, turn, far = up * length, turn * length, far * length
            level += up
            tilt += turn
            step += 1
            change = far
        intercept[n] = level - mean * tilt if offset else 0.0
        slope[n], information[n] = tilt, spread
        steps[n], moved[n] = step, change


def _newton_torch(
    echoes: _Echoes, *, offset: bool, tolerance: float, max_iterations: int
) -> _Newton:
    """Fit all voxels at once, :data:`CHUNK` at a time: for CUDA, and the oracle of the loops."""
    results = []
    for begin in range(0, echoes.phase.shape[1], CHUNK):
        part = slice(begin, begin + CHUNK)
        chunk = echoes._replace(
            phase=echoes.phase[:, part].double(), magnitude=echoes.magnitude[:, part].double()
        )
        results.append(_newton_chunk(chunk, offset, tolerance, max_iterations))
    if not results:
        empty = echoes.phase[0]
        return _Newton(empty, empty, empty, Convergence(True, 0, 0.0, tolerance))
    intercept, slope, information = (
        torch.cat(values).to(echoes.phase.dtype) for values in list(zip(*results, strict=True))[:3]
    )
    slowest = max((r.convergence for r in results), key=lambda c: (c.iterations, c.change))
    return _Newton(intercept, slope, information, slowest)


def _newton_chunk(echoes: _Echoes, offset: bool, tolerance: float, max_iterations: int) -> _Newton:
    intercept, slope, information = _line(echoes, offset=offset)
    total, mean, spread = _moments(echoes, offset=offset)
    level, tilt = intercept + mean * slope, slope.clone()
    p, weight = echoes.phase, echoes.magnitude.square()
    active = torch.arange(slope.numel(), device=slope.device)
    times = echoes.times
    iterations, change = 0, 0.0

    while active.numel() and iterations < max_iterations:
        pull0, pull1, curve00, curve01, curve11 = (torch.zeros_like(level) for _ in range(5))
        for e, t in enumerate(times):
            time = t - mean
            residual = p[e] - level - time * tilt
            sine, cosine = weight[e] * torch.sin(residual), weight[e] * torch.cos(residual)
            pull0 += sine
            pull1 += sine * time
            curve00 += cosine
            curve01 += cosine * time
            curve11 += cosine * time * time
        turn = pull1 / spread
        if offset:
            up = pull0 / total
            area = curve00 * curve11 - curve01.square()
            newton = (area > 0) & (curve00 > 0)
            up = torch.where(newton, (curve11 * pull0 - curve01 * pull1) / area, up)
            turn = torch.where(newton, (curve00 * pull1 - curve01 * pull0) / area, turn)
        else:
            up = torch.zeros_like(turn)
        gain = up * pull0 + turn * pull1
        far = torch.maximum(
            (up + (times[0] - mean) * turn).abs(), (up + (times[-1] - mean) * turn).abs()
        )
        bend = up.square() * curve00 + 2 * up * turn * curve01 + turn.square() * curve11
        most = far * (total * up.square() + spread * turn.square())
        length = 2 * gain / (bend + (bend.square() + 2 * gain * most).sqrt())
        length = torch.where(gain > 0, length, 1.0)
        up, turn, moved = up * length, turn * length, far * length
        level, tilt = level + up, tilt + turn
        intercept[active] = level - mean * tilt if offset else torch.zeros_like(level)
        slope[active] = tilt
        iterations += 1
        change = moved.max().item()
        going = moved >= tolerance
        active, level, tilt = active[going], level[going], tilt[going]
        p, weight = p[:, going], weight[:, going]
        total, mean, spread = total[going], mean[going], spread[going]
    return _Newton(
        intercept,
        slope,
        information,
        Convergence(active.numel() == 0, iterations, change, tolerance),
    )


def _finish(
    echoes: _Echoes, mask: Tensor, fit: _Fit, convergence: Convergence | None
) -> TotalField:
    """To ppm, and from the mask's voxels (N,) to images."""
    noise = _noise_level(echoes, fit.squares) / fit.information.sqrt()
    noise = noise.clamp(max=math.pi / 3**0.5)
    values = (
        fit.slope / echoes.radians_per_ppm,
        noise / echoes.radians_per_ppm,
        fit.residual,
    )
    field, spread, residual = (
        torch.zeros_like(mask, dtype=value.dtype).masked_scatter_(mask, value) for value in values
    )
    return TotalField(field, spread, convergence, residual)


def _noise_level(echoes: _Echoes, squares: Tensor) -> float:
    """Noise of each of real and imaginary part, as a fraction of the largest magnitude.

    The weighted sums of squares of the residuals follow a chi-squared distribution: their median
    over the voxels is blind to voxels where the model fails.
    """
    n = len(echoes.times)
    if squares.numel() == 0:
        return 1.0
    if n < 3:
        return echoes.magnitude.amax(0).median().item() / ASSUMED_SNR
    median = 2 * float(gammaincinv((n - 2) / 2, 0.5))
    floor = torch.finfo(squares.dtype).eps
    return max((squares.median().item() / median) ** 0.5, floor)
