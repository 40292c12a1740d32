"""Fields of sources far away: solid harmonics of low order, fitted where there are data."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.fused.polynomials import moments_along, subtract_along


def solid_harmonics(order: int) -> tuple[list[tuple[int, int, int]], Tensor]:
    """Powers of x, y and z up to ``order`` together, and the harmonic polynomials made of them.

    Returns
    -------
    powers : list of tuple of int
    basis : (N, powers) tensor
        Orthonormal coefficients of the (order + 1)^2 polynomials whose Laplacian is 0.
    """
    triples = itertools.product(range(order + 1), range(order + 1), range(order + 1))
    powers = [p for p in triples if sum(p) <= order]
    place = {power: number for number, power in enumerate(powers)}
    laplacian = torch.zeros(len(powers), len(powers), dtype=torch.float64)
    for power, number in place.items():
        for axis, n in enumerate(power):
            if n > 1:
                i, j, k = (m - 2 if a == axis else m for a, m in enumerate(power))
                lower = (i, j, k)
                laplacian[place[lower], number] = n * (n - 1)
    _, sizes, rows = torch.linalg.svd(laplacian)
    return powers, rows[int((sizes > 1e-9 * sizes.max()).sum()) if order > 1 else 0 :]


@dataclass(frozen=True)
class FarField:
    """Weighted least-squares fit of solid harmonics to images of one grid."""

    weight: Tensor
    """Squared weights, (X, Y, Z)."""
    axes: tuple[Tensor, Tensor, Tensor]
    """Powers of each coordinate from -1 to 1, (size, order + 1) in float64."""
    fit: Tensor
    """From the moments of an image to the coefficients of its fit, both by :attr:`powers`."""
    powers: list[tuple[int, int, int]]

    @classmethod
    def on_grid(cls, weight: Tensor, zooms: Zooms, *, order: int) -> "FarField":
        """Prepare the fit under squared weights ``weight`` (X, Y, Z)."""
        length = max(n * zoom for n, zoom in zip(weight.shape, zooms, strict=True)) / 2
        lines = [
            (torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * (zoom / length)
            for n, zoom in zip(weight.shape, zooms, strict=True)
        ]
        powers, basis = solid_harmonics(order)
        high = [line[:, None] ** torch.arange(2 * order + 1) for line in lines]
        moments = _moments(torch.ones_like(weight), weight, high)
        gram = torch.tensor(
            [[moments[tuple(map(sum, zip(p, q, strict=True)))] for q in powers] for p in powers],
            dtype=torch.float64,
        )
        inverse = torch.linalg.pinv(basis @ gram @ basis.T, hermitian=True, rtol=1e-9)
        x, y, z = (table[:, : order + 1].contiguous() for table in high)
        return cls(weight, (x, y, z), basis.T @ inverse @ basis, powers)

    def remove(self, image: Tensor) -> Tensor:
        """``image`` (X, Y, Z) less its fit."""
        order = self.axes[0].shape[1] - 1
        moments = _moments(image, self.weight, self.axes)
        found = torch.stack([moments[power] for power in self.powers])
        coefficients = torch.zeros((order + 1,) * 3, dtype=torch.float64)
        for power, value in zip(self.powers, self.fit @ found, strict=True):
            coefficients[power] = value
        x, y, z = self.axes
        profiles = torch.einsum("abc,xa,zc->xbz", coefficients, x, z).contiguous()
        return subtract_along(image, profiles, y)


def _moments(image: Tensor, weight: Tensor, axes: Sequence[Tensor]) -> Tensor:
    x, y, z = axes
    return torch.einsum("xbz,xa,zc->abc", moments_along(image, weight, y).cpu(), x, z)
