"""A head-like phantom of balls with its exact field, for all that inverts the dipole."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.inversion import Susceptibility
from qsmpipe.numerics.operators import Dipole

TILT = math.radians(30)
TILTED = (math.sin(TILT), 0.0, math.cos(TILT))
ISOTROPIC = (1.0, 1.0, 1.0)


class Phantom(NamedTuple):
    field: Tensor
    mask: Tensor
    zooms: Zooms
    chi: Tensor
    b0_direction: Sequence[float]

    def invert(self, method: Callable[..., Susceptibility], **choices: Any) -> Susceptibility:
        field, mask, zooms, _, b0_direction = self
        return method(field, mask, zooms, b0_direction=b0_direction, **choices)


class Ball(NamedTuple):
    """A lone ball in a head of 14 mm, its field in closed form."""

    field: Tensor
    mask: Tensor
    zooms: Zooms
    r: Tensor
    """Distance from its centre (mm)."""

    def found(self, chi: Tensor) -> tuple[float, float]:
        """Share of its susceptibility that a map holds, and the deviation around it likewise."""
        around = chi[self.mask & (self.r > BALL_RADIUS + 1.5)]
        inside = chi[self.r < BALL_RADIUS - 1].mean()
        return (inside - around.mean()).item() / BALL, around.std().item() / BALL


BALL, BALL_RADIUS = 0.1, 5.0
"""Susceptibility (ppm) and radius (mm) of the lone ball."""


def lone_ball() -> Ball:
    """Closed form, not our own dipole: tilted by 30 degrees, anisotropic, odd sizes."""
    shape, zooms = (35, 33, 23), (1.0, 1.0, 1.5)
    axes = [(torch.arange(n) - n / 2) * zoom for n, zoom in zip(shape, zooms, strict=True)]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    place = (x - 2.3, y + 1.6, z - 1.2)
    r = torch.stack(place).norm(dim=0)
    cosine = sum(d * b for d, b in zip(place, TILTED, strict=True)) / r
    outside = BALL / 3 * (BALL_RADIUS / r) ** 3 * (3 * cosine**2 - 1)
    field = torch.where(r > BALL_RADIUS, outside, 0.0)
    return Ball(field, x**2 + y**2 + z**2 < 14**2, zooms, r)


SOURCES = (
    (0.10, 6.0, (-5.0, 2.0, 0.0)),
    (-0.06, 5.0, (6.0, -3.0, 2.0)),
    (0.15, 3.0, (2.0, 7.0, -4.0)),
    (0.05, 4.0, (0.0, -8.0, -4.0)),
    (-0.08, 3.0, (-2.0, 0.0, 9.0)),
)
"""Susceptibility (ppm), radius and centre (mm) of the balls in a head of 15 mm."""


def phantom(
    shape: tuple[int, int, int] = (40, 40, 40),
    zooms: Zooms = ISOTROPIC,
    *,
    tilt: float = 0.0,
    noise: float | Tensor = 0.0,
    edge: float = 0.7,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Phantom:
    """Balls with an edge of about ``edge`` mm, all turned by ``tilt`` about the second axis."""
    x, y, z = torch.meshgrid(
        *(
            (torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * zoom
            for n, zoom in zip(shape, zooms, strict=True)
        ),
        indexing="ij",
    )
    cosine, sine = math.cos(tilt), math.sin(tilt)
    chi = torch.zeros(shape, dtype=torch.float64)
    for value, radius, (a, b, c) in SOURCES:
        u, v, w = cosine * a + sine * c, b, cosine * c - sine * a
        r = ((x - u) ** 2 + (y - v) ** 2 + (z - w) ** 2).sqrt()
        chi += value * torch.sigmoid((radius - r) / (edge / 2))
    mask = x**2 + y**2 + z**2 < 15**2
    chi = torch.where(mask, chi, 0.0)
    b0_direction = (sine, 0.0, cosine)
    field = Dipole.on_grid(chi, zooms, b0_direction)(chi)
    generator = torch.Generator().manual_seed(seed)
    field += noise * torch.randn(shape, generator=generator, dtype=torch.float64)
    return Phantom(field.to(dtype), mask, zooms, chi.to(dtype), b0_direction)


def error(chi: Tensor, truth: Tensor, mask: Tensor) -> float:
    """Norm of the difference over the norm of the truth, both without their mean, in the mask."""
    a, b = chi[mask].double(), truth[mask].double()
    a, b = a - a.mean(), b - b.mean()
    return ((a - b).norm() / b.norm()).item()


def dipole_spectrum(
    shape: Sequence[int], zooms: Sequence[float], b0_direction: Sequence[float]
) -> np.ndarray:
    """Dipole on the whole spectrum, by its definition and in other words than ours."""
    k = np.stack(np.meshgrid(*map(np.fft.fftfreq, shape, zooms), indexing="ij"))
    angle = np.pi * k * np.reshape(zooms, (3, 1, 1, 1))
    with np.errstate(invalid="ignore"):
        factor = k * np.where(angle == 0, 1, angle * np.cos(angle) / np.sin(angle))
    squared = (k**2).sum(0)
    squared[0, 0, 0] = np.inf
    kernel = 1 / 3 - sum(
        b * c * (k[i] ** 2 if i == j else factor[i] * factor[j]) / squared
        for i, b in enumerate(b0_direction)
        for j, c in enumerate(b0_direction)
    )
    kernel[0, 0, 0] = 0
    return kernel


def dense(shape: Sequence[int], apply: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Matrix of a linear map of tensors of ``shape``."""
    unit = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    return torch.stack([apply(column).reshape(-1) for column in unit], dim=1).numpy()


def slow_minimum(
    objective: Callable[[np.ndarray, float], tuple[float, np.ndarray]],
    start: np.ndarray,
    *,
    roundings: Sequence[float] = tuple(10.0 ** -np.arange(1, 7)),
) -> np.ndarray:
    """Where ``objective(x, rounding)``, which also gives its slope, is least, by L-BFGS.

    It holds norms that are rounded less and less.
    """
    options = {"maxiter": 3000, "maxfun": 6000, "ftol": 1e-14, "gtol": 1e-10}
    for rounding in roundings:
        start = minimize(
            objective, start, (rounding,), method="L-BFGS-B", jac=True, options=options
        ).x
    return start
