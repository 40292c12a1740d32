"""Random geometric shapes: sources that are no brain, so that none is learnt."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qsmpipe.nets.training.draws import Draws, Range
from qsmpipe.nets.training.sample import PLAIN, Sample, Scan, Scans
from qsmpipe.nets.training.solids import Solid, draw_solids
from qsmpipe.numerics.fourier import Shape, irfft, padded_shape, rfft
from qsmpipe.numerics.kernels import gaussian
from qsmpipe.numerics.operators import Dipole

SMALL = 1 / 24
"""Largest half axis of "too small" structures, of the shortest edge."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Shapes of random size, amplitude and blur in a volume with a source-free rim [1]_.

    They may overlap, and add up. The field is that of the volume alone: a padded convolution, as
    nothing is around it. Signal, by which the noise is told, is made of the same shapes in other
    intensities, and there is some everywhere. The text has no numbers for the shapes.

    Parameters
    ----------
    shape : tuple of int
        Grid, 144^3 in the work; rotations about B0 want the first two edges alike.
    rim : range of int, or None
        Voxels without sources at each face, drawn for each: "approximately 10". None has none
        (the work's Fig. 5E): sources reach the border, beyond which there are none.
    small_only : bool
        Small structures alone, in much empty space (the work's Fig. 6).
    count : range of int
        Shapes.
    size : range, optional
        Half axes (voxels), log-uniform; from 1 to half the shortest edge by default.
    amplitude : float
        Susceptibility of each shape lies within this and its negative (ppm).
    blur : range
        Standard deviation of the Gaussian (voxels).
    widths : int
        So many blurs are drawn for a volume, and each shape has one of them.
    scans : Scans
        Voxel size and direction of B0.

    References
    ----------
    .. [1] Jochmann, Haueisen, Schweser. How to train a deep convolutional neural network for
       quantitative susceptibility mapping (QSM). ISMRM, abstract
    """

    shape: Shape = (144, 144, 144)
    rim: tuple[int, int] | None = (8, 12)
    small_only: bool = False
    count: tuple[int, int] = (50, 200)
    size: Range | None = None
    amplitude: float = 0.2
    blur: Range = (0.0, 3.0)
    widths: int = 6
    scans: Scans = PLAIN

    def draw(self, draws: Draws, device: torch.device) -> Sample:
        """Draw a sample, without noise."""
        scan = self.scans.draw(draws)
        like = torch.zeros((), device=device)
        chi, signal = self._blurred(self._solids(draws, scan), draws, scan, like)
        chi = chi * self._interior(draws, like)
        return Sample(
            chi=chi,
            field=Dipole.on_grid(chi, scan.zooms, scan.b0_direction)(chi),
            mask=torch.ones(self.shape, dtype=torch.bool, device=device),
            scan=scan,
            magnitude=(1 + signal).clamp(min=0.1),
        )

    def _solids(self, draws: Draws, scan: Scan) -> list[Solid]:
        edge, zoom = min(self.shape), min(scan.zooms)
        low, high = self.size or (1.0, max(edge * SMALL if self.small_only else edge / 2, 1.0))
        extent = [(n - 1) * size for n, size in zip(self.shape, scan.zooms, strict=True)]
        return list(
            draw_solids(
                draws,
                draws.integer(self.count),
                within=((0.0, 0.0, 0.0), extent),
                size=(low * zoom, high * zoom),
            )
        )

    def _blurred(
        self, solids: list[Solid], draws: Draws, scan: Scan, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Susceptibility (ppm) and signal, the latter between those of all shapes about 0."""
        values = draws.uniform((-1.0, 1.0), len(solids), 2)
        values *= torch.tensor([self.amplitude, 0.3], dtype=torch.float64)
        sigmas = (draws.uniform(self.blur, self.widths) * min(scan.zooms)).tolist()
        grid = padded_shape(self.shape, scan.zooms, margin=3 * max(sigmas))
        spectrum: Tensor | float = 0.0
        for first, sigma in enumerate(sigmas):
            images = like.new_zeros((2, *self.shape))
            for solid, pair in zip(solids[first :: self.widths], values[first :: self.widths],
                                   strict=True):  # fmt: skip
                box = solid.box(self.shape, scan.zooms)
                share = solid.cover(box, scan.zooms, parts=(1, 1, 1), like=like)
                for image, value in zip(images, pair.tolist(), strict=True):
                    image[box].add_(share, alpha=value)
            spectrum = spectrum + rfft(images, grid) * gaussian(grid, scan.zooms, sigma, like=like)
        chi, signal = irfft(torch.as_tensor(spectrum), grid, self.shape, overwrite=True)
        return chi, signal

    def _interior(self, draws: Draws, like: Tensor) -> Tensor:
        """1 where sources may be, 0 in the rim."""
        inside = like.new_ones(self.shape)
        for axis, n in enumerate(self.shape):
            low, high = (draws.integer(self.rim) for _ in range(2)) if self.rim else (0, 0)
            if low + high >= n:
                msg = f"a rim of {low} and {high} voxels leaves nothing of an edge of {n}"
                raise ValueError(f"{msg}: take a larger shape or a thinner rim")
            inside.narrow(axis, 0, low).zero_()
            inside.narrow(axis, n - high, high).zero_()
        return inside
