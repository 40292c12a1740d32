"""SI-QSM: a residual inception U-Net for maps of any scale."""

from itertools import pairwise

from torch import Tensor, nn

from qsmpipe.nets.common import Expansion, Parallel, UShaped, initialise

SLOPE = 0.3
"""Of the leaky rectifiers, below 0: what the author's code takes, from Keras; no word in [1]_."""


def _rectifier() -> nn.Module:
    return nn.LeakyReLU(SLOPE, inplace=True)


def _norm(features: int, batch_norm: bool) -> nn.Module:
    return nn.BatchNorm3d(features) if batch_norm else nn.Identity()


class Inception(nn.Sequential):
    """Kernels of two sizes side by side, then batch normalisation; strided, to halve resolution.

    The larger ones, 5^3 in an inception network, are 3^3 and dilated. They come before the
    stride: with both at once they would read one voxel in eight and no other. Either branch ends
    in a convolution of 1^3 that reduces it to half of ``outputs``. This is the order of the
    author's code; the thesis gives none.
    """

    def __init__(
        self, inputs: int, outputs: int, *, stride: int = 1, batch_norm: bool = True
    ) -> None:
        half = outputs // 2
        small = nn.Sequential(
            nn.Conv3d(inputs, outputs, 3, stride=stride, padding=1),
            _rectifier(),
            nn.Conv3d(outputs, half, 1),
            _rectifier(),
        )
        large = nn.Sequential(
            nn.Conv3d(inputs, half, 3, padding=2, dilation=2),
            _rectifier(),
            nn.Conv3d(half, half, 3, stride=stride, padding=1),
            _rectifier(),
            nn.Conv3d(half, half, 1),
            _rectifier(),
        )
        super().__init__(Parallel([small, large]), _norm(outputs, batch_norm))


class Residual(nn.Module):
    """What two convolutions add: 1^3 to reduce the features to half of ``outputs``, then 3^3.

    They are added, as "residual" says, where the author's code concatenates.
    """

    def __init__(self, inputs: int, outputs: int, *, batch_norm: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(inputs, outputs // 2, 1),
            _rectifier(),
            nn.Conv3d(outputs // 2, outputs, 3, padding=1, bias=not batch_norm),
            _norm(outputs, batch_norm),
        )
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv3d(inputs, outputs, 1)
        self.rectifier = _rectifier()

    def forward(self, features: Tensor) -> Tensor:
        """Features, on the same grid."""
        return self.rectifier(self.shortcut(features) + self.body(features))


class SIQSM(UShaped):
    """SI-QSM [1]_: a U-Net of inception and residual layers, from field and mask to the map.

    Down by strides of 2, up by transposed convolutions, four times, so that edges are multiples
    of 16. Batch normalisation, which the thesis passes over, and 32 kernels in the first layer
    are those of the author's code [2]_.

    Parameters
    ----------
    width : int
        Kernels in the first layer, an even number.
    batch_norm : bool
        Whether there is batch normalisation. Small batches do not tell how strong their fields
        are once they are normalised by themselves: leave it out for these.

    References
    ----------
    .. [1] Larrain. Scale-invariant deep learning approach for QSM reconstruction: SI-QSM. Thesis,
       Pontificia Universidad Catolica de Chile (2022)
    .. [2] https://github.com/jnlarrain/ReconstrucNetwork
    """

    def __init__(self, *, width: int = 32, batch_norm: bool = True) -> None:
        super().__init__(channels=2, stride=16)
        if width % 2:
            msg = f"width {width} is odd, but SIQSM halves it: take {width + 1}"
            raise ValueError(msg)
        widths = [width * 2**level for level in range(5)]
        self.contracting = nn.ModuleList(
            [
                nn.Sequential(
                    Inception(self.channels, width, batch_norm=batch_norm),
                    Residual(width, width, batch_norm=batch_norm),
                )
            ]
        )
        for fine, coarse in pairwise(widths):
            self.contracting.append(
                nn.Sequential(
                    Inception(fine, coarse, stride=2, batch_norm=batch_norm),
                    Residual(coarse, coarse, batch_norm=batch_norm),
                )
            )
        self.expanding = nn.ModuleList()
        for coarse, fine in pairwise(reversed(widths)):
            up = nn.ConvTranspose3d(coarse, fine, 3, stride=2, padding=1, output_padding=1)
            self.expanding.append(Expansion(up, Residual(2 * fine, fine, batch_norm=batch_norm)))
        self.output = nn.Conv3d(width, 1, 1)
        initialise(self, slope=SLOPE)

    def forward(self, images: Tensor) -> Tensor:
        """Map of ``images``.

        Parameters
        ----------
        images : (B, 2, X, Y, Z) tensor
            Local field, and mask as 0 and 1.

        Returns
        -------
        (B, 1, X, Y, Z) tensor
        """
        return self.through(images)
