"""Dipole inversion that leaves room for a harmonic field: what is left of the background."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms, irfft, rfft
from qsmpipe.numerics.fused.data import data_split
from qsmpipe.numerics.fused.spectral import harmonic_step
from qsmpipe.numerics.inversion.admm import Grid, TotalVariation
from qsmpipe.numerics.inversion.common import (
    Susceptibility,
    follow_noise,
    phase_scale,
)
from qsmpipe.numerics.inversion.nonlinear import DEFAULT_MU, run_on_phase
from qsmpipe.numerics.inversion.tv import (
    DEFAULT_MAX_ITERATIONS,
    DEFAULT_RHO,
    DEFAULT_TOLERANCE,
    LAMBDA_PER_NOISE,
    PADDING,
)
from qsmpipe.numerics.kernels import AXIAL, laplacian
from qsmpipe.numerics.noise import data_weight
from qsmpipe.numerics.parameters import Count, NotNegative, Positive, checked

REACH = 0.0
"""Distance from the mask (mm) up to which there may be sources. The field of sources outside is
harmonic inside, and the remnant takes it: 3 and 8 mm raised the error on all phantoms, also on
those with sources in a shell of 3 mm around the mask, and took more steps."""

DEFAULT_BETA = 150.0
"""Weight of the remnant's squared Laplacian (mm4)."""
DEFAULT_NU = 3.0
"""Penalty of the Laplacian's split (mm4)."""


@checked
def whqsm(
    field: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    b0_direction: Sequence[float] = AXIAL,
    noise: Tensor | None = None,
    echo_times: Sequence[float] | None = None,
    field_strength: float | None = None,
    lambda_: Positive | Literal["auto"] = "auto",
    beta: Positive = DEFAULT_BETA,
    rho: Positive = DEFAULT_RHO,
    mu: Positive = DEFAULT_MU,
    nu: Positive = DEFAULT_NU,
    tolerance: NotNegative = DEFAULT_TOLERANCE,
    max_iterations: Count = DEFAULT_MAX_ITERATIONS,
) -> Susceptibility:
    r"""Invert the dipole and find a nearly harmonic remnant of the background, by ADMM [1]_.

    .. math::
        \min_{\chi, h} \tfrac{1}{2 s^2} \|W (e^{i s (D \chi + h)} - e^{i s f})\|^2
        + \lambda \|\nabla \chi\|_1 + \tfrac{\beta}{2} \|M \Delta h\|^2

    over the maps that are 0 outside the mask M, with s the phase (rad) of 1 ppm. Fields of
    sources outside the mask cost nothing in h, nor does the part of the local field that could
    have come from there: of a field without remnant :func:`.nonlinear.nltv` makes more (error 16 %
    against 19 % on a noisy phantom). After background removal there is a remnant: on a whole
    simulated head after PDF the error was 30 %, against 39 % without h.

    The paper solves for :math:`\chi` and h in turn; here a step solves for both together, which
    settles in tens of steps instead of hundreds, at three pairs of Fourier transforms.

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
        Standard deviation of ``field`` (ppm), for W and ``lambda_`` as in :func:`.tv.tv`.
    echo_times : sequence of float, optional
        Echo times (s); with ``field_strength`` they give s (:func:`.common.phase_scale`).
    field_strength : float, optional
        B0 (T).
    lambda_ : float or "auto"
        Weight of the total variation, :math:`\lambda` (ppm mm), or "auto", which follows the
        noise. Both are those of :func:`.tv.tv`, at any s.
    beta : float
        Weight of the remnant's squared Laplacian, :math:`\beta` (mm4), beside data of weight 1.
        The larger, the nearer to harmonic.
    rho : float
        Penalty of the gradient's split over ``lambda_`` (mm/ppm): speed only.
    mu : float
        Penalty of the field's split, without unit: speed only.
    nu : float
        Penalty of the Laplacian's split (mm4): speed only.
    tolerance : float
        Stop when the map changes by less than this fraction of its norm inside the mask.
    max_iterations : int
        Iterations at most, the linear steps not counted.

    Returns
    -------
    Susceptibility
        ``change`` is the relative change of the map.

    References
    ----------
    .. [1] Milovic et al. Magn Reson Med 81 (2019) 1399, doi:10.1002/mrm.27483
    """
    lambda_, chosen = follow_noise(lambda_, LAMBDA_PER_NOISE, mask, noise)
    per_ppm = phase_scale(field_strength, echo_times)
    grid = Grid.around(per_ppm * field, mask, zooms, b0_direction, padding=PADDING, reach=REACH)
    solver = WeakHarmonic(grid, rho=rho / per_ppm, mu=mu, beta=beta, nu=nu)
    return run_on_phase(
        solver,
        data_weight(mask, noise, field),
        per_ppm,
        chosen,
        lambda_=lambda_,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )


class WeakHarmonic(TotalVariation):
    r"""ADMM for :math:`g(D \chi + h) + \lambda \|\nabla \chi\|_1 + \tfrac\beta2 \|M \Delta h\|^2`.

    :math:`\Delta h` is split off, too, and every step solves for :math:`\chi` and h together.
    """

    def __init__(self, grid: Grid, *, rho: float, mu: float, beta: float, nu: float) -> None:
        self.nu = nu
        self.rigid = grid.window.mask.to(grid.kernel) * (beta / (beta + nu))
        self.flat = torch.zeros_like(self.rigid)
        super().__init__(grid, rho=rho, mu=mu)

    def restart(self) -> None:
        """Go to where everything is 0."""
        super().restart()
        self.remnant = torch.zeros_like(self.predicted)
        self.bend, self.bend_dual = torch.zeros_like(self.flat), torch.zeros_like(self.flat)

    def _prepare(self) -> None:
        grid = self.grid
        self.smooth = laplacian(grid.window.shape, grid.zooms, like=grid.kernel)

    def _solve(self) -> Tensor:
        shape, box = self.grid.window.shape, self.grid.window.mask.shape
        spectrum, bend = self.right, rfft(self.bend, shape)
        del self.right
        harmonic_step(
            spectrum,
            rfft(self.residual, shape),
            bend,
            self.predicted,
            self.remnant,
            self.grid.kernel,
            self.smooth,
            weights=(self.lambda_ * self.rho, self.mu, self.nu, self.support),
        )
        self.bend = irfft(bend, shape, box, overwrite=True)
        del bend
        data_split(self.bend, self.bend_dual, self.flat, self.rigid)
        return irfft(spectrum, shape, shape, overwrite=True)

    def harmonic(self) -> Tensor:
        """Give the remnant on the image's grid, 0 outside the mask."""
        window = self.grid.window
        return window.back(irfft(self.remnant, window.shape, window.mask.shape))
