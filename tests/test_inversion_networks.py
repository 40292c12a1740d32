"""Inversion by networks: weights and cards, the network's own grid, what comes with qsmpipe."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nb
import numpy as np
import pytest
import torch
from nipype.interfaces.base import isdefined
from phantoms import TILT, TILTED, error, lone_ball, phantom
from torch import Tensor, nn

from qsmpipe import images
from qsmpipe.methods import METHODS, function_of
from qsmpipe.nets import inversion
from qsmpipe.nets.architectures import Blueprint, build
from qsmpipe.nets.cards import Card, Domain, Model, load, read_card, save
from qsmpipe.nets.common import Network
from qsmpipe.nets.contract import Contract
from qsmpipe.nets.inversion import cpsi_net, unet
from qsmpipe.nets.meta_qsm import MetaQSM
from qsmpipe.nets.reconstruction import Frame, Placed, reconstruct
from qsmpipe.nets.weights import weights_names
from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.inversion import tv
from qsmpipe.numerics.swi import high_pass
from qsmpipe.numerics.units import radians_per_ppm
from qsmpipe.settings import combine
from qsmpipe.workflows.inversion import init_inversion_wf

NETWORKS = {name: row for name, row in METHODS["inversion"].items() if row.trained}
ONE_MM = Domain(zooms=((1.0, 1.0),) * 3)
TINY = Blueprint(architecture="unet", options={"width": 2, "depth": 1})
CARD = Card(
    network=TINY, contract=Contract(scale=10.0, output_scale=10.0), domain=ONE_MM, patch=16, halo=4
)
WHOLE = 512
"""Edge of a patch that holds any image here."""


def weights(folder: Path, card: Card = CARD, name: str = "mine") -> Path:
    """Random weights, the same each time."""
    torch.manual_seed(0)
    network = build(card.network.architecture, card.network.options)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm3d):
                layer.running_mean.normal_()
                layer.running_var.uniform_(1e-9, 1e6)
    save(network, card, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


class InPlaceOfANetwork(Network):
    """A function of (X, Y, Z) images, which knows of axial scans of one voxel size alone."""

    def __init__(self, function: Any, channels: int = 1) -> None:
        super().__init__(channels=channels, stride=4)
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([self.function(*one)[None] for one in images])


def model(function: Any, domain: Domain = ONE_MM, **contract: Any) -> Model:
    agreed = Contract(**contract)
    network = InPlaceOfANetwork(function, len(agreed.channels))
    return Model("mine", network, replace(CARD, domain=domain, contract=agreed, patch=WHOLE))


def classical(field: Tensor, mask: Tensor) -> Tensor:
    """An inversion that is right for axial scans of 1 mm, and for no others."""
    return tv(field, mask.bool(), (1.0, 1.0, 1.0), lambda_=1e-4).chi


once = partial(reconstruct, mirror=False)
BOTH = {"channels": ("field", "mask")}


# Mirror images


@pytest.mark.parametrize("patch", [16, WHOLE])
def test_the_map_of_a_mirror_image_is_the_maps(patch: int) -> None:
    torch.manual_seed(0)
    network = build("unet", {"width": 2, "depth": 1}).eval()
    one = Model("m", network, replace(CARD, contract=Contract()))
    head = phantom((19, 24, 22), (1.0, 1.0, 1.0))
    chi, made = reconstruct(one, head.mask, head.zooms, field=head.field, patch=patch)
    for axes in ((0,), (1, 2)):
        other = reconstruct(
            one, head.mask.flip(axes), head.zooms, field=head.field.flip(axes), patch=patch
        )
        torch.testing.assert_close(other.chi, chi.flip(axes))
    single = once(one, head.mask, head.zooms, field=head.field, patch=patch)
    assert 0 < error(single.chi, chi, head.mask) < 5 * made["mirror_spread"]
    assert "mirror_spread" not in single.made


def test_the_spread_of_mirror_images_is_that_of_their_maps() -> None:
    ramp = torch.linspace(1, 2, 24).view(24, 1, 1)  # 16 voxels with a halo of 4
    one = model(lambda image: ramp * image)  # which sees left and right differently
    mask = torch.ones(16, 16, 16, dtype=torch.bool)
    chi, made = reconstruct(one, mask, (1.0, 1.0, 1.0), field=0.1 * mask)
    torch.testing.assert_close(chi, torch.full(mask.shape, 0.15))
    deviation = float((ramp[4:20] - 1.5).square().mean().sqrt()) / 1.5
    assert made["mirror_spread"] == pytest.approx(deviation, abs=1e-4)


# Weights and cards


def test_weights_and_card_come_back(tmp_path: Path) -> None:
    card = replace(CARD, about={"paper": "none"}, training={"steps": 3})
    path = weights(tmp_path, card)
    found = load(str(path), architecture="unet")
    assert found.card == replace(card, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    assert not found.network.training
    torch.manual_seed(0)
    drawn = build("unet", TINY.options).state_dict()
    for name, value in found.network.state_dict().items():
        if "weight" in name and value.ndim > 1:
            torch.testing.assert_close(value, drawn[name], rtol=1e-3, atol=1e-6)
    variance = found.network.get_buffer("contracting.0.0.1.running_var")
    assert variance.dtype is torch.float32
    assert (variance > 0).all()


@pytest.mark.parametrize(
    "case", ["file", "card", "hash", "network", "options", "name", "key", "channel"]
)
def test_weights_that_do_not_fit_are_refused(case: str, tmp_path: Path) -> None:
    path = weights(tmp_path)
    card = path.with_suffix(".toml")
    name, wanted, message = str(path), "unet", ""
    match case:
        case "file":
            path.unlink()
            message = "mine.safetensors is missing"
        case "card":
            card.unlink()
            message = "mine.toml is missing: their card"
        case "hash":
            path.write_bytes(path.read_bytes()[:-1] + b"\x01")
            message = "not the file that its card describes"
        case "network":
            wanted, message = "qsmgan", "weights of unet, not of qsmgan"
        case "options":
            card.write_text(card.read_text().replace("width = 2", "width = 4"))
            message = "do not fit UNet"
        case "name":
            name, message = "unettt", "no weights are called 'unettt': give one of"
        case "key":
            card.write_text("colour = 1\n" + card.read_text())
            message = "there is no 'colour'"
        case "channel":
            takes = replace(CARD, contract=Contract(channels=("filtered phase",)))
            name = str(weights(tmp_path, takes))
            message = "take the filtered phase, but the inversion unet has field and mask"
    with pytest.raises(ValueError, match=message):
        load(name, architecture=wanted)


def test_a_foreign_licence_must_be_accepted_by_name(tmp_path: Path) -> None:
    path = str(weights(tmp_path, replace(CARD, licence="CC-BY-NC-4.0")))
    with pytest.raises(ValueError, match=r"come under 'CC-BY-NC-4\.0': read it"):
        load(path, architecture="unet")
    with pytest.raises(ValueError, match=r"'CC-BY-NC-4\.0', not 'MIT'"):
        load(path, architecture="unet", licence="MIT")
    assert load(path, architecture="unet", licence="CC-BY-NC-4.0")


# The network's grid


def test_what_the_domain_holds_is_not_resampled() -> None:
    head = phantom((37, 41, 35))
    chi, made = once(
        model(classical, **BOTH), head.mask, head.zooms, field=head.field, grid="card"
    )
    torch.testing.assert_close(
        chi, classical(head.field * head.mask, head.mask) * head.mask, rtol=0, atol=2e-3
    )
    assert "resampled_to" not in made


@pytest.mark.parametrize(
    ("zooms", "tilt", "wanted"),
    [
        ((2.0, 2.0, 2.0), 0.0, None),
        ((0.9, 0.93, 0.9), 0.0, None),
        ((2.0, 2.0, 2.0), TILT, (2.0, 2.0, 2.0)),
        ((1.0, 1.0, 3.0), 0.0, (1.0, 1.0, 1.0)),
        ((0.5, 0.5, 0.5), 0.0, (0.8, 0.8, 0.8)),
        ((3.0, 2.5, 4.0), 0.0, (2.0, 2.0, 2.0)),
    ],
)
def test_a_domain_of_cubes_takes_cubes_of_any_size_in_it(
    zooms: Zooms, tilt: float, wanted: Zooms | None
) -> None:
    cubes = Domain(zooms=((0.8, 2.0),) * 3, alike=3)
    frame = Frame.of(zooms, (math.sin(tilt), 0.0, math.cos(tilt)), cubes, "card")
    assert (frame.turn is None) == (wanted is None)
    assert frame.zooms == (wanted or zooms)


@pytest.mark.parametrize("axis", [0, 1])
def test_axes_are_exchanged_where_b0_lies_along_another_one(axis: int) -> None:
    head = phantom((37, 41, 35))
    order = [2, 1, 0] if axis == 0 else [0, 2, 1]
    b0_direction = tuple(float(n == axis) for n in range(3))
    tissue = model(classical, **BOTH)
    upright, _ = once(tissue, head.mask, head.zooms, field=head.field)
    lying, made = once(
        tissue,
        head.mask.permute(order),
        head.zooms,
        field=head.field.permute(order),
        b0_direction=b0_direction,
    )
    torch.testing.assert_close(lying.permute(order), upright, rtol=0, atol=2e-3)
    assert "resampled_to" not in made


@pytest.mark.parametrize(
    ("shape", "zooms", "tilt", "within"),
    [
        ((40, 40, 40), (1.0, 1.0, 1.0), TILT, 0.35),
        ((37, 41, 35), (1.0, 1.0, 1.0), -TILT, 0.35),
        ((50, 40, 30), (0.7, 1.0, 1.4), TILT, 0.45),
        ((50, 50, 50), (0.7, 0.7, 0.7), 0.0, 0.35),
    ],
    ids=["tilted", "odd tilted", "anisotropic tilted", "fine"],
)
def test_the_networks_grid_is_upright_and_of_its_voxel_size(
    shape: tuple[int, int, int], zooms: Zooms, tilt: float, within: float
) -> None:
    """What knows axial scans of 1 mm alone maps all others; as they are, it could not."""
    head = phantom(shape, zooms, tilt=tilt)
    tissue = model(classical, **BOTH)
    oblique = f", {math.degrees(abs(tilt)):.0f} degrees oblique to B0" if tilt else ""
    told = f"mm{oblique}: resampled to 1 x 1 x 1 mm"
    with pytest.warns(RuntimeWarning, match=told):
        chi, made = once(
            tissue, head.mask, head.zooms, field=head.field, b0_direction=head.b0_direction
        )
    assert made["resampled_to"] == [1.0, 1.0, 1.0]
    assert error(chi, head.chi, head.mask) < within
    assert not chi[~head.mask].any()
    if tilt:
        blind, _ = once(
            tissue,
            head.mask,
            head.zooms,
            field=head.field,
            b0_direction=head.b0_direction,
            grid="native",
        )
        assert error(blind, head.chi, head.mask) > 1.5 * error(chi, head.chi, head.mask)


def test_the_frame_is_a_rotation_that_takes_the_third_axis_to_b0() -> None:
    b0 = (0.48, -0.36, -0.8)
    frame = Frame.of((1.0, 2.0, 1.0), b0, ONE_MM, "card")
    assert frame.turn is not None
    turn = torch.from_numpy(frame.turn)
    torch.testing.assert_close(turn @ turn.T, torch.eye(3, dtype=torch.float64))
    assert torch.linalg.det(turn).item() == pytest.approx(1)
    torch.testing.assert_close(turn[:, 2], -torch.tensor(b0, dtype=torch.float64))
    placed = Placed.around((10, 12, 14), (1.0, 2.0, 1.0), frame)
    corners = torch.cartesian_prod(*(torch.tensor([0.0, n - 1]) for n in (10, 12, 14))).double()
    inverse = torch.linalg.inv(torch.from_numpy(placed.affine))
    voxels = (corners * torch.tensor([1.0, 2.0, 1.0])) @ inverse[:3, :3].T + inverse[:3, 3]
    assert (voxels > -1e-6).all()
    assert (voxels < torch.tensor(placed.shape) - 1 + 1e-6).all()


def test_weights_that_learned_too_little_are_told() -> None:
    head = phantom((20, 20, 20))
    faint = model(lambda field: field)
    card = replace(faint.card, training={"validation": {"slope": 0.31}})
    with pytest.warns(RuntimeWarning, match="mine find 31% of the susceptibility"):
        once(faint._replace(card=card), head.mask, head.zooms, field=head.field)


def test_patches_and_their_seams_are_told(tmp_path: Path) -> None:
    head = phantom((40, 40, 40))
    path = str(weights(tmp_path))
    cut = head.invert(unet, weights=path)
    assert cut.chosen["patch"] == 16
    assert cut.chosen["halo"] == 4
    assert cut.chosen["seam_error"] < 1e-3  # the receptive field is 5 voxels wide
    whole = head.invert(unet, weights=path, patch=WHOLE, halo=8)
    assert "seam_error" not in whole.chosen
    torch.testing.assert_close(cut.chi, whole.chi, rtol=0, atol=1e-3 * whole.chi.abs().max())
    with pytest.raises(ValueError, match="give a multiple of 2"):
        head.invert(unet, weights=path, patch=3)


def test_kernels_are_predicted_for_the_scans_voxel_size() -> None:
    torch.manual_seed(0)
    network = MetaQSM(width=2, hidden=2).eval()
    domain = Domain(zooms=((0.5, 1.0), (0.5, 1.0), (1.0, 4.0)))
    card = replace(CARD, domain=domain, patch=WHOLE, halo=8, contract=Contract())
    head = phantom((32, 32, 16), (0.8, 0.9, 2.0))
    chi, _ = once(Model("m", network, card), head.mask, head.zooms, field=head.field)
    known = torch.where(head.mask, head.field, 0)
    x, y, z = (slice(int(w[0]), int(w[-1]) + 1) for w in (
        head.mask.any(dim=d).nonzero() for d in ((1, 2), (0, 2), (0, 1))))  # fmt: skip
    part = torch.zeros(1, 1, 64, 64, 64)
    shape = known[x, y, z].shape
    part[0, 0, 8 : 8 + shape[0], 8 : 8 + shape[1], 8 : 8 + shape[2]] = known[x, y, z]
    edges = [math.ceil((n + 16) / 16) * 16 for n in shape]
    with torch.no_grad():
        expected = network(part[..., : edges[0], : edges[1], : edges[2]], (0.8, 0.9, 2.0))
    inside = expected[0, 0, 8 : 8 + shape[0], 8 : 8 + shape[1], 8 : 8 + shape[2]]
    torch.testing.assert_close(chi[x, y, z], inside * head.mask[x, y, z], rtol=1e-4, atol=1e-5)


def test_filtered_phase_is_that_of_the_echo_nearest_to_the_trainings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = phantom((36, 36, 36))
    trained = radians_per_ppm(3.0, 0.020)
    domain = replace(ONE_MM, radians_per_ppm=trained)
    copy = model(lambda phase: phase, domain, channels=("filtered phase",))
    monkeypatch.setattr(inversion, "load", lambda *_, **__: copy)
    times = (0.004, 0.009, 0.016)
    phase = torch.stack([radians_per_ppm(7.0, time) * head.field for time in times])
    found = cpsi_net(phase, head.mask, head.zooms, echo_times=times, field_strength=7.0)
    assert found.chosen["echo"] == 2
    scale = radians_per_ppm(7.0, 0.009)
    high = high_pass(phase[1], head.mask, head.zooms, magnitude=torch.ones_like(phase[1]))
    torch.testing.assert_close(found.chi, trained / scale * high, rtol=1e-5, atol=1e-6)
    raw = cpsi_net(
        phase, head.mask, head.zooms, echo_times=times, field_strength=7.0, filtered=True
    )
    torch.testing.assert_close(raw.chi, trained * head.field * head.mask, rtol=1e-4, atol=1e-5)


def test_a_field_on_another_grid_or_not_finite_is_refused(tmp_path: Path) -> None:
    path, head = str(weights(tmp_path)), phantom((20, 20, 20))
    with pytest.raises(ValueError, match="different grids"):
        unet(head.field[1:], head.mask, head.zooms, weights=path)
    field = head.field.clone()
    field[10, 10, 10] = math.nan
    with pytest.raises(ValueError, match="not finite in 1 of"):
        unet(field, head.mask, head.zooms, weights=path)
    with pytest.raises(ValueError, match="length 2, not 1"):
        unet(head.field, head.mask, head.zooms, weights=path, b0_direction=(0, 0, 2))


# Settings and graphs


def test_wrong_weights_are_refused_before_the_run(tmp_path: Path) -> None:
    path = str(weights(tmp_path))
    fits: Mapping[str, Any] = {
        "inversion": "tkd,unet",
        "parameters": {"inversion": {"weights": path}},
    }
    combine(fits).check()
    with pytest.raises(ValueError, match="weights of unet, not of qsmgan"):
        combine({**fits, "inversion": "qsmgan"}).check()
    with pytest.raises(ValueError, match="could be meant for several methods"):
        combine({**fits, "inversion": "qsmgan,unet"}).check()


def test_other_weights_of_the_same_name_are_another_input(tmp_path: Path) -> None:
    path = str(weights(tmp_path))
    first = init_inversion_wf(method="unet", parameters={"weights": path}).get_node("unet")
    weights(tmp_path, replace(CARD, network=replace(TINY, options={"width": 4, "depth": 1})))
    second = init_inversion_wf(method="unet", parameters={"weights": path}).get_node("unet")
    assert isdefined(first.inputs.sha256)
    assert first.inputs.sha256 != second.inputs.sha256
    assert first.interface.inputs.get_hashval() != second.interface.inputs.get_hashval()


# Weights that come with qsmpipe

WORST = {"unet": 0.7, "qsmgan": 0.7, "si-qsm": 0.7, "meta-qsm": 0.85}
"""Error of each network on the phantom: no more than that it maps it, and upright."""


def test_every_network_has_weights() -> None:
    assert set(NETWORKS) <= set(weights_names())


@pytest.mark.parametrize("name", weights_names())
def test_a_card_tells_what_its_weights_are(name: str) -> None:
    path, card = read_card(name)
    assert path.stat().st_size <= 16 * 2**20
    assert card.licence == "Apache-2.0"
    assert {"paper", "data", "limits"} <= set(card.about)
    assert {"steps", "seed", "hours", "hardware", "commit", "validation"} <= set(card.training)
    given = ("field", "mask", "filtered phase")
    assert load(name, architecture=card.network.architecture, given=given).card == card


@pytest.mark.filterwarnings("ignore:the weights")
@pytest.mark.parametrize("tilt", [0.0, TILT], ids=["axial", "tilted"])
@pytest.mark.parametrize("name", [n for n, r in NETWORKS.items() if r.starts_from != "phase"])
def test_the_field_of_a_phantom_gives_it_back(name: str, tilt: float) -> None:
    """These networks have seen brains or shapes, but no such head of 15 mm."""
    zooms: Zooms = (1.0, 1.0, 1.0)
    head = phantom((40, 38, 41), zooms, tilt=tilt, noise=0.001)
    found = head.invert(function_of("inversion", name), mirror=False)
    assert error(found.chi, head.chi, head.mask) < WORST[name]
    assert not found.chi[~head.mask].any()
    assert found.chosen["weights"] == name
    again = head.invert(function_of("inversion", name), mirror=False)
    assert torch.equal(found.chi, again.chi)


@pytest.mark.filterwarnings("ignore:the weights")
def test_the_phase_of_a_phantom_gives_it_back() -> None:
    head = phantom((40, 38, 41), noise=0.001)
    scale = radians_per_ppm(3.0, 0.020)
    phase = scale * head.field[None]
    found = cpsi_net(phase, head.mask, head.zooms, echo_times=[0.020], field_strength=3.0)
    assert error(found.chi, head.chi, head.mask) < 0.9


@pytest.mark.filterwarnings("ignore:the weights")
@pytest.mark.parametrize("name", NETWORKS)
def test_the_analytic_field_of_a_ball_gives_its_susceptibility(name: str) -> None:
    """Closed form, not our own dipole: tilted by 30 degrees, anisotropic, odd sizes.

    Bounds are wide: these weights find between 0.95 and 1.4 of it, and 0.4 after the filter of
    SWI, which takes most of what is as large.
    """
    ball = lone_ball()
    field, given, least = ball.field, {"b0_direction": TILTED, "mirror": False}, 0.8
    if NETWORKS[name].starts_from == "phase":
        field = radians_per_ppm(3.0, 0.020) * field[None]
        given |= {"echo_times": [0.020], "field_strength": 3.0}
        least = 0.3
    chi = function_of("inversion", name)(field, ball.mask, ball.zooms, **given).chi
    found, spread = ball.found(chi)
    assert least < found < 1.4
    assert spread < 0.1


@pytest.mark.parametrize("name", NETWORKS)
def test_the_workflow_maps_a_tilted_scan(name: str, tmp_path: Path) -> None:
    head = phantom((36, 38, 25), (1.0, 1.0, 1.5), tilt=TILT, noise=0.001)
    x, _, z = head.b0_direction
    affine = np.eye(4)
    affine[:3, :3] = np.array([[z, 0, -x], [0, 1, 0], [x, 0, z]]) * head.zooms
    scale = radians_per_ppm(3.0, 0.020)
    phase = torch.stack([0.5 * scale * head.field, scale * head.field], dim=-1)
    workflow = init_inversion_wf(method=name, parameters={"mirror": False})
    inputs = workflow.inputs.inputnode
    for key, data in {"field": head.field, "mask": head.mask, "phase": phase}.items():
        if hasattr(inputs, key):
            path = tmp_path / f"{key}.nii.gz"
            nb.Nifti1Image(data.numpy().astype(np.float32), affine).to_filename(path)
            setattr(inputs, key, str(path))
    if NETWORKS[name].starts_from == "phase":
        inputs.echo_times, inputs.field_strength = [0.010, 0.020], 3.0
    workflow.base_dir = str(tmp_path)
    graph = workflow.run()
    outputs = next(node.result.outputs for node in graph.nodes() if node.name == name)
    chi = images.load(outputs.chi)
    assert chi.shape == head.mask.shape
    assert chi[head.mask].abs().max() > 0.01
    assert not chi[~head.mask].any()
    parameters = outputs.step["parameters"]
    assert parameters["weights"] == name
    assert len(parameters["sha256"]) == 64
    assert "resampled_to" in parameters
    assert "resampled to" in outputs.step["warnings"][0]
