"""Single-step TV: the total field goes in, and the background must not matter."""

import math

import numpy as np
import pytest
import torch
from phantoms import TILT, Phantom, dense, error, phantom, slow_minimum
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.inversion import single_step, sstv, tv
from qsmpipe.numerics.inversion.common import Window
from qsmpipe.numerics.kernels import dipole
from qsmpipe.numerics.operators import Dipole, gradient


def outside(head: Phantom, strength: float = 80.0) -> Tensor:
    """Field (ppm) of a dipole just below the head, by its formula, as in the air of a sinus."""
    axes = [
        (torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * zoom
        for n, zoom in zip(head.mask.shape, head.zooms, strict=True)
    ]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    x, z = x - 4.0, z + 19.5
    r = (x**2 + y**2 + z**2).sqrt().clamp_min(1.0)
    along = (x * head.b0_direction[0] + z * head.b0_direction[2]) / r
    return (strength * (3 * along**2 - 1) / r**3).to(head.field)


GRID = (30, 30, 30), (4 / 3, 4 / 3, 4 / 3)


@pytest.mark.parametrize(
    ("shape", "zooms", "tilt"),
    [(*GRID, 0.0), ((41, 33, 23), (0.8, 1.0, 1.4), TILT)],
    ids=["plain", "odd anisotropic tilted"],
)
def test_sources_outside_do_not_matter(
    shape: tuple[int, int, int], zooms: Zooms, tilt: float
) -> None:
    head = phantom(shape, zooms, tilt=tilt, noise=0.001)
    background = outside(head)
    assert background[head.mask].std() > 2 * head.field[head.mask].std()
    noise = torch.full_like(head.field, 0.001)
    clean = head.invert(sstv, noise=noise).chi
    whole = head._replace(field=head.field + background)
    found = whole.invert(sstv, noise=noise).chi
    assert error(found, head.chi, head.mask) < 0.7 * error(clean, head.chi, head.mask) + 0.15
    # what the same field does to an inversion that takes it for local
    taken = error(whole.invert(tv, noise=noise).chi, head.chi, head.mask)
    assert error(found, head.chi, head.mask) < 0.7 * taken


@pytest.mark.parametrize("power", ["x", "xy", "x2-y2", "xyz"])
def test_harmonic_polynomials_leave_nothing(power: str) -> None:
    head = phantom(*GRID)
    x, y, z = (torch.from_numpy(g).float() for g in (np.indices(GRID[0]) - 14.5) * GRID[1][0])
    field = {"x": x, "xy": x * y / 10, "x2-y2": (x**2 - y**2) / 10, "xyz": x * y * z / 100}[power]
    chi = head._replace(field=0.01 * field).invert(sstv, lambda_=1e-4).chi
    assert chi[head.mask].abs().max() < 2e-3


def test_each_voxel_has_the_largest_ball_that_fits() -> None:
    """By brute force, from the distances to what is not in the mask."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand((17, 15, 16), generator=generator) > 0.002
    mask[0], mask[:, 0], mask[:, :, 0] = False, False, False
    mask[-1], mask[:, -1], mask[:, :, -1] = False, False, False
    zooms = (1.0, 0.8, 1.2)
    window = Window.around(torch.zeros(mask.shape), mask, zooms, padding=0.5, reach=2.0)
    balls, fitting = single_step.fitting_balls(window, zooms, (4.0, 3.0, 0.5))
    assert len(balls) == 3, "the smallest is raised to 1.5 voxels"
    away = torch.nonzero(~mask).double() * torch.tensor(zooms, dtype=torch.float64)
    found = window.back(fitting.float())
    for point in torch.nonzero(mask)[::7]:
        distance = (
            (away - point.double() * torch.tensor(zooms)).square().sum(1).min().sqrt().item()
        )
        expected = next((n for n, r in enumerate((4.0, 3.0, 1.8), 1) if r < distance - 1e-4), 0)
        if min(abs(distance - r) for r in (4.0, 3.0, 1.8)) > 1e-3:
            assert found[tuple(point)] == expected


def test_it_reaches_the_objective_of_a_slow_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 1e-3 of L-BFGS on a rounded norm, in float64, without reach."""
    monkeypatch.setattr(single_step, "REACH", 0.0)
    shape, zooms, lambda_, radii = (7, 6, 7), (1.0, 1.1, 1.0), 2e-3, (2.7, 1.65)
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(shape, dtype=torch.bool)
    truth = torch.randn(shape, generator=generator, dtype=torch.float64)
    window = Window.around(truth, mask, zooms, padding=single_step.PADDING, reach=0.0)
    wide = window.shape
    kernel = dipole(wide, zooms, (0.6, 0.0, 0.8), like=truth)
    field = Dipole(wide, kernel)(truth)
    balls, fitting = single_step.fitting_balls(window, zooms, radii)
    assert sorted(fitting.unique().tolist()) == [0, 1, 2]

    def filtered(chi: Tensor, forward: bool) -> Tensor:
        total = torch.zeros(shape, dtype=torch.float64)
        for n, ball in enumerate(balls, 1):
            part = Dipole(wide, ball * kernel if forward else ball)(chi)
            total = torch.where(fitting == n, part, total)
        return total

    a = dense(shape, lambda chi: filtered(chi, True))
    f = filtered(field, False).reshape(-1).numpy()

    def widen(x: Tensor) -> Tensor:
        placed = x.new_zeros(wide)
        placed[: shape[0], : shape[1], : shape[2]] = x
        return gradient(placed, zooms)

    g = dense(shape, widen)
    g = g[g.any(axis=1)]

    def objective(x: np.ndarray, rounding: float = 0.0) -> tuple[float, np.ndarray]:
        residual, slope = a @ x - f, g @ x
        size = np.sqrt(slope**2 + rounding**2)
        value = 0.5 * residual @ residual + lambda_ * size.sum()
        return value, a.T @ residual + lambda_ * g.T @ (slope / np.maximum(size, 1e-300))

    x = slow_minimum(objective, np.zeros(math.prod(shape)))
    slow = objective(x)[0]
    chi, convergence, *_ = sstv(
        field, mask, zooms, b0_direction=(0.6, 0.0, 0.8), radii=radii, lambda_=lambda_, rho=10.0,
        tolerance=1e-7, max_iterations=20000,
    )  # fmt: skip
    ours = objective(chi.reshape(-1).numpy())[0]
    assert convergence.converged
    assert objective(np.zeros_like(x))[0] > 1.5 * slow
    assert abs(ours - slow) < 1e-3 * slow


def test_more_radii_know_more() -> None:
    head = phantom(*GRID, noise=0.002)
    noise = torch.full_like(head.field, 0.002)
    one, three = (
        error(head.invert(sstv, noise=noise, radii=radii).chi, head.chi, head.mask)
        for radii in ((3.0,), (9.0, 6.0, 3.0))
    )
    assert three < one


def test_penalties_do_not_decide_on_the_map() -> None:
    head = phantom((20, 20, 20), (2.0, 2.0, 2.0), noise=0.003)
    settled = {"tolerance": 1e-5, "max_iterations": 1500}
    expected = head.invert(sstv, **settled).chi
    for choice in ({"rho": 50.0}, {"mu": 0.3}):
        assert error(head.invert(sstv, **choice, **settled).chi, expected, head.mask) < 0.02


def test_a_mask_too_small_for_every_ball_is_refused() -> None:
    head = phantom()
    thin = torch.zeros_like(head.mask)
    thin[20, 10:30, 10:30] = True
    with pytest.raises(ValueError, match="no ball of the radii"):
        head._replace(mask=thin).invert(sstv)
