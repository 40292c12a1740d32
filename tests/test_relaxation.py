"""R2*: exact without noise, sane in voxels without signal."""

import math
import warnings
from pathlib import Path

import nibabel as nb
import numpy as np
import pytest
import torch
from scipy.optimize import least_squares
from scipy.stats import rice
from torch import Tensor
from traits.api import TraitError

from qsmpipe.interfaces.relaxation import NonlinearDecay
from qsmpipe.methods import METHODS, function_of
from qsmpipe.numerics import relaxation
from qsmpipe.numerics.relaxation import MAX_T2STAR, STEEPEST, arlo, loglinear, nonlinear
from qsmpipe.settings import Settings, parse_assignments
from qsmpipe.workflows.relaxation import init_relaxation_wf

SHAPE = (9, 8, 7)
EVEN = (0.004, 0.008, 0.012, 0.016, 0.020)
UNEVEN = (0.003, 0.008, 0.011, 0.020)


def decay(times: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Magnitude, mask, R2* of 2 to 150/s and S0."""
    x, y, z = torch.meshgrid(
        *(torch.linspace(0, 1, n, dtype=torch.float64) for n in SHAPE), indexing="ij"
    )
    r2star, s0 = 2 + 148 * x * (0.5 + 0.5 * y), 400 + 300 * z
    magnitude = torch.stack([s0 * torch.exp(-r2star * t) for t in times])
    return magnitude, x + y + z > 0.3, r2star, s0


@pytest.mark.parametrize("times", [EVEN, UNEVEN, EVEN[:2]], ids=["even", "uneven", "two"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_the_loglinear_fit_is_exact(
    times: tuple[float, ...], dtype: torch.dtype, error: float
) -> None:
    magnitude, mask, r2star, s0 = decay(times)
    given = magnitude.to(dtype)
    result = loglinear(given, mask, echo_times=times)
    torch.testing.assert_close(given, magnitude.to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(result.r2star[mask].double(), r2star[mask], rtol=error, atol=error)
    torch.testing.assert_close(result.s0[mask].double(), s0[mask], rtol=error, atol=error)
    torch.testing.assert_close(
        result.t2star[mask].double(), 1 / r2star[mask], rtol=error, atol=error
    )
    assert result.convergence is None
    for image in result[:3]:
        assert image.dtype is dtype
        assert (image[~mask] == 0).all()


@pytest.mark.parametrize("echoes", [3, 4, 5])
def test_arlo_is_as_exact_as_simpsons_rule(echoes: int) -> None:
    magnitude, mask, r2star, s0 = decay(EVEN[:echoes])
    result = arlo(magnitude, mask, echo_times=EVEN[:echoes])
    allowed = 1.1 * r2star * (r2star * 0.004) ** 4 / 180 + 1e-10
    assert ((result.r2star - r2star).abs() <= allowed)[mask].all()
    torch.testing.assert_close(result.s0[mask], s0[mask], rtol=2e-3, atol=0)
    single = arlo(magnitude.float(), mask, echo_times=EVEN[:echoes])
    torch.testing.assert_close(single.r2star.double(), result.r2star, rtol=1e-3, atol=1e-3)


def test_the_loglinear_fit_is_the_weighted_polynomial_fit() -> None:
    magnitude, mask, _, _ = decay(UNEVEN)
    generator = torch.Generator().manual_seed(0)
    noisy = (magnitude + 20 * torch.randn(magnitude.shape, generator=generator)).clamp(min=1)
    result = loglinear(noisy, mask, echo_times=UNEVEN)
    for voxel in [(3, 2, 1), (8, 7, 6), (5, 5, 0)]:
        m = noisy[:, *voxel].numpy()
        slope, level = np.polyfit(UNEVEN, np.log(m), 1, w=m)
        assert result.r2star[voxel].item() == pytest.approx(max(-slope, 0), rel=1e-9)
        if slope < 0:
            assert result.s0[voxel].item() == pytest.approx(math.exp(level), rel=1e-9)


@pytest.mark.parametrize("method", METHODS["relaxation"])
def test_noise_does_not_bias_it_much(method: str) -> None:
    shape = (20, 20, 20)
    mask = torch.ones(shape, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    clean = torch.stack([torch.full(shape, 100 * math.exp(-30 * t)) for t in EVEN])
    error = torch.randn(2, *clean.shape, generator=generator) * 4
    noisy = (clean + torch.complex(error[0], error[1])).abs()
    result = function_of("relaxation", method)(noisy, mask, echo_times=EVEN)
    assert result.r2star.mean().item() == pytest.approx(30, rel=0.05)
    assert result.s0.mean().item() == pytest.approx(100, rel=0.02)


@pytest.mark.filterwarnings("ignore:.*voxels with signal:RuntimeWarning")
@pytest.mark.parametrize("method", METHODS["relaxation"])
def test_voxels_that_do_not_decay(method: str) -> None:
    mask = torch.ones(5, 1, 1, dtype=torch.bool)
    echoes = torch.tensor([
        [0.0, 0, 0, 0, 0],  # no signal
        [7.0, 7, 7, 7, 7],  # no decay
        [1.0, 2, 3, 4, 5],  # growth
        [9.0, 0, 0, 0, 0],  # one echo alone
        [8.0, 4, 2, 1, 0],  # signal lost on the way
    ]).T.reshape(5, 5, 1, 1)  # fmt: skip
    result = function_of("relaxation", method)(echoes, mask, echo_times=EVEN)
    r2star, t2star, s0 = (image.flatten() for image in result[:3])
    for image in (r2star, t2star, s0):
        assert image.isfinite().all()
        assert (image >= 0).all()
    assert r2star[0] == t2star[0] == s0[0] == 0
    assert r2star[1] == r2star[2] == 0
    torch.testing.assert_close(t2star[1:3], torch.full((2,), MAX_T2STAR))
    assert s0[1].item() == pytest.approx(7, rel=1e-5)
    assert r2star[4].item() == pytest.approx(math.log(2) / 0.004, rel=0.05)
    torch.testing.assert_close(1 / t2star[4], r2star[4])


@pytest.mark.parametrize("method", METHODS["relaxation"])
def test_the_unit_of_the_magnitude_is_that_of_s0(method: str) -> None:
    magnitude, mask, _, _ = decay(EVEN)
    fit = function_of("relaxation", method)
    base = fit(magnitude, mask, echo_times=EVEN)
    for scale in (1e-8, 1e8):
        other = fit(scale * magnitude, mask, echo_times=EVEN)
        torch.testing.assert_close(other.r2star, base.r2star)
        torch.testing.assert_close(other.s0, scale * base.s0)
        single = fit((scale * magnitude).float(), mask, echo_times=EVEN)
        torch.testing.assert_close(single.r2star.double(), base.r2star, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("times", [EVEN, UNEVEN, EVEN[:2]], ids=["even", "uneven", "two"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("floor", [0.0, 1e-3])
def test_the_nonlinear_fit_is_exact(
    times: tuple[float, ...], dtype: torch.dtype, error: float, floor: float
) -> None:
    """A floor far below the signal changes nothing: mu(S) = S + sigma^2 / 2 S."""
    magnitude, mask, r2star, s0 = decay(times)
    given = magnitude.to(dtype)
    result = nonlinear(given, mask, echo_times=times, noise_floor=floor, tolerance=1e-9)
    torch.testing.assert_close(given, magnitude.to(dtype), rtol=0, atol=0)
    error = max(error, 1e-6 if floor else 0)
    torch.testing.assert_close(result.r2star[mask].double(), r2star[mask], rtol=error, atol=error)
    torch.testing.assert_close(result.s0[mask].double(), s0[mask], rtol=error, atol=error)
    assert result.convergence.converged
    for image in result[:3]:
        assert image.dtype is dtype
        assert (image[~mask] == 0).all()


@pytest.mark.parametrize("sigma", [0.0, 25.0])
def test_the_nonlinear_fit_is_the_least_squares_solution(sigma: float) -> None:
    """Against scipy, with the mean of the Rice distribution from scipy as well."""
    magnitude, _, _, _ = decay(UNEVEN)
    generator = torch.Generator().manual_seed(1)
    noise = torch.complex(*torch.randn(2, *magnitude.shape, generator=generator).double())
    noisy = (magnitude + 25 * noise).abs()
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[:, 3, 2] = True
    result = nonlinear(noisy, mask, echo_times=UNEVEN, noise_floor=sigma, tolerance=1e-10)
    assert result.convergence.converged
    for i in range(SHAPE[0]):

        def misfit(x: np.ndarray, i: int = i) -> np.ndarray:
            clean = x[0] * np.exp(-x[1] * np.array(UNEVEN))
            mean = rice.mean(clean / sigma, scale=sigma) if sigma else clean
            return noisy[:, i, 3, 2].numpy() - mean

        fit = least_squares(misfit, [500, 50], bounds=([0, 0], np.inf), x_scale=[500, 50],
                            xtol=1e-13, ftol=1e-13, gtol=1e-13)  # fmt: skip
        assert result.s0[i, 3, 2].item() == pytest.approx(fit.x[0], rel=1e-5)
        assert result.r2star[i, 3, 2].item() == pytest.approx(fit.x[1], rel=1e-5, abs=1e-3)


def noisy_decay(r2star: float, snr: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Magnitude 100 at time 0, as a magnitude of a complex signal, and a mask."""
    shape = (24, 24, 24)
    generator = torch.Generator().manual_seed(seed)
    clean = torch.stack([torch.full(shape, 100 * math.exp(-r2star * t)).double() for t in EVEN])
    noise = torch.complex(*torch.randn(2, *clean.shape, generator=generator).double())
    return (clean + 100 / snr * noise).abs(), torch.ones(shape, dtype=torch.bool)


def test_the_nonlinear_fit_reaches_the_cramer_rao_bound() -> None:
    rate, snr = 40.0, 80.0
    magnitude, mask = noisy_decay(rate, snr)
    t = np.array(EVEN)
    jacobian = np.stack([np.exp(-rate * t), -100 * t * np.exp(-rate * t)], 1)
    bound = 100 / snr * np.linalg.inv(jacobian.T @ jacobian)[1, 1] ** 0.5
    result = nonlinear(magnitude, mask, echo_times=EVEN)
    assert result.r2star.std().item() == pytest.approx(bound, rel=0.03)
    assert abs(result.r2star.mean().item() - rate) < 0.1 * bound
    assert arlo(magnitude, mask, echo_times=EVEN).r2star.std() > 0.99 * bound


def test_a_noise_floor_takes_the_bias_away() -> None:
    """The last echo's signal is as weak as the noise; what is left is a bias of all such fits."""
    rate, snr = 200.0, 60.0
    magnitude, mask = noisy_decay(rate, snr)
    bias = {
        floor: nonlinear(magnitude, mask, echo_times=EVEN, noise_floor=floor).r2star.mean() - rate
        for floor in (0.0, 100 / snr, "auto")
    }
    assert bias[0.0] < -3
    assert abs(bias[100 / snr]) < 0.3 * abs(bias[0.0])
    assert abs(bias["auto"]) < 0.3 * abs(bias[0.0])


@pytest.mark.parametrize("snr", [20.0, 100.0])
def test_the_automatic_floor_is_the_noise(snr: float) -> None:
    magnitude, mask = noisy_decay(40.0, snr)
    given = nonlinear(magnitude, mask, echo_times=EVEN, noise_floor=100 / snr)
    found = nonlinear(magnitude, mask, echo_times=EVEN, noise_floor="auto")
    torch.testing.assert_close(found.r2star, given.r2star, rtol=0, atol=0.5)
    scaled = nonlinear(1e3 * magnitude, mask, echo_times=EVEN, noise_floor="auto")
    torch.testing.assert_close(scaled.r2star, found.r2star, rtol=1e-4, atol=1e-4)


def test_clipped_voxels_are_told() -> None:
    mask = torch.ones(4, 5, 5, dtype=torch.bool)
    magnitude = torch.stack([torch.full((4, 5, 5), 100 * math.exp(-30 * t)) for t in EVEN])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nonlinear(magnitude, mask, echo_times=EVEN)
    magnitude[:, 0, 0, 0] = torch.arange(1.0, 6)
    with pytest.warns(RuntimeWarning, match="1 of 100 voxels with signal do not decay"):
        nonlinear(magnitude, mask, echo_times=EVEN)
    magnitude[:, 0, 0, :2] = torch.tensor([5.0, 0, 0, 0, 0])[:, None]
    with pytest.warns(RuntimeWarning, match=r"2 of 100 .* held at 1250 1/s"):
        result = nonlinear(magnitude, mask, echo_times=EVEN)
    assert result.r2star.max().item() == pytest.approx(STEEPEST / 0.004)


def test_the_nonlinear_fit_tells_how_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    magnitude, mask = noisy_decay(60.0, 10.0)
    short = nonlinear(magnitude, mask, echo_times=EVEN, max_iterations=1)
    assert not short.convergence.converged
    assert short.convergence.change > short.convergence.tolerance
    full = nonlinear(magnitude, mask, echo_times=EVEN)
    assert full.convergence.converged
    assert full.convergence.iterations < 50
    loose = nonlinear(magnitude, mask, echo_times=EVEN, tolerance=1e-2)
    assert loose.convergence.iterations < full.convergence.iterations
    monkeypatch.setattr(relaxation, "CHUNK", 1000)
    parts = nonlinear(magnitude, mask, echo_times=EVEN)
    assert torch.equal(parts.r2star, full.r2star)
    assert parts.convergence == full.convergence


@pytest.mark.parametrize("method", METHODS["relaxation"])
def test_outside_the_mask_nothing_is_read_and_twice_is_the_same(method: str) -> None:
    magnitude, mask, _, _ = decay(EVEN)
    fit = function_of("relaxation", method)
    base = fit(magnitude, mask, echo_times=EVEN)
    other = fit(torch.where(mask, magnitude, math.nan), mask, echo_times=EVEN)
    for a, b in zip(base[:3], other[:3], strict=True):
        assert torch.equal(a, b)
    nothing = fit(magnitude, torch.zeros_like(mask), echo_times=EVEN)
    assert nothing.r2star.abs().max() == 0


def test_the_interface_passes_clipped_voxels_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    magnitude, mask, _, _ = decay(EVEN)
    magnitude[:, 8, 7, 6] = torch.arange(1, 6)
    for name, data in {"magnitude": magnitude.movedim(0, -1), "mask": mask}.items():
        nb.Nifti1Image(data.numpy().astype(np.float32), np.eye(4)).to_filename(f"{name}.nii.gz")
    node = NonlinearDecay(
        magnitude="magnitude.nii.gz", mask="mask.nii.gz", echo_times=list(EVEN), noise_floor="auto"
    )
    step = node.run().outputs.step
    assert step["parameters"]["noise_floor"] == "auto"
    assert step["convergence"]["converged"]
    assert "do not decay" in step["warnings"][0]
    with pytest.raises(TraitError):
        node.inputs.noise_floor = -1.0


def test_what_cannot_be_fitted_is_refused() -> None:
    magnitude, mask, _, _ = decay(UNEVEN)
    with pytest.raises(ValueError, match="evenly spaced"):
        arlo(magnitude, mask, echo_times=UNEVEN)
    with pytest.raises(ValueError, match="3 neighbouring echoes"):
        arlo(magnitude[:2], mask, echo_times=UNEVEN[:2])
    with pytest.raises(ValueError, match="2 are needed"):
        loglinear(magnitude[:1], mask, echo_times=UNEVEN[:1])
    with pytest.raises(ValueError, match="different grids"):
        loglinear(magnitude, mask[1:], echo_times=UNEVEN)
    with pytest.raises(ValueError, match="2 are needed"):
        nonlinear(magnitude[:1], mask, echo_times=UNEVEN[:1])
    with pytest.raises(ValueError, match="3 or more echoes"):
        nonlinear(magnitude[:2], mask, echo_times=UNEVEN[:2], noise_floor="auto")
    for floor in (-1.0, math.nan, "low"):
        with pytest.raises(
            ValueError, match=r"noise_floor is .*: give a number of 0 or more, or 'auto'"
        ):
            nonlinear(magnitude, mask, echo_times=UNEVEN, noise_floor=floor)


@pytest.mark.parametrize(("value", "expected"), [("auto", "auto"), ("12", 12.0), ("2.5", 2.5)])
def test_the_command_line_sets_the_floor(value: str, expected: float | str) -> None:
    settings = Settings(
        relaxation="nonlinear",
        parameters=parse_assignments([f"relaxation.noise_floor={value}"]),
    )
    chosen = settings.parameters_for("relaxation")["nonlinear"]
    assert chosen == {"noise_floor": expected}
    node = init_relaxation_wf(method="nonlinear", parameters=chosen).get_node("nonlinear")
    assert node.inputs.noise_floor == expected


def test_evenly_spaced_is_a_matter_of_one_percent() -> None:
    magnitude, mask, _, _ = decay(UNEVEN)
    # Times rounded to 0.01 ms are even enough.
    arlo(magnitude[:3], mask, echo_times=(0.00492, 0.00984, 0.01477))


@pytest.mark.parametrize("method", METHODS["relaxation"])
def test_the_workflow_writes_all_maps(method: str, tmp_path: Path) -> None:
    magnitude, mask, _, _ = decay(EVEN)
    for name, data in {"magnitude": magnitude.movedim(0, -1), "mask": mask}.items():
        nb.Nifti1Image(data.numpy().astype(np.float32), np.eye(4)).to_filename(
            tmp_path / f"{name}.nii.gz"
        )
    workflow = init_relaxation_wf(method=method)
    workflow.base_dir = tmp_path
    workflow.inputs.inputnode.trait_set(
        magnitude=str(tmp_path / "magnitude.nii.gz"),
        mask=str(tmp_path / "mask.nii.gz"),
        echo_times=list(EVEN),
    )
    (node,) = workflow.run().nodes
    assert node.name == method
    expected = function_of("relaxation", method)(magnitude.float(), mask, echo_times=EVEN)
    for name in ("r2star", "t2star", "s0"):
        written = nb.load(getattr(node.result.outputs, name)).get_fdata()
        np.testing.assert_allclose(written, getattr(expected, name), rtol=1e-5, atol=1e-5)
    assert node.result.outputs.step["method"] == method
