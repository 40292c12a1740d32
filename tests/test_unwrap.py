"""Unwrapping: truth, and oracles that are not our own code."""

import heapq
import json
import math
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path

import nibabel as nb
import numba
import numpy as np
import pytest
import torch
from scipy.ndimage import label
from torch import Tensor

from qsmpipe import images
from qsmpipe.interfaces.unwrap import BestPath, Laplacian, Romeo
from qsmpipe.methods import METHODS, function_of
from qsmpipe.numerics.fourier import Zooms, convolve, padded_shape
from qsmpipe.numerics.kernels import dipole
from qsmpipe.numerics.unwrap.bestpath import bestpath
from qsmpipe.numerics.unwrap.edges import edge_weights
from qsmpipe.numerics.unwrap.laplacian import laplacian
from qsmpipe.numerics.unwrap.romeo import WEIGHTS, quality_map, romeo
from qsmpipe.workflows.unwrap import init_unwrap_wf

romeo_module = import_module("qsmpipe.numerics.unwrap.romeo")
laplacian_module = import_module("qsmpipe.numerics.unwrap.laplacian")

SMALL = Path(__file__).resolve().parents[2] / "shared" / "data" / "romeo-small" / "romeo"
TWO_PI = 2 * math.pi
TILT = (0.0, math.sin(math.pi / 6), math.cos(math.pi / 6))
BOUNDARIES = ("mask", "neumann", "periodic")
ECHO_TIMES = (0.004, 0.009, 0.014, 0.019, 0.024)


def wrap(angle: Tensor) -> Tensor:
    return torch.atan2(angle.sin(), angle.cos())


def grid(shape: tuple[int, int, int], zooms: Zooms = (1, 1, 1)) -> list[Tensor]:
    axes = [(torch.arange(n) - n / 2) * zoom for n, zoom in zip(shape, zooms, strict=True)]
    return list(torch.meshgrid(*axes, indexing="ij"))


def ramp(shape: tuple[int, int, int], zooms: Zooms) -> Tensor:
    x, y, z = grid(shape, zooms)
    return 2.2 / zooms[0] * x - 1.8 / zooms[1] * y + 1.1 / zooms[2] * z


def bowl(shape: tuple[int, int, int], zooms: Zooms) -> Tensor:
    x, y, z = (axis / zoom for axis, zoom in zip(grid(shape, zooms), zooms, strict=True))
    return 0.06 * (x**2 - y**2) + 0.03 * z**2 + 5


def tilted_dipole(shape: tuple[int, int, int], zooms: Zooms) -> Tensor:
    """A ball outside the middle, B0 tilted by 30 degrees, on top of a bowl."""
    x, y, z = grid(shape, zooms)
    ball = ((x + 4) ** 2 + y**2 + (z - 2) ** 2 <= 16).float()
    padded = tuple(2 * n for n in shape)
    kernel = dipole(padded, zooms, TILT, like=ball)
    return 6 * convolve(ball, kernel, padded) + bowl(shape, zooms)


FIELDS = {"ramp": ramp, "bowl": bowl, "tilted dipole": tilted_dipole}
GRIDS = {
    "isotropic": ((32, 30, 28), (1.0, 1.0, 1.0)),
    "anisotropic": ((28, 26, 14), (1.0, 1.0, 2.0)),
    "odd": ((31, 27, 23), (1.0, 1.0, 1.0)),
}


def noisy(phase: Tensor, snr: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Magnitude and wrapped phase of a signal of amplitude 1."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((2, *phase.shape), generator=generator) / snr
    signal = torch.polar(torch.ones_like(phase), phase) + torch.complex(*noise)
    return signal.abs(), signal.angle()


def turns(unwrapped: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Difference within the mask in units of 2 pi, (..., voxels)."""
    return ((unwrapped - reference) / TWO_PI)[..., mask]


def assert_same_up_to_a_turn(
    unwrapped: Tensor, truth: Tensor, mask: Tensor, *, atol: float
) -> None:
    difference = turns(unwrapped, truth, mask)
    constant = difference.median().round()
    torch.testing.assert_close(
        difference, constant.expand_as(difference), atol=atol / TWO_PI, rtol=0
    )


def holed(shape: tuple[int, int, int]) -> Tensor:
    x, y, z = grid(shape)
    mask = (x / shape[0]) ** 2 + (y / shape[1]) ** 2 + (z / shape[2]) ** 2 < 0.24
    return mask & ~((x - 3) ** 2 + y**2 + z**2 < 9) & ~((x + 6).abs() + (y - 4).abs() < 3)


# ROMEO


@pytest.mark.parametrize("unwrap", [romeo, bestpath])
@pytest.mark.parametrize(("shape", "zooms"), GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_the_truth_is_found(field, shape, zooms, unwrap):
    truth = field(shape, zooms)
    assert truth.max() - truth.min() > 3 * TWO_PI
    for mask in (torch.ones(shape, dtype=torch.bool), holed(shape)):
        unwrapped = unwrap(wrap(truth), mask, zooms)
        assert_same_up_to_a_turn(unwrapped, truth, mask, atol=1e-4)
        assert (unwrapped[~mask] == 0).all()


@pytest.mark.parametrize("snr", [5, 10])
@pytest.mark.parametrize("field", [bowl, tilted_dipole])
def test_romeo_stands_noise(field, snr):
    shape, zooms = GRIDS["isotropic"]
    truth, mask = field(shape, zooms), holed(shape)
    magnitude, phase = noisy(truth, snr)
    truth = truth + wrap(phase - truth)
    assert_same_up_to_a_turn(
        romeo(phase, mask, zooms, magnitude=magnitude), truth, mask, atol=1e-4
    )


def test_romeo_goes_around_what_is_not_reliable():
    """A sheet of noise with one opening: the path through the opening is the right one."""
    shape = (30, 24, 24)
    truth = 0.7 * grid(shape)[1] + 0.2 * grid(shape)[0]
    magnitude, phase = noisy(truth, 30)
    noise = torch.Generator().manual_seed(3)
    sheet = torch.zeros(shape, dtype=torch.bool)
    sheet[14:16] = True
    sheet[14:16, 10:14, 10:14] = False
    magnitude[sheet] = 0.05
    phase[sheet] = (torch.rand(shape, generator=noise) * TWO_PI - math.pi)[sheet]
    mask = torch.ones(shape, dtype=torch.bool)
    unwrapped = romeo(phase, mask, (1, 1, 1), magnitude=magnitude)
    assert_same_up_to_a_turn(unwrapped, truth, ~sheet, atol=0.5)


@pytest.mark.parametrize("unwrap", [romeo, bestpath])
@pytest.mark.parametrize("individual", [False, True])
@pytest.mark.parametrize("template", [1, 3])
def test_echoes_agree(individual, template, unwrap):
    """The field is the same from each echo, and the constant is the true one."""
    shape, zooms = GRIDS["isotropic"]
    mask = holed(shape)
    rate = (bowl(shape, zooms) - 4) / ECHO_TIMES[-1]
    truth = torch.stack([rate * time for time in ECHO_TIMES])
    magnitude, phase = noisy(truth, 20)
    known = {"magnitude": magnitude} if unwrap is romeo else {}
    unwrapped = unwrap(
        phase,
        mask,
        zooms,
        echo_times=ECHO_TIMES,
        individual=individual,
        template=template,
        **known,
    )
    truth = truth + wrap(phase - truth)
    assert turns(unwrapped, truth, mask).abs().max() < 1e-4


def test_two_echoes_tell_the_turns_of_the_whole_image():
    """The median turn is 1 here: the one echo alone would say 0, the next one knows better."""
    shape, zooms = GRIDS["isotropic"]
    mask = holed(shape)
    rate = (bowl(shape, zooms) * 0.1 + 5.5) / ECHO_TIMES[0]
    truth = torch.stack([rate * time for time in ECHO_TIMES])
    magnitude, phase = noisy(truth, 20)
    truth = truth + wrap(phase - truth)
    unwrapped = romeo(phase, mask, zooms, magnitude=magnitude, echo_times=ECHO_TIMES)
    assert turns(unwrapped, truth, mask).abs().max() < 1e-4
    alone = romeo(phase[:1], mask, zooms)
    assert turns(alone, truth[:1], mask).round().unique().tolist() == [-1]
    as_seeded = romeo(phase[:1], mask, zooms, correct_global=False)
    assert (turns(as_seeded, phase[:1], mask).abs() < 1e-5).any()


def test_space_decides_where_time_is_uncertain():
    """An offset that time does not foretell: fewer voxels go wrong than by time alone."""
    shape, zooms = (40, 36, 32), (1.0, 1.0, 1.0)
    mask = holed(shape)
    rate = (bowl(shape, zooms) - 4) / ECHO_TIMES[-1]
    offset = 1.5 * torch.sin(grid(shape)[0] / 8)
    truth = torch.stack([rate * time + offset for time in ECHO_TIMES])
    magnitude, phase = noisy(truth, 5)
    truth = truth + wrap(phase - truth)

    def wrong(uncertain: float) -> float:
        unwrapped = romeo(
            phase, mask, zooms, magnitude=magnitude, echo_times=ECHO_TIMES, uncertain=uncertain
        )
        difference = turns(unwrapped, truth, mask).round()
        return (difference != difference.median(-1, keepdim=True).values).float().mean().item()

    assert wrong(0.5) < 1e-3 < wrong(1.0)


@pytest.mark.parametrize("unwrap", [romeo, bestpath])
@pytest.mark.parametrize("gap", [1, 3])
def test_regions_are_joined_over_their_gap(gap, unwrap):
    shape = (40, 24, 20)
    x, y, z = grid(shape)
    truth = 0.4 * x + 0.02 * y**2 - 0.03 * z * x
    mask = (y**2 + z**2 < 80) & (x.abs() < 18)
    mask[15 : 15 + gap] = False
    mask[34 - gap : 34] = False
    _, phase = noisy(truth, 20)
    truth = truth + wrap(phase - truth)
    unwrapped = unwrap(phase, mask, (1, 1, 1))
    assert_same_up_to_a_turn(unwrapped, truth, mask, atol=1e-4)


@pytest.mark.parametrize("unwrap", [romeo, bestpath])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_turns_are_added(dtype, unwrap):
    shape, zooms = GRIDS["odd"]
    truth = tilted_dipole(shape, zooms).to(dtype) * torch.tensor([1, 2])[:, None, None, None]
    phase = wrap(truth)
    before = phase.clone()
    unwrapped = unwrap(phase, holed(shape), zooms, echo_times=(0.01, 0.02))
    assert unwrapped.dtype == dtype
    assert torch.equal(phase, before)
    whole = turns(unwrapped, phase, holed(shape))
    torch.testing.assert_close(whole, whole.round(), atol=1e-5, rtol=0)


def test_an_empty_mask_gives_0_and_the_quality_map_bears_what_is_not_finite():
    shape = (20, 20, 20)
    phase = wrap(2.0 * grid(shape)[0])
    phase[0] = math.nan
    phase[5, 5, 5] = math.inf
    assert quality_map(phase).isfinite().all()
    nothing = torch.zeros(shape, dtype=torch.bool)
    for unwrap in (romeo, bestpath, laplacian):
        assert (unwrap(phase, nothing, (1, 1, 1)) == 0).all()


def test_magnitude_without_signal_does_no_harm():
    shape, zooms = GRIDS["odd"]
    truth = bowl(shape, zooms)
    mask = torch.ones(shape, dtype=torch.bool)
    unwrapped = romeo(wrap(truth), mask, zooms, magnitude=torch.zeros(shape), weights="romeo6")
    assert_same_up_to_a_turn(unwrapped, truth, mask, atol=1e-4)


def test_a_single_slice_unwraps():
    truth = bowl((40, 36, 1), (1.0, 1.0, 1.0))
    mask = torch.ones(truth.shape, dtype=torch.bool)
    for unwrap in (romeo, bestpath):
        assert_same_up_to_a_turn(unwrap(wrap(truth), mask, (1, 1, 1)), truth, mask, atol=1e-4)
    for boundary in ("mask", "neumann"):
        smooth = laplacian(wrap(truth), mask, (1, 1, 1), boundary=boundary)
        assert_same_up_to_a_turn(smooth, truth, mask, atol=1e-2)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 6), (7, 1, 5), (2, 2, 2)])
@pytest.mark.parametrize("unwrap", [romeo, bestpath, laplacian])
def test_tiny_grids_unwrap(unwrap, shape):
    truth = 0.9 * sum(grid(shape))
    mask = torch.ones(shape, dtype=torch.bool)
    atol = 1e-2 if unwrap is laplacian else 1e-4
    assert_same_up_to_a_turn(unwrap(wrap(truth), mask, (1, 1, 1)), truth, mask, atol=atol)


def test_threads_do_not_change_a_bit():
    shape = (24, 22, 20)
    _, phase = noisy(torch.stack([bowl(shape, (1, 1, 1)) * t for t in (0.2, 0.4)]), 2)
    magnitude, _ = noisy(phase, 2, seed=1)
    mask = holed(shape)
    results = []
    threads = numba.get_num_threads()
    for count in (1, min(2, numba.config.NUMBA_NUM_THREADS)):
        numba.set_num_threads(count)
        results.append((
            romeo(phase, mask, (1, 1, 1), magnitude=magnitude, echo_times=(0.01, 0.02)),
            quality_map(phase, magnitude=magnitude, echo_times=(0.01, 0.02)),
        ))  # fmt: skip
    numba.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


# Best path


@pytest.mark.parametrize("snr", [5, 10])
def test_best_path_stands_noise(snr):
    shape, zooms = GRIDS["isotropic"]
    truth, mask = bowl(shape, zooms), holed(shape)
    _, phase = noisy(truth, snr)
    truth = truth + wrap(phase - truth)
    difference = turns(bestpath(phase, mask, zooms), truth, mask).round()
    assert (difference == difference.median()).float().mean() > 0.995


def slow_best_path(phase):
    """The paper, voxel by voxel: sort all edges, join groups. The inner voxels' edges alone."""
    reliability = {}
    offsets = [o for o in product((-1, 0, 1), repeat=3) if o > (0, 0, 0)]
    for voxel in product(*(range(1, n - 1) for n in phase.shape)):
        here, total = phase[voxel], 0.0
        for offset in offsets:
            before, after = (
                phase[tuple(v + s * o for v, o in zip(voxel, offset, strict=True))]
                for s in (-1, 1)
            )
            total += (gamma(before - here) - gamma(here - after)) ** 2
        reliability[voxel] = 1 / np.sqrt(total)
    edges = []
    for voxel in reliability:
        for axis in range(3):
            other = tuple(v + (a == axis) for a, v in enumerate(voxel))
            if other in reliability:
                edges.append((reliability[voxel] + reliability[other], voxel, other))
    group = {voxel: [voxel] for voxel in reliability}
    wraps = dict.fromkeys(reliability, 0)
    for _, one, two in sorted(edges, reverse=True):
        if group[one] is group[two]:
            continue
        step = round((phase[one] - phase[two]) / TWO_PI) + wraps[one] - wraps[two]
        for voxel in group[two]:
            wraps[voxel] += step
            group[voxel] = group[one]
            group[one].append(voxel)
    return wraps


def test_best_path_is_the_papers():
    """Noise that no path unwraps without contradiction: all joins must be the paper's own."""
    generator = np.random.default_rng(3)
    x, y, z = np.meshgrid(*(np.arange(n) for n in (10, 9, 8)), indexing="ij")
    phase = gamma(1.2 * x + 0.9 * y - 0.7 * z + generator.normal(0, 0.6, x.shape))
    expected = slow_best_path(phase)
    mask = torch.ones(phase.shape, dtype=torch.bool)
    unwrapped = bestpath(torch.from_numpy(phase), mask, (1, 1, 1)).numpy()
    found = {voxel: round((unwrapped[voxel] - phase[voxel]) / TWO_PI) for voxel in expected}
    shift = {found[voxel] - expected[voxel] for voxel in expected}
    assert len(shift) == 1


def test_best_path_refuses_what_it_cannot_do():
    phase, mask = torch.zeros(2, 6, 6, 6), torch.ones(6, 6, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match="no echo_times"):
        bestpath(phase, mask, (1, 1, 1))
    with pytest.raises(ValueError, match="template 3"):
        bestpath(phase, mask, (1, 1, 1), echo_times=(0.01, 0.02), template=3)


# What ROMEO is made of


def gamma(angle: np.ndarray) -> np.ndarray:
    return np.angle(np.exp(1j * angle))


def slow_weights(phase, magnitude, echo_times, use):
    """The formulas of the paper, axis by axis, on whole arrays (echo 1 of 2)."""
    first, second = phase
    maximum = np.quantile(magnitude[0], 0.95)
    weights = np.zeros((*first.shape, 3))
    for axis in range(3):
        p, q, m = (np.moveaxis(a, axis, 0) for a in (first, second, magnitude[0]))
        factors = [1 - abs(gamma(p[1:] - p[:-1]) / np.pi)]
        gradient = gamma(q[1:] - q[:-1]) * echo_times[0] / echo_times[1]
        factors.append(np.maximum(0, 1 - abs(gamma(p[1:] - p[:-1]) - gradient)))
        curvature = np.maximum(0, 1 - abs(gamma(p[:-2] - 2 * p[1:-1] + p[2:]) / 2))
        linear = np.full_like(p[1:], 0.9)
        linear[1:-1] = curvature[:-1] * curvature[1:]
        factors.append(linear)
        small, large = np.minimum(m[1:], m[:-1]), np.maximum(m[1:], m[:-1])
        factors.append((small / large) ** 2)
        factors.append(0.5 + 0.5 * np.minimum(1, small / (0.5 * maximum)))
        factors.append(0.5 + 0.5 * np.minimum(1, 0.5 * maximum / large))
        chosen = [0.1 + 0.9 * factor for factor, on in zip(factors, use, strict=True) if on]
        np.moveaxis(weights[..., axis], axis, 0)[:-1] = np.prod(chosen, axis=0)
    return weights


@pytest.fixture
def tiny() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(5)
    phase = generator.uniform(-np.pi, np.pi, (2, 5, 6, 7)).astype(np.float32)
    phase[0] = gamma(np.arange(5)[:, None, None] * 1.3 + 0.4 * phase[0])
    phase[1] = gamma(2 * phase[0] + 0.3 * phase[1])
    return phase, generator.uniform(0.1, 1, (2, 5, 6, 7)).astype(np.float32)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_follow_the_paper(tiny, name):
    phase, magnitude = tiny
    times, use = (0.004, 0.009), WEIGHTS[name]
    weights = np.moveaxis(edge_weights(phase, magnitude, 0, times, use), 0, -1)
    np.testing.assert_allclose(weights, slow_weights(phase, magnitude, times, use), atol=1e-6)


def test_quality_is_the_mean_of_six_weights(tiny):
    phase, magnitude = tiny
    times = (0.004, 0.009)
    weights = slow_weights(phase, magnitude, times, WEIGHTS["romeo"])
    total = weights.sum(-1)
    total[1:] += weights[:-1, ..., 0]
    total[:, 1:] += weights[:, :-1, :, 1]
    total[..., 1:] += weights[..., :-1, 2]
    quality = quality_map(
        torch.from_numpy(phase), magnitude=torch.from_numpy(magnitude), echo_times=times
    )
    np.testing.assert_allclose(quality.numpy(), total / 6, atol=1e-6)


def test_quality_tells_signal_from_noise():
    shape = (30, 30, 20)
    x, y, z = grid(shape)
    ball = x**2 + y**2 + z**2 < 60
    truth = torch.stack([bowl(shape, (1, 1, 1)) * 0.3, bowl(shape, (1, 1, 1)) * 0.6])
    magnitude, phase = noisy(truth, 20)
    _, noise = noisy(truth, 0.01)
    quality = quality_map(torch.where(ball, phase, noise), magnitude=magnitude,
                          echo_times=(0.01, 0.02))  # fmt: skip
    assert quality.min() >= 0
    assert quality.max() <= 1
    assert quality[ball].quantile(0.1) > quality[~ball].quantile(0.9)
    assert quality_map(phase[0]).shape == shape


def heap_unwrap(phase, costs, mask, seed):
    """Prim's tree with Python's heap; among equal costs the edge queued last goes first."""
    wraps, done, heap, clock = {seed: 0}, {seed}, [], 0

    def queue(voxel):
        nonlocal clock
        for axis in range(3):
            for step in (1, -1):
                other = tuple(v + step * (a == axis) for a, v in enumerate(voxel))
                if any(not 0 <= v < n for v, n in zip(other, phase.shape, strict=True)):
                    continue
                if not mask[other] or other in done:
                    continue
                clock -= 1
                edge = costs[(axis, *(voxel if step == 1 else other))]
                heapq.heappush(heap, (int(edge), clock, voxel, other))

    queue(seed)
    while heap:
        _, _, old, new = heapq.heappop(heap)
        if new in done:
            continue
        wraps[new] = wraps[old] + round((phase[old] - phase[new]) / TWO_PI)
        done.add(new)
        queue(new)
    return wraps


def test_buckets_grow_like_a_heap():
    generator = np.random.default_rng(2)
    phase = generator.uniform(-np.pi, np.pi, (6, 7, 5)).astype(np.float32)
    mask = generator.random(phase.shape) < 0.9
    weights = edge_weights(phase[None], None, 0, [1.0], WEIGHTS["romeo"])
    costs = romeo_module._costs(weights, mask)
    start = romeo_module._seed(costs, mask)
    seed = tuple(int(v) for v in np.unravel_index(start, mask.shape))
    expected = heap_unwrap(phase.astype(float), costs, mask, seed)
    wraps = np.where(mask, romeo_module.UNREACHED, np.int32(0))
    wraps[seed] = 0
    romeo_module._run(phase, costs, np.array([start]), wraps, again=True)
    assert len(expected) > 100
    assert {voxel: int(wraps[voxel]) for voxel in expected} == expected


def test_costs_mark_the_edges_that_exist():
    weights = np.array([1.0, 0.0, 0.5], np.float32).reshape(3, 1, 1, 1)
    costs = romeo_module._costs(np.tile(weights, (1, 3, 3, 3)), np.ones((3, 3, 3), bool))
    assert costs[:, 0, 0, 0].tolist() == [1, 255, 128]
    assert costs[:, 2, 2, 2].tolist() == [0, 0, 0]
    hole = np.ones((3, 3, 3), bool)
    hole[1, 1, 1] = False
    assert (romeo_module._costs(np.tile(weights, (1, 3, 3, 3)), hole) > 0).sum() == 54 - 6


# Real data


@pytest.mark.skipif(not SMALL.exists(), reason="shared test data not found: romeo-small")
def test_romeo_agrees_with_another_unwrapper_on_a_real_brain():
    restoration = pytest.importorskip("skimage.restoration")
    phase, magnitude = (
        torch.from_numpy(np.ascontiguousarray(np.moveaxis(
            np.asanyarray(nb.load(SMALL / name).dataobj.get_unscaled(), np.float32), 3, 0)))
        for name in ("Phase.nii", "Mag.nii")
    )  # fmt: skip
    mask = magnitude[0] > 0.3 * magnitude[0].quantile(0.95)
    unwrapped = romeo(
        phase,
        mask,
        (0.469, 0.469, 1.0),
        magnitude=magnitude,
        echo_times=(0.004, 0.008, 0.012),
        individual=True,
    )
    for echo in range(3):
        masked = np.ma.array(phase[echo].numpy(), mask=~mask.numpy())
        other = torch.from_numpy(np.asarray(restoration.unwrap_phase(masked, rng=0)))
        difference = turns(unwrapped[echo], other, mask)
        whole = difference.round()
        assert (difference - whole).abs().max() < 1e-3
        assert (whole == whole.median()).float().mean() > 0.99


# Laplacian


@pytest.mark.parametrize(("shape", "zooms"), GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("field", [bowl, tilted_dipole])
def test_laplacian_finds_smooth_fields(field, shape, zooms):
    """Below pi from voxel to voxel nothing is lost: background, ramps and edges stay."""
    truth, mask = 0.4 * field(shape, zooms), holed(shape)
    phase = wrap(truth)
    phase[~mask] = 3 * torch.rand(int((~mask).sum()), generator=torch.Generator().manual_seed(0))
    unwrapped = laplacian(phase, mask, zooms)
    assert_same_up_to_a_turn(unwrapped, truth, mask, atol=0.02)
    assert (unwrapped[~mask] == 0).all()


def test_laplacian_recovers_a_ramp_and_averages_noise():
    shape, zooms = GRIDS["isotropic"]
    truth, mask = 0.6 * ramp(shape, zooms), holed(shape)
    assert_same_up_to_a_turn(laplacian(wrap(truth), mask, zooms), truth, mask, atol=0.02)
    _, phase = noisy(truth, 10)
    unwrapped = laplacian(phase, mask, zooms)
    error = turns(unwrapped, truth, mask)
    assert (error - error.median().round()).abs().mean() * TWO_PI < 0.15
    assert np.corrcoef(unwrapped[mask], truth[mask])[0, 1] > 0.999


def test_laplacian_solves_the_least_squares_system():
    """Against a dense solution on a tiny, anisotropic grid with a random mask."""
    shape, zooms = (4, 5, 3), (1.0, 1.5, 2.0)
    generator = torch.Generator().manual_seed(1)
    phase = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * math.pi
    mask = torch.rand(shape, generator=generator) < 0.9
    mask[:, 2] = True
    index = torch.arange(mask.numel()).reshape(shape)
    rows, right = [], []
    for axis, zoom in enumerate(zooms):
        n = shape[axis] - 1
        a, b = index.narrow(axis, 0, n).flatten(), index.narrow(axis, 1, n).flatten()
        for i, j in zip(a.tolist(), b.tolist(), strict=True):
            if mask.flatten()[i] and mask.flatten()[j]:
                row = torch.zeros(mask.numel(), dtype=torch.float64)
                row[i], row[j] = -1 / zoom, 1 / zoom
                rows.append(row)
                right.append(wrap(phase.flatten()[j] - phase.flatten()[i]) / zoom)
    solution = torch.linalg.lstsq(torch.stack(rows), torch.stack(right)[:, None], driver="gelsd")
    expected = solution.solution.reshape(shape)[mask]
    found = laplacian(phase, mask, zooms)[mask]
    difference = found - expected
    torch.testing.assert_close(
        difference, difference.mean().expand_as(difference), atol=2e-3, rtol=0
    )


@pytest.mark.parametrize("boundary", ["neumann", "periodic"])
def test_laplacian_with_a_transform_solves_its_equations(boundary):
    """Against a dense solution: all edges of the box (or torus), steps 0 outside the mask."""
    shape, zooms = (4, 5, 3), (1.0, 1.5, 2.0)
    generator = torch.Generator().manual_seed(1)
    phase = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * math.pi
    mask = torch.rand(shape, generator=generator) < 0.9
    mask[:, 2] = mask[1] = mask[..., 1] = True
    periodic = boundary == "periodic"
    padded = padded_shape(shape, zooms, margin=max(zooms)) if periodic else shape
    whole, known = torch.zeros(padded).double(), torch.zeros(padded, dtype=torch.bool)
    whole[:4, :5, :3], known[:4, :5, :3] = phase, mask
    index = torch.arange(whole.numel()).reshape(padded)
    rows, right = [], []
    for axis, zoom in enumerate(zooms):
        for i, j in zip(index.flatten().tolist(), index.roll(-1, axis).flatten().tolist(),
                        strict=True):  # fmt: skip
            if not periodic and i // index.stride(axis) % padded[axis] == padded[axis] - 1:
                continue
            row = torch.zeros(whole.numel(), dtype=torch.float64)
            row[i], row[j] = -1 / zoom, 1 / zoom
            both = known.flatten()[i] and known.flatten()[j]
            rows.append(row)
            right.append(both * wrap(whole.flatten()[j] - whole.flatten()[i]) / zoom)
    solution = torch.linalg.lstsq(torch.stack(rows), torch.stack(right)[:, None], driver="gelsd")
    expected = solution.solution.reshape(padded)[:4, :5, :3][mask]
    difference = laplacian(phase, mask, zooms, boundary=boundary)[mask] - expected
    regions = label(mask.numpy())[1]
    assert regions == 1
    torch.testing.assert_close(
        difference, difference.mean().expand_as(difference), atol=1e-9, rtol=0
    )


@pytest.mark.parametrize(("shape", "zooms"), GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("boundary", ["neumann", "periodic"])
def test_what_a_transform_loses_is_harmonic_inside(boundary, shape, zooms):
    """So that the local field is all there, whatever is left of the background."""
    truth, mask = 0.4 * tilted_dipole(shape, zooms).double(), holed(shape)
    unwrapped = laplacian(wrap(truth), mask, zooms, boundary=boundary)
    error = unwrapped - truth
    assert error[mask].std() > 0.1
    curvature, inner = torch.zeros_like(truth), mask.clone()
    for axis, zoom in enumerate(zooms):
        for step in (1, -1):
            curvature += (error.roll(step, axis) - error) / zoom**2
            inner &= mask.roll(step, axis)
    assert inner.sum() > 1000
    assert curvature[inner].abs().max() < 1e-9


def test_laplacian_boundaries_agree_where_the_mask_is_its_box():
    shape, zooms = GRIDS["anisotropic"]
    truth, mask = 0.4 * bowl(shape, zooms), torch.zeros(shape, dtype=torch.bool)
    mask[3:-4, 2:-3, 1:-2] = True
    _, phase = noisy(truth, 10)
    phase[~mask] = math.nan
    by_mask, by_box = (
        laplacian(phase, mask, zooms, boundary=boundary) for boundary in ("mask", "neumann")
    )
    torch.testing.assert_close(by_box, by_mask, atol=5e-3, rtol=0)
    assert (by_box[~mask] == 0).all()
    with pytest.raises(ValueError, match="none of mask, neumann, periodic"):
        laplacian(phase, mask, zooms, boundary="dirichlet")


def test_laplacian_keeps_echoes_in_proportion():
    """Later echoes turn more than once: their constant follows from the echo before."""
    shape, zooms = GRIDS["odd"]
    mask, times = holed(shape), ECHO_TIMES[:3]
    rate = (0.3 * bowl(shape, zooms) + 1) / ECHO_TIMES[0]
    truth = torch.stack([rate * time for time in times])
    unwrapped = laplacian(wrap(truth), mask, zooms, echo_times=times)
    torch.testing.assert_close(unwrapped[:, mask], truth[:, mask], atol=0.03, rtol=0)
    alone = laplacian(wrap(truth), mask, zooms)[:, mask]
    assert alone.median(-1).values.abs().max() < math.pi


def test_laplacian_levels_each_region():
    shape = (40, 20, 20)
    x, y, z = grid(shape)
    truth = 0.2 * x + 0.02 * y**2
    mask = (y**2 + z**2 < 60) & (x.abs() < 18)
    mask[20:22] = False
    unwrapped = laplacian(wrap(truth), mask, (1, 1, 1))
    assert (
        turns(unwrapped, truth, mask).sub(turns(unwrapped, truth, mask).round()).abs().max() < 0.01
    )


def test_laplacian_warns_when_it_gives_up(monkeypatch):
    monkeypatch.setattr(laplacian_module, "MAX_ITERATIONS", 1)
    truth = bowl((16, 16, 16), (1, 1, 1))
    with pytest.warns(RuntimeWarning, match="stopped after 1 iterations"):
        laplacian(wrap(truth), holed((16, 16, 16)), (1, 1, 1))


# What every method owes

UNWRAP = {
    **{name: function_of("unwrap", name) for name in METHODS["unwrap"]},
    "neumann": partial(laplacian, boundary="neumann"),
    "periodic": partial(laplacian, boundary="periodic"),
}


@pytest.mark.parametrize("unwrap", UNWRAP.values(), ids=UNWRAP)
def test_outside_the_mask_nothing_is_read_and_twice_is_the_same(unwrap):
    shape, zooms = GRIDS["odd"]
    mask = holed(shape)
    _, phase = noisy(torch.stack([bowl(shape, zooms), 2 * bowl(shape, zooms)]), 5)
    hollow, before = torch.where(mask, phase, math.nan), phase.clone()
    one, two = (unwrap(p, mask, zooms, echo_times=(0.01, 0.02)) for p in (phase, hollow))
    assert torch.equal(one, two)
    assert torch.equal(phase, before)
    assert (one[:, ~mask] == 0).all()
    # Empty space around does not matter, but to the last digits of a transform.
    wide = torch.nn.functional.pad(phase, (3, 2, 0, 4, 1, 0))
    room = torch.nn.functional.pad(mask, (3, 2, 0, 4, 1, 0))
    padded = unwrap(wide, room, zooms, echo_times=(0.01, 0.02))
    torch.testing.assert_close(padded[:, room], one[:, mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize("unwrap", UNWRAP.values(), ids=UNWRAP)
def test_float32_is_enough(unwrap):
    shape, zooms = GRIDS["odd"]
    phase, mask = wrap(bowl(shape, zooms).double()), holed(shape)
    single, double = (unwrap(p, mask, zooms) for p in (phase.float(), phase))
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, atol=5e-3, rtol=0)


@pytest.mark.parametrize("unwrap", UNWRAP.values(), ids=UNWRAP)
def test_grids_must_agree(unwrap):
    phase = torch.zeros(2, 6, 6, 6)
    mask = torch.ones(6, 6, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"phase \(2, 6, 6, 6\) and mask \(6, 6, 5\)"):
        unwrap(phase, mask[..., :5], (1, 1, 1), echo_times=(0.01, 0.02))
    with pytest.raises(ValueError, match="2 echoes and echo_times 1"):
        unwrap(phase, mask, (1, 1, 1), echo_times=(0.01,))
    with pytest.raises(ValueError, match="positive"):
        unwrap(phase, mask, (1, 1, 1), echo_times=(0.0, 0.01))
    with pytest.raises(ValueError, match="must be"):
        unwrap(phase[0, 0], mask, (1, 1, 1))


def test_romeo_refuses_what_it_cannot_do():
    phase, mask = torch.zeros(2, 6, 6, 6), torch.ones(6, 6, 6, dtype=torch.bool)
    times = (0.01, 0.02)
    with pytest.raises(ValueError, match="no echo_times"):
        romeo(phase, mask, (1, 1, 1))
    with pytest.raises(ValueError, match=r"magnitude \(6, 6, 6\)"):
        romeo(phase, mask, (1, 1, 1), magnitude=phase[0], echo_times=times)
    with pytest.raises(ValueError, match="none of romeo"):
        romeo(phase, mask, (1, 1, 1), echo_times=times, weights="juliet")
    with pytest.raises(ValueError, match="template 3"):
        romeo(phase, mask, (1, 1, 1), echo_times=times, template=3)
    with pytest.raises(ValueError, match="uncertain is 2: give a number above 0 and up to 1"):
        romeo(phase, mask, (1, 1, 1), echo_times=times, uncertain=2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("unwrap", UNWRAP.values(), ids=UNWRAP)
def test_cuda_gives_the_same(unwrap):
    shape, zooms = GRIDS["odd"]
    phase, mask = wrap(tilted_dipole(shape, zooms)), holed(shape)
    result = unwrap(phase.cuda(), mask.cuda(), zooms)
    assert result.is_cuda
    torch.testing.assert_close(result.cpu(), unwrap(phase, mask, zooms), atol=1e-2, rtol=0)


# From file to file


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    shape, zooms = (20, 18, 16), (1.0, 1.0, 2.0)
    truth = torch.stack([0.3 * bowl(shape, zooms) * t for t in (1, 2)])
    magnitude, phase = noisy(truth, 30)
    nb.Nifti1Image(np.zeros(shape, np.float32), np.diag([*zooms, 1])).to_filename(
        tmp_path / "grid.nii"
    )
    data = {"phase": phase, "magnitude": magnitude, "mask": holed(shape)}
    return {
        name: images.save(image, tmp_path / f"{name}.nii.gz", like=tmp_path / "grid.nii")
        for name, image in data.items()
    }


@pytest.mark.parametrize("method", METHODS["unwrap"])
def test_workflow_builds_and_runs(method, files, tmp_path):
    workflow = init_unwrap_wf(method=method)
    workflow.base_dir = tmp_path
    for name, path in files.items():
        setattr(workflow.inputs.inputnode, name, path)
    workflow.inputs.inputnode.echo_times = [0.01, 0.02]
    graph = workflow.run()
    (node,) = (node for node in graph.nodes() if node.name == method)
    unwrapped = images.load(node.result.outputs.phase, like=files["phase"])
    phase, mask = (images.load(files[name]) for name in ("phase", "mask"))
    assert unwrapped.shape == phase.shape
    difference = turns(unwrapped, phase, mask > 0)
    error = (difference - difference.round()).abs().mean()
    assert error < (0.02 if method == "laplacian" else 1e-5)
    step = node.result.outputs.step
    json.dumps(step)
    assert (step["stage"], step["method"], step["warnings"]) == ("unwrap", method, [])
    assert ("weights" in step["parameters"]) == (method == "romeo")


def test_parameters_reach_the_node():
    chosen = {"individual": True, "uncertain": 1.0}
    node = init_unwrap_wf(parameters=chosen, omp_nthreads=2, use_gpu=True).get_node("romeo")
    assert node.inputs.individual
    assert node.inputs.uncertain == 1.0
    assert node.inputs.num_threads == 1, "it is serial"
    assert not node.inputs.use_gpu
    on_gpu = {m for m in METHODS["unwrap"]
              if init_unwrap_wf(method=m, use_gpu=True).get_node(m).inputs.use_gpu}  # fmt: skip
    assert on_gpu == {"laplacian"}


@pytest.mark.parametrize("interface", [BestPath, Laplacian, Romeo])
def test_interface_does_without_magnitude(interface, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    single = images.save(
        images.load(files["phase"])[0], tmp_path / "single.nii.gz", like=files["mask"]
    )
    outputs = interface(phase=single, mask=files["mask"]).run().outputs
    assert images.shape_of(outputs.phase) == (20, 18, 16)


def test_the_boundary_reaches_the_function(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outputs = Laplacian(phase=files["phase"], mask=files["mask"], boundary="neumann").run().outputs
    assert outputs.step["parameters"] == {"boundary": "neumann"}
    phase, mask = images.load(files["phase"]), images.load(files["mask"]) > 0
    expected = laplacian(phase, mask, (1.0, 1.0, 2.0), boundary="neumann")
    torch.testing.assert_close(images.load(outputs.phase), expected, atol=1e-4, rtol=0)


def test_interface_passes_the_warning_on(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(laplacian_module, "MAX_ITERATIONS", 1)
    outputs = Laplacian(phase=files["phase"], mask=files["mask"]).run().outputs
    assert "stopped after 1 iterations" in outputs.step["warnings"][0]
