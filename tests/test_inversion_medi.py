"""MEDI and NDI: what they promise beyond what every inversion owes."""

import math
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from phantoms import TILTED, Phantom, dense, error, phantom
from scipy.ndimage import binary_erosion
from scipy.optimize import minimize
from scipy.sparse import csr_array
from torch import Tensor

from qsmpipe.numerics.fused import loops
from qsmpipe.numerics.fused.variation import (
    add_variation_diagonal,
    add_variation_slope,
    counted_bits,
    variation_curvature,
)
from qsmpipe.numerics.inversion import medi, ndi, tv
from qsmpipe.numerics.inversion.common import phase_scale
from qsmpipe.numerics.inversion.descent import Problem, minimise
from qsmpipe.numerics.inversion.edges import smooth_parts
from qsmpipe.numerics.kernels import dipole
from qsmpipe.numerics.operators import Dipole, gradient, gradient_adjoint

MEDI, NDI = sys.modules[medi.__module__], sys.modules[ndi.__module__]
ZOOMS = (1.0, 0.8, 1.5)


GRID = (30, 30, 30), (4 / 3, 4 / 3, 4 / 3)


@pytest.fixture(scope="module")
def clean() -> Phantom:
    return phantom(*GRID)


@pytest.fixture(scope="module")
def noisy() -> Phantom:
    return phantom(*GRID, noise=0.003)


def places() -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates from the centre of the grid (mm)."""
    line = (torch.arange(30.0) - 14.5) * GRID[1][0]
    x, y, z = torch.meshgrid(line, line, line, indexing="ij")
    return x, y, z


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The pieces


@pytest.mark.parametrize("looped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(19, 4, 6), (9, 3, 2), (3, 1, 1)])
def test_the_variation_has_its_derivatives(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    looped: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The slope by autograd, the curvature as a matrix with its diagonal."""
    monkeypatch.setattr(loops, "usable", lambda _: looped)
    counted = normal(3, *shape, seed=4) < 0.7
    counted[..., : shape[1] // 2, :] = False  # rows in which nothing is counted
    image = normal(*shape).requires_grad_()
    size = (gradient(image, ZOOMS) ** 2 + 0.3**2).sqrt()
    (0.7 * (counted * size).sum()).backward()
    stiffness = (0.7 * counted / size).detach()

    def curved(x: Tensor) -> Tensor:
        return gradient_adjoint(stiffness * gradient(x, ZOOMS), ZOOMS)

    x, direction = image.detach().to(dtype), normal(*shape, seed=1)
    choices = {"weight": 0.7, "epsilon": 0.3}
    bits, close = counted_bits(counted), {"rtol": 1e-4, "atol": 1e-5}
    slope, diagonal = (torch.full(shape, 2.0, dtype=dtype) for _ in range(2))
    add_variation_slope(x, bits, ZOOMS, **choices, out=slope)
    torch.testing.assert_close(slope, (2 + image.grad).to(dtype), **close)
    add_variation_diagonal(x, bits, ZOOMS, **choices, out=diagonal)
    units = torch.eye(x.numel(), dtype=torch.float64).reshape(-1, *shape)
    expected = torch.stack([(unit * curved(unit)).sum() for unit in units]).reshape(shape)
    # Where an axis has one voxel its difference is 0, which a diagonal by faces does not see.
    if min(shape) > 1:
        torch.testing.assert_close(diagonal, (2 + expected).to(dtype), **close)
    found = variation_curvature(x, direction.to(dtype), bits, ZOOMS, **choices)
    assert found == pytest.approx((direction * curved(direction)).sum().item(), rel=1e-4)


class Tiny:
    """A problem small enough for a slow solver: phase on a corner of a grid, some of it edge."""

    shape, crop = (8, 6, 5), (6, 5, 4)

    def __init__(self, spread: float = 1.0) -> None:
        self.forward = Dipole(self.shape, dipole(self.shape, ZOOMS, TILTED, like=normal(1)))
        truth = torch.zeros(self.shape, dtype=torch.float64)
        truth[1:4, 1:4, 1:3] = spread
        self.weight = 0.5 + normal(*self.crop, seed=2).abs()
        x, y, z = self.crop
        self.phase = self.forward(truth)[:x, :y, :z] + 0.05 * normal(*self.crop, seed=3)
        self.smooth = normal(3, *self.shape, seed=4) < 0.7
        self.problem = Problem(
            shape=self.shape,
            zooms=ZOOMS,
            kernel=self.forward.transfer,
            weight=self.weight**2,
            slope=lambda predicted, _: self.weight**2 * torch.sin(predicted - self.phase),
            counted=counted_bits(self.smooth),
            observed=torch.ones(self.crop, dtype=torch.bool),
            lambda_=0.05,
            epsilon=0.01,
        )

    def objective(self, image: Tensor) -> Tensor:
        x, y, z = self.crop
        misfit = self.weight**2 * (1 - torch.cos(self.forward(image)[:x, :y, :z] - self.phase))
        size = (gradient(image, ZOOMS) ** 2 + 0.01**2).sqrt()
        return misfit.sum() + 0.05 * (self.smooth * size).sum()

    def slow(self) -> float:
        """Least objective, by L-BFGS on matrices."""
        x, y, z = self.crop
        seen = dense(self.shape, lambda image: self.forward(image)[:x, :y, :z])
        steep = csr_array(dense(self.shape, partial(gradient, zooms=ZOOMS)))
        phase, weight = self.phase.numpy().ravel(), self.weight.numpy().ravel() ** 2
        smooth = 0.05 * self.smooth.numpy().ravel()

        def value(image: np.ndarray) -> tuple[float, np.ndarray]:
            off, slope = seen @ image - phase, steep @ image
            size = np.sqrt(slope**2 + 0.01**2)
            least = seen.T @ (weight * np.sin(off)) + steep.T @ (smooth * slope / size)
            return weight @ (1 - np.cos(off)) + smooth @ size, least

        return least_of(value, math.prod(self.shape))


def least_of(objective: Callable[[np.ndarray], tuple[float, np.ndarray]], unknowns: int) -> float:
    """Least value of a smooth function that also gives its slope, from 0 by L-BFGS."""
    options = {"maxiter": 9000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-9}
    start = np.zeros(unknowns)
    return minimize(objective, start, method="L-BFGS-B", jac=True, options=options).fun


def test_the_descent_reaches_the_objective_of_a_slow_solver() -> None:
    tiny = Tiny()
    image, convergence = minimise(tiny.problem, rounding=0.1, tolerance=1e-6, max_iterations=3000)
    slow = tiny.slow()
    assert convergence.converged
    assert tiny.objective(torch.zeros_like(image)) > 1.1 * slow
    assert tiny.objective(image) == pytest.approx(slow, rel=1e-4)


def test_no_step_goes_uphill() -> None:
    tiny = Tiny(spread=2.0)
    values = []
    for steps in range(25):
        image, end = minimise(tiny.problem, tolerance=0.0, max_iterations=steps)
        values.append(tiny.objective(image).item())
        assert end.iterations == steps
        assert not end.converged
    assert all(after <= before + 1e-12 for before, after in pairwise(values))
    assert values[-1] < 0.7 * values[0]


def test_the_descent_ends_where_nothing_is_steep() -> None:
    problem = Tiny().problem
    problem.slope = lambda predicted, _: predicted
    image, end = minimise(problem, rounding=0.1, tolerance=0.0, max_iterations=50)
    assert not image.any()
    assert end.converged
    assert (end.iterations, end.change) == (0, 0.0)


def test_medi_takes_tens_of_steps(noisy: Phantom) -> None:
    end = noisy.invert(medi).convergence
    assert end.converged
    assert end.iterations <= 100


def test_the_outermost_voxels_have_no_edges() -> None:
    mask = normal(9, 8, 7) < 1.2
    smooth = smooth_parts(normal(9, 8, 7, seed=1).abs(), mask, ZOOMS, edges=0.4)
    core = torch.from_numpy(binary_erosion(mask.numpy()))
    within = torch.stack([core & core.roll(-1, axis) for axis in range(3)])
    assert smooth[~within].all()
    assert (~smooth[within]).sum().item() == pytest.approx(0.4 * within.sum().item(), abs=1)


# MEDI


def test_medi_descends_on_its_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    """Edges, weights, unit and weight of the data arrive where the formula has them."""
    monkeypatch.setattr(MEDI, "REACH", 0.0)
    solve, found = MEDI.minimise, []

    def kept(*arguments: Any, **choices: Any) -> Any:
        found.append(solve(*arguments, **choices))
        return found[-1]

    monkeypatch.setattr(MEDI, "minimise", kept)
    shape, wide, lambda_ = (6, 5, 4), (8, 8, 5), 40.0
    scale = phase_scale(7.0, [0.01, 0.02])
    forward = Dipole(wide, dipole(wide, ZOOMS, TILTED, like=normal(1)))
    truth = torch.zeros(wide, dtype=torch.float64)
    truth[1:4, 1:4, 1:3] = 0.05
    field = forward(truth)[:6, :5, :4] + 1e-3 * normal(*shape)
    noise = (1 + normal(*shape, seed=1).abs()) * 1e-3
    mask = torch.ones(shape, dtype=torch.bool)
    mask[0, 0] = False
    magnitude = 1 + normal(*shape, seed=2)
    chi = medi(
        field, mask, ZOOMS, b0_direction=TILTED, noise=noise, magnitude=magnitude, edges=0.4,
        lambda_=lambda_, field_strength=7.0, echo_times=[0.01, 0.02], tolerance=1e-7,
        max_iterations=5000,
    ).chi  # fmt: skip
    weight = torch.where(mask, (noise[mask].median() / noise).clamp(max=5), 0)
    smooth = torch.ones(3, *wide, dtype=torch.bool)
    smooth[:, :6, :5, :4] = MEDI.smooth_parts(magnitude, mask, ZOOMS, edges=0.4)

    seen = dense(wide, lambda image: forward(image)[:6, :5, :4])
    steep = csr_array(dense(wide, partial(gradient, zooms=ZOOMS)))
    trust, edge = weight.numpy().ravel(), smooth.numpy().ravel()
    measured = np.exp(1j * scale * field.numpy().ravel())

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        predicted, slope = np.exp(1j * (seen @ x)), steep @ x
        size = np.sqrt(slope**2 + MEDI.EPSILON**2)
        value = lambda_ * (np.abs(trust * (predicted - measured)) ** 2).sum() + edge @ size
        turned = 2 * lambda_ * trust**2 * (predicted * measured.conj()).imag
        return value, seen.T @ turned + steep.T @ (edge * slope / size)

    slow = least_of(objective, 320)
    ((image, convergence),) = found
    assert convergence.converged
    assert objective(np.zeros(320))[0] > 1.3 * slow
    assert objective(image.numpy().ravel())[0] == pytest.approx(slow, rel=1e-3)
    torch.testing.assert_close(chi, torch.where(mask, image[:6, :5, :4] / scale, 0))


def test_medi_edges_of_the_magnitude_cost_nothing(clean: Phantom) -> None:
    """With a weight that flattens all else the balls come out at their height."""
    strong = {"lambda_": 5.0, "magnitude": 1 + clean.chi}
    with_edges = error(clean.invert(medi, **strong).chi, clean.chi, clean.mask)
    without = error(clean.invert(medi, **strong, edges=0.0).chi, clean.chi, clean.mask)
    assert with_edges < 0.1 < 0.5 * without
    nothing = clean.invert(medi, lambda_=5.0).chi
    assert torch.equal(clean.invert(medi, **strong, edges=0.0).chi, nothing)


def test_medi_bears_wraps_that_are_left_and_tv_does_not(clean: Phantom) -> None:
    """A ball whose phase is off by 2 pi, which is 0.39 ppm."""
    x, y, z = places()
    ball = (x - 6) ** 2 + (y - 5) ** 2 + z**2 < 3**2
    scale = phase_scale(None, None)
    wrapped = clean._replace(field=clean.field + ball * (2 * math.pi / scale))
    ours = error(wrapped.invert(medi).chi, clean.chi, clean.mask)
    assert ours < 1.2 * error(clean.invert(medi).chi, clean.chi, clean.mask)
    assert error(wrapped.invert(tv).chi, clean.chi, clean.mask) > 4 * ours


def test_medi_finds_sources_whose_phase_is_beyond_pi() -> None:
    """A ball of 2 ppm at 3 T."""
    x, y, z = places()
    ball = 2 * torch.sigmoid((4 - (x**2 + y**2 + z**2).sqrt()) / 0.5)
    head = phantom(*GRID)
    head = head._replace(chi=ball, field=Dipole.on_grid(ball, head.zooms)(ball))
    assert (head.field[head.mask] * phase_scale(None, None)).abs().max() > 2 * math.pi
    assert error(head.invert(medi).chi, head.chi, head.mask) < 0.1


def test_medi_merit_weighs_down_what_is_no_phase(clean: Phantom) -> None:
    """Single voxels with any phase: noise of another kind than the map of noise knows."""
    generator = torch.Generator().manual_seed(0)
    bad = torch.rand(clean.field.shape, generator=generator) < 0.01
    spoilt = clean._replace(
        field=torch.where(bad, 0.18 * torch.sign(normal(*GRID[0])).float(), clean.field)
    )
    plain = error(spoilt.invert(medi).chi, clean.chi, clean.mask)
    assert error(spoilt.invert(medi, merit=True).chi, clean.chi, clean.mask) < 0.7 * plain


def test_medi_smv_takes_off_what_is_left_of_the_background(clean: Phantom) -> None:
    x, y, z = places()
    left = clean._replace(field=clean.field + 1e-4 * (2 * z**2 - x**2 - y**2) + 2e-3 * x * y / 5)
    plain = error(left.invert(medi).chi, clean.chi, clean.mask)
    without = left.invert(medi, radius=4.0)
    assert error(without.chi, clean.chi, clean.mask) < 0.5 * plain
    with pytest.raises(ValueError, match="smaller one"):
        left.invert(medi, radius=40.0)


def test_medi_evens_out_the_ventricles(noisy: Phantom, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, z = places()
    fluid = (x + 2) ** 2 + (y + 2) ** 2 + (z + 1) ** 2 < 5**2
    r2star = torch.full_like(noisy.field, 20.0)
    monkeypatch.setattr(MEDI, "ventricles", lambda r, mask, zooms, magnitude: fluid & (r > 10))
    spread = [
        noisy.invert(medi, r2star=r2star, csf_weight=weight).chi[fluid].std().item()
        for weight in (0.0, 1.0, 100.0)
    ]
    assert spread[2] < 0.3 * spread[0]
    assert spread == sorted(spread, reverse=True)
    with pytest.raises(ValueError, match="give r2star"):
        noisy.invert(medi, csf_weight=1.0)


def test_medi_weight_follows_the_noise(noisy: Phantom) -> None:
    noise = torch.full_like(noisy.field, 0.003)
    chosen = noisy.invert(medi, noise=noise, field_strength=7.0, max_iterations=1).chosen
    weight = MEDI.LAMBDA_PER_NOISE * 0.003
    assert chosen == {"lambda_": pytest.approx(1 / (2 * phase_scale(7.0, None) * weight))}
    same = noisy.invert(medi, noise=noise, lambda_=chosen["lambda_"], field_strength=7.0).chi
    assert torch.equal(noisy.invert(medi, noise=noise, field_strength=7.0).chi, same)


def test_medi_trusts_the_quiet_half() -> None:
    noise = torch.full(GRID[0], 0.002)
    noise[15:] = 0.03
    head = phantom(*GRID, noise=noise.double())
    plain = error(head.invert(medi).chi, head.chi, head.mask)
    assert error(head.invert(medi, noise=noise).chi, head.chi, head.mask) < 0.6 * plain


# NDI


def test_ndi_is_descent_on_its_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NDI, "PADDING", 0.25)
    shape, wide, alpha, step = (6, 5, 4), (8, 8, 5), 0.02, 0.8
    forward = Dipole(wide, dipole(wide, ZOOMS, TILTED, like=normal(1)))
    field, mask = 0.05 * normal(*shape), torch.ones(shape, dtype=torch.bool)
    mask[0, 0] = False
    noise = 1 + normal(*shape, seed=1).abs()
    weight = torch.where(mask, (noise[mask].median() / noise).clamp(max=1), 0)
    phase = torch.exp(1j * phase_scale(None, None) * torch.where(mask, field, 0))
    image = torch.zeros(wide, dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        misfit = weight * (torch.exp(1j * forward(image)[:6, :5, :4]) - phase)
        value = misfit.abs().square().sum() + alpha / 2 * image.square().sum()
        (slope,) = torch.autograd.grad(value, image)
        image = (image - step * slope).detach().requires_grad_()
    expected = torch.where(mask, image.detach()[:6, :5, :4], 0) / phase_scale(None, None)
    chi = ndi(
        field, mask, ZOOMS, b0_direction=TILTED, noise=noise, step=step, alpha=alpha,
        tolerance=0.0, max_iterations=3,
    ).chi  # fmt: skip
    torch.testing.assert_close(chi, expected, rtol=0, atol=1e-12)


def test_ndi_early_steps_regularise() -> None:
    """With noise the error falls and rises again; without it goes on falling."""

    def errors(head: Phantom) -> list[float]:
        return [
            error(head.invert(ndi, tolerance=0.0, max_iterations=n).chi, head.chi, head.mask)
            for n in (1, 6, 200)
        ]

    first, middle, last = errors(phantom(*GRID, noise=0.005))
    assert middle < first
    assert middle < 0.8 * last
    clean = errors(phantom(*GRID))
    assert clean == sorted(clean, reverse=True)


def test_ndi_does_not_see_wraps(noisy: Phantom) -> None:
    scale = phase_scale(None, None)
    turns = torch.randint(-1, 2, noisy.field.shape, generator=torch.Generator().manual_seed(0))
    wrapped = noisy._replace(field=noisy.field + turns * (2 * math.pi / scale))
    chi = noisy.invert(ndi).chi
    assert error(wrapped.invert(ndi).chi, chi, noisy.mask) < 1e-4


def test_ndi_tikhonov_makes_the_map_smaller(noisy: Phantom) -> None:
    sizes = [noisy.invert(ndi, alpha=alpha).chi.norm().item() for alpha in (0.0, 0.05, 0.5)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < 0.7 * sizes[0]
    with pytest.raises(ValueError, match="alpha"):
        noisy.invert(ndi, alpha=-1.0)


def test_ndi_weighs_little_where_noise_is_large(clean: Phantom) -> None:
    noise = torch.full_like(clean.field, 0.002)
    noise[15:] = 0.05
    head = phantom(*GRID, noise=noise.double())
    plain = error(head.invert(ndi).chi, head.chi, head.mask)
    assert error(head.invert(ndi, noise=noise).chi, head.chi, head.mask) < 0.6 * plain


@pytest.mark.parametrize("method", [medi, ndi])
def test_field_strength_and_echo_times_are_the_phase(method: Any, noisy: Phantom) -> None:
    fixed = {"lambda_": 100.0} if method is medi else {}
    one = noisy.invert(method, field_strength=7.0, echo_times=[0.01, 0.03], **fixed)
    other = noisy.invert(method, field_strength=3.5, echo_times=[0.04], **fixed)
    torch.testing.assert_close(one.chi, other.chi, rtol=0, atol=1e-6)
