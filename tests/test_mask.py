"""Masks: balls in mm, thresholds under a bias, the brain in a head, expressions of methods."""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nb
import numpy as np
import pytest
import torch
from nibabel.affines import from_matvec
from nipype.interfaces.utility import IdentityInterface
from nipype.pipeline.engine import Node, Workflow
from scipy import ndimage

from qsmpipe import images
from qsmpipe.interfaces import mask as interfaces
from qsmpipe.methods import METHODS, function_of, interface_of, mask_steps, parameters_of
from qsmpipe.numerics.masks.bet import bet, icosphere, winding_number
from qsmpipe.numerics.masks.morphology import (
    combine,
    dilate,
    erode,
    fill_holes,
    largest_component,
    largest_core,
)
from qsmpipe.numerics.masks.quality import otsu, quality
from qsmpipe.numerics.masks.threshold import bias_field, robust_level, threshold
from qsmpipe.numerics.unwrap.romeo import quality_map
from qsmpipe.workflows.mask import init_mask_wf

PHILIPS = Path(__file__).parents[2] / "shared/data/philips-head/reference"


def dice(first: torch.Tensor, second: torch.Tensor) -> float:
    return 2 * (first & second).sum().item() / (first.sum() + second.sum()).item()


def grid(shape: tuple[int, ...], zooms: tuple[float, ...]) -> np.ndarray:
    """Coordinates (3, X, Y, Z) in mm from the centre."""
    axes = [(np.arange(n) - (n - 1) / 2) * zoom for n, zoom in zip(shape, zooms, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def ellipsoid(
    place: np.ndarray, *axes: float, centre: tuple[float, ...] = (0, 0, 0)
) -> np.ndarray:
    offsets = place - np.reshape(centre, (3, 1, 1, 1))
    return sum((offset / axis) ** 2 for offset, axis in zip(offsets, axes, strict=True)) <= 1


class Scan(NamedTuple):
    magnitude: torch.Tensor
    brain: torch.Tensor
    zooms: tuple[float, float, float]


CONTRASTS = {
    "proton density": (0.8, 0.9, 0.06, 1.2, 0.9),
    "T1": (1.0, 0.88, 0.04, 1.5, 0.45),
    "late echo": (0.57, 0.65, 0.02, 0.6, 0.9),
}
"""White and grey matter (10 mm of it), skull, scalp, ventricles."""

GRIDS = {
    "even": ((76, 88, 72), (2.6, 2.6, 2.6)),
    "odd": ((71, 83, 65), (2.8, 2.8, 2.8)),
    "anisotropic": ((101, 115, 47), (2.0, 2.0, 4.0)),
    "thin first axis": ((47, 86, 71), (4.1, 2.7, 2.9)),
}


def scan(
    shape: tuple[int, ...],
    zooms: tuple[float, float, float],
    contrast: str = "proton density",
    *,
    noise: float = 0.03,
    rotation: np.ndarray | None = None,
) -> Scan:
    """Head of 168 x 200 x 152 mm: scalp, skull of 7 mm, brain with ventricles, a coil's bias."""
    white, grey, skull, scalp, fluid = CONTRASTS[contrast]
    place = grid(shape, zooms)
    if rotation is not None:
        place = np.einsum("ij,jxyz->ixyz", rotation, place)
    brain = ellipsoid(place, 68, 84, 60, centre=(0, 0, 4))
    values = np.zeros(shape)
    values[ellipsoid(place, 84, 100, 76)] = scalp
    values[ellipsoid(place, 75, 91, 67, centre=(0, 0, 4))] = skull
    values[brain] = grey
    values[ellipsoid(place, 58, 74, 50, centre=(0, 0, 4))] = white
    for side in (-1, 1):
        values[ellipsoid(place, 8, 30, 12, centre=(14 * side, 0, 6))] = fluid
    values *= 0.8 + 0.5 * (place**2).sum(0) / 90**2 + 0.2 * place[0] / 90
    random = np.random.default_rng(0)
    values = np.hypot(
        values + noise * random.normal(size=shape), noise * random.normal(size=shape)
    )
    return Scan(torch.from_numpy(values.astype(np.float32)), torch.from_numpy(brain), zooms)


# Morphology


@pytest.mark.parametrize("zooms", [(1.0, 1.0, 1.0), (0.7, 1.3, 2.5)])
@pytest.mark.parametrize("radius", [0.5, 2.0, 3.9])
def test_erosion_and_dilation_are_those_of_a_ball(
    zooms: tuple[float, float, float], radius: float
) -> None:
    array = ndimage.gaussian_filter(np.random.default_rng(1).normal(size=(27, 22, 19)), 2) > 0
    mask = torch.from_numpy(array)
    half = [int(radius / zoom) for zoom in zooms]
    offsets = np.stack(np.meshgrid(*(np.arange(-n, n + 1) for n in half), indexing="ij"))
    ball = (np.square(offsets * np.reshape(zooms, (3, 1, 1, 1)))).sum(0) <= radius**2 + 1e-9
    np.testing.assert_array_equal(
        erode(mask, zooms, radius=radius), ndimage.binary_erosion(array, ball)
    )
    np.testing.assert_array_equal(
        dilate(mask, zooms, radius=radius), ndimage.binary_dilation(array, ball)
    )


def test_a_radius_on_a_voxel_counts_whatever_the_unit_of_length() -> None:
    mask = torch.ones(9, 9, 9, dtype=torch.bool)
    for zoom in (0.1, 0.3, 1.0, 7.7):
        assert erode(mask, (zoom,) * 3, radius=zoom * 3).sum() == 27


def test_no_argument_is_written_to() -> None:
    mask = torch.ones(5, 5, 5, dtype=torch.bool)
    for result in (
        erode(mask, (1, 1, 1), radius=0),
        dilate(mask, (1, 1, 1), radius=0),
        largest_component(mask),
        combine([mask], "and"),
    ):
        result[:] = False
    assert mask.all()


def test_holes_are_filled_up_to_a_volume() -> None:
    mask = torch.zeros(20, 20, 20, dtype=torch.bool)
    mask[2:18, 2:18, 2:18] = True
    mask[5:7, 5:7, 5:7] = False  # 8 voxels
    mask[10:14, 10:14, 10:14] = False  # 64 voxels
    mask[2:5, 3, 3] = False  # open to the outside
    zooms = (5.0, 5.0, 4.0)  # 0.1 mL a voxel
    small = fill_holes(mask, zooms, max_volume=1.0)
    assert small.sum() == mask.sum() + 8
    everything = fill_holes(mask, zooms)
    assert everything.sum() == mask.sum() + 72
    assert not everything[2:5, 3, 3].any()


def test_a_mask_that_fills_the_grid_and_an_empty_one_stay() -> None:
    full = torch.ones(6, 7, 8, dtype=torch.bool)
    for mask in (full, ~full):
        assert torch.equal(fill_holes(mask, (1, 1, 1)), mask)
        assert torch.equal(largest_component(mask), mask)
        assert torch.equal(largest_core(mask, (1, 1, 1), radius=1), mask)


def test_bridges_are_cut() -> None:
    place = grid((60, 30, 30), (1.0, 1.0, 1.0))
    big = ellipsoid(place, 12, 12, 12, centre=(-14, 0, 0))
    small = ellipsoid(place, 9, 9, 9, centre=(16, 0, 0))
    bridge = (np.hypot(place[1], place[2]) < 2.5) & (np.abs(place[0]) < 12)
    mask = torch.from_numpy(big | small | bridge)
    assert largest_component(mask).sum() == mask.sum()
    core = largest_core(mask, (1, 1, 1), radius=3)
    assert core[torch.from_numpy(big)].all()
    assert not core[torch.from_numpy(small)].any()


def test_masks_combine() -> None:
    first, second = torch.tensor([[[True, True, False]]]), torch.tensor([[[True, False, False]]])
    assert combine([first, second], "and").tolist() == [[[True, False, False]]]
    assert combine([first, second], "or").tolist() == [[[True, True, False]]]
    with pytest.raises(ValueError, match=r"mask 2 \(1, 1, 2\) and mask 1 \(1, 1, 3\)"):
        combine([first, second[..., :2]], "and")
    with pytest.raises(ValueError, match="choose from and, or"):
        combine([first], "xor")
    with pytest.raises(ValueError, match="compare it with a threshold"):
        combine([first.float()], "and")


# Threshold


@pytest.mark.parametrize("zooms", [(3.0, 3.0, 3.0), (2.0, 3.1, 4.3)])
@pytest.mark.parametrize("echoes", [0, 3])
def test_threshold_finds_an_object_under_a_bias(
    zooms: tuple[float, float, float], echoes: int
) -> None:
    shape = tuple(int(190 / zoom) for zoom in zooms)
    place = grid(shape, zooms)
    inside = ellipsoid(place, 60, 75, 66)
    bias = np.exp(2.2 * place[0] / 60 + 0.4 * place[1] / 75)  # 90 : 1 over the object
    random = np.random.default_rng(2)
    volumes = [
        np.hypot(
            100 * np.exp(-0.3 * echo) * inside * bias + 1.5 * random.normal(size=shape),
            1.5 * random.normal(size=shape),
        )
        for echo in range(echoes or 1)
    ]
    magnitude = torch.from_numpy(np.stack(volumes) if echoes else volumes[0])
    truth = torch.from_numpy(inside)
    assert dice(threshold(magnitude, zooms), truth) > 0.99
    assert dice(threshold(magnitude, zooms, bias_sigma=0), truth) < 0.97


def test_what_decays_early_is_left_out_where_all_echoes_count() -> None:
    zooms = (3.0, 3.0, 3.0)
    place = grid((60, 60, 60), zooms)
    inside = ellipsoid(place, 70, 75, 66)
    fast = ellipsoid(place, 20, 20, 20, centre=(0, 66, 0)) & inside
    random = np.random.default_rng(7)
    echoes = [
        np.hypot(
            100 * inside * np.where(fast, np.exp(-4.0 * echo), 1.0)
            + random.normal(size=inside.shape),
            random.normal(size=inside.shape),
        )
        for echo in range(3)
    ]
    magnitude = torch.from_numpy(np.stack(echoes))
    truth, lost = torch.from_numpy(inside), torch.from_numpy(fast)
    assert dice(threshold(magnitude, zooms), truth) > 0.99
    assert dice(threshold(magnitude, zooms, echoes="all"), truth & ~lost) > 0.99
    first = threshold(magnitude[0], zooms)
    assert torch.equal(threshold(magnitude[0], zooms, echoes="all"), first)
    with pytest.raises(ValueError, match="choose 'combined' or 'all'"):
        threshold(magnitude, zooms, echoes="every")  # type: ignore[arg-type]


def test_the_bias_field_is_that_of_the_coil() -> None:
    zooms = (3.0, 3.0, 4.0)
    place = grid((60, 60, 45), zooms)
    inside = torch.from_numpy(ellipsoid(place, 70, 75, 72))
    truth = torch.from_numpy(np.exp(0.8 * place[0] / 70))
    field = bias_field(truth * inside, zooms, sigma=20.0)
    assert field.min() > 0
    core = erode(inside, zooms, radius=20)
    ratio = (field / truth)[core]
    assert ratio.std() / ratio.mean() < 0.05


@pytest.mark.parametrize("scale", [1e-6, 1e7])
def test_threshold_knows_no_unit(scale: float) -> None:
    magnitude, _, zooms = scan((40, 44, 36), (5.0, 5.0, 5.0))
    assert torch.equal(threshold(magnitude * scale, zooms), threshold(magnitude, zooms))


def test_an_image_without_background_keeps_its_dim_parts() -> None:
    values = torch.linspace(60, 100, 1000).reshape(10, 10, 10)
    assert robust_level(values) < 60


@pytest.mark.parametrize("function", [threshold, bet])
def test_an_empty_magnitude_is_refused(function: Any) -> None:
    with pytest.raises(ValueError, match="wrong file or scaling"):
        function(torch.zeros(8, 8, 8), (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"\(8, 8\)"):
        function(torch.ones(8, 8), (1.0, 1.0, 1.0))


# Phase quality


def test_quality_leaves_noise_out() -> None:
    zooms = (2.0, 2.0, 2.5)
    place = grid((56, 60, 45), zooms)
    inside = ellipsoid(place, 45, 50, 44)
    hole = ellipsoid(place, 12, 12, 14, centre=(0, 12, 36))  # a sinus: no signal, open upwards
    slope = 0.05 * place[0] + 0.03 * place[2] + 0.001 * place[1] ** 2
    signal = np.where(inside & ~hole, 1.0, 0.0)
    random = np.random.default_rng(3)
    noise = random.normal(size=(2, 2, *inside.shape)) * 0.06
    echoes = [
        signal * np.exp(1j * slope * echo) + noise[echo - 1, 0] + 1j * noise[echo - 1, 1]
        for echo in (1, 2)
    ]
    phase = torch.from_numpy(np.angle(echoes))
    magnitude = torch.from_numpy(np.abs(echoes))
    quality_of_phase = quality_map(phase, magnitude=magnitude, echo_times=(0.005, 0.01))
    mask = quality(quality_of_phase, zooms)
    assert dice(mask, torch.from_numpy(inside & ~hole)) > 0.95
    assert not mask[torch.from_numpy(~ndimage.binary_dilation(inside, iterations=2))].any()
    assert not mask[torch.from_numpy(ndimage.binary_erosion(hole & inside, iterations=2))].any()
    assert quality(quality_of_phase, zooms, threshold=0.9).sum() < mask.sum()


def test_otsu_splits_two_heaps() -> None:
    """Where the variance between both parts is largest, by trying every value (and not bins)."""
    random = np.random.default_rng(4)
    values = np.concatenate([random.normal(0.2, 0.05, 3000), random.normal(0.7, 0.1, 1000)])
    values = np.sort(values.clip(0.01, 1))
    image = np.concatenate([values, np.zeros(96)]).reshape(16, 16, 16)  # 0 is no quality

    def between(n: int) -> float:
        return n * (values.size - n) * (values[:n].mean() - values[n:].mean()) ** 2

    level = otsu(torch.from_numpy(image))
    assert 0.35 < level < 0.55, "the heaps meet there"
    best = max(map(between, range(1, values.size)))
    assert between(np.count_nonzero(values <= level)) > 0.999 * best


def test_otsu_finds_nothing_in_one_value() -> None:
    with pytest.raises(ValueError, match="the quality map is constant"):
        otsu(torch.full((4, 4, 4), 0.5))


def test_what_is_no_quality_map_is_refused() -> None:
    with pytest.raises(ValueError, match="from 0 to 100"):
        quality(torch.linspace(0, 100, 64).reshape(4, 4, 4), (1, 1, 1))
    with pytest.raises(ValueError, match="give a number"):
        quality(torch.full((4, 4, 4), 0.5), (1, 1, 1))
    with pytest.raises(ValueError, match="one map"):
        quality(torch.ones(2, 4, 4, 4), (1, 1, 1))


# BET


@pytest.mark.parametrize("shape", [(24, 25, 27), (41, 20, 33)])
def test_a_surface_is_filled_as_geometry_says(shape: tuple[int, int, int]) -> None:
    vertices, faces = icosphere(4)
    axes = np.array(shape) / 2 - 2.3
    centre = (np.array(shape) - 1) / 2
    winding = winding_number(vertices * axes + centre, faces, shape)
    inside = ellipsoid(grid(shape, (1.0, 1.0, 1.0)), *axes)
    assert set(np.unique(winding)) == {0, 1}
    assert winding.sum() == pytest.approx(inside.sum(), rel=0.01)
    np.testing.assert_array_equal(
        winding_number(vertices * axes + centre, faces[:, ::-1], shape), -winding
    )
    # Half of it beyond the grid, and twice around.
    np.testing.assert_array_equal(
        winding_number(vertices * axes + centre - (0, 0, 9), faces, shape)[..., :-9],
        winding[..., 9:],
    )
    twice = np.concatenate([faces, faces])
    np.testing.assert_array_equal(
        winding_number(vertices * axes + centre, twice, shape), 2 * winding
    )


@pytest.mark.parametrize(
    ("grid_name", "contrast"),
    [
        *itertools.product(["odd"], CONTRASTS),
        *((name, "late echo") for name in GRIDS if name != "odd"),
    ],
)
def test_bet_finds_the_brain(grid_name: str, contrast: str) -> None:
    magnitude, brain, zooms = scan(*GRIDS[grid_name], contrast)
    mask = bet(magnitude, zooms)
    assert dice(mask, brain) > 0.95
    assert mask.sum().item() == pytest.approx(brain.sum().item(), rel=0.05)


def rotation(degrees: float, axis: tuple[float, float, float]) -> np.ndarray:
    x, y, z = np.asarray(axis) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.deg2rad(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def test_bet_finds_a_tilted_brain_from_a_file(tmp_path: Path) -> None:
    turn = rotation(30, (1, 0.4, 0.2))
    magnitude, brain, zooms = scan(*GRIDS["anisotropic"], rotation=turn)
    path = tmp_path / "magnitude.nii.gz"
    affine = from_matvec(turn @ np.diag(zooms), (-90, -110, -80))
    late = magnitude.numpy() * np.random.default_rng(5).uniform(size=magnitude.shape)
    nb.Nifti1Image(np.stack([magnitude.numpy(), late], axis=-1), affine).to_filename(path)
    result = interfaces.BET(magnitude=path).run(cwd=tmp_path)
    mask = images.load(result.outputs.mask, like=path, dtype=torch.bool)
    assert dice(mask, brain) > 0.95
    assert mask.sum().item() == pytest.approx(brain.sum().item(), rel=0.05)
    assert result.outputs.step["parameters"]["fractional_intensity"] == 0.5


def test_bet_stays_in_a_slab_that_cuts_the_brain() -> None:
    magnitude, brain, zooms = scan(*GRIDS["odd"])
    slab = slice(26, 48)
    mask = bet(magnitude[..., slab], zooms)
    assert dice(mask, brain[..., slab]) > 0.93


def test_bet_shrinks_with_the_fraction_and_repeats_itself() -> None:
    magnitude, _, zooms = scan(*GRIDS["odd"])
    large, small = (
        bet(magnitude, zooms, fractional_intensity=f, iterations=200) for f in (0.3, 0.6)
    )
    assert large.sum() > small.sum()
    again = bet(magnitude.double(), zooms, fractional_intensity=0.3, iterations=200)
    assert torch.equal(again, large)
    with pytest.raises(ValueError, match=r"is 1\.5: give a number above 0 and below 1"):
        bet(magnitude, zooms, fractional_intensity=1.5)


def test_bet_measures_in_mm() -> None:
    """A brain that is four times smaller in every direction is found as well."""
    magnitude, brain, zooms = scan(*GRIDS["odd"])
    x, y, z = (zoom / 4 for zoom in zooms)
    assert dice(bet(magnitude, (x, y, z)), brain) > 0.93


@pytest.mark.skipif(not PHILIPS.is_dir(), reason="shared test data not found: philips-head")
def test_the_brain_of_a_volunteer_has_a_plausible_volume() -> None:
    path = PHILIPS / "2001_WIP_fcMRI_Field_Mapping_cl_e1.nii.gz"
    magnitude, zooms = images.load(path), images.zooms_of(path)
    brain = bet(magnitude, zooms)
    millilitres = np.prod(zooms) / 1000
    assert 900 < brain.sum() * millilitres < 1900
    head = threshold(magnitude, zooms)
    assert 1.2 * brain.sum() < head.sum() < 4500 / millilitres
    assert (brain & head).sum() > 0.98 * brain.sum()


# Interfaces and workflow


def test_the_interfaces_have_the_functions_parameters() -> None:
    for method in METHODS["mask"]:
        inputs = interface_of("mask", method)().inputs
        for name, parameter in parameters_of("mask", method).items():
            assert getattr(inputs, name) == parameter.default


@pytest.mark.parametrize("method", METHODS["mask"])
def test_every_method_keeps_its_arguments_and_repeats_itself(method: str) -> None:
    magnitude, brain, zooms = scan((40, 44, 36), (5.0, 5.0, 5.0))
    data = magnitude if method != "quality" else 0.8 * brain.float() + 0.1
    before = data.clone()
    masks = [function_of("mask", method)(data, zooms) for _ in range(2)]
    assert torch.equal(data, before)
    assert torch.equal(*masks)
    assert masks[0].dtype is torch.bool
    assert masks[0].shape == data.shape
    assert masks[0].any()


EXPRESSIONS = [
    *METHODS["mask"],
    "given",
    *(f"{a} {sign} {b}" for a, b in itertools.permutations(METHODS["mask"], 2) for sign in "&|"),
    "given|threshold&bet",
    "given & threshold | bet & quality",
    " (given | threshold) & bet ",
    "given & (threshold | bet) | quality",
    "given | (threshold | bet) & quality",
    "((given)) & ((threshold | (bet & quality)))",
]


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_expressions_mean_what_python_means(text: str) -> None:
    names = [*METHODS["mask"], "given"]
    for values in itertools.product([False, True], repeat=len(names)):
        known = dict(zip(names, values, strict=True))
        stack: list[bool] = []
        for word in mask_steps(text):
            if word in known:
                stack.append(known[word])
            else:
                second, first = stack.pop(), stack.pop()
                stack.append(first and second if word == "&" else first or second)
        assert stack == [bool(eval(text.strip(), {}, known))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a method is missing"),
        ("bet &", "a method is missing"),
        ("bet && quality", "a method is missing"),
        ("bett & quality", "did you mean 'bet'"),
        ("bet quality", "a sign .* is missing between 'bet' and 'quality'"),
        ("bet (quality)", "a sign .* is missing"),
        ("(bet) quality", "a sign .* is missing"),
        ("bet & bet", "stands there twice"),
        ("none", "no method 'none'"),
        ("()", "a method is missing"),
        ("(bet", "its partner"),
        ("bet)", "its partner"),
        ("bet & (quality | threshold))", "its partner"),
    ],
)
def test_a_wrong_expression_is_explained(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mask_steps(text)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_graph_is_built_for_every_expression(expression: str) -> None:
    workflow = init_mask_wf(method=expression, erosion=2.0, omp_nthreads=2)
    names = set(workflow.list_node_names())
    order = mask_steps(expression)
    signs = [word for word in order if word in "&|"]
    assert set(order) - set(signs) <= names
    for number, sign in enumerate(signs, 1):
        node = workflow.get_node(f"combine_{number}")
        assert node.inputs.operation == {"&": "and", "|": "or"}[sign]
    assert workflow.get_node("refine").inputs.erosion == 2.0
    assert workflow.get_node("refine").inputs.num_threads == 1, "it is serial"


def test_parameters_reach_their_method() -> None:
    workflow = init_mask_wf(
        method="bet & quality",
        parameters={"bet": {"fractional_intensity": 0.3}, "quality": {"threshold": 0.4}},
    )
    assert workflow.get_node("bet").inputs.fractional_intensity == 0.3
    assert workflow.get_node("quality").inputs.threshold == 0.4
    assert init_mask_wf(method="quality").get_node("quality").inputs.threshold == "otsu"
    with pytest.raises(ValueError, match="no parameter 'fraction': choose from fractional"):
        init_mask_wf(method="bet", parameters={"bet": {"fraction": 0.3}})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two echoes of a head at 5 mm, on a tilted grid."""
    folder = tmp_path_factory.mktemp("mask")
    magnitude, brain, zooms = scan((40, 44, 36), (5.0, 5.0, 5.0))
    affine = from_matvec(rotation(20, (0, 1, 0)) @ np.diag(zooms), (1, 2, 3))
    place = grid(magnitude.shape, zooms)
    random = np.random.default_rng(6).uniform(-np.pi, np.pi, magnitude.shape)
    phase = np.where(magnitude > 0.2, 0.02 * place[0], random)
    echoes = {
        "magnitude": np.stack([magnitude, 0.8 * magnitude], -1),
        "phase": np.stack([phase, np.angle(np.exp(2j * phase))], -1),
        "mask_given": brain.numpy(),
    }
    for name, values in echoes.items():
        nb.Nifti1Image(values.astype(np.float32), affine).to_filename(folder / f"{name}.nii.gz")
    return {name: folder / f"{name}.nii.gz" for name in echoes}


@pytest.mark.parametrize("expression", ["bet & quality", "given"])
def test_the_workflow_runs(expression: str, files: dict[str, Path], tmp_path: Path) -> None:
    mask_wf = init_mask_wf(method=expression, erosion=5.0)
    outer = Workflow(name="outer", base_dir=tmp_path)
    end = Node(IdentityInterface(["mask", "quality", "steps"]), name="end")
    keep = Node(interfaces.Refine(), name="keep")
    outer.connect([
        (mask_wf, end, [(f"outputnode.{x}", x) for x in ("mask", "quality", "steps")]),
        (end, keep, [("mask", "mask")]),
    ])  # fmt: skip
    for name, path in files.items():
        setattr(mask_wf.inputs.inputnode, name, path)
    mask_wf.inputs.inputnode.echo_times = [0.005, 0.01]
    done = {node.name: node for node in outer.run().nodes()}
    steps = done["steps"].result.outputs.out
    expected = {"bet & quality": ["bet", "quality", "combine"], "given": ["given"]}[expression]
    assert [step["method"] for step in steps] == ["quality_map", *expected, "refine"]
    mask = images.load(
        done["refine"].result.outputs.mask, like=files["magnitude"], dtype=torch.bool
    )
    brain = images.load(files["mask_given"], dtype=torch.bool)
    smaller = erode(brain, (5.0, 5.0, 5.0), radius=5.0)
    if expression == "given":
        assert torch.equal(mask, smaller)
    else:
        assert dice(mask, smaller) > 0.85
    values = images.load(done["quality_map"].result.outputs.quality)
    assert 0 <= values.min() <= values.max() <= 1


def test_a_given_mask_is_not_resampled(files: dict[str, Path], tmp_path: Path) -> None:
    image = nb.load(files["mask_given"])
    values = image.get_fdata()
    shifted = image.affine.copy()
    shifted[0, 3] += 2.0
    wrong = {
        "not on the grid": nb.Nifti1Image(values, shifted),
        "no whole numbers": nb.Nifti1Image(values * 0.7, image.affine),
        "2 volumes": nb.Nifti1Image(np.stack([values, values], -1), image.affine),
    }
    for message, other in wrong.items():
        other.to_filename(tmp_path / "other.nii.gz")
        with pytest.raises(ValueError, match=message):
            interfaces.Given(mask=tmp_path / "other.nii.gz", magnitude=files["magnitude"]).run(
                cwd=tmp_path
            )
    labels = nb.Nifti1Image((values * 3)[..., None], image.affine)
    labels.to_filename(tmp_path / "labels.nii.gz")
    result = interfaces.Given(mask=tmp_path / "labels.nii.gz", magnitude=files["magnitude"]).run(
        cwd=tmp_path
    )
    assert nb.load(result.outputs.mask).get_fdata().sum() == values.sum()


def test_an_empty_mask_is_refused_by_name(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"eroding by 90 mm emptied the mask.*erode less"):
        interfaces.Refine(mask=files["mask_given"], erosion=90.0).run(cwd=tmp_path)
    image = nb.load(files["mask_given"])
    nb.Nifti1Image(0 * image.get_fdata(), image.affine).to_filename(tmp_path / "empty.nii.gz")
    with pytest.raises(ValueError, match="was empty before it was refined"):
        interfaces.Refine(mask=tmp_path / "empty.nii.gz").run(cwd=tmp_path)


def test_refining_fills_and_keeps_one_piece(files: dict[str, Path], tmp_path: Path) -> None:
    image = nb.load(files["mask_given"])
    values = image.get_fdata()
    whole = values.sum()
    values[20, 22, 18] = 0
    values[:2, :2, :2] = 1
    nb.Nifti1Image(values, image.affine).to_filename(tmp_path / "rough.nii.gz")
    result = interfaces.Refine(mask=tmp_path / "rough.nii.gz").run(cwd=tmp_path)
    assert nb.load(result.outputs.mask).get_fdata().sum() == whole
