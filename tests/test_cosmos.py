"""Several orientations of one head give one map, better than a single one can."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nb
import numpy as np
import pytest
import torch
from datasets import write
from phantoms import error, phantom
from scipy.fft import next_fast_len
from torch import Tensor

from qsmpipe import bids, checks, derivatives, examples, images
from qsmpipe.cli import main
from qsmpipe.examples import rotation
from qsmpipe.interfaces.cosmos import Cosmos, RegisterRigid, ResampleTo
from qsmpipe.numerics import kernels
from qsmpipe.numerics.inversion import tv
from qsmpipe.numerics.inversion.cosmos import conditioning, cosmos
from qsmpipe.numerics.operators import Dipole
from qsmpipe.numerics.resampling import resample, resample_mask
from qsmpipe.numerics.simulate import FreeSpace
from qsmpipe.placement import b0_direction, rotation_of
from qsmpipe.registration import turned_by
from qsmpipe.settings import Settings, combine
from qsmpipe.workflows.base import init_run_wf
from qsmpipe.workflows.cosmos import init_cosmos_wf

AXIAL = (0.0, 0.0, 1.0)


def turned(degrees: float, towards: int = 0) -> tuple[float, float, float]:
    """Direction of B0, turned from the third axis towards another."""
    b = [0.0, 0.0, math.cos(math.radians(degrees))]
    b[towards] = math.sin(math.radians(degrees))
    return b[0], b[1], b[2]


THREE = (AXIAL, turned(25, 0), turned(25, 1))


def measured(
    directions: Sequence[Sequence[float]] = THREE, *, noise: float = 0.0, **grid: Any
) -> tuple[Tensor, Any]:
    """Fields of the phantom at several directions of B0, and the phantom."""
    truth = phantom(**grid)
    generator = torch.Generator().manual_seed(1)
    chi = truth.chi.double()
    wide = tuple(2 * n for n in chi.shape)
    fields = [
        Dipole(wide, kernels.dipole(wide, truth.zooms, b, tapered=False, like=chi))(chi)
        + noise * torch.randn(chi.shape, generator=generator, dtype=chi.dtype)
        for b in directions
    ]
    return torch.stack(fields).to(truth.chi), truth


# --- how well orientations determine a map ------------------------------------------------------


def test_the_smallest_sum_is_that_of_a_fine_grid() -> None:
    directions = (AXIAL, turned(20, 0), turned(30, 1))
    theta, phi = np.meshgrid(np.linspace(0, np.pi, 721), np.linspace(0, 2 * np.pi, 1441))
    k = np.stack([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)])
    sums = sum((1 / 3 - np.tensordot(b, k, 1) ** 2) ** 2 for b in directions)
    found = conditioning(directions)
    assert found.smallest == pytest.approx(sums.min(), rel=0.01)
    assert found.angles[:2] == (20.0, 30.0)


def test_what_leaves_k_space_undetermined() -> None:
    assert conditioning([AXIAL, turned(40)]).smallest < 1e-4, "two cones always meet"
    assert conditioning([turned(90, 0), turned(90, 1), AXIAL]).smallest < 1e-4, "along 1, 1, 1"
    assert conditioning(THREE).smallest > 0.03
    assert conditioning([AXIAL, turned(180 - 5)]).angles == (5.0,), "an axis has no sign"


# --- the inversion ------------------------------------------------------------------------------


def test_weighted_it_is_the_dense_solution() -> None:
    shape, zooms = (6, 5, 7), (1.0, 1.5, 0.8)
    rng = np.random.default_rng(0)
    mask = rng.random(shape) > 0.3
    mask[[0, -1]] = mask[:, [0, -1]] = mask[:, :, [0, -1]] = True
    fields, noise = rng.normal(size=(2, *shape)), rng.uniform(0.5, 2, (2, *shape))
    noise[1, 2, 2, 2] = 0
    mask[2, 2, 2] = True
    directions, weight = (AXIAL, turned(35)), 0.02
    result = cosmos(
        torch.from_numpy(fields), torch.from_numpy(mask), zooms, b0_directions=directions,
        noise=torch.from_numpy(noise), lambda_=weight, tolerance=1e-12, max_iterations=500,
    )  # fmt: skip
    assert result.convergence.converged

    padded = padded_grid(shape)
    inside = np.flatnonzero(mask)
    known = (noise > 0) & mask
    level = np.sort(noise[known])[(known.sum() - 1) // 2]
    normal, right = weight * np.eye(inside.size), np.zeros(inside.size)
    for field, sigma, b in zip(fields, noise, directions, strict=True):
        kernel = dipole(padded, zooms, b)
        columns = []
        for voxel in inside:
            unit = np.zeros(mask.size)
            unit[voxel] = 1
            image = np.zeros(padded)
            image[: shape[0], : shape[1], : shape[2]] = unit.reshape(shape)
            seen = np.fft.irfftn(np.fft.rfftn(image) * kernel, padded, axes=(0, 1, 2))
            columns.append(seen[: shape[0], : shape[1], : shape[2]].ravel()[inside])
        system = np.array(columns).T
        trust = np.where(sigma > 0, level / np.where(sigma > 0, sigma, 1), 0).ravel()[inside] ** 2
        normal += system.T @ (trust[:, None] * system)
        right += system.T @ (trust * field.ravel()[inside])
    expected = np.zeros(mask.size)
    expected[inside] = np.linalg.solve(normal, right)
    np.testing.assert_allclose(result.chi.numpy().ravel(), expected, rtol=0, atol=1e-8)


def dipole(shape: Sequence[int], zooms: Sequence[float], b: Sequence[float]) -> np.ndarray:
    """Half spectrum of the kernel."""
    (nx, ny, nz), (dx, dy, dz) = shape, zooms
    axes = np.fft.fftfreq(nx, dx), np.fft.fftfreq(ny, dy), np.fft.rfftfreq(nz, dz)
    k = np.stack(np.meshgrid(*axes, indexing="ij"))
    squared = (k**2).sum(0)
    squared[0, 0, 0] = np.inf
    kernel = 1 / 3 - np.tensordot(b, k, 1) ** 2 / squared
    kernel[0, 0, 0] = 0
    return kernel


def padded_grid(shape: Sequence[int]) -> tuple[int, ...]:
    """Half as much again as the box, or a little more."""
    return tuple(next_fast_len(math.ceil(1.5 * n), real=True) for n in shape)


def test_unweighted_it_is_one_division() -> None:
    fields, truth = measured(shape=(24, 20, 18), dtype=torch.float64)
    weight = 0.01
    chi = cosmos(fields, truth.mask, truth.zooms, b0_directions=THREE, lambda_=weight).chi
    assert truth.mask.any(1).any(1).all(), "the mask's box is the grid"
    mask, padded = truth.mask.numpy(), padded_grid(truth.mask.shape)
    above, below = 0, weight
    for field, b in zip(fields.numpy(), THREE, strict=True):
        kernel = dipole(padded, truth.zooms, b)
        above = above + kernel * np.fft.rfftn(np.where(mask, field, 0), padded, axes=(0, 1, 2))
        below = below + kernel**2
    below[0, 0, 0] = np.inf
    expected = np.fft.irfftn(above / below, padded, axes=(0, 1, 2))[:24, :20, :18]
    np.testing.assert_allclose(chi.numpy()[mask], expected[mask], rtol=0, atol=1e-9)


CASES = {
    "plain": {},
    "anisotropic": {"shape": (40, 34, 21), "zooms": (1.0, 1.2, 2.0)},
    "odd": {"shape": (37, 41, 39)},
    "tilted": {"tilt": math.radians(30)},
}


@pytest.mark.parametrize("case", CASES)
def test_the_phantom_comes_back(case: str) -> None:
    fields, truth = measured(**CASES[case])
    ones = torch.ones_like(fields)
    weighted = cosmos(fields, truth.mask, truth.zooms, b0_directions=THREE, noise=ones)
    assert weighted.convergence.converged
    assert error(weighted.chi, truth.chi, truth.mask) < 0.06
    direct = cosmos(fields, truth.mask, truth.zooms, b0_directions=THREE)
    assert direct.convergence is None
    # the field outside counts as 0 in one division, and that is wrong
    assert error(direct.chi, truth.chi, truth.mask) < 0.25


def test_more_and_wider_orientations_are_better() -> None:
    def err(*directions: tuple[float, float, float]) -> float:
        fields, truth = measured(directions, noise=2e-3)
        chi = cosmos(fields, truth.mask, truth.zooms, b0_directions=directions,
                     noise=torch.ones_like(fields)).chi  # fmt: skip
        return error(chi, truth.chi, truth.mask)

    two, three, four = err(*THREE[:2]), err(*THREE), err(*THREE, turned(-25, 0))
    assert two > 1.2 * three
    assert three > 1.1 * four
    assert err(AXIAL, turned(12, 0), turned(12, 1)) > 1.2 * three


def test_noise_weighs_the_orientations() -> None:
    fields, truth = measured()
    generator = torch.Generator().manual_seed(0)
    fields[2] += 0.05 * torch.randn(fields[2].shape, generator=generator)
    noise = torch.ones_like(fields)
    noise[2] = 50
    choices = {"b0_directions": THREE, "lambda_": 1e-3}
    knowing = cosmos(fields, truth.mask, truth.zooms, noise=noise, **choices).chi
    blind = cosmos(fields, truth.mask, truth.zooms, noise=torch.ones_like(noise), **choices).chi
    assert error(knowing, truth.chi, truth.mask) < 0.3 * error(blind, truth.chi, truth.mask)


def test_what_every_inversion_owes() -> None:
    fields, truth = measured(noise=1e-3, shape=(33, 36, 31))
    noise = torch.full_like(fields, 2.0)
    kept = fields.clone(), truth.mask.clone(), noise.clone()
    for given in (None, noise):

        def run(f: Tensor, m: Tensor, n: Tensor | None, **choices: Any) -> Tensor:
            return cosmos(f, m, truth.zooms, b0_directions=THREE, noise=n, **choices).chi

        chi = run(fields, truth.mask, given)
        assert chi.dtype == torch.float32
        assert (chi[~truth.mask] == 0).all()
        assert chi.equal(run(fields, truth.mask, given)), "twice the same"
        dirty = torch.where(truth.mask, fields, torch.nan)
        unknown = None if given is None else torch.where(truth.mask, noise, torch.nan)
        torch.testing.assert_close(run(dirty, truth.mask, unknown), chi)
        scaled = run(10 * fields, truth.mask, None if given is None else 10 * noise)
        torch.testing.assert_close(scaled, 10 * chi, rtol=1e-4, atol=1e-5)
        pad = (3, 2, 1, 4, 5, 6)
        wide = run(*(None if x is None else torch.nn.functional.pad(x, pad)
                     for x in (fields, truth.mask, given)))  # fmt: skip
        torch.testing.assert_close(wide[5:-6, 1:-4, 3:-2], chi)
        double = run(fields.double(), truth.mask, None if given is None else noise.double())
        assert error(chi, double, truth.mask) < 1e-3
        assert error(run(fields, truth.mask, given, lambda_=0.1), chi, truth.mask) > 0.05
    short = cosmos(fields, truth.mask, truth.zooms, b0_directions=THREE, noise=noise,
                   max_iterations=2).convergence  # fmt: skip
    assert (short.converged, short.iterations) == (False, 2)
    loose = cosmos(fields, truth.mask, truth.zooms, b0_directions=THREE, noise=noise,
                   tolerance=0.1).convergence  # fmt: skip
    assert loose.converged
    assert loose.iterations < 5
    for now, before in zip((fields, truth.mask, noise), kept, strict=True):
        assert now.equal(before), "an argument was written to"


@pytest.mark.parametrize(
    ("directions", "choices", "message"),
    [
        ([AXIAL], {}, "needs 2 orientations or more, and there is 1"),
        ([AXIAL, turned(4), turned(6, 1)], {}, r"too close.*1-2 4, 1-3 6, 2-3 7\.2.*squared"),
        ([AXIAL, turned(40)], {"lambda_": 0.0}, r"lambda is 0.*1-2 40; smallest sum"),
        ([AXIAL, turned(40)], {"lambda_": -1.0}, "lambda_ is -1"),
        ([AXIAL, (0.0, 1.0, 1.0)], {}, "length 1.41"),
    ],
)
def test_what_cannot_be_inverted_is_refused(
    directions: list[tuple[float, ...]], choices: dict[str, Any], message: str
) -> None:
    mask = torch.ones((8, 8, 8), dtype=torch.bool)
    fields = torch.zeros((len(directions), 8, 8, 8))
    with pytest.raises(ValueError, match=message):
        cosmos(fields, mask, (1.0, 1.0, 1.0), b0_directions=directions, **choices)


def test_shapes_that_differ_are_refused() -> None:
    mask = torch.ones((8, 8, 8), dtype=torch.bool)
    fields = torch.zeros((3, 8, 8, 8))

    def run(f: Tensor, m: Tensor, noise: Tensor | None = None) -> None:
        cosmos(f, m, (1.0, 1.0, 1.0), b0_directions=THREE, noise=noise)

    with pytest.raises(ValueError, match="3 directions of B0 do not match"):
        run(fields[:2], mask)
    with pytest.raises(ValueError, match="different grids"):
        run(fields, mask[:7])
    with pytest.raises(ValueError, match="differ"):
        run(fields, mask, fields[0])
    with pytest.raises(ValueError, match="orientation 2 is positive and finite in no voxel"):
        run(fields, mask, torch.stack([mask.float(), mask.float() * 0, mask.float()]))


# --- a head at three orientations ---------------------------------------------------------------

HALF = torch.tensor([26.0, 31.0, 24.0], dtype=torch.float64)
"""Half axes of the brain (mm)."""

PARTS = (
    # centre (mm), radius (mm), susceptibility (ppm), magnitude
    ((-9.0, 4.0, 3.0), 6.0, 0.10, -0.35), ((10.0, 5.0, 2.0), 6.5, 0.08, -0.3),
    ((3.0, -14.0, 6.0), 5.0, -0.06, 0.4), ((-6.0, -10.0, -9.0), 4.5, 0.05, -0.4),
    ((5.0, 18.0, -4.0), 5.0, -0.04, 0.5), ((0.0, 2.0, 14.0), 4.0, 0.07, 0.4),
)  # fmt: skip


class Pose(NamedTuple):
    """How the head lay, and what was measured."""

    turn: np.ndarray
    """Head to scanner."""
    affine: np.ndarray
    chi: Tensor
    mask: Tensor
    folder: Path


def pose(
    folder: Path, angles: Sequence[float], shift: Sequence[float], slices: Sequence[float],
    zooms: tuple[float, float, float], shape: tuple[int, int, int], *, flip: bool = False,
    seed: int = 0,
) -> Pose:  # fmt: skip
    """Scan the head: files of magnitude, local field (ppm), its noise and mask."""
    turn = rotation(angles)
    affine = np.eye(4)
    affine[:3, :3] = rotation(slices) * (np.array([-1.0 if flip else 1.0, 1, 1]) * zooms)
    affine[:3, 3] = np.array(shift) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    scanner = torch.from_numpy(grid @ affine[:3, :3].T + affine[:3, 3])
    head = (scanner - torch.tensor(shift, dtype=torch.float64)) @ torch.from_numpy(turn)
    depth = (1 - (head / HALF).norm(dim=-1)) * HALF.mean()
    mask = depth > 0
    x, y, z = head.unbind(-1)
    # folds: a brain is not piecewise constant
    folds = (torch.cos(x / 2.2 + y / 5) + torch.cos(y / 2.6 - z / 4) * torch.sin(x / 3.1)
             + torch.cos(z / 2.4 + x / 6))  # fmt: skip
    chi = 0.012 * folds
    magnitude = 0.15 + 0.85 * torch.sigmoid(depth / 0.7) * (1 - 0.12 * folds)
    for centre, radius, value, bright in PARTS:
        distance = (head - torch.tensor(centre, dtype=torch.float64)).norm(dim=-1)
        share = torch.sigmoid((radius - distance) / 0.7)
        chi, magnitude = chi + value * share, magnitude * (1 + bright * share)
    chi = torch.where(mask, chi - chi[mask].mean(), 0.0)
    along = b0_direction(affine)
    local = FreeSpace.on_grid(chi, zooms, along)(chi)
    generator = torch.Generator().manual_seed(seed)
    local += 1e-3 * torch.randn(shape, generator=generator, dtype=local.dtype)
    shading = 1 + 0.004 * (scanner @ torch.tensor([1.0, -0.5, 0.5], dtype=torch.float64))
    magnitude = 1000 * magnitude * shading
    magnitude += 15 * torch.randn(shape, generator=generator, dtype=local.dtype)
    folder.mkdir()
    for name, data in (("magnitude", magnitude.abs()), ("local_field", local * mask),
                       ("mask", mask.to(torch.uint8)), ("noise", 1e-3 * mask)):  # fmt: skip
        nb.Nifti1Image(data.numpy().astype(np.uint8 if name == "mask" else np.float32),
                       affine).to_filename(folder / f"{name}.nii.gz")  # fmt: skip
    return Pose(turn, affine, chi.float(), mask, folder)


@pytest.fixture(scope="module")
def poses(tmp_path_factory: pytest.TempPathFactory) -> list[Pose]:
    root = tmp_path_factory.mktemp("poses")
    return [
        pose(root / "1", (2, 0, 1), (0, 0, 0), (5, 0, 0), (2, 2, 2), (34, 40, 32)),
        pose(root / "2", (-24, 6, 4), (3, -2, 4), (0, 0, 0), (2, 2, 2), (36, 40, 36), flip=True,
             seed=1),
        pose(root / "3", (4, 25, -9), (-2, 3, 1), (0, 4, 6), (2, 2, 2.4), (38, 40, 30), seed=2),
    ]  # fmt: skip


def motion(poses: list[Pose], n: int) -> np.ndarray:
    """World of the first head to that of another, as it was."""
    centres = [p.affine[:3, :3] @ ((np.array(p.mask.shape) - 1) / 2) + p.affine[:3, 3]
               for p in poses]  # fmt: skip
    result = np.eye(4)
    result[:3, :3] = poses[n].turn @ poses[0].turn.T
    result[:3, 3] = centres[n] - result[:3, :3] @ centres[0]
    return result


@pytest.fixture(scope="module")
def run(
    poses: list[Pose], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """Outputs of the nodes of the workflow, run on the three heads."""
    workflow = init_cosmos_wf(orientations=3)
    workflow.base_dir = str(tmp_path_factory.mktemp("work"))
    files = {name: [str(p.folder / f"{name}.nii.gz") for p in poses]
             for name in ("magnitude", "local_field", "mask", "noise")}  # fmt: skip
    workflow.inputs.inputnode.trait_set(
        **files, brain_mask=files["mask"],
        b0_direction=[list(b0_direction(p.affine)) for p in poses],
    )  # fmt: skip
    nodes = {node.name: node.result.outputs for node in workflow.run().nodes()}
    return nodes.__getitem__


def test_registration_finds_the_motion(run: Callable[..., Any], poses: list[Pose]) -> None:
    for n in (1, 2):
        found = np.loadtxt(run(f"register_{n + 1}").transform)
        truth = motion(poses, n)
        assert turned_by(truth) > 20
        assert turned_by(np.linalg.inv(truth) @ found) < 0.4
        corner = np.array([15.0, 15.0, 15.0, 1.0])
        assert np.linalg.norm((found - truth) @ corner) < 0.5, "mm"


def test_directions_of_b0_turn_with_the_head(run: Callable[..., Any], poses: list[Pose]) -> None:
    directions = run("cosmos").step["b0_directions"]
    for n, found in enumerate(directions):
        # B0 as the head saw it, in the voxel axes of the first scan
        axes = rotation_of(poses[0].affine)
        truth = axes.T @ poses[0].turn @ poses[n].turn.T @ [0, 0, 1]
        assert math.degrees(math.acos(min(1.0, float(np.dot(truth, found))))) < 0.5
    assert np.linalg.norm(directions, axis=1) == pytest.approx(1)


def test_the_map_is_near_the_truth_and_better_than_one_orientation_gives(
    run: Callable[..., Any], poses: list[Pose]
) -> None:
    outputs = run("cosmos")
    chi, mask = images.load(outputs.chi), images.load(outputs.mask) > 0
    first = poses[0]
    assert (mask & ~first.mask).sum() < 0.1 * mask.sum()
    both = mask & first.mask
    assert both.sum() > 0.97 * first.mask.sum()
    joint = error(chi, first.chi, both)
    assert joint < 0.18
    folder = first.folder
    field, noise = (images.load(folder / f"{x}.nii.gz") for x in ("local_field", "noise"))
    zooms, direction = images.zooms_of(folder / "mask.nii.gz"), b0_direction(first.affine)
    singles = [
        error(tv(field, first.mask, zooms, b0_direction=direction, noise=noise,
                 lambda_=weight).chi, first.chi, both)
        for weight in (3e-5, 1e-4, 3e-4)
    ]  # fmt: skip
    assert joint < 0.75 * min(singles), "whatever its weight"


def test_the_record_names_directions_and_transforms(run: Callable[..., Any]) -> None:
    step = run("cosmos").step
    assert (step["stage"], step["method"]) == ("cosmos", "cosmos")
    assert len(step["b0_directions"]) == len(step["transforms"]) == len(step["angles"]) == 3
    assert step["transforms"][0] == np.eye(4).tolist()
    assert step["smallest_sum_of_squared_kernels"] > 0.01
    assert step["convergence"]["converged"]
    json.dumps(step)


def test_the_same_images_give_the_same_motion(
    run: Callable[..., Any], poses: list[Pose], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    again = RegisterRigid(
        fixed=str(poses[0].folder / "magnitude.nii.gz"),
        fixed_mask=str(poses[0].folder / "mask.nii.gz"),
        moving=str(poses[1].folder / "magnitude.nii.gz"),
        moving_mask=str(poses[1].folder / "mask.nii.gz"),
        num_threads=2,
    ).run(cwd=str(tmp_path))
    assert (
        Path(again.outputs.transform).read_text() == Path(run("register_2").transform).read_text()
    )


# --- resampling ---------------------------------------------------------------------------------


def smooth(points: np.ndarray) -> np.ndarray:
    x, y, z = np.moveaxis(points, -1, 0)
    return np.sin(x / 3) * np.cos(y / 4) + 0.3 * np.sin(z / 2.5)


def world(affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return grid @ affine[:3, :3].T + affine[:3, 3]


def test_a_field_is_resampled_where_the_motion_says() -> None:
    affine, to = np.diag([-1.0, 1.5, 1.2, 1.0]), np.eye(4)
    affine[:3, 3] = 20, -18, -17
    to[:3, 3] = -8, -7, -9
    move = np.eye(4)
    move[:3, :3] = rotation((10, -20, 15))
    move[:3, 3] = 1, -2, 3
    shape = (16, 15, 18)
    image = torch.from_numpy(smooth(world(affine, (40, 26, 30))))
    points = world(to, shape) @ move[:3, :3].T + move[:3, 3]
    truth = torch.from_numpy(smooth(points))
    cubic = resample(image, affine, move, to=to, shape=shape)
    linear = resample(image, affine, move, to=to, shape=shape, order=1)
    assert (cubic - truth).abs().max() < 0.01
    assert (linear - truth).abs().max() > 3 * (cubic - truth).abs().max()
    inside = torch.from_numpy(np.linalg.norm(world(affine, (40, 26, 30)), axis=-1) < 7)
    seen = torch.from_numpy(np.linalg.norm(points, axis=-1) < 7)
    mask = resample_mask(inside, affine, move, to=to, shape=shape)
    assert (mask ^ seen).sum() < 0.12 * seen.sum()
    assert mask.sum() == pytest.approx(seen.sum().item(), rel=0.05)
    # an edge at the mask would ring into it
    cut = torch.where(inside, image + 1, torch.nan)
    filled = resample(torch.nan_to_num(cut), affine, move, to=to, shape=shape, mask=inside)
    ringing = resample(torch.nan_to_num(cut), affine, move, to=to, shape=shape)
    wrong = [(x - truth - 1)[mask].abs().mean().item() for x in (filled, ringing)]
    assert wrong[0] < 0.5 * wrong[1]


def test_the_first_orientation_stays_as_it_is(poses: list[Pose], tmp_path: Path) -> None:
    folder = poses[0].folder
    files = {x: str(folder / f"{y}.nii.gz") for x, y in
             (("field", "local_field"), ("mask", "mask"), ("noise", "noise"),
              ("reference", "local_field"))}  # fmt: skip
    outputs = ResampleTo(**files).run(cwd=str(tmp_path)).outputs
    for name in ("field", "mask", "noise"):
        assert images.load(getattr(outputs, name)).equal(images.load(files[name]))
    assert outputs.b0_direction == pytest.approx(b0_direction(poses[0].affine))


def test_orientations_that_share_no_voxel_are_refused(poses: list[Pose], tmp_path: Path) -> None:
    like = poses[0].folder / "mask.nii.gz"
    mask = images.load(like) > 0
    left = mask.clone()
    left[17:] = False
    half = [images.save(part, tmp_path / f"{n}.nii.gz", like=like)
            for n, part in enumerate((left, mask & ~left))]  # fmt: skip
    field = str(poses[0].folder / "local_field.nii.gz")
    node = Cosmos(fields=[field] * 2, masks=half, noises=[field] * 2,
                  b0_directions=[list(AXIAL), list(turned(30))])  # fmt: skip
    with pytest.raises(ValueError, match="no voxel lies in the masks of 2 orientations"):
        node.run(cwd=str(tmp_path))


# --- the command line ---------------------------------------------------------------------------


def test_a_workflow_needs_two() -> None:
    with pytest.raises(ValueError, match="needs 2 orientations or more, and there is 1"):
        init_cosmos_wf(orientations=1)


def found(tmp_path: Path, *prefixes: str) -> list[checks.Examination]:
    for prefix in prefixes:
        write(tmp_path / "bids", prefix=prefix, echo_times=(0.004, 0.009))
    return [checks.examine(a) for a in bids.find(tmp_path / "bids")]


def test_what_a_subjects_acquisitions_share_names_the_map(tmp_path: Path) -> None:
    prefixes = ("sub-01_ses-a_run-1", "sub-01_ses-a_run-2", "sub-02_ses-a_run-1",
                "sub-02_ses-b_run-1", "sub-03")  # fmt: skip
    first, second, third = checks.heads(found(tmp_path, *prefixes))
    assert first.acquisition.output("cosmos").as_posix() == (
        "sub-01/ses-a/anat/sub-01_ses-a_desc-cosmos_Chimap.nii.gz"
    )
    assert len(first.acquisition.sources) == 8
    assert second.acquisition.output("cosmos").as_posix() == (
        "sub-02/anat/sub-02_run-1_desc-cosmos_Chimap.nii.gz"
    )
    assert not first.errors
    assert not second.errors
    (error,) = third.errors
    assert "there is 1 (sub-03)" in error.message
    sidecar = derivatives.sidecar(first, "cosmos")
    assert sidecar["Sources"][0].endswith("sub-01_ses-a_run-1_echo-1_part-mag_MEGRE.nii.gz")
    assert "B0Direction" not in sidecar, "there are two"


def test_the_graph_joins_all_orientations_of_a_subject(tmp_path: Path) -> None:
    examinations = found(tmp_path, "sub-01_run-1", "sub-01_run-2", "sub-01_run-3", "sub-02_run-1")
    settings = combine({"cosmos": "cosmos", "output_dir": str(tmp_path), "bids_dir": str(tmp_path),
                        "parameters": {"cosmos": {"lambda": 0.02}}})  # fmt: skip
    settings.check()
    graph = init_run_wf(examinations, settings, {}, threads=1)._create_flat_graph()
    names = [node.fullname for node in graph.nodes()]
    own = [name for name in names if ".sub_01_cosmos_wf." in name]
    assert not [name for name in names if ".sub_02_cosmos_wf." in name]
    assert sum(".register_" in name for name in own) == 2
    (invert,) = (node for node in graph.nodes() if node.name == "cosmos")
    assert invert.inputs.lambda_ == 0.02
    sources = {
        source.fullname.split(".")[2]
        for source, target in graph.in_edges()
        if ".sub_01_cosmos_wf." in target.fullname and ".sub_01_cosmos_wf." not in source.fullname
    }
    assert sources == {f"sub_01_run_{n}_wf" for n in (1, 2, 3)}


def test_cosmos_needs_local_fields() -> None:
    with pytest.raises(ValueError, match="cosmos works on local fields"):
        Settings(cosmos="cosmos", inversion="tgvqsm", background="none").check()


def recipe(run: str, tilt: Sequence[float]) -> dict[str, Any]:
    return {
        "name": "Head", "text": "A head at several orientations.", "extension": ".nii",
        "head": {"tilt": list(tilt), "texture": 0.0, "seed": 3},
        "grid": {"shape": [28, 36, 26], "zooms": [6.0, 6.0, 6.0], "centre": [0, 0, 10],
                 "factor": 1},
        "scan": {"imaging_frequency": 123.2, "echo_times": [0.012], "snr": 80.0},
        "metadata": {"MagneticFieldStrength": 3, "Manufacturer": "Siemens"},
        "acquisitions": [{"subject": "01", "run": run, "stored": "siemens", "suffix": "T2starw",
                          "seed": int(run)}],
    }  # fmt: skip


def test_the_command_line_maps_each_orientation_and_all_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run, tilt in (("1", (0, 0, 0)), ("2", (-24, 0, 5))):
        examples.write(recipe(run, tilt), tmp_path / run)
    dataset = tmp_path / "1"
    plugin = tmp_path / "plugin.yml"
    plugin.write_text("plugin: Linear\n")  # one process: fast
    words = [str(dataset), str(tmp_path / "out"), "participant", "-w", str(tmp_path / "work"),
             "--cosmos", "--mask", "bet", "--background", "vsharp", "--inversion", "tkd",
             "--skip-bids-validation", "--use-plugin", str(plugin)]  # fmt: skip
    assert main([*words, "--dry-run"]) == 0
    assert "COSMOS needs 2 or more acquisitions of sub-01" in capsys.readouterr().err
    for path in (tmp_path / "2" / "sub-01" / "anat").iterdir():
        path.rename(dataset / "sub-01" / "anat" / path.name)
    assert main([*words, "--set", "cosmos.lambda=0.01"]) == 0
    anat = tmp_path / "out" / "sub-01" / "anat"
    for run in ("1", "2"):
        assert (anat / f"sub-01_run-{run}_Chimap.nii.gz").exists()
    chi = nb.load(anat / "sub-01_desc-cosmos_Chimap.nii.gz")
    mask = nb.load(anat / "sub-01_desc-cosmos_mask.nii.gz").get_fdata() > 0
    np.testing.assert_allclose(chi.affine, nb.load(anat / "sub-01_run-1_Chimap.nii.gz").affine)
    assert abs(chi.get_fdata()[mask].mean()) < 1e-5, "referenced to the brain"
    sidecar = json.loads((anat / "sub-01_desc-cosmos_Chimap.json").read_text())
    assert {source.split("_run-")[1][0] for source in sidecar["Sources"]} == {"1", "2"}
    assert "10.1002/mrm.21828" in sidecar["EstimationReference"]
    step = sidecar["ProcessingSteps"][0]
    assert step["parameters"]["lambda_"] == 0.01
    expected = rotation((-24, 0, 5)).T @ [0, 0, 1]
    angle = math.degrees(math.acos(np.dot(step["b0_directions"][1], expected)))
    assert angle < 3, "voxels of 6 mm"
    assert "COSMOS" in (tmp_path / "out" / "logs" / "CITATION.md").read_text()
    page = (tmp_path / "out" / "sub-01.html").read_text()
    assert "sub-01_desc-cosmos" in page
    assert "Susceptibility by COSMOS" in page
    figures = tmp_path / "out" / "sub-01" / "figures"
    assert len(list(figures.glob("*cosmos*"))) == 1
    assert {"*_swi.*"} <= set((tmp_path / "out" / ".bidsignore").read_text().split())
