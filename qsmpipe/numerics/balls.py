"""Where balls lie in a mask: inside it, or touching it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qsmpipe.numerics.fourier import Shape, Zooms, irfft, padded_shape, rfft
from qsmpipe.numerics.kernels import ball_mean, ball_voxels


@dataclass(frozen=True)
class Balls:
    """Balls around every voxel of a grid, padded so that none wraps around."""

    shape: Shape
    extent: Tensor
    """Half spectrum of the mask."""
    crop: tuple[int, ...]
    zooms: Zooms

    @classmethod
    def on_grid(cls, mask: Tensor, zooms: Zooms, largest: float, *, like: Tensor) -> "Balls":
        """Prepare for balls of up to ``largest`` mm, in the precision of ``like``."""
        shape = padded_shape(mask.shape, zooms, margin=largest)
        return cls(shape, rfft(mask.to(like), shape), tuple(mask.shape), zooms)

    def fit(self, radius: float) -> Tensor:
        """Voxels whose ball of ``radius`` mm lies in the mask; beyond the grid is outside."""
        share, slack = self._share(radius)
        return share > 1 - slack

    def touch(self, radius: float) -> Tensor:
        """Voxels whose ball of ``radius`` mm shares one with the mask."""
        share, slack = self._share(radius)
        return share > slack

    def _share(self, radius: float) -> tuple[Tensor, float]:
        """Share of each ball that lies in the mask; and what is as good as 0.

        Transforms are good to a few rounding errors and one voxel of the ball weighs one over
        their number: in single precision, a ball of 300 000 may miss one, which changes no mean.
        """
        mean = ball_mean(self.shape, self.zooms, radius, like=self.extent.real)
        slack = max(0.5 / ball_voxels(self.zooms, radius), 16 * torch.finfo(mean.dtype).eps)
        return irfft(self.extent * mean, self.shape, self.crop, overwrite=True), slack
