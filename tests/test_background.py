"""Background removal: what every method owes, and what each promises."""

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nb
import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from qsmpipe.methods import METHODS, function_of, method, parameters_of
from qsmpipe.numerics.background import LocalField, pdf, resharp, vsharp
from qsmpipe.numerics.background.pdf import projection, smooth_part, weights
from qsmpipe.numerics.background.sharp import VSHARP_RADII, Deviation
from qsmpipe.numerics.fourier import Zooms, padded_shape
from qsmpipe.numerics.kernels import AXIAL, ball_mean, ball_voxels
from qsmpipe.workflows.background import init_background_wf

TILTED = (0.0, math.sin(math.pi / 6), math.cos(math.pi / 6))
NAMES = list(METHODS["background"])


class Case(NamedTuple):
    shape: tuple[int, int, int]
    zooms: Zooms
    b0_direction: tuple[float, float, float] = AXIAL


CASES = {
    "axial": Case((48, 44, 40), (1.0, 1.0, 1.0)),
    "tilted": Case((48, 44, 40), (1.0, 1.0, 1.0), TILTED),
    "odd": Case((47, 43, 41), (1.0, 1.0, 1.0), TILTED),
    "anisotropic": Case((48, 43, 21), (1.0, 1.0, 2.0), TILTED),
}


class Head(NamedTuple):
    """An ellipsoid of 38 x 34 x 32 mm with spheres inside and outside, fields in ppm."""

    mask: Tensor
    local: Tensor
    background: Tensor
    x: Tensor
    y: Tensor
    z: Tensor


def grid(shape: tuple[int, ...], zooms: Zooms) -> list[Tensor]:
    axes = [
        (torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * zoom
        for n, zoom in zip(shape, zooms, strict=True)
    ]
    return list(torch.meshgrid(*axes, indexing="ij"))


def sphere(
    xyz: list[Tensor], centre: tuple[float, ...], radius: float, chi: float, b0: tuple[float, ...]
) -> Tensor:
    """Field of a sphere, in closed form: 0 inside, a point dipole outside."""
    offset = [axis - start for axis, start in zip(xyz, centre, strict=True)]
    squared = sum(axis**2 for axis in offset)
    along = sum(axis * part for axis, part in zip(offset, b0, strict=True))
    outside = chi / 3 * radius**3 * (3 * along**2 - squared) / squared**2.5
    return torch.where(squared > radius**2, outside, 0.0)


def make(case: Case, dtype: torch.dtype = torch.float32) -> Head:
    xyz = grid(case.shape, case.zooms)
    x, y, z = xyz

    def field(spheres: list[tuple[tuple[float, ...], float, float]]) -> Tensor:
        return sum(sphere(xyz, *one, case.b0_direction) for one in spheres).to(dtype)

    inside = [((3.2, -2.1, 1.3), 3.0, 0.15), ((-7.0, 3.0, -4.0), 2.5, -0.1),
              ((-2.0, 7.5, 5.0), 2.0, 0.2)]  # fmt: skip
    outside = [((0.0, 23.0, -8.0), 5.0, 9.0), ((24.0, 0.0, 0.0), 3.0, 9.0),
               ((0.0, -3.0, -50.0), 20.0, -9.0)]  # fmt: skip
    mask = (x / 19) ** 2 + (y / 17) ** 2 + (z / 16) ** 2 <= 1
    return Head(mask, field(inside), field(outside), x.to(dtype), y.to(dtype), z.to(dtype))


@pytest.fixture(scope="module")
def head() -> Head:
    return make(CASES["axial"])


def rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def spread(values: Tensor) -> float:
    return rms(values - values.mean())


def remove(name: str, field: Tensor, mask: Tensor, case: Case, **choices: Any) -> LocalField:
    if name == "pdf":
        choices = {"b0_direction": case.b0_direction, **choices}
    return function_of("background", name)(field, mask, case.zooms, **choices)
