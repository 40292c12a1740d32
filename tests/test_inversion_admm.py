"""Total variation and its relatives by ADMM: what each promises of its own."""

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from phantoms import TILTED, Phantom, dense, error, phantom, slow_minimum
from scipy.sparse import csr_array
from torch import Tensor

from qsmpipe.numerics.inversion import (
    Susceptibility,
    hdqsm,
    l1qsm,
    nltgv,
    nltv,
    tgv,
    tv,
    whqsm,
)
from qsmpipe.numerics.inversion.admm import Grid
from qsmpipe.numerics.inversion.common import phase_scale
from qsmpipe.numerics.inversion.nonlinear import run_on_phase
from qsmpipe.numerics.inversion.weak_harmonic import WeakHarmonic
from qsmpipe.numerics.kernels import dipole, laplacian
from qsmpipe.numerics.operators import Dipole, gradient

Method = Callable[..., Susceptibility]
PER_PPM = phase_scale(None, None)
SETTLED = {"tolerance": 1e-7, "max_iterations": 4000}
GRID = (30, 30, 30), (4 / 3, 4 / 3, 4 / 3)


@pytest.fixture(scope="module")
def noisy() -> tuple[Phantom, Tensor]:
    """A head with noise of 0.003 ppm, and its noise map."""
    head = phantom(*GRID, noise=0.003)
    return head, torch.full_like(head.field, 0.003)


def places() -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates from the centre of the grid (mm)."""
    line = (torch.arange(30.0) - 14.5) * GRID[1][0]
    x, y, z = torch.meshgrid(line, line, line, indexing="ij")
    return x, y, z


def wrong(head: Phantom, method: Method, truth: Phantom, **choices: Any) -> float:
    return error(head.invert(method, **choices).chi, truth.chi, truth.mask)


# Slow solvers of the same objectives


class Tiny:
    """A field on 6 x 5 x 4 voxels, and its operators as matrices over the mask's voxels."""

    shape, wide, zooms = (6, 5, 4), (10, 9, 8), (1.0, 0.8, 1.5)
    """``wide`` is what the methods pad to without reach: by a voxel on either side and then by a
    quarter, to a fast size."""

    def __init__(self, size: float, *, ramp: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal() -> Tensor:
            return torch.randn(self.shape, generator=generator, dtype=torch.float64)

        self.mask = torch.ones(self.shape, dtype=torch.bool)
        self.mask[0, 0], self.mask[5, 4, 3] = False, False
        x = torch.arange(6.0, dtype=torch.float64)[:, None, None].expand(self.shape) / 3
        truth = size * torch.where(self.mask, x if ramp else normal(), 0)
        self.noise = 1 + 3 * torch.rand(self.shape, generator=generator, dtype=torch.float64)
        forward = Dipole(self.wide, dipole(self.wide, self.zooms, TILTED, like=truth))
        self.field = forward(truth) + 0.05 * size * normal()
        inside = self.mask.flatten().numpy()
        self.dipole = dense(self.shape, forward)[np.ix_(inside, inside)]
        self.gradient = csr_array(dense(self.shape, self.slopes)[:, inside])
        self.measured = self.field[self.mask].numpy()
        self.weight = (self.noise[self.mask].median() / self.noise[self.mask]).numpy()

    def slopes(self, chi: Tensor) -> Tensor:
        """Gradient of a map on the padded grid."""
        placed = chi.new_zeros(self.wide)
        placed[: self.shape[0], : self.shape[1], : self.shape[2]] = chi
        return gradient(placed, self.zooms)

    def invert(self, method: Method, **choices: Any) -> np.ndarray:
        chi = method(
            self.field, self.mask, self.zooms, b0_direction=TILTED, noise=self.noise,
            **SETTLED, **choices,
        ).chi  # fmt: skip
        return chi[self.mask].numpy()


def size(x: np.ndarray, rounding: float) -> tuple[float, np.ndarray]:
    """Norm, rounded near 0, and its slope."""
    each = np.sqrt(x**2 + rounding**2)
    return each.sum(), x / np.maximum(each, 1e-300)


def no_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without reach the map is 0 outside the mask, so that a method returns all of it."""
    for method in (tv, nltv, l1qsm, tgv):
        monkeypatch.setattr(sys.modules[method.__module__], "REACH", 0.0)


SMALL_FIELD, LAMBDA = 0.05, 2e-4
"""Size of the susceptibility (ppm) of the tiny maps: below a turn, in the convex part."""
ROUNDINGS = tuple(10.0 ** -np.arange(3, 8))


@pytest.mark.parametrize("data", ["phase", "absolute phase"])
def test_nltv_and_l1qsm_reach_the_objective_of_a_slow_solver(
    data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_reach(monkeypatch)
    tiny = Tiny(SMALL_FIELD)
    lambda_ = LAMBDA if data == "phase" else 0.05

    def objective(chi: np.ndarray, rounding: float = 0.0) -> tuple[float, np.ndarray]:
        half = PER_PPM * (tiny.dipole @ chi - tiny.measured) / 2
        misfit = tiny.weight * np.sin(half)
        if data == "phase":
            cost, slope = 2 * misfit @ misfit / PER_PPM**2, 2 * misfit / PER_PPM
        else:
            cost, slope = size(misfit, rounding)
            cost *= 2 / PER_PPM
        variation, bend = size(tiny.gradient @ chi, rounding)
        slope = tiny.dipole.T @ (slope * tiny.weight * np.cos(half))
        return cost + lambda_ * variation, slope + lambda_ * (tiny.gradient.T @ bend)

    nothing = np.zeros_like(tiny.measured)
    slow = objective(slow_minimum(objective, nothing, roundings=ROUNDINGS))[0]
    ours = objective(tiny.invert(nltv if data == "phase" else l1qsm, lambda_=lambda_))[0]
    assert objective(nothing)[0] > 1.3 * slow
    assert abs(ours - slow) < 2e-3 * slow


def test_tgv_reaches_the_objective_of_a_slow_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow solver finds the vector field as well; ours is minimised for the map found."""
    no_reach(monkeypatch)
    tiny = Tiny(SMALL_FIELD, ramp=True)
    ratio, voxels, slopes = 0.5, len(tiny.measured), 3 * math.prod(tiny.wide)

    def symmetric(w: Tensor) -> Tensor:
        back = torch.stack([(w - w.roll(1, n - 3)) / zoom for n, zoom in enumerate(tiny.zooms)])
        return (back + back.transpose(0, 1)) / 2

    curvature = csr_array(dense((3, *tiny.wide), symmetric))

    def variation(
        steep: np.ndarray, w: np.ndarray, rounding: float
    ) -> tuple[float, np.ndarray, np.ndarray]:
        """Of a map whose gradient is ``steep``, with its slopes along that and along w."""
        first, along = size(steep - w, rounding)
        second, bend = size(curvature @ w, rounding)
        return first + ratio * second, along, ratio * (curvature.T @ bend) - along

    def objective(both: np.ndarray, rounding: float = 0.0) -> tuple[float, np.ndarray]:
        chi, w = both[:voxels], both[voxels:]
        misfit = tiny.weight * (tiny.dipole @ chi - tiny.measured)
        cost, along, of_w = variation(tiny.gradient @ chi, w, rounding)
        of_chi = tiny.dipole.T @ (tiny.weight * misfit) + LAMBDA * (tiny.gradient.T @ along)
        return misfit @ misfit / 2 + LAMBDA * cost, np.concatenate([of_chi, LAMBDA * of_w])

    start = np.zeros(voxels + slopes)
    slow = objective(slow_minimum(objective, start, roundings=ROUNDINGS))[0]
    found = tiny.invert(tgv, lambda_=LAMBDA, ratio=ratio)
    steep = tiny.gradient @ found

    def given(w: np.ndarray, rounding: float) -> tuple[float, np.ndarray]:
        cost, _, slope = variation(steep, w, rounding)
        return LAMBDA * cost, LAMBDA * slope

    w = slow_minimum(given, np.zeros(slopes), roundings=ROUNDINGS)
    ours = objective(np.concatenate([found, w]))[0]
    without = objective(np.concatenate([found, np.zeros(slopes)]))[0]
    assert without > 1.015 * slow  # the vector field matters
    assert abs(ours - slow) < 5e-3 * slow


# Nonlinear methods


@pytest.mark.parametrize(("linear", "nonlinear"), [(tv, nltv), (tgv, nltgv)], ids=["tv", "tgv"])
def test_of_small_phase_nonlinear_is_linear(linear: Method, nonlinear: Method) -> None:
    head = phantom((20, 20, 20), (2.0, 2.0, 2.0), noise=0.003)
    settled = {"tolerance": 1e-6, "max_iterations": 400, "rho": 200.0, "mu": 0.3}
    expected = head.invert(linear, **settled)
    short = {"echo_times": [2e-3], "field_strength": 3.0}
    found = head.invert(nonlinear, **short, **settled)
    assert found.chosen == expected.chosen
    assert error(found.chi, expected.chi, head.mask) < 0.02
    longer = {"echo_times": [0.1], "field_strength": 7.0}
    assert error(head.invert(nonlinear, **longer).chi, expected.chi, head.mask) > 0.02


@pytest.mark.parametrize("method", [nltv, l1qsm])
def test_places_unwrapped_wrongly_do_no_harm(
    method: Method, noisy: tuple[Phantom, Tensor]
) -> None:
    head, noise = noisy
    generator = torch.Generator().manual_seed(5)
    turns = torch.zeros_like(head.field)
    for corner in torch.randint(6, 22, (9, 3), generator=generator).tolist():
        turns[tuple(slice(i, i + 3) for i in corner)] += 1
    assert turns[head.mask].count_nonzero() > 100
    jumping = head._replace(field=head.field + turns * (2 * math.pi / PER_PPM))
    assert wrong(jumping, method, head, noise=noise) < 1.1 * wrong(head, method, head, noise=noise)
    if method is nltv:
        assert wrong(jumping, tv, head, noise=noise) > 10 * wrong(head, tv, head, noise=noise)


@pytest.mark.parametrize("method", [nltv, l1qsm])
def test_phase_beyond_half_a_turn_is_followed(method: Method) -> None:
    """A calcification whose field is 10 rad."""
    head = phantom(*GRID, noise=0.003)
    x, y, z = places()
    r2 = (x - 3) ** 2 + (y - 6) ** 2 + (z - 6) ** 2
    chi = -2 * torch.sigmoid((4 - r2.sqrt()) / 0.35)
    strong = head._replace(
        chi=head.chi + chi, field=head.field + Dipole.on_grid(chi, head.zooms)(chi)
    )
    assert (PER_PPM * strong.field[head.mask]).abs().max() > 9
    noise = torch.full_like(head.field, 0.003)
    assert wrong(strong, method, strong, noise=noise) < 0.05


# Gross errors of single voxels


def spoilt(head: Phantom, by: float, voxels: int = 8) -> Phantom:
    generator = torch.Generator().manual_seed(3)
    inside = head.mask.nonzero()
    chosen = inside[torch.randperm(len(inside), generator=generator)[:voxels]]
    field = head.field.clone()
    field[tuple(chosen.T)] += by * torch.randn(voxels, generator=generator).sign()
    return head._replace(field=field)


@pytest.mark.parametrize(("method", "lost"), [(l1qsm, 1.05), (hdqsm, 1.15), (nltv, 1.3)])
def test_bad_voxels_are_forgiven(
    method: Method, lost: float, noisy: tuple[Phantom, Tensor]
) -> None:
    head, noise = noisy
    bad = spoilt(head, 0.2)
    assert wrong(bad, tv, head, noise=noise) > 3 * wrong(head, tv, head, noise=noise)
    clean = wrong(head, method, head, noise=noise)
    assert wrong(bad, method, head, noise=noise) < lost * clean


def test_hdqsm_without_misfit_to_speak_of_is_tv() -> None:
    """From the map of the first stage, but to the same end, when the misfits are all alike."""
    head = phantom(*GRID)
    field = torch.where(head.mask, 0.0, head.field)
    assert not head._replace(field=field).invert(hdqsm).chi.any()
    expected = head.invert(tv, lambda_=1e-2, tolerance=1e-5, max_iterations=1000).chi
    # One voxel that is wrong beyond all others: their weights stay at 1, its own is 0.
    bad = spoilt(head, 50.0, voxels=1)
    found = bad.invert(hdqsm, lambda_=1e-2, tolerance=1e-5, max_iterations=1000).chi
    assert error(found, expected, head.mask) < 0.02


def test_hdqsm_stages_each_do_something(noisy: tuple[Phantom, Tensor]) -> None:
    head, noise = noisy
    bad = spoilt(head, 0.2)
    maps = [
        bad.invert(hdqsm, noise=noise, **choice).chi
        for choice in ({}, {"l1_lambda": 1.0}, {"l1_iterations": 2}, {"lambda_": 1e-3})
    ]
    for other in maps[1:]:
        assert error(other, maps[0], head.mask) > 2e-3


# What is left of the background


def background(amplitude: float) -> Tensor:
    """Harmonic polynomials of first and second order (ppm)."""
    x, y, z = (each / 15 for each in places())
    return amplitude * (x - 0.5 * y + x * y + z**2 - x**2 + y * z)


def test_whqsm_takes_out_a_harmonic_field(noisy: tuple[Phantom, Tensor]) -> None:
    head, noise = noisy
    left = head._replace(field=head.field + background(0.02))
    assert wrong(left, nltv, head, noise=noise) > 1.0
    assert wrong(left, whqsm, head, noise=noise) < 0.25
    expected, found = (h.invert(whqsm, noise=noise).chi for h in (head, left))
    assert error(found, expected, head.mask) < 0.1


def test_the_remnant_is_the_harmonic_field(noisy: tuple[Phantom, Tensor]) -> None:
    head, _ = noisy
    added = PER_PPM * background(0.05)
    grid = Grid.around(
        PER_PPM * head.field + added, head.mask, head.zooms, head.b0_direction,
        padding=0.25, reach=0.0,
    )  # fmt: skip
    solver = WeakHarmonic(grid, rho=100 / PER_PPM, mu=1.0, beta=150.0, nu=3.0)
    weight = head.mask.to(head.field)
    choices = {"lambda_": 2e-4, "tolerance": 1e-3, "max_iterations": 200}
    run_on_phase(solver, weight, PER_PPM, {}, **choices)
    remnant = solver.harmonic()
    assert error(remnant, added, head.mask) < 0.1
    bend = Dipole(grid.window.shape, laplacian(grid.window.shape, head.zooms, like=weight))
    x, y, z = places()
    core = x**2 + y**2 + z**2 < 13**2
    assert bend(remnant)[core].norm() < 0.02 * added[core].norm()


def test_whqsm_more_weight_is_more_harmonic(noisy: tuple[Phantom, Tensor]) -> None:
    """A source inside is no remnant, unless its field may bend at will."""
    head, noise = noisy
    loose, tight = (wrong(head, whqsm, head, noise=noise, beta=beta) for beta in (1.0, 150.0))
    assert tight < 0.9 * loose


def test_whqsm_penalties_do_not_decide_on_the_solution() -> None:
    head = phantom((20, 20, 20), (2.0, 2.0, 2.0), noise=0.003)
    settled = {"tolerance": 1e-6, "max_iterations": 2000}
    expected = head.invert(whqsm, **settled).chi
    for choice in ({"nu": 2.0}, {"mu": 0.5}, {"rho": 200.0}):
        assert error(head.invert(whqsm, **settled, **choice).chi, expected, head.mask) < 0.02


# Edges and slopes


@pytest.mark.parametrize("method", [tv, nltv])
def test_edges_of_the_magnitude_stay_sharp(method: Method, noisy: tuple[Phantom, Tensor]) -> None:
    """Much regularisation flattens the map, except where the magnitude has its edges."""
    head, _ = noisy
    magnitude = 1 + 5 * head.chi
    choices = {"lambda_": 3e-3, "magnitude": magnitude}
    plain = wrong(head, method, head, **choices)
    weighted = wrong(head, method, head, edges=0.1, **choices)
    assert weighted < 0.7 * plain
    steep = gradient(head.chi, head.zooms).abs()
    places = steep > 0.5 * steep.max()

    def height(chi: Tensor) -> float:
        return (gradient(chi, head.zooms).abs()[places].mean() / steep[places].mean()).item()

    sharp = height(head.invert(method, edges=0.1, **choices).chi)
    assert sharp > 1.2 * height(head.invert(method, **choices).chi)
    assert sharp > 0.8


def test_edges_need_a_magnitude_and_its_unit_is_free(noisy: tuple[Phantom, Tensor]) -> None:
    head, noise = noisy
    magnitude = 1 + 5 * head.chi
    few = {"noise": noise, "max_iterations": 20}
    plain = head.invert(tv, **few).chi
    assert torch.equal(head.invert(tv, edges=0.1, **few).chi, plain)
    assert torch.equal(head.invert(tv, magnitude=magnitude, edges=0.0, **few).chi, plain)
    found = head.invert(tv, magnitude=magnitude, edges=0.1, **few).chi
    assert not torch.equal(found, plain)
    scaled = torch.where(head.mask, 64 * magnitude, torch.nan)
    assert torch.equal(head.invert(tv, magnitude=scaled, edges=0.1, **few).chi, found)
    with pytest.raises(ValueError, match="edges is 1"):
        head.invert(tv, magnitude=magnitude, edges=1.0)


def test_tgv_keeps_slopes_that_tv_makes_stairs_of() -> None:
    """A wedge under much regularisation: total variation flattens it."""
    head = phantom(*GRID)
    chi = torch.where(head.mask, 0.004 * places()[0], 0.0)
    wedge = head._replace(chi=chi, field=Dipole.on_grid(chi, head.zooms)(chi))
    choices = {"lambda_": 5e-4}
    flat = wrong(wedge, tv, wedge, **choices)
    assert wrong(wedge, tgv, wedge, **choices) < 0.8 * flat
    assert wrong(wedge, tgv, wedge, ratio=8.0, **choices) == pytest.approx(flat, rel=0.1)


@pytest.mark.parametrize("choice", [{"rho": 100.0}, {"mu": 0.3}])
def test_tgv_penalties_do_not_decide_on_the_solution(choice: dict[str, float]) -> None:
    head = phantom((20, 20, 20), (2.0, 2.0, 2.0), noise=0.003)
    settled = {"tolerance": 1e-5, "max_iterations": 2000}
    expected = head.invert(tgv, **settled).chi
    assert error(head.invert(tgv, **settled, **choice).chi, expected, head.mask) < 0.02


@pytest.mark.parametrize("method", [nltv, tgv, l1qsm, hdqsm])
def test_sources_just_outside_the_mask_stay_outside(method: Method) -> None:
    """The mask is eroded by 3 mm, the field still has the sources of the shell."""
    head = phantom(*GRID)
    x, y, z = places()
    inner = head._replace(mask=x**2 + y**2 + z**2 < 12**2)
    assert wrong(inner, method, inner) < 0.25
