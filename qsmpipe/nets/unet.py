"""The 3D U-Net of DeepQSM and QSMnet, and of the guide on how to train them."""

from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from qsmpipe.nets.common import Expansion, UShaped, convolution, initialise


class UNet(UShaped):
    """3D U-Net [1]_ from a field to a susceptibility map, as networks for QSM use it [2]_, [3]_.

    Every level holds two convolutions; kernels double with every halving of the resolution. 32 of
    them in the first layer are the best number [4]_. That work's lowest level, of 3^3 voxels in a
    patch of 48^3 with 98 voxels of padding, tells of four poolings and kernels of 3^3; it does
    not tell of batch normalisation, which QSMnet has.

    Parameters
    ----------
    channels : int
        Images that it takes together.
    width : int
        Kernels in the first layer.
    depth : int
        Poolings.
    kernel : int
        Edge of the convolution kernels (voxels), odd: 3 in DeepQSM, 5 in QSMnet.
    pooling : {"max", "average"}
        How resolution is halved.
    slope : float
        Slope of the rectifiers below 0.
    batch_norm : bool
        Whether batch normalisation follows each convolution. Small batches do not tell how strong
        their fields are once they are normalised by themselves: leave it out for these.

    References
    ----------
    .. [1] Ronneberger et al. MICCAI (2015) 234, doi:10.1007/978-3-319-24574-4_28
    .. [2] Bollmann et al. NeuroImage 195 (2019) 373, doi:10.1016/j.neuroimage.2019.03.060
    .. [3] Yoon et al. NeuroImage 179 (2018) 199, doi:10.1016/j.neuroimage.2018.06.030
    .. [4] Jochmann, Haueisen, Schweser. How to train a deep convolutional neural network for
       quantitative susceptibility mapping (QSM). ISMRM, abstract
    """

    def __init__(
        self,
        *,
        channels: int = 1,
        width: int = 32,
        depth: int = 4,
        kernel: int = 3,
        pooling: Literal["max", "average"] = "max",
        slope: float = 0.0,
        batch_norm: bool = True,
    ) -> None:
        super().__init__(channels=channels, stride=2**depth)
        pool = {"max": nn.MaxPool3d, "average": nn.AvgPool3d}[pooling]
        widths = [width * 2**level for level in range(depth + 1)]

        def layer(inputs: int, outputs: int) -> nn.Module:
            return convolution(inputs, outputs, kernel=kernel, slope=slope, batch_norm=batch_norm)

        def block(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(layer(inputs, outputs), layer(outputs, outputs))

        self.contracting = nn.ModuleList([block(channels, width)])
        for fine, coarse in pairwise(widths):
            self.contracting.append(nn.Sequential(pool(2), block(fine, coarse)))
        self.expanding = nn.ModuleList(
            Expansion(nn.ConvTranspose3d(coarse, fine, 2, stride=2), block(2 * fine, fine))
            for coarse, fine in pairwise(reversed(widths))
        )
        self.output = nn.Conv3d(width, 1, 1)
        initialise(self, slope=slope)

    def forward(self, images: Tensor) -> Tensor:
        """Map of ``images``.

        Parameters
        ----------
        images : (B, channels, X, Y, Z) tensor

        Returns
        -------
        (B, 1, X, Y, Z) tensor
        """
        return self.through(images)
