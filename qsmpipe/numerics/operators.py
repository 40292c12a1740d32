"""Linear operators and their adjoints; they know no solver and no method."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsmpipe.numerics.fourier import SPACE, Shape, Zooms, convolve, padded_shape
from qsmpipe.numerics.kernels import AXIAL, dipole


def gradient(image: Tensor, zooms: Zooms) -> Tensor:
    """Periodic forward differences per mm of (X, Y, Z), as (3, X, Y, Z)."""
    return torch.stack([
        (image.roll(-1, axis) - image) / zoom for axis, zoom in zip(SPACE, zooms, strict=True)
    ])  # fmt: skip


def gradient_adjoint(vector: Tensor, zooms: Zooms) -> Tensor:
    """Adjoint of :func:`gradient`: minus the divergence of (3, X, Y, Z), as (X, Y, Z)."""
    x, y, z = (
        (component.roll(1, axis) - component) / zoom
        for component, axis, zoom in zip(vector, SPACE, zooms, strict=True)
    )
    return x + y + z


@dataclass(frozen=True)
class Dipole:
    """Convolution with the dipole of B0 on a zero-padded grid: self-adjoint."""

    shape: Shape
    """Padded grid."""
    transfer: Tensor
    """Half spectrum of the kernel on ``shape``."""

    @classmethod
    def on_grid(
        cls,
        like: Tensor,
        zooms: Zooms,
        b0_direction: Sequence[float] = AXIAL,
        *,
        margin: float | None = None,
    ) -> "Dipole":
        """Pad (X, Y, Z) by ``margin`` mm (by its own size when None) and make the kernel."""
        n = tuple(like.shape[-3:])
        if margin is None:
            shape = padded_shape([2 * i for i in n], zooms, margin=0.0)
        else:
            shape = padded_shape(n, zooms, margin=margin)
        return cls(shape, dipole(shape, zooms, b0_direction, like=like))

    def __call__(self, chi: Tensor) -> Tensor:
        """Field (ppm) of ``chi`` (ppm), both (..., X, Y, Z)."""
        return convolve(chi, self.transfer, self.shape)
