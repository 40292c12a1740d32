"""QSMGAN: a U-Net that sees more than it maps, and the critic of its training."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from qsmpipe.nets.common import initialise
from qsmpipe.nets.unet import UNet

SLOPE = 0.2
"""Of the leaky rectifiers, below 0."""


class Generator(UNet):
    """Generator of QSMGAN [1]_: average pooling, leaky rectifiers, and the map's centre alone.

    Near the edges of a patch much of the dipole field is out of sight: from patches of 64^3 only
    the central 48^3 are taken. The work trains on tanh(10 chi) (chi in ppm), which must be
    inverted on the output: hence tanh here, as in a sibling's code [2]_. Poolings and kernels are
    not told in the text: they are those of the U-Nets that it names as models.

    Parameters
    ----------
    width : int
        Kernels in the first layer.
    depth : int
        Poolings.
    crop : int
        Voxels cut from each side of the output.
    batch_norm : bool
        Whether there is batch normalisation. Small batches do not tell how strong their fields
        are once they are normalised by themselves: leave it out for these.

    References
    ----------
    .. [1] Chen et al. NeuroImage 207 (2020) 116389, doi:10.1016/j.neuroimage.2019.116389
    .. [2] https://github.com/mui-neuro/HFP-QSMGAN
    """

    def __init__(
        self, *, width: int = 32, depth: int = 4, crop: int = 8, batch_norm: bool = True
    ) -> None:
        super().__init__(
            width=width, depth=depth, pooling="average", slope=SLOPE, batch_norm=batch_norm
        )
        self.crop = crop

    def forward(self, images: Tensor) -> Tensor:
        """Centre of the map of ``images``.

        Parameters
        ----------
        images : (B, 1, X, Y, Z) tensor

        Returns
        -------
        (B, 1, X - 2 crop, Y - 2 crop, Z - 2 crop) tensor
            Within -1 and 1.
        """
        x, y, z = (slice(self.crop, edge - self.crop) for edge in images.shape[-3:])
        return torch.tanh(self.through(images)[..., x, y, z])


class Critic(nn.Module):
    """Critic of QSMGAN [1]_: how much a patch looks like a true map, as one number per patch.

    Four convolutions of 4^3 with stride 2 bring the patch to 1/16, a last one makes a number of
    what is left. Nothing couples the patches of a batch, as the gradient penalty of each demands
    [2]_: no batch normalisation. Kernels are not told in the text: as many as the generator's in
    the first layer, doubling with each.

    Parameters
    ----------
    width : int
        Kernels in the first layer.
    patch : int
        Edge of the patches (voxels), a multiple of 16: the generator's output.

    References
    ----------
    .. [1] Chen et al. NeuroImage 207 (2020) 116389, doi:10.1016/j.neuroimage.2019.116389
    .. [2] Gulrajani et al. NeurIPS (2017) 5767, arXiv:1704.00028
    """

    def __init__(self, *, width: int = 32, patch: int = 48) -> None:
        super().__init__()
        if patch % 16 or not patch:
            msg = f"patch {patch} is no multiple of 16, to which Critic reduces it"
            raise ValueError(msg)
        self.patch = patch
        widths = [1, *(width * 2**level for level in range(4))]
        self.blocks = nn.Sequential()
        for inputs, outputs in pairwise(widths):
            self.blocks.append(nn.Conv3d(inputs, outputs, 4, stride=2, padding=1))
            self.blocks.append(nn.LeakyReLU(SLOPE))
        self.score = nn.Conv3d(widths[-1], 1, patch // 16)
        initialise(self, slope=SLOPE)

    def forward(self, maps: Tensor) -> Tensor:
        """Scores (B,) of ``maps`` (B, 1, patch, patch, patch); high for true ones.

        Raises
        ------
        ValueError
            If they have another shape.
        """
        expected = (1, self.patch, self.patch, self.patch)
        if maps.shape[1:] != expected:
            msg = f"maps {tuple(maps.shape)} are not (B, {', '.join(map(str, expected))})"
            raise ValueError(f"{msg}: cut them, or build Critic(patch=...) for them")
        return self.score(self.blocks(maps)).flatten()
