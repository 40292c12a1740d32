"""Networks: what the papers say they are built of, and what they owe to those who feed them."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qsmpipe.nets.common import Expansion, Network, initialise
from qsmpipe.nets.cpsi_net import CPsiNet, DilatedInteractionBlock
from qsmpipe.nets.meta_qsm import MesaQSM, MetaQSM, WPConv
from qsmpipe.nets.qsmgan import Critic, Generator
from qsmpipe.nets.si_qsm import SIQSM, Inception, Residual
from qsmpipe.nets.unet import UNet

ZOOMS = (0.75, 0.5, 3.0)

NETWORKS: dict[str, Callable[[], Network]] = {
    "unet": partial(UNet, width=1),
    "unet-other": partial(
        UNet, width=1, channels=2, depth=3, kernel=5, pooling="average", batch_norm=False
    ),
    "qsmgan": partial(Generator, width=2, depth=2, crop=3),
    "si-qsm": partial(SIQSM, width=2),
    "mesa-qsm": partial(MesaQSM, width=1),
    "meta-qsm": partial(MetaQSM, width=1, hidden=4),
    "cpsi-net": partial(CPsiNet, width=2),
    "cpsi-net-no-interaction": partial(CPsiNet, width=2, interaction=False),
    "cpsi-net-no-fusion": partial(CPsiNet, width=2, fusion=False),
    "cpsi-net-neither": partial(CPsiNet, width=2, interaction=False, fusion=False),
}


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS)
def network(request: pytest.FixtureRequest) -> Network:
    torch.manual_seed(1)
    return request.param().eval()


@pytest.fixture
def published() -> Iterator[None]:
    """Networks at the papers' width, of shapes without numbers."""
    with torch.device("meta"):
        yield


def maps(network: nn.Module, images: Tensor) -> Tensor:
    return network(images, ZOOMS) if isinstance(network, MetaQSM) else network(images)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def shortest(network: Network) -> int:
    """Edge of the smallest images that it takes."""
    return (2 * network.crop // network.stride + 1) * network.stride


def layers(network: nn.Module, kind: type[nn.Module]) -> list:
    return [layer for layer in network.modules() if isinstance(layer, kind)]


def size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# What all of them owe


def test_a_map_has_the_grid_of_its_images_but_for_the_crop(network: Network) -> None:
    edges = [network.stride * times for times in (3, 2, 4)]
    with torch.no_grad():
        found = maps(network, noise(2, network.channels, *edges))
    assert found.shape == (2, 1, *(edge - 2 * network.crop for edge in edges))
    assert found.dtype is torch.float32
    assert found.isfinite().all()


def test_light_from_one_voxel_goes_as_far_as_the_receptive_radius(network: Network) -> None:
    """All kernels positive, all biases 0: what a voxel reaches is above 0, all else exactly 0."""
    network = network.double()
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1 or name.endswith("bias"):
            nn.init.constant_(parameter, 0.1 if parameter.ndim > 1 else 0)
    for layer in layers(network, WPConv):
        nn.init.zeros_(layer.bias.weight)
    stride, radius = network.stride, network.receptive_radius
    first = math.ceil((radius + network.crop) / stride) * stride
    across = shortest(network)
    images = torch.zeros(stride, network.channels, 2 * first + stride, across, across).double()
    sources = first + torch.arange(stride)  # wherever it lies in a voxel of the lowest level
    images[range(stride), 0, sources, across // 2, across // 2] = 1
    with torch.no_grad():
        found = maps(network, images)
    lit, where, *_ = found[:, 0].nonzero(as_tuple=True)
    assert (where + network.crop - sources[lit]).abs().max() == radius


def test_a_map_moves_with_its_images(network: Network) -> None:
    """By one stride; where the edges are out of sight."""
    network = network.double()
    stride, radius, crop = network.stride, network.receptive_radius, network.crop
    length = math.ceil((2 * radius + 2 * stride) / stride) * stride
    across = shortest(network)
    images = noise(1, network.channels, length + stride, across, across).double()
    with torch.no_grad():
        still, moved = (
            maps(network, each) for each in (images[:, :, stride:], images[:, :, :-stride])
        )
    inside = slice(radius - crop, length - radius - stride - crop)
    later = slice(inside.start + stride, inside.stop + stride)
    assert still[:, :, inside].std() > 1e-3 * still.abs().max() > 0
    torch.testing.assert_close(moved[:, :, later], still[:, :, inside])


def test_every_parameter_counts(network: Network) -> None:
    images = noise(2, network.channels, *(shortest(network),) * 3)
    maps(network, images).square().sum().backward()
    dead = [name for name, p in network.named_parameters() if not p.grad.abs().max() > 0]
    assert not dead


@pytest.mark.parametrize("make", [*NETWORKS.values(), partial(Critic, width=2)])
def test_the_seed_of_torch_is_all_that_is_random(make: Callable[[], nn.Module]) -> None:
    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(make().parameters())

    torch.testing.assert_close(drawn(3), drawn(3), rtol=0, atol=0)
    assert not torch.equal(drawn(3), drawn(4))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv3d(16, 16, 3, padding=2, dilation=2),
        nn.Conv3d(16, 16, 4, stride=4),
        nn.ConvTranspose3d(16, 16, 2, stride=2),
        nn.ConvTranspose3d(16, 16, 3, stride=2, padding=1, output_padding=1),
    ],
)
def test_a_rectifier_and_a_layer_keep_the_variance(layer: nn.Module) -> None:
    torch.manual_seed(0)
    initialise(layer, slope=0.2)
    convolved = layer(functional.leaky_relu(noise(1, 16, 24, 24, 24), 0.2))
    quarter = convolved.shape[-1] // 4
    inside = convolved[(..., *(slice(quarter, -quarter),) * 3)]
    assert inside.var().item() == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (UNet, (1, 2, 32, 32, 32), r"\(1, 2, 32, 32, 32\) are not \(B, 1, X, Y, Z\).* UNet"),
        (UNet, (1, 32, 32, 32), r"\(1, 32, 32, 32\) are not \(B, 1, X, Y, Z\)"),
        (UNet, (1, 1, 33, 32, 47), r"\(33, 32, 47\) .*multiples of 16.* \(48, 32, 48\)"),
        (partial(UNet, depth=2), (1, 1, 8, 9, 8), r"\(8, 9, 8\) .*multiples of 4.* \(8, 12, 8\)"),
        (Generator, (1, 1, 16, 32, 32), r"\(16, 32, 32\) .*16 that it crops.* \(32, 32, 32\)"),
        (SIQSM, (1, 1, 32, 32, 32), r"\(1, 1, 32, 32, 32\) are not \(B, 2, X, Y, Z\)"),
        (CPsiNet, (1, 1, 8, 8, 0), r"\(8, 8, 0\) .* \(8, 8, 8\)"),
        (Critic, (2, 1, 48, 48, 64), r"\(2, 1, 48, 48, 64\) are not \(B, 1, 48, 48, 48\)"),
    ],
)
def test_images_of_a_wrong_size_are_refused(
    make: Callable[..., nn.Module], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(width=2)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(UNet, kernel=4), "kernel 4 is even.* 5"),
        (partial(SIQSM, width=3), "width 3 is odd.* 4"),
        (partial(Critic, patch=40), "patch 40 is no multiple of 16"),
    ],
)
def test_networks_that_cannot_be_are_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# U-Net


@pytest.mark.usefixtures("published")
def test_unet_is_that_of_the_papers() -> None:
    network = UNet()
    down, up = [32, 64, 128, 256, 512], [256, 128, 64, 32]
    assert [layer.out_channels for layer in layers(network, nn.Conv3d)] == [
        *(width for width in down + up for _ in range(2)),
        1,
    ]
    assert {layer.kernel_size for layer in layers(network, nn.Conv3d)[:-1]} == {(3, 3, 3)}
    assert [layer.kernel_size for layer in layers(network, nn.MaxPool3d)] == [2] * 4
    assert [layer.out_channels for layer in layers(network, nn.ConvTranspose3d)] == up


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(("width", "kernel", "channels"), [(32, 3, 1), (8, 5, 2)])
def test_unet_has_as_many_parameters_as_counted_by_hand(
    width: int, kernel: int, channels: int
) -> None:
    # in units of width^2: two convolutions per level down and up, a transposed one per level up
    down = 1 + sum(2 * 4**level for level in range(4)) + sum(4**level for level in range(1, 5))
    up = sum((2 + 1) * 4**level for level in range(4))
    normalised = 2 * (16 + 2 * (1 + 2 + 4 + 8))  # widths of normalised layers
    counted = (
        kernel**3 * (channels * width + (down + up) * width**2)
        + 8 * sum(2 * 4**level for level in range(4)) * width**2
        + (1 + 2 + 4 + 8) * width
        + 2 * normalised * width
        + width
        + 1
    )
    assert size(UNet(width=width, kernel=kernel, channels=channels)) == counted


# QSMGAN


@pytest.mark.usefixtures("published")
def test_generator_is_that_of_the_paper() -> None:
    network = Generator()
    assert len(layers(network, nn.AvgPool3d)) == len(layers(network, nn.ConvTranspose3d)) == 4
    assert not layers(network, nn.MaxPool3d)
    assert {layer.negative_slope for layer in layers(network, nn.LeakyReLU)} == {0.2}
    assert len(layers(network, nn.BatchNorm3d)) == len(layers(network, nn.LeakyReLU)) == 18
    assert network(torch.empty(1, 1, 64, 64, 64)).shape == (1, 1, 48, 48, 48)


def test_generator_gives_the_centre_within_the_range_of_tanh() -> None:
    cropped, whole = Generator(width=2, depth=2, crop=3), Generator(width=2, depth=2, crop=0)
    whole.load_state_dict(cropped.state_dict())
    images = 100 * noise(1, 1, 16, 20, 12)
    centre = cropped(images)
    torch.testing.assert_close(centre, whole(images)[..., 3:-3, 3:-3, 3:-3])
    assert centre.abs().max() <= 1


@pytest.mark.usefixtures("published")
def test_critic_is_that_of_the_paper() -> None:
    critic = Critic()
    *halving, last = layers(critic, nn.Conv3d)
    assert [(layer.kernel_size[0], layer.stride[0]) for layer in halving] == [(4, 2)] * 4
    assert {layer.negative_slope for layer in layers(critic, nn.LeakyReLU)} == {0.2}
    assert last.kernel_size == (48 // 2**4,) * 3
    counted = 64 * 32 * (1 + 32 * (2 + 8 + 32)) + (32 + 64 + 128 + 256) + 27 * 256 + 1
    assert size(critic) == counted


def test_critic_scores_each_patch_alone() -> None:
    torch.manual_seed(0)
    critic, patches = Critic(width=2, patch=32), noise(3, 1, 32, 32, 32)
    scores = critic(patches)
    assert scores.shape == (3,)
    torch.testing.assert_close(scores[1:2], critic(patches[1:2]))
    scores[0].backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in critic.parameters())


def test_critic_takes_a_gradient_penalty() -> None:
    torch.manual_seed(0)
    critic, patches = Critic(width=2, patch=16).double(), noise(2, 1, 16, 16, 16).double()

    def penalty() -> Tensor:
        patches.requires_grad_()
        (slope,) = torch.autograd.grad(critic(patches).sum(), patches, create_graph=True)
        return (slope.flatten(1).norm(dim=1) - 1).square().mean()

    penalty().backward()
    kernel = critic.score.weight
    index = (0, 5, 0, 0, 0)
    step, change = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            kernel[index] += sign * step
        change.append(penalty().item())
        with torch.no_grad():
            kernel[index] -= sign * step
    assert kernel.grad[index].item() == pytest.approx(
        (change[0] - change[1]) / (2 * step), rel=1e-5
    )
    assert all(layer.weight.grad.abs().max() > 0 for layer in layers(critic, nn.Conv3d))


# SI-QSM


@pytest.mark.usefixtures("published")
def test_si_qsm_is_that_of_the_thesis() -> None:
    network = SIQSM()
    convolutions = layers(network, nn.Conv3d)
    assert {layer.kernel_size[0] for layer in convolutions} == {1, 3}
    assert not layers(network, nn.MaxPool3d) + layers(network, nn.Upsample)
    assert len(layers(network, Inception)) == 5
    assert len(layers(network, Residual)) == 5 + 4
    for block in layers(network, Inception):
        first = [layers(branch, nn.Conv3d)[0] for branch in block[0]]
        assert [layer.dilation[0] for layer in first] == [1, 2]
        last = [layers(branch, nn.Conv3d)[-1] for branch in block[0]]
        assert [layer.kernel_size[0] for layer in last] == [1, 1]
    assert sum(layer.stride[0] == 2 for layer in convolutions) == 4 * 2
    assert all(layer.dilation[0] == 1 for layer in convolutions if layer.stride[0] == 2)
    assert [layer.stride[0] for layer in layers(network, nn.ConvTranspose3d)] == [2] * 4
    assert convolutions[0].in_channels == 2


def test_a_residual_layer_that_adds_nothing_hands_on_its_features() -> None:
    block = Residual(4, 4).eval()
    nn.init.zeros_(block.body[-1].weight)
    features = noise(1, 4, 6, 6, 6).abs()
    torch.testing.assert_close(block(features), features)


def test_si_qsm_reads_the_mask() -> None:
    network = SIQSM(width=4).eval()
    images = noise(1, 2, 16, 16, 16)
    other = images.clone()
    other[:, 1] = 0
    assert not torch.allclose(network(images), network(other))


# Meta-QSM and Mesa-QSM


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(("make", "kind"), [(MetaQSM, WPConv), (MesaQSM, nn.Conv3d)])
def test_meta_qsm_is_that_of_the_paper(make: type[Network], kind: type[nn.Module]) -> None:
    network = make()
    *inner, last = layers(network, kind)
    assert sorted(layer.dilation for layer in inner) == [(1, 1, 1)] * 6 + [(2, 2, 2)] * 3
    assert {layer.kernel_size for layer in (*inner, last)} == {(3, 3, 3)}
    assert [len(layers(network, each)) for each in (nn.MaxPool3d, nn.ConvTranspose3d)] == [4, 4]
    assert len(layers(network, nn.BatchNorm3d)) == 9
    assert len(layers(network, Expansion)) == 4
    assert last is network.output


@pytest.mark.usefixtures("published")
def test_meta_qsm_has_one_set_of_kernels_for_each_feature_of_the_voxel_size() -> None:
    width, hidden = 8, 5
    levels = [4**level for level in range(4)]
    taps = 27 * (2 * width + sum(2 * level + 2 * level for level in levels) * width**2)
    biases = width * (1 + 2 + 4 + 8 + 16 + 8 + 4 + 2 + 1) + 1
    up = 8 * sum(2 * level for level in levels) * width**2 + (1 + 2 + 4 + 8) * width
    shared = up + 2 * (biases - 1)  # and batch normalisation
    assert size(MesaQSM(width=width)) == taps + biases + shared
    trunk = 10 * (3 * hidden + hidden + hidden**2 + hidden)
    predicted = (taps + biases) * (hidden + 1)
    assert size(MetaQSM(width=width, hidden=hidden)) == predicted + trunk + shared


def test_a_weight_prediction_convolution_is_a_convolution_by_what_it_predicts() -> None:
    torch.manual_seed(0)
    layer = WPConv(3, 5, dilation=2, hidden=4).double()
    zooms = torch.tensor([[1.0, 1.0, 1.0], [0.5, 0.5, 2.0], [0.8, 0.7, 3.0]]).double()
    features = noise(3, 3, 7, 6, 8).double()
    kernels, biases = layer.predict(zooms)
    assert kernels.shape == (3, 5, 3, 3, 3, 3)
    assert torch.cdist(kernels.flatten(1), kernels.flatten(1))[0, 1:].min() > 0.01
    for got, one, kernel, bias in zip(
        layer(features, zooms), features, kernels, biases, strict=True
    ):
        expected = functional.conv3d(one, kernel, bias, padding=2, dilation=2)
        torch.testing.assert_close(got, expected)


def test_meta_qsm_takes_each_sample_at_its_own_voxel_size() -> None:
    torch.manual_seed(0)
    network = MetaQSM(width=2, hidden=4).double().eval()
    images = noise(2, 1, 16, 32, 16).double()
    zooms = torch.tensor([[1.0, 1.0, 1.0], [0.5, 0.5, 2.0]])
    together = network(images, zooms)
    for i in range(2):
        torch.testing.assert_close(together[i : i + 1], network(images[i : i + 1], zooms[i]))
    same = network(images, zooms[:1].expand(2, 3))
    torch.testing.assert_close(same, network(images, (1.0, 1.0, 1.0)))
    assert (same[1] - together[1]).abs().max() > 0.01 * same[1].abs().max()


@pytest.mark.parametrize("training", [True, False])
def test_mesa_qsm_is_meta_qsm_at_one_voxel_size(training: bool) -> None:
    torch.manual_seed(0)
    meta = MetaQSM(width=2, hidden=4).double().train(training)
    images = noise(2, 1, 32, 16, 16).double()
    for layer in layers(meta, nn.BatchNorm3d):
        nn.init.normal_(layer.running_mean)
    mesa = meta.at(ZOOMS)
    assert isinstance(mesa, MesaQSM)
    assert mesa.training is training
    torch.testing.assert_close(mesa(images), meta(images, ZOOMS))


def test_meta_qsm_begins_as_mesa_qsm_at_every_voxel_size() -> None:
    torch.manual_seed(0)
    meta, mesa = MetaQSM(width=2, hidden=4).double(), MesaQSM(width=2).double()
    images = noise(2, 1, 32, 16, 16).double()
    for layer in layers(mesa, nn.BatchNorm3d):
        nn.init.normal_(layer.running_mean)
    meta.eval().begin_as(mesa.eval())
    for zooms in (ZOOMS, (1.0, 1.0, 1.0)):
        torch.testing.assert_close(meta(images, zooms), mesa(images))


@pytest.mark.parametrize(
    ("zooms", "message"),
    [
        (torch.ones(3, 3), r"zooms \(3, 3\) do not fit images \(2, 1, 16, 16, 16\).*\(2, 3\)"),
        ((1.0, 1.0), r"zooms \(2,\) do not fit"),
        ((1.0, 1.0, 0.0), r"zooms .*0\.0\] are not all above 0"),
    ],
)
def test_voxel_sizes_that_fit_no_sample_are_refused(zooms: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MetaQSM(width=2, hidden=2)(torch.zeros(2, 1, 16, 16, 16), zooms)


# Cross-connected Psi-Net


@pytest.mark.usefixtures("published")
def test_cpsi_net_is_that_of_the_paper() -> None:
    network = CPsiNet()
    assert len(layers(network, DilatedInteractionBlock)) == 3
    for block in layers(network, DilatedInteractionBlock):
        first, second = (layers(part, nn.Conv3d) for part in block)
        for convolutions in (first, second):
            assert [layer.dilation for layer in convolutions] == [(r, r, r) for r in (1, 2, 3)]
            assert {layer.kernel_size for layer in convolutions} == {(3, 3, 3)}
        features = sum(layer.out_channels for layer in first)
        assert {layer.in_channels for layer in second} == {features}
    # from the levels of the branch before, finest first, and from below in the same branch
    down, up, straight = nn.Conv3d, nn.ConvTranspose3d, nn.Identity
    expected = [
        [(down, 4), (down, 2), (straight, 1), (up, 2)],
        [(down, 2), (straight, 1), (up, 2), (up, 2)],
        [(straight, 1), (up, 2), (up, 4), (up, 2)],
    ]
    for branch in (network.intermediate, network.decoder):
        found = [
            [(type(way), getattr(way, "stride", (1,))[0]) for way in level.connections]
            for level in branch
        ]
        assert found == expected
    assert isinstance(network.rectifier, nn.LeakyReLU)


@pytest.mark.usefixtures("published")
def test_ablations_of_cpsi_net_take_out_what_they_say() -> None:
    without = CPsiNet(interaction=False)
    assert not layers(without, DilatedInteractionBlock)
    assert [len(layers(level.block, nn.Conv3d)) for level in without.intermediate] == [2, 2, 2]
    assert {layer.dilation[0] for layer in layers(without, nn.Conv3d)} == {1}
    plain = CPsiNet(fusion=False)
    assert len(layers(plain, DilatedInteractionBlock)) == 3
    assert all(layer.stride[0] == 1 for layer in layers(plain, nn.Conv3d))
    assert [layer.stride[0] for layer in layers(plain, nn.ConvTranspose3d)] == [2] * 6


def test_a_dilated_interaction_block_is_its_formula() -> None:
    torch.manual_seed(0)
    block = DilatedInteractionBlock(2, 3).double().eval()
    features = expected = noise(1, 2, 9, 10, 11).double()
    for part in block:  # G(x), then H(x); batch normalisation is the identity at first
        kernels = [layer.weight for layer in layers(part, nn.Conv3d)]
        expected = torch.cat(
            [
                functional.leaky_relu(
                    functional.conv3d(expected, kernel, padding=r, dilation=r), 0.2
                )
                for r, kernel in zip((1, 2, 3), kernels, strict=True)
            ],
            dim=1,
        )
    torch.testing.assert_close(block(features), expected, rtol=1e-4, atol=1e-4)
