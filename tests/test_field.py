"""The field fit: exact without noise, and as uncertain as it says with noise."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel as nb
import numpy as np
import pytest
import torch
from scipy.optimize import least_squares
from torch import Tensor

from qsmpipe.methods import METHODS, function_of
from qsmpipe.numerics import field as module
from qsmpipe.numerics.field import linear, nonlinear, weighted_mean
from qsmpipe.numerics.units import radians_per_ppm
from qsmpipe.workflows.field import init_field_wf

SHAPE = (11, 9, 7)
B0 = 3.0
TIMES = {
    "one": (0.020,),
    "two": (0.0049, 0.0123),
    "five": (0.004, 0.008, 0.012, 0.016, 0.020),
    "uneven": (0.0038, 0.0102, 0.0131, 0.0245),
}


def truth(shape: tuple[int, int, int] = SHAPE) -> tuple[Tensor, Tensor]:
    """Field (ppm) and mask."""
    x, y, z = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in shape), indexing="ij")
    field = 0.4 * x - 0.3 * y**2 + 0.2 * x * z + 0.05
    return field.double(), x**2 + y**2 + z**2 < 1.2


def signal(
    field: Tensor, times: tuple[float, ...], offset: float = 0.0, b0: float = B0
) -> tuple[Tensor, Tensor]:
    """Unwrapped phase and a magnitude that decays at 25/s and is not the same everywhere."""
    phase = torch.stack([offset + radians_per_ppm(b0, t) * field for t in times])
    base = 50 + 40 * torch.linspace(0, 1, field.shape[0], dtype=field.dtype)[:, None, None]
    return phase, torch.stack([math.exp(-25 * t) * base.expand_as(field) for t in times])


def keywords(times: tuple[float, ...], magnitude: Tensor, b0: float = B0) -> dict[str, Any]:
    return {"magnitude": magnitude, "echo_times": times, "field_strength": b0}


@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize("method", METHODS["field"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_a_known_field_comes_back(
    method: str, times: tuple[float, ...], dtype: torch.dtype, error: float
) -> None:
    field, mask = truth()
    phase, magnitude = signal(field, times)
    before = phase.to(dtype)
    result = function_of("field", method)(before, mask, **keywords(times, magnitude.to(dtype)))
    torch.testing.assert_close(before, phase.to(dtype), rtol=0, atol=0)
    assert result.field.dtype is dtype
    torch.testing.assert_close(result.field[mask].double(), field[mask], rtol=0, atol=error)
    for image in (result.field, result.noise, result.residual):
        assert image.isfinite().all()
        assert (image[~mask] == 0).all()
    assert (result.noise[mask] > 0).all()
    assert result.residual.max() < 1e-5
    assert (result.convergence is None) is (method != "nonlinear")


@pytest.mark.parametrize("times", [TIMES["two"], TIMES["uneven"]], ids=["two", "uneven"])
@pytest.mark.parametrize("offset", [-2.0, 0.7, 9.0])
def test_the_nonlinear_fit_tells_an_offset_from_the_field(
    offset: float, times: tuple[float, ...]
) -> None:
    field, mask = truth()
    phase, magnitude = signal(field, times, offset)
    result = nonlinear(phase, mask, offset=True, **keywords(times, magnitude))
    torch.testing.assert_close(result.field[mask], field[mask], rtol=0, atol=1e-10)
    without = nonlinear(phase, mask, **keywords(times, magnitude))
    assert (without.field - field)[mask].abs().min() > 0.01


@pytest.mark.parametrize("method", METHODS["field"])
def test_the_field_is_in_ppm_of_any_b0_and_magnitude_has_no_unit(method: str) -> None:
    field, mask = truth()
    times, fit = TIMES["five"], function_of("field", method)
    generator = torch.Generator().manual_seed(0)
    phase, magnitude = signal(field, times)
    phase = phase + 0.02 * torch.randn(phase.shape, generator=generator, dtype=torch.float64)
    one = fit(phase, mask, **keywords(times, magnitude))
    seven = fit(phase, mask, **keywords(times, magnitude, 7.0))
    torch.testing.assert_close(7 * seven.field, 3 * one.field)
    torch.testing.assert_close(7 * seven.noise, 3 * one.noise)
    torch.testing.assert_close(seven.residual, one.residual)
    for scale in (1e-6, 1e6):
        other = fit(phase, mask, **keywords(times, scale * magnitude))
        torch.testing.assert_close(other.field, one.field)
        torch.testing.assert_close(other.noise, one.noise)


def test_the_weighted_mean_is_its_formula() -> None:
    _, mask = truth()
    times = TIMES["uneven"]
    generator = torch.Generator().manual_seed(3)
    phase = torch.randn(4, *SHAPE, generator=generator, dtype=torch.float64)
    magnitude = torch.rand(4, *SHAPE, generator=generator, dtype=torch.float64) + 0.1
    result = weighted_mean(phase, mask, **keywords(times, magnitude))
    t = np.array(times)[:, None, None, None]
    weight = magnitude.numpy() ** 2 * t**2
    hertz = np.average(phase.numpy() / (2 * np.pi * t), axis=0, weights=weight)
    expected = np.where(mask, hertz / (42.577478518 * B0), 0)
    np.testing.assert_allclose(result.field, expected, rtol=1e-10)


@pytest.mark.parametrize("offset", [True, False])
def test_the_nonlinear_fit_is_the_least_squares_solution(offset: bool) -> None:
    field, _ = truth()
    times = TIMES["five"]
    phase, magnitude = signal(field, times, 0.3 * offset)
    generator = torch.Generator().manual_seed(4)
    phase = phase + 0.3 * torch.randn(phase.shape, generator=generator, dtype=torch.float64)
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[3, 4, :] = True
    result = nonlinear(phase, mask, offset=offset, tolerance=1e-10, **keywords(times, magnitude))
    rate = np.array([radians_per_ppm(B0, t) for t in times])
    for k in range(SHAPE[2]):
        m, p = magnitude[:, 3, 4, k].numpy(), phase[:, 3, 4, k].numpy()

        def misfit(x: np.ndarray, m: np.ndarray = m, p: np.ndarray = p) -> np.ndarray:
            z = m * (np.exp(1j * p) - np.exp(1j * (rate * x[0] + offset * x[1])))
            return np.r_[z.real, z.imag]

        fit = least_squares(misfit, [field[3, 4, k].item(), 0.3 * offset], xtol=1e-14, ftol=1e-14,
                            gtol=1e-14)  # fmt: skip
        assert result.field[3, 4, k].item() == pytest.approx(fit.x[0], abs=1e-7)
        # Its residual, and the noise from (J'J)^-1 up to the noise level that all voxels share.
        norm = math.sqrt(2 * fit.cost / (m**2).sum())
        assert result.residual[3, 4, k].item() == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("method", METHODS["field"])
@pytest.mark.parametrize("times", [TIMES["five"], TIMES["uneven"]], ids=["five", "uneven"])
@pytest.mark.parametrize("snr", [60.0, 12.0])
def test_the_noise_map_is_the_standard_deviation(
    snr: float, times: tuple[float, ...], method: str
) -> None:
    shape, draws = (10, 10, 8), 150
    field, _ = truth(shape)
    mask = torch.ones(shape, dtype=torch.bool)
    phase, magnitude = signal(field, times)
    sigma = 70 / snr
    fields, predicted = [], []
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        error = sigma * torch.randn(2, *phase.shape, generator=generator, dtype=torch.float64)
        noisy = magnitude + torch.complex(error[0], error[1])
        result = function_of("field", method)(
            phase + noisy.angle(), mask, **keywords(times, noisy.abs())
        )
        fields.append(result.field)
        predicted.append(result.noise)
    empirical = torch.stack(fields).std(0)
    ratio = torch.stack(predicted).mean(0) / empirical
    assert abs(ratio.mean().item() - 1) < 0.05
    # Where the magnitude is nearly twice as high, the field is twice as certain.
    assert abs(ratio[:3].mean() / ratio[-3:].mean() - 1) < 0.05
    bias = (torch.stack(fields).mean(0) - field) / (empirical / draws**0.5)
    assert abs(bias.mean().item()) < 0.2


def test_with_an_offset_left_in_the_noise_is_still_noise() -> None:
    field, mask = truth()
    times = TIMES["five"]
    phase, magnitude = signal(field, times, offset=0.5)
    error = 0.02 * torch.randn(phase.shape, generator=torch.Generator().manual_seed(6))
    noise = [
        weighted_mean(p + error, mask, **keywords(times, magnitude)).noise[mask].median()
        for p in (phase - 0.5, phase)
    ]
    assert noise[1] / noise[0] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("times", [TIMES["one"], TIMES["two"]], ids=["one", "two"])
def test_few_echoes_take_an_assumed_noise(times: tuple[float, ...]) -> None:
    field, mask = truth()
    phase, magnitude = signal(field, times)
    result = weighted_mean(phase, mask, **keywords(times, magnitude))
    sigma = magnitude.amax(0)[mask].median() / module.ASSUMED_SNR
    information = sum((m * radians_per_ppm(B0, t)) ** 2 for m, t in zip(magnitude, times,
                                                                        strict=True))  # fmt: skip
    torch.testing.assert_close(
        result.noise[mask], (sigma / torch.as_tensor(information).sqrt())[mask]
    )
    assert nonlinear(phase, mask, **keywords(times, magnitude)).noise[mask].min() > 0


def test_whole_turns_move_the_field_by_whole_turns_alone() -> None:
    field, mask = truth()
    times = TIMES["five"]
    phase, magnitude = signal(field, times, 0.4)
    phase = phase + 0.05 * torch.randn(
        phase.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64
    )
    given = {"offset": True, **keywords(times, magnitude)}
    base = nonlinear(phase, mask, **given)
    # The same turn in every echo is an offset; a turn more per echo is an alias of the field.
    same = nonlinear(phase + 6 * math.pi, mask, **given)
    torch.testing.assert_close(same.field, base.field, rtol=0, atol=1e-9)
    turns = 2 * math.pi * torch.arange(5, dtype=torch.float64).reshape(5, 1, 1, 1)
    alias = nonlinear(phase + turns, mask, **given)
    step = 2 * math.pi / radians_per_ppm(B0, 0.004)
    torch.testing.assert_close(alias.field[mask], base.field[mask] + step, rtol=0, atol=1e-9)
    torch.testing.assert_close(alias.noise, base.noise)


@pytest.mark.parametrize("method", METHODS["field"])
def test_dead_voxels_stay_finite(method: str) -> None:
    field, mask = truth()
    times = TIMES["five"]
    phase, magnitude = signal(field, times)
    magnitude[:, 5, 4, 3] = 0
    magnitude[1:, 5, 4, 2] = 0
    result = function_of("field", method)(phase, mask, **keywords(times, magnitude))
    for image in (result.field, result.noise, result.residual):
        assert image.isfinite().all()
    assert result.noise[5, 4, 3] > 10 * result.noise[mask].median()
    assert result.noise.max() <= math.pi / 3**0.5 / radians_per_ppm(B0, times[-1]) * (1 + 1e-9)
    nothing = function_of("field", method)(phase, mask, **keywords(times, 0 * magnitude))
    assert nothing.field.isfinite().all()
    empty = function_of("field", method)(
        phase, torch.zeros_like(mask), **keywords(times, magnitude)
    )
    assert empty.field.abs().max() == empty.noise.max() == 0


def random_echoes(voxels: int, dtype: torch.dtype = torch.float64) -> module._Echoes:
    """Noise alone, with echoes of very different magnitude."""
    generator = torch.Generator().manual_seed(9)
    signal = torch.complex(*torch.randn(2, 5, voxels, generator=generator, dtype=torch.float64))
    magnitude = (signal.abs() / signal.abs().max()).pow(2).clamp(min=1e-6)
    magnitude[2:, 0] = 1e-6
    return module._Echoes(
        signal.angle().to(dtype), magnitude.to(dtype), [0.2, 0.3, 0.6, 0.8, 1], 1
    )


@pytest.mark.parametrize("offset", [True, False])
def test_loops_and_torch_fit_alike_and_chunks_do_not_show(
    offset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    echoes = random_echoes(500)
    choices = {"offset": offset, "tolerance": 1e-6, "max_iterations": 500}
    loops, whole = (f(echoes, **choices) for f in (module._newton_loops, module._newton_torch))
    monkeypatch.setattr(module, "CHUNK", 37)
    parts = module._newton_torch(echoes, **choices)
    for other in (whole, parts):
        assert other.convergence.iterations == loops.convergence.iterations
        for a, b in zip(loops[:3], other[:3], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    single = module._newton_loops(random_echoes(500, torch.float32), **choices)
    assert single.slope.dtype is torch.float32
    assert ((single.slope - loops.slope).abs() < 1e-4).float().mean() > 0.99


@pytest.mark.parametrize("offset", [True, False])
def test_every_step_makes_the_fit_better_and_noise_converges(offset: bool) -> None:
    echoes = random_echoes(4000)

    def misfit(steps: int) -> Tensor:
        fit = module._newton_loops(echoes, offset=offset, tolerance=0.0, max_iterations=steps)
        angle = torch.stack([
            p - fit.intercept - t * fit.slope
            for p, t in zip(echoes.phase, echoes.times, strict=True)
        ])  # fmt: skip
        return (echoes.magnitude.square() * (1 - angle.cos())).sum(0)

    costs = [misfit(steps) for steps in (1, 2, 3, 5, 9, 20, 60)]
    for before, after in pairwise(costs):
        assert (after <= before + 1e-15).all()
    fit = module._newton_loops(echoes, offset=offset, tolerance=1e-4, max_iterations=500)
    assert fit.convergence.converged
    assert fit.convergence.iterations < 200


@pytest.mark.parametrize("times", [TIMES["two"], TIMES["uneven"]], ids=["two", "uneven"])
def test_the_line_is_numpys_weighted_line(times: tuple[float, ...]) -> None:
    _, mask = truth()
    generator = torch.Generator().manual_seed(5)
    phase = torch.randn(len(times), *SHAPE, generator=generator, dtype=torch.float64)
    magnitude = torch.rand(len(times), *SHAPE, generator=generator, dtype=torch.float64) + 0.1
    result = linear(phase, mask, **keywords(times, magnitude))
    for voxel in [(5, 4, 3), (3, 6, 2), (8, 3, 5)]:
        slope, _ = np.polyfit(times, phase[:, *voxel], 1, w=magnitude[:, *voxel])
        expected = slope / radians_per_ppm(B0, 1.0)
        assert result.field[voxel].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("method", ["linear", "nonlinear"])
def test_a_line_with_offset_reaches_the_cramer_rao_bound(method: str) -> None:
    """And differences to the first echo with "optimum weights" do not, by a fifth."""
    shape = (24, 24, 24)
    mask, times, sigma = torch.ones(shape, dtype=torch.bool), TIMES["five"], 0.02
    generator = torch.Generator().manual_seed(7)
    noise = torch.complex(*torch.randn(2, 5, *shape, generator=generator, dtype=torch.float64))
    offset = torch.linspace(-3, 3, 24, dtype=torch.float64)[:, None, None]
    error = (1 + sigma * noise).angle()
    magnitude = (1 + sigma * noise).abs()
    given = keywords(times, magnitude)
    if method == "nonlinear":
        given["offset"] = True
    result = function_of("field", method)(offset + error, mask, **given)
    centred = np.array(times) - np.mean(times)
    bound = sigma / radians_per_ppm(B0, 1.0) / (centred**2).sum() ** 0.5
    assert result.field.std().item() == pytest.approx(bound, rel=0.02)
    assert result.noise.mean().item() == pytest.approx(bound, rel=0.03)
    assert abs(result.field.mean().item()) < 4 * bound / 24**1.5
    step = torch.tensor(times, dtype=torch.float64)[1:] - times[0]
    weight = step.square()[:, None, None, None]
    differences = (error[1:] - error[0]) / step[:, None, None, None]
    optimum = (weight * differences).sum(0) / weight.sum() / radians_per_ppm(B0, 1.0)
    assert optimum.std().item() / bound == pytest.approx(1.2, abs=0.03)


@pytest.mark.parametrize("method", METHODS["field"])
def test_outside_the_mask_nothing_is_read_and_twice_is_the_same(method: str) -> None:
    field, mask = truth()
    phase, magnitude = signal(field, TIMES["five"])
    fit = function_of("field", method)
    base = fit(phase, mask, **keywords(TIMES["five"], magnitude))
    hollow = torch.where(mask, 0.0, math.nan)
    other = fit(phase + hollow, mask, **keywords(TIMES["five"], magnitude + hollow))
    for name in ("field", "noise", "residual"):
        assert torch.equal(getattr(base, name), getattr(other, name))


def test_the_fit_tells_when_it_ran_out_of_steps() -> None:
    mask = torch.ones(12, 12, 12, dtype=torch.bool)
    generator = torch.Generator().manual_seed(1)
    noise = torch.complex(*torch.randn(2, 5, 12, 12, 12, generator=generator))
    given = keywords(TIMES["five"], noise.abs())
    short = nonlinear(noise.angle(), mask, max_iterations=3, **given).convergence
    assert not short.converged
    assert short.iterations == 3
    assert short.change > short.tolerance
    full = nonlinear(noise.angle(), mask, **given)
    assert full.convergence.converged
    assert full.convergence.change <= full.convergence.tolerance
    # No step makes the fit worse.
    rough = nonlinear(noise.angle(), mask, max_iterations=3, **given)
    assert (full.residual <= rough.residual + 1e-4).all()


@pytest.mark.parametrize("method", METHODS["field"])
def test_what_does_not_match_is_refused(method: str) -> None:
    field, mask = truth()
    phase, magnitude = signal(field, TIMES["two"])
    fit: Callable[..., Any] = function_of("field", method)
    with pytest.raises(ValueError, match="3 echo times"):
        fit(phase, mask, **keywords((0.004, 0.008, 0.012), magnitude))
    with pytest.raises(ValueError, match="different grids"):
        fit(phase, mask[1:], **keywords(TIMES["two"], magnitude))
    with pytest.raises(ValueError, match="not the same echoes"):
        fit(phase, mask, **keywords(TIMES["two"], magnitude[:1]))
    with pytest.raises(ValueError, match="in ms"):
        fit(phase, mask, **keywords((4.9, 12.3), magnitude))
    with pytest.raises(ValueError, match="B0 in T"):
        fit(phase, mask, **keywords(TIMES["two"], magnitude, b0=0.0))


def write(image: Tensor, path: Path) -> str:
    array = image.movedim(0, -1) if image.ndim == 4 else image
    nb.Nifti1Image(array.numpy().astype(np.float32), np.eye(4)).to_filename(path)
    return str(path)


@pytest.mark.parametrize("times", [TIMES["one"], TIMES["five"]], ids=["one", "five"])
@pytest.mark.parametrize("method", METHODS["field"])
def test_the_workflow_writes_what_the_function_gives(
    method: str, times: tuple[float, ...], tmp_path: Path
) -> None:
    field, mask = truth()
    phase, magnitude = signal(field, times, 0.1 * (len(times) > 1))
    parameters = {"tolerance": 1e-3} if method == "nonlinear" else None
    workflow = init_field_wf(method=method, parameters=parameters)
    workflow.base_dir = tmp_path
    workflow.inputs.inputnode.trait_set(
        phase=write(phase, tmp_path / "phase.nii.gz"),
        mask=write(mask, tmp_path / "mask.nii.gz"),
        magnitude=write(magnitude, tmp_path / "magnitude.nii.gz"),
        echo_times=list(times),
        field_strength=B0,
    )
    (node,) = workflow.run().nodes
    assert node.name == method
    expected = function_of("field", method)(
        phase.float(), mask, **keywords(times, magnitude.float()), **(parameters or {})
    )
    for name in ("field", "noise", "residual"):
        written = nb.load(getattr(node.result.outputs, name)).get_fdata()
        np.testing.assert_allclose(written, getattr(expected, name), atol=1e-5)
    step = node.result.outputs.step
    assert step["warnings"] == []
    if method == "nonlinear":
        assert step["parameters"] == {
            "offset": False, "tolerance": 1e-3, "max_iterations": module.DEFAULT_MAX_ITERATIONS,
        }  # fmt: skip
        assert step["convergence"]["converged"]
