"""Dipole inversion by gradient descent on the phase: NDI."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms, irfft, rfft
from qsmpipe.numerics.inversion.common import (
    Susceptibility,
    Window,
    phase_scale,
)
from qsmpipe.numerics.kernels import AXIAL, dipole
from qsmpipe.numerics.noise import data_weight
from qsmpipe.numerics.parameters import Count, NotNegative, Positive, checked
from qsmpipe.numerics.solvers import Convergence

PADDING = 0.5
"""Zeros beyond the mask's box, as a fraction of it."""

DEFAULT_STEP = 1.0
DEFAULT_ALPHA = 0.0
DEFAULT_TOLERANCE = 5e-3
DEFAULT_MAX_ITERATIONS = 200


@checked
def ndi(
    field: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    b0_direction: Sequence[float] = AXIAL,
    noise: Tensor | None = None,
    echo_times: Sequence[float] | None = None,
    field_strength: float | None = None,
    step: Positive = DEFAULT_STEP,
    alpha: NotNegative = DEFAULT_ALPHA,
    tolerance: NotNegative = DEFAULT_TOLERANCE,
    max_iterations: Count = DEFAULT_MAX_ITERATIONS,
) -> Susceptibility:
    r"""Invert the dipole by gradient descent on the phase, stopped early [1]_.

    Descent on :math:`\| W (e^{i D \chi} - e^{i f}) \|^2 + \tfrac{\alpha}{2} \| \chi \|^2`, in
    radians and from 0:

    .. math:: \chi \leftarrow \chi - \tau \left(2 D W^2 \sin(D \chi - f) + \alpha \chi\right)

    What the field determines well is there after a few steps, what is near the cone of the
    dipole comes late, with its noise: the number of steps is the regularisation. The map is free
    on the whole padded grid, and masked at the end.

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
        Standard deviation of ``field``, in any unit: W is its median inside ``mask`` over itself,
        at most 1 (larger weights would need smaller steps), 0 where it is 0 or not finite. W = 1
        without it.
    echo_times, field_strength : sequence of float, float, optional
        s and T: the field in ppm times :func:`.common.phase_scale` is f.
    step : float
        Length of a step, :math:`\tau`, without unit. From 2.25 on, steps grow.
    alpha : float
        Tikhonov regularisation, :math:`\alpha`, without unit; 0: none.
    tolerance : float
        Stop when the map changes by less than this fraction of its norm inside the mask.
    max_iterations : int
        Iterations at most.

    Returns
    -------
    Susceptibility
        ``change`` is the relative change of the map.

    References
    ----------
    .. [1] Polak et al. NMR Biomed 33 (2020) e4271, doi:10.1002/nbm.4271
    """
    window = Window.around(field, mask, zooms, padding=PADDING)
    shape, box, inside = window.shape, window.mask.shape, window.mask
    scale = phase_scale(field_strength, echo_times)
    squared = window.place(data_weight(mask, noise, field, largest=1.0)).square_()
    phase = window.field * scale
    kernel = dipole(shape, zooms, b0_direction, like=field)

    spectrum = torch.zeros_like(kernel, dtype=kernel.dtype.to_complex())
    image = torch.zeros_like(phase)
    change, iterations = float("inf"), 0
    while iterations < max_iterations and change > tolerance:
        misfit = irfft(spectrum * kernel, shape, box, overwrite=True).sub_(phase).sin_()
        slope = rfft(misfit.mul_(squared), shape).mul_(kernel).mul_(2 * step)
        spectrum.mul_(1 - step * alpha).sub_(slope)
        previous, image = image, irfft(spectrum, shape, box)
        iterations += 1
        gap, size = (image - previous)[inside].norm().item(), image[inside].norm().item()
        change = 0.0 if gap == 0 else gap / size if size > 0 else float("inf")
    return Susceptibility(
        window.back(image / scale), Convergence(change <= tolerance, iterations, change, tolerance)
    )
