"""What every method of the stage shares: its result, and the grid that it works on."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import scipy.fft
import torch
from torch import Tensor

from qsmpipe.numerics.fourier import Shape, Zooms, irfft, rfft
from qsmpipe.numerics.grids import bounding_box, crop, in_place
from qsmpipe.numerics.kernels import pieces, scale
from qsmpipe.numerics.noise import ASSUMED_NOISE, noise_level
from qsmpipe.numerics.solvers import Convergence
from qsmpipe.numerics.units import radians_per_ppm

ASSUMED_FIELD_STRENGTH, ASSUMED_ECHO_TIME = 3.0, 0.02
"""What phase belongs to 1 ppm where the acquisition is not given (T, s): 16.05 rad."""


class Curve(NamedTuple):
    """How data and penalty answered to the weight between them, where it was chosen from that."""

    lambdas: tuple[float, ...]
    """Weights that were tried, ascending, the chosen one among them."""
    residuals: tuple[float, ...]
    """Norm of the weighted residual at each, in the field's unit."""
    penalties: tuple[float, ...]
    """Norm that the weight stands before, without the weight, at each."""
    chosen: int
    """Which of them was chosen."""
    rule: str
    """By which rule: "l-curve" or "discrepancy"."""
    found: bool
    """Whether the rule found a weight; where not, the method's own is the chosen one."""

    @property
    def lambda_(self) -> float:
        """The chosen weight."""
        return self.lambdas[self.chosen]


class Susceptibility(NamedTuple):
    """A susceptibility map."""

    chi: Tensor
    """Susceptibility (ppm), (X, Y, Z), up to a constant; 0 outside the mask."""
    convergence: Convergence | None
    """How the iteration ended; None for a direct method."""
    chosen: Mapping[str, Any] = MappingProxyType({})
    """Parameters that the method chose itself, by name; what a network was made of."""
    curve: Curve | None = None
    """What a regularisation weight was chosen from, if by rule."""


def phase_scale(field_strength: float | None, echo_times: Sequence[float] | None) -> float:
    """Phase (rad) of 1 ppm at the mean echo time, for the methods whose data are phase.

    At :data:`ASSUMED_FIELD_STRENGTH` and :data:`ASSUMED_ECHO_TIME` where they are not given.
    """
    time = sum(echo_times) / len(echo_times) if echo_times else ASSUMED_ECHO_TIME
    return radians_per_ppm(field_strength or ASSUMED_FIELD_STRENGTH, time)


def follow_noise(
    lambda_: float | str, per_noise: float, mask: Tensor, noise: Tensor | None
) -> tuple[float, dict[str, float]]:
    """Weight of a penalty of the first order (ppm mm), and what was chosen of it.

    "auto" is ``per_noise`` (mm) times the median of ``noise`` (ppm), or :data:`ASSUMED_NOISE`
    without a noise map.
    """
    if not isinstance(lambda_, str):
        return lambda_, {}
    value = auto_lambda(per_noise, mask, noise)
    return value, {"lambda_": value}


def auto_lambda(per_noise: float, mask: Tensor, noise: Tensor | None) -> float:
    """Weight (ppm mm) that is ``per_noise`` (mm) times the noise (ppm)."""
    return per_noise * (ASSUMED_NOISE if noise is None else noise_level(mask, noise)[1].item())


@dataclass(frozen=True)
class Window:
    """The mask's box and a zero-padded grid around it.

    Nothing outside the mask is known, so that the result does not depend on how much empty space
    the image holds.
    """

    field: Tensor
    """Field (ppm) in the box, 0 outside the mask."""
    mask: Tensor
    """Mask in the box."""
    shape: Shape
    """Grid of the transforms, whose first corner is the box."""
    image: Tensor
    """The mask on the image's grid."""
    reach: Shape
    """Voxels by which the box is wider than the mask on either side."""

    @classmethod
    def around(
        cls,
        field: Tensor,
        mask: Tensor,
        zooms: Zooms,
        *,
        padding: float,
        reach: float = 0.0,
        rim: int = 0,
    ) -> "Window":
        """Cut out the mask's box with ``reach`` mm and ``rim`` voxels around it, and plan zeros.

        The copies of the object that a discrete Fourier transform implies lie ``padding`` of its
        size away. A margin in mm would be wasted on a small object and too little for a large one.

        Raises
        ------
        ValueError
            If ``field`` and ``mask`` are on different grids, the mask is empty or not bool, or
            the field is not finite inside.
        """
        if field.ndim != 3:
            msg = f"field {tuple(field.shape)} is not (X, Y, Z): give one field at a time"
            raise ValueError(msg)
        known, inside, _ = crop(field, mask)
        i, j, k = (math.ceil(reach / zoom) + rim for zoom in zooms)
        around = (k, k, j, j, i, i)
        inner = torch.nn.functional.pad(known, around)
        x, y, z = (
            scipy.fft.next_fast_len(math.ceil((1 + padding) * n), real=True) for n in inner.shape
        )
        inside = torch.nn.functional.pad(inside, around)
        return cls(inner, inside, (x, y, z), mask, (i, j, k))

    def place(self, image: Tensor, *, fill: float = 0.0) -> Tensor:
        """``image`` (..., X, Y, Z) of the image's grid in the box; ``fill`` beyond the mask's."""
        i, j, k = self.reach
        part = image[(..., *bounding_box(self.image))]
        return torch.nn.functional.pad(part, (k, k, j, j, i, i), value=fill)

    def back(self, chi: Tensor) -> Tensor:
        """``chi`` of the box, or of the padded grid, on the image's grid; 0 outside the mask."""
        x, y, z = (slice(n, size - n) for n, size in zip(self.reach, self.mask.shape, strict=True))
        inside = torch.where(self.mask[x, y, z], chi[x, y, z], 0)
        return in_place(inside, bounding_box(self.image), like=self.image)

    def filtered(self, transfer: Callable[[slice], Tensor]) -> Tensor:
        """Field filtered by a transfer function, on the image's grid; 0 outside the mask.

        ``transfer`` gives some planes of the half spectrum along its first axis.
        """
        spectrum = rfft(self.field, self.shape)
        for planes in pieces(self.shape[0]):
            scale(spectrum[planes], transfer(planes))
        return self.back(irfft(spectrum, self.shape, self.field.shape, overwrite=True))
