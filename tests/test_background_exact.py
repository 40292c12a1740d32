"""Background removal against dense solves, slow iterations and fields known in closed form."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from test_background import SMALL, TILTED, Case, Head, grid, make, remove, rms, small, sphere
from torch import Tensor

from qsmpipe.methods import METHODS, function_of, parameters_of
from qsmpipe.numerics.background import harperella, ismv, lbv, pdf, sharp, vsharp
from qsmpipe.numerics.background.laplace import _outflow_torch, outflow
from qsmpipe.numerics.background.sharp import Deviation
from qsmpipe.numerics.fourier import Zooms, padded_shape
from qsmpipe.numerics.grids import surrounded
from qsmpipe.numerics.masks.morphology import erode
from qsmpipe.numerics.solvers import conjugate_gradient, minimal_residual

NAMES = list(METHODS["background"])
CUBES = (1.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def head() -> Head:
    return make(Case((48, 44, 40), CUBES))


OTHER: dict[str, dict[str, Any]] = {
    "sharp": {"radius": 4.0, "threshold": 0.3},
    "vsharp": {"radii": (8.0, 2.0), "threshold": 0.3},
    "resharp": {"radius": 4.0, "lambda_": 0.1, "tolerance": 0.5, "max_iterations": 2},
    "ismv": {"radius": 6.0, "tolerance": 0.5, "max_iterations": 2},
    "lbv": {"peel": 2.0, "tolerance": 0.5, "max_iterations": 2},
    "harperella": {"radius": 5.0, "lambda_": 0.1, "tolerance": 0.5, "max_iterations": 2},
    "pdf": {"margin": 5.0, "tolerance": 0.5, "max_iterations": 2},
}


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_does_something(name: str, head: Head) -> None:
    total, case = head.local + head.background, Case((48, 44, 40), CUBES)
    default = remove(name, total, head.mask, case)
    assert set(OTHER[name]) == set(parameters_of("background", name))
    for key, value in OTHER[name].items():
        changed = remove(name, total, head.mask, case, **{key: value})
        assert rms(changed.field - default.field) > 1e-3 * rms(default.field), key


SLANTED = (math.sin(math.pi / 6), 0.0, math.cos(math.pi / 6))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "case",
    [Case((41, 40, 39), CUBES, SLANTED), Case((40, 35, 20), (1.0, 1.2, 2.0), TILTED)],
    ids=["tilted", "anisotropic"],
)
def test_an_analytic_sphere_beside_the_head_vanishes(name: str, case: Case) -> None:
    """A sphere of air, 3 mm from a spherical mask, in double precision."""
    xyz = grid(case.shape, case.zooms)
    mask = sum(axis**2 for axis in xyz) <= 14**2
    air = sphere(xyz, (0.0, 21.0, 3.0), 4.0, 9.4, case.b0_direction)
    local = remove(name, air, mask, case)
    deep = erode(mask, case.zooms, radius=6.5)
    assert rms(local.field[deep]) < 4e-2 * rms((air - air[deep].mean())[deep])


# SHARP


def test_sharp_is_its_brute_force_definition() -> None:
    field, mask = (image[1:-1] for image in small())
    assert mask[0].any()
    assert mask[-1].any()
    result = sharp(field, mask, CUBES, radius=2.0, threshold=0.1)
    shape = padded_shape(mask.shape, CUBES, margin=2.0)
    x, y, z = np.meshgrid(*(np.fft.fftfreq(n, 1 / n) for n in shape), indexing="ij")
    ball = (x**2 + y**2 + z**2 <= 4).astype(float)
    high = 1 - np.fft.fftn(ball / ball.sum()).real

    def padded(image: Tensor) -> np.ndarray:
        return np.pad(image.numpy(), [(0, n - m) for n, m in zip(shape, image.shape, strict=True)])

    fits = np.fft.ifftn(np.fft.fftn(padded(mask)) * np.fft.fftn(ball)).real > ball.sum() - 0.5
    deviation = fits * np.fft.ifftn(np.fft.fftn(padded(field * mask)) * high).real
    inverse = np.where(np.abs(high) < 0.1, 0, 1 / np.where(high == 0, 1, high))
    wanted = (fits * np.fft.ifftn(np.fft.fftn(deviation) * inverse).real)[:9, :10, :9]
    np.testing.assert_array_equal(result.mask, fits[:9, :10, :9])
    np.testing.assert_allclose(result.field, wanted, atol=1e-12)


def test_vsharp_with_one_ball_is_sharp(head: Head) -> None:
    one = vsharp(head.local, head.mask, CUBES, radii=[5.0], threshold=0.1)
    other = sharp(head.local, head.mask, CUBES, radius=5.0, threshold=0.1)
    assert one.field.equal(other.field)
    assert one.mask.equal(other.mask)


# iSMV


def fixed_point(field: Tensor, mask: Tensor, zooms: Zooms, radius: float, steps: int) -> Tensor:
    """The paper's iteration as it stands."""
    deviation = Deviation.on_grid(mask, zooms, radius, like=field)
    background = field * mask
    for _ in range(steps):
        background = background - deviation(background)
    return (field - background) * deviation.trusted


@pytest.mark.parametrize("zooms", [CUBES, (1.0, 1.1, 1.5)])
def test_ismv_is_the_papers_iteration_run_to_its_end(zooms: Zooms) -> None:
    field, mask = small()
    wanted = fixed_point(field, mask, zooms, 2.0, 3000)
    assert rms(wanted - fixed_point(field, mask, zooms, 2.0, 2000)) < 1e-12
    result = ismv(field, mask, zooms, radius=2.0, tolerance=1e-12)
    np.testing.assert_allclose(result.field, wanted, atol=1e-10)
    assert result.convergence.iterations < 60


def test_ismv_is_nearer_to_the_end_than_a_hundred_steps_of_the_iteration(
    head: Head,
) -> None:
    total = head.local + head.background
    end = ismv(total.double(), head.mask, CUBES, radius=2.0, tolerance=1e-10).field
    result = ismv(total.double(), head.mask, CUBES, radius=2.0, tolerance=1e-4)
    assert result.convergence.iterations < 40
    assert rms(result.field - end) < 1e-3 * rms(end)
    assert rms(fixed_point(total.double(), head.mask, CUBES, 2.0, 100) - end) > 5e-3 * rms(end)


def test_ismv_is_the_dense_solution() -> None:
    """Ball sums by distance, with no transform."""
    field, mask = small()
    where = np.argwhere(mask.numpy())
    balls = np.linalg.norm(where[:, None] - where[None], axis=2) <= 2
    fits = balls.sum(1) == 33
    mean = balls / 33
    background = field[mask].numpy().copy()
    background[fits] = np.linalg.solve(
        (np.eye(len(where)) - mean)[np.ix_(fits, fits)],
        mean[np.ix_(fits, ~fits)] @ background[~fits],
    )
    result = ismv(field, mask, CUBES, radius=2.0, tolerance=1e-12)
    np.testing.assert_array_equal(result.mask[mask], fits)
    np.testing.assert_allclose(result.field[mask], field[mask].numpy() - background, atol=1e-9)


# The Laplacian, LBV and HARPERELLA


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_laplacian_of_the_loops_is_that_of_torch(dtype: torch.dtype) -> None:
    image = torch.randn(9, 12, 7, dtype=dtype, generator=torch.manual_seed(1))
    inner = surrounded(torch.rand(image.shape, generator=torch.manual_seed(2)) < 0.95)
    assert 0 < inner.sum() < image.numel()
    zooms = (1.0, 1.3, 0.7)
    wanted = _outflow_torch(image, inner, [1 / zoom**2 for zoom in zooms])
    torch.testing.assert_close(outflow(image, inner, zooms), wanted)
    turned = image.permute(2, 1, 0)
    torch.testing.assert_close(
        outflow(turned, inner.permute(2, 1, 0), zooms[::-1]), wanted.permute(2, 1, 0)
    )


def test_the_laplacian_of_a_parabola_is_its_curvature() -> None:
    zooms = (1.0, 1.3, 0.7)
    x, y, z = grid((9, 8, 7), zooms)
    inner = surrounded(torch.ones(9, 8, 7, dtype=torch.bool))
    found = outflow(1 + x - 2 * y + 3 * x**2 + 0.5 * y**2 - 7 * z**2 + x * y, inner, zooms)
    torch.testing.assert_close(found, torch.where(inner, -2 * (3 + 0.5 - 7.0), 0.0).double())
    assert inner.sum() == 7 * 6 * 5


def dense_laplacian(mask: Tensor, zooms: Zooms) -> tuple[np.ndarray, np.ndarray]:
    """Minus the Laplacian between the voxels of ``mask``; which of them have six neighbours."""
    where = np.argwhere(mask.numpy())
    steps = np.abs(where[:, None] - where[None])
    matrix = np.zeros((len(where), len(where)))
    for axis, zoom in enumerate(zooms):
        matrix -= ((steps.sum(2) == 1) & (steps[..., axis] == 1)) / zoom**2
    inner = (matrix != 0).sum(1) == 6
    return matrix + np.eye(len(where)) * sum(2 / zoom**2 for zoom in zooms), inner


def test_lbv_is_the_dense_solution_of_laplaces_equation() -> None:
    field, mask = small()
    matrix, inner = dense_laplacian(mask, SMALL.zooms)
    background = field[mask].numpy().copy()
    background[inner] = np.linalg.solve(
        matrix[np.ix_(inner, inner)], -matrix[np.ix_(inner, ~inner)] @ background[~inner]
    )
    result = lbv(field, mask, SMALL.zooms, tolerance=1e-12)
    assert result.mask.equal(mask)
    np.testing.assert_array_equal(surrounded(mask)[mask], inner)
    np.testing.assert_allclose(result.field[mask], field[mask].numpy() - background, atol=1e-9)
    assert not result.field[mask & ~surrounded(mask)].any()


@pytest.mark.parametrize("zooms", [CUBES, (0.5, 0.5, 2.0), (2.0, 0.6, 1.0)])
def test_lbv_takes_tens_of_steps_whatever_the_voxels(zooms: Zooms) -> None:
    x, y, z = grid((48, 44, 40), CUBES)
    mask = (x / 22) ** 2 + (y / 20) ** 2 + (z / 19) ** 2 <= 1
    mask[:, :, ::7] &= y[:, :, ::7] > -12  # ragged
    field = torch.randn(mask.shape, generator=torch.manual_seed(3))
    assert lbv(field, mask, zooms, tolerance=1e-6).convergence.iterations < 60


def test_lbv_peels_by_a_ball_first(head: Head) -> None:
    total = head.local + head.background
    peeled = lbv(total, head.mask, CUBES, peel=2.0)
    mask = erode(head.mask, CUBES, radius=2.0)
    assert peeled.mask.equal(mask)
    assert peeled.field.equal(lbv(total, mask, CUBES).field)


def test_a_mask_without_depth_is_refused(head: Head) -> None:
    thin = torch.zeros_like(head.mask)
    thin[10:30, 10:30, 5:7] = True
    for run in (lbv, harperella):
        with pytest.raises(ValueError, match="no voxel of the mask has its six neighbours"):
            run(head.local, thin, CUBES)
    with pytest.raises(ValueError, match="peeled by 18 mm, has its six neighbours"):
        lbv(head.local, head.mask, CUBES, peel=18.0)
    with pytest.raises(ValueError, match="reaches no neighbour"):
        harperella(head.local, head.mask, CUBES, radius=0.5)


def test_harperella_is_the_dense_regularised_solution() -> None:
    zooms, radius, weight = (1.0, 1.1, 1.2), 1.2, 1e-2
    mask = torch.ones(5, 5, 4, dtype=torch.bool)
    mask[0, 0] = mask[4, :, 3] = False
    field = torch.randn(mask.shape, dtype=torch.float64, generator=torch.manual_seed(8))
    shape = padded_shape(mask.shape, zooms, margin=2 * radius)
    every = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, 3)
    steps = (every[:, None] - every[None] + np.array(shape) // 2) % shape - np.array(shape) // 2
    mean = (((steps * zooms) ** 2).sum(2) <= radius**2 * (1 + 1e-5)).astype(float)
    mean /= mean.sum(1)
    number = np.ravel_multi_index(np.argwhere(mask.numpy()).T, shape)
    matrix, inner = dense_laplacian(mask, zooms)
    laplacian = np.zeros(len(every))
    laplacian[number[inner]] = matrix[inner] @ field[mask].numpy()
    outside = np.ones(len(every), dtype=bool)
    outside[number[inner]] = False
    smooth = mean @ laplacian
    columns = mean[:, outside]
    rest = smooth[~outside].mean() - smooth
    laplacian[outside] = np.linalg.solve(
        columns.T @ columns + weight * np.eye(columns.shape[1]), columns.T @ rest
    )
    whole = np.zeros((len(every), len(every)))
    rows = np.arange(len(every))
    for unit, zoom in zip(np.eye(3, dtype=int), zooms, strict=True):
        for step in (unit, -unit):
            whole[rows, np.ravel_multi_index(((every + step) % shape).T, shape)] -= 1 / zoom**2
            whole[rows, rows] += 1 / zoom**2
    local = np.linalg.pinv(whole) @ laplacian
    result = harperella(field, mask, zooms, radius=radius, lambda_=weight, tolerance=1e-13)
    assert result.mask.equal(surrounded(mask))
    np.testing.assert_allclose(result.field[result.mask], local[number[inner]], atol=1e-9)


# PDF


def test_minimal_residuals_are_the_steps_of_the_normal_equations() -> None:
    generator = torch.manual_seed(4)
    matrix = torch.randn(12, 30, dtype=torch.float64, generator=generator)
    matrix[6:] = matrix[:6] @ torch.diag(torch.linspace(0.5, 2, 30).double())
    matrix[11] = matrix[0]  # singular: no x meets all data
    right = torch.randn(12, dtype=torch.float64, generator=generator)
    for steps in (1, 2, 5):
        options = {"tolerance": 0.0, "max_iterations": steps}
        dual, end = minimal_residual(lambda y: matrix @ (matrix.T @ y), right, **options)
        x, _ = conjugate_gradient(lambda x: matrix.T @ (matrix @ x), matrix.T @ right, **options)
        torch.testing.assert_close(matrix.T @ dual, x)
        assert end.iterations == steps
    dual, end = minimal_residual(
        lambda y: matrix @ (matrix.T @ y), right, tolerance=1e-9, max_iterations=200
    )
    assert end.converged
    wanted = torch.linalg.lstsq(matrix, right, driver="gelsd").solution
    torch.testing.assert_close(matrix @ (matrix.T @ dual), matrix @ wanted, rtol=1e-6, atol=1e-8)


def test_minimal_residuals_end_where_all_is_explained_and_where_nothing_is() -> None:
    def apply(y: Tensor) -> Tensor:
        return torch.stack([2 * y[0], 0 * y[1]])

    for right, steps in ((torch.tensor([3.0, 0.0]), 1), (torch.tensor([0.0, 3.0]), 0)):
        _, end = minimal_residual(apply, right, tolerance=1e-3, max_iterations=9)
        assert end[:2] == (True, steps)


@pytest.mark.parametrize("noisy", [False, True], ids=["even", "noise"])
def test_pdf_takes_tens_of_steps_where_the_mask_leaks(head: Head, noisy: bool) -> None:
    """The mask holds a source of the background, and noise around it."""
    leak = (head.y > 14) & ((head.x / 22) ** 2 + (head.y / 22) ** 2 + (head.z / 12) ** 2 <= 1)
    noise = torch.where(leak, 0.3, 0.003)
    total = head.local + head.background
    total = total + noise * torch.randn(total.shape, generator=torch.manual_seed(6))
    result = pdf(total, head.mask | leak, CUBES, noise=noise if noisy else None)
    assert result.convergence.converged
    assert result.convergence.iterations < 80


def test_pdf_and_lbv_keep_the_mask_and_the_others_say_what_they_lose(head: Head) -> None:
    lost = {"sharp": 6.0, "vsharp": 1.0, "resharp": 6.0, "ismv": 4.0, "lbv": 0.0, "pdf": 0.0}
    for name in NAMES:
        kept = function_of("background", name)(head.local, head.mask, CUBES).mask
        wanted = erode(head.mask, CUBES, radius=lost[name]) if name in lost else None
        assert kept.equal(surrounded(head.mask) if wanted is None else wanted)
