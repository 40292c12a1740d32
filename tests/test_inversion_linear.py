"""Linear inversions and those built on them: what each promises beside what all owe."""

import sys
from functools import partial

import numpy as np
import pytest
import torch
from phantoms import ISOTROPIC, TILTED, Phantom, dense, error, phantom
from torch import Tensor

from qsmpipe.numerics.fourier import Shape, copies, irfft, rfft
from qsmpipe.numerics.inversion import ilsqr, l2, tikhonov, tkd, tsvd, tv, two_level
from qsmpipe.numerics.inversion.common import Window
from qsmpipe.numerics.inversion.direct import Prior, penalty, penalty_norm
from qsmpipe.numerics.inversion.ilsqr import (
    GRADIENT_PERCENTILES,
    data_weight,
    falling,
    fast_qsm,
    initial_estimate,
    percentiles,
    smooth_weight,
    streaks,
)
from qsmpipe.numerics.kernels import dipole
from qsmpipe.numerics.operators import Dipole, gradient

PRIORS: tuple[Prior, ...] = ("gradient", "identity", "laplacian")
UNEVEN = (1.0, 0.8, 1.5)


@pytest.fixture(scope="module")
def clean() -> Phantom:
    return phantom()


@pytest.fixture(scope="module")
def noisy() -> Phantom:
    return phantom(noise=0.003)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def matrix_of(prior: Prior, shape: Shape) -> np.ndarray:
    """What the prior penalises is the square of this times the map."""
    if prior == "identity":
        return np.eye(np.prod(shape))
    slope = dense(shape, partial(gradient, zooms=UNEVEN))
    return slope if prior == "gradient" else slope.T @ slope


@pytest.mark.parametrize("depth", [4, 5])
def test_sums_over_the_half_spectrum_are_sums_over_the_whole(depth: int) -> None:
    image = random(3, 4, depth)
    half = rfft(image, (3, 4, depth)).abs() ** 2 * copies((3, 4, depth), like=image)
    whole = torch.fft.fftn(image).abs() ** 2
    torch.testing.assert_close(half.sum(), whole.sum())


def test_tsvd_is_its_filter() -> None:
    field = random(9, 9, 9)
    wide = (18, 18, 18)
    k = np.stack(np.meshgrid(*(np.fft.fftfreq(18),) * 3, indexing="ij"))
    squared = (k**2).sum(0)
    squared[0, 0, 0] = 1
    kernel = 1 / 3 - k[2] ** 2 / squared
    kernel[0, 0, 0] = 0
    kept = np.abs(kernel) > 0.2 + 1e-6
    padded = np.zeros(wide)
    padded[:9, :9, :9] = field
    spectrum = np.where(kept, np.fft.fftn(padded), 0) / np.where(kept, kernel, 1)
    chi = tsvd(field, torch.ones(9, 9, 9, dtype=torch.bool), ISOTROPIC, threshold=0.2).chi
    np.testing.assert_allclose(chi.numpy(), np.fft.ifftn(spectrum).real[:9, :9, :9], atol=1e-12)


def test_tsvd_leaves_out_what_tkd_guesses(noisy: Phantom) -> None:
    """The larger the threshold the smoother, and less of everything than by division."""
    sizes = [noisy.invert(tsvd, threshold=delta).chi.norm() for delta in (0.05, 0.1, 0.2, 0.3)]
    assert sizes == sorted(sizes, reverse=True)
    assert noisy.invert(tsvd).chi.norm() < noisy.invert(tkd).chi.norm()


@pytest.mark.parametrize("prior", PRIORS)
def test_l2_is_the_dense_solution_with_every_prior(
    prior: Prior, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[l2.__module__], "PADDING", 0.0)
    shape, lambda_ = (5, 5, 5), 0.03
    field, mask = random(*shape), torch.ones(shape, dtype=torch.bool)
    d = dense(shape, Dipole(shape, dipole(shape, UNEVEN, TILTED, like=field)))
    p = matrix_of(prior, shape)
    right = d.T @ field.reshape(-1).numpy()
    expected = np.linalg.lstsq(d.T @ d + lambda_ * p.T @ p, right, rcond=1e-12)[0]
    expected -= expected.mean()  # the mean is nobody's: the filter has 0 there
    chi = l2(field, mask, UNEVEN, b0_direction=TILTED, prior=prior, lambda_=lambda_).chi
    np.testing.assert_allclose(chi.numpy().reshape(-1), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("weighted", [False, True])
def test_tikhonov_is_the_dense_solution(prior: Prior, weighted: bool) -> None:
    """Over the maps that are 0 outside a mask with holes, data weighted, on the padded grid."""
    shape, lambda_ = (6, 5, 4), 0.03
    field, mask = random(*shape), random(*shape, seed=1) > -1
    mask[0, 0, 0] = mask[5, 4, 3] = True  # the box is the grid
    noise = 1 + random(*shape, seed=2).abs()
    wide = Window.around(field, mask, UNEVEN, padding=0.5).shape
    inside = torch.zeros(wide, dtype=torch.bool)
    inside[:6, :5, :4] = mask
    seen = inside.reshape(-1).numpy()
    d = dense(wide, Dipole(wide, dipole(wide, UNEVEN, TILTED, like=field)))[np.ix_(seen, seen)]
    p = matrix_of(prior, wide)[:, seen]
    w = (noise[mask].median() / noise[mask]).numpy() if weighted else np.ones(seen.sum())
    system = d.T @ (w[:, None] ** 2 * d) + lambda_ * p.T @ p
    expected = np.linalg.solve(system, d.T @ (w**2 * field[mask].numpy()))
    chi, convergence, *_ = tikhonov(
        field, mask, UNEVEN, b0_direction=TILTED, noise=noise if weighted else None, prior=prior,
        lambda_=lambda_, tolerance=1e-12, max_iterations=1000,
    )  # fmt: skip
    assert convergence.converged
    np.testing.assert_allclose(chi[mask].numpy(), expected, rtol=0, atol=1e-8)
    assert not chi[~mask].any()


@pytest.mark.parametrize("prior", PRIORS)
def test_the_norm_of_the_penalty_is_that_of_the_matrix(prior: Prior) -> None:
    shape = (5, 6, 4)
    image = random(*shape)
    weight = penalty(prior, shape, UNEVEN, like=image)
    expected = np.linalg.norm(matrix_of(prior, shape) @ image.reshape(-1).numpy())
    assert penalty_norm(rfft(image, shape), weight, shape) == pytest.approx(expected)


@pytest.mark.parametrize("method", [l2, tikhonov])
def test_priors_that_do_not_exist_are_refused(method: object, clean: Phantom) -> None:
    with pytest.raises(ValueError, match="choose from gradient, identity, laplacian"):
        clean.invert(method, prior="wavelet")


def test_tikhonov_weights_help_where_noise_is_uneven() -> None:
    noise = torch.full((40, 40, 40), 0.002)
    noise[20:] = 0.03
    head = phantom(noise=noise.double())
    plain = error(head.invert(tikhonov).chi, head.chi, head.mask)
    assert error(head.invert(tikhonov, noise=noise).chi, head.chi, head.mask) < 0.6 * plain


def test_tikhonov_beats_l2_that_takes_the_outside_for_0(clean: Phantom, noisy: Phantom) -> None:
    for head in (clean, noisy):
        closed = error(head.invert(l2, lambda_=1e-2).chi, head.chi, head.mask)
        assert error(head.invert(tikhonov, lambda_=1e-2).chi, head.chi, head.mask) < 0.9 * closed


# iLSQR, step by step


def around(head: Phantom) -> tuple[Window, Tensor]:
    window = Window.around(head.field, head.mask, head.zooms, padding=0.5)
    return window, dipole(window.shape, head.zooms, head.b0_direction, like=head.field)


def test_percentiles_and_ramps_are_numpys() -> None:
    values = random(1001).abs()
    low, high = percentiles(values, (30.0, 80.0))
    expected = np.percentile(values.numpy(), (30, 80), method="inverted_cdf")
    np.testing.assert_allclose([low, high], expected)
    ramp = np.interp(values.numpy(), [low.item(), high.item()], [1, 0])
    np.testing.assert_allclose(falling(values, low, high).numpy(), ramp, atol=1e-12)


def test_ilsqr_trusts_smooth_data_whatever_their_sign(clean: Phantom) -> None:
    field = torch.where(clean.mask, clean.field, 0).clone()
    field[20, 20, 20] += 1.0
    field[10, 20, 20] -= 1.0
    weight = data_weight(field, clean.mask, ISOTROPIC)
    assert weight[20, 20, 20] == weight[10, 20, 20] == 0
    assert (weight[clean.mask] == 1).float().mean() > 0.55
    assert (weight[~clean.mask] == 1).all()
    torch.testing.assert_close(data_weight(-field, clean.mask, ISOTROPIC), weight)


def test_ilsqr_of_minus_the_field_is_minus_the_map(noisy: Phantom) -> None:
    """Percentiles of signed values, as public code has them, would break this."""
    chi = noisy.invert(ilsqr).chi
    minus = noisy._replace(field=-noisy.field).invert(ilsqr).chi
    assert error(-minus, chi, noisy.mask) < 1e-6


def test_the_first_step_solves_its_system() -> None:
    shape, wide = (4, 5, 4), (6, 6, 5)
    field, weight = random(*shape), random(*shape, seed=1).abs()
    kernel = dipole(wide, UNEVEN, TILTED, like=field)
    kernel[kernel.abs() < 0.05] = 0  # nothing between solved for and never solved for
    everywhere = torch.ones(wide, dtype=torch.float64)
    everywhere[:4, :5, :4] = weight
    data = torch.zeros(wide, dtype=torch.float64)
    data[:4, :5, :4] = weight * field
    d = dense(wide, Dipole(wide, kernel))
    system = d @ (everywhere.reshape(-1, 1).numpy() * d)
    right = d @ data.reshape(-1).numpy()
    expected = np.linalg.lstsq(system, right, rcond=1e-10)[0]
    chi, convergence = initial_estimate(
        field, weight, kernel, wide, tolerance=1e-13, max_iterations=5000
    )
    assert convergence.converged
    np.testing.assert_allclose(chi.reshape(-1).numpy(), expected, rtol=0, atol=1e-5)


def test_the_streaks_are_the_dense_solution() -> None:
    shape, box = (6, 6, 5), (4, 5, 4)
    chi = random(*shape)
    smooth = random(3, *box, seed=1).abs()
    cone = dipole(shape, UNEVEN, TILTED, like=chi).abs() < 0.12
    only = dense(shape, lambda image: irfft(rfft(image, shape) * cone, shape, shape))
    slope = dense(shape, lambda image: gradient(image, UNEVEN)[:, :4, :5, :4] * smooth)
    expected = np.linalg.pinv(slope @ only, rcond=1e-10) @ (slope @ chi.reshape(-1).numpy())
    found, convergence = streaks(
        chi, smooth, cone, UNEVEN, shape, tolerance=1e-12, max_iterations=2000
    )
    assert convergence.converged
    np.testing.assert_allclose(found.reshape(-1).numpy(), only @ expected, rtol=0, atol=1e-7)


def test_streaks_that_were_put_in_are_taken_out(clean: Phantom) -> None:
    window, kernel = around(clean)
    x, y, z = window.mask.shape
    truth = torch.zeros(window.shape)
    truth[:x, :y, :z] = clean.chi[5:35, 5:35, 5:35]
    cone = kernel.abs() < 0.1
    wrong = irfft(rfft(0.2 * random(*window.shape).float(), window.shape) * cone, window.shape,
                  window.shape)  # fmt: skip
    smooth = smooth_weight(truth[:x, :y, :z], window.mask, ISOTROPIC)
    found, _ = streaks(
        truth + wrong, smooth, cone, ISOTROPIC, window.shape, tolerance=1e-3, max_iterations=100
    )
    before = error(window.back(truth + wrong), clean.chi, clean.mask)
    assert error(window.back(truth + wrong - found), clean.chi, clean.mask) < 0.5 * before


def test_edges_carry_no_weight_and_flat_parts_all(clean: Phantom) -> None:
    weight = smooth_weight(clean.chi, clean.mask, ISOTROPIC)
    steps = gradient(clean.chi, ISOTROPIC).abs()
    for axis in range(3):
        both = clean.mask & clean.mask.roll(-1, axis)
        low, high = np.percentile(steps[axis][both], GRADIENT_PERCENTILES)
        assert (weight[axis][both & (steps[axis] > 1.01 * high)] == 0).all()
        assert (weight[axis][both & (steps[axis] < 0.99 * low)] == 1).all()
        assert not weight[axis][~both].any()


def test_fast_qsm_has_the_scale_of_division_and_no_streaks(clean: Phantom) -> None:
    window, kernel = around(clean)
    fast = window.back(fast_qsm(window.field, window.mask, ISOTROPIC, kernel, window.shape))
    division = clean.invert(tkd, threshold=1 / 8).chi
    slope, offset = np.polyfit(fast[clean.mask], division[clean.mask], 1)
    assert slope == pytest.approx(1, abs=0.03)
    assert offset == pytest.approx(0, abs=1e-3)
    assert np.corrcoef(fast[clean.mask], clean.chi[clean.mask])[0, 1] > 0.8


def test_ilsqr_without_a_cone_is_its_first_step(noisy: Phantom) -> None:
    window, kernel = around(noisy)
    weight = data_weight(window.field, window.mask, ISOTROPIC)
    kernel[kernel.abs() < 1e-6] = 0
    first, _ = initial_estimate(
        window.field, weight, kernel, window.shape, tolerance=1e-3, max_iterations=100
    )
    chi = noisy.invert(ilsqr, threshold=0.0).chi
    torch.testing.assert_close(chi, window.back(first), rtol=0, atol=1e-6)
    assert error(noisy.invert(ilsqr).chi, chi, noisy.mask) > 0.05


# Two levels


@pytest.fixture(scope="module")
def bleeding() -> Phantom:
    """A head with a ball of 1 ppm, where there is next to no signal and so much noise."""
    shape, zooms = (26, 26, 26), (1.5, 1.5, 1.5)
    head = phantom(shape, zooms, dtype=torch.float64)
    x, y, z = torch.meshgrid(*((torch.arange(26) - 12.5) * 1.5,) * 3, indexing="ij")
    depth = 3.5 - ((x - 3) ** 2 + (y - 1) ** 2 + (z + 1) ** 2).sqrt()
    chi = head.chi + torch.sigmoid(depth / 0.35)
    noise = 0.002 * (1 + 30 * torch.sigmoid(depth / 0.35))
    field = Dipole.on_grid(chi, zooms)(chi) + noise * random(*shape)
    return head._replace(field=field.float(), chi=chi.float())


CHOICES = {"lambda_": 5e-4, "max_iterations": 100}


def test_without_a_strong_source_two_levels_are_one(noisy: Phantom) -> None:
    choices = {"lambda_": 2e-4, "max_iterations": 5}
    two = noisy.invert(two_level, strong=5.0, **choices)
    one = noisy.invert(tv, **choices)
    assert torch.equal(two.chi, one.chi)
    assert two.convergence == one.convergence


def test_two_levels_help_where_the_field_of_a_strong_source_is_wrong(bleeding: Phantom) -> None:
    one = error(bleeding.invert(tv, **CHOICES).chi, bleeding.chi, bleeding.mask)
    two = bleeding.invert(two_level, **CHOICES).chi
    all_of_it = bleeding.invert(two_level, strong=0.0, **CHOICES).chi
    assert error(two, bleeding.chi, bleeding.mask) < one
    assert error(all_of_it, bleeding.chi, bleeding.mask) < 0.95 * one
    assert not torch.equal(two, all_of_it)


def test_the_second_level_sees_what_the_first_left(bleeding: Phantom) -> None:
    """By hand: strong voxels of a smooth map, their field taken off, the rest by TV."""
    choices = {"max_iterations": 8}
    first = bleeding.invert(tv, lambda_=5 * 3e-4, **choices).chi
    kept = torch.where(first > 0.1, first, 0.0) + torch.where(first < -0.1, first, 0.0)
    assert kept.any()
    left = bleeding.field - Dipole.on_grid(kept, bleeding.zooms)(kept)
    second = bleeding._replace(field=left).invert(tv, lambda_=3e-4, **choices).chi
    chi = bleeding.invert(two_level, lambda_=3e-4, ratio=5.0, strong=0.1, **choices).chi
    assert error(chi, kept + second, bleeding.mask) < 0.02


def test_two_levels_follow_the_noise_as_tv_does(noisy: Phantom) -> None:
    noise = torch.full_like(noisy.field, 0.002)
    for known in ({}, {"noise": noise}):
        two = noisy.invert(two_level, max_iterations=2, **known)
        assert two.chosen == noisy.invert(tv, max_iterations=2, **known).chosen


@pytest.mark.parametrize(("method", "choice"), [(two_level, "strong"), (ilsqr, "threshold")])
def test_sizes_are_0_or_above(method: object, choice: str, clean: Phantom) -> None:
    with pytest.raises(ValueError, match=f"{choice} is -1"):
        clean.invert(method, **{choice: -1.0})
