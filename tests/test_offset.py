"""MCPC-3D-S: a smooth offset goes, the field stays."""

import math
from pathlib import Path
from typing import NamedTuple

import nibabel as nb
import numpy as np
import pytest
import torch
from nipype.interfaces.base import isdefined
from torch import Tensor

from qsmpipe.interfaces.offset import MCPC3DS
from qsmpipe.interfaces.phase import CombineCoils
from qsmpipe.methods import METHODS
from qsmpipe.numerics.fourier import convolve
from qsmpipe.numerics.grids import along
from qsmpipe.numerics.kernels import dipole
from qsmpipe.numerics.phase import mcpc3ds, mcpc3ds_coils, wrap
from qsmpipe.numerics.planes import plane_offsets, plane_steps
from qsmpipe.numerics.units import radians_per_ppm
from qsmpipe.settings import Settings, parse_assignments
from qsmpipe.workflows.offset import init_offset_wf
from qsmpipe.workflows.phase import init_phase_wf

GRIDS = {
    "isotropic": ((48, 48, 40), (3.0, 3.0, 3.0)),
    "anisotropic": ((56, 48, 24), (2.0, 2.4, 5.0)),
    "odd": ((47, 45, 37), (3.0, 3.0, 3.0)),
}
TIMES = {
    "two": (0.005, 0.011),
    "five": (0.004, 0.008, 0.012, 0.016, 0.020),
    "uneven": (0.004, 0.0085, 0.012, 0.0165, 0.020),
}


class Scan(NamedTuple):
    head: Tensor
    offset: Tensor
    evolution: Tensor
    """Phase of every echo without the offset (rad)."""
    magnitude: Tensor
    phase: Tensor


def scan(grid: str, times: str, noise: float = 1.0, seed: int = 0) -> Scan:
    """A ball with two sources, one strong source outside, and a quadratic offset, in noise."""
    shape, zooms = GRIDS[grid]
    axes = (z * (torch.arange(n) - (n - 1) / 2) for n, z in zip(shape, zooms, strict=True))
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    radius = 0.42 * min(n * v for n, v in zip(shape, zooms, strict=True))
    head = x**2 + y**2 + z**2 < radius**2

    def ball(r: float, *centre: float) -> Tensor:
        distances = ((a - radius * c) ** 2 for a, c in zip((x, y, z), centre, strict=True))
        return (sum(distances) <= (radius * r) ** 2).float()  # type: ignore[attr-defined]

    chi = 0.15 * ball(0.2, 0.3, 0, 0) - 0.1 * ball(0.2, -0.3, 0.3, 0) + 2 * ball(0.2, 0, 0, 1.1)
    wide = (2 * shape[0], 2 * shape[1], 2 * shape[2])
    field = convolve(chi, dipole(wide, zooms, like=chi), wide)
    x, y, z = x / radius, y / radius, z / radius
    offset = 1.0 + 2.5 * x - 1.5 * y**2 + 2 * x * z + z**2
    evolution = torch.stack([radians_per_ppm(3.0, t) * field for t in TIMES[times]])
    decay = torch.tensor(TIMES[times]).mul(-20).exp()
    signal = torch.polar(decay[:, None, None, None] * (100.0 * head), evolution + offset)
    error = torch.randn(2, *signal.shape, generator=torch.Generator().manual_seed(seed)) * noise
    signal = signal + torch.complex(error[0], error[1])
    return Scan(head, offset, evolution, signal.abs(), signal.angle())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("times", ["two", "five"])
def test_a_quadratic_offset_goes_and_the_field_stays(grid: str, times: str) -> None:
    data = scan(grid, times)
    result = mcpc3ds(data.phase, data.magnitude, GRIDS[grid][1], echo_times=TIMES[times])
    error = wrap(result.offset - data.offset)[data.head]
    assert error.square().mean().sqrt() < 0.08
    left = wrap(result.phase - data.evolution)[:, data.head]
    assert left.square().mean().sqrt() < 0.09
    assert result.convergence is None
    assert result.phase.abs().max() <= math.pi + 1e-6
    # Deep inside, only the offset's own curvature is lost, and most of that comes back.
    middle = tuple(slice(n // 3, 2 * n // 3) for n in data.head.shape)
    assert wrap(result.offset - data.offset)[middle].abs().max() < 0.06


def test_a_smooth_offset_comes_back_whatever_it_is() -> None:
    data = scan("isotropic", "two", noise=0.0)
    zooms = GRIDS["isotropic"][1]
    results = [
        mcpc3ds(wrap(data.phase + constant), data.magnitude, zooms, echo_times=TIMES["two"])
        for constant in (0.0, 1.0, math.pi)
    ]
    for result in results[1:]:
        difference = wrap(result.phase - results[0].phase)[:, data.head]
        assert difference.abs().max() < 1e-3


def test_whole_turns_and_units_of_magnitude_do_not_matter() -> None:
    data, zooms = scan("odd", "five"), GRIDS["odd"][1]
    times = TIMES["five"]
    result = mcpc3ds(data.phase, data.magnitude, zooms, echo_times=times)
    turns = torch.randint(-3, 4, data.phase.shape, generator=torch.Generator().manual_seed(2))
    turned = mcpc3ds(data.phase + 2 * math.pi * turns, data.magnitude, zooms, echo_times=times)
    assert wrap(turned.phase - result.phase)[:, data.head].abs().max() < 1e-3
    scaled = mcpc3ds(data.phase, 1e-4 * data.magnitude, zooms, echo_times=times)
    assert wrap(scaled.phase - result.phase)[:, data.head].abs().max() < 1e-3


def test_single_and_double_precision_agree() -> None:
    data, zooms = scan("anisotropic", "two"), GRIDS["anisotropic"][1]
    single = mcpc3ds(data.phase, data.magnitude, zooms, echo_times=TIMES["two"])
    double = mcpc3ds(data.phase.double(), data.magnitude.double(), zooms, echo_times=TIMES["two"])
    assert double.phase.dtype is torch.float64
    assert wrap(single.offset - double.offset)[data.head].abs().max() < 1e-4


def test_a_wider_gaussian_is_wider_in_mm_on_every_axis() -> None:
    # One voxel with signal: the offset's reach is its Gaussian's, 4 sigma cut at 1e-4.
    phase, magnitude = torch.full((2, 33, 33, 17), 0.7), torch.zeros(2, 33, 33, 17)
    magnitude[:, 14:19, 14:19, 6:11] = 1
    result = mcpc3ds(phase, magnitude, (1.0, 1.0, 2.0), echo_times=[0.004, 0.008], sigma=2.0)
    reached = result.offset != 0
    along_x, along_z = reached[:, 16, 8].sum().item(), reached[16, 16].sum().item()
    assert abs(along_x - 2 * along_z) <= 8


# Bipolar readout


def readout(grid: str, ramp: float, constant: float) -> Tensor:
    """Phase of even echoes (rad): a ramp along the first axis, from one end to the other."""
    shape, _ = GRIDS[grid]
    line = torch.linspace(-0.5, 0.5, shape[0])[:, None, None]
    return (constant + ramp * line).expand(shape)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("times", ["five", "uneven"])
@pytest.mark.parametrize(("ramp", "constant"), [(0.0, 0.0), (3.0, 0.5), (-8.0, -1.0)])
def test_the_phase_of_a_bipolar_readout_goes(
    grid: str, times: str, ramp: float, constant: float
) -> None:
    data, zooms, added = scan(grid, times), GRIDS[grid][1], readout(grid, ramp, constant)
    phase = data.phase.clone()
    phase[1::2] = wrap(phase[1::2] + added)
    result = mcpc3ds(phase, data.magnitude, zooms, echo_times=TIMES[times], bipolar=True)
    error = (result.difference - added)[data.head]
    assert error.abs().mean() < 0.03
    assert wrap(result.offset - data.offset)[data.head].square().mean().sqrt() < 0.08
    left = wrap(result.phase - data.evolution)[:, data.head]
    assert left.square().mean().sqrt() < 0.1
    # Odd and even echoes agree: the second is where the first and the third say it is.
    share = (TIMES[times][1] - TIMES[times][0]) / (TIMES[times][2] - TIMES[times][0])
    one, two, three = (result.phase[e][data.head] - data.evolution[e][data.head] for e in range(3))
    step = wrap(two - one - share * wrap(three - one))
    assert step.mean().abs() < 0.01
    if ramp:
        without = mcpc3ds(phase, data.magnitude, zooms, echo_times=TIMES[times])
        assert without.difference is None
        left = wrap(without.phase - data.evolution)[:, data.head]
        assert left.square().mean().sqrt() > 0.4


def test_without_a_difference_the_correction_changes_little() -> None:
    data, zooms = scan("isotropic", "five"), GRIDS["isotropic"][1]
    given = {"echo_times": TIMES["five"]}
    plain = mcpc3ds(data.phase, data.magnitude, zooms, **given)
    corrected = mcpc3ds(data.phase, data.magnitude, zooms, bipolar=True, **given)
    # Three echoes tell it, so that it holds the field's own curvature in time: nothing but noise.
    assert corrected.difference[data.head].square().mean().sqrt() < 0.02
    assert wrap(corrected.phase - plain.phase)[:, data.head].square().mean().sqrt() < 0.04


def test_the_correction_is_ecksteins_formula() -> None:
    """Phase without noise or field: f and g of the thesis, on the phase that MCPC-3D-S leaves."""
    t1, t2, t3 = TIMES["uneven"][:3]
    k, m = (t1 + t3) / t2, t1 / (t2 - t1)
    f = (2 - k) * m - k
    assert f == pytest.approx(-(t3 - t1) / (t2 - t1))  # never 0: nothing degenerates
    added = 0.4
    phase = torch.full((3, 20, 20, 20), 0.3)
    phase[1] += added
    magnitude = torch.ones_like(phase)
    plain = mcpc3ds(phase, magnitude, (2, 2, 2), echo_times=TIMES["uneven"][:3])
    one, two, three = (p[10, 10, 10].item() for p in plain.phase)
    g = one + three - k * two
    expected = [one - g * m / f, two - g * (m + 1) / f, three - g * m / f]
    result = mcpc3ds(phase, magnitude, (2, 2, 2), echo_times=TIMES["uneven"][:3], bipolar=True)
    assert result.phase[:, 10, 10, 10].tolist() == pytest.approx(expected, abs=1e-4)
    assert expected == pytest.approx([0.0, 0.0, 0.0], abs=1e-4)
    assert result.difference[10, 10, 10].item() == pytest.approx(added, abs=1e-4)


def test_the_command_line_asks_for_the_correction() -> None:
    settings = Settings(parameters=parse_assignments(["offset.bipolar=true"]))
    settings.check()
    chosen = settings.parameters_for("offset")["mcpc3ds"]
    assert init_offset_wf(parameters=chosen).get_node("mcpc3ds").inputs.bipolar


def test_a_bipolar_readout_takes_three_echoes() -> None:
    phase = torch.zeros(2, 6, 6, 6)
    with pytest.raises(ValueError, match="takes 3 echoes"):
        mcpc3ds(phase, phase, (1, 1, 1), echo_times=[0.004, 0.008], bipolar=True)


# Planes with offsets of their own


def random_offsets(planes: int, seed: int = 5) -> Tensor:
    return 2 * math.pi * torch.rand(planes, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("times", ["two", "uneven"])
def test_offsets_of_planes_go_and_the_field_stays(grid: str, times: str, axis: int) -> None:
    data, zooms = scan(grid, times), GRIDS[grid][1]
    given = {"echo_times": TIMES[times]}
    smooth = plane_steps(data.phase, data.magnitude, axis=axis, **given)
    shift = along(random_offsets(data.head.shape[axis]), axis)
    phase = wrap(data.phase + shift)
    steps = plane_steps(phase, data.magnitude, axis=axis, **given)
    assert smooth.roughness < 0.08 < 1 < steps.roughness
    clean = wrap(phase - along(plane_offsets(phase, data.magnitude, axis=axis, **given), axis))
    result = mcpc3ds(clean, data.magnitude, zooms, **given)
    left = wrap(result.phase - data.evolution)[:, data.head]
    assert left.square().mean().sqrt() < 0.09  # as without offsets of planes
    lost = mcpc3ds(phase, data.magnitude, zooms, **given)
    assert wrap(lost.phase - data.evolution)[:, data.head].square().mean().sqrt() > 0.7


def test_offsets_along_two_axes_go_one_after_the_other() -> None:
    data, zooms = scan("odd", "five"), GRIDS["odd"][1]
    phase = data.phase
    for axis in (0, 2):
        phase = phase + along(random_offsets(data.head.shape[axis], seed=axis), axis)
    for axis in (0, 2):
        offsets = plane_offsets(phase, data.magnitude, echo_times=TIMES["five"], axis=axis)
        phase = wrap(phase - along(offsets, axis))
    result = mcpc3ds(phase, data.magnitude, zooms, echo_times=TIMES["five"])
    assert wrap(result.phase - data.evolution)[:, data.head].square().mean().sqrt() < 0.09


@pytest.mark.parametrize("size", [1.0, math.pi])
def test_one_jump_is_measured(size: float) -> None:
    data = scan("isotropic", "five")
    jump = along(size * (torch.arange(data.head.shape[1]) > 20).float(), 1)
    given = {"echo_times": TIMES["five"], "axis": 1}
    assert plane_steps(data.phase, data.magnitude, **given).jump < 0.2
    steps = plane_steps(wrap(data.phase + jump), data.magnitude, **given)
    assert steps.jump == pytest.approx(size, abs=0.1)
    assert steps.roughness < 0.08


def test_noise_and_a_single_echo_tell_no_offsets() -> None:
    noise = 7 * torch.rand(1, 20, 20, 12, generator=torch.Generator().manual_seed(0))
    steps = plane_steps(noise, torch.ones_like(noise), echo_times=[0.01])
    assert (steps.roughness, steps.curvature, steps.jump) == (0, 0, 0)
    with pytest.raises(ValueError, match="2 echoes tell"):
        plane_offsets(noise, torch.ones_like(noise), echo_times=[0.01])
    dark = plane_offsets(noise.repeat(2, 1, 1, 1), 0 * noise.repeat(2, 1, 1, 1),
                         echo_times=[0.01, 0.02])  # fmt: skip
    torch.testing.assert_close(dark, torch.zeros(12))


# Coils


def coils(grid: str, number: int = 8) -> Tensor:
    """Sensitivities on a ring around the head, each turning its phase by several rad."""
    shape, zooms = GRIDS[grid]
    axes = (z * (torch.arange(n) - (n - 1) / 2) for n, z in zip(shape, zooms, strict=True))
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    size = max(n * v for n, v in zip(shape, zooms, strict=True)) / 2
    values = []
    for c in range(number):
        angle = 2 * math.pi * c / number
        dx, dy = x / size - 1.1 * math.cos(angle), y / size - 1.1 * math.sin(angle)
        near = torch.exp(-(dx**2 + dy**2 + (z / size) ** 2) / 1.5)
        values.append(torch.polar(near, 2.5 * dx * math.sin(3 * angle) + 2 * dy + 0.8 * c))
    return torch.stack(values)


class CountedCoils:
    """Coils that are made when they are asked for, one at a time."""

    def __init__(self, images: Tensor) -> None:
        self.images, self.asked = images, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        self.asked += 1
        return self.images[index].clone()


def coil_signal(grid: str, times: str, noise: float = 1.0) -> tuple[Scan, Tensor]:
    data = scan(grid, times, noise=0.0)
    one = torch.polar(data.magnitude, data.evolution) * data.head
    signal = coils(grid)[:, None] * one
    generator = torch.Generator().manual_seed(4)
    return data, signal + noise * torch.complex(
        *torch.randn(2, *signal.shape, generator=generator)
    )


@pytest.mark.parametrize("grid", GRIDS)
def test_coils_combine_to_the_field_without_a_singularity(grid: str) -> None:
    data, signal = coil_signal(grid, "five")
    phase, magnitude = CountedCoils(signal.angle()), CountedCoils(signal.abs())
    result = mcpc3ds_coils(phase, magnitude, GRIDS[grid][1], echo_times=TIMES["five"])
    assert phase.asked == magnitude.asked == 2 * 8
    left = wrap(result.phase - data.evolution)[:, data.head]
    assert left.square().mean().sqrt() < 0.1
    # Open-ended fringe lines: loops of four voxels around which the phase turns once.
    deep = torch.nn.functional.avg_pool3d(data.head[None].float(), 3, 1, 1)[0] > 0.99
    plain = signal.sum(0).angle()
    planes = ((1, 2), (1, 3), (2, 3))
    for axes in planes:
        assert turning(wrap(result.phase - data.evolution), axes)[:, deep].sum() == 0
    assert sum(turning(wrap(plain - data.evolution), axes)[:, deep].sum() for axes in planes) > 0
    expected = (signal.abs() ** 2).sum(0).sqrt()
    torch.testing.assert_close(
        result.magnitude[:, data.head], expected[:, data.head], rtol=0.02, atol=0.3
    )


def turning(phase: Tensor, axes: tuple[int, int]) -> Tensor:
    """Whether the phase turns around the loop of each voxel and its next along two axes."""
    a, b = axes
    corners = (phase, phase.roll(-1, a), phase.roll((-1, -1), (a, b)), phase.roll(-1, b))
    around = sum(wrap(two - one) for one, two in zip(corners, (*corners[1:], phase), strict=True))
    return (around / (2 * math.pi)).round() != 0


def test_one_coil_is_mcpc3ds() -> None:
    data, zooms = scan("odd", "two"), GRIDS["odd"][1]
    alone = mcpc3ds(data.phase, data.magnitude, zooms, echo_times=TIMES["two"])
    result = mcpc3ds_coils(data.phase[None], data.magnitude[None], zooms, echo_times=TIMES["two"])
    assert wrap(result.phase - alone.phase)[:, data.head].abs().max() < 1e-3
    torch.testing.assert_close(result.magnitude, data.magnitude)
    double = mcpc3ds_coils(
        data.phase[None].double(), data.magnitude[None].double(), zooms, echo_times=TIMES["two"]
    )
    assert double.phase.dtype is torch.float64
    assert wrap(result.phase - double.phase)[:, data.head].abs().max() < 1e-3


def test_a_bipolar_readout_is_corrected_after_the_coils() -> None:
    data, signal = coil_signal("isotropic", "five")
    zooms, added = GRIDS["isotropic"][1], readout("isotropic", 3.0, 0.4)
    signal[:, 1::2] *= torch.polar(torch.ones_like(added), added)
    combined = mcpc3ds_coils(signal.angle(), signal.abs(), zooms, echo_times=TIMES["five"])
    result = mcpc3ds(
        combined.phase, combined.magnitude, zooms, echo_times=TIMES["five"], bipolar=True
    )
    left = wrap(result.phase - data.evolution)[:, data.head]
    assert left.square().mean().sqrt() < 0.1


def test_coils_that_do_not_match_are_refused() -> None:
    phase = torch.zeros(2, 2, 6, 6, 6)
    given = {"echo_times": [0.004, 0.008]}
    with pytest.raises(ValueError, match="2 coils with a phase and 1 with a magnitude"):
        mcpc3ds_coils(phase, phase[:1], (1, 1, 1), **given)
    with pytest.raises(ValueError, match="0 coils"):
        mcpc3ds_coils([], [], (1, 1, 1), **given)
    with pytest.raises(ValueError, match="needs 2 echoes"):
        mcpc3ds_coils(phase[:, :1], phase[:, :1], (1, 1, 1), echo_times=[0.004])
    with pytest.raises(ValueError, match="different grids"):
        mcpc3ds_coils(phase, phase[:, :, 1:], (1, 1, 1), **given)


def test_what_it_cannot_do_is_refused() -> None:
    phase = torch.zeros(2, 6, 6, 6)
    with pytest.raises(ValueError, match="needs 2 echoes"):
        mcpc3ds(phase[:1], phase[:1], (1, 1, 1), echo_times=[0.004])
    with pytest.raises(ValueError, match="different grids"):
        mcpc3ds(phase, phase[:, 1:], (1, 1, 1), echo_times=[0.004, 0.008])
    with pytest.raises(ValueError, match="3 echo times"):
        mcpc3ds(phase, phase, (1, 1, 1), echo_times=[0.004, 0.008, 0.012])
    with pytest.raises(ValueError, match="mm"):
        mcpc3ds(phase, phase, (1, 1, 1), echo_times=[0.004, 0.008], sigma=0.0)


def test_no_signal_at_all_is_no_offset() -> None:
    phase = torch.rand(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    result = mcpc3ds(phase, torch.zeros(2, 8, 8, 8), (1, 1, 1), echo_times=[0.004, 0.008])
    torch.testing.assert_close(result.phase, phase)


@pytest.mark.parametrize("method", METHODS["offset"])
def test_the_graph_builds(method: str) -> None:
    assert method in [node.name for node in init_offset_wf(method=method)._graph]


def test_the_phase_workflow_removes_it(tmp_path: Path) -> None:
    data, zooms = scan("anisotropic", "two"), GRIDS["anisotropic"][1]
    files: dict[str, list[str]] = {"magnitude": [], "phase": []}
    for name, echoes in {"magnitude": data.magnitude, "phase": data.phase}.items():
        for e, echo in enumerate(echoes):
            path = tmp_path / f"{name}{e}.nii.gz"
            nb.Nifti1Image(echo.numpy(), np.diag([*zooms, 1])).to_filename(path)
            files[name].append(str(path))
    workflow = init_phase_wf(echoes=2, parameters={"sigma": 6.0})
    workflow.base_dir = tmp_path
    workflow.inputs.inputnode.trait_set(echo_times=list(TIMES["two"]), **files)
    nodes = {node.name: node for node in workflow.run().nodes}
    outputs = nodes["mcpc3ds"].result.outputs
    expected = mcpc3ds(
        data.phase, data.magnitude, zooms, echo_times=TIMES["two"], sigma=6.0
    ).phase[1]
    written = torch.from_numpy(nb.load(outputs.phase).get_fdata(dtype=np.float32)[..., 1])
    assert wrap(written - expected)[data.head].abs().max() < 1e-4
    steps = nodes["steps"].result.outputs.out
    assert [step["method"] for step in steps] == ["prepare", "mcpc3ds"]
    assert steps[1]["parameters"] == {"sigma": 6.0, "bipolar": False}


def test_the_interface_writes_what_even_echoes_had_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, zooms = scan("anisotropic", "five"), GRIDS["anisotropic"][1]
    for name, echoes in {"magnitude": data.magnitude, "phase": data.phase}.items():
        image = nb.Nifti1Image(echoes.movedim(0, -1).numpy(), np.diag([*zooms, 1]))
        image.to_filename(f"{name}.nii.gz")
    given = {"phase": "phase.nii.gz", "magnitude": "magnitude.nii.gz",
             "echo_times": list(TIMES["five"])}  # fmt: skip
    outputs = MCPC3DS(bipolar=True, **given).run().outputs
    expected = mcpc3ds(data.phase, data.magnitude, zooms, echo_times=TIMES["five"], bipolar=True)
    written = nb.load(outputs.difference).get_fdata(dtype=np.float32)
    np.testing.assert_allclose(written, expected.difference, atol=1e-3)
    assert outputs.step["parameters"]["bipolar"] is True
    assert not isdefined(MCPC3DS(**given).run().outputs.difference)


def test_combined_coils_go_into_the_phase_workflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coils' files, in the scanner's unit, one per coil; what comes out is Prepare's."""
    monkeypatch.chdir(tmp_path)
    data, signal = coil_signal("anisotropic", "two")
    zooms, scale = GRIDS["anisotropic"][1], 4096 / math.pi
    files: dict[str, list[str]] = {"magnitude": [], "phase": []}
    for name, images in {"magnitude": signal.abs(), "phase": signal.angle() * scale}.items():
        for c, coil in enumerate(images):
            path = tmp_path / f"{name}{c}.nii.gz"
            nb.Nifti1Image(coil.movedim(0, -1).numpy(), np.diag([*zooms, 1])).to_filename(path)
            files[name].append(str(path))
    times = list(TIMES["two"])
    combined = CombineCoils(echo_times=times, phase_slope=1 / scale, **files).run().outputs
    step = combined.step
    assert (step["method"], step["parameters"]) == ("mcpc3ds_coils", {"sigma": 7.0})
    workflow = init_phase_wf(echoes=2)
    workflow.base_dir = tmp_path
    workflow.inputs.inputnode.trait_set(
        echo_times=times, phase=[combined.phase], magnitude=[combined.magnitude]
    )
    nodes = {node.name: node for node in workflow.run().nodes}
    outputs = nodes["mcpc3ds"].result.outputs
    written = torch.from_numpy(nb.load(outputs.phase).get_fdata(dtype=np.float32)).movedim(-1, 0)
    left = wrap(written - data.evolution)[:, data.head]
    assert left.square().mean().sqrt() < 0.1
