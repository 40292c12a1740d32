"""ADMM for the methods with total variation, whatever their data term."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qsmpipe.numerics.fourier import SPACE, Zooms, irfft, rfft
from qsmpipe.numerics.fused.data import data_split
from qsmpipe.numerics.fused.gradient import ALLOWED, OBSERVED, STEEP, Sums, gradient_split
from qsmpipe.numerics.fused.spectral import dipole_step
from qsmpipe.numerics.inversion.common import Window
from qsmpipe.numerics.kernels import dipole, laplacian_lines
from qsmpipe.numerics.masks.morphology import dilate
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
    """Bits of :mod:`qsmpipe.numerics.fused` in the box."""
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
        # Differences are counted in the box: the rim has those between sources and nothing.
        window = Window.around(field, mask, zooms, padding=padding, reach=reach, rim=1)
        kernel = dipole(window.shape, zooms, b0_direction, like=window.field)
        near = dilate(window.mask, zooms, radius=reach)
        zone = ALLOWED * near.to(torch.uint8) + OBSERVED * window.mask.to(torch.uint8)
        if smooth is not None:
            for bit, steep in zip(STEEP, window.place(~smooth), strict=True):
                zone += bit * steep
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
    to the data term. A step costs two pairs of Fourier transforms. Only the map's Fourier
    transform, its predicted field and the dual that holds it at 0 have the size of the padded
    grid; all else has that of the box.

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

    def __init__(self, grid: Grid, *, rho: float, mu: float) -> None:
        self.grid, self.rho, self.mu, self.support = grid, rho, mu, SUPPORT * mu
        self.restart()

    def restart(self) -> None:
        """Go to where everything is 0."""
        like, kernel = self.grid.window.field, self.grid.kernel
        self.chi = torch.zeros_like(like)
        """Map of the last step, in the box."""
        self.state = like.new_zeros((3, *like.shape))
        self.escape = like.new_zeros(self.grid.window.shape)
        self.right = torch.zeros_like(kernel, dtype=kernel.dtype.to_complex())
        """What the regularisation asks of the next step, in k-space."""
        self.predicted = torch.zeros_like(self.right)
        """Field of the map, in k-space."""
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
        window = self.grid.window
        self.lines = laplacian_lines(window.shape, self.grid.zooms, like=self.grid.kernel)

    def _step(self) -> Sums:
        image, shape = self._solve(), self.grid.window.shape
        right = torch.empty_like(image)
        sums = gradient_split(
            image,
            self.chi,
            self.state,
            self.grid.zone,
            self.grid.zooms,
            threshold=1 / self.rho,
            weight=self.lambda_ * self.rho,
            edges=self.grid.edges,
            escape=self.escape,
            escape_weight=self.support,
            out=right,
        )
        del image  # volumes are large: hold none longer than needed
        self.right = rfft(right, shape)
        return sums

    def _solve(self) -> Tensor:
        """Find the map of the next step, on the whole grid; ``right`` is used up."""
        shape, spectrum = self.grid.window.shape, self.right
        del self.right
        dipole_step(
            spectrum,
            rfft(self.residual, shape),
            self.predicted,
            self.grid.kernel,
            self.lines,
            weights=(self.lambda_ * self.rho, self.mu, self.support),
        )
        return irfft(spectrum, shape, shape, overwrite=True)

    def field(self) -> Tensor:
        """Field of the map, in the window's box."""
        window = self.grid.window
        return irfft(self.predicted, window.shape, window.mask.shape)

    def variation(self) -> float:
        """Total variation of the map, in the box."""
        total = 0.0
        for axis, zoom in zip(SPACE, self.grid.zooms, strict=True):
            total += self.chi.diff(dim=axis).abs_().sum(dtype=torch.float64).item() / zoom
        return total

    def map(self) -> Tensor:
        """Give the map on the image's grid, 0 outside the mask."""
        return self.grid.window.back(self.chi)
