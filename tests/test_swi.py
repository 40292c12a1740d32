"""Veins become dark as their phase says, calcium does not, and lengths are in mm."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nb
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from qsmpipe import images
from qsmpipe.cli import main
from qsmpipe.methods import METHODS, function_of, interface_of
from qsmpipe.numerics.swi import SWI, clear, homodyne, minimum_projection
from qsmpipe.numerics.units import radians_per_ppm
from qsmpipe.workflows.swi import init_swi_wf

EXAMPLES = Path(__file__).parents[1] / "bids_examples"
SHAPE, ZOOMS = (64, 56, 24), (0.5, 0.5, 1.0)
ECHO_TIME = 0.02
RADIANS = radians_per_ppm(3.0, ECHO_TIME)
SIZE = 100.0
"""Magnitude."""
BLOOD = 0.15
"""Susceptibility of a vein (ppm): 0.8 rad if it lies along B0."""
RADIUS = 0.75
AXIAL = (0.0, 0.0, 1.0)
TILTED = (math.sin(math.radians(30)), 0.0, math.cos(math.radians(30)))


class Vein(NamedTuple):
    """A long cylinder in a head of constant magnitude, with its own and a smooth field."""

    phase: Tensor
    """Wrapped, with the smooth field (rad)."""
    own: Tensor
    """Of the vein alone (rad)."""
    inside: Tensor
    middle: Tensor
    """Voxels away from the head's edge."""
    mask: Tensor
    zooms: tuple[float, float, float]
    b0_direction: Sequence[float]

    def weighted(self, method: str = "homodyne", **choices: Any) -> SWI:
        given = {"magnitude": torch.full_like(self.phase, SIZE),
                 "b0_direction": self.b0_direction}  # fmt: skip
        if method == "clear":
            given["echo_times"] = [ECHO_TIME]
        function = function_of("swi", method)
        return function(self.phase, self.mask, self.zooms, **given | choices)


def coordinates(shape: Sequence[int], zooms: Sequence[float]) -> Tensor:
    axes = ((torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * zoom
            for n, zoom in zip(shape, zooms, strict=True))  # fmt: skip
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def vein(
    axis: Sequence[float] = AXIAL,
    b0_direction: Sequence[float] = AXIAL,
    *,
    chi: float = BLOOD,
    shape: Sequence[int] = SHAPE,
    zooms: tuple[float, float, float] = ZOOMS,
    smooth: float = 1.0,
) -> Vein:
    """Analytic field of an infinite cylinder through the middle, along ``axis``."""
    r = coordinates(shape, zooms)
    x, y, z = r
    along, b = (torch.tensor(v, dtype=torch.float64) for v in (axis, b0_direction))
    cosine = (along @ b).item()
    across = r - torch.tensordot(along, r, 1) * along[:, None, None, None]
    distance = across.square().sum(0).clamp(min=1e-9)
    towards = torch.tensordot(b - cosine * along, across, 1)
    inside = distance <= RADIUS**2
    outer = chi / 2 * RADIUS**2 / distance * (2 * towards**2 / distance - (1 - cosine**2))
    own = RADIANS * torch.where(inside, torch.tensor(chi * (3 * cosine**2 - 1) / 6), outer)
    phase = own + smooth * (0.8 + 0.15 * x - 0.1 * y + 0.01 * x * y + 0.05 * z)
    head = x**2 / 15**2 + y**2 / 13**2 < 1
    middle = x**2 + y**2 < 8**2
    wrapped = torch.atan2(torch.sin(phase), torch.cos(phase))
    return Vein(wrapped, own, inside, middle, head, zooms, b0_direction)


def expected(own: Tensor, power: float = 4) -> Tensor:
    return SIZE * (1 - own.clamp(min=0) / math.pi) ** power


@pytest.mark.parametrize(
    ("axis", "b0_direction"),
    [(AXIAL, AXIAL), (TILTED, TILTED), (AXIAL, TILTED), ((0.0, 1.0, 0.0), (0.0, 1.0, 0.0))],
    ids=["along B0", "oblique head, along B0", "30 degrees off B0", "coronal slices"],
)
def test_a_vein_is_dark_by_its_phase(
    axis: tuple[float, ...], b0_direction: tuple[float, ...]
) -> None:
    case = vein(axis, b0_direction)
    swi = case.weighted().swi
    core = case.inside & case.middle
    assert case.own[core].mean() > 0.4
    # the filter takes some 2 % of the vein's own phase, and leaves as much of the smooth one
    torch.testing.assert_close(swi[core], expected(case.own)[core], rtol=0.12, atol=0)
    assert swi[core].mean() < 0.6 * swi[case.middle & ~case.inside].mean()


def test_a_vein_across_b0_is_outlined_where_its_field_is_raised() -> None:
    """Physics, not a fault: inside, the field is lowered by chi / 6; along B0 it is raised."""
    case = vein((1.0, 0.0, 0.0), AXIAL, chi=0.3)
    swi = case.weighted().swi
    core = case.inside & case.middle
    assert (case.own[core] < 0).all()
    torch.testing.assert_close(swi[core], torch.full_like(swi[core], SIZE), rtol=0.01, atol=0)
    rim = case.middle & ~case.inside & (case.own > 0.25)
    assert rim.any()
    torch.testing.assert_close(swi[rim], expected(case.own)[rim], rtol=0.2, atol=0)


@pytest.mark.parametrize("method", METHODS["swi"])
def test_calcium_stays_bright_unless_it_is_asked_for(method: str) -> None:
    case = vein(chi=-BLOOD)
    core, around = case.inside & case.middle, case.middle & ~case.inside
    bright = case.weighted(method).swi
    assert bright[core].min() > 0.95 * bright[around].median()
    dark = case.weighted(method, darkens="diamagnetic").swi
    assert dark[core].max() < 0.6 * dark[around].median()
    mirrored = vein(chi=BLOOD, smooth=-1.0).weighted(method).swi
    torch.testing.assert_close(dark, mirrored, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS["swi"])
def test_a_smooth_field_goes_and_a_vein_stays(method: str) -> None:
    without = vein(chi=0.0, smooth=2.0).weighted(method).swi
    case = vein(smooth=2.0)
    level = without[case.middle].median()
    assert without[case.middle].min() > 0.8 * level, "no shadow of the smooth field"
    assert case.weighted(method).swi[case.inside & case.middle].max() < 0.6 * level


@pytest.mark.parametrize("method", METHODS["swi"])
def test_lengths_are_in_mm(method: str) -> None:
    """The same object on voxels a third as large in plane and half as thick."""
    coarse = vein(shape=(21, 21, 10), zooms=(1.5, 1.5, 2.0))
    fine = vein(shape=(63, 63, 20), zooms=(0.5, 0.5, 1.0))
    a = coarse.weighted(method).swi / coarse.weighted(method, **neutral(method)).swi
    b = fine.weighted(method).swi / fine.weighted(method, **neutral(method)).swi
    assert a[10, 10, 5] == pytest.approx(b[31, 31, 10].item(), rel=0.25, abs=0.01)
    # All lengths doubled is another unit of length and nothing else.
    larger = fine._replace(zooms=(1.0, 1.0, 2.0))
    lengths = {"homodyne": {"resolution": 8.0}, "clear": {"sigma": 4.0, "bias_sigma": 14.0}}
    again = larger.weighted(method, thickness=16.0, **lengths[method])
    for image, other in zip(again, fine.weighted(method), strict=True):
        torch.testing.assert_close(image, other, rtol=1e-6, atol=1e-6)


def neutral(method: str) -> dict[str, float]:
    """Choices that switch the phase off."""
    return {"power": 0.0} if method == "homodyne" else {"strength": 1e-9}


@pytest.mark.parametrize("thickness", [0.5, 2.0, 3.0, 8.0, 100.0])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_projection_is_the_brute_force_minimum(axis: int, thickness: float) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((7, 6, 9), generator=generator) + 0.1
    mask = torch.rand((7, 6, 9), generator=generator) > 0.3
    image[~mask] = torch.nan
    zooms = (1.0, 1.5, 0.7)
    projected = minimum_projection(image, mask, zooms, axis=axis, thickness=thickness)
    assert projected.shape == image.shape
    for voxel in np.ndindex(7, 6, 9):
        if not mask[voxel]:
            assert projected[voxel] == 0
            continue
        slab = []
        for n in range(image.shape[axis]):
            there = tuple(n if i == axis else voxel[i] for i in range(3))
            if abs(n - voxel[axis]) * zooms[axis] <= thickness / 2 + 1e-6 and mask[there]:
                slab.append(image[there].item())
        assert projected[voxel].item() == pytest.approx(min(slab)), voxel


def test_slices_are_those_across_the_axis_nearest_to_the_feet() -> None:
    case = vein((0.0, 1.0, 0.0), (0.3, math.sqrt(1 - 0.3**2), 0.0))
    swi, minip = case.weighted(thickness=3.0)
    torch.testing.assert_close(
        minip, minimum_projection(swi, case.mask, ZOOMS, axis=1, thickness=3.0)
    )
    assert not minip.equal(minimum_projection(swi, case.mask, ZOOMS, axis=2, thickness=3.0))


def echoes(case: Vein, times: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Phase of less than pi, and a magnitude that decays and varies in space."""
    x, y, z = coordinates(case.phase.shape, case.zooms)
    size = SIZE * (1 + 0.2 * torch.cos(x / 3) * torch.sin(y / 4 + z))
    phase = case.own + 0.1 * torch.sin(x / 6)
    return (
        torch.stack([phase * time / ECHO_TIME for time in times]),
        torch.stack([size * math.exp(-20 * time) for time in times]),
    )


def test_homodyne_averages_the_echoes() -> None:
    case, times = vein(), (0.006, 0.014, 0.022)
    phase, magnitude = echoes(case, times)
    together = case._replace(phase=phase).weighted(magnitude=magnitude)
    single = [case._replace(phase=p).weighted(magnitude=m).swi
              for p, m in zip(phase, magnitude, strict=True)]  # fmt: skip
    torch.testing.assert_close(together.swi, torch.stack(single).mean(0))
    one = case._replace(phase=phase[:1]).weighted(magnitude=magnitude[:1])
    torch.testing.assert_close(one.swi, single[0])


def test_homodyne_is_the_written_out_filter() -> None:
    """A sum over the window's samples, slice by slice, on a grid that needs no padding."""
    rng = np.random.default_rng(0)
    shape, zooms, resolution = (12, 9, 2), (1.0, 1.5, 3.0), 2.5
    phase, magnitude = rng.normal(size=shape), rng.uniform(1, 2, shape)
    mask = torch.ones(shape, dtype=torch.bool)
    for window, base in (("hann", 0.0), ("hamming", 0.08)):
        swi = homodyne(
            torch.from_numpy(phase), mask, zooms, magnitude=torch.from_numpy(magnitude),
            resolution=resolution, window=window, power=3.0,
        ).swi  # fmt: skip
        image = magnitude * np.exp(1j * phase)
        smooth = image
        for axis in (0, 1):
            n, zoom = shape[axis], zooms[axis]
            wide = 4000  # the kernel in image space, from a fine integral over its frequencies
            k = (np.arange(wide) + 0.5) / wide - 0.5
            values = (1 + base) / 2 + (1 - base) / 2 * np.cos(2 * np.pi * k)
            offsets = np.subtract.outer(np.arange(n), np.arange(n)) * zoom
            kernel = (values * np.cos(2 * np.pi * offsets[..., None] * k / resolution)).sum(-1)
            smooth = np.moveaxis(np.tensordot(kernel, smooth, (1, axis)), 0, axis)
        left = np.angle(image * smooth.conj())
        truth = magnitude * (1 - np.maximum(left, 0) / np.pi) ** 3
        close = np.abs(swi.numpy() - truth) < 0.03
        # The transform's grid repeats the kernel's tails, which are long with Hamming's edge.
        assert close.mean() > (0.99 if window == "hann" else 0.75)


def test_clear_is_the_written_out_formula() -> None:
    case, times = vein(), (0.005, 0.012)
    phase, magnitude = echoes(case, times)
    swi = case._replace(phase=phase).weighted(
        "clear", magnitude=magnitude, echo_times=times, bias_sigma=0.0, strength=3.0
    ).swi  # fmt: skip
    mask = case.mask.numpy()
    sigmas = (2.0 / ZOOMS[0], 2.0 / ZOOMS[1], 0.0)

    def filtered(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image * mask, sigmas, mode="constant", truncate=8)

    high = [p - filtered(p) / np.maximum(filtered(np.ones(SHAPE)), 1e-9) for p in phase.numpy()]
    m = magnitude.numpy()
    field = (m[0] * high[0] + m[1] * high[1]) / (m[0] * times[0] + m[1] * times[1]) / (2 * np.pi)
    half = np.median(field[mask & (field > 0)]) * 10 / 3
    size = np.hypot(*m)
    offset = np.quantile(size[mask], 0.8) / 2
    factor = 2 / offset
    bent = (np.log1p(np.exp(factor * (size - offset))) - np.log1p(np.exp(-2))) / factor
    truth = bent * (1 + np.tanh(1 - field / half)) / 2
    # unwrapping ends at 1e-4 of the phase, against a phase of 0.005 rad at which the mask is 1/2
    assert np.abs(swi.numpy() - truth)[mask].max() < 0.03 * SIZE
    assert np.abs(swi.numpy() - truth)[mask].mean() < 0.003 * SIZE


def test_shading_and_noise_of_the_air_go_in_clear() -> None:
    case = vein(chi=0.0, shape=(64, 56, 16))
    x, _, _ = coordinates(case.phase.shape, ZOOMS)
    shaded = SIZE * (1 + 0.03 * x)
    flat = case.weighted("clear", magnitude=shaded).swi[case.middle]
    left = case.weighted("clear", magnitude=shaded, bias_sigma=0.0).swi[case.middle]
    assert flat.std() / flat.mean() < 0.35 * left.std() / left.mean()
    dim = torch.where(x > 4, 0.02 * SIZE, SIZE)
    swi = case.weighted("clear", magnitude=dim, bias_sigma=0.0).swi
    assert swi[case.mask & (x > 4)].max() < 0.01 * SIZE, "noise is taken to 0"


CHOICES = {
    "homodyne": {"resolution": 2.0, "window": "hamming", "per_slice": False, "power": 2.0,
                 "darkens": "diamagnetic", "thickness": 3.0},
    "clear": {"sigma": 1.0, "strength": 8.0, "bias_sigma": 0.0, "darkens": "diamagnetic",
              "thickness": 3.0},
}  # fmt: skip


@pytest.mark.parametrize(("method", "name"), [(m, n) for m, c in CHOICES.items() for n in c])
def test_every_parameter_does_something(method: str, name: str) -> None:
    case = vein((1.0, 0.0, 0.0))
    phase, magnitude = echoes(case, [ECHO_TIME])
    case = case._replace(phase=phase)
    default = case.weighted(method, magnitude=magnitude)
    changed = case.weighted(method, magnitude=magnitude, **{name: CHOICES[method][name]})
    assert (changed.minip - default.minip).abs().max() > 5e-3 * SIZE


@pytest.mark.parametrize("method", METHODS["swi"])
def test_what_every_method_owes(method: str) -> None:
    case = vein(shape=(41, 37, 11), zooms=(0.7, 0.8, 1.3))
    magnitude = torch.full_like(case.phase, SIZE)
    before = [x.clone() for x in (case.phase, case.mask, magnitude)]
    result = case.weighted(method, magnitude=magnitude)
    for image in result:
        assert image.shape == case.mask.shape
        assert (image[~case.mask] == 0).all()
        assert (image[case.mask] >= 0).all()
    for x, y in zip((case.phase, case.mask, magnitude), before, strict=True):
        assert x.equal(y), "an argument was written to"
    again = case.weighted(method, magnitude=magnitude)
    assert all(a.equal(b) for a, b in zip(result, again, strict=True))
    # what stands outside the mask, and empty space
    dirty = [torch.where(case.mask, x, torch.nan) for x in (case.phase, magnitude)]
    unknown = case._replace(phase=dirty[0]).weighted(method, magnitude=dirty[1])
    wide = case._replace(
        phase=torch.nn.functional.pad(case.phase, (3, 4, 5, 6, 2, 1)),
        mask=torch.nn.functional.pad(case.mask, (3, 4, 5, 6, 2, 1)),
    ).weighted(method)
    single = case._replace(phase=case.phase.float()).weighted(method, magnitude=magnitude.float())
    assert single.swi.dtype == torch.float32
    for a, b, c, d in zip(result, unknown, wide, single, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c[2:-1, 5:-6, 3:-4], rtol=1e-9, atol=1e-9)
        assert (a - d).abs().max() < 0.01 * SIZE
        assert (a - d).abs().mean() < 1e-3 * SIZE


@pytest.mark.parametrize("method", METHODS["swi"])
def test_a_voxel_without_a_number_is_left_out(method: str) -> None:
    case = vein()
    case.phase[20, 20, 10] = torch.nan
    swi, minip = case.weighted(method)
    assert swi[20, 20, 10] == minip[20, 20, 10] == 0
    assert swi.isfinite().all()
    assert (swi[case.mask] == 0).sum() == 1 + (case.weighted(method).swi[case.mask] == 0).sum() - 1


@pytest.mark.parametrize(
    ("method", "choices", "message"),
    [
        ("homodyne", {"resolution": 0.0}, "resolution is 0"),
        ("homodyne", {"power": -1.0}, "power is -1"),
        ("homodyne", {"window": "box"}, "hann, hamming"),
        ("homodyne", {"thickness": -1.0}, "thickness is -1"),
        ("homodyne", {"darkens": "iron"}, "paramagnetic, diamagnetic"),
        ("homodyne", {"magnitude": torch.ones(3, 4, 5)}, r"\(3, 4, 5\)"),
        ("clear", {"sigma": 0.0}, "sigma is 0"),
        ("clear", {"strength": 0.0}, "strength is 0"),
        ("clear", {"bias_sigma": -1.0}, "bias_sigma is -1"),
        ("clear", {"echo_times": [20.0]}, "in ms"),
        ("clear", {"echo_times": [0.01, 0.02]}, "2 echo times"),
    ],
)
def test_what_makes_no_sense_is_refused(
    method: str, choices: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        vein(shape=(16, 16, 4)).weighted(method, **choices)


@pytest.mark.parametrize("method", METHODS["swi"])
def test_an_empty_mask_is_refused(method: str) -> None:
    case = vein(shape=(16, 16, 4))
    with pytest.raises(ValueError, match="empty"):
        case._replace(mask=torch.zeros_like(case.mask)).weighted(method)
    with pytest.raises(ValueError, match="finite in no voxel"):
        case._replace(phase=torch.full_like(case.phase, torch.nan)).weighted(method)


@pytest.mark.parametrize("method", METHODS["swi"])
def test_through_nipype_it_is_the_same(method: str, tmp_path: Path) -> None:
    case = vein(shape=(32, 28, 12), b0_direction=TILTED)
    phase, magnitude = (x.float() for x in echoes(case, (0.006, 0.014)))
    angle = math.radians(30)
    turn = np.array([[math.cos(angle), 0, -math.sin(angle)], [0, 1, 0],
                     [math.sin(angle), 0, math.cos(angle)]])  # fmt: skip
    affine = np.eye(4)
    affine[:3, :3] = turn * ZOOMS
    paths = {}
    for name, data in (("phase", phase.movedim(0, -1)), ("magnitude", magnitude.movedim(0, -1)),
                       ("mask", case.mask.to(torch.uint8))):  # fmt: skip
        paths[name] = str(tmp_path / f"{name}.nii.gz")
        nb.Nifti1Image(data.numpy(), affine).to_filename(paths[name])
    workflow = init_swi_wf(method=method, parameters={"thickness": 3.0})
    workflow.base_dir = str(tmp_path)
    workflow.inputs.inputnode.trait_set(**paths, echo_times=[0.006, 0.014])
    (node,) = (n for n in workflow.run().nodes() if n.name == method)
    assert isinstance(node.interface, interface_of("swi", method))
    extra = {"echo_times": [0.006, 0.014]} if method == "clear" else {}
    direct = function_of("swi", method)(
        phase, case.mask, images.zooms_of(paths["phase"]), magnitude=magnitude, thickness=3.0,
        b0_direction=TILTED, **extra,
    )  # fmt: skip
    for name, image in direct._asdict().items():
        written = getattr(node.result.outputs, name)
        torch.testing.assert_close(images.load(written), image, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(images.affine_of(written), affine, atol=1e-6)
    assert node.result.outputs.step["parameters"]["thickness"] == 3.0


def test_the_command_line_writes_both_images_with_sidecars(tmp_path: Path) -> None:
    plugin = tmp_path / "plugin.yml"
    plugin.write_text("plugin: Linear\n")  # one process: fast
    words = [str(EXAMPLES / "mixed"), str(tmp_path / "out"), "participant", "-w",
             str(tmp_path / "work"), "--participant-label", "02", "--swi", "homodyne", "--set",
             "swi.thickness=9", "--mask", "quality", "--background", "vsharp", "--inversion",
             "tkd", "--skip-bids-validation", "--use-plugin", str(plugin)]  # fmt: skip
    assert main(words) == 0
    anat = tmp_path / "out" / "sub-02" / "anat"
    brain = nb.load(anat / "sub-02_desc-brain_mask.nii.gz")
    for suffix in ("swi", "minIP"):
        image = nb.load(anat / f"sub-02_{suffix}.nii.gz")
        assert image.shape == brain.shape
        np.testing.assert_array_equal(image.affine, brain.affine)
        values = image.get_fdata()
        assert (values[brain.get_fdata() == 0] == 0).all()
        assert values.max() > 0
        sidecar = json.loads((anat / f"sub-02_{suffix}.json").read_text())
        assert sidecar["Units"] == "arbitrary"
        assert "homodyne" in sidecar["EstimationAlgorithm"]
        (step,) = (s for s in sidecar["ProcessingSteps"] if s["stage"] == "swi")
        assert step["parameters"]["thickness"] == 9
    ignored = (tmp_path / "out" / ".bidsignore").read_text().split()
    assert {"*_swi.*", "*_minIP.*"} <= set(ignored)
    assert "homodyne filtering" in (tmp_path / "out" / "logs" / "CITATION.md").read_text()


def test_clear_and_homodyne_are_what_the_table_names() -> None:
    assert function_of("swi", "homodyne") is homodyne
    assert function_of("swi", "clear") is clear
