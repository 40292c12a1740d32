"""Phase as it comes from the scanner: to radians, slice by slice in order, without its offset."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.grids import along, check_grid, check_signal
from qsmpipe.numerics.smoothing import box_count, wide_gaussian
from qsmpipe.numerics.solvers import Convergence
from qsmpipe.numerics.units import check_echo_times

__all__ = [
    "Combined",
    "Offset",
    "alternates",
    "combine_echoes",
    "complex_to_polar",
    "mcpc3ds",
    "mcpc3ds_coils",
    "to_radians",
    "wrap",
]

DEFAULT_SIGMA = 7.0
"""Width of the Gaussian that smooths the phase offset (mm)."""

WHOLE = 1e-4
"""Echo times are multiples of their step when they deviate by less than this share of it."""

PIECE = 1 << 16
"""Voxels that are wrapped at a time."""


class Offset(NamedTuple):
    """What the removal of the phase offset gives."""

    phase: Tensor
    """Phase without the offset (rad, in (-pi, pi]), (E, X, Y, Z)."""
    offset: Tensor
    """Phase at echo time 0 (rad, in (-pi, pi]), (X, Y, Z); of a bipolar readout that of the odd
    echoes."""
    convergence: Convergence | None = None
    """None: the method is direct."""
    difference: Tensor | None = None
    """What even echoes have beyond odd ones (rad), (X, Y, Z), where the readout is bipolar."""


class Combined(NamedTuple):
    """What the combination of coils gives."""

    magnitude: Tensor
    """(E, X, Y, Z), in the unit of the coils' magnitudes."""
    phase: Tensor
    """Phase without the coils' offsets (rad, in (-pi, pi]), (E, X, Y, Z)."""


def wrap(phase: Tensor) -> Tensor:
    """Add the multiple of 2 pi that brings phase into (-pi, pi].

    Values that lie there already keep every bit.

    Parameters
    ----------
    phase : tensor
        In rad, of any shape.

    Returns
    -------
    tensor
        In rad, in (-pi, pi].
    """
    return _wrap_in_place(phase.clone(memory_format=torch.contiguous_format))


def _wrap_in_place(phase: Tensor) -> Tensor:
    """Do :func:`wrap` on a contiguous image, in pieces that stay in the processor's cache."""
    for piece in phase.view(-1).split(PIECE if phase.device.type == "cpu" else 1 << 62):
        turns = (piece / (2 * math.pi)).sub_(0.5).ceil_()
        piece.sub_(turns, alpha=2 * math.pi)
        piece.masked_fill_(piece <= -math.pi, math.pi)
    return phase


def combine_echoes(magnitude: Tensor) -> Tensor:
    """Root of the sum of squares over the echoes.

    Parameters
    ----------
    magnitude : (E, X, Y, Z) tensor
        Magnitude of every echo, in any unit.

    Returns
    -------
    (X, Y, Z) tensor
        In the unit of ``magnitude``.
    """
    return magnitude.square().sum(0).sqrt_()


def to_radians(
    values: Tensor,
    *,
    slope: float | Sequence[float],
    intercept: float | Sequence[float] = 0.0,
    sign: int = 1,
    alternating: Sequence[int] = (),
) -> Tensor:
    """Phase in radians from the values that a scanner stores.

    Parameters
    ----------
    values : (..., X, Y, Z) real tensor
        Phase in the scanner's unit.
    slope, intercept : float, or sequence of float
        Phase is ``slope * values + intercept`` (rad): one number for all echoes, or one for each
        of the E echoes of (E, X, Y, Z).
    sign : int
        -1 where the scanner counts precession the other way round, so that a paramagnetic field
        would lower the phase (GE); else +1.
    alternating : sequence of int
        Space axes (0, 1 or 2) along which every second plane is shifted by pi, such as 2 in 3D
        data of GE (:func:`alternates` tells).

    Returns
    -------
    (..., X, Y, Z) tensor
        Phase (rad) in (-pi, pi], growing with echo time where the field is above B0.

    Raises
    ------
    ValueError
        If there is neither one slope and intercept nor one for each echo.
    """
    factor, constant = (_each_echo(number, values) for number in (slope, intercept))
    phase = values * (sign * factor)
    phase += sign * constant
    return _wrap_in_place(_mend_planes(phase, alternating).contiguous())


def _each_echo(number: float | Sequence[float], values: Tensor) -> float | Tensor:
    """Make ``number`` a factor of ``values`` (E, X, Y, Z)."""
    if isinstance(number, (int, float)):
        return number
    if len(number) == 1:
        return number[0]
    echoes = len(values) if values.ndim == 4 else 1
    if len(number) != echoes:
        msg = (
            f"{len(number)} scales of phase do not fit {echoes} echoes: give one, or one per echo"
        )
        raise ValueError(msg)
    return values.new_tensor(number).reshape(-1, 1, 1, 1)


def complex_to_polar(
    real: Tensor, imag: Tensor, *, sign: int = 1, alternating: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Magnitude and phase of real and imaginary parts.

    Parameters
    ----------
    real, imag : (..., X, Y, Z) tensors
        In one unit.
    sign : int
        As in :func:`to_radians`.
    alternating : sequence of int
        As in :func:`to_radians`.

    Returns
    -------
    magnitude : (..., X, Y, Z) tensor
        In the unit of the parts.
    phase : (..., X, Y, Z) tensor
        In rad, in (-pi, pi].
    """
    check_grid(real, imag, ("real", "imag"))
    phase = torch.atan2(imag, real).mul_(sign)
    return torch.hypot(real, imag), _wrap_in_place(_mend_planes(phase, alternating).contiguous())


def _mend_planes(phase: Tensor, axes: Sequence[int]) -> Tensor:
    for axis in axes:
        odd = torch.arange(phase.shape[axis - 3], device=phase.device) % 2
        phase = phase + math.pi * along(odd.to(phase.dtype), axis)
    return phase


def alternates(phase: Tensor, *, magnitude: Tensor | None = None, axis: int = 2) -> bool:
    """Whether phase jumps by pi from each plane to the next, as in some 3D data of GE.

    The unit phasors of neighbouring planes point the same way in most voxels, whatever smooth
    field there is, and the opposite way if planes alternate; where there is only noise they do
    neither. All pairs of planes must tell the same, so that one discontinuity is no alternation.
    Of several echoes the first is asked: there the field has turned the phase least.

    Slices alternate along the third axis as the scanner stores them; along another one after the
    image was reoriented, and along several where a half-turn was left out of a Fourier transform.

    Parameters
    ----------
    phase : ([E,] X, Y, Z) real tensor
        Phase (rad), wrapped or not.
    magnitude : ([E,] X, Y, Z) real tensor, optional
        Weighs the voxels. Without it, voxels that have the commonest value (padding) are left
        out.
    axis : int
        Space axis (0, 1 or 2) that the planes follow one another along.

    Returns
    -------
    bool
        False for fewer than 4 planes.
    """
    phase = phase[0] if phase.ndim == 4 else phase
    if magnitude is not None:
        check_grid(phase, magnitude, ("phase", "magnitude"))
        magnitude = magnitude[0] if magnitude.ndim == 4 else magnitude
        magnitude = magnitude.movedim(axis, -1)
    phase = phase.movedim(axis, -1)
    if phase.shape[-1] < 4:
        return False
    below, above = phase[..., :-1], phase[..., 1:]
    if magnitude is None:
        padding = _sample(phase).mode().values
        weight = ((below != padding) & (above != padding)).to(phase)
    else:
        weight = magnitude[..., :-1] * magnitude[..., 1:]
    agreement = (weight * torch.cos(above - below)).sum((0, 1), dtype=torch.float64)
    opposed = -agreement.clamp(max=0).sum().item()
    aligned = agreement.clamp(min=0).sum().item()
    noise = 5 * (weight.double().square().sum().item() / 2) ** 0.5
    total = weight.sum(dtype=torch.float64).item()
    return opposed - aligned > max(0.02 * total, noise) and aligned < 0.25 * opposed


def mcpc3ds(
    phase: Tensor,
    magnitude: Tensor,
    zooms: Zooms,
    *,
    echo_times: Sequence[float],
    sigma: float = DEFAULT_SIGMA,
    bipolar: bool = False,
) -> Offset:
    r"""Remove the phase that all echoes share (MCPC-3D-S [1]_).

    Phase is :math:`\varphi_0 + \omega t`. Between the first two echoes only the second term
    grows; their Hermitian inner product, unwrapped over space, gives :math:`\omega` and so
    :math:`\varphi_0 = \varphi_1 - t_1 \omega`. Being a property of the coils, :math:`\varphi_0`
    is smooth: it is smoothed as a complex number, weighted by the inverse of its variance. What
    the Gaussian took away by its width, at the head's edge above all, is smoothed again and added
    (twicing [2]_).

    Where the echo times are multiples of their first step, turns of :math:`\omega t` are turns of
    :math:`\varphi_0`, and nothing is unwrapped.

    Where even echoes are read out the other way round (``bipolar``), eddy currents and delays give
    them a smooth phase :math:`d` that odd echoes lack. The first and the third echo do not have
    it, so that with :math:`\theta = \varphi_2 - \varphi_1` and
    :math:`q = (t_3 - t_1) / (t_2 - t_1)`

    .. math:: \varphi_3 - \varphi_1 - q \theta = -q d

    which is smoothed like the offset, unwrapped, and subtracted from :math:`\theta` and from the
    even echoes: the correction of [3]_ (his :math:`g / f`, where :math:`f = -q`), written so that
    no echo but :math:`\theta` is unwrapped. Echo times that ascend leave no case in which it is
    degenerate. What cannot be told is a :math:`d` greater by :math:`2 \pi / q` everywhere, which
    for even spacing is a field in which even echoes turn by another half: the smallest one is
    taken.

    Parameters
    ----------
    phase : (E, X, Y, Z) real tensor
        Phase (rad), wrapped or not, of 2 or more echoes; of 3 or more where ``bipolar``.
    magnitude : (E, X, Y, Z) real tensor
        Magnitude, in any unit.
    zooms : tuple of float
        Voxel size (mm).
    echo_times : sequence of float
        Echo times (s).
    sigma : float
        Standard deviation of the Gaussian (mm).
    bipolar : bool
        Whether every second echo was read out in the opposite direction; without it, all must
        have one readout polarity.

    Returns
    -------
    Offset
        ``offset`` is 0 more than about 4 ``sigma`` away from all signal.

    Raises
    ------
    ValueError
        For a single echo: it has no offset that could be told from its field. For 2 bipolar
        ones: the difference of the readouts could not be told from the field. Where phase or
        magnitude is not finite: a magnitude of 0 says that there is no signal.

    References
    ----------
    .. [1] Eckstein et al. Magn Reson Med 79 (2018) 2996, doi:10.1002/mrm.26963
    .. [2] Tukey, Exploratory Data Analysis, Addison-Wesley (1977), 526
    .. [3] Eckstein, PhD thesis, TU Wien (2021), doi:10.34726/hss.2021.43447
    """
    times = _check_offset(phase, magnitude, echo_times, sigma)
    phase = check_signal(phase, magnitude)
    if bipolar and len(times) < 3:
        msg = (
            "a bipolar readout takes 3 echoes to tell the phase that its direction adds from the "
            f"field, and there are {len(times)}: choose no bipolar correction or no offset removal"
        )
        raise ValueError(msg)
    weight = (magnitude[0] * magnitude[1]).sqrt_()
    mask = _signal(weight)
    evolution = wrap(phase[1] - phase[0])
    if not _whole(times[: 3 if bipolar else 2]):
        evolution = _unwrap(evolution, weight, mask, zooms)
    difference = None
    if bipolar:
        difference = _difference(phase, magnitude, evolution, times, mask, zooms, sigma)
        evolution -= difference
    offset = _offset(phase, magnitude, evolution, times, mask, zooms, sigma)
    clean = phase - offset
    if difference is not None:
        clean[1::2] -= difference
    return Offset(_wrap_in_place(clean.contiguous()), offset, None, difference)


def mcpc3ds_coils(
    phase: Sequence[Tensor],
    magnitude: Sequence[Tensor],
    zooms: Zooms,
    *,
    echo_times: Sequence[float],
    sigma: float = DEFAULT_SIGMA,
) -> Combined:
    r"""Combine the images of several coils without their phase offsets (MCPC-3D-S [1]_).

    The Hermitian inner product of the first two echoes, summed over the coils, is free of their
    offsets. Unwrapped, it gives the offset :math:`\varphi_{0,c}` of each coil as in
    :func:`mcpc3ds`; then the coils agree and

    .. math:: M_e^2 e^{i \varphi_e} = \sum_c M_{c,e}^2 e^{i (\varphi_{c,e} - \varphi_{0,c})}

    No singularity of a single coil remains: where it has no signal, it has no weight. The coils
    are asked for one by one, twice: a sequence that loads what it is asked for holds one in memory
    at a time.

    Parameters
    ----------
    phase : (C, E, X, Y, Z) real tensor, or sequence of (E, X, Y, Z)
        Phase (rad), wrapped or not, of 2 or more echoes of one readout polarity. (Of a bipolar
        readout combine first, then remove what is left by :func:`mcpc3ds`.)
    magnitude : (C, E, X, Y, Z) real tensor, or sequence of (E, X, Y, Z)
        Magnitude, in one unit for all coils.
    zooms : tuple of float
        Voxel size (mm).
    echo_times : sequence of float
        Echo times (s).
    sigma : float
        Standard deviation of the Gaussian (mm).

    Returns
    -------
    Combined

    Raises
    ------
    ValueError
        For a single echo, for no coil, where phase and magnitude are not of the same coils, or
        where they are not finite in a voxel with signal.

    References
    ----------
    .. [1] Eckstein et al. Magn Reson Med 79 (2018) 2996, doi:10.1002/mrm.26963
    """
    if len(phase) != len(magnitude) or len(phase) == 0:
        msg = (
            f"there are {len(phase)} coils with a phase and {len(magnitude)} with a magnitude: "
            "give one of each per coil"
        )
        raise ValueError(msg)
    coils = range(len(phase))
    product: Tensor | float = 0.0
    for c in coils:
        values, amplitude = phase[c], magnitude[c]
        times = _check_offset(values, amplitude, echo_times, sigma)
        values = check_signal(values, amplitude)
        product = product + torch.polar(amplitude[0] * amplitude[1], values[1] - values[0])
    assert isinstance(product, Tensor)
    weight = product.abs().sqrt_()
    mask = _signal(weight)
    evolution = product.angle()
    if not _whole(times[:2]):
        evolution = _unwrap(evolution, weight, mask, zooms)
    total: Tensor | float = 0.0
    for c in coils:
        values, amplitude = phase[c], magnitude[c]
        values = check_signal(values, amplitude)
        offset = _offset(values, amplitude, evolution, times, mask, zooms, sigma)
        total = total + torch.polar(amplitude.square(), values - offset)
    assert isinstance(total, Tensor)
    return Combined(total.abs().sqrt_(), wrap(total.angle()))


def _check_offset(
    phase: Tensor, magnitude: Tensor, echo_times: Sequence[float], sigma: float
) -> list[float]:
    if len(echo_times) < 2:
        msg = (
            "MCPC-3D-S needs 2 echoes to tell the phase offset from the field, and there is "
            f"{len(echo_times)}: choose no offset removal"
        )
        raise ValueError(msg)
    times = check_echo_times(phase, echo_times)
    check_grid(phase, magnitude, ("phase", "magnitude"))
    if not sigma > 0:
        msg = f"sigma {sigma!r} is not above 0: give the width of the smoothing in mm"
        raise ValueError(msg)
    return times


def _whole(times: Sequence[float]) -> bool:
    """Whether all of the times are multiples of the step: then wraps of the evolution drop out."""
    step = times[1] - times[0]
    return all(abs(time / step - round(time / step)) < WHOLE for time in times)


def _offset(
    phase: Tensor,
    magnitude: Tensor,
    evolution: Tensor,
    times: Sequence[float],
    mask: Tensor,
    zooms: Zooms,
    sigma: float,
) -> Tensor:
    """Smooth phase at echo time 0, given how it evolves from the first to the second echo."""
    ratio = times[0] / (times[1] - times[0])
    rough = phase[0] - ratio * evolution
    return _smooth_twice(rough, _precision(magnitude, (1 + ratio, ratio), mask), zooms, sigma)


def _difference(
    phase: Tensor,
    magnitude: Tensor,
    evolution: Tensor,
    times: Sequence[float],
    mask: Tensor,
    zooms: Zooms,
    sigma: float,
) -> Tensor:
    """Phase of the second echo that the first and the third lack (rad), unwrapped."""
    ratio = (times[2] - times[0]) / (times[1] - times[0])
    rough = phase[2] - phase[0] - ratio * evolution
    precision = _precision(magnitude, (ratio - 1, ratio, 1.0), mask)
    smooth = _smooth_twice(rough, precision, zooms, sigma)
    return _unwrap(smooth, None, smooth != 0, zooms, among=mask) / -ratio


def _precision(magnitude: Tensor, factors: Sequence[float], mask: Tensor) -> Tensor:
    """Inverse variance of a sum of the echoes' phases, each times its factor; 0 outside."""
    variance = torch.zeros_like(magnitude[0])
    for factor, m in zip(factors, magnitude, strict=False):
        variance += factor**2 / m.square()
    return torch.where(mask & variance.isfinite(), 1 / variance, 0.0)


def _smooth_twice(rough: Tensor, precision: Tensor, zooms: Zooms, sigma: float) -> Tensor:
    """Phase of the Gaussian mean of ``precision * exp(i rough)``, twiced; 0 where no weight comes.

    The phase that the first mean leaves needs no angle: its cosine and sine are products.
    """
    weight = precision / precision.max().clamp(min=1e-30)
    parts = torch.stack([torch.cos(rough).mul_(weight), torch.sin(rough).mul_(weight), weight])
    real, imag, near = wide_gaussian(parts, zooms, sigma=sigma)
    del weight
    size = torch.hypot(real, imag).clamp_(min=1e-30)
    real.div_(size)
    imag.div_(size)
    cosine, sine, _ = parts
    rest = torch.stack([
        (cosine * real).addcmul_(sine, imag), (sine * real).addcmul_(cosine, imag, value=-1)
    ])  # fmt: skip
    del parts, cosine, sine, size
    cosine, sine = wide_gaussian(rest, zooms, sigma=sigma)
    twiced = torch.atan2(
        (imag * cosine).addcmul_(real, sine), (real * cosine).addcmul_(imag, sine, value=-1)
    )
    return _wrap_in_place(twiced).masked_fill_(near <= 1e-4 * near.max(), 0)


def _unwrap(
    phase: Tensor,
    magnitude: Tensor | None,
    mask: Tensor,
    zooms: Zooms,
    *,
    among: Tensor | None = None,
) -> Tensor:
    """Unwrap (X, Y, Z) over space, with as few whole turns as can be in the typical voxel.

    Typical among those of ``among``, or of ``mask``.
    """
    from qsmpipe.numerics.unwrap.romeo import romeo  # loads numba

    unwrapped = romeo(phase, mask, zooms, magnitude=magnitude)
    turns = torch.round(unwrapped[mask if among is None else among] / (2 * math.pi))
    return unwrapped - 2 * math.pi * turns.median() if turns.numel() else unwrapped


def _signal(magnitude: Tensor) -> Tensor:
    """Where (X, Y, Z) is above its noise, without specks and small holes.

    The threshold is 5 times the mean of the darkest 15 %, but no less than a fifth of the bright
    fifth's mean; the darkest 5 %, then none, stand in where the darkest are not dark.
    """
    sample = _sample(magnitude).sort().values
    n = sample.numel()
    high = sample[int(0.8 * n) : max(int(0.99 * n), int(0.8 * n) + 1)].mean()
    noise = sample[: max(1, int(0.15 * n))].mean()
    if noise > high / 10:
        noise = sample[: max(1, int(0.05 * n))].mean()
    if noise > high / 10:
        noise = torch.zeros_like(high)
    bright = magnitude > torch.maximum(5 * noise, high / 5)
    widths = [5 if n >= 5 else 3 if n >= 3 else 1 for n in bright.shape]
    sizes = [
        box_count(bright.new_ones(n, 1, 1), (width, 1, 1)).reshape(-1)
        for n, width in zip(bright.shape, widths, strict=True)
    ]
    x, y, z = (along(size, axis) for axis, size in enumerate(sizes))
    return box_count(bright, widths) * 5 > 2 * x * y * z


def _sample(image: Tensor) -> Tensor:
    """Up to 200,000 voxels, evenly taken."""
    values = image.reshape(-1)
    return values[:: max(1, values.numel() // 100_000)]
