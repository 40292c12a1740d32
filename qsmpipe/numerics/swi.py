"""Susceptibility-weighted images: a magnitude, darkened where the phase tells of iron or veins."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, softplus

from qsmpipe.numerics.fourier import Shape, Zooms, convolve, padded_shape
from qsmpipe.numerics.grids import bounding_box, check_mask, in_place
from qsmpipe.numerics.kernels import AXIAL, frequencies
from qsmpipe.numerics.masks.threshold import bias_field
from qsmpipe.numerics.parameters import NotNegative, Positive, checked
from qsmpipe.numerics.units import check_echo_times
from qsmpipe.numerics.unwrap.laplacian import laplacian

__all__ = ["SWI", "clear", "homodyne", "minimum_projection"]

Window: TypeAlias = Literal["hann", "hamming"]
"""How the low-pass filter of :func:`homodyne` falls off in k-space."""

Kind: TypeAlias = Literal["paramagnetic", "diamagnetic"]
"""What is darkened: veins, iron and blood, or calcium and myelin."""

PEDESTAL = {"hann": 0.0, "hamming": 0.08}
"""Value of a window at its edge."""

DEFAULT_RESOLUTION = 4.0
"""Voxel size of the phase that :func:`homodyne` removes (mm): the central 64 x 64 of 512 x 512
samples over 256 mm."""

DEFAULT_POWER = 4.0
"""How often :func:`homodyne` multiplies the phase mask."""

DEFAULT_SIGMA = 2.0
"""Width of the high-pass filter of :func:`clear` (mm): 4 voxels of 0.5 mm."""

DEFAULT_STRENGTH = 4.0
"""How steeply the phase mask of :func:`clear` falls."""

DEFAULT_BIAS_SIGMA = 7.0
"""Smoothness of the receive field that :func:`clear` divides out (mm)."""

DEFAULT_THICKNESS = 8.0
"""Slab of the minimum intensity projection (mm)."""


class SWI(NamedTuple):
    """What every method of the stage returns."""

    swi: Tensor
    """(X, Y, Z) susceptibility-weighted image, in about the unit of the magnitude; 0 outside the
    mask."""
    minip: Tensor
    """(X, Y, Z) minimum of ``swi`` over a slab around each slice; 0 outside the mask."""


@checked
def homodyne(
    phase: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    magnitude: Tensor,
    b0_direction: Sequence[float] = AXIAL,
    resolution: Positive = DEFAULT_RESOLUTION,
    window: Window = "hann",
    per_slice: bool = True,
    power: NotNegative = DEFAULT_POWER,
    darkens: Kind = "paramagnetic",
    thickness: Positive = DEFAULT_THICKNESS,
) -> SWI:
    r"""Weight the magnitude by the homodyne-filtered phase [1]_ [2]_.

    The complex image :math:`c = M e^{i \varphi}` is divided by its own low-pass-filtered copy
    :math:`L`, which carries the smooth phase: :math:`\varphi_{hp} = \arg(c \bar L)`. Phase grows
    with the field here (whatever the scanner), so that veins along B0 are positive and a vein is
    darkened by

    .. math:: S = M \left(1 - \frac{\max(\varphi_{hp}, 0)}{\pi}\right)^n

    Of several echoes each makes an image of its own, and these are averaged, the scheme that
    radiologists preferred to one from an average frequency [3]_: late echoes bring the contrast,
    early ones the signal. Where the field is so steep that the phase left exceeds
    :math:`\pi`, it wraps, and dark bands stay, as above the sinuses.

    Parameters
    ----------
    phase : ([E,] X, Y, Z) real tensor
        Phase (rad), wrapped or not; it grows with the field.
    mask : (X, Y, Z) bool tensor
        What to image; voxels outside are not read, so that no noise of the air is mixed in.
    zooms : tuple of float
        Voxel size (mm).
    magnitude : ([E,] X, Y, Z) real tensor
        Magnitude, in any unit.
    b0_direction : sequence of 3 floats
        Unit vector along B0 in voxel axes; slices are those across the axis nearest to it.
    resolution : float
        Voxel size (mm) of an image that shows the phase that is removed. The filter :math:`L` ends
        at the frequency 1 / (2 resolution); its half value is at a wavelength of 4 resolutions.
    window : {"hann", "hamming"}
        How the low-pass filter falls off, along each axis.
    per_slice : bool
        Filter within slices (as for 2D acquisitions, and as published), or along all three axes.
    power : float
        Power of the phase mask, :math:`n`.
    darkens : {"paramagnetic", "diamagnetic"}
        Darken where the phase is positive, or where it is negative.
    thickness : float
        Slab of the minimum intensity projection (mm), see :func:`minimum_projection`.

    Returns
    -------
    SWI

    Notes
    -----
    The published filter counts samples (64 x 64), and public codes count voxels (a window of 12
    voxels in image space); both change with the field of view or the matrix. It is in mm here.

    References
    ----------
    .. [1] Haacke et al. Magn Reson Med 52 (2004) 612, doi:10.1002/mrm.20198
    .. [2] Haacke et al. AJNR 30 (2009) 19, doi:10.3174/ajnr.A1400
    .. [3] Quinn et al. AJNR 35 (2014) 38, doi:10.3174/ajnr.A3584
    """
    _one_of(window, Window, "window")
    sign = _sign(darkens)
    phase, magnitude, inside = _inside(phase, magnitude, mask)
    box = bounding_box(inside)
    known, axis = inside[box], slice_axis(b0_direction)

    total = torch.zeros_like(known, dtype=phase.dtype)
    for angle, size in zip(phase, magnitude, strict=True):
        left = sign * high_pass(
            angle, inside, zooms, magnitude=size, b0_direction=b0_direction,
            resolution=resolution, window=window, per_slice=per_slice,
        )[box]  # fmt: skip
        total += torch.where(known, size[box], 0) * (1 - left.clamp(min=0) / math.pi).pow(power)
    total /= len(phase)
    return _result(total, known, box, zooms, axis, thickness, like=inside)


def high_pass(
    phase: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    magnitude: Tensor,
    b0_direction: Sequence[float] = AXIAL,
    resolution: float = DEFAULT_RESOLUTION,
    window: Window = "hann",
    per_slice: bool = True,
) -> Tensor:
    """Phase (rad) that :func:`homodyne` weights by, of one echo.

    Parameters are those of that function, all images (X, Y, Z).

    Returns
    -------
    (X, Y, Z) tensor
        At most half a turn in size; 0 outside ``mask``.
    """
    check_mask(phase, mask)
    box = bounding_box(mask)
    known, axis = mask[box], slice_axis(b0_direction)
    axes = [other for other in range(3) if other != axis or not per_slice]
    shape = padded_shape(known.shape, zooms, margin=4 * resolution)
    transfer = _window(shape, zooms, resolution, window, axes=axes, like=phase)
    size = torch.where(known, magnitude[box], 0.0)
    image = torch.polar(size, torch.where(known, phase[box], 0.0))
    left = (image * _low_pass(image, transfer, axes, shape).conj()).angle()
    return in_place(torch.where(known, left, 0.0), box, mask)


@checked
def clear(
    phase: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    magnitude: Tensor,
    echo_times: Sequence[float],
    b0_direction: Sequence[float] = AXIAL,
    sigma: Positive = DEFAULT_SIGMA,
    strength: Positive = DEFAULT_STRENGTH,
    bias_sigma: NotNegative = DEFAULT_BIAS_SIGMA,
    darkens: Kind = "paramagnetic",
    thickness: Positive = DEFAULT_THICKNESS,
) -> SWI:
    r"""Weight a homogeneous magnitude by the field of all echoes (CLEAR-SWI [1]_).

    Phase: every echo is unwrapped by its Laplacian, less its Gaussian mean within slices and
    mask, and the echoes are joined to a field (Hz), weighted by their signal-to-noise ratio:
    :math:`x = \sum_e M_e \varphi_e / (2 \pi \sum_e M_e t_e)`. With :math:`m` the median of the
    positive :math:`x` times 10 / strength, the mask is :math:`(1 + \tanh(1 - x / m)) / 2`: 0.88
    where nothing is left, 1/2 at :math:`m`, 0 far above.

    Magnitude: the root of the sum of squares over the echoes, its smooth shading divided out,
    then bent at half the 80th percentile so that noise goes to 0 and signal stays in proportion:
    :math:`s(M) - s(0)` with the softplus :math:`s(M) = \ln(1 + e^{f (M - o)}) / f`,
    :math:`o = q_{80} / 2`, :math:`f = 2 / o`.

    Parameters
    ----------
    phase : ([E,] X, Y, Z) real tensor
        Phase (rad), wrapped or not, without offset at echo time 0; it grows with the field.
    mask : (X, Y, Z) bool tensor
        What to image; voxels outside are not read.
    zooms : tuple of float
        Voxel size (mm).
    magnitude : ([E,] X, Y, Z) real tensor
        Magnitude, in any unit.
    echo_times : sequence of float
        Echo times (s).
    b0_direction : sequence of 3 floats
        Unit vector along B0 in voxel axes; slices are those across the axis nearest to it.
    sigma : float
        Standard deviation of the Gaussian within slices (mm).
    strength : float
        How steeply the phase mask falls. The field at which it is 1/2 is inversely proportional.
    bias_sigma : float
        Smoothness of the shading that is divided out (mm); 0 leaves it in.
    darkens : {"paramagnetic", "diamagnetic"}
        Darken where the field is raised, or where it is lowered.
    thickness : float
        Slab of the minimum intensity projection (mm), see :func:`minimum_projection`.

    Returns
    -------
    SWI

    Notes
    -----
    The public code filters by 4 voxels, whatever their size, estimates the shading from boxes of
    tissue that are alike, and projects 7 slices, which costs 6. Here lengths are in mm, the
    shading is that of :func:`.masks.threshold.bias_field`, and the grid is kept.

    References
    ----------
    .. [1] Eckstein et al. NeuroImage 237 (2021) 118175, doi:10.1016/j.neuroimage.2021.118175
    """
    sign = _sign(darkens)
    phase, magnitude, inside = _inside(phase, magnitude, mask)
    times = check_echo_times(phase, echo_times)
    box = bounding_box(inside)
    known, axis = inside[box], slice_axis(b0_direction)
    sizes = torch.where(known, magnitude[(..., *box)], 0.0)
    angles = laplacian(phase[(..., *box)], known, zooms, echo_times=times)

    shape = padded_shape(known.shape, zooms, margin=4 * sigma)
    transfer = _in_plane_gaussian(shape, zooms, sigma, axis, like=sizes)
    near = convolve(known.to(sizes), transfer, shape).clamp(min=1e-6)
    collected, time = torch.zeros_like(sizes[0]), torch.zeros_like(sizes[0])
    for angle, size, at in zip(angles, sizes, times, strict=True):
        collected += size * (angle - convolve(angle, transfer, shape) / near)
        time += size * at
    field = sign * torch.where(time > 0, collected / (2 * math.pi * time), 0.0)
    raised = field[known & (field > 0)]
    half = 10 / strength * raised.median() if raised.numel() else field.new_tensor(torch.inf)
    weight = (1 + torch.tanh(1 - field / half)) / 2

    image = sizes.square().sum(0).sqrt()
    if bias_sigma > 0 and image.any():
        image = image / bias_field(image, zooms, sigma=bias_sigma)
    image = _bend(image, known)
    return _result(image * weight, known, box, zooms, axis, thickness, like=inside)


@checked
def minimum_projection(
    image: Tensor, mask: Tensor, zooms: Zooms, *, axis: int = 2, thickness: Positive
) -> Tensor:
    """Project the minimum of a slab onto every slice; the grid stays.

    A slice's slab holds those slices whose middle lies within half the thickness of its own; at
    the ends of the image it is cut off. Voxels outside the mask do not count: with them, a rim as
    thick as the slab would be black.

    Parameters
    ----------
    image : (X, Y, Z) real tensor
        What to project.
    mask : (X, Y, Z) bool tensor
        Where it is known.
    zooms : tuple of float
        Voxel size (mm).
    axis : int
        Across which slices the slab reaches: 0, 1 or 2.
    thickness : float
        Of the slab (mm).

    Returns
    -------
    (X, Y, Z) tensor
        0 outside the mask.
    """
    check_mask(image, mask)
    reach = math.floor(thickness / 2 / zooms[axis] * (1 + 1e-6))
    # a maximum of what is negated: torch pads it with minus infinity, which never wins
    line = torch.where(mask, -image, -torch.inf).movedim(axis, -1)
    reach = min(reach, line.shape[-1] - 1)
    window = 2 * reach + 1
    flat = torch.nn.functional.pad(
        line.reshape(1, -1, line.shape[-1]), (reach, reach), value=-torch.inf
    )
    lowest = -max_pool1d(flat, window, stride=1).reshape(line.shape).movedim(-1, axis)
    return torch.where(mask, lowest, 0.0)


def slice_axis(b0_direction: Sequence[float]) -> int:
    """Voxel axis nearest to B0, which is head to foot; of equal ones the last.

    >>> slice_axis((0.0, 0.5, -0.87)), slice_axis((0.9, 0.3, 0.3))
    (2, 0)
    """
    return max(range(3), key=lambda axis: (round(abs(b0_direction[axis]), 6), axis))


def _inside(phase: Tensor, magnitude: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Echoes as (E, X, Y, Z), and the voxels of the mask that are finite in all."""
    if phase.shape != magnitude.shape or phase.ndim not in (3, 4):
        msg = (
            f"phase {tuple(phase.shape)} and magnitude {tuple(magnitude.shape)} must both be "
            "([E,] X, Y, Z): give one volume of each for every echo"
        )
        raise ValueError(msg)
    check_mask(magnitude, mask)
    phase, magnitude = (x.reshape(-1, *mask.shape) for x in (phase, magnitude))
    inside = mask & (phase.isfinite() & magnitude.isfinite()).all(0)
    if not inside.any():
        msg = "phase and magnitude are finite in no voxel of the mask: check the files"
        raise ValueError(msg)
    return phase, magnitude, inside


def _window(
    shape: Shape,
    zooms: Zooms,
    resolution: float,
    kind: Window,
    *,
    axes: Sequence[int],
    like: Tensor,
) -> Tensor:
    """Low-pass filter along ``axes``, on the whole spectrum."""
    base = PEDESTAL[kind]
    transfer = torch.ones((), dtype=like.dtype, device=like.device)
    for axis in axes:
        k = torch.fft.fftfreq(shape[axis], zooms[axis], dtype=like.dtype, device=like.device)
        k = k * 2 * resolution
        wave = (1 + base) / 2 + (1 - base) / 2 * torch.cos(math.pi * k)
        factor = torch.where(k.abs() < 1, wave, 0.0)
        transfer = transfer * factor.reshape([-1 if i == axis else 1 for i in range(3)])
    return transfer


def _low_pass(image: Tensor, transfer: Tensor, axes: Sequence[int], shape: Shape) -> Tensor:
    """Filter a complex image (X, Y, Z) along ``axes``, padded with zeros to ``shape`` there."""
    spectrum = torch.fft.fftn(image, s=[shape[axis] for axis in axes], dim=tuple(axes))
    x, y, z = image.shape
    return torch.fft.ifftn(spectrum * transfer, dim=tuple(axes))[:x, :y, :z]


def _in_plane_gaussian(
    shape: Shape, zooms: Zooms, sigma: float, axis: int, *, like: Tensor
) -> Tensor:
    """Half spectrum of a Gaussian across the two axes other than ``axis``."""
    total = torch.zeros((), dtype=like.dtype, device=like.device)
    for other, k in enumerate(frequencies(shape, zooms, like=like)):
        if other != axis:
            total = total + k**2
    transfer = torch.exp(-2 * (math.pi * sigma) ** 2 * total)
    return transfer.expand(shape[0], shape[1], shape[2] // 2 + 1)


def _bend(image: Tensor, mask: Tensor) -> Tensor:
    """Take noise to 0 by a softplus, and leave signal in proportion."""
    values = image[mask].double().sort().values
    offset = values[int(0.8 * (values.numel() - 1))].item() / 2
    if offset <= 0:
        return image
    zero = offset / 2 * math.log1p(math.exp(-2))
    return softplus(image - offset, beta=2 / offset) - zero


def _result(
    image: Tensor, known: Tensor, box: tuple[slice, slice, slice], zooms: Zooms, axis: int,
    thickness: float, *, like: Tensor,
) -> SWI:  # fmt: skip
    swi = torch.where(known, image, 0.0)
    minip = minimum_projection(swi, known, zooms, axis=axis, thickness=thickness)
    return SWI(in_place(swi, box, like), in_place(minip, box, like))


def _sign(darkens: Kind) -> float:
    return 1.0 if _one_of(darkens, Kind, "darkens") == "paramagnetic" else -1.0


def _one_of(value: str, kind: object, name: str) -> str:
    if value not in get_args(kind):
        msg = f"{name} is {value!r}: choose from {', '.join(get_args(kind))}"
        raise ValueError(msg)
    return value
