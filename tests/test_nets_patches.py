"""Patches against the whole image, and what decides on their size."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from qsmpipe.nets.common import Network
from qsmpipe.nets.meta_qsm import MetaQSM
from qsmpipe.nets.patches import (
    Tiling,
    at_once,
    bytes_per_voxel,
    fitting,
    full_halo,
    in_patches,
    patches,
    seam_error,
)
from qsmpipe.nets.qsmgan import Generator
from qsmpipe.nets.unet import UNet

SHALLOW = {
    "unet": partial(UNet, width=2, depth=1),
    "two-channels": partial(UNet, width=2, depth=1, channels=2, pooling="average"),
    "qsmgan": partial(Generator, width=2, depth=1, crop=3),
}


class Sum(Network):
    """Sum over the cube of ``2 radius + 1`` voxels; its memory is what ``limit`` says."""

    def __init__(self, radius: int = 0, limit: int | None = None) -> None:
        super().__init__(channels=1, stride=4)
        size = 2 * radius + 1
        self.cube = nn.Conv3d(1, 1, size, padding=radius, bias=False)
        nn.init.ones_(self.cube.weight)
        self.limit, self.seen = limit, []

    def forward(self, images: Tensor) -> Tensor:
        self.check(images)
        self.seen.append(tuple(images.shape))
        if self.limit is not None and images.numel() > self.limit:
            raise torch.cuda.OutOfMemoryError("simulated")
        return self.cube(images)


def image(*shape: int, channels: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(channels, *shape, generator=generator)


@pytest.mark.parametrize("shape", [(17, 8, 31), (1, 1, 1), (16, 16, 16)])
def test_patches_give_each_voxel_once(shape: tuple[int, int, int]) -> None:
    count = torch.zeros(shape)
    for patch in patches(shape, Tiling(8, 4).edges(shape, 2), 4):
        count[patch.place] += 1
        assert tuple(place.start - 4 for place in patch.place) == patch.start
    assert (count == 1).all()


def test_patches_share_an_axis_evenly_and_no_flat_image_is_read_as_a_cube() -> None:
    assert Tiling(96, 16).edges((140, 175, 20), 8) == (72, 88, 24)
    assert Tiling(16, 4).edges((32, 33, 16), 4) == (16, 12, 16)
    network = Sum()
    in_patches(network, image(30, 21, 5), tiling=Tiling(16, 4))
    assert set(network.seen) == {(1, 1, 24, 20, 16)}


@pytest.mark.parametrize("make", SHALLOW.values(), ids=SHALLOW)
def test_with_all_neighbours_patches_are_the_whole(make: partial[Network]) -> None:
    torch.manual_seed(0)
    network = make().double().eval()
    images = image(21, 12, 17, channels=network.channels).double()
    halo = full_halo(network)
    cut = in_patches(network, images, tiling=Tiling(8, halo, batch=3))
    whole = at_once(network, images, halo=halo)
    assert cut.shape == whole.shape == (21, 12, 17)
    torch.testing.assert_close(cut, whole)
    assert seam_error(network, images, tiling=Tiling(8, halo)) < 1e-12
    narrow = Tiling(8, math.ceil(network.crop / 2) * 2)
    assert seam_error(network, images, tiling=narrow) > 1e-6


def test_the_voxel_size_goes_with_every_patch() -> None:
    torch.manual_seed(0)
    network, images = MetaQSM(width=2, hidden=2).eval(), image(20, 20, 20)
    small, large = torch.tensor([0.5, 0.5, 2.0]), torch.tensor([1.0, 1.0, 1.0])
    tiling = Tiling(16, 8, batch=8)
    at_small = in_patches(network, images, small, tiling=tiling)
    same = in_patches(network.at((0.5, 0.5, 2.0)), images, tiling=tiling)
    torch.testing.assert_close(at_small, same, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(at_small, in_patches(network, images, large, tiling=tiling))


def test_neighbours_are_the_images_own_and_zeros_beyond_it() -> None:
    images = image(11, 9, 10)
    found = in_patches(Sum(radius=2), images, tiling=Tiling(4, 2))
    expected = torch.nn.functional.avg_pool3d(images, 5, 1, 2)[0] * 125
    torch.testing.assert_close(found, expected)


def test_out_of_memory_halves_batch_then_patch() -> None:
    network = Sum(limit=2 * 12**3)
    images = image(16, 16, 16)
    found = in_patches(network, images, tiling=Tiling(16, 2, batch=2))
    torch.testing.assert_close(found, images[0])
    edges = [(shape[0], shape[2]) for shape in network.seen]
    assert edges[:2] == [(1, 20), (1, 12)]
    many = Sum(limit=2 * 12**3)
    torch.testing.assert_close(in_patches(many, images, tiling=Tiling(8, 2, batch=8)), images[0])
    assert [shape[0] for shape in many.seen] == [8, 4, 2, 2, 2, 2]


def test_memory_that_is_never_enough_is_told() -> None:
    with pytest.raises(torch.cuda.OutOfMemoryError):
        in_patches(Sum(limit=1), image(8, 8, 8), tiling=Tiling(8, 0, batch=2))


def test_memory_per_voxel_is_that_of_the_feature_maps() -> None:
    network = UNet(width=2, depth=1, batch_norm=False)
    # at full resolution 2 + 2 maps of two convolutions, at half 4 + 4 and those pooled, 2; then
    # 2 up, 2 + 2 of two convolutions, 1 of the output; identities in place of the norms
    counted = (2 + 2 + 2 + 2 + 2 + 1) + (2 + 4 + 4) / 8
    norms = (2 + 2 + 2 + 2) + (4 + 4) / 8
    assert bytes_per_voxel(network) == pytest.approx(4 * (counted + norms))
    assert network.training


@pytest.mark.parametrize("free", [10**6, 10**8, 10**12])
def test_patches_fit_into_memory(free: int) -> None:
    network, shape = UNet(width=4, depth=2), (100, 60, 40)
    tiling = fitting(network, shape, halo=8, free=free)
    edge = tiling.patch + 2 * tiling.halo
    taken = tiling.batch * edge**3 * bytes_per_voxel(network)
    assert taken <= free / 2 or tiling == Tiling(4, 8)
    larger = bytes_per_voxel(network) * (edge + 4) ** 3 > free / 2
    assert larger or tiling.patch == 100
    assert tiling.batch <= math.prod(math.ceil(n / tiling.patch) for n in shape)


def test_trained_patches_are_not_exceeded() -> None:
    tiling = fitting(Generator(width=2), (96, 96, 100), halo=8, free=10**9, largest=48)
    assert tiling.patch == 48
    assert tiling.batch > 1


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        (Tiling(24, 8), "patches of 24 .*multiple of 16"),
        (Tiling(48, 4), "halo of 4 .*crops 8.* give 8"),
        (Tiling(48, 12), "halo of 12 .*multiples of 16: give 16"),
        (Tiling(48, 8, batch=0), "batch is 0"),
    ],
)
def test_patches_that_do_not_fit_the_network_are_refused(tiling: Tiling, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        in_patches(Generator(width=1), image(64, 64, 64), tiling=tiling)


def test_several_scans_at_a_time_are_refused() -> None:
    with pytest.raises(ValueError, match="one scan at a time"):
        in_patches(Sum(), image(8, 8, 8)[None], tiling=Tiling(8, 0))
