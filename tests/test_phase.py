"""Reading phase: radians, sign, GE's alternating slices, broken voxels."""

import math
from pathlib import Path

import nibabel as nb
import numpy as np
import pytest
import torch
from torch import Tensor

from qsmpipe.interfaces.phase import Prepare
from qsmpipe.numerics.phase import alternates, combine_echoes, complex_to_polar, to_radians, wrap
from qsmpipe.numerics.units import GAMMA, check_echo_times, hz_per_ppm, radians_per_ppm
from qsmpipe.workflows.phase import init_phase_wf

SHAPE = (24, 22, 13)


def test_units_are_those_of_the_proton() -> None:
    assert hz_per_ppm(1.0) == GAMMA == 42.577478518
    # Half a turn per ppm after 1 / (2 Hz).
    assert radians_per_ppm(7.0, 0.5 / hz_per_ppm(7.0)) == pytest.approx(math.pi)
    with pytest.raises(ValueError, match="B0 in T"):
        hz_per_ppm(0.0)


@pytest.mark.parametrize("times", [[4.0, 8.0], [0.008, 0.004], [0.0, 0.004], [0.004, 0.004]])
def test_echo_times_that_are_not_are_refused(times: list[float]) -> None:
    with pytest.raises(ValueError, match="seconds"):
        check_echo_times(torch.zeros(2, 3, 3, 3), times)
    with pytest.raises(ValueError, match=r"\(2, 3, 3, 3\) and 1 echo times"):
        check_echo_times(torch.zeros(2, 3, 3, 3), times[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrapping_leaves_what_is_wrapped_and_ends_in_the_half_open_turn(
    dtype: torch.dtype,
) -> None:
    phase = torch.linspace(-50, 50, 100_001, dtype=dtype)
    wrapped = wrap(phase)
    assert wrapped.max() <= torch.tensor(math.pi, dtype=dtype)
    assert wrapped.min() > torch.tensor(-math.pi, dtype=dtype)
    exact = np.angle(np.exp(1j * phase.double().numpy()))
    away = np.angle(np.exp(1j * (wrapped.double().numpy() - exact)))
    assert np.abs(away).max() < 1e3 * torch.finfo(dtype).eps
    torch.testing.assert_close(wrap(wrapped), wrapped, rtol=0, atol=0)
    ends = wrap(torch.tensor([-math.pi, math.pi, 3 * math.pi, -5 * math.pi], dtype=dtype))
    torch.testing.assert_close(ends, torch.full((4,), math.pi, dtype=dtype), rtol=0, atol=2e-6)


def test_siemens_integers_become_radians() -> None:
    stored = torch.tensor([-4096.0, 0.0, 2048.0, 4094.0]).reshape(4, 1, 1)
    phase = to_radians(stored, slope=math.pi / 4096)
    expected = math.pi * torch.tensor([1, 0, 0.5, 4094 / 4096]).reshape(4, 1, 1)
    torch.testing.assert_close(phase, expected)
    raw = torch.tensor([0.0, 2048.0, 3072.0, 4095.0]).reshape(4, 1, 1)
    torch.testing.assert_close(
        to_radians(raw, slope=2 * math.pi / 4096, intercept=-math.pi), expected
    )

    conjugate = to_radians(raw, slope=2 * math.pi / 4096, intercept=-math.pi, sign=-1)
    torch.testing.assert_close(conjugate[1:], -expected[1:])


def test_each_echo_has_a_scale_of_its_own() -> None:
    radians = 6 * torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0)) - 3
    slopes, intercepts = [1.0, math.pi / 2048, 1e-3], [0.0, -math.pi, 0.5]
    stored = torch.stack([
        (p - b) / a for p, a, b in zip(radians, slopes, intercepts, strict=True)
    ])  # fmt: skip
    found = to_radians(stored, slope=slopes, intercept=intercepts, sign=-1)
    torch.testing.assert_close(found, -radians, atol=1e-5, rtol=0)
    torch.testing.assert_close(to_radians(radians, slope=[1.0], intercept=[0.0]), radians)
    with pytest.raises(ValueError, match="2 scales of phase do not fit 3 echoes"):
        to_radians(stored, slope=slopes[:2])


@pytest.mark.parametrize("axis", range(3))
def test_planes_alternate_along_the_axis_that_is_asked(axis: int) -> None:
    real, imag = ge_like(alternating=True, noise=0.05)
    turned = [part.movedim(2, axis) for part in (real, imag)]
    magnitude, phase = complex_to_polar(*turned)
    for weights in (magnitude, None):
        found = [a for a in range(3) if alternates(phase, magnitude=weights, axis=a)]
        assert found == [axis]
    _, mended = complex_to_polar(*turned, alternating=[axis])
    assert not alternates(mended, magnitude=magnitude, axis=axis)
    both = to_radians(phase, slope=1.0, alternating=[axis, axis])
    torch.testing.assert_close(wrap(both - phase), torch.zeros_like(phase), atol=1e-5, rtol=0)


def test_a_negative_sign_conjugates() -> None:
    phase = 3 * torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) - 1.5
    torch.testing.assert_close(to_radians(phase, slope=1.0, sign=-1), -phase)
    magnitude, conjugate = complex_to_polar(2 * phase.cos(), 2 * phase.sin(), sign=-1)
    torch.testing.assert_close(conjugate, -phase)
    torch.testing.assert_close(magnitude, torch.full(SHAPE, 2.0))


def test_arguments_are_not_written_to() -> None:
    real, imag = torch.ones(SHAPE), -torch.ones(SHAPE)
    complex_to_polar(real, imag, sign=-1, alternating=[0, 2])
    to_radians(real, slope=4.0, alternating=[0, 2])
    wrap(imag)
    assert (real == 1).all()
    assert (imag == -1).all()


def ge_like(
    *, alternating: bool, gradient: float = 0.0, noise: float = 0.0, inside: bool = True
) -> tuple[Tensor, Tensor]:
    """Complex data of a ball, its phase with a ramp (rad per slice), a bulge and noise."""
    x, y, z = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in (32, 30, 24)), indexing="ij")
    amplitude = (x**2 + y**2 + z**2 < 0.8).float() * (1 - 0.5 * x)
    phase = 4 * x - 3 * y**2 + gradient * 12 * z * (1 + 0.5 * x * y)
    phase = phase + math.pi * alternating * (torch.arange(24) % 2)
    generator = torch.Generator().manual_seed(1)
    error = torch.randn(2, 32, 30, 24, generator=generator) * noise
    if not inside:
        error = error * (amplitude > 0)
    return amplitude * phase.cos() + error[0], amplitude * phase.sin() + error[1]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("gradient", [0.0, 0.8, -1.2])
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.5])
def test_alternation_is_found_and_only_where_it_is(
    noise: float, gradient: float, weighted: bool
) -> None:
    for alternating in (True, False):
        real, imag = ge_like(alternating=alternating, gradient=gradient, noise=noise)
        magnitude, phase = complex_to_polar(real, imag)
        assert alternates(phase, magnitude=magnitude if weighted else None) is alternating
        echoes = torch.stack([phase, 3 * phase])
        both = torch.stack([magnitude, magnitude]) if weighted else None
        assert alternates(echoes, magnitude=both) is alternating


def test_mended_slices_are_those_of_data_that_never_alternated() -> None:
    broken = ge_like(alternating=True, noise=0.02, inside=False)
    _, mended = complex_to_polar(*broken, alternating=[2])
    magnitude, smooth = complex_to_polar(*ge_like(alternating=False))
    difference = wrap(mended - smooth)[magnitude > 0]
    # A global pi would be a phase offset and no error.
    assert difference.abs().median() < 0.1
    assert not alternates(mended, magnitude=magnitude)
    _, stored = complex_to_polar(*broken)
    torch.testing.assert_close(to_radians(stored, slope=1.0, alternating=[2]), mended)


def test_noise_one_jump_and_too_few_slices_are_no_alternation() -> None:
    for seed in range(20):
        noise = torch.randn(2, 16, 16, 8, generator=torch.Generator().manual_seed(seed))
        assert not alternates(complex_to_polar(*noise)[1])
    jump = torch.zeros(8, 8, 6)
    jump[..., 3:] = math.pi
    assert not alternates(jump, magnitude=torch.ones_like(jump))
    half = math.pi * (torch.arange(16) % 2) * (torch.arange(16) < 9)
    assert not alternates(half.expand(8, 8, 16), magnitude=torch.ones(8, 8, 16))
    assert not alternates(jump[..., :3])
    assert not alternates(torch.zeros(8, 8, 6))
    with pytest.raises(ValueError, match="different grids"):
        alternates(jump, magnitude=jump[1:])


AFFINE = np.array([
    [-0.8, 0, 0, 9], [0, 1.2 * math.cos(0.3), -2 * math.sin(0.3), 1],
    [0, 1.2 * math.sin(0.3), 2 * math.cos(0.3), -4], [0, 0, 0, 1],
])  # fmt: skip


def write(values: np.ndarray, path: Path) -> str:
    nb.Nifti1Image(values.astype(np.float32), AFFINE).to_filename(path)
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, list[str]]:
    """Two echoes, phase stored as Siemens does; one magnitude and one phase voxel are broken."""
    rng = np.random.default_rng(5)
    phase = rng.integers(-4096, 4095, (2, *SHAPE)).astype(float)
    magnitude = rng.uniform(10, 90, (2, *SHAPE))
    angle = phase * math.pi / 4096
    parts = {
        "magnitude": magnitude,
        "phase": phase,
        "real": magnitude * np.cos(angle),
        "imag": magnitude * np.sin(angle),
    }
    magnitude[0, 1, 2, 3], phase[1, 4, 5, 6] = np.nan, np.inf
    parts["real"][0, 1, 2, 3], parts["imag"][1, 4, 5, 6] = np.nan, np.inf
    return {
        name: [write(image, tmp_path / f"{name}{e}.nii.gz") for e, image in enumerate(images)]
        for name, images in parts.items()
    }


def test_both_ways_of_storing_give_one_pair(
    files: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for name, inputs in {
        "polar": {"phase_slope": math.pi / 4096, **{k: files[k] for k in ("magnitude", "phase")}},
        "complex": {k: files[k] for k in ("real", "imag")},
    }.items():
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        results.append(Prepare(**inputs).run().outputs)
    for name in ("magnitude", "phase", "combined"):
        first, second = (nb.load(getattr(result, name)).get_fdata() for result in results)
        np.testing.assert_allclose(first, second, atol=2e-5, err_msg=name)
        assert first.shape == (SHAPE if name == "combined" else (*SHAPE, 2))
    phase = nb.load(results[0].phase).get_fdata()
    magnitude = nb.load(results[0].magnitude).get_fdata()
    assert phase[1, 2, 3, 0] == phase[4, 5, 6, 1] == 0
    assert magnitude[1, 2, 3, 0] == magnitude[4, 5, 6, 1] == 0
    assert np.abs(phase).max() <= np.float32(math.pi)
    for result in results:
        assert "2 voxels" in result.step["warnings"][0]
        np.testing.assert_allclose(
            result.b0_direction, [0, math.sin(0.3), math.cos(0.3)], atol=1e-6
        )


def test_what_is_missing_is_said(files: dict[str, list[str]], tmp_path: Path,
                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no phase"):
        Prepare(magnitude=files["magnitude"]).run()
    with pytest.raises(ValueError, match="1 magnitude and 2 phase"):
        Prepare(magnitude=files["magnitude"][:1], phase=files["phase"]).run()
    with pytest.raises(ValueError, match="no `imag`"):
        Prepare(real=files["real"]).run()
    with pytest.raises(ValueError, match="give phase_slope"):
        Prepare(magnitude=files["magnitude"], phase=files["phase"]).run()
    other = nb.Nifti1Image(np.ones(SHAPE, np.float32), np.eye(4))
    other.to_filename(tmp_path / "other.nii.gz")
    with pytest.raises(ValueError, match="different grids"):
        Prepare(magnitude=["other.nii.gz"] * 2, phase=files["phase"]).run()
    outputs = Prepare(phase=files["phase"], phase_slope=math.pi / 4096).run().outputs
    assert "no magnitude" in outputs.step["warnings"][0]
    assert nb.load(outputs.magnitude).get_fdata().max() == 1


def test_scales_per_echo_slices_and_ripples_are_read(
    files: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    z = np.arange(SHAPE[2])
    smooth = np.broadcast_to(0.1 * np.arange(SHAPE[0])[:, None, None], SHAPE)
    slices = np.random.default_rng(0).uniform(-3, 3, SHAPE[2])
    echoes = [np.angle(np.exp(1j * (k * smooth + slices))) for k in (1, 2)]
    magnitude = np.where(z < 1, -0.5, 10.0) + np.zeros(SHAPE)
    given = {
        "phase": [
            write(echoes[0], tmp_path / "a.nii"),
            write(1000 * echoes[1], tmp_path / "b.nii"),
        ],
        "magnitude": [write(magnitude, tmp_path / f"m{e}.nii") for e in (0, 1)],
        "phase_slope": [1.0, 1e-3],
    }
    with pytest.raises(ValueError, match="give `echo_times`"):
        Prepare(slice_axes=[2], **given).run()
    outputs = Prepare(slice_axes=[2], echo_times=[0.004, 0.008], **given).run().outputs
    phase = nb.load(outputs.phase).get_fdata()
    assert nb.load(outputs.magnitude).get_fdata().min() == 0
    # Slices agree with each other, but for those without signal, and with the smooth phase.
    left = np.angle(np.exp(1j * (phase[..., 1:, 0] - smooth[..., 1:])))
    assert np.ptp(left) < 1e-4
    assert outputs.step["parameters"]["slope"] == [1.0, 1e-3]
    assert outputs.step["parameters"]["slice_axes"] == [2]


def test_all_echoes_in_one_file_will_do(files: dict[str, list[str]], tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    joined = {
        name: write(np.stack([nb.load(f).get_fdata() for f in files[name]], -1),
                    tmp_path / f"{name}.nii.gz")
        for name in ("magnitude", "phase")
    }  # fmt: skip
    one = Prepare(**joined, phase_slope=1e-3).run().outputs
    np.testing.assert_array_equal(
        nb.load(one.phase).get_fdata()[2:, ..., 0],
        wrap(1e-3 * torch.from_numpy(nb.load(files["phase"][0]).get_fdata(dtype=np.float32)))[2:],
    )


def test_combined_magnitude() -> None:
    torch.testing.assert_close(
        combine_echoes(torch.tensor([3.0, 4.0]).reshape(2, 1, 1, 1)), torch.full((1, 1, 1), 5.0)
    )


@pytest.mark.parametrize(("echoes", "offset"), [(1, "mcpc3ds"), (3, "none"), (3, "mcpc3ds")])
def test_the_graph_skips_what_it_should(echoes: int, offset: str) -> None:
    workflow = init_phase_wf(echoes=echoes, offset=offset)
    assert ("offset_wf" in [n.name for n in workflow._graph]) is (echoes > 1 and offset != "none")


def test_a_single_echo_runs_through_nipype(files: dict[str, list[str]], tmp_path: Path) -> None:
    workflow = init_phase_wf(echoes=1)
    workflow.base_dir = tmp_path
    workflow.inputs.inputnode.trait_set(
        phase=files["phase"][:1], magnitude=files["magnitude"][:1], phase_slope=math.pi / 4096
    )
    graph = workflow.run()
    (prepare,) = (node for node in graph.nodes if node.name == "prepare")
    assert prepare.result.outputs.step["parameters"] == {
        "slope": [math.pi / 4096], "intercept": [0.0], "sign": 1, "alternating": [],
        "slice_axes": [],
    }  # fmt: skip
    phase = nb.load(prepare.result.outputs.phase).get_fdata()
    stored = nb.load(files["phase"][0]).get_fdata()
    np.testing.assert_allclose(
        np.exp(1j * phase[..., 0])[2:], np.exp(1j * stored * math.pi / 4096)[2:], atol=1e-5
    )
