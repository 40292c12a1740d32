"""Cross-connected Psi-Net: a map from the high-pass filtered phase of clinical SWI."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from qsmpipe.nets.common import Network, Parallel, Reach, convolution, initialise, reach, together

Map = TypeVar("Map", Tensor, Reach)

LEVELS = 3
"""Resolutions at which the three branches meet: full, half and a quarter; an eighth is below."""

DILATIONS = (1, 2, 3)
"""Of the parallel convolutions in a dilated interaction block."""

SLOPE = 0.2
"""Of the leaky rectifiers, below 0; the text has no number: that of QSMGAN."""


def _layer(inputs: int, outputs: int, dilation: int = 1, *, batch_norm: bool) -> nn.Module:
    return convolution(inputs, outputs, dilation=dilation, slope=SLOPE, batch_norm=batch_norm)


def _convolutions(inputs: int, outputs: int, *, batch_norm: bool) -> nn.Sequential:
    return nn.Sequential(
        _layer(inputs, outputs, batch_norm=batch_norm),
        _layer(outputs, outputs, batch_norm=batch_norm),
    )


class DilatedInteractionBlock(nn.Sequential):
    """Two layers of parallel dilated convolutions; all of the first feed each of the second.

    Each convolution has ``kernels`` kernels, so that ``3 kernels`` feature maps leave the block.
    """

    def __init__(self, inputs: int, kernels: int, *, batch_norm: bool = True) -> None:
        super().__init__(*(
            Parallel(_layer(features, kernels, step, batch_norm=batch_norm) for step in DILATIONS)
            for features in (inputs, len(DILATIONS) * kernels)
        ))  # fmt: skip


class _Level(nn.Module):
    """A level of a branch: connections that bring feature maps to it, and its block."""

    def __init__(self, connections: list[nn.Module], block: nn.Module) -> None:
        super().__init__()
        self.connections, self.block = nn.ModuleList(connections), block

    def forward(self, *maps: Tensor) -> Tensor:
        arrived = [connect(one) for connect, one in zip(self.connections, maps, strict=True)]
        return self.block(torch.cat(arrived, dim=1))

    def reach(self, *maps: Reach) -> Reach:
        arrived = [reach(way, one) for way, one in zip(self.connections, maps, strict=True)]
        return reach(self.block, together(arrived))


def _resample(inputs: int, outputs: int, start: int, end: int) -> nn.Module:
    """Connect level ``start`` to level ``end``; each voxel counts once."""
    step = 2 ** abs(end - start)
    if end > start:
        return nn.Conv3d(inputs, outputs, step, stride=step)
    if end < start:
        return nn.ConvTranspose3d(inputs, outputs, step, stride=step)
    return nn.Identity()


class CPsiNet(Network):
    """Cross-connected Psi-Net (C-Psi-Net) [1]_.

    Between the encoder and the decoder of a U-Net, an intermediate branch of dilated interaction
    blocks climbs from the bottom, too. Every level of a branch takes the feature maps of all
    levels of the branch before, resampled by crossed connections, and those of its own branch
    from below. A rectifier is last of all.

    The text is silent on the following. What the lowest interaction block takes from below: the
    bottom of the U, where the strokes of a Psi meet. Kernels: 32 first, doubling with each level.
    Resampling kernels: as large as their stride. The rest is a classical U-Net's: max pooling,
    two convolutions for each level, batch normalisation.

    Parameters
    ----------
    width : int
        Kernels in the first layer.
    interaction : bool
        Whether there are dilated interaction blocks; if not, two convolutions in place of each
        (the work's "w/o DIB").
    fusion : bool
        Whether connections between branches cross levels; if not, they are plain skip
        connections (the work's "w/o MFF").
    batch_norm : bool
        Whether there is batch normalisation. Small batches do not tell how strong their fields
        are once they are normalised by themselves: leave it out for these.

    References
    ----------
    .. [1] Lu et al. Reconstruction of quantitative susceptibility maps from phase of
       susceptibility weighted imaging with cross-connected Psi-Net. ISBI (2021)
    """

    def __init__(
        self,
        *,
        width: int = 32,
        interaction: bool = True,
        fusion: bool = True,
        batch_norm: bool = True,
    ) -> None:
        super().__init__(channels=1, stride=2**LEVELS)
        self.fusion = fusion
        widths = [width * 2**level for level in range(LEVELS + 1)]
        plain = partial(_convolutions, batch_norm=batch_norm)
        self.encoder = nn.ModuleList([plain(self.channels, width)])
        for fine, coarse in pairwise(widths):
            self.encoder.append(nn.Sequential(nn.MaxPool3d(2), plain(fine, coarse)))
        between = partial(DilatedInteractionBlock, batch_norm=batch_norm) if interaction else plain
        times = len(DILATIONS) if interaction else 1
        self.intermediate = self._branch(widths, between, before=1, times=times)
        self.decoder = self._branch(widths, plain, before=times, times=1)
        self.output = nn.Conv3d(width, 1, 1)
        self.rectifier = nn.LeakyReLU(SLOPE)
        initialise(self, slope=SLOPE)

    def _branch(
        self,
        widths: list[int],
        block: Callable[[int, int], nn.Module],
        *,
        before: int,
        times: int,
    ) -> nn.ModuleList:
        """Levels, from the lowest up, of a branch whose blocks give ``times`` their kernels.

        The branch before gives ``before`` times its own.
        """
        *widths, below = widths
        branch = nn.ModuleList()
        for level in reversed(range(LEVELS)):
            width = widths[level]
            connections = [
                _resample(before * widths[start], width, start, level)
                for start in (range(LEVELS) if self.fusion else [level])
            ]
            arriving = (len(connections) + before) * width
            connections.append(_resample(below, width, level + 1, level))
            branch.append(_Level(connections, block(arriving, width)))
            below = times * width
        return branch

    def _psi(self, one: Map, apply: Callable[..., Map]) -> Map:
        """Draw the Psi, for feature maps or for their reach: ``apply`` tells what a part makes."""
        maps: list[Map] = []
        for part in self.encoder:
            one = apply(part, one)
            maps.append(one)
        bottom = maps.pop()
        for branch in (self.intermediate, self.decoder):
            one = bottom
            climbed: list[Map] = []
            for level, part in zip(reversed(range(LEVELS)), branch, strict=True):
                one = apply(part, *(maps if self.fusion else [maps[level]]), one)
                climbed.insert(0, one)
            maps = climbed
        return one

    def reach(self, before: Reach) -> Reach:
        """Reach of the map, if the image reaches ``before``."""
        return self._psi(before, reach)

    def forward(self, images: Tensor) -> Tensor:
        """Map of ``images``.

        Parameters
        ----------
        images : (B, 1, X, Y, Z) tensor
            High-pass filtered phase.

        Returns
        -------
        (B, 1, X, Y, Z) tensor
        """
        self.check(images)
        features = self._psi(images, lambda part, *maps: part(*maps))
        return self.rectifier(self.output(features))
