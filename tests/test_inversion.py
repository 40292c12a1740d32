"""Dipole inversion: what every method owes, and what each promises."""

import math
import sys
from collections.abc import Callable
from functools import cache, partial
from inspect import signature
from pathlib import Path
from typing import Any

import nibabel as nb
import numba
import numpy as np
import pytest
import torch
from nipype.pipeline.engine import Workflow
from phantoms import (
    ISOTROPIC,
    TILT,
    TILTED,
    Phantom,
    dense,
    error,
    lone_ball,
    phantom,
    slow_minimum,
)
from scipy.ndimage import affine_transform
from torch import Tensor

from qsmpipe import images
from qsmpipe.interfaces.inversion import TKD, TV
from qsmpipe.methods import METHODS, function_of, parameters_of
from qsmpipe.numerics.inversion import Susceptibility, l2, rts, tkd, tv
from qsmpipe.numerics.kernels import AXIAL, dipole, laplacian
from qsmpipe.numerics.noise import data_weight
from qsmpipe.numerics.operators import Dipole, gradient
from qsmpipe.workflows.inversion import init_inversion_wf

ALL = {
    name: function_of("inversion", name)
    for name, row in METHODS["inversion"].items()
    if row.starts_from != "phase" and not row.trained  # networks: test_inversion_networks.py
}
ITERATIVE = {
    name: method
    for name, method in ALL.items()
    if "max_iterations" in parameters_of("inversion", name)
}
SETTLED = {"tv": {"tolerance": 1e-5, "max_iterations": 1000}, "rts": {"tolerance": 1e-4}}

every_method = pytest.mark.parametrize("method", ALL.values(), ids=ALL)
iterative = pytest.mark.parametrize("method", ITERATIVE.values(), ids=ITERATIVE)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")


UPRIGHT = (30, 30, 30), (4 / 3, 4 / 3, 4 / 3)
CLEAN = phantom(*UPRIGHT)
NOISY = phantom((23, 25, 27), (1.5, 1.3, 1.25), tilt=TILT, noise=0.003)
"""Coarse, odd-sized, anisotropic and tilted: for what holds on every grid."""


@pytest.fixture
def clean() -> Phantom:
    return CLEAN


@pytest.fixture
def noisy() -> Phantom:
    return NOISY


def within(radius: float) -> Tensor:
    """Voxels of the upright grid whose centre lies within ``radius`` (mm) of its own."""
    x, y, z = (np.indices(UPRIGHT[0]) - 14.5) * UPRIGHT[1][0]
    return torch.from_numpy(x**2 + y**2 + z**2 < radius**2)


@cache
def of_clean(method: Callable[..., Susceptibility]) -> Susceptibility:
    return CLEAN.invert(method)


@cache
def of_noisy(method: Callable[..., Susceptibility]) -> Susceptibility:
    return NOISY.invert(method)


BOUNDS = {
    "tkd": 0.4,
    "l2": 0.4,
    "rts": 0.55,
    "tv": 0.15,
    "tsvd": 0.55,
    "tikhonov": 0.3,
    "ilsqr": 0.45,
    "two-level": 0.15,
    "nltv": 0.15,
    "tgv": 0.15,
    "nltgv": 0.15,
    "whqsm": 0.2,
    "l1qsm": 0.05,
    "hdqsm": 0.15,
    "medi": 0.15,
    "ndi": 0.55,
    "sstv": 0.55,
    "tfi": 0.5,
}
"""Error of each method on the phantom without noise."""


@pytest.mark.parametrize("name", ALL)
def test_the_field_of_a_phantom_gives_it_back(name: str) -> None:
    """Tilted by 30 degrees, anisotropic, odd sizes."""
    head = phantom((41, 33, 23), (0.8, 1.0, 1.4), tilt=TILT)
    chi = head.invert(ALL[name]).chi
    assert error(chi, head.chi, head.mask) < BOUNDS[name]
    assert not chi[~head.mask].any()


@pytest.mark.parametrize("name", ALL)
def test_the_field_of_an_upright_phantom_gives_it_back(name: str, clean: Phantom) -> None:
    """In its sign as well."""
    chi = of_clean(ALL[name]).chi
    assert error(chi, clean.chi, clean.mask) < BOUNDS[name]
    assert not chi[~clean.mask].any()
    assert np.corrcoef(chi[clean.mask], clean.chi[clean.mask])[0, 1] > 0.85


SHRINKS = {"tsvd": 0.3, "ndi": 0.4, "rts": 0.3, "ilsqr": 0.25}
"""What methods without or with half a regularisation leave out of a ball's susceptibility."""


@pytest.mark.parametrize("name", ALL)
def test_the_analytic_field_of_a_ball_gives_its_susceptibility(name: str) -> None:
    """Closed form, not our own dipole: tilted by 30 degrees, anisotropic, odd sizes."""
    ball = lone_ball()
    found, spread = ball.found(
        ALL[name](ball.field, ball.mask, ball.zooms, b0_direction=TILTED).chi
    )
    assert 1 - SHRINKS.get(name, 0.12) < found < 1.1
    assert spread < 0.1


@every_method
def test_the_layout_in_memory_does_not_matter(
    method: Callable[..., Susceptibility], noisy: Phantom
) -> None:
    """Arrays of NIfTI files run along their first axis."""
    few = {"max_iterations": 3} if method in ITERATIVE.values() else {}
    turned = [image.permute(2, 1, 0).contiguous().permute(2, 1, 0) for image in noisy[:2]]
    assert not turned[0].is_contiguous()
    found = method(*turned, noisy.zooms, b0_direction=noisy.b0_direction, **few).chi
    expected = noisy.invert(method, **few).chi
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@every_method
def test_tilted_is_rotated(method: Callable[..., Susceptibility]) -> None:
    """A head turned by 30 degrees in a field turned alike gives the map turned alike."""
    upright = of_clean(method).chi
    turned = phantom(*UPRIGHT, tilt=TILT)
    tilted = turned.invert(method).chi
    wrong = method(turned.field, turned.mask, turned.zooms, b0_direction=AXIAL).chi
    cosine, sine = math.cos(TILT), math.sin(TILT)
    rotation = np.array([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]])
    centre = np.full(3, 14.5)
    inner = within(13)

    def back(chi: Tensor) -> Tensor:
        return torch.from_numpy(
            affine_transform(chi.numpy(), rotation, centre - rotation @ centre, order=1)
        )

    right = error(back(tilted), upright, inner)
    assert right < 0.3
    assert error(back(wrong), upright, inner) > 2 * right


BEATS_TKD = {
    "l2": 0.9,
    "rts": 0.9,
    "tv": 0.65,
    "tsvd": 0.9,
    "tikhonov": 0.6,
    "ilsqr": 0.9,
    "two-level": 0.65,
    "nltv": 0.65,
    "tgv": 0.65,
    "nltgv": 0.65,
    "whqsm": 0.75,
    "l1qsm": 0.65,
    "hdqsm": 0.65,
    "medi": 0.65,
    "sstv": 0.8,
    "tfi": 0.8,
}
"""Error of each method on noisy phantoms, at most, as a fraction of that of division."""


@cache
def noisy_error(name: str, seed: int) -> float:
    """Error of a method on a noisy phantom, the noise known to those that weight by it."""
    head, method = phantom(*UPRIGHT, noise=0.005, seed=seed), ALL[name]
    known = {"noise": torch.full_like(head.field, 0.005)}
    taken = known if "noise" in signature(method).parameters else {}
    return error(head.invert(method, **taken).chi, head.chi, head.mask)


@pytest.mark.parametrize("name", BEATS_TKD)
@pytest.mark.parametrize("seed", range(2))
def test_with_noise_it_beats_division(name: str, seed: int) -> None:
    assert noisy_error(name, seed) < BEATS_TKD[name] * noisy_error("tkd", seed)


@pytest.mark.parametrize("seed", range(2))
def test_tv_beats_the_simple_ones(seed: int) -> None:
    simple = ("tkd", "tsvd", "l2", "tikhonov", "ilsqr", "rts")
    assert noisy_error("tv", seed) < 0.75 * min(noisy_error(name, seed) for name in simple)


@every_method
def test_precision_matters_little(method: Callable[..., Susceptibility], noisy: Phantom) -> None:
    single = of_noisy(method)
    double = noisy._replace(field=noisy.field.double()).invert(method)
    assert single.chi.dtype is torch.float32
    assert double.chi.dtype is torch.float64
    assert error(single.chi, double.chi, noisy.mask) < 5e-3


@every_method
def test_empty_space_around_the_head_changes_nothing(
    method: Callable[..., Susceptibility], noisy: Phantom
) -> None:
    pad = (3, 0, 5, 11, 1, 2)
    wider = noisy._replace(
        field=torch.nn.functional.pad(noisy.field, pad),
        mask=torch.nn.functional.pad(noisy.mask, pad),
    )
    chi = wider.invert(method).chi
    assert torch.equal(chi[1:-2, 5:-11, 3:], of_noisy(method).chi)
    assert not chi[:1].any()


@every_method
def test_what_stands_outside_the_mask_is_not_read(
    method: Callable[..., Susceptibility], noisy: Phantom
) -> None:
    field = torch.where(noisy.mask, noisy.field, torch.nan)
    chi = noisy._replace(field=field).invert(method).chi
    assert torch.equal(chi, of_noisy(method).chi)


UNITS = {
    "tkd": {},
    "l2": {},
    "rts": {"mu": -1, "rho": -1},
    "tv": {"lambda_": 1, "rho": -1},
    "tsvd": {},
    "tikhonov": {},
    "ilsqr": {},
    "two-level": {"lambda_": 1, "strong": 1, "rho": -1},
    "nltv": {"lambda_": 1, "rho": -1, "field_strength": -1},
    "tgv": {"lambda_": 1, "rho": -1},
    "nltgv": {"lambda_": 1, "rho": -1, "field_strength": -1},
    "whqsm": {"lambda_": 1, "rho": -1, "field_strength": -1},
    "l1qsm": {"rho": -1, "mu": -1, "field_strength": -1},
    "hdqsm": {"lambda_": 1, "rho": -1},
    "medi": {"lambda_": 0, "field_strength": -1},
    "ndi": {"field_strength": -1},
    "sstv": {"lambda_": 1, "rho": -1},
    "tfi": {"lambda_": 1},
}
"""By which power of the field's unit a parameter scales."""

FIXED = {
    "tv": {"lambda_": 2e-4},
    "two-level": {"lambda_": 2e-4},
    "nltv": {"lambda_": 2e-4, "field_strength": 3.0},
    "tgv": {"lambda_": 2e-4},
    "nltgv": {"lambda_": 2e-4, "field_strength": 3.0},
    "whqsm": {"lambda_": 2e-4, "field_strength": 3.0},
    "l1qsm": {"field_strength": 3.0},
    "hdqsm": {"lambda_": 2e-4},
    "medi": {"lambda_": 100.0, "field_strength": 3.0},
    "ndi": {"field_strength": 3.0},
    "sstv": {"lambda_": 2e-4},
    "tfi": {"lambda_": 4e-4},
}
"""Parameters that a method would choose from the data, in ppm."""


@pytest.mark.parametrize("name", ALL)
def test_a_field_in_another_unit_gives_the_map_in_that_unit(name: str, noisy: Phantom) -> None:
    """With the parameters that carry the unit scaled alike (here ppm to rad at 3 T and 20 ms)."""
    unit = 16.05
    rows = parameters_of("inversion", name)
    fixed = FIXED.get(name, {})
    scaled = {
        key: (fixed[key] if key in fixed else rows[key].default) * unit**power
        for key, power in UNITS[name].items()
    }
    chi = noisy._replace(field=unit * noisy.field).invert(ALL[name], **scaled).chi
    expected = noisy.invert(ALL[name], **fixed).chi if fixed else of_noisy(ALL[name]).chi
    # The directions of TFI's long descent let rounding grow, as sources outside are free.
    assert error(chi / unit, expected, noisy.mask) < (4e-3 if name == "tfi" else 1e-3)


@every_method
def test_twice_the_same_and_no_argument_written_to(
    method: Callable[..., Susceptibility], noisy: Phantom
) -> None:
    field, mask = noisy.field.clone(), noisy.mask.clone()
    first, second = of_noisy(method), noisy.invert(method)
    assert torch.equal(first.chi, second.chi)
    assert first.convergence == second.convergence
    assert torch.equal(field, noisy.field)
    assert torch.equal(mask, noisy.mask)


@iterative
def test_the_number_of_threads_matters_little(
    method: Callable[..., Susceptibility], noisy: Phantom
) -> None:
    few = {"max_iterations": 10}
    expected = noisy.invert(method, **few).chi
    torch.set_num_threads(2)  # conftest.py goes back to one
    numba.set_num_threads(min(2, numba.config.NUMBA_NUM_THREADS))
    torch.testing.assert_close(noisy.invert(method, **few).chi, expected, rtol=0, atol=1e-5)


@iterative
def test_it_tells_how_it_ended(method: Callable[..., Susceptibility], noisy: Phantom) -> None:
    done = of_noisy(method).convergence
    assert done.converged
    assert done.change <= done.tolerance
    stopped = noisy.invert(method, tolerance=0.0, max_iterations=3).convergence
    assert not stopped.converged
    assert stopped.iterations == 3
    assert stopped.change > stopped.tolerance == 0


@every_method
def test_no_field_gives_no_susceptibility(
    method: Callable[..., Susceptibility], clean: Phantom
) -> None:
    chi, convergence, *_ = clean._replace(field=torch.zeros_like(clean.field)).invert(method)
    assert not chi.any()
    assert convergence is None or convergence.converged


@every_method
def test_grids_must_agree(method: Callable[..., Susceptibility], clean: Phantom) -> None:
    with pytest.raises(ValueError, match="different grids"):
        method(clean.field[:-1], clean.mask, clean.zooms)


@every_method
def test_one_field_at_a_time(method: Callable[..., Susceptibility], clean: Phantom) -> None:
    with pytest.raises(ValueError, match="one field at a time"):
        method(clean.field[None], clean.mask, clean.zooms)


@every_method
def test_b0_must_be_a_unit_vector(method: Callable[..., Susceptibility], clean: Phantom) -> None:
    with pytest.raises(ValueError, match="unit vector"):
        clean._replace(b0_direction=(0.0, 0.0, 1.2)).invert(method)


@every_method
def test_an_empty_mask_and_a_hole_in_the_field_are_refused(
    method: Callable[..., Susceptibility], clean: Phantom
) -> None:
    with pytest.raises(ValueError, match="empty"):
        clean._replace(mask=torch.zeros_like(clean.mask)).invert(method)
    field = clean.field.clone()
    field[20, 20, 20] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        clean._replace(field=field).invert(method)


ABOVE_0 = {
    "tkd": ("threshold",),
    "l2": ("lambda_",),
    "rts": ("mu", "rho"),
    "tv": ("lambda_", "rho", "mu"),
    "tsvd": ("threshold",),
    "tikhonov": ("lambda_",),
    "two-level": ("lambda_", "ratio", "rho"),
    "nltv": ("lambda_", "rho", "mu"),
    "tgv": ("lambda_", "ratio", "rho", "mu"),
    "nltgv": ("lambda_", "ratio", "rho", "mu"),
    "whqsm": ("lambda_", "beta", "rho", "mu", "nu"),
    "l1qsm": ("lambda_", "rho", "mu"),
    "hdqsm": ("lambda_", "l1_lambda", "rho", "mu"),
    "medi": ("lambda_",),
    "ndi": ("step",),
    "sstv": ("lambda_", "rho", "mu"),
    "tfi": ("lambda_", "preconditioner"),
}
"""Parameters that must be above 0."""


@pytest.mark.parametrize(
    ("name", "parameter"), [(name, each) for name, rows in ABOVE_0.items() for each in rows]
)
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_weights_must_be_above_0(name: str, parameter: str, value: float, clean: Phantom) -> None:
    with pytest.raises(ValueError, match=rf"{parameter}.* above 0"):
        clean.invert(ALL[name], **{parameter: value})


@needs_cuda
@every_method
def test_cuda_agrees_with_the_cpu(method: Callable[..., Susceptibility], noisy: Phantom) -> None:
    there = noisy._replace(field=noisy.field.cuda(), mask=noisy.mask.cuda()).invert(method)
    here = of_noisy(method)
    assert there.chi.is_cuda
    assert error(there.chi.cpu(), here.chi, noisy.mask) < 1e-3
    if here.convergence:
        assert abs(there.convergence.iterations - here.convergence.iterations) <= 1


def test_l2_is_the_dense_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Normal equations as a matrix; on an odd grid, where every frequency has its mirror."""
    monkeypatch.setattr(sys.modules[l2.__module__], "PADDING", 0.8)
    shape, wide, lambda_ = (5, 5, 5), (9, 9, 9), 0.02
    generator = torch.Generator().manual_seed(0)
    field = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.ones(shape, dtype=torch.bool)
    zooms = (1.0, 0.8, 1.5)
    forward = Dipole(wide, dipole(wide, zooms, TILTED, like=field))
    d = dense(wide, forward)
    g = dense(wide, partial(gradient, zooms=zooms))
    right = torch.zeros(wide, dtype=torch.float64)
    right[:5, :5, :5] = field
    system = d.T @ d + lambda_ * g.T @ g
    expected = np.linalg.lstsq(system, d.T @ right.reshape(-1).numpy(), rcond=1e-12)[0]
    chi = l2(field, mask, zooms, b0_direction=TILTED, lambda_=lambda_).chi
    np.testing.assert_allclose(chi.numpy(), expected.reshape(wide)[:5, :5, :5], rtol=0, atol=1e-8)


@pytest.mark.parametrize("weighted", [False, True])
def test_tv_reaches_the_objective_of_a_slow_solver(
    weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its objective is within 1e-3 of that of L-BFGS on a rounded norm, in float64.

    Without reach the map is 0 outside the mask, so that the function returns all of it.
    """
    monkeypatch.setattr(sys.modules[tv.__module__], "REACH", 0.0)
    shape, zooms, lambda_ = (6, 5, 4), (1.0, 0.8, 1.5), 5e-3
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[0, 0], mask[5, 4, 3] = False, False
    truth = torch.where(mask, torch.randn(shape, generator=generator, dtype=torch.float64), 0)
    noise = 1 + 3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    noise = noise if weighted else None
    wide = (
        10,
        9,
        8,
    )  # the method pads by a voxel on either side, then by a quarter to a fast size
    forward = Dipole(wide, dipole(wide, zooms, TILTED, like=truth))
    field = forward(truth)
    field += 0.05 * torch.randn(shape, generator=generator, dtype=torch.float64)

    inside = mask.reshape(-1).numpy()
    a = dense(shape, forward)[np.ix_(inside, inside)]
    weight = data_weight(mask, noise, field).reshape(-1).numpy()[inside]
    f = field.reshape(-1).numpy()[inside]

    def widen(x: Tensor) -> Tensor:
        placed = x.new_zeros(wide)
        placed[: shape[0], : shape[1], : shape[2]] = x
        return gradient(placed, zooms)

    g = dense(shape, widen)[:, inside]
    g = g[g.any(axis=1)]

    def objective(x: np.ndarray, rounding: float = 0.0) -> tuple[float, np.ndarray]:
        residual, slope = weight * (a @ x - f), g @ x
        size = np.sqrt(slope**2 + rounding**2)
        value = 0.5 * residual @ residual + lambda_ * size.sum()
        return value, a.T @ (weight * residual) + lambda_ * g.T @ (
            slope / np.maximum(size, 1e-300)
        )

    x = slow_minimum(objective, np.zeros(inside.sum()))
    slow = objective(x)[0]
    chi, convergence, *_ = tv(
        field, mask, zooms, b0_direction=TILTED, noise=noise, lambda_=lambda_, rho=10.0,
        tolerance=1e-9, max_iterations=20000,
    )  # fmt: skip
    ours = objective(chi.reshape(-1).numpy()[inside])[0]
    assert convergence.converged
    assert objective(np.zeros_like(x))[0] > 1.5 * slow
    assert abs(ours - slow) < 1e-3 * slow


def test_tv_penalties_do_not_decide_on_the_solution(noisy: Phantom) -> None:
    settled = SETTLED["tv"]
    expected = noisy.invert(tv, **settled).chi
    for choice in ({"rho": 50.0}, {"rho": 200.0}, {"mu": 0.4}):
        chi = noisy.invert(tv, **choice, **settled).chi
        assert error(chi, expected, noisy.mask) < 0.01


def test_tv_more_weight_is_smoother(noisy: Phantom) -> None:
    def roughness(lambda_: float) -> float:
        chi = noisy.invert(tv, lambda_=lambda_).chi
        return gradient(chi, noisy.zooms).abs().sum().item()

    rough = [roughness(lambda_) for lambda_ in (5e-5, 2e-4, 8e-4)]
    assert rough == sorted(rough, reverse=True)


@pytest.fixture(scope="module")
def uneven() -> tuple[Phantom, Tensor]:
    """Half of the head has fifteen times the noise of the other half."""
    noise = torch.full(UPRIGHT[0], 0.002)
    noise[15:] = 0.03
    return phantom(*UPRIGHT, noise=noise.double()), noise


def test_tv_weighting_helps_where_noise_is_uneven(uneven: tuple[Phantom, Tensor]) -> None:
    head, noise = uneven
    plain = error(head.invert(tv).chi, head.chi, head.mask)
    weighted = error(head.invert(tv, noise=noise).chi, head.chi, head.mask)
    assert weighted < 0.6 * plain


def test_tv_noise_has_any_unit_and_even_noise_weighs_nothing(
    uneven: tuple[Phantom, Tensor],
) -> None:
    head, noise = uneven
    expected = head.invert(tv, noise=noise, lambda_=2e-4).chi
    scaled = head.invert(tv, noise=64 * noise, lambda_=2e-4).chi
    torch.testing.assert_close(scaled, expected, rtol=0, atol=1e-6)
    even = head.invert(tv, noise=torch.full_like(noise, 0.7), lambda_=2e-4).chi
    assert torch.equal(even, head.invert(tv, lambda_=2e-4).chi)


def test_tv_weight_follows_the_noise(uneven: tuple[Phantom, Tensor]) -> None:
    head, noise = uneven
    chi, _, chosen, _ = head.invert(tv, noise=noise)
    level = noise[head.mask].median().item()
    assert chosen == {"lambda_": pytest.approx(0.07 * level)}
    assert torch.equal(chi, head.invert(tv, noise=noise, lambda_=chosen["lambda_"]).chi)
    unit = 16.0  # field and noise in another unit: the same map in that unit, all by itself
    other = head._replace(field=unit * head.field).invert(tv, noise=unit * noise, rho=100 / unit)
    assert error(other.chi / unit, chi, head.mask) < 1e-3


def test_tv_voxels_without_noise_value_are_not_trusted(clean: Phantom) -> None:
    spoilt = clean.field.clone()
    spoilt[13:16, 13:16, 13:16] += 1.0
    noise = torch.full_like(spoilt, 0.003)
    noise[13:16, 13:16, 13:14], noise[13:16, 13:16, 14:16] = 0.0, torch.inf
    chi = clean._replace(field=spoilt).invert(tv, noise=noise).chi
    assert error(chi, clean.chi, clean.mask) < 0.2


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_tv_noise_must_be_positive_somewhere(value: float, clean: Phantom) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        clean.invert(tv, noise=torch.full_like(clean.field, value))


def test_tv_noise_must_be_on_the_same_grid(clean: Phantom) -> None:
    with pytest.raises(ValueError, match="different grids"):
        clean.invert(tv, noise=torch.ones(30, 30, 29))


def test_tv_leaves_sources_just_outside_the_mask_outside(clean: Phantom) -> None:
    """The mask is eroded by 3 mm, the field still has the sources of the shell."""
    inner = within(12)
    chi = clean._replace(mask=inner).invert(tv).chi
    assert error(chi, clean.chi, inner) < 0.25


def test_tkd_is_its_filter() -> None:
    """Where the kernel is above the threshold the map has the field's own spectrum over it."""
    field = torch.zeros(9, 9, 9, dtype=torch.float64)
    field[4, 4, 4] = 1.0
    mask = torch.ones(9, 9, 9, dtype=torch.bool)
    wide = (18, 18, 18)
    k = np.stack(np.meshgrid(*(np.fft.fftfreq(18),) * 3, indexing="ij"))
    squared = (k**2).sum(0)
    squared[0, 0, 0] = 1
    kernel = 1 / 3 - k[2] ** 2 / squared
    kernel[0, 0, 0] = 0
    kernel[np.abs(kernel) < 1e-9] = 0  # on the cone: rounding is no sign
    inverse = np.sign(kernel) / np.maximum(np.abs(kernel), 0.2)
    padded = np.zeros(wide)
    padded[:9, :9, :9] = field
    expected = np.fft.ifftn(inverse * np.fft.fftn(padded)).real[:9, :9, :9]
    chi = tkd(field, mask, ISOTROPIC, threshold=0.2).chi
    np.testing.assert_allclose(chi.numpy(), expected, atol=1e-12)


def test_rts_keeps_what_the_field_determines(clean: Phantom) -> None:
    """More weight on the first step's frequencies changes the map little: they already stand."""
    chi = clean.invert(rts, mu=1e5).chi
    assert error(clean.invert(rts, mu=1e6).chi, chi, clean.mask) < 0.05
    smoother = clean.invert(rts, mu=1e1).chi
    total = gradient(chi, clean.zooms).abs().sum()
    assert gradient(smoother, clean.zooms).abs().sum() < 0.9 * total


def test_the_laplacian_needs_no_dipole() -> None:
    """The regularisation of L2 alone: with a huge weight the map is D f / (lambda L)."""
    field = torch.zeros(6, 6, 6, dtype=torch.float64)
    field[3, 3, 3] = 1.0
    mask, wide = torch.ones(6, 6, 6, dtype=torch.bool), (12, 12, 12)
    smooth = laplacian(wide, ISOTROPIC, like=field)
    smooth[0, 0, 0] = torch.inf
    kernel = dipole(wide, ISOTROPIC, like=field)
    expected = Dipole(wide, kernel / smooth)(field) / 1e6
    chi = l2(field, mask, ISOTROPIC, lambda_=1e6).chi
    torch.testing.assert_close(chi, expected, rtol=1e-4, atol=1e-12)


# From here on: files and graphs


def write(head: Phantom, folder: Path, **more: Tensor) -> dict[str, str]:
    """Files of a phantom, whose affine is turned such that B0 lies along its direction."""
    x, _, z = head.b0_direction
    affine = np.eye(4)
    affine[:3, :3] = np.array([[z, 0, -x], [0, 1, 0], [x, 0, z]]) * head.zooms
    paths = {}
    for name, data in {"field": head.field, "mask": head.mask, **more}.items():
        paths[name] = str(folder / f"{name}.nii.gz")
        nb.Nifti1Image(data.numpy().astype(np.float32), affine).to_filename(paths[name])
    return paths


@pytest.mark.parametrize("method", METHODS["inversion"])
def test_the_graph_builds(method: str) -> None:
    workflow = init_inversion_wf(method=method, omp_nthreads=2)
    node = workflow.get_node(method)
    assert node.n_procs == 2
    assert set(workflow.list_node_names()) == {"inputnode", method, "outputnode"}


def run(workflow: Workflow, folder: Path, paths: dict[str, str]) -> Any:
    workflow.base_dir = str(folder)
    for name, path in paths.items():
        setattr(workflow.inputs.inputnode, name, path)
    workflow.config["execution"] = {"poll_sleep_duration": 0.05, "crashdump_dir": str(folder)}
    graph = workflow.run()
    return next(node.result.outputs for node in graph.nodes() if node.name in ALL)


def test_the_workflow_runs_on_a_tilted_head(tmp_path: Path) -> None:
    head = NOISY
    noise = 1 + torch.rand(head.mask.shape, generator=torch.Generator().manual_seed(0))
    workflow = init_inversion_wf(method="tv", parameters={"max_iterations": 3})
    outputs = run(workflow, tmp_path, write(head, tmp_path, noise=noise))
    expected = head.invert(tv, noise=noise, max_iterations=3)
    torch.testing.assert_close(images.load(outputs.chi), expected.chi, rtol=0, atol=1e-4)
    step = outputs.step
    assert (step["stage"], step["method"]) == ("inversion", "tv")
    assert step["parameters"]["max_iterations"] == 3
    assert step["parameters"]["lambda_"] == expected.chosen["lambda_"]
    assert step["convergence"]["iterations"] == 3
    assert "max_iterations" in step["warnings"][0]


def test_a_method_without_weights_ignores_the_noise(clean: Phantom, tmp_path: Path) -> None:
    paths = write(clean, tmp_path, noise=torch.ones_like(clean.field))
    workflow = init_inversion_wf(method="tkd", parameters={"threshold": 0.2})
    outputs = run(workflow, tmp_path, paths)
    expected = clean.invert(tkd, threshold=0.2).chi
    torch.testing.assert_close(images.load(outputs.chi), expected, rtol=0, atol=1e-5)
    assert outputs.step["parameters"] == {"threshold": 0.2}
    assert "convergence" not in outputs.step


def test_a_given_direction_overrules_the_affine(
    clean: Phantom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = write(clean, tmp_path)
    chi = TKD(**paths, b0_direction=[1.0, 0.0, 0.0]).run().outputs.chi
    expected = clean._replace(b0_direction=(1.0, 0.0, 0.0)).invert(tkd).chi
    torch.testing.assert_close(images.load(chi), expected, rtol=0, atol=1e-5)


def test_files_on_different_grids_are_refused(
    clean: Phantom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = write(clean, tmp_path, noise=torch.ones(30, 30, 29))
    with pytest.raises(ValueError, match="different grids"):
        TV(**paths).run()
