"""MCPC-3D-S: a smooth offset goes, the field stays."""

import math
from pathlib import Path
from typing import NamedTuple

import nibabel as nb
import numpy as np
import pytest
import torch
from torch import Tensor

from qsmpipe.methods import METHODS
from qsmpipe.numerics.fourier import convolve
from qsmpipe.numerics.kernels import dipole
from qsmpipe.numerics.phase import mcpc3ds, wrap
from qsmpipe.numerics.units import radians_per_ppm
from qsmpipe.workflows.offset import init_offset_wf
from qsmpipe.workflows.phase import init_phase_wf

GRIDS = {
    "isotropic": ((48, 48, 40), (3.0, 3.0, 3.0)),
    "anisotropic": ((56, 48, 24), (2.0, 2.4, 5.0)),
    "odd": ((47, 45, 37), (3.0, 3.0, 3.0)),
}
TIMES = {"two": (0.005, 0.011), "five": (0.004, 0.008, 0.012, 0.016, 0.020)}


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
@pytest.mark.parametrize("times", TIMES)
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
    assert steps[1]["parameters"] == {"sigma": 6.0}
