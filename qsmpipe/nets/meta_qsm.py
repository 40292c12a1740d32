"""Meta-QSM, whose kernels are predicted from the voxel size, and Mesa-QSM, which has its own."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qsmpipe.nets.common import Expansion, UShaped, initialise, load_parameters
from qsmpipe.numerics.fourier import Zooms

DILATIONS = (1, 1, 1, 2, 2)
"""Of the convolutions of each level, highest resolution first: six are plain, three dilated."""

SLOPE = 0.2
"""Below 0, of the rectifiers that see a voxel size: where all are flat, no training moves them."""


def _linear(inputs: int, outputs: int, variance: float, common: float = 0.0) -> nn.Linear:
    """Fully connected layer with weights of a ``variance`` and biases of another."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=math.sqrt(variance))
    nn.init.normal_(layer.bias, std=math.sqrt(common))
    return layer


class WPConv(nn.Module):
    """Convolution of 3^3 whose kernels and biases are predicted from the voxel size.

    Two fully connected layers, each with a rectifier, make a few features of the voxel size; one
    more layer mixes kernels with them, another biases. The size enters by its logarithm: in mm,
    all kernels of the network would grow with it, and the map with their product.

    Parameters
    ----------
    inputs, outputs : int
        Feature maps.
    dilation : int
        Step between the kernel's taps (voxels).
    hidden : int
        Features of the voxel size.
    """

    def __init__(self, inputs: int, outputs: int, *, dilation: int = 1, hidden: int = 16) -> None:
        super().__init__()
        self.kernel_size, self.stride = (3, 3, 3), (1, 1, 1)
        self.padding = self.dilation = (dilation, dilation, dilation)
        self.shape = (outputs, inputs, *self.kernel_size)
        # as by He, at 1 mm; a quarter of the kernels' variance tells one size from another
        self.features = nn.Sequential(
            _linear(3, hidden, 2 / 3, 2.0),
            nn.LeakyReLU(SLOPE),
            _linear(hidden, hidden, 2 / hidden),
            nn.LeakyReLU(SLOPE),
        )
        taps = 27 * inputs
        self.kernel = _linear(hidden, math.prod(self.shape), 0.5 / (taps * hidden), 1.5 / taps)
        self.bias = _linear(hidden, outputs, 1 / hidden)

    def predict(self, zooms: Tensor) -> tuple[Tensor, Tensor]:
        """Kernels (V, outputs, inputs, 3, 3, 3) and biases (V, outputs) of ``zooms`` (V, 3)."""
        features = self.features(zooms.log())
        return self.kernel(features).view(-1, *self.shape), self.bias(features)

    def forward(self, features: Tensor, zooms: Tensor) -> Tensor:
        """Convolve each sample with the kernels of its own voxel size.

        Parameters
        ----------
        features : (B, inputs, X, Y, Z) tensor
        zooms : (B, 3) or (1, 3) tensor
            Voxel sizes (mm); a single one holds for all samples, and is the faster way.

        Returns
        -------
        (B, outputs, X, Y, Z) tensor
        """
        kernels, biases = self.predict(zooms)
        batch, _, *grid = features.shape
        groups = len(zooms)
        convolved = functional.conv3d(
            features.reshape(batch // groups, -1, *grid),
            kernels.flatten(0, 1),
            biases.flatten(),
            padding=self.padding,
            dilation=self.dilation,
            groups=groups,
        )
        return convolved.reshape(batch, -1, *grid)


class _Block(nn.Module):
    """A convolution of either kind, batch normalisation, rectifier."""

    def __init__(
        self,
        before: nn.Module,
        convolution: nn.Module,
        outputs: int,
        *,
        batch_norm: bool,
        slope: float,
    ) -> None:
        super().__init__()
        self.before, self.convolution = before, convolution
        self.norm = nn.BatchNorm3d(outputs) if batch_norm else nn.Identity()
        self.rectifier = nn.LeakyReLU(slope)

    def forward(self, features: Tensor, *zooms: Tensor) -> Tensor:
        return self.rectifier(self.norm(self.convolution(self.before(features), *zooms)))


class _Net(UShaped):
    """The network of both, given their kind of convolution (inputs, outputs, dilation=)."""

    def __init__(
        self,
        convolution: Callable[..., nn.Module],
        *,
        width: int,
        batch_norm: bool,
        slope: float,
    ) -> None:
        super().__init__(channels=1, stride=16)
        widths = [width * 2**level for level in range(5)]

        def block(before: nn.Module, inputs: int, outputs: int, dilation: int) -> nn.Module:
            layer = convolution(inputs, outputs, dilation=dilation)
            return _Block(before, layer, outputs, batch_norm=batch_norm, slope=slope)

        self.contracting = nn.ModuleList([block(nn.Identity(), 1, width, DILATIONS[0])])
        for (fine, coarse), dilation in zip(pairwise(widths), DILATIONS[1:], strict=True):
            self.contracting.append(block(nn.MaxPool3d(2), fine, coarse, dilation))
        self.expanding = nn.ModuleList(
            Expansion(
                nn.ConvTranspose3d(coarse, fine, 2, stride=2),
                block(nn.Identity(), 2 * fine, fine, dilation),
            )
            for (coarse, fine), dilation in zip(
                pairwise(reversed(widths)), reversed(DILATIONS[:-1]), strict=True
            )
        )
        self.output = convolution(width, 1, dilation=1)
        initialise(self, slope=slope)


class MesaQSM(_Net):
    """Mesa-QSM [1]_: the network of Meta-QSM with plain convolutions, for one voxel size.

    Biases are kept where batch normalisation follows, so that this is Meta-QSM at a voxel size
    (:meth:`MetaQSM.at`), though in training it undoes them.

    Parameters
    ----------
    width : int
        Kernels in the first layer.
    batch_norm : bool
        Whether there is batch normalisation. Small batches do not tell how strong their fields
        are once they are normalised by themselves: leave it out for these.
    slope : float
        Slope of the rectifiers below 0.

    References
    ----------
    .. [1] Liu, Koch. Meta-QSM: an image-resolution-arbitrary network for QSM reconstruction
       (2019), arXiv:1908.00206
    """

    def __init__(self, *, width: int = 32, batch_norm: bool = True, slope: float = 0.0) -> None:
        super().__init__(_plain, width=width, batch_norm=batch_norm, slope=slope)

    def forward(self, images: Tensor) -> Tensor:
        """Map of ``images``.

        Parameters
        ----------
        images : (B, 1, X, Y, Z) tensor

        Returns
        -------
        (B, 1, X, Y, Z) tensor
        """
        return self.through(images)


def _plain(inputs: int, outputs: int, *, dilation: int) -> nn.Module:
    return nn.Conv3d(inputs, outputs, 3, padding=dilation, dilation=dilation)


class MetaQSM(_Net):
    """Meta-QSM [1]_: a U-Net whose convolutions take the voxel size, one for any resolution.

    One convolution, batch normalisation and rectifier for each of five levels down and four up;
    of these nine the three deepest are dilated; then one more, without a rectifier, makes the
    map. The transposed convolutions are plain ones. The text tells the size neither of the
    network nor of the layers that predict: 32 kernels first, as in other U-Nets for QSM, and few
    hidden features, as each adds a whole set of kernels.

    Parameters
    ----------
    width : int
        Kernels in the first layer.
    hidden : int
        Features of the voxel size, from which each layer's kernels are mixed.
    batch_norm : bool
        Whether there is batch normalisation. Small batches do not tell how strong their fields
        are once they are normalised by themselves: leave it out for these.
    slope : float
        Slope of the rectifiers below 0.

    References
    ----------
    .. [1] Liu, Koch. Meta-QSM: an image-resolution-arbitrary network for QSM reconstruction
       (2019), arXiv:1908.00206
    """

    def __init__(
        self,
        *,
        width: int = 32,
        hidden: int = 16,
        batch_norm: bool = True,
        slope: float = 0.0,
    ) -> None:
        convolution = partial(WPConv, hidden=hidden)
        super().__init__(convolution, width=width, batch_norm=batch_norm, slope=slope)
        self.options: dict[str, Any] = {
            "width": width, "batch_norm": batch_norm, "slope": slope,
        }  # fmt: skip

    def forward(self, images: Tensor, zooms: Tensor | Zooms) -> Tensor:
        """Map of ``images``.

        Parameters
        ----------
        images : (B, 1, X, Y, Z) tensor
        zooms : (B, 3) or (3,) tensor, or a tuple
            Voxel size (mm) of each sample, or of all of them.

        Returns
        -------
        (B, 1, X, Y, Z) tensor

        Raises
        ------
        ValueError
            If there is neither one voxel size nor one per sample, or one is not above 0.
        """
        sizes = torch.as_tensor(zooms, dtype=images.dtype, device=images.device)
        if sizes.shape not in ((3,), (len(images), 3)):
            msg = (
                f"zooms {tuple(sizes.shape)} do not fit images {tuple(images.shape)}: give (3,) "
                f"for all samples or ({len(images)}, 3), one voxel size for each"
            )
            raise ValueError(msg)
        if not (sizes > 0).all():
            msg = f"zooms {sizes.tolist()} are not all above 0: give voxel sizes in mm"
            raise ValueError(msg)
        return self.through(images, sizes.view(-1, 3))

    @torch.no_grad()
    def at(self, zooms: Zooms) -> MesaQSM:
        """Mesa-QSM with the kernels predicted for ``zooms`` (mm), in the same mode."""
        like = next(self.parameters())
        mesa = MesaQSM(**self.options).to(like).train(self.training)
        sizes = like.new_tensor([zooms])
        state = mesa.state_dict()
        for name, layer in self.named_modules():
            if isinstance(layer, WPConv):
                (state[f"{name}.weight"],), (state[f"{name}.bias"],) = layer.predict(sizes)
        state |= {name: value for name, value in self.state_dict().items() if name in state}
        mesa.load_state_dict(state)
        return mesa

    def condition(self, zooms: Tensor) -> tuple[Tensor, ...]:
        """Select the voxel sizes: the kernels are predicted from them."""
        return (zooms,)

    def begin_from(self, state: Mapping[str, Tensor], path: Path) -> None:
        """Take over the parameters of Meta-QSM, or those of Mesa-QSM (:meth:`begin_as`).

        Raises
        ------
        ValueError
            If they are of another network.
        """
        mesa = self.at((1.0, 1.0, 1.0))
        if state.keys() != mesa.state_dict().keys():
            super().begin_from(state, path)
            return
        load_parameters(mesa, state, path)
        self.begin_as(mesa)

    @torch.no_grad()
    def begin_as(self, mesa: MesaQSM) -> None:
        """Predict the kernels of ``mesa``, of the same options, for every voxel size.

        Training from there has to tell the sizes apart alone.
        """
        theirs, own = mesa.state_dict(), self.state_dict()
        for name, layer in self.named_modules():
            if isinstance(layer, WPConv):
                for predictor, predicted in ((layer.kernel, "weight"), (layer.bias, "bias")):
                    predictor.weight.zero_()
                    predictor.bias.copy_(theirs[f"{name}.{predicted}"].flatten())
        self.load_state_dict({name: theirs.get(name, value) for name, value in own.items()})
