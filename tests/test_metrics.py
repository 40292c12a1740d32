"""Metrics against their formulas, written out here by other means."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage, signal

from qsmpipe.numerics.metrics import (
    calcification,
    detrended_nrmse,
    hfen,
    linearity_error,
    nrmse,
    xsim,
)

METRICS = {"nrmse": nrmse, "detrended": detrended_nrmse, "xsim": xsim, "hfen": hfen}
PERFECT = {"nrmse": 0.0, "detrended": 0.0, "xsim": 1.0, "hfen": 0.0}


@pytest.fixture(scope="module")
def maps() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(0)
    truth = ndimage.gaussian_filter(random.normal(size=(21, 18, 23)), 1.5)
    recon = 0.8 * truth + 0.01 + 0.02 * random.normal(size=truth.shape)
    x, y, z = np.ogrid[-10:11, -9:9, -11:12]
    mask = (x / 9) ** 2 + (y / 8) ** 2 + (z / 10) ** 2 <= 1
    return torch.from_numpy(recon), torch.from_numpy(truth), torch.from_numpy(mask)


@pytest.mark.parametrize("name", METRICS)
def test_a_perfect_map_is_perfect(name: str, maps: tuple[torch.Tensor, ...]) -> None:
    _, truth, mask = maps
    assert METRICS[name](truth, truth, mask) == pytest.approx(PERFECT[name], abs=1e-10)


@pytest.mark.parametrize("name", METRICS)
def test_what_lies_outside_the_mask_does_not_count(
    name: str, maps: tuple[torch.Tensor, ...]
) -> None:
    recon, truth, mask = maps
    score = METRICS[name](recon, truth, mask)
    assert score == METRICS[name](recon + 5.0 * ~mask, truth - 3.0 * ~mask, mask)
    assert score == pytest.approx(METRICS[name](recon.float(), truth.float(), mask), rel=1e-4)


@pytest.mark.parametrize("name", METRICS)
def test_more_noise_is_worse(name: str, maps: tuple[torch.Tensor, ...]) -> None:
    _, truth, mask = maps
    noise = torch.from_numpy(np.random.default_rng(1).normal(size=truth.shape))
    scores = [METRICS[name](truth + level * noise, truth, mask) for level in (0.01, 0.03, 0.1)]
    assert scores == sorted(scores, reverse=name == "xsim")


def test_nrmse_by_hand() -> None:
    truth = torch.tensor([[[3.0, 4.0, 7.0]]])
    recon = torch.tensor([[[3.0, 5.0, -9.0]]])
    assert nrmse(recon, truth, torch.tensor([[[True, True, False]]])) == pytest.approx(20)


def test_detrended_nrmse_undoes_slope_and_intercept(maps: tuple[torch.Tensor, ...]) -> None:
    recon, truth, mask = maps
    score = detrended_nrmse(recon, truth, mask)
    for slope, intercept in ((2.0, 0.0), (-0.3, 0.1), (1.0, -4.0)):
        assert detrended_nrmse(slope * recon + intercept, truth, mask) == pytest.approx(score)
        assert detrended_nrmse(slope * truth + intercept, truth, mask) == pytest.approx(
            0, abs=1e-9
        )
    # Variant B by a line fit of recon on truth, and its relation to the correlation.
    r, t = recon[mask].numpy(), truth[mask].numpy()
    line = np.polynomial.Polynomial.fit(t, r, 1).convert()
    corrected = (r - line.coef[0]) / line.coef[1]
    by_hand = np.linalg.norm(corrected - t) / np.linalg.norm(t - t.mean())
    assert score == pytest.approx(100 * by_hand)
    correlation = np.corrcoef(r, t)[0, 1]
    assert score == pytest.approx(100 * math.sqrt(1 / correlation**2 - 1))
    assert nrmse(recon, truth, mask) != pytest.approx(score, rel=0.01)


def test_an_unrelated_map_has_an_infinite_detrended_error() -> None:
    truth = torch.tensor([[[1.0, -1.0, 1.0, -1.0]]])
    recon = torch.tensor([[[1.0, 1.0, -1.0, -1.0]]])
    assert detrended_nrmse(recon, truth, torch.ones(1, 1, 4, dtype=torch.bool)) == math.inf


def test_hfen_is_that_of_the_kernel_of_15_voxels(maps: tuple[torch.Tensor, ...]) -> None:
    recon, truth, mask = maps
    x, y, z = np.mgrid[-7:8, -7:8, -7:8]
    squared, sigma = x**2 + y**2 + z**2, 1.5
    gauss = np.exp(-squared / (2 * sigma**2))
    gauss /= gauss.sum()
    kernel = gauss * (squared / sigma**4 - 3 / sigma**2)
    kernel -= kernel.mean()
    edges = [
        signal.fftconvolve((image * mask).numpy(), kernel, mode="same") for image in (recon, truth)
    ]
    by_hand = 100 * np.linalg.norm(edges[0] - edges[1]) / np.linalg.norm(edges[1])
    assert hfen(recon, truth, mask) == pytest.approx(by_hand, rel=1e-5)


def test_xsim_by_hand(maps: tuple[torch.Tensor, ...]) -> None:
    recon, truth, _ = maps
    one = np.exp(-(np.arange(-3, 4) ** 2) / (2 * 1.5**2))
    window = one[:, None, None] * one[None, :, None] * one
    window /= window.sum()
    r, t = (np.pad(image.numpy(), 3, mode="edge") for image in (recon, truth))
    scores = []
    for i, j, k in np.ndindex(*recon.shape):
        a, b = (image[i : i + 7, j : j + 7, k : k + 7] for image in (r, t))
        mean_a, mean_b = (window * a).sum(), (window * b).sum()
        var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
        both = (window * (a - mean_a) * (b - mean_b)).sum()
        similarity = (2 * mean_a * mean_b + 1e-4) * (2 * both + 1e-6)
        scores.append(similarity / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 1e-6)))
    everywhere = torch.ones(recon.shape, dtype=torch.bool)
    assert xsim(recon, truth, everywhere) == pytest.approx(np.mean(scores))


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_grids_must_agree(metric, maps: tuple[torch.Tensor, ...]) -> None:
    recon, truth, mask = maps
    with pytest.raises(ValueError, match="different grids"):
        metric(recon[1:], truth, mask)
    with pytest.raises(ValueError, match="mask is empty"):
        metric(recon, truth, torch.zeros_like(mask))


@pytest.mark.parametrize("metric", [nrmse, detrended_nrmse, hfen])
def test_a_constant_truth_is_refused(metric, maps: tuple[torch.Tensor, ...]) -> None:
    recon, truth, mask = maps
    with pytest.raises(ValueError, match="constant or 0"):
        metric(recon, torch.zeros_like(truth), mask)


def test_linearity_is_the_slope_of_the_regions_means() -> None:
    regions = torch.zeros(12, 6, 6, dtype=torch.int32)
    truth = torch.zeros(12, 6, 6, dtype=torch.float64)
    for number, (place, value) in enumerate(((0, 0.05), (4, 0.1), (8, 0.2)), start=1):
        regions[place : place + 3, :, ::number] = number
        truth[regions == number] = value
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=truth.shape))
    assert linearity_error(truth, truth, regions) == pytest.approx(0, abs=1e-12)
    recon = 0.7 * truth + 0.03 + 0.01 * noise
    means = [[float(x[regions == number].mean()) for number in (1, 2, 3)] for x in (recon, truth)]
    line = np.polynomial.Polynomial.fit(means[1], means[0], 1).convert()
    assert linearity_error(recon, truth, regions) == pytest.approx(1 - line.coef[1])
    with pytest.raises(ValueError, match="two that differ"):
        linearity_error(recon, torch.ones_like(truth), regions)


def test_a_calcification_and_its_streaks_by_hand() -> None:
    mask = torch.ones(24, 24, 24, dtype=torch.bool)
    region = torch.zeros_like(mask)
    region[10:13, 11:14, 10:13] = True
    truth = -0.8 * region.double()
    checks = torch.from_numpy(np.indices(mask.shape).sum(0) % 2 * 0.1 - 0.05)
    box = torch.zeros_like(mask)
    box[7:16, 8:17, 7:16] = True  # where the checks lie outside, streaks lie
    recon = 0.5 * truth + checks * ~box
    moment, streak = calcification(recon, truth, mask, region)
    assert moment == pytest.approx(50)
    assert streak == pytest.approx(100 * 0.05 / 0.4, rel=0.02)
    assert calcification(truth, truth, mask, region) == pytest.approx((0, 0), abs=1e-9)
    nothing = calcification(checks, truth, mask, region)
    assert nothing.moment == pytest.approx(100)
    assert nothing.streak == math.inf
