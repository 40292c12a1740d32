"""ADMM for the methods with total variation, whatever their data term."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qsmpipe.numerics.balls import Balls
from qsmpipe.numerics.fourier import SPACE, Zooms, irfft, rfft
from qsmpipe.numerics.fused.data import data_split
from qsmpipe.numerics.fused.gradient import ALLOWED, OBSERVED, STEEP, Sums, gradient_split
from qsmpipe.numerics.fused.spectral import dipole_step
from qsmpipe.numerics.inversion.common import Window
from qsmpipe.numerics.kernels import dipole, laplacian
from qsmpipe.numerics.solvers import Convergence

SUPPORT = 0.1
"""Penalty of the split that holds the map at 0 beyond the reach, over that of the field's."""


@dataclass(frozen=True)
class Grid:
    """Where the map lives: the mask's window, and what the map may be in it."""

    window: Window
    zooms: Zooms
    kernel: Tensor
    """Dipole on the window's padded grid, half spectrum."""
    zone: Tensor
    """Bits of :mod:`qsmpipe.numerics.fused` on the padded grid."""
    edges: bool
    """Whether there are differences that cost nothing."""

    @classmethod
    def around(
        cls,
        field: Tensor,
        mask: Tensor,
        zooms: Zooms,
        b0_direction: Sequence[float],
        *,
        padding: float,
        reach: float,
        smooth: Tensor | None = None,
    ) -> "Grid":
        """Allow sources up to ``reach`` mm from the mask.

        ``smooth`` (3, X, Y, Z) is False where a difference costs nothing.
        """
        window = Window.around(field, mask, zooms, padding=padding, reach=reach)
        shape, (x, y, z) = window.shape, window.mask.shape
        kernel = dipole(shape, zooms, b0_direction, like=window.field)
        near = Balls.on_grid(window.mask, zooms, reach, like=window.field).touch(reach)
        zone = torch.zeros(shape, dtype=torch.uint8, device=field.device)
        zone[:x, :y, :z] = ALLOWED * near + OBSERVED * window.mask
        if smooth is not None:
            for bit, steep in zip(STEEP, window.place(~smooth), strict=True):
                zone[:x, :y, :z] += bit * steep
        return cls(window, zooms, kernel, zone, smooth is not None)


Split = Callable[[Tensor, Tensor], None]
"""What a data term does with field and dual: :func:`qsmpipe.numerics.fused.data_split`, say, with
all given but its first two arguments."""


def squared_misfit(measured: Tensor, weight: Tensor, *, mu: float) -> Split:
    r"""Make the data term :math:`\tfrac12 \|W (y - f)\|^2`, with f and W in the box."""
    squared = weight.square()
    return partial(data_split, measured=measured, trust=squared / (squared + mu))


class TotalVariation:
    r"""ADMM for :math:`\min_\chi g(D \chi) + \lambda \|\nabla \chi\|_1`.

    :math:`\nabla \chi`, :math:`D \chi` and :math:`\chi` beyond the reach are split off: every step
    solves for :math:`\chi` by one division in k-space, shrinks the gradient, and leaves the field
    to the data term. A step costs two pairs of Fourier transforms.

    Parameters
    ----------
    grid : Grid
        Where the map lives.
    rho : float
        Penalty of the gradient's split, over :math:`\lambda`: gradients below 1 / rho are shrunk
        to 0.
    mu : float
        Penalty of the field's split.
    """

    states = 3
    """Components that the splits of the regularisation have."""

    def __init__(self, grid: Grid, *, rho: float, mu: float) -> None:
        self.grid, self.rho, self.mu, self.support = grid, rho, mu, SUPPORT * mu
        self.restart()

    def restart(self) -> None:
        """Go to where everything is 0."""
        like, shape = self.grid.window.field, self.grid.window.shape
        self.state = like.new_zeros((self.states, *shape))
        self.image, self.right = like.new_zeros(shape), like.new_zeros(shape)
        self.escape = like.new_zeros(shape)
        kernel = self.grid.kernel
        self.predicted = torch.zeros_like(kernel, dtype=kernel.dtype.to_complex())
        self.residual, self.dual = torch.zeros_like(like), torch.zeros_like(like)
        self.fresh = True

    def run(
        self, split: Split, *, lambda_: float, tolerance: float, max_iterations: int
    ) -> Convergence:
        """Iterate from where it stands until the map changes by less than ``tolerance``.

        That is a fraction of the map's norm in the mask. Scaled duals of the regularisation mean
        the same under any ``lambda_``, so that one run may follow on another.
        """
        self.lambda_ = lambda_
        self._prepare()
        if self.fresh:
            split(self.residual, self.dual)
        change, iterations, self.fresh = float("inf"), 0, False
        while iterations < max_iterations and change > tolerance:
            change = self._step().relative_change
            self.residual = self.field()
            split(self.residual, self.dual)
            iterations += 1
        return Convergence(change <= tolerance, iterations, change, tolerance)

    def _prepare(self) -> None:
        kernel, window = self.grid.kernel, self.grid.window
        inverse = laplacian(window.shape, self.grid.zooms, like=kernel)
        inverse.mul_(self.lambda_ * self.rho).addcmul_(kernel, kernel, value=self.mu)
        self.inverse = inverse.add_(self.support).reciprocal_()

    def _step(self) -> Sums:
        self._solve()
        return gradient_split(
            self.image,
            self.right,
            self.state,
            self.grid.zone,
            self.grid.zooms,
            threshold=1 / self.rho,
            weight=self.lambda_ * self.rho,
            edges=self.grid.edges,
            escape=self.escape,
            escape_weight=self.support,
            out=self.right,
        )

    def _solve(self) -> None:
        """Find the map of the next step; the one before it stands in ``right`` then."""
        shape = self.grid.window.shape
        spectrum = rfft(self.right, shape)
        self.right = self.image
        dipole_step(
            spectrum,
            rfft(self.residual, shape),
            self.predicted,
            self.grid.kernel,
            self.inverse,
            self.mu,
        )
        self.image = irfft(spectrum, shape, shape, overwrite=True)

    def field(self) -> Tensor:
        """Field of the map, in the window's box."""
        window = self.grid.window
        return irfft(self.predicted, window.shape, window.mask.shape).contiguous()

    def variation(self) -> float:
        """Total variation of the map, over the whole grid."""
        total = 0.0
        for axis, zoom in zip(SPACE, self.grid.zooms, strict=True):
            steps = (self.image.roll(-1, axis) - self.image).abs_()
            total += steps.sum(dtype=torch.float64).item() / zoom
        return total

    def map(self) -> Tensor:
        """Give the map on the image's grid, 0 outside the mask."""
        return self.grid.window.back(self.image)
