"""Dipole inversion by one division in k-space."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qsmpipe.numerics.fourier import Shape, Zooms
from qsmpipe.numerics.inversion.common import Susceptibility, Window, positive
from qsmpipe.numerics.kernels import AXIAL, dipole, laplacian

PADDING = 1.0
"""Zeros beyond the mask's box, as a fraction of it. On a head-like phantom of 64 mm with noise,
more changed a map by 3 % (TKD) and 8 % (L2) of its norm; half of it by 4 % and 12 %, none by 17 %
and 26 %. Two transforms are cheap, even of eight times the box."""

DEFAULT_THRESHOLD = 0.15
"""Least dipole kernel that :func:`tkd` divides by."""

ROUNDING = 1e-6
"""A kernel below this is 0. Many frequencies lie exactly on its cone, where rounding would decide
on the sign of the largest value of the filter: float32 and float64 maps differed by 6 %."""

DEFAULT_LAMBDA = 5e-3
"""Weight (mm2) of the squared gradient in :func:`l2`."""


def tkd(
    field: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    b0_direction: Sequence[float] = AXIAL,
    threshold: float = DEFAULT_THRESHOLD,
) -> Susceptibility:
    r"""Invert the dipole by thresholded k-space division [1]_.

    Where the kernel :math:`|D| > \delta` the filter is 1 / D, elsewhere
    :math:`\mathrm{sign}(D) / \delta`, with sign(0) = 0: the zero frequency stays 0, since the
    field says nothing about the mean susceptibility, and so does all else that the dipole cancels.

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
        :math:`\delta`, above 0, without unit; the kernel runs from -2/3 to 1/3.

    Returns
    -------
    Susceptibility

    References
    ----------
    .. [1] Shmueli et al. Magn Reson Med 62 (2009) 1510, doi:10.1002/mrm.22135
    """
    positive(threshold=threshold)
    window = Window.around(field, mask, zooms, padding=PADDING)

    def inverse(shape: Shape) -> Tensor:
        kernel = dipole(shape, zooms, b0_direction, like=window.field)
        signs = torch.where(kernel.abs() > ROUNDING, kernel.sign(), 0.0)
        return torch.where(kernel.abs() > threshold, 1 / kernel, signs / threshold)

    return Susceptibility(window.filtered(inverse), None)


def l2(
    field: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    b0_direction: Sequence[float] = AXIAL,
    lambda_: float = DEFAULT_LAMBDA,
) -> Susceptibility:
    r"""Invert the dipole with the squared gradient as regularisation, in closed form [1]_.

    .. math:: \min_\chi \tfrac12 \|D \chi - f\|^2 + \tfrac{\lambda}{2} \|\nabla \chi\|^2

    is solved by the filter :math:`D / (D^2 + \lambda L)` with the eigenvalues L of
    :math:`\nabla^T \nabla`; 0 at zero frequency.

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
    lambda_ : float
        Weight of the squared gradient (mm2), whatever the unit of the field.

    Returns
    -------
    Susceptibility

    References
    ----------
    .. [1] Bilgic et al. J Magn Reson Imaging 40 (2014) 181, doi:10.1002/jmri.24365
    """
    positive(lambda_=lambda_)
    window = Window.around(field, mask, zooms, padding=PADDING)

    def inverse(shape: Shape) -> Tensor:
        kernel = dipole(shape, zooms, b0_direction, like=window.field)
        denominator = kernel**2 + lambda_ * laplacian(shape, zooms, like=window.field)
        denominator[0, 0, 0] = torch.inf
        return kernel / denominator

    return Susceptibility(window.filtered(inverse), None)
