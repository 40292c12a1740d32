"""Dipole inversion by iLSQR: least squares, and the streaks that it leaves taken out."""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from qsmpipe.numerics.fourier import Shape, Zooms, convolve, copies, irfft, rfft
from qsmpipe.numerics.inversion.common import Susceptibility, Window
from qsmpipe.numerics.inversion.direct import ROUNDING
from qsmpipe.numerics.kernels import AXIAL, ball_mean, dipole
from qsmpipe.numerics.operators import gradient, gradient_adjoint
from qsmpipe.numerics.parameters import Count, NotNegative, checked
from qsmpipe.numerics.solvers import Convergence, lsmr

PADDING = 0.5
"""Zeros beyond the mask's box, as a fraction of it."""

DEFAULT_THRESHOLD = 0.1
"""Dipole kernel below which frequencies may hold streaks."""
DEFAULT_TOLERANCE = 1e-3
"""Of the residual of the normal equations; that of the system is then 2 to 3 %."""
DEFAULT_MAX_ITERATIONS = 100

LOOSER = 30.0
"""The tolerance of the streaks over that of the first step: with noise, streaks that are solved
for to the end take up noise."""

LAPLACIAN_PERCENTILES = (60.0, 99.9)
"""Of the size of the field's Laplacian: data are trusted below the first, and not above the
last."""
GRADIENT_PERCENTILES = (50.0, 70.0)
"""Of the size of the gradient of fast QSM, along each axis: smooth below the first, an edge above
the last."""
KERNEL_PERCENTILES = (1.0, 30.0)
"""Of :math:`|D|^n` in fast QSM: frequencies are smoothed below the first, kept above the last."""
KERNEL_POWER = 0.001
"""n of these weights, which makes them follow the logarithm of the kernel."""
SMOOTHING_RADIUS = 3.0
"""Radius of the spherical means in fast QSM (mm)."""
TKD_THRESHOLD = 1 / 8
"""Threshold of the division that fast QSM takes its scale from."""


@checked
def ilsqr(
    field: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    b0_direction: Sequence[float] = AXIAL,
    threshold: Annotated[float, Interval(ge=0, le=2 / 3)] = DEFAULT_THRESHOLD,
    tolerance: NotNegative = DEFAULT_TOLERANCE,
    max_iterations: Count = DEFAULT_MAX_ITERATIONS,
) -> Susceptibility:
    r"""Invert the dipole by iLSQR [1]_.

    1. Least squares where the field is smooth (:func:`initial_estimate`).
    2. A map without streaks but with blurred contrast (:func:`fast_qsm`), whose gradient tells
       where the true map is smooth.
    3. What makes the first map rough there and lies where :math:`|D| <` ``threshold``: its
       streaks (:func:`streaks`).
    4. The first map without them.

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
    threshold : float
        Dipole kernel, without unit, below which frequencies may hold streaks.
    tolerance : float
        Stop the first least squares when the residual of its normal equations is this fraction of
        the first one, and the second at :data:`LOOSER` times as much.
    max_iterations : int
        Iterations at most, of both. The noise and what the data do not determine come last, so
        that more steps do not always make a better map.

    Returns
    -------
    Susceptibility
        ``iterations`` is the larger one of the two, and so is ``change``, that of the streaks over
        :data:`LOOSER`.

    Notes
    -----
    Weights come from percentiles of the Laplacian and the gradient. Public code takes them of the
    signed values, so that a steep fall counts as smooth and a steep rise does not, and the field
    of minus the sources does not give minus the map. What the paper says of rough places holds
    for either sign: here they are percentiles of the sizes, inside the mask.

    Outside the mask the field counts as 0, as in :func:`.direct.tkd`. Were it unknown there,
    sources beyond the mask would explain a part of it: on a head-like phantom without noise the
    error of the first step was then 54 % instead of 36 %.

    References
    ----------
    .. [1] Li et al. NeuroImage 108 (2015) 111, doi:10.1016/j.neuroimage.2014.12.043
    """
    window = Window.around(field, mask, zooms, padding=PADDING)
    shape, inside = window.shape, window.mask
    kernel = dipole(shape, zooms, b0_direction, like=window.field)
    kernel[kernel.abs() < ROUNDING] = 0.0

    weight = data_weight(window.field, inside, zooms)
    first, one = initial_estimate(
        window.field, weight, kernel, shape, tolerance=tolerance, max_iterations=max_iterations
    )
    fast = fast_qsm(window.field, inside, zooms, kernel, shape)
    smooth = smooth_weight(fast, inside, zooms)
    del weight, fast
    artefact, two = streaks(
        first,
        smooth,
        # Some kernels are as large as a round threshold: rounding must not divide them.
        kernel.abs() < threshold - ROUNDING,
        zooms,
        shape,
        tolerance=LOOSER * tolerance,
        max_iterations=max_iterations,
    )
    convergence = Convergence(
        one.converged and two.converged,
        max(one.iterations, two.iterations),
        max(one.change, two.change / LOOSER),
        tolerance,
    )
    return Susceptibility(window.back(first - artefact), convergence)


def falling(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """1 up to ``low``, 0 from ``high`` on, a straight line between; 1 where the two are one."""
    return torch.where(
        values <= low, 1.0, ((high - values) / (high - low).clamp(min=1e-30)).clamp(0, 1)
    )


def percentiles(values: Tensor, shares: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Two percentiles of a vector of any length (:func:`torch.quantile` has a limit)."""
    places = [max(math.ceil(share / 100 * values.numel()), 1) for share in shares]
    low, high = (values.kthvalue(place).values for place in places)
    return low, high


def data_weight(field: Tensor, mask: Tensor, zooms: Zooms) -> Tensor:
    """Weight of the data in the first step: the field's Laplacian shows where they are noisy.

    Parameters
    ----------
    field : (X, Y, Z) real tensor
        Field (ppm), 0 outside ``mask``.
    mask : (X, Y, Z) bool tensor
    zooms : tuple of float
        Voxel size (mm).

    Returns
    -------
    (X, Y, Z) tensor
        1 where its size is below the first of :data:`LAPLACIAN_PERCENTILES` and outside the mask,
        0 above the last. Neighbours outside the mask count as equal.
    """
    rough = torch.zeros_like(field)
    for axis, zoom in zip((-3, -2, -1), zooms, strict=True):
        for side in (1, -1):
            both = mask & _neighbour(mask, axis, side)
            step = (_neighbour(field, axis, side) - field) / zoom**2
            rough += torch.where(both, step, 0.0)
    rough.abs_()
    return falling(rough, *percentiles(rough[mask], LAPLACIAN_PERCENTILES))


def _neighbour(image: Tensor, axis: int, side: int) -> Tensor:
    """Take the voxel before (1) or after (-1) each along an axis; 0 beyond the grid."""
    moved = image.roll(side, axis)
    moved.select(axis, 0 if side == 1 else -1).zero_()
    return moved


def initial_estimate(
    field: Tensor,
    weight: Tensor,
    kernel: Tensor,
    shape: Shape,
    *,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Convergence]:
    r"""First step: solve :math:`D F w F^{-1} D X = D F w f` by LSMR from 0.

    The paper's system is already that of the normal equations, and its least squares square it
    once more: small kernels stay at 0 for long. ``weight`` is 1 beyond the box, where the field
    is 0.

    Returns
    -------
    (X, Y, Z) tensor
        The map on the grid ``shape``.
    Convergence
    """
    # In the half spectrum times this, inner products are those of the whole one.
    root = copies(shape, like=kernel).sqrt_()
    into, out = kernel / root, kernel * root

    x, y, z = field.shape

    def back(image: Tensor) -> Tensor:
        return torch.view_as_real(rfft(image, shape).mul_(out))

    def system(spectrum: Tensor) -> Tensor:
        image = irfft(torch.view_as_complex(spectrum) * into, shape, shape)
        image[:x, :y, :z] *= weight
        return back(image)

    chi, convergence = lsmr(
        system, system, back(weight * field), tolerance=tolerance, max_iterations=max_iterations
    )
    return irfft(torch.view_as_complex(chi) / root, shape, shape), convergence


def fast_qsm(field: Tensor, mask: Tensor, zooms: Zooms, kernel: Tensor, shape: Shape) -> Tensor:
    r"""Second step: a map from :math:`\mathrm{sign}(D) \, F f` alone, without streaks.

    Frequencies of small kernels are replaced by those of the spherical mean, in two rounds, the
    second inside the mask; then scaled to the map of thresholded division.

    Returns
    -------
    (X, Y, Z) tensor
        The map (ppm) in the box of ``mask``, 0 outside.
    """
    # A power of 0 would be far from that of the smallest kernel, and rounding decides on which.
    power = kernel.abs().clamp_(min=ROUNDING) ** KERNEL_POWER
    # Frequencies that the half spectrum leaves out count, too.
    doubled = copies(shape, like=kernel).expand_as(power) > 1
    every = torch.cat([power.flatten(), power[doubled]])
    keep = 1 - falling(power, *percentiles(every, KERNEL_PERCENTILES))
    mean = ball_mean(shape, zooms, SMOOTHING_RADIUS, like=kernel)
    blend = keep + mean * (1 - keep)
    data = rfft(field, shape)
    chi = irfft(data * kernel.sign() * blend, shape, mask.shape) * mask
    chi = convolve(chi, blend, shape) * mask
    divided = torch.where(kernel.abs() > TKD_THRESHOLD, 1 / kernel, kernel.sign() / TKD_THRESHOLD)
    scale = irfft(data * divided, shape, mask.shape)
    slope, offset = _line(chi[mask], scale[mask])
    return (slope * chi + offset) * mask


def _line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Slope and offset of the straight line nearest to y over x."""
    x, y = x.double(), y.double()
    spread = x - x.mean()
    power = (spread @ spread).item()
    slope = (spread @ y).item() / power if power > 0 else 0.0
    return slope, (y.mean() - slope * x.mean()).item()


def smooth_weight(fast: Tensor, mask: Tensor, zooms: Zooms) -> Tensor:
    """Weights of the third step: 1 where fast QSM is smooth, 0 on its edges, along each axis.

    Returns
    -------
    (3, X, Y, Z) tensor
        0 also where a difference leaves the mask.
    """
    weights = gradient(fast, zooms).abs_()
    for axis, part in zip((-3, -2, -1), weights, strict=True):
        both = mask & _neighbour(mask, axis, -1)
        steps = part[both]
        if steps.numel():
            part.copy_(falling(part, *percentiles(steps, GRADIENT_PERCENTILES)) * both)
        else:
            part.zero_()
    return weights


def streaks(
    chi: Tensor,
    smooth: Tensor,
    cone: Tensor,
    zooms: Zooms,
    shape: Shape,
    *,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Convergence]:
    r"""Third step: :math:`\min_{x_a} \|w_G \nabla (\chi - F^{-1} C F x_a)\|^2` by LSMR from 0.

    Parameters
    ----------
    chi : (X, Y, Z) tensor
        The first map (ppm), on the grid ``shape``.
    smooth : (3, x, y, z) tensor
        w, in the box.
    cone : (X, Y, Z // 2 + 1) bool tensor
        C: frequencies of which the field says next to nothing.

    Returns
    -------
    (X, Y, Z) tensor
        :math:`F^{-1} C F x_a` (ppm), on the grid ``shape``.
    Convergence
    """
    # With this share of the number of voxels, one transform is the other's adjoint.
    root = copies(shape, like=chi).div_(chi.numel()).sqrt_()
    into, out = cone / root, cone * root
    box = smooth.shape[1:]
    x, y, z = box

    def rough(image: Tensor) -> Tensor:
        return gradient(image, zooms)[:, :x, :y, :z] * smooth

    def system(spectrum: Tensor) -> Tensor:
        return rough(irfft(torch.view_as_complex(spectrum) * into, shape, shape))

    def adjoint(vector: Tensor) -> Tensor:
        wide = vector.new_zeros((3, *shape))
        wide[:, :x, :y, :z] = vector * smooth
        return torch.view_as_real(rfft(gradient_adjoint(wide, zooms), shape).mul_(out))

    spectrum, convergence = lsmr(
        system, adjoint, rough(chi), tolerance=tolerance, max_iterations=max_iterations
    )
    return irfft(torch.view_as_complex(spectrum) * into, shape, shape), convergence
