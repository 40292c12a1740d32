"""A network over a whole image: in patches with real neighbours around them, or at once."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from qsmpipe.nets.common import Network
from qsmpipe.numerics.fourier import Shape

Slices: TypeAlias = tuple[slice, slice, slice]

PROBE = 2
"""Edge, in strides, of the patch that tells what a network takes per voxel."""

SHARE = 0.5
"""Of the free memory that patches may take: workspaces of the convolutions need the rest."""

SEAM_PATCHES = 2
"""Edge, in patches, of the part of an image that tells the seam error."""


@dataclass(frozen=True)
class Tiling:
    """How an image is cut.

    Attributes
    ----------
    patch : int
        Longest edge of what each patch gives (voxels): patches lie side by side without overlap,
        and share each axis evenly.
    halo : int
        Neighbours on each side that it reads beyond that: the image's own, zeros only beyond the
        image.
    batch : int
        Patches that go through the network together.
    """

    patch: int
    halo: int
    batch: int = 1

    def edges(self, shape: Sequence[int], stride: int = 1) -> Shape:
        """Edges of what each patch of an image of ``shape`` gives, multiples of ``stride``."""
        x, y, z = (math.ceil(n / math.ceil(n / self.patch) / stride) * stride for n in shape)
        return x, y, z


class Patch(NamedTuple):
    """A part of an image."""

    start: Shape
    """First voxel that it reads; below 0 beyond the image."""
    place: Slices
    """What it gives, in the image."""


def patches(shape: Sequence[int], edges: Sequence[int], halo: int) -> Iterator[Patch]:
    """Cut ``shape`` (X, Y, Z); the last patch along an axis may give more than there is."""
    corners = (range(0, n, edge) for n, edge in zip(shape, edges, strict=True))
    for corner in itertools.product(*corners):
        i, j, k = (n - halo for n in corner)
        x, y, z = (
            slice(n, min(n + edge, size))
            for n, edge, size in zip(corner, edges, shape, strict=True)
        )
        yield Patch((i, j, k), (x, y, z))


def check_tiling(network: Network, tiling: Tiling) -> None:
    """Insist on patches that the network can take, all cut at the same phase of its stride.

    Raises
    ------
    ValueError
        If one of its numbers does not fit the network.
    """
    stride, crop = network.stride, network.crop
    name = type(network).__name__
    if tiling.patch < 1 or tiling.patch % stride:
        msg = (
            f"patches of {tiling.patch} voxels, but {name} halves resolution to 1/{stride}: give "
            f"a multiple of {stride}"
        )
        raise ValueError(msg)
    if tiling.halo < crop or 2 * tiling.halo % stride:
        step = stride // 2 if stride % 2 == 0 else stride
        fits = max(math.ceil(tiling.halo / step), math.ceil(crop / step)) * step
        msg = (
            f"a halo of {tiling.halo} voxels, but {name} crops {crop} and takes edges that are "
            f"multiples of {stride}: give {fits}"
        )
        raise ValueError(msg)
    if tiling.batch < 1:
        msg = f"batch is {tiling.batch}: give the patches to go through {name} together, 1 or more"
        raise ValueError(msg)


def full_halo(network: Network) -> int:
    """Halo with which no output voxel misses what it depends on."""
    step = network.stride
    return max(math.ceil(network.receptive_radius / step), math.ceil(network.crop / step)) * step


@torch.no_grad()
def in_patches(network: Network, images: Tensor, *condition: Tensor, tiling: Tiling) -> Tensor:
    """Map of ``images``, patch by patch, each cut to its centre.

    Where memory of a CUDA device runs out, fewer patches go together, then smaller ones.

    Parameters
    ----------
    network : Network
        In the mode (training or not) that it is to have.
    images : (channels, X, Y, Z) tensor
        On the network's device.
    *condition : tensors
        What the network takes besides, of all patches alike.
    tiling : Tiling
        How to cut.

    Returns
    -------
    (X, Y, Z) tensor

    Raises
    ------
    ValueError
        If the images or the tiling do not fit the network.
    """
    if images.ndim != 4:
        msg = f"images {tuple(images.shape)} are not (channels, X, Y, Z): give one scan at a time"
        raise ValueError(msg)
    check_tiling(network, tiling)
    count = math.prod(math.ceil(n / tiling.patch) for n in images.shape[-3:])
    tiling = replace(tiling, batch=min(tiling.batch, count))
    while True:
        try:
            return _in_patches(network, images, condition, tiling)
        except torch.cuda.OutOfMemoryError:
            smaller = _smaller(tiling, network.stride)
            if smaller is None:
                raise
            tiling = smaller
            torch.cuda.empty_cache()


def _in_patches(
    network: Network, images: Tensor, condition: Sequence[Tensor], tiling: Tiling
) -> Tensor:
    result = images.new_zeros(images.shape[-3:])
    centre = (..., *(slice(tiling.halo - network.crop, None),) * 3)
    edges = tiling.edges(result.shape, network.stride)
    read_edges = [edge + 2 * tiling.halo for edge in edges]
    waiting = patches(result.shape, edges, tiling.halo)
    while group := list(itertools.islice(waiting, tiling.batch)):
        read = torch.stack([_read(images, patch.start, read_edges) for patch in group])
        given = network(read, *condition)[:, 0][centre]
        for patch, values in zip(group, given, strict=True):
            x, y, z = (slice(place.stop - place.start) for place in patch.place)
            result[patch.place] = values[x, y, z]
    return result


def _smaller(tiling: Tiling, stride: int) -> Tiling | None:
    """Half the batch, or else half the patch; None where neither can be halved."""
    if tiling.batch > 1:
        return replace(tiling, batch=tiling.batch // 2)
    if tiling.patch > stride:
        return replace(tiling, patch=math.ceil(tiling.patch / 2 / stride) * stride)
    return None


def _read(images: Tensor, start: Sequence[int], edges: Sequence[int]) -> Tensor:
    """Cut a cuboid out of (channels, X, Y, Z), zeros beyond the image."""
    padding: list[int] = []
    cut = []
    for first, edge, size in zip(start, edges, images.shape[-3:], strict=True):
        low, high = max(first, 0), min(first + edge, size)
        cut.append(slice(low, high))
        padding = [low - first, first + edge - high, *padding]
    x, y, z = cut
    return functional.pad(images[:, x, y, z], padding)


@torch.no_grad()
def at_once(network: Network, images: Tensor, *condition: Tensor, halo: int = 0) -> Tensor:
    """Map of ``images`` as one patch, padded with zeros to what the network takes.

    Parameters
    ----------
    network, images, *condition
        As for :func:`in_patches`.
    halo : int
        Zeros on each side of the image, at least; raised to what the network crops.

    Returns
    -------
    (X, Y, Z) tensor
    """
    halo = max(halo, network.crop)
    after = []
    for n in reversed(images.shape[-3:]):
        edge = math.ceil((2 * halo + n) / network.stride) * network.stride
        after += [halo, edge - halo - n]
    padded = functional.pad(images, after)
    x, y, z = (slice(halo - network.crop, halo - network.crop + n) for n in images.shape[-3:])
    return network(padded[None], *condition)[0, 0, x, y, z]


def seam_error(network: Network, images: Tensor, *condition: Tensor, tiling: Tiling) -> float:
    """Measure what cutting costs: the difference of both maps over the norm of the one at once.

    Measured on a few patches in the middle of the image, so that it is affordable.

    Returns
    -------
    float
        0 for a halo as wide as the network's receptive field, or where the map is 0.
    """
    middle = []
    for n in images.shape[-3:]:
        size = min(n, SEAM_PATCHES * tiling.patch)
        middle.append(slice((n - size) // 2, (n - size) // 2 + size))
    x, y, z = middle
    part = images[:, x, y, z]
    cut = in_patches(network, part, *condition, tiling=tiling)
    whole = at_once(network, part, *condition, halo=tiling.halo)
    norm = whole.norm(dtype=torch.float64)
    return ((cut - whole).norm(dtype=torch.float64) / norm).item() if norm > 0 else 0.0


def bytes_per_voxel(network: Network, *condition: Tensor) -> float:
    """Memory that all feature maps of a patch take together, per voxel that is read.

    More than what is needed at a time, as most are let go on the way.
    """
    like = next(network.parameters())
    sizes: list[int] = []

    def note(layer: nn.Module, given: object, found: object) -> None:
        if isinstance(found, Tensor) and not getattr(layer, "inplace", False):
            sizes.append(found.numel() * found.element_size())

    leaves = [layer for layer in network.modules() if not any(layer.children())]
    hooks = [layer.register_forward_hook(note) for layer in leaves]
    edge = (PROBE + 2 * network.crop // network.stride) * network.stride
    training = network.training
    try:
        with torch.no_grad():
            network.eval()(like.new_zeros(1, network.channels, edge, edge, edge), *condition)
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    return sum(sizes) / edge**3


def fitting(
    network: Network,
    shape: Sequence[int],
    *condition: Tensor,
    halo: int,
    free: int,
    largest: int | None = None,
) -> Tiling:
    """Largest patches, or most of the wanted ones at a time, that fit into memory.

    Parameters
    ----------
    network : Network
        What they go through.
    shape : 3 ints
        The image's.
    *condition : tensors
        What the network takes besides.
    halo : int
        As of :class:`Tiling`.
    free : int
        Bytes to be had, of which :data:`SHARE` is taken.
    largest : int, optional
        Edge of the patches that the network was trained for. By default the image's own.

    Returns
    -------
    Tiling
        Patches of one stride at least, whether they fit or not.
    """
    stride = network.stride
    voxels = SHARE * free / bytes_per_voxel(network, *condition)
    wanted = math.ceil((largest or max(shape)) / stride) * stride
    edge = int(voxels ** (1 / 3)) - 2 * halo
    patch = min(wanted, max(edge // stride, 1) * stride)
    count = math.prod(math.ceil(n / patch) for n in shape)
    batch = min(count, max(int(voxels / (patch + 2 * halo) ** 3), 1))
    return Tiling(patch, halo, batch)
