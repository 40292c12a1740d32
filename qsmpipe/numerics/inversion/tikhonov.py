"""Dipole inversion with a squared penalty, the data weighted by mask and noise."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms, irfft, rfft
from qsmpipe.numerics.inversion.choice import Trial, choose, expected_residual, geometric
from qsmpipe.numerics.inversion.common import Susceptibility, Window
from qsmpipe.numerics.inversion.direct import Prior, penalty, penalty_norm
from qsmpipe.numerics.kernels import AXIAL, dipole
from qsmpipe.numerics.noise import data_weight
from qsmpipe.numerics.parameters import Count, NotNegative, Positive, checked
from qsmpipe.numerics.solvers import Convergence, conjugate_gradient

PADDING = 0.5
"""Zeros beyond the mask's box, as a fraction of it."""

DEFAULT_LAMBDA = 1e-2
"""Weight of the penalty (mm2 for the gradient). On head-like phantoms of 64 ml with a noise of 0,
0.001 and 0.005 ppm, within a quarter of the error of the best weight."""
CANDIDATES = geometric(1e-5, 1.0, 11)
"""Weights that a rule chooses from, whatever the prior."""
DEFAULT_TOLERANCE = 1e-3
DEFAULT_MAX_ITERATIONS = 100


@checked
def tikhonov(
    field: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    b0_direction: Sequence[float] = AXIAL,
    noise: Tensor | None = None,
    prior: Prior = "gradient",
    lambda_: Positive | Literal["l-curve", "discrepancy"] = DEFAULT_LAMBDA,
    tolerance: NotNegative = DEFAULT_TOLERANCE,
    max_iterations: Count = DEFAULT_MAX_ITERATIONS,
) -> Susceptibility:
    r"""Invert the dipole with a squared penalty, trusting the data where they are good [1]_.

    .. math:: \min_\chi \tfrac12 \|W (D \chi - f)\|^2 + \tfrac{\lambda}{2} \|P \chi\|^2

    over the maps that are 0 outside the mask, by conjugate gradients on the normal equations; a
    step costs two pairs of Fourier transforms. Unlike in :func:`.direct.l2` the field outside the
    mask is unknown, not 0.

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
        Standard deviation of ``field``: W is its median inside ``mask`` over itself. Voxels where
        it is 0 or not finite count as unknown. W = 1 without it. For "discrepancy" it is needed,
        in the unit of ``field``.
    prior : {"gradient", "identity", "laplacian"}
        What is penalised, P: the map's gradient, the map itself, or its Laplacian.
    lambda_ : float, "l-curve" or "discrepancy"
        Weight of the penalty, :math:`\lambda` (mm2 for the gradient, no unit for the identity, mm4
        for the Laplacian), or the rule that chooses it from :data:`CANDIDATES`
        (:func:`.choice.choose`). It holds whatever the unit of the field.
    tolerance : float
        Stop when the residual of the normal equations is this fraction of its first norm.
    max_iterations : int
        Iterations at most.

    Returns
    -------
    Susceptibility
        ``change`` is the relative residual of the normal equations.

    References
    ----------
    .. [1] de Rochefort et al. Magn Reson Med 63 (2010) 194, doi:10.1002/mrm.22187
    """
    window = Window.around(field, mask, zooms, padding=PADDING)
    shape, inside = window.shape, window.mask
    weight = window.place(data_weight(mask, noise, field))
    squared = weight**2
    kernel = dipole(shape, zooms, b0_direction, like=field)
    smooth = penalty(prior, shape, zooms, like=field)
    right = irfft(rfft(squared * window.field, shape).mul_(kernel), shape, inside.shape) * inside

    def solve(lambda_: float, start: Tensor | None = None) -> tuple[Tensor, Convergence]:
        def system(chi: Tensor) -> Tensor:
            spectrum = rfft(chi, shape)
            predicted = irfft(spectrum * kernel, shape, inside.shape, overwrite=True)
            spectrum.mul_(smooth).mul_(lambda_).add_(rfft(squared * predicted, shape).mul_(kernel))
            return irfft(spectrum, shape, inside.shape, overwrite=True) * inside

        return conjugate_gradient(
            system, right, start=start, tolerance=tolerance, max_iterations=max_iterations
        )

    if not isinstance(lambda_, str):
        chi, convergence = solve(lambda_)
        return Susceptibility(window.back(chi), convergence)

    chi = torch.zeros_like(window.field)

    def tried(lambda_: float) -> Trial:
        chi.copy_(solve(lambda_, chi)[0])
        spectrum = rfft(chi, shape)
        size = penalty_norm(spectrum, smooth, shape)
        residual = irfft(spectrum.mul_(kernel), shape, inside.shape).sub_(window.field)
        return Trial(residual.mul_(weight).norm().item(), size)

    expected = expected_residual(mask, noise)
    curve = choose(tried, CANDIDATES, lambda_, expected=expected, fallback=DEFAULT_LAMBDA)
    chosen = curve.lambda_
    # From 0 again, so that the weight given as a number gives this very map.
    chi, convergence = solve(chosen)
    return Susceptibility(window.back(chi), convergence, {"lambda_": chosen}, curve)
