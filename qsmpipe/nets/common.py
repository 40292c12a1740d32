"""What the networks share: what they owe to those who feed them, the U, and its parts."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qsmpipe.numerics.fourier import Zooms


class Reach(NamedTuple):
    """Which voxels of a network's input each voxel of a feature map depends on, along an axis.

    Voxel ``i`` depends on those from ``spans[i][0]`` to ``spans[i][1]``. There is a span for
    each of the voxels in which all repeats itself, ``period`` voxels of the input further on.
    """

    period: int
    spans: tuple[tuple[int, int], ...]

    def hull(self, voxels: Iterable[int]) -> tuple[int, int]:
        """Span of several voxels together, wherever they lie."""
        shifts, places = zip(*(divmod(i, len(self.spans)) for i in voxels), strict=True)
        firsts, lasts = zip(*(self.spans[place] for place in places), strict=True)
        return (
            min(first + n * self.period for first, n in zip(firsts, shifts, strict=True)),
            max(last + n * self.period for last, n in zip(lasts, shifts, strict=True)),
        )


def reach(module: nn.Module, *before: Reach) -> Reach:
    """Reach of what ``module`` makes of feature maps that reach ``before``.

    A module of many parts counts as their chain, in the order in which it holds them; one that is
    no chain has a method ``reach`` of its own. Parts without a kernel look at single voxels.
    """
    own = getattr(module, "reach", None)
    if own is not None:
        return own(*before)
    (after,) = before
    if hasattr(module, "kernel_size"):
        voxels, stride = len(after.spans), _edge(module, "stride")
        up = isinstance(module, nn.ConvTranspose3d)
        voxels = voxels * stride if up else voxels // stride
        return after._replace(spans=tuple(after.hull(_taps(module, i)) for i in range(voxels)))
    for part in module.children():
        after = reach(part, after)
    return after


def _taps(layer: nn.Module, voxel: int) -> range:
    """Voxels of its input that a voxel of the layer's output sums over."""
    stride, dilation = _edge(layer, "stride"), _edge(layer, "dilation")
    first = _edge(layer, "padding")
    extent = (_edge(layer, "kernel_size") - 1) * dilation
    if isinstance(layer, nn.ConvTranspose3d):  # i, where voxel = stride i - padding + 0..extent
        return range(-((extent - voxel - first) // stride), (voxel + first) // stride + 1)
    return range(stride * voxel - first, stride * voxel - first + extent + 1, dilation)


def _edge(layer: nn.Module, name: str) -> int:
    size = getattr(layer, name, 1)  # average pooling has no dilation
    return size if isinstance(size, int) else size[0]


def together(reaches: Iterable[Reach]) -> Reach:
    """Reach of several feature maps of the same grid."""
    first, *others = reaches
    spans = zip(*(one.spans for one in (first, *others)), strict=True)
    hulls = ((min(a for a, _ in each), max(b for _, b in each)) for each in spans)
    return first._replace(spans=tuple(hulls))


class Network(nn.Module):
    """What a network tells to those who feed it.

    Attributes
    ----------
    channels : int
        Images that it takes together, as in (B, channels, X, Y, Z).
    stride : int
        Edges of the images (voxels) must be multiples of this.
    crop : int
        The output lacks so many voxels on each side.
    """

    def __init__(self, *, channels: int, stride: int, crop: int = 0) -> None:
        super().__init__()
        self.channels, self.stride, self.crop = channels, stride, crop

    @property
    def receptive_radius(self) -> int:
        """Voxels beyond its own place, along each axis, that an output voxel depends on."""
        itself = Reach(self.stride, tuple((i, i) for i in range(self.stride)))
        spans = reach(self, itself).spans
        return max(max(i - first, last - i) for i, (first, last) in enumerate(spans))

    def condition(self, zooms: Tensor) -> tuple[Tensor, ...]:
        """Select what a network is given beside images of voxel sizes (mm), (B, 3)."""
        return ()

    def at(self, zooms: Zooms) -> "Network":
        """Give the network that maps images of a voxel size (mm) and takes them alone."""
        return self

    def begin_from(self, state: Mapping[str, Tensor], path: Path) -> None:
        """Take over the parameters of another training, read from ``path``.

        Raises
        ------
        ValueError
            If they are of another network.
        """
        load_parameters(self, state, path)

    def check(self, images: Tensor) -> None:
        """Insist on images that the network can take.

        Raises
        ------
        ValueError
            Naming the shape, and the one that it should have.
        """
        name, shape = type(self).__name__, tuple(images.shape)
        if len(shape) != 5 or shape[1] != self.channels:
            msg = f"images {shape} are not (B, {self.channels}, X, Y, Z), which {name} takes"
            raise ValueError(msg)
        fits = tuple(
            max(math.ceil(edge / self.stride), 2 * self.crop // self.stride + 1) * self.stride
            for edge in shape[2:]
        )
        if shape[2:] != fits:
            cropped = f" and longer than the {2 * self.crop} that it crops" if self.crop else ""
            msg = (
                f"images of {shape[2:]} voxels, but {name} takes edges that are multiples of "
                f"{self.stride}{cropped}: pad them to {fits}"
            )
            raise ValueError(msg)


def initialise(network: nn.Module, *, slope: float) -> None:
    """Draw kernels that keep the variance of what leaky rectifiers let through [1]_; no biases.

    Of a transposed convolution's kernel, each voxel sees one in ``stride**3`` taps.

    References
    ----------
    .. [1] He et al. ICCV (2015) 1026, doi:10.1109/ICCV.2015.123
    """
    gain = nn.init.calculate_gain("leaky_relu", slope)
    for layer in network.modules():
        if isinstance(layer, nn.Conv3d | nn.ConvTranspose3d):
            steps = layer.stride if isinstance(layer, nn.ConvTranspose3d) else (1,)
            taps = layer.in_channels * math.prod(layer.kernel_size) / math.prod(steps)
            nn.init.normal_(layer.weight, std=gain / math.sqrt(taps))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def convolution(
    inputs: int,
    outputs: int,
    *,
    kernel: int = 3,
    dilation: int = 1,
    slope: float,
    batch_norm: bool = True,
) -> nn.Sequential:
    """Convolution that keeps the grid, batch normalisation, leaky rectifier."""
    if kernel % 2 == 0:
        msg = f"kernel {kernel} is even, but only odd ones keep the grid: take {kernel + 1}"
        raise ValueError(msg)
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv3d(
            inputs, outputs, kernel, padding=padding, dilation=dilation, bias=not batch_norm
        ),
        nn.BatchNorm3d(outputs) if batch_norm else nn.Identity(),
        nn.LeakyReLU(slope, inplace=True),
    )


class Parallel(nn.ModuleList):
    """Branches that all read the same features; theirs are concatenated."""

    def forward(self, features: Tensor) -> Tensor:
        """All branches' feature maps."""
        return torch.cat([branch(features) for branch in self], dim=1)

    def reach(self, before: Reach) -> Reach:
        """Reach of all branches together."""
        return together(reach(branch, before) for branch in self)


class Expansion(nn.Module):
    """A step of the expanding path: up in resolution, joined by the skip connection, a block."""

    def __init__(self, up: nn.Module, block: nn.Module) -> None:
        super().__init__()
        self.up, self.block = up, block

    def forward(self, features: Tensor, skipped: Tensor, *condition: Tensor) -> Tensor:
        """Features at the resolution of those ``skipped``, with as many voxels."""
        return self.block(torch.cat([skipped, self.up(features)], dim=1), *condition)


class UShaped(Network):
    """A contracting path, an expanding path of one step less, skip connections between them.

    Attributes
    ----------
    contracting : ModuleList of modules
        From features to features, each but the first at half the resolution.
    expanding : ModuleList of Expansion
        From the lowest resolution to the highest.
    output : Module
        From features to the map.
    """

    contracting: nn.ModuleList
    expanding: nn.ModuleList
    output: nn.Module

    def through(self, images: Tensor, *condition: Tensor) -> Tensor:
        """``images`` through the U; every block is given the ``condition`` too."""
        self.check(images)
        features, skipped = images, []
        for level in self.contracting:
            features = level(features, *condition)
            skipped.append(features)
        skipped.pop()
        for level in self.expanding:
            features = level(features, skipped.pop(), *condition)
        return self.output(features, *condition)


def load_parameters(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load parameters, or say which do not fit.

    Raises
    ------
    ValueError
        If names or shapes differ.
    """
    own = network.state_dict()
    wrong: Sequence[str] = [
        name for name in own.keys() | state.keys()
        if name not in own or name not in state or own[name].shape != state[name].shape
    ]  # fmt: skip
    if wrong:
        msg = (
            f"{path}: {len(wrong)} of {len(own)} parameters do not fit {type(network).__name__}, "
            f"such as {min(wrong)}: give the checkpoint of a network with the same options"
        )
        raise ValueError(msg)
    network.load_state_dict(state)
