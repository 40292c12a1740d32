"""Simulation: what the physics promises, and that a head is one."""

import math
from collections.abc import Callable
from pathlib import Path

import nibabel as nb
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from qsmpipe.images import b0_direction
from qsmpipe.numerics.simulate import (
    Fields,
    FreeSpace,
    Scan,
    TissueMaps,
    add_noise,
    block_mean,
    brain_of,
    fields,
    maps_of,
    shim,
    simulate,
    upsample,
    voxel_signal,
)
from qsmpipe.numerics.simulate import labels as real
from qsmpipe.numerics.simulate.analytic import TISSUES, Part, head
from qsmpipe.numerics.simulate.field import cuboid
from qsmpipe.numerics.simulate.signal import coil_sensitivity

HEADS = Path(__file__).parents[2] / "shared" / "data" / "heads"

TILTED = (0.0, 0.5, math.sqrt(0.75))
"""B0, 30 degrees off the third voxel axis."""

GAMMA = 42.577478518e6
"""In Hz/T."""


def rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def mm(shape: tuple[int, ...], zooms: tuple[float, ...]) -> tuple[Tensor, ...]:
    """Coordinates from the grid's middle."""
    return torch.meshgrid(
        *((torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * zoom
          for n, zoom in zip(shape, zooms, strict=True)), indexing="ij",
    )  # fmt: skip


def ball(shape: tuple[int, ...], zooms: tuple[float, ...], radius: float) -> Tensor:
    """How much of each voxel a ball fills."""
    fine = mm(tuple(4 * n for n in shape), tuple(zoom / 4 for zoom in zooms))
    return block_mean((sum(axis**2 for axis in fine) <= radius**2).double(), 4)


# --- field -------------------------------------------------------------------


@pytest.mark.parametrize("b0", [(0, 0, 1), (1, 0, 0), TILTED, (0.6, -0.48, 0.64)])
@pytest.mark.parametrize(
    ("shape", "zooms"), [((48, 44, 40), (1, 1, 1)), ((41, 47, 29), (1, 1.1, 1.6))]
)
def test_a_sphere_makes_its_dipole(b0: tuple, shape: tuple, zooms: tuple) -> None:
    radius = 9.0
    field = FreeSpace.on_grid(torch.zeros(shape, dtype=torch.float64), zooms, b0)(
        ball(shape, zooms, radius)
    )
    x, y, z = mm(shape, zooms)
    distance = (x**2 + y**2 + z**2).sqrt()
    along = b0[0] * x + b0[1] * y + b0[2] * z
    outside = (radius / distance) ** 3 / 3 * (3 * (along / distance) ** 2 - 1)
    expected = torch.where(distance > radius, outside, 0.0)
    clear = (distance - radius).abs() > 1.5 * max(zooms)
    error = (field - expected)[clear]
    assert error.abs().max() < 0.02
    assert rms(error) < 0.002
    pole = expected[clear].max()
    assert field[clear].max() == pytest.approx(pole.item(), abs=0.01)


@pytest.mark.parametrize("zooms", [(1.0, 1.0, 1.0), (0.7, 0.7, 2.0)])
def test_a_voxel_is_the_sum_of_its_parts(zooms: tuple) -> None:
    parts = 8
    x, y, z = mm((parts,) * 3, tuple(zoom / parts for zoom in zooms))
    field = cuboid(3, zooms, TILTED)
    for i, j, k in [(1, 0, 0), (0, 1, 0), (0, 1, 2), (-2, 1, 1), (3, -2, 1)]:
        dx, dy, dz = i * zooms[0] - x, j * zooms[1] - y, k * zooms[2] - z
        r = (dx**2 + dy**2 + dz**2).sqrt()
        along = (dx * TILTED[0] + dy * TILTED[1] + dz * TILTED[2]) / r
        points = ((3 * along**2 - 1) / r**3).mean() * math.prod(zooms) / (4 * math.pi)
        assert field[3 + i, 3 + j, 3 + k].item() == pytest.approx(points.item(), rel=0.02)


def test_three_directions_cancel() -> None:
    axes = [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    total = sum(cuboid(4, (1.0, 1.3, 2.0), axis) for axis in axes)
    torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-12)


def test_slabs_give_what_one_transform_gives() -> None:
    chi = torch.randn(13, 11, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    space = FreeSpace.on_grid(chi, (1, 1, 2), TILTED)
    whole = torch.fft.irfftn(torch.fft.rfftn(chi, s=space.shape) * space.transfer, s=space.shape)
    torch.testing.assert_close(space(chi), whole[:13, :11, :9])


def blobs(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Two smooth sources without symmetry."""
    first = torch.exp(-((x / 5) ** 2) - (y / 8) ** 2 - ((z - 2) / 5) ** 2)
    second = torch.exp(-(((x + 7) / 5) ** 2) - ((y - 5) / 5) ** 2 - ((z + 4) / 6) ** 2)
    return first - 0.6 * second


@pytest.mark.parametrize("angle", [30.0, -75.0])
def test_tilting_the_grid_is_tilting_b0(angle: float) -> None:
    shape, zooms = (50, 46, 48), (1.0, 1.0, 1.0)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    x, y, z = mm(shape, zooms)
    straight = FreeSpace.on_grid(x, zooms)(blobs(x, y, z))
    v, w = cos * y - sin * z, sin * y + cos * z
    affine = np.eye(4)
    affine[1:3, 1:3] = [[cos, -sin], [sin, cos]]
    tilted = FreeSpace.on_grid(x, zooms, b0_direction(affine))(blobs(x, v, w))
    points = [(axis + (n - 1) / 2).numpy() for axis, n in zip((x, v, w), shape, strict=True)]
    moved = torch.from_numpy(ndimage.map_coordinates(straight.numpy(), points, order=3))
    middle = (x**2 + y**2 + z**2) < 20**2
    assert rms((moved - tilted)[middle]) < 0.01 * rms(tilted[middle])


class Scene:
    """A ball of tissue in air, with a source inside and one outside."""

    shape, zooms = (44, 40, 42), (1.0, 1.0, 1.0)

    def __init__(self) -> None:
        x, y, z = mm(self.shape, self.zooms)
        self.mask = x**2 + y**2 + z**2 < 14**2
        self.inner = ((x - 3) ** 2 + y**2 + (z + 2) ** 2 < 3**2).double()
        self.outer = (x**2 + y**2 + (z - 18) ** 2 < 2.5**2).double()

    def fields(self, chi: Tensor, **options: object) -> Fields:
        return fields(chi, self.mask, self.zooms, b0_direction=TILTED, **options)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene()


def test_total_is_local_plus_background(scene: Scene) -> None:
    whole = scene.fields(0.2 * scene.inner + 9.4 * scene.outer)
    torch.testing.assert_close(whole.total, whole.local + whole.background)
    inner = scene.fields(0.2 * scene.inner)
    torch.testing.assert_close(whole.local, inner.local)
    torch.testing.assert_close(whole.total - inner.total, scene.fields(9.4 * scene.outer).total
                               - scene.fields(0 * scene.outer).total)  # fmt: skip


def test_the_background_is_harmonic_in_the_mask(scene: Scene) -> None:
    whole = scene.fields(0.2 * scene.inner + 9.4 * scene.outer)
    kernel = torch.from_numpy(ndimage.generate_binary_structure(3, 1)).double()
    kernel[1, 1, 1] = -6
    core = torch.from_numpy(ndimage.binary_erosion(scene.mask.numpy(), iterations=3))

    def bend(field: Tensor) -> float:
        return rms(torch.from_numpy(ndimage.convolve(field.numpy(), kernel.numpy()))[core])

    assert rms(whole.background[core]) > 5 * rms(whole.local[core])
    assert bend(whole.background) < 0.1 * bend(whole.local)


def test_only_differences_of_susceptibility_count(scene: Scene) -> None:
    chi = 0.2 * scene.inner + 9.4 * scene.outer
    here, there = scene.fields(chi), scene.fields(chi - 9.05, outside=9.4 - 9.05)
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda chi, mask: (chi[1:], mask, (0, 0, 1)), "different grids"),
        (lambda chi, mask: (chi, mask & False, (0, 0, 1)), "mask is empty"),
        (lambda chi, mask: (chi, mask, (0, 0, 2)), "length 2, not 1"),
    ],
)
def test_fields_refuse(change: Callable, message: str) -> None:
    chi, mask, b0 = change(torch.zeros(6, 6, 6), torch.ones(6, 6, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=message):
        fields(chi, mask, (1, 1, 1), b0_direction=b0)


def test_a_shim_cancels_second_order_and_nothing_else(scene: Scene) -> None:
    x, y, z = mm(scene.shape, scene.zooms)
    smooth = 3 + 0.1 * x - 0.2 * z + 0.01 * (x * y + 2 * z**2 - x**2 - y**2)
    torch.testing.assert_close(shim(smooth, scene.mask, scene.zooms), -smooth)
    fine = torch.zeros([3 * n for n in scene.shape], dtype=torch.float64)
    added = shim(smooth, scene.mask, scene.zooms, like=fine, factor=3)
    u, v, w = (axis[1::3, 1::3, 1::3] for axis in mm(tuple(fine.shape), (1 / 3,) * 3))
    again = 3 + 0.1 * u - 0.2 * w + 0.01 * (u * v + 2 * w**2 - u**2 - v**2)
    torch.testing.assert_close(added[1::3, 1::3, 1::3], -again)
    single = shim(smooth.float(), scene.mask, scene.zooms)
    torch.testing.assert_close(single.double(), -smooth, rtol=1e-4, atol=1e-4)
    third = x**3 - 3 * x * y**2
    left = third + shim(third, scene.mask, scene.zooms)
    assert rms(left[scene.mask]) > 0.3 * rms(third[scene.mask])


# --- signal ------------------------------------------------------------------


def test_phase_is_field_times_echo_time() -> None:
    field = torch.linspace(-1, 1, 60, dtype=torch.float64).reshape(3, 4, 5)
    one = torch.ones_like(field)
    times = (0.004, 0.012)
    signal = voxel_signal(field, 30 * one, 2 * one, echo_times=times, field_strength=7.0)
    for echo, time in zip(signal, times, strict=True):
        phase = 2 * math.pi * GAMMA * 7.0 * field * 1e-6 * time
        turned = echo.angle() - phase
        torch.testing.assert_close(torch.cos(turned), one)
        torch.testing.assert_close(echo.abs(), 2 * math.exp(-30 * time) * one)


def test_a_gradient_dephases_a_voxel() -> None:
    factor, step, time = 4, 0.03, 0.02
    field = step * torch.arange(16, dtype=torch.float64)[:, None, None].expand(16, 4, 4)
    zero = torch.zeros_like(field)
    signal = voxel_signal(
        field, zero, zero + 1, echo_times=[time], field_strength=3.0, factor=factor
    )
    turn = 2 * math.pi * GAMMA * 3 * step * 1e-6 * time
    left = abs(math.sin(factor * turn / 2) / (factor * math.sin(turn / 2)))
    assert left < 0.9
    torch.testing.assert_close(signal.abs(), torch.full_like(signal.abs(), left))


def test_noise_has_the_promised_size() -> None:
    signal = torch.zeros(2, 40, 40, 40, dtype=torch.complex128)
    mask = torch.zeros(40, 40, 40, dtype=torch.bool)
    mask[:20] = True
    signal[:, :20] = 80 * torch.exp(torch.tensor(1j))
    noisy = add_noise(signal, mask, snr=40.0, seed=5)
    noise = noisy - signal
    assert noise.real.std().item() == pytest.approx(2, rel=0.02)
    assert noise.imag.std().item() == pytest.approx(2, rel=0.02)
    assert abs((noise.real * noise.imag).mean().item()) < 0.05
    assert noisy[:, 20:].abs().mean().item() == pytest.approx(2 * math.sqrt(math.pi / 2), rel=0.02)
    assert torch.equal(noisy, add_noise(signal, mask, snr=40.0, seed=5))
    assert not torch.equal(noisy, add_noise(signal, mask, snr=40.0, seed=6))


def small_head(dtype: torch.dtype = torch.float64) -> tuple[TissueMaps, Tensor]:
    x, y, z = mm((32, 28, 40), (2.0, 2.0, 2.0))
    inside = (x / 26) ** 2 + (y / 24) ** 2 + (z / 34) ** 2 < 1
    brain = (x / 20) ** 2 + (y / 18) ** 2 + ((z - 2) / 20) ** 2 < 1
    nucleus = (x - 6) ** 2 + y**2 + z**2 < 5**2
    chi = torch.where(inside, 0.1 * nucleus, 9.4)
    maps = TissueMaps(chi, 20.0 * inside + 20 * nucleus, 1.0 * inside)
    return TissueMaps(*(image.to(dtype) for image in maps)), brain


def test_a_scan_agrees_with_its_truth() -> None:
    maps, brain = small_head()
    scan = Scan(3.0, (0.004, 0.010), b0_direction=TILTED, factor=2, coil_seed=3)
    scanned = simulate(maps, brain, (4.0, 4.0, 4.0), scan)
    inside = torch.from_numpy(ndimage.binary_erosion(scanned.mask.numpy()))
    turn = scanned.signal[1] * scanned.signal[0].conj()
    expected = 2 * math.pi * GAMMA * 3.0 * scanned.total * 1e-6 * 0.006
    assert rms((turn.angle() - expected)[inside]) < 0.02
    torch.testing.assert_close(scanned.total, scanned.local + scanned.background)
    coil = coil_sensitivity(scanned.mask, scan, dtype=torch.float64)
    offset = scanned.signal[0] / coil
    expected = 2 * math.pi * GAMMA * 3.0 * scanned.total * 1e-6 * 0.004
    assert rms((offset.angle() - expected)[inside]) < 0.02
    assert coil.angle().std() > 0.1
    decay = scanned.signal[1].abs() / scanned.signal[0].abs() * torch.exp(
        0.006 * scanned.r2star
    )  # fmt: skip
    assert (decay[inside].median() - 1).abs() < 0.01
    torch.testing.assert_close(scanned.mask, block_mean(brain.double(), 2) >= 0.5)


def test_shimming_narrows_the_field() -> None:
    maps, brain = small_head()
    spread = []
    for shimmed in (True, False):
        scan = Scan(3.0, (0.004,), factor=2, shimmed=shimmed)
        scanned = simulate(maps, brain, (4.0, 4.0, 4.0), scan)
        spread.append(rms(scanned.total[scanned.mask]))
    assert spread[0] < 0.5 * spread[1]


def test_a_window_sees_what_the_whole_head_makes() -> None:
    maps, brain = small_head()
    scan = Scan(3.0, (0.004,), factor=2, shimmed=False, coil_phase=0, coil_shading=0)
    whole = simulate(maps, brain, (4.0, 4.0, 4.0), scan)
    window = (slice(1, 15), slice(0, 14), slice(5, 18))
    part = simulate(maps, brain, (4.0, 4.0, 4.0), scan, window=window)
    torch.testing.assert_close(part.signal, whole.signal[(slice(None), *window)])
    torch.testing.assert_close(part.total, whole.total[window])
    assert part.mask.shape == part.local.shape == part.chi.shape == (14, 14, 13)


def test_single_precision_agrees_with_double() -> None:
    scan = Scan(3.0, (0.01,), b0_direction=TILTED, factor=2)
    results = []
    for dtype in (torch.float32, torch.float64):
        maps, brain = small_head(dtype)
        results.append(simulate(maps, brain, (4.0, 4.0, 4.0), scan))
        assert results[-1].total.dtype is dtype
    torch.testing.assert_close(results[0].total.double(), results[1].total, rtol=0, atol=2e-4)
    torch.testing.assert_close(
        results[0].signal.to(torch.complex128), results[1].signal, rtol=0, atol=2e-3
    )


def test_blocks_must_fit() -> None:
    with pytest.raises(ValueError, match="does not divide into blocks of 2"):
        block_mean(torch.zeros(4, 5, 4), 2)
    small = torch.arange(24.0).reshape(2, 3, 4)
    torch.testing.assert_close(block_mean(upsample(small, 3), 3), small)


# --- the analytic head -------------------------------------------------------


def straight(zoom: float) -> tuple[tuple[int, int, int], Tensor]:
    """Grid and affine that hold the head."""
    shape = (round(180 / zoom), round(220 / zoom), round(200 / zoom))
    affine = torch.diag(torch.tensor([zoom, zoom, zoom, 1.0], dtype=torch.float64))
    affine[:3, 3] = torch.tensor([-90.0, -105, -110]) + zoom / 2
    return shape, affine


@pytest.fixture(scope="module")
def drawn() -> tuple[Tensor, Tensor]:
    shape, affine = straight(2.0)
    labels, brain = head(shape, affine, lesions=True)
    return labels, brain


def test_every_part_is_there_and_of_its_size(drawn: tuple[Tensor, Tensor]) -> None:
    labels, brain = drawn
    volumes = {Part(i): 8 * n for i, n in enumerate(torch.bincount(labels.flatten()).tolist())
               if i in TISSUES}  # fmt: skip
    assert all(volumes.values())
    assert volumes.keys() == TISSUES.keys()
    expected = {
        Part.PALLIDUM: 2 * 4 / 3 * math.pi * 4.5 * 9 * 6.5,
        Part.EYE: 2 * 4 / 3 * math.pi * 12**3,
        Part.MICROBLEED: 5 * 4 / 3 * math.pi * 2.2**3,
    }
    for part, volume in expected.items():
        assert volumes[part] == pytest.approx(volume, rel=0.35)
    assert 1.1e6 < 8 * brain.sum() < 1.7e6
    assert 0.3 < volumes[Part.CORTEX] / volumes[Part.WHITE] < 1


def test_the_brain_is_closed_and_holds_all_brain_tissue(drawn: tuple[Tensor, Tensor]) -> None:
    labels, brain = drawn
    assert (brain_of(labels, TISSUES) & ~brain).sum() < 0.01 * brain.sum()
    _, components = ndimage.label(brain.numpy())
    assert components == 1
    assert not (labels[brain] == Part.AIR).any()
    assert not (labels[brain] == Part.BONE).any()


def test_a_head_tilted_with_its_grid_is_the_same_head() -> None:
    shape, affine = straight(5.0)
    turn = torch.eye(4, dtype=torch.float64)
    cos, sin = math.cos(0.4), math.sin(0.4)
    turn[1:3, 1:3] = torch.tensor([[cos, -sin], [sin, cos]])
    tilted = head(shape, turn @ affine, tilt=turn[:3, :3])
    same = tilted.labels == head(shape, affine).labels
    assert same.float().mean() > 0.9999
    assert b0_direction((turn @ affine).numpy()) == pytest.approx((0, sin, cos))


@pytest.mark.parametrize("angle", [0.3, 1.2])
def test_an_oblique_grid_shows_the_same_volumes(
    angle: float, drawn: tuple[Tensor, Tensor]
) -> None:
    turn = torch.eye(4, dtype=torch.float64)
    turn[:2, :2] = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    )
    zooms = torch.tensor([2.5, 3.0, 4.0, 1.0], dtype=torch.float64)
    affine = turn @ torch.diag(zooms)
    affine[:3, 3] = -affine[:3, :3] @ torch.tensor([48.0, 40.0, 30.0], dtype=torch.float64)
    labels, brain = head((97, 81, 55), affine)
    assert 30 * brain.sum().item() == pytest.approx(8 * drawn[1].sum().item(), rel=0.01)
    assert 30 * (labels == Part.PUTAMEN).sum().item() == pytest.approx(
        8 * (drawn[0] == Part.PUTAMEN).sum().item(), rel=0.1
    )


def test_beside_the_head_is_air() -> None:
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, 3] = torch.tensor([200.0, 0, 0])
    labels, brain = head((8, 9, 7), affine)
    assert not labels.any()
    assert not brain.any()


def test_maps_follow_the_table(drawn: tuple[Tensor, Tensor]) -> None:
    labels, _ = drawn
    plain = maps_of(labels, TISSUES, (2, 2, 2))
    assert plain.chi[labels == Part.PALLIDUM].unique().tolist() == pytest.approx([0.16])
    assert plain.chi[0, 0, -1].item() == pytest.approx(9.4)
    varied = maps_of(labels, TISSUES, (2, 2, 2), texture=0.01, seed=1)
    white = labels == Part.WHITE
    assert varied.chi[white].std().item() == pytest.approx(0.01, rel=0.15)
    assert varied.chi[white].mean().item() == pytest.approx(-0.03, abs=0.002)
    assert torch.equal(varied.chi[labels == Part.BONE], plain.chi[labels == Part.BONE])
    assert torch.equal(varied.chi, maps_of(labels, TISSUES, (2, 2, 2), texture=0.01, seed=1).chi)
    faster = maps_of(labels, TISSUES, (2, 2, 2), field_strength=7.0)
    assert 1.7 < faster.r2star[white].mean() / plain.r2star[white].mean() < 2.2
    with pytest.raises(ValueError, match="no tissue for label 99"):
        maps_of(torch.tensor([[[99]]]), TISSUES, (2, 2, 2))


# --- label maps --------------------------------------------------------------


def toy() -> Tensor:
    """Skin, skull, CSF and brain as nested balls on a neck, RAS+, 3 mm."""
    x, y, z = mm((60, 60, 64), (3, 3, 3))
    r = (x**2 + y**2 + (z - 12) ** 2).sqrt()
    labels = torch.zeros(60, 60, 64, dtype=torch.int16)
    labels[(x**2 + y**2 < 42**2) & (z < 0) & (z > -80)] = 507
    for radius, label in [(75, 511), (70, 515), (62, 24), (57, 3), (48, 2)]:
        labels[r < radius] = label
    for side in (-1, 1):
        labels[(x - side * 27) ** 2 + (y - 57) ** 2 + (z + 12) ** 2 < 12**2] = 506
    return labels


def test_cleaning_mends_what_is_broken() -> None:
    labels = toy()
    labels[30, 30, 30] = 0  # a speck in the brain
    labels[20:24, 20:23, 24] = 0  # more than a speck, yet brain all around
    labels[30, 30:33, 56] = 0  # in the vault's bone
    labels[28:34, 30:33, 51:53] = 0  # too large for a speck, yet in the vault
    labels[27:33, 28:34, 8:11] = 0  # the pharynx
    labels[2, 2, 60] = 24  # an island
    before = labels.clone()
    cleaned, start = real.clean(labels, (3, 3, 3), neck=30.0)
    assert torch.equal(labels, before)
    assert cleaned.dtype is labels.dtype
    i, j, k = (-s for s in start)
    assert cleaned[i + 30, j + 30, k + 30] == 2
    assert (cleaned[i + 20 : i + 24, j + 20 : j + 23, k + 24] > 0).all()
    assert (cleaned[i + 28 : i + 34, j + 30 : j + 33, k + 51 : k + 57] > 0).all()
    assert not cleaned[i + 27 : i + 33, j + 28 : j + 34, k + 8 : k + 11].any()
    _, components = ndimage.label(cleaned.numpy() > 0)
    assert components == 1
    head_slices = torch.nonzero((before == 507).any(0).any(0)).flatten()
    assert start[2] == head_slices[0] - 10
    assert (cleaned[..., :11] == cleaned[..., 10:11]).all()
    assert (cleaned[..., 0] == 507).any()


def test_an_empty_map_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no head in it"):
        real.clean(torch.zeros(4, 4, 4, dtype=torch.int16), (1, 1, 1))


def test_the_brain_mask_spans_the_sulci() -> None:
    labels = toy()
    labels[29:31, 20:50, 44:52][labels[29:31, 20:50, 44:52] == 3] = 24
    mask = real.brain_mask(labels, (3, 3, 3), closing=6.0)
    assert mask[29:31, 30, 44:47].all()
    assert mask[brain_of(labels, real.TISSUES)].all()
    assert not mask[(labels == 515) | (labels == 0)].any()


@pytest.mark.parametrize("number", ["10", "11"])
def test_a_real_head_is_mended(number: str) -> None:
    path = HEADS / f"training_seg_{number}.nii.gz"
    if not path.exists():
        pytest.skip("shared test data not found: heads")
    image = nb.as_closest_canonical(nb.load(path))
    before = torch.from_numpy(np.asarray(image.dataobj).astype(np.int16))
    labels, start = real.clean(before, (1.0, 1.0, 1.0))
    air, count = ndimage.label(labels.numpy() == 0)
    sizes = np.bincount(air.ravel())[1:]
    border = np.unique(np.concatenate([air[0].ravel(), air[-1].ravel(), air[..., -1].ravel(),
                                       air[:, 0].ravel(), air[:, -1].ravel()]))  # fmt: skip
    inner = sizes[[i for i in range(count) if i + 1 not in border]]
    assert (inner > real.SPECK).all()
    assert inner.sum() > 300
    eyes = np.argwhere(labels.numpy() == real.EYES)[:, 2].mean()
    vault = ndimage.binary_fill_holes(labels.numpy()[..., round(eyes) + 45 :] > 0)
    assert not (vault & (labels.numpy()[..., round(eyes) + 45 :] == 0)).any()
    _, pieces = ndimage.label(labels.numpy() > 0)
    assert pieces == 1
    assert (labels[..., 0] == labels[..., 40]).all()
    assert min(labels.shape) < 200
    known = labels[..., -50:]
    top = before[
        start[0] : start[0] + labels.shape[0], start[1] : start[1] + labels.shape[1],
        start[2] + labels.shape[2] - 50 : start[2] + labels.shape[2],
    ]  # fmt: skip
    assert (known == top).float().mean() > 0.97
    assert not set(labels.unique().tolist()) - set(real.TISSUES)
