"""R2*: exact without noise, sane in voxels without signal."""

import math
from pathlib import Path

import nibabel as nb
import numpy as np
import pytest
import torch
from torch import Tensor

from qsmpipe.methods import METHODS, function_of
from qsmpipe.numerics.relaxation import MAX_T2STAR, arlo, loglinear
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
    for image in result:
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
    r2star, t2star, s0 = (image.flatten() for image in result)
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
    for name, image in expected._asdict().items():
        written = nb.load(getattr(node.result.outputs, name)).get_fdata()
        np.testing.assert_allclose(written, image, rtol=1e-5, atol=1e-5)
    assert node.result.outputs.step["method"] == method
