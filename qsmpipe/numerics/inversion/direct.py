"""Dipole inversion by one division in k-space."""

from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias, get_args

import torch
from annotated_types import Interval
from torch import Tensor

from qsmpipe.numerics.fourier import Shape, Zooms, copies, irfft, rfft
from qsmpipe.numerics.inversion.choice import Trial, choose, expected_residual, geometric
from qsmpipe.numerics.inversion.common import Susceptibility, Window
from qsmpipe.numerics.kernels import AXIAL, dipole, laplacian_lines, scale
from qsmpipe.numerics.noise import data_weight
from qsmpipe.numerics.parameters import Positive, checked

PADDING = 1.0
"""Zeros beyond the mask's box, as a fraction of it. On a head-like phantom of 64 mm with noise,
more changed a map by 3 % (TKD) and 8 % (L2) of its norm; half of it by 4 % and 12 %, none by 17 %
and 26 %. Two transforms are cheap, even of eight times the box."""

DEFAULT_THRESHOLD = 0.15
"""Least dipole kernel that :func:`tkd` and :func:`tsvd` divide by."""

ROUNDING = 1e-6
"""A kernel below this is 0. Many frequencies lie exactly on its cone, where rounding would decide
on the sign of the largest value of the filter: float32 and float64 maps differed by 6 %."""

Prior: TypeAlias = Literal["gradient", "identity", "laplacian"]
"""Whose square is penalised: the map's gradient, the map itself, or its Laplacian."""

DEFAULT_LAMBDA = 5e-3
"""Weight of the penalty in :func:`l2` (mm2 for the gradient)."""

CANDIDATES = geometric(1e-5, 1.0, 11)
"""Weights that a rule chooses from, whatever the prior."""


@checked
def tkd(
    field: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    b0_direction: Sequence[float] = AXIAL,
    threshold: Annotated[float, Interval(gt=0, le=2 / 3)] = DEFAULT_THRESHOLD,
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
        Least size of the dipole kernel that is divided by, without unit: :math:`\delta`. The
        kernel runs from -2/3 to 1/3.

    Returns
    -------
    Susceptibility

    References
    ----------
    .. [1] Shmueli et al. Magn Reson Med 62 (2009) 1510, doi:10.1002/mrm.22135
    """
    window = Window.around(field, mask, zooms, padding=PADDING)

    def inverse(planes: slice) -> Tensor:
        kernel = dipole(window.shape, zooms, b0_direction, planes=planes, like=window.field)
        size = kernel.abs()
        nothing = size <= ROUNDING
        inverse = torch.copysign(size.clamp_(min=threshold), kernel).reciprocal_()
        return inverse.masked_fill_(nothing, 0)

    return Susceptibility(window.filtered(inverse), None)


@checked
def tsvd(
    field: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    b0_direction: Sequence[float] = AXIAL,
    threshold: Annotated[float, Interval(gt=0, le=2 / 3)] = DEFAULT_THRESHOLD,
) -> Susceptibility:
    r"""Invert the dipole by truncated singular value decomposition [1]_.

    Its singular vectors are the waves, its singular values the kernel: :math:`1 / D` where
    :math:`|D| > \delta`, and 0 elsewhere. What :func:`tkd` guesses stays out, so that the map has
    less noise and more of a halo around sources.

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
        Least size of the dipole kernel that is divided by, without unit: :math:`\delta`. The
        kernel runs from -2/3 to 1/3.

    Returns
    -------
    Susceptibility

    References
    ----------
    .. [1] Wharton, Schaefer, Bowtell. Magn Reson Med 63 (2010) 1292, doi:10.1002/mrm.22334
    """
    window = Window.around(field, mask, zooms, padding=PADDING)

    def inverse(planes: slice) -> Tensor:
        kernel = dipole(window.shape, zooms, b0_direction, planes=planes, like=window.field)
        # Some kernels are as large as a round threshold: rounding must not divide them.
        nothing = kernel.abs() <= threshold + ROUNDING
        return kernel.reciprocal_().masked_fill_(nothing, 0)

    return Susceptibility(window.filtered(inverse), None)


def penalty(
    prior: Prior, shape: Shape, zooms: Zooms, *, planes: slice = slice(None), like: Tensor
) -> Tensor:
    """Eigenvalues of what a prior penalises, squared: L, 1 or L2, as a half spectrum.

    Per mm2, without unit, per mm4; L are those of minus the Laplacian. Of the first axis those at
    ``planes``.

    Raises
    ------
    ValueError
        If there is no such prior.
    """
    if prior not in get_args(Prior):
        msg = f"prior is {prior!r}: choose from {', '.join(get_args(Prior))}"
        raise ValueError(msg)
    if prior == "identity":
        return like.new_ones((len(range(shape[0])[planes]), shape[1], shape[2] // 2 + 1))
    x, y, z = laplacian_lines(shape, zooms, like=like)
    smooth = x[planes] + y + z
    return smooth if prior == "gradient" else smooth**2


def penalty_norm(spectrum: Tensor, weight: Tensor, shape: Shape) -> float:
    """Norm of what a prior penalises of the map with this half spectrum (Parseval)."""
    power = spectrum.abs().square_().mul_(weight).mul_(copies(shape, like=weight))
    return (power.sum(dtype=torch.float64) / (shape[0] * shape[1] * shape[2])).item() ** 0.5


@checked
def l2(
    field: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    b0_direction: Sequence[float] = AXIAL,
    noise: Tensor | None = None,
    prior: Prior = "gradient",
    lambda_: Positive | Literal["l-curve", "discrepancy"] = DEFAULT_LAMBDA,
) -> Susceptibility:
    r"""Invert the dipole with a squared penalty as regularisation, in closed form [1]_.

    .. math:: \min_\chi \tfrac12 \|D \chi - f\|^2 + \tfrac{\lambda}{2} \|P \chi\|^2

    is solved by the filter :math:`D / (D^2 + \lambda L)` with the eigenvalues L of
    :math:`P^T P`; 0 at zero frequency. P is the gradient, the identity or the Laplacian. The
    field counts as 0 outside the mask; :func:`.tikhonov.tikhonov` takes it for unknown there.

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
        Standard deviation of ``field``, in its unit. Read by the rules for ``lambda_`` alone,
        whose residual it weights; "discrepancy" needs it.
    prior : {"gradient", "identity", "laplacian"}
        What is penalised, P: the map's gradient, the map itself, or its Laplacian.
    lambda_ : float, "l-curve" or "discrepancy"
        Weight of the penalty, :math:`\lambda` (mm2 for the gradient, no unit for the identity, mm4
        for the Laplacian), or the rule that chooses it from :data:`CANDIDATES`
        (:func:`.choice.choose`). It holds whatever the unit of the field.

    Returns
    -------
    Susceptibility

    References
    ----------
    .. [1] Bilgic et al. J Magn Reson Imaging 40 (2014) 181, doi:10.1002/jmri.24365
    """
    window = Window.around(field, mask, zooms, padding=PADDING)
    shape = window.shape

    def inverse(planes: slice, weight: float) -> Tensor:
        kernel = dipole(shape, zooms, b0_direction, planes=planes, like=window.field)
        smooth = penalty(prior, shape, zooms, planes=planes, like=window.field)
        denominator = kernel.square().add_(smooth, alpha=weight)
        if planes.start == 0:
            denominator[0, 0, 0] = torch.inf
        return kernel.div_(denominator)

    if not isinstance(lambda_, str):
        return Susceptibility(window.filtered(lambda planes: inverse(planes, lambda_)), None)
    whole = slice(0, shape[0])
    kernel = dipole(shape, zooms, b0_direction, like=window.field)
    smooth = penalty(prior, shape, zooms, like=window.field)
    data = rfft(window.field, shape)

    def solve(weight: float) -> Tensor:
        return scale(data.clone(), inverse(whole, weight))

    trust = window.place(data_weight(mask, noise, field))

    def tried(weight: float) -> Trial:
        spectrum = solve(weight)
        residual = irfft(spectrum * kernel, shape, trust.shape).sub_(window.field).mul_(trust)
        return Trial(residual.norm().item(), penalty_norm(spectrum, smooth, shape))

    expected = expected_residual(mask, noise)
    curve = choose(tried, CANDIDATES, lambda_, expected=expected, fallback=DEFAULT_LAMBDA)
    weight = curve.lambda_
    chi = irfft(solve(weight), shape, window.mask.shape)
    return Susceptibility(window.back(chi), None, {"lambda_": weight}, curve)
