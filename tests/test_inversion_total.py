"""Inversions that start from the total field or from the wrapped phase: TFI and TGV-QSM."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nb
import numba
import numpy as np
import pytest
import torch
from phantoms import ISOTROPIC, TILT, TILTED, Phantom, error, phantom, slow_minimum
from phantoms import dense as dense_matrix
from scipy.optimize import minimize
from torch import Tensor

from qsmpipe import images
from qsmpipe.numerics.background.pdf import pdf
from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.fused import loops
from qsmpipe.numerics.fused.primal_dual import (
    KNOWN,
    PAIRS,
    SOLVED,
    State,
    Steps,
    dual_step,
    primal_step,
    stencil_sum,
)
from qsmpipe.numerics.harmonics import FarField, solid_harmonics
from qsmpipe.numerics.inversion import Susceptibility, tfi, tgvqsm, tv
from qsmpipe.numerics.inversion.tgv_phase import laplacian_stencil, phase_laplacian, wave_stencil
from qsmpipe.numerics.kernels import AXIAL, dipole
from qsmpipe.numerics.operators import Dipole, gradient
from qsmpipe.numerics.units import radians_per_ppm
from qsmpipe.workflows.inversion import init_inversion_wf

TFI, TGV = sys.modules[tfi.__module__], sys.modules[tgvqsm.__module__]
ZOOMS = (1.0, 0.8, 1.5)
GRID = (30, 30, 30), (4 / 3, 4 / 3, 4 / 3)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def places(shape: tuple[int, int, int], zooms: Zooms = ISOTROPIC) -> tuple[Tensor, ...]:
    """Coordinates from the centre (mm)."""
    axes = (
        (torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * zoom
        for n, zoom in zip(shape, zooms, strict=True)
    )
    return torch.meshgrid(*axes, indexing="ij")


# Total field inversion


def total(head: Phantom, *, noise: float = 0.0) -> tuple[Phantom, Tensor]:
    """Field with air, bone, a shim and an offset, up to 1.7 ppm; and tissue up to the edge."""
    margin = 24
    x, y, z = places(tuple(n + 2 * margin for n in head.mask.shape))
    r = (x**2 + y**2 + z**2).sqrt()

    def ball(value: float, radius: float, *centre: float) -> Tensor:
        a, b, c = centre
        distance = ((x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2).sqrt()
        return value * torch.sigmoid((radius - distance) / 0.35)

    inner = (slice(margin, -margin),) * 3
    outside = ball(9.4, 5, 2, 0, -23) + ball(9.4, 6, 0, 25, 10) + ball(-3, 4, 21, 3, 0)
    outside -= torch.sigmoid((r - 16.5) / 0.35) * torch.sigmoid((18 - r) / 0.35)
    edge = ball(0.08, 3, 0, -14, 3) + ball(0.08, 4, 13, 6, -4) - ball(0.05, 3, -9, 9, 8)
    chi = torch.where(r < 15, edge, 0.0)
    chi[inner] += head.chi
    field = Dipole.on_grid(chi, ISOTROPIC, head.b0_direction)(torch.where(r < 15, chi, outside))
    field += 0.3 + 0.005 * x - 0.003 * z + noise * normal(*field.shape)
    return head._replace(field=field[inner].float(), chi=chi[inner].float()), head.mask


@pytest.fixture(scope="module")
def whole() -> Phantom:
    return total(phantom(), noise=0.003)[0]


def test_tfi_removes_a_strong_background_and_keeps_the_edge(whole: Phantom) -> None:
    noise = torch.full_like(whole.field, 0.003)
    assert whole.field[whole.mask].max() > 1.5
    ours = whole.invert(tfi, noise=noise)
    local = pdf(whole.field, whole.mask, whole.zooms, b0_direction=whole.b0_direction).field
    theirs = whole._replace(field=local).invert(tv, noise=noise)
    assert ours.convergence.converged
    assert error(ours.chi, whole.chi, whole.mask) < 0.5
    assert error(ours.chi, whole.chi, whole.mask) < 0.7 * error(theirs.chi, whole.chi, whole.mask)


def test_tfi_edges_of_the_magnitude_help(whole: Phantom) -> None:
    magnitude = 1 + whole.chi
    without = error(whole.invert(tfi).chi, whole.chi, whole.mask)
    sharp = whole.invert(tfi, magnitude=magnitude, edges=0.1)
    assert error(sharp.chi, whole.chi, whole.mask) < 0.8 * without
    none = whole.invert(tfi, magnitude=magnitude, edges=0.0, max_iterations=5).chi
    assert torch.equal(none, whole.invert(tfi, max_iterations=5).chi)


@pytest.mark.parametrize(
    "harmonic",
    [lambda x, y, z: 1 + x - 2 * z, lambda x, y, z: x * y, lambda x, y, z: 2 * z**2 - x**2 - y**2],
    ids=["linear", "xy", "z2"],
)
def test_tfi_does_not_see_the_fields_of_sources_far_away(
    harmonic: Callable[..., Tensor], whole: Phantom
) -> None:
    far = 0.01 * harmonic(*places((40, 40, 40))).float()
    chi = whole._replace(field=whole.field + far).invert(tfi, max_iterations=40).chi
    assert error(chi, whole.invert(tfi, max_iterations=40).chi, whole.mask) < 5e-3


def test_tfi_preconditioner_hardly_decides_on_the_map() -> None:
    head = phantom((20, 20, 20), (2.0, 2.0, 2.0), noise=0.003)

    def distance(**choices: Any) -> float:
        one, other = (head.invert(tfi, preconditioner=p, **choices).chi for p in (0.5, 4.0))
        return error(one, other, head.mask)

    late = distance(tolerance=0.0, max_iterations=100)
    assert late < 0.1
    assert late < 0.5 * distance(max_iterations=10)


def test_tfi_margin_holds_sources(whole: Phantom) -> None:
    choices = {"max_iterations": 60}
    maps = [whole.invert(tfi, margin=margin, **choices).chi for margin in (1.0, 12.0, 24.0)]
    change = [error(chi, maps[-1], whole.mask) for chi in maps[:-1]]
    assert change[1] < 0.05
    assert change[0] > 2 * change[1]


def test_tfi_weight_follows_the_noise(whole: Phantom) -> None:
    noise = torch.full_like(whole.field, 0.003)
    chosen = whole.invert(tfi, noise=noise, max_iterations=5).chosen
    assert chosen == {"lambda_": pytest.approx(0.15 * 0.003)}


def test_tfi_reaches_the_objective_of_a_slow_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the whole padded grid, sources outside and harmonics free."""
    solve, found = TFI.minimise, []

    def kept(problem: Any, **choices: Any) -> Any:
        found.append((problem, *solve(problem, **choices)))
        return found[-1][1:]

    monkeypatch.setattr(TFI, "minimise", kept)
    monkeypatch.setattr(TFI, "ORDER", 1)
    shape, lambda_ = (6, 5, 5), 2e-3
    mask = torch.ones(shape, dtype=torch.bool)
    mask[0, 0] = False
    field = 0.05 * normal(*shape)
    noise = 1 + normal(*shape, seed=1).abs()
    tfi(
        field, mask, ZOOMS, b0_direction=TILTED, noise=noise, lambda_=lambda_, margin=3.0,
        tolerance=1e-4, max_iterations=5000,
    )  # fmt: skip
    ((problem, image, _),) = found
    wide = problem.shape
    forward = Dipole(wide, dipole(wide, ZOOMS, TILTED, like=field))
    weight = torch.where(mask, (noise[mask].median() / noise).clamp(max=5), 0)
    x, y, z = places(shape, ZOOMS)
    basis = torch.stack([torch.ones_like(x), x, y, z]).flatten(1).T * weight.flatten()[:, None]
    free = basis @ torch.linalg.pinv(basis)
    known = torch.where(mask, field, 0)
    both = torch.zeros(3, *wide, dtype=torch.bool)
    both[0, :5, :5, :5] = mask[1:] & mask[:-1]
    both[1, :6, :4, :5] = mask[:, 1:] & mask[:, :-1]
    both[2, :6, :5, :4] = mask[..., 1:] & mask[..., :-1]
    epsilon = TFI.EPSILON * lambda_

    def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
        chi = torch.from_numpy(values).reshape(wide).requires_grad_()
        misfit = (weight * (forward(chi)[:6, :5, :5] - known)).flatten()
        misfit = misfit - free @ misfit
        size = (gradient(chi, ZOOMS) ** 2 + epsilon**2).sqrt()
        value = misfit.square().sum() / 2 + lambda_ * (both * size).sum()
        value.backward()
        return value.item(), chi.grad.numpy().ravel()

    start = np.zeros(math.prod(wide))
    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-15, "gtol": 1e-9}
    slow = minimize(objective, start, method="L-BFGS-B", jac=True, options=options).fun
    assert objective(start)[0] > 3 * slow
    assert objective(image.numpy().ravel())[0] < 1.001 * slow  # it stops a little above


@pytest.mark.parametrize("order", [0, 1, 2, 3, 6])
def test_solid_harmonics_are_all_that_have_no_laplacian(order: int) -> None:
    powers, basis = solid_harmonics(order)
    assert len(basis) == (order + 1) ** 2
    h, centre = 1e-2, normal(5, 3)

    def value(places: Tensor) -> Tensor:
        return basis @ torch.stack([(places ** torch.tensor(p)).prod(-1) for p in powers])

    steps = h * torch.eye(3, dtype=torch.float64)
    bend = sum(value(centre + s) + value(centre - s) - 2 * value(centre) for s in steps) / h**2
    assert bend.abs().max() < 0.05
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64))


@pytest.mark.parametrize("looped", [True, False])
def test_far_fields_are_fitted_out_by_a_projection(
    looped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "usable", lambda _: looped)
    shape = (7, 9, 6)
    weight = normal(*shape).abs()
    far = FarField.on_grid(weight, ZOOMS, order=3)
    x, y, z = places(shape, ZOOMS)
    for field in (torch.ones(shape, dtype=torch.float64), x * y * z, x**3 - 3 * x * z**2, y + x):
        assert far.remove(field).abs().max() < 1e-9
    a, b = normal(*shape, seed=1), normal(*shape, seed=2)
    left, right = (weight * far.remove(a) * b).sum(), (weight * far.remove(b) * a).sum()
    torch.testing.assert_close(left, right)
    torch.testing.assert_close(far.remove(far.remove(a)), far.remove(a))


# Single-step TGV: its parts

SCALE = radians_per_ppm(3.0, 0.02)


def wrap(phase: Tensor) -> Tensor:
    return phase - 2 * math.pi * (phase / (2 * math.pi)).round()


@pytest.mark.parametrize("zooms", [ISOTROPIC, ZOOMS])
@pytest.mark.parametrize("direction", [AXIAL, TILTED, (0.6, -0.48, 0.64)])
def test_the_wave_stencil_is_dipole_times_laplacian(zooms: Zooms, direction: Any) -> None:
    """On a wave longer than the voxel, whatever its direction."""
    wave, laplacian = wave_stencil(zooms, direction), laplacian_stencil(zooms)
    x, y, z = places((3, 3, 3), zooms)
    for seed in range(5):
        k = normal(3, seed=seed)
        k = 0.05 * k / k.norm()
        turns = torch.cos(2 * math.pi * (k[0] * x + k[1] * y + k[2] * z))
        factor = 1 / 3 - (k @ torch.tensor(direction, dtype=torch.float64)) ** 2 / (k @ k)
        found = (wave * turns).sum() / (laplacian * turns).sum()
        assert found == pytest.approx(factor.item(), abs=0.02)
    assert wave.sum() == pytest.approx(0, abs=1e-12)


def test_the_laplacian_of_phase_does_not_see_wraps_and_knows_the_field() -> None:
    head = phantom((40, 34, 30), (0.8, 1.0, 1.1), dtype=torch.float64)
    times = [0.005, 0.012, 0.02]
    phase = torch.stack([radians_per_ppm(3.0, t) * head.field + 0.4 for t in times])
    given = {"echo_times": times, "field_strength": 3.0}
    wrapped = phase_laplacian(wrap(phase), head.mask, head.zooms, **given)
    torch.testing.assert_close(
        wrapped, phase_laplacian(phase, head.mask, head.zooms, **given), rtol=0, atol=1e-10
    )
    field = head.field
    curved = -sum(
        (2 * field - field.roll(1, a) - field.roll(-1, a)) / head.zooms[a] ** 2 for a in range(3)
    )
    inside = torch.ones_like(head.mask)
    for axis in range(3):
        inside &= head.mask & head.mask.roll(1, axis) & head.mask.roll(-1, axis)
    torch.testing.assert_close(wrapped[inside], curved[inside], rtol=0, atol=1e-9)


def test_echoes_count_by_their_precision() -> None:
    shape, mask = (8, 8, 8), torch.ones(8, 8, 8, dtype=torch.bool)
    phase, times = 0.3 * normal(2, *shape), [0.01, 0.02]
    given = {"field_strength": 3.0}
    one, two = (
        phase_laplacian(phase[e : e + 1], mask, ZOOMS, echo_times=times[e : e + 1], **given)
        for e in (0, 1)
    )
    both = phase_laplacian(phase, mask, ZOOMS, echo_times=times, **given)
    torch.testing.assert_close(both, (one + 4 * two) / 5)
    magnitude = torch.stack([torch.full(shape, 3.0), torch.full(shape, 1.0)]).double()
    weighted = phase_laplacian(phase, mask, ZOOMS, echo_times=times, magnitude=magnitude, **given)
    torch.testing.assert_close(weighted, (9 * one + 4 * two) / 13)


def steps_of(value: float) -> Steps:
    return Steps(value, value, (value,) * 3, value, (value,) * 3, (value,) * 6)


def random_zone(shape: tuple[int, int, int]) -> Tensor:
    zone = torch.zeros(shape, dtype=torch.uint8)
    inner = tuple(n - 2 for n in shape)
    zone[1:-1, 1:-1, 1:-1] = (normal(*inner, seed=9) > -1).to(torch.uint8) * KNOWN
    zone[2:-2, 2:-2, 2:-2] += zone[2:-2, 2:-2, 2:-2] * SOLVED
    return zone


def stencils() -> tuple[Tensor, Tensor]:
    return wave_stencil(ZOOMS, (0.6, -0.48, 0.64)), laplacian_stencil(ZOOMS)


@pytest.mark.parametrize("looped", [True, False])
def test_the_two_steps_are_adjoint(looped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From duals of 0 one step gives K x, from maps of 0 the other gives -K' y."""
    monkeypatch.setattr(loops, "usable", lambda _: looped)
    shape = (8, 7, 9)
    zone, (wave, laplacian) = random_zone(shape), stencils()
    known, solved = zone > 0, zone & SOLVED > 0

    def start() -> State:
        return State.zeros(torch.zeros(shape, dtype=torch.float64))

    maps, duals = start(), start()
    maps.chi_ahead.copy_(normal(*shape, seed=1) * known)
    maps.rest_ahead.copy_(normal(*shape, seed=2) * known)
    maps.slope_ahead.copy_(normal(3, *shape, seed=3) * known)
    given = [x.clone() for x in (maps.chi_ahead, maps.rest_ahead, maps.slope_ahead)]
    dual_step(
        maps, torch.zeros_like(maps.chi), zone, wave, laplacian, ZOOMS, 1e9, 1e9, steps_of(1.0)
    )
    duals.wave.copy_(normal(*shape, seed=4) * solved)
    for axis, dual in enumerate(duals.first):
        dual.copy_(normal(*shape, seed=5 + axis) * (known & known.roll(-1, axis)))
    duals.second.copy_(normal(6, *shape, seed=8) * known)
    twice = torch.tensor([1 if a == b else 2 for a, b in PAIRS])[:, None, None, None]
    forward = (maps.wave * duals.wave).sum() + (maps.first * duals.first).sum()
    forward += (twice * maps.second * duals.second).sum()
    primal_step(duals, zone, wave, laplacian, ZOOMS, steps_of(1.0))
    back = (given[0] * duals.chi).sum() + 2 * (given[1] * duals.rest).sum()
    back += (given[2] * duals.slope).sum()
    torch.testing.assert_close(forward, -back)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(8, 7, 9), (3, 4, 5), (12, 3, 3)])
def test_both_bodies_agree(
    shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone, (wave, laplacian) = random_zone(shape), stencils()
    measured = 0.1 * normal(*shape).to(dtype)
    states, changes = [], []
    for looped in (True, False):
        monkeypatch.setattr(loops, "usable", lambda _, looped=looped: looped)
        state = State.zeros(measured)
        for _ in range(5):
            dual_step(state, measured, zone, wave, laplacian, ZOOMS, 5e-3, 8e-3, steps_of(0.1))
            change = primal_step(state, zone, wave, laplacian, ZOOMS, steps_of(0.1))
        states.append(state)
        changes.append(change)
    tolerance = {"rtol": 1e-3, "atol": 1e-6} if dtype is torch.float32 else {}
    for ours, theirs in zip(*states, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
    assert changes[0] == pytest.approx(changes[1], rel=1e-4)


@pytest.mark.parametrize("direction", [AXIAL, (0.6, -0.48, 0.64)])
def test_the_steps_are_short_enough(direction: Any) -> None:
    """The operator between the roots of the steps has a norm of at most 1, by power iteration."""
    shape = (10, 10, 10)
    zone = torch.zeros(shape, dtype=torch.uint8)
    zone[1:-1, 1:-1, 1:-1] = KNOWN
    zone[2:-2, 2:-2, 2:-2] = KNOWN + SOLVED
    wave, laplacian = wave_stencil(ZOOMS, direction), laplacian_stencil(ZOOMS)
    steps = TGV._steps(wave, laplacian, ZOOMS)
    nothing = torch.zeros(shape, dtype=torch.float64)
    x = [normal(*shape), normal(*shape, seed=1), normal(3, *shape, seed=2)]
    x = [part * (zone > 0) for part in x]
    growth = 0.0
    for _ in range(60):
        # K between the steps of both sides: sigma K, then tau K', is what must not grow
        state = State.zeros(nothing)
        for name, part in zip(("chi_ahead", "rest_ahead", "slope_ahead"), x, strict=True):
            getattr(state, name).copy_(part)
        dual_step(state, nothing, zone, wave, laplacian, ZOOMS, 1e99, 1e99, steps)
        primal_step(state, zone, wave, laplacian, ZOOMS, steps)
        new = [-state.chi, -state.rest * (1 + steps.rest), -state.slope]
        size = sum(part.square().sum() for part in new) ** 0.5
        growth = (size / sum(part.square().sum() for part in x) ** 0.5).item()
        x = [part / size for part in new]
    assert 0.3 < growth <= 1


# Single-step TGV: the method


def from_phase(head: Phantom, *, scale: float = SCALE, **choices: Any) -> Susceptibility:
    """The wrapped phase of one echo of 20 ms at 3 T."""
    given: dict[str, Any] = {
        "echo_times": [0.02],
        "field_strength": 3.0,
        "b0_direction": head.b0_direction,
    }
    phase = wrap(head.field * scale)[None]
    return tgvqsm(phase, head.mask, head.zooms, **(given | choices))


@pytest.fixture(scope="module")
def small() -> Phantom:
    return phantom((24, 22, 20), (1.5, 1.6, 1.7), tilt=TILT, noise=0.001)


@pytest.mark.parametrize(
    ("shape", "zooms", "tilt"),
    [(*GRID, 0.0), ((41, 33, 23), (0.8, 1.0, 1.4), TILT)],
    ids=["plain", "odd anisotropic tilted"],
)
def test_the_phase_of_a_phantom_gives_it_back(
    shape: tuple[int, int, int], zooms: Zooms, tilt: float
) -> None:
    head = phantom(shape, zooms, tilt=tilt)
    chi, convergence, *_ = from_phase(head)
    assert convergence.converged
    assert error(chi, head.chi, head.mask) < 0.35
    assert np.corrcoef(chi[head.mask], head.chi[head.mask])[0, 1] > 0.94
    assert not chi[~head.mask].any()
    if tilt:
        wrong = from_phase(head, b0_direction=AXIAL).chi
        assert error(wrong, head.chi, head.mask) > 2 * error(chi, head.chi, head.mask)


def test_wraps_and_background_change_nothing(small: Phantom) -> None:
    """A background of many turns, which has no Laplacian on this grid either."""
    head = small._replace(field=small.field.double())
    x, y, _ = places((24, 22, 20), small.zooms)
    given = {"echo_times": [0.02], "field_strength": 3.0, "b0_direction": head.b0_direction}
    far = head._replace(field=head.field + 0.3 + 0.02 * x + 1.5e-3 * x * y)
    assert far.field[head.mask].max() * SCALE > 3 * math.pi
    expected = tgvqsm(SCALE * head.field[None], head.mask, head.zooms, **given).chi
    torch.testing.assert_close(from_phase(far).chi, expected, rtol=0, atol=1e-8)


def test_echoes_agree_with_one(small: Phantom) -> None:
    times = [0.01, 0.02, 0.03]
    phase = torch.stack([wrap(small.field * radians_per_ppm(3.0, t)) for t in times])
    chi = tgvqsm(
        phase, small.mask, small.zooms, echo_times=times, field_strength=3.0,
        b0_direction=small.b0_direction, magnitude=torch.ones_like(phase),
    ).chi  # fmt: skip
    assert error(chi, from_phase(small).chi, small.mask) < 1e-3


def test_field_strength_and_echo_time_are_the_unit(small: Phantom) -> None:
    """At 7 T and 10 ms: the same field in another phase, with weights in proportion."""
    ratio = radians_per_ppm(7.0, 0.01) / SCALE
    chi = from_phase(
        small, scale=SCALE * ratio, field_strength=7.0, echo_times=[0.01],
        alpha1=TGV.DEFAULT_ALPHA1 * ratio, alpha0=TGV.DEFAULT_ALPHA0 * ratio,
    ).chi  # fmt: skip
    assert error(chi, from_phase(small).chi, small.mask) < 1e-3


def test_tgv_more_weight_is_smoother(small: Phantom) -> None:
    def roughness(**choices: float) -> float:
        inner = gradient(from_phase(small, **choices).chi, small.zooms)[:, small.mask]
        return inner.abs().sum().item()

    assert roughness(alpha1=4e-3) < 0.97 * roughness() < 0.9 * roughness(alpha1=2.5e-4)
    assert roughness(alpha0=3e-4) != pytest.approx(roughness(), rel=1e-2)


def test_erosion_keeps_the_noise_of_the_edge_out(small: Phantom) -> None:
    x, y, z = places((24, 22, 20), small.zooms)
    rim = (x**2 + y**2 + z**2).sqrt() > 12.5
    spoilt = small._replace(field=small.field + 0.1 * rim * normal(24, 22, 20).float())
    plain = error(from_phase(spoilt).chi, small.chi, small.mask)
    assert error(from_phase(spoilt, erosion=4.0).chi, small.chi, small.mask) < 0.7 * plain


def test_tgv_is_the_minimum_of_its_objective() -> None:
    """Against L-BFGS on rounded norms, the rest written by what the equation leaves free."""
    shape, zooms, scale = (5, 4, 4), ISOTROPIC, SCALE
    mask = torch.ones(shape, dtype=torch.bool)
    phase = 0.4 * normal(*shape)
    alpha1, alpha0 = 2e-3, 4e-3
    given = {"echo_times": [0.02], "field_strength": 3.0}
    found = tgvqsm(
        phase[None], mask, zooms, **given, alpha1=alpha1, alpha0=alpha0, tolerance=1e-7,
        max_iterations=60000,
    )  # fmt: skip
    n = math.prod(shape)
    padded = tuple(m + 2 for m in shape)

    def dense(stencil: Tensor) -> Tensor:
        rows = []
        for unit in torch.eye(n, dtype=torch.float64):
            wide = torch.nn.functional.pad(unit.reshape(shape), (1,) * 6)
            rows.append(stencil_sum(wide, stencil)[1:-1, 1:-1, 1:-1].flatten())
        return torch.stack(rows, 1)

    solved = torch.zeros(shape, dtype=torch.bool)
    solved[1:-1, 1:-1, 1:-1] = True
    inside = solved.flatten()
    laplacian, wave = dense(laplacian_stencil(zooms))[inside], dense(wave_stencil(zooms, AXIAL))
    wave = wave[inside]
    measured = phase_laplacian(phase[None], mask, zooms, **given).flatten()[inside]
    inverse = torch.linalg.pinv(laplacian)
    free = torch.linalg.svd(laplacian)[2][len(laplacian) :].T
    assert padded == (7, 6, 6)

    def rise(image: Tensor, axis: int, *, back: bool) -> Tensor:
        """Forward or backward differences, those that leave the grid 0."""
        step = image.diff(dim=axis)
        pad = [0, 0, 0, 0, 0, 0]
        pad[2 * (2 - axis) + (0 if back else 1)] = 1
        return torch.nn.functional.pad(step, pad)

    valid = torch.stack([rise(p, a, back=False) != 0 for a, p in enumerate(places(shape))])

    def misfit(v: Tensor) -> Tensor:
        return inverse @ (wave @ v[:n]) + free @ v[4 * n :]

    def first(v: Tensor) -> Tensor:
        chi, w = v[:n].reshape(shape), v[n : 4 * n].reshape(3, *shape)
        return torch.stack([rise(chi, a, back=False) for a in range(3)]) - w * valid

    def second(v: Tensor) -> Tensor:
        w = v[n : 4 * n].reshape(3, *shape)
        bends = [(rise(w[b], a, back=True) + rise(w[a], b, back=True)) / 2 for a, b in PAIRS]
        twice = torch.tensor([1.0 if a == b else 2.0 for a, b in PAIRS], dtype=torch.float64)
        return torch.stack(bends) * twice.sqrt()[:, None, None, None]

    unknowns = 4 * n + free.shape[1]
    fit, *terms = (dense_matrix((unknowns,), part) for part in (misfit, first, second))
    known = (inverse @ measured).numpy()

    def objective(v: np.ndarray, rounding: float) -> tuple[float, np.ndarray]:
        left = fit @ v - known
        value, slope = left @ left / 2, fit.T @ left
        for term, weight in zip(terms, (alpha1 / scale, alpha0 / scale), strict=True):
            parts = (term @ v).reshape(-1, n)
            size = np.sqrt((parts**2).sum(0) + rounding**2)
            value += weight * size.sum()
            slope += weight * (term.T @ (parts / size).ravel())
        return value, slope

    x = slow_minimum(objective, np.zeros(unknowns), roundings=tuple(10.0 ** -np.arange(2, 7)))
    slow = torch.from_numpy(x[:n]).reshape(shape)
    assert found.convergence.converged
    assert error(found.chi, slow, mask) < 0.02


def test_tgv_precision_space_and_determinism(small: Phantom) -> None:
    choices = {"tolerance": 0.0, "max_iterations": 200}
    first = from_phase(small, **choices)
    assert first.chi.dtype is torch.float32
    assert torch.equal(first.chi, from_phase(small, **choices).chi)
    double = from_phase(small._replace(field=small.field.double()), **choices).chi
    assert double.dtype is torch.float64
    assert error(first.chi, double, small.mask) < 1e-3
    pad = (3, 0, 5, 11, 1, 2)
    wider = small._replace(
        field=torch.nn.functional.pad(small.field, pad, value=torch.nan),
        mask=torch.nn.functional.pad(small.mask, pad),
    )
    assert torch.equal(from_phase(wider, **choices).chi[1:-2, 5:-11, 3:], first.chi)
    outside = small._replace(field=torch.where(small.mask, small.field, torch.nan))
    assert torch.equal(from_phase(outside, **choices).chi, first.chi)
    threads = numba.get_num_threads()
    try:
        numba.set_num_threads(min(2, numba.config.NUMBA_NUM_THREADS))
        assert torch.equal(from_phase(small, **choices).chi, first.chi)
    finally:
        numba.set_num_threads(threads)


def test_tgv_tells_how_it_ended_and_nothing_gives_nothing(small: Phantom) -> None:
    stopped = from_phase(small, tolerance=0.0, max_iterations=3).convergence
    assert (stopped.converged, stopped.iterations) == (False, 3)
    assert stopped.change > stopped.tolerance == 0
    chi, convergence, *_ = from_phase(small._replace(field=torch.zeros_like(small.field)))
    assert not chi.any()
    assert convergence.converged


def test_tgv_refuses_what_does_not_fit(small: Phantom) -> None:
    phase, mask, zooms = small.field[None], small.mask, small.zooms
    with pytest.raises(ValueError, match="different grids"):
        tgvqsm(phase[:, :-1], mask, zooms)
    with pytest.raises(ValueError, match="different grids"):
        tgvqsm(phase, mask, zooms, magnitude=phase[0, :-1])
    with pytest.raises(ValueError, match="empty"):
        tgvqsm(phase, torch.zeros_like(mask), zooms)
    with pytest.raises(ValueError, match="unit vector"):
        tgvqsm(phase, mask, zooms, b0_direction=(0.0, 0.0, 1.2))
    with pytest.raises(ValueError, match="echo"):
        tgvqsm(phase, mask, zooms, echo_times=[0.01, 0.02])
    with pytest.raises(ValueError, match="smaller erosion"):
        tgvqsm(phase, mask, zooms, erosion=30.0)
    for name in ("alpha1", "alpha0"):
        with pytest.raises(ValueError, match=f"{name}.* above 0"):
            tgvqsm(phase, mask, zooms, **{name: 0.0})
    hole = phase.clone()
    hole[0, 12, 11, 10] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        tgvqsm(hole, mask, zooms)


# Files and graphs


@pytest.mark.parametrize("echoes", [1, 2])
def test_the_workflow_runs_from_phase(echoes: int, small: Phantom, tmp_path: Path) -> None:
    times = [0.01, 0.02][:echoes]
    x, _, z = small.b0_direction
    affine = np.eye(4)
    affine[:3, :3] = np.array([[z, 0, -x], [0, 1, 0], [x, 0, z]]) * small.zooms
    phase = torch.stack([wrap(small.field * radians_per_ppm(3.0, t)) for t in times])
    magnitude = 1 + torch.rand(phase.shape, generator=torch.Generator().manual_seed(0))
    workflow = init_inversion_wf(method="tgvqsm", parameters={"max_iterations": 30})
    for name, data in (("phase", phase), ("magnitude", magnitude), ("mask", small.mask)):
        array = data.numpy().astype(np.float32)
        array = np.moveaxis(array, 0, -1).squeeze() if data.ndim == 4 else array
        nb.Nifti1Image(array, affine).to_filename(tmp_path / f"{name}.nii.gz")
        setattr(workflow.inputs.inputnode, name, str(tmp_path / f"{name}.nii.gz"))
    workflow.inputs.inputnode.echo_times = times
    workflow.inputs.inputnode.field_strength = 3.0
    workflow.base_dir = str(tmp_path)
    workflow.config["execution"] = {"poll_sleep_duration": 0.05, "crashdump_dir": str(tmp_path)}
    graph = workflow.run()
    outputs = next(node.result.outputs for node in graph.nodes() if node.name == "tgvqsm")
    expected = tgvqsm(
        phase, small.mask, small.zooms, echo_times=times, field_strength=3.0,
        b0_direction=small.b0_direction, magnitude=magnitude, max_iterations=30,
    )  # fmt: skip
    torch.testing.assert_close(images.load(outputs.chi), expected.chi, rtol=0, atol=1e-4)
    assert outputs.step["method"] == "tgvqsm"
    assert outputs.step["convergence"]["iterations"] == 30
    assert "max_iterations" in outputs.step["warnings"][0]
