"""Training data: closed forms, symmetries and statistics that the physics promises."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import SHARED
from phantoms import TILTED
from torch import Tensor

from qsmpipe import images
from qsmpipe.nets.training import augment, heads
from qsmpipe.nets.training.analytic import Analytic, cylinder, offsets_from, sphere
from qsmpipe.nets.training.augment import Augmentation
from qsmpipe.nets.training.brains import (
    Brains,
    Placement,
    chi_range,
    draw_tissues,
    resample,
)
from qsmpipe.nets.training.dataset import Samples
from qsmpipe.nets.training.draws import Draws
from qsmpipe.nets.training.heads import LabelMap, load_heads
from qsmpipe.nets.training.measure import FAST_RADII, Measurement, phase_noise, surroundings
from qsmpipe.nets.training.sample import Sample, Scan, Scans, stack
from qsmpipe.nets.training.shapes import Shapes
from qsmpipe.nets.training.solids import Kind, Solid, draw_solids
from qsmpipe.numerics.background import vsharp
from qsmpipe.numerics.fourier import Shape, Zooms
from qsmpipe.numerics.kernels import dipole
from qsmpipe.numerics.operators import Dipole
from qsmpipe.numerics.simulate.field import AIR, block_mean
from qsmpipe.numerics.simulate.labels import TISSUES
from qsmpipe.numerics.swi import high_pass, homodyne

CPU = torch.device("cpu")
OBLIQUE = Scans(zooms=((1.0, 1.0), (1.2, 1.2), (1.6, 1.6)), tilt=40)
SMALL = Shapes(shape=(24, 20, 16), rim=(2, 3), count=(20, 20), scans=OBLIQUE)
AXES = (0.48, 0.6, 0.64)
"""A direction along no axis."""


@pytest.fixture(scope="module")
def head() -> LabelMap:
    """Balls within balls: skin, bone, fluid, cortex, white matter, pallidum, and a sinus."""
    x, y, z = torch.meshgrid(*(2.0 * (torch.arange(64) - 31.5),) * 3, indexing="ij")
    radius = (x**2 + y**2 + z**2).sqrt()
    labels = torch.zeros(radius.shape, dtype=torch.int16)
    for edge, label in ((60, 511), (56, 515), (50, 24), (48, 3), (42, 2), (8, 13)):
        labels[radius < edge] = label
    labels[(x**2 + (y - 55) ** 2 + z**2) < 36] = 0
    labels[((x - 20) ** 2 + y**2 + z**2) < 64] = 28
    return LabelMap.of(labels, (2.0, 2.0, 2.0))


@pytest.fixture(scope="module")
def brains(head: LabelMap) -> Brains:
    scans = Scans(zooms=((1.5, 2.0), (1.5, 2.0), (2.0, 3.0)), alike=2, tilt=30,
                  field_strengths=(1.5, 3.0, 7.0), echo_time=(0.005, 0.03))  # fmt: skip
    return Brains(heads=[head], shape=(24, 24, 16), scans=scans)


def draw(source: object, index: int = 0, seed: int = 0) -> Sample:
    return source.draw(Draws.of(seed, index), CPU)


def scan(zooms: Zooms = (1.0, 1.0, 1.0), b0: Sequence[float] = (0.0, 0.0, 1.0)) -> Scan:
    return Scan(zooms, tuple(b0), 3.0, 0.02)


# ---------------------------------------------------------------------------- closed forms


def test_a_sphere_is_that_of_a_dipole_convolution() -> None:
    shape, zooms, radius = (56, 48, 60), (1.0, 1.2, 0.9), 7.0
    centre = [n * zoom / 2 for n, zoom in zip(shape, zooms, strict=True)]
    ball = Solid(Kind.SPHERE, tuple(centre), (radius,) * 3, torch.eye(3).tolist())
    box = ball.box(shape, zooms)
    chi = torch.zeros(shape)
    chi[box] = ball.cover(box, zooms, parts=(4, 4, 4), like=chi)
    offsets = offsets_from(centre, shape, scan(zooms), chi)
    inside, field = sphere(offsets, radius, TILTED)
    assert (inside & (chi > 0)).sum() == inside.sum()
    distance = sum(x**2 for x in offsets).sqrt()
    expected = Dipole.on_grid(chi, zooms, TILTED)(chi)
    clear = ((distance - radius).abs() > 2.5) & (distance < 18)
    torch.testing.assert_close(field[clear], expected[clear], atol=0.012, rtol=0)
    assert field[inside].abs().max() == 0
    # On the axis of B0, twice the field of the equator with the opposite sign.
    for direction, factor in (((0, 0, 1.0), 2 / 3), ((1.0, 0, 0), -1 / 3)):
        point = [torch.tensor([[[2 * radius * d]]]) for d in direction]
        value = sphere(point, radius, (0.0, 0.0, 1.0))[1].item()
        assert value == pytest.approx(factor / 8, rel=1e-5)


@pytest.mark.parametrize("b0", [(0.0, 0.0, 1.0), (1.0, 0.0, 0.0), AXES], ids=str)
def test_a_cylinder_is_that_of_a_dipole_convolution(b0: tuple[float, float, float]) -> None:
    shape, radius = (192, 192, 2), 8.0
    rod = Solid(Kind.CYLINDER, (96.0, 96.0, 0.5), (radius, radius, 9.0), torch.eye(3).tolist())
    box = rod.box(shape, (1.0, 1.0, 1.0))
    chi = torch.zeros(shape)
    chi[box] = rod.cover(box, (1.0, 1.0, 1.0), parts=(8, 8, 1), like=chi)
    transfer = dipole(shape, (1.0, 1.0, 1.0), b0, like=chi)
    expected = torch.fft.irfftn(torch.fft.rfftn(chi) * transfer, s=shape)
    offsets = offsets_from((96.0, 96.0, 0.5), shape, scan(), chi)
    inside, field = cylinder(offsets, radius, (0.0, 0.0, 1.0), b0)
    distance = (offsets[0] ** 2 + offsets[1] ** 2).sqrt().expand(shape)
    clear = ((distance - radius).abs() > 2.5) & (distance < 48)
    torch.testing.assert_close(field[clear], expected[clear], atol=0.012, rtol=0)
    assert field[inside].unique().item() == pytest.approx((3 * b0[2] ** 2 - 1) / 6, abs=1e-6)


def test_a_cylinder_turns_with_its_axis_and_b0() -> None:
    points = Draws.of(0, 0).uniform((-9.0, 9.0), 3, 50)
    (turn,) = Draws.of(0, 1).rotations(1)
    axis, b0 = torch.tensor([0.0, 0.0, 1.0]).double(), torch.tensor(AXES).double()
    _, field = cylinder([*points], 2.0, tuple(axis), tuple(b0))
    _, turned = cylinder([*(turn @ points)], 2.0, tuple(turn @ axis), tuple(turn @ b0))
    torch.testing.assert_close(turned, field)


def test_analytic_samples_hold_what_is_stated() -> None:
    for index in range(8):
        sample = draw(Analytic(shape=(32, 32, 32), spheres=(1, 1), cylinders=(0, 0)), index)
        (value,) = sample.chi[sample.chi != 0].unique().tolist()
        assert 0 < abs(value) <= 0.01
        assert 1 <= (sample.chi != 0).sum() <= 4 / 3 * math.pi * 12.5**3
        assert sample.field[sample.chi != 0].abs().max() == 0
    sample = draw(Analytic(shape=(16, 16, 16), spheres=(3, 3), cylinders=(40, 40)))
    assert 0.01 < sample.chi.abs().max() <= 0.43


# ------------------------------------------------------------------------------ shapes


@pytest.mark.parametrize(
    ("kind", "volume"),
    [
        (Kind.ELLIPSOID, 4 / 3 * math.pi * 7 * 5 * 9),
        (Kind.SPHERE, 4 / 3 * math.pi * 7**3),
        (Kind.CUBOID, 8 * 7 * 5 * 9),
        (Kind.CYLINDER, math.pi * 7 * 5 * 18),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_solid_covers_its_volume(kind: Kind, volume: float) -> None:
    (turn,) = Draws.of(1, 0).rotations(1).tolist()
    axes = (7.0, 7.0, 7.0) if kind is Kind.SPHERE else (7.0, 5.0, 9.0)
    shape, zooms = (36, 40, 28), (1.0, 0.9, 1.3)
    solid = Solid(kind, (18.0, 18.0, 18.0), axes, turn)
    box = solid.box(shape, zooms)
    share = solid.cover(box, zooms, parts=(2, 2, 2), like=torch.zeros(()))
    assert share.sum().item() * math.prod(zooms) == pytest.approx(volume, rel=0.01)
    whole = tuple(slice(0, n) for n in shape)
    assert solid.cover(whole, zooms, parts=(2, 2, 2), like=share).sum() == share.sum()


def test_the_rim_is_free_of_sources() -> None:
    for index in range(3):
        sources = draw(Shapes(shape=(48, 44, 40), count=(80, 80)), index).chi != 0
        for axis in range(3):
            there = sources.movedim(axis, 0).flatten(1).any(1).nonzero()
            n = sources.shape[axis]
            assert 8 <= there.min() <= 12
            assert 8 <= n - 1 - there.max() <= 12
    border = draw(Shapes(shape=(32, 32, 32), rim=None, count=(80, 80))).chi[0]
    assert (border != 0).float().mean() > 0.5
    with pytest.raises(ValueError, match="thinner rim"):
        draw(Shapes(shape=(16, 16, 16)))


def test_small_structures_leave_much_space_empty() -> None:
    shape = (48, 48, 48)
    empty = [
        (draw(Shapes(shape=shape, rim=None, small_only=small)).chi.abs() < 1e-3).float().mean()
        for small in (True, False)
    ]
    assert empty[0] > 0.7 > 0.3 > empty[1]


def test_blurred_shapes_keep_their_integral() -> None:
    choices = {"shape": (40, 40, 40), "rim": None, "count": (1, 1), "size": (4.0, 4.0)}
    for index in (0, 3):
        sharp, soft = (
            draw(Shapes(**choices, blur=(sigma, sigma)), index).chi for sigma in (0.0, 1.5)
        )
        if not (sharp[[0, -1]].any() or sharp[:, [0, -1]].any() or sharp[..., [0, -1]].any()):
            assert soft.sum().item() == pytest.approx(sharp.sum().item(), rel=0.05)
        assert soft.abs().max() < sharp.abs().max() * 1.001 <= 0.2003


# ------------------------------------------------------------------------- augmentation


CHANGES: dict[str, Callable[[Sample], Sample]] = {
    **{f"flip-{axis}": lambda s, axis=axis: augment.flip(s, axis) for axis in range(3)},
    **{f"turn-{n}": lambda s, n=n: augment.turn(s, n) for n in range(4)},
    "swap-0-2": lambda s: augment.swap(s, 0, 2),
    "scale": lambda s: augment.scale(s, 0.3),
    "all": lambda s: Augmentation()(s, Draws.of(5, 5)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_augmentation_leaves_the_physics_true(change: Callable[[Sample], Sample]) -> None:
    changed = change(draw(SMALL, 2))
    zooms, b0 = changed.scan.zooms, changed.scan.b0_direction
    field = Dipole.on_grid(changed.chi, zooms, b0)(changed.chi)
    torch.testing.assert_close(changed.field, field, atol=2e-4 * float(field.std()), rtol=0)


def test_a_mirror_image_needs_its_own_b0() -> None:
    sample = draw(SMALL, 2)
    mirrored = augment.flip(sample, 0)
    field = Dipole.on_grid(mirrored.chi, sample.scan.zooms, sample.scan.b0_direction)(mirrored.chi)
    assert (field - mirrored.field).std() > 0.1 * field.std()


def test_quarter_turns_are_a_group_about_b0() -> None:
    sample = draw(SMALL)
    x = torch.arange(sample.chi.numel(), dtype=torch.float32).reshape(sample.chi.shape)
    sample = sample.map(lambda _: x)
    for quarters in range(4):
        turned = augment.turn(sample, quarters)
        torch.testing.assert_close(turned.chi, torch.rot90(x, quarters, (0, 1)))
        back = augment.turn(turned, -quarters)
        torch.testing.assert_close(back.chi, x)
        assert back.scan == sample.scan
    axial = augment.flip(augment.turn(draw(Analytic(shape=(8, 8, 8))), 1), 2)
    assert axial.scan.b0_direction == (0.0, 0.0, 1.0)


def test_turns_keep_the_shape_of_patches() -> None:
    samples = Samples(source=SMALL, augmentation=Augmentation(flips=False))
    assert {tuple(samples[index].chi.shape) for index in range(8)} == {SMALL.shape}


# ------------------------------------------------------------------------------- brains


@pytest.mark.parametrize("index", [0, 1])
def test_the_field_of_a_patch_is_cut_from_that_of_the_whole(brains: Brains, index: int) -> None:
    region = draw(brains, index)
    zooms, b0 = region.scan.zooms, region.scan.b0_direction
    whole = torch.nn.functional.pad(region.chi, [8] * 6)
    space = Dipole.on_grid(whole, zooms, b0)
    inner = tuple(slice(m, n - m) for m, n in zip(region.margin, region.chi.shape, strict=True))
    expected = space(whole)[(slice(8, -8),) * 3][inner]
    patch, mask = region.cut(), region.mask[inner]
    error = (patch.field - expected)[mask].std()
    assert error < 0.02 * expected[mask].std()
    alone = Dipole.on_grid(patch.chi, zooms, b0)(patch.chi)
    assert (alone - expected)[mask].std() > 3 * error


def test_chi_is_relative_to_the_whole_brain(head: LabelMap) -> None:
    plain = Brains(
        heads=[head], shape=(64, 64, 64), margin=2.0, scans=Scans(zooms=((2.0, 2.0),) * 3),
        background=False, texture=(0, 0), turn=0, size=(1, 1), bend=0, veins=(0, 0),
        lesions=(0, 0),
    )  # fmt: skip
    sample = next(
        s for s in (draw(plain, i) for i in range(30)) if s.mask.sum() > 0.99 * head.brain.sum()
    )
    assert abs(sample.chi[sample.mask].mean()) < 2e-3
    assert sample.chi[sample.mask].std() > 0.01
    assert sample.chi.abs().max() < 0.3, "bone at the edge of the brain"


def test_resampling_by_hand() -> None:
    image = Draws.of(0, 0).uniform((0.0, 1.0), 1, 12, 10, 14).float()
    box, still = (slice(2, 10), slice(1, 9), slice(3, 13)), torch.zeros(3, 2, 2, 2).double()
    part = image[(slice(None), *box)]
    same = Placement((4, 3, 5), torch.tensor([3.0, 2, 4]).double(), torch.eye(3).double(), still)
    assert all(
        a.start <= b.start and a.stop >= b.stop
        for a, b in zip(same.box((12, 10, 14)), np.s_[3:7, 2:5, 4:9], strict=True)
    )
    found = resample(part, box, same, parts=(1, 1, 1))
    torch.testing.assert_close(found, image[:, 3:7, 2:5, 4:9])
    # Voxels of twice the edge, each from eight points that lie on voxels of the image.
    start = torch.tensor([3.5, 2.5, 4.5]).double()
    double = Placement((3, 2, 4), start, 2 * torch.eye(3).double(), still)
    found = resample(part, box, double, parts=(2, 2, 2))
    torch.testing.assert_close(found, block_mean(image[:, 3:9, 2:6, 4:12], 2))


def test_elastic_deformation_does_not_fold(brains: Brains, head: LabelMap) -> None:
    for index in range(4):
        place = brains._place(head, (40, 40, 30), (1.0, 1.0, 2.0), Draws.of(1, index))
        points = place.points(torch.zeros(()))
        steps = [points.diff(dim=axis)[:, :39, :39, :29] for axis in (1, 2, 3)]
        volume = torch.linalg.det(torch.stack(steps, -1).permute(1, 2, 3, 0, 4))
        assert volume.min() > 0.3 * 2 / 8
        straight = Placement(place.shape, place.start, place.steps, 0 * place.bends)
        bent = (points - straight.points(torch.zeros(()))).abs()
        assert 0.5 < bent.max() * 2.0 <= brains.bend


def test_a_head_must_lie_on_the_samples_device(brains: Brains) -> None:
    with pytest.raises(ValueError, match="move it there"):
        brains.draw(Draws.of(0, 0), torch.device("meta"))


# -------------------------------------------------------------------------- measurement


def test_noise_of_the_phase_is_told_by_the_magnitude() -> None:
    magnitude = torch.full((3, 30, 40, 40), 1.0)
    magnitude[1], magnitude[2] = 0.25, 0.0
    magnitude = magnitude.flatten(0, 1)
    mask = magnitude == 1
    strong, weak, none = phase_noise(magnitude, mask, snr=40, seed=1).unflatten(0, (3, 30))
    assert strong.std().item() == pytest.approx(1 / 40, rel=0.02)
    assert weak.std().item() == pytest.approx(1 / 10, rel=0.02)
    assert none.std().item() == pytest.approx(math.pi / math.sqrt(3), rel=0.02)
    assert abs(strong.mean().item()) < 4 / 40 / math.sqrt(strong.numel())


def test_noise_of_the_field_falls_with_field_strength_and_echo_time() -> None:
    levels = {}
    for strength, time in ((3.0, 0.02), (7.0, 0.02), (3.0, 0.01)):
        scans = Scans(field_strengths=(strength,), echo_time=(time, time))
        source = Analytic(shape=(32, 32, 32), scans=scans)
        noisy = Measurement(snr=(50, 50))(draw(source), Draws.of(0, 1))
        levels[strength, time] = (noisy.field - draw(source).field).std().item()
    phase = 2 * math.pi * 42.577 * 3.0 * 0.02
    assert levels[3.0, 0.02] == pytest.approx(1 / 50 / phase, rel=0.03)
    assert levels[7.0, 0.02] == pytest.approx(levels[3.0, 0.02] * 3 / 7, rel=0.03)
    assert levels[3.0, 0.01] == pytest.approx(levels[3.0, 0.02] * 2, rel=0.03)


def test_gaussian_noise_has_a_level_within_its_range() -> None:
    source = Analytic(shape=(24, 24, 24), spheres=(1, 3), cylinders=(0, 0))
    levels = [
        (Measurement(snr=None, gaussian=(1e-5, 1e-3))(draw(source), Draws.of(3, i)).field
         - draw(source).field).std().item()
        for i in range(12)
    ]  # fmt: skip
    assert 0.97e-5 < min(levels) < 1e-4 < max(levels) < 1.03e-3


def test_what_surrounds_a_patch_is_harmonic_in_it() -> None:
    sample = draw(Analytic(shape=(40, 40, 40)))
    field = surroundings(sample, Draws.of(0, 3)).double()
    core = field[1:-1, 1:-1, 1:-1]
    laplacian = sum(field.roll(step, axis)[1:-1, 1:-1, 1:-1] for axis in range(3) for step in
                    (1, -1)) - 6 * core  # fmt: skip
    assert laplacian[8:-8, 8:-8, 8:-8].abs().max() < 1e-3 * field.std()
    assert field.std() > 0.01


def test_a_background_removal_leaves_little_and_costs_the_edge() -> None:
    clean = draw(Shapes(shape=(48, 48, 48)), 1)
    measured = Measurement(snr=None, background=1.0)(clean, Draws.of(2, 2))
    mask = measured.mask
    assert mask.sum() < clean.mask.sum()
    left, around = (measured.field - clean.field)[mask], measured.background[mask]
    assert 0 < left.std() < 0.3 * around.std()
    for image in (measured.field, measured.chi):
        assert image[~mask].abs().max() == 0
    # The local field is all there: what came to it is what is left of the background alone.
    alone = vsharp(measured.background, clean.mask, clean.scan.zooms, radii=FAST_RADII)
    torch.testing.assert_close(left, alone.field[mask], rtol=1e-4, atol=1e-6)


def test_the_background_of_a_head_is_removed(brains: Brains) -> None:
    region = draw(brains, 3)
    measured = Measurement(snr=None, background=1.0, erosion=(0.0, 2.0))(region, Draws.of(2, 2))
    assert (region.mask | ~measured.mask).all()
    left = (measured.field - region.field)[measured.mask]
    assert left.std() < 0.5 * measured.background[measured.mask].std()
    assert measured.background[measured.mask].std() > 0.01


def phantom_phase(shape: Shape = (64, 60, 12)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y, z = torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in shape), indexing="ij")
    smooth = 4 * torch.sin(2 * math.pi * x / 90 + 0.4) + 2 * torch.cos(2 * math.pi * y / 120)
    fine = 0.3 * torch.sin(2 * math.pi * (x + y) / 6) * torch.ones_like(z)
    return smooth, fine, x**2 + y**2 < 27**2, 1 + 0.002 * x


@pytest.mark.parametrize("per_slice", [True, False])
def test_the_filtered_phase_is_that_of_swi(per_slice: bool) -> None:
    smooth, fine, mask, magnitude = phantom_phase()
    choices = {"magnitude": magnitude, "resolution": 5.0, "per_slice": per_slice,
               "b0_direction": AXES}  # fmt: skip
    filtered = high_pass(smooth + fine, mask, (1.0, 1.1, 2.0), **choices)
    dark = {
        kind: homodyne(smooth + fine, mask, (1.0, 1.1, 2.0), power=1.0, darkens=kind, **choices)
        for kind in ("paramagnetic", "diamagnetic")
    }
    expected = math.pi * (dark["diamagnetic"].swi - dark["paramagnetic"].swi) / magnitude
    torch.testing.assert_close(filtered, expected, atol=2e-5, rtol=0)


def test_the_filtered_phase_loses_its_low_frequencies_alone() -> None:
    smooth, fine, mask, magnitude = phantom_phase()
    filtered = high_pass(smooth + fine, mask, (1.0, 1.0, 1.0), magnitude=magnitude)
    inner = (slice(20, -20), slice(18, -18))
    left, smooth, fine = (x[inner].flatten() for x in (filtered, smooth, fine))
    shares = torch.linalg.lstsq(
        torch.stack([smooth - smooth.mean(), fine, torch.ones_like(fine)], 1), left[:, None]
    ).solution.flatten()
    assert abs(shares[0]) < 0.06
    assert shares[1] == pytest.approx(1, abs=0.06)


def test_a_sample_carries_filtered_phase(brains: Brains) -> None:
    samples = Samples(source=brains, measurement=Measurement(filtered=True, snr=None),
                      augmentation=None)  # fmt: skip
    sample, region = samples[4], draw(brains, 4)
    total = (region.field + region.background) * region.scan.radians_per_ppm
    expected = high_pass(
        total, region.mask, region.scan.zooms,
        magnitude=region.magnitude, b0_direction=region.scan.b0_direction,
    )  # fmt: skip
    inner = tuple(slice(m, n - m) for m, n in zip(region.margin, total.shape, strict=True))
    torch.testing.assert_close(sample.filtered, expected[inner])
    assert sample.filtered.abs().max() <= math.pi + 1e-5
    assert samples.batch([4, 5]).filtered.shape == (2, 1, *brains.shape)


# --------------------------------------------------------------------- seeds and ranges


def test_a_sample_follows_from_seed_and_number(brains: Brains) -> None:
    measurement = Measurement(background=0.5, erosion=(0.0, 3.0))
    for source in (SMALL, Analytic(shape=(16, 16, 16)), brains):
        samples = Samples(source=source, measurement=measurement, seed=7)
        first, second = samples[3], samples.batch([1, 3])
        torch.testing.assert_close(second.chi[1, 0], first.chi, atol=0, rtol=0)
        torch.testing.assert_close(second.field[1, 0], first.field, atol=0, rtol=0)
        other = Samples(source=source, measurement=measurement, seed=8)[3]
        assert (other.field != first.field).any()
        assert (second.field[0] != second.field[1]).any()
        bare = Samples(source=source, measurement=None, seed=7)[3]
        torch.testing.assert_close(first.chi, bare.chi * first.mask, atol=0, rtol=0)


def test_a_pool_gives_the_same_sources_measured_anew() -> None:
    source = Analytic(shape=(16, 16, 16))
    measurement = Measurement(snr=None, gaussian=(1e-3, 1e-3))
    pooled = Samples(source=source, augmentation=None, measurement=measurement, pool=2, seed=3)
    first, second, again = pooled[0], pooled[1], pooled[2]
    assert torch.equal(first.chi, again.chi)
    assert not torch.equal(first.chi, second.chi)
    assert not torch.equal(first.field, again.field)
    # whatever was asked for before
    late = Samples(source=source, augmentation=None, measurement=measurement, pool=2, seed=3)
    assert torch.equal(late[2].field, again.field)
    late.forget()
    assert torch.equal(late[2].field, again.field)
    with pytest.raises(ValueError, match="pool is 0"):
        Samples(source=source, pool=0)


def test_a_batch_tells_what_networks_ask_for(brains: Brains) -> None:
    batch = Samples(source=brains).batch([0, 1])
    assert batch.chi.shape == batch.field.shape == batch.mask.shape == (2, 1, *brains.shape)
    assert batch.mask.dtype is torch.bool
    assert batch.zooms.shape == batch.b0_direction.shape == (2, 3)
    assert batch.filtered is None
    torch.testing.assert_close(batch.b0_direction.norm(dim=1), torch.ones(2))
    assert all(image.isfinite().all() for image in (batch.chi, batch.field))
    small = Samples(source=SMALL)
    with pytest.raises(ValueError, match="do not make a batch"):
        stack([small[0], Samples(source=Analytic())[0]])


def test_scans_stay_within_their_ranges() -> None:
    ranges = Scans(zooms=((0.5, 1.0), (0.5, 1.0), (2.0, 4.0)), alike=2, tilt=25,
                   field_strengths=(1.5, 3.0, 7.0), echo_time=(0.01, 0.03))  # fmt: skip
    drawn = [ranges.draw(Draws.of(0, i)) for i in range(300)]
    for axis, (low, high) in enumerate(ranges.zooms):
        sizes = [one.zooms[axis] for one in drawn]
        assert low <= min(sizes) < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < max(sizes) <= high
    assert all(one.zooms[0] == one.zooms[1] for one in drawn)
    tilts = [math.degrees(math.acos(one.b0_direction[2])) for one in drawn]
    assert 20 < max(tilts) <= 25
    assert {one.field_strength for one in drawn} == {1.5, 3.0, 7.0}
    assert all(0.01 <= one.echo_time <= 0.03 for one in drawn)
    assert all(math.hypot(*one.b0_direction) == pytest.approx(1) for one in drawn)
    assert Scans().draw(Draws.of(0, 0)) == scan()


def test_numbers_stay_within_their_ranges() -> None:
    draws = Draws.of(0, 0)
    logs = draws.log_uniform((0.01, 100.0), 4000)
    assert 0.01 <= logs.min() < logs.max() <= 100
    assert (logs < 1).double().mean().item() == pytest.approx(0.5, abs=0.04)
    assert {draws.integer((2, 4)) for _ in range(60)} == {2, 3, 4}
    turns = draws.rotations(50, degrees=20.0)
    torch.testing.assert_close(turns @ turns.mT, torch.eye(3).double().expand_as(turns))
    angles = torch.rad2deg(torch.acos((turns.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2))
    assert 15 < angles.max() <= 20.001
    solids = list(draw_solids(draws, 80, within=((0, 0, 0), (9, 8, 7)), size=(2.0, 3.0)))
    assert {solid.kind for solid in solids} == set(Kind)
    for solid in solids:
        assert all(2 <= axis <= 3 for axis in solid.axes)
        assert all(0 <= c <= n for c, n in zip(solid.centre, (9, 8, 7), strict=True))


def test_tissues_stay_around_their_values() -> None:
    people = [draw_tissues(Draws.of(0, i)) for i in range(20)]
    for label, tissue in TISSUES.items():
        low, high = chi_range(label)
        assert low <= tissue.chi <= high
        values = [person[label].chi for person in people]
        assert low <= min(values) <= max(values) <= high
        assert len(set(values)) == (1 if low == high else 20)
    assert chi_range(0) == (AIR, AIR)


def test_augmentation_scales_within_its_range() -> None:
    plain = Samples(source=SMALL, augmentation=None, measurement=None)
    scaled = Samples(source=SMALL, measurement=None)
    factors = [(scaled[i].chi.abs().sum() / plain[i].chi.abs().sum()).item() for i in range(12)]
    assert 0.1 <= min(factors) < 0.7 < 1.4 < max(factors) <= 2.0001


# ---------------------------------------------------------------------------- real heads


def test_training_never_reads_a_validation_head(head: LabelMap, tmp_path: Path) -> None:
    opened: list[str] = []
    values = np.zeros((40, 40, 40), np.float32)
    values[8:32, 8:32, 8:32] = 3

    def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
        opened.append(path.name)
        return values, np.diag([2.0, 2.0, 2.0, 1.0])

    files = {}
    for purpose in heads.NUMBERS:
        opened.clear()
        load_heads(tmp_path, purpose, read=read)
        files[purpose] = set(opened)
    assert files["training"] == {f"training_seg_{n:02d}.nii.gz" for n in range(1, 13)}
    assert files["validation"] == {f"training_seg_{n:02d}.nii.gz" for n in range(13, 17)}
    opened.clear()
    for purpose, numbers in (("training", [3, 13]), ("validation", [12]), ("training", [17])):
        with pytest.raises(ValueError, match=f"is not for {purpose}"):
            load_heads(tmp_path, purpose, read=read, numbers=numbers)
    assert not opened


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (0, 2, 1)], ids=str)
def test_heads_come_in_ras_order(order: tuple[int, int, int]) -> None:
    upright = Draws.of(0, 0).uniform((0, 9), 4, 5, 6).numpy()
    zooms, affine = (1.0, 2.0, 3.0), np.eye(4)
    stored = np.flip(upright.transpose(order), 1)
    affine[:3, :3] = np.diag(zooms)[:, order] * [1, -1, 1]
    found, sizes = heads._upright(stored, affine)
    np.testing.assert_array_equal(found, upright)
    assert sizes == zooms


def test_a_real_head_makes_samples() -> None:
    if not (folder := SHARED / "heads").is_dir():
        pytest.skip("shared test data not found: heads")
    (real,) = load_heads(folder, "training", read=images.read, numbers=[3])
    fluids = (24, 502, 514)
    tissue = sum(count for label, count in real.counts.items() if label not in fluids)
    assert tissue / 1000 == pytest.approx(1430, rel=0.02)
    eyes, stem = ((real.labels == label).nonzero().double().mean(0) for label in (506, 16))
    assert eyes[1] > stem[1] + 40
    assert eyes[2] < real.brain.nonzero().double().mean(0)[2]
    source = Brains(heads=[real], shape=(48, 48, 48), scans=Scans(tilt=20))
    sample = Samples(source=source, measurement=Measurement(background=1.0))[0]
    assert sample.chi.shape == (48, 48, 48)
    assert 0.005 < sample.chi[sample.mask].std() < 0.5
    assert sample.field.isfinite().all()
