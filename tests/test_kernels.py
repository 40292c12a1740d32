"""Kernels, operators and solvers against analytic fields, adjoints and dense algebra."""

import itertools
import math

import numpy as np
import pytest
import scipy.fft
import scipy.sparse.linalg
import torch
from phantoms import dipole_spectrum
from torch import Tensor

from qsmpipe.numerics.fourier import convolve, irfft, padded_shape, rfft
from qsmpipe.numerics.kernels import AXIAL, dipole, gaussian, laplacian
from qsmpipe.numerics.operators import Dipole, gradient, gradient_adjoint
from qsmpipe.numerics.simulate.field import FreeSpace
from qsmpipe.numerics.solvers import conjugate_gradient, dot, lsmr

TILTED = (math.sin(math.radians(30)), 0.0, math.cos(math.radians(30)))
OBLIQUE = (0.48, 0.6, 0.64)
GRIDS = {
    "cubic": ((16, 16, 16), (1.0, 1.0, 1.0)),
    "odd": ((15, 13, 17), (1.0, 1.0, 1.0)),
    "anisotropic": ((14, 12, 9), (0.7, 1.0, 2.5)),
}


def coordinates(shape: tuple[int, ...], zooms: tuple[float, ...]) -> list[Tensor]:
    """Offsets (mm) from the grid's middle voxel."""
    return list(
        torch.meshgrid(
            *(
                (torch.arange(n, dtype=torch.float64) - n // 2) * zoom
                for n, zoom in zip(shape, zooms, strict=True)
            ),
            indexing="ij",
        )
    )


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    "b0_direction", [AXIAL, TILTED, OBLIQUE], ids=["axial", "tilt", "oblique"]
)
@pytest.mark.parametrize(
    ("shape", "zooms"),
    [((64, 64, 64), (1.0, 1.0, 1.0)), ((65, 63, 61), (1.0, 1.0, 1.0)),
     ((80, 64, 40), (0.8, 1.0, 1.6))],
    ids=["cubic", "odd", "anisotropic"],
)  # fmt: skip
def test_the_field_of_a_sphere(
    shape: tuple[int, int, int], zooms: tuple[float, float, float], b0_direction: tuple[float, ...]
) -> None:
    """Outside: chi/3 (a/r)^3 (3 cos^2 - 1); inside: 0. Padded to twice the size."""
    radius = 8.0
    x, y, z = coordinates(shape, zooms)
    r = (x**2 + y**2 + z**2).sqrt()
    ball = (r <= radius).to(torch.float64)
    field = Dipole.on_grid(ball, zooms, b0_direction)(ball)
    volume = ball.sum() * math.prod(zooms)  # the sphere of voxels is not quite the sphere
    cosine = (x * b0_direction[0] + y * b0_direction[1] + z * b0_direction[2]) / r
    expected = volume / (4 * math.pi) * (3 * cosine**2 - 1) / r**3
    far = (r > 1.5 * radius) & (r < 3 * radius)
    assert (field - expected)[far].norm() < 0.03 * expected[far].norm()
    assert field[r < radius - 4].abs().max() < 0.015


@pytest.mark.parametrize("angle", [90, 60, 0])
def test_the_field_of_an_infinite_cylinder(angle: float) -> None:
    """Inside: chi/6 (3 cos^2 - 1); outside: chi/2 sin^2 (a/r)^2 cos 2 phi [axis along y]."""
    radius, shape = 6.0, (160, 1, 160)
    x, _, z = coordinates(shape, (1.0, 1.0, 1.0))
    r = (x**2 + z**2).sqrt()
    rod = (r <= radius).to(torch.float64)
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    kernel = dipole(shape, (1.0, 1.0, 1.0), (0.0, cosine, sine), like=rod)
    field = convolve(rod, kernel, shape)
    area = rod.sum() / math.pi
    outside = area / 2 * sine**2 * (z**2 - x**2) / r**4
    far = (r > 1.5 * radius) & (r < 4 * radius)
    inside = (3 * cosine**2 - 1) / 6
    assert (field - outside)[far].abs().max() < 0.02
    assert (field - outside)[far].square().mean().sqrt() < 0.006
    torch.testing.assert_close(field[r < radius - 2].mean().item(), inside, rtol=0, atol=0.006)


@pytest.mark.parametrize("degrees", [0, 30, 45, 70])
def test_the_field_of_a_cylinder_across_an_oblique_b0(degrees: float) -> None:
    """Outside: chi/2 (a/r)^2 cos 2 (phi - phi0); inside: -chi/6. Its edge rings nowhere."""
    radius, shape = 6.0, (161, 1, 157)
    x, _, z = coordinates(shape, (1.0, 1.0, 1.0))
    r = (x**2 + z**2).sqrt()
    rod = (r <= radius).to(torch.float64)
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    kernel = dipole(shape, (1.0, 1.0, 1.0), (sine, 0.0, cosine), like=rod)
    field = convolve(rod, kernel, shape)
    along, across = cosine * z + sine * x, cosine * x - sine * z
    outside = rod.sum() / math.pi / 2 * (along**2 - across**2) / r**4
    far = (r > 1.5 * radius) & (r < 4 * radius)
    assert (field - outside)[far].square().mean().sqrt() < 0.006
    torch.testing.assert_close(field[r < radius - 2].mean().item(), -1 / 6, rtol=0, atol=0.006)


@pytest.mark.parametrize(("shape", "zooms"), GRIDS.values(), ids=GRIDS)
def test_the_kernel_is_its_formula_on_the_whole_spectrum(
    shape: tuple[int, int, int], zooms: tuple[float, float, float]
) -> None:
    expected = dipole_spectrum(shape, zooms, OBLIQUE)
    kernel = dipole(shape, zooms, OBLIQUE, like=torch.zeros((), dtype=torch.float64))
    np.testing.assert_allclose(kernel, expected[..., : shape[2] // 2 + 1], atol=1e-12)
    # the same on all of the spectrum: +k and -k are one frequency at the end of an even axis
    mirrored = np.roll(np.flip(expected), 1, (0, 1, 2))
    np.testing.assert_allclose(expected, mirrored, atol=1e-12)


@pytest.mark.parametrize("b0_direction", [AXIAL, TILTED, OBLIQUE], ids=str)
@pytest.mark.parametrize(
    ("shape", "zooms"),
    [((48, 48, 48), (1.0, 1.0, 1.0)), ((49, 47, 45), (1.0, 1.0, 1.0)),
     ((60, 48, 32), (0.8, 1.0, 1.6))],
    ids=["cubic", "odd", "anisotropic"],
)  # fmt: skip
def test_a_ball_of_voxels_has_the_field_of_its_cuboids(
    shape: tuple[int, int, int], zooms: tuple[float, float, float], b0_direction: tuple[float, ...]
) -> None:
    """Against the exact field of cuboids: oblique B0 is as good as axial, nothing rings."""
    x, y, z = coordinates(shape, zooms)
    r = (x**2 + y**2 + z**2).sqrt()
    ball = (r <= 6).to(torch.float64)
    field = Dipole.on_grid(ball, zooms, b0_direction)(ball)
    expected = FreeSpace.on_grid(ball, zooms, b0_direction)(ball)
    near = r < 18
    assert (field - expected)[near].norm() < 0.065 * expected[near].norm()


@pytest.mark.parametrize("length", [0.0, 0.9, 2.0])
def test_b0_must_be_a_unit_vector(length: float) -> None:
    with pytest.raises(ValueError, match="unit vector"):
        dipole((4, 4, 4), (1, 1, 1), (0, 0, length), like=torch.zeros(()))


def test_padding_keeps_the_dipole_from_wrapping() -> None:
    chi = torch.zeros(24, 24, 24, dtype=torch.float64)
    chi[1, 12, 12] = 1.0
    wide = Dipole.on_grid(chi, (1, 1, 1), margin=200.0)(chi)
    plain = Dipole.on_grid(chi, (1, 1, 1), margin=0.0)(chi)
    twice = Dipole.on_grid(chi, (1, 1, 1))(chi)
    far = slice(16, 24)
    assert (plain - wide)[far].norm() > 5 * wide[far].norm()
    assert (twice - wide)[far].norm() < 0.5 * wide[far].norm()
    assert (twice - wide).norm() < 2e-3 * wide.norm()


@pytest.mark.parametrize(("shape", "zooms"), GRIDS.values(), ids=GRIDS)
def test_the_dipole_is_self_adjoint(
    shape: tuple[int, int, int], zooms: tuple[float, float, float]
) -> None:
    apply = Dipole.on_grid(noise(*shape), zooms, OBLIQUE, margin=3.0)
    x, y = noise(*shape), noise(*shape, seed=1)
    assert math.isclose(dot(apply(x), y), dot(x, apply(y)), rel_tol=1e-10, abs_tol=1e-10)


@pytest.mark.parametrize(("shape", "zooms"), GRIDS.values(), ids=GRIDS)
def test_the_gradient_and_its_adjoint(
    shape: tuple[int, int, int], zooms: tuple[float, float, float]
) -> None:
    x, y = noise(*shape), noise(3, *shape, seed=1)
    assert math.isclose(
        dot(gradient(x, zooms), y), dot(x, gradient_adjoint(y, zooms)), rel_tol=1e-12
    )


def test_the_gradient_is_per_mm() -> None:
    zooms = (0.5, 1.0, 3.0)
    x, y, z = coordinates((6, 5, 4), zooms)
    slopes = gradient(2 * x - 3 * y + 0.5 * z, zooms)[:, :-1, :-1, :-1]
    for slope, expected in zip(slopes, (2, -3, 0.5), strict=True):
        torch.testing.assert_close(slope, torch.full_like(slope, expected))


@pytest.mark.parametrize(("shape", "zooms"), GRIDS.values(), ids=GRIDS)
def test_the_laplacian_has_the_eigenvalues_of_the_gradient(
    shape: tuple[int, int, int], zooms: tuple[float, float, float]
) -> None:
    x = noise(*shape)
    expected = gradient_adjoint(gradient(x, zooms), zooms)
    torch.testing.assert_close(convolve(x, laplacian(shape, zooms, like=x), shape), expected)


def test_the_gaussian_has_its_width() -> None:
    shape, zooms, sigma = (64, 64, 48), (1.0, 1.0, 1.5), 4.0
    x, y, z = coordinates(shape, zooms)
    point = ((x == 0) & (y == 0) & (z == 0)).to(torch.float64)
    bell = convolve(point, gaussian(shape, zooms, sigma, like=point), shape)
    expected = torch.exp(-(x**2 + y**2 + z**2) / (2 * sigma**2))
    torch.testing.assert_close(bell / bell.max(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("margin", [0.0, 3.0, 10.0])
def test_padded_sizes_hold_the_margin_and_are_fast(margin: float) -> None:
    for shape, zooms in GRIDS.values():
        for n, zoom, size in zip(shape, zooms, padded_shape(shape, zooms, margin), strict=True):
            assert (size - n) * zoom >= margin
            assert size == scipy.fft.next_fast_len(size, real=True)


def test_padding_puts_zeros_behind() -> None:
    image = noise(3, 4, 5)
    padded = torch.zeros(6, 8, 9, dtype=torch.float64)
    padded[:3, :4, :5] = image
    torch.testing.assert_close(rfft(image, (6, 8, 9)), torch.fft.rfftn(padded))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(9, 10, 12), (8, 7, 11)])
def test_there_and_back_gives_the_image(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Several images, odd and even, in any layout; the spectrum is spared unless told."""
    image = noise(2, 5, 7, 6).to(dtype).transpose(1, 3)
    spectrum = rfft(image, shape)
    kept = spectrum.clone()
    torch.testing.assert_close(irfft(spectrum, shape, image.shape[-3:]), image)
    assert torch.equal(spectrum, kept)
    torch.testing.assert_close(irfft(spectrum, shape, shape, overwrite=True)[:, :6, :7, :5], image)


def test_derivatives_go_through_a_convolution() -> None:
    chi = noise(5, 6, 4).requires_grad_()
    forward = Dipole.on_grid(chi.detach(), (1, 1, 1), TILTED)
    (forward(chi) ** 2).sum().backward()
    torch.testing.assert_close(chi.grad, 2 * forward(forward(chi.detach())))


@pytest.mark.parametrize("preconditioned", [False, True])
def test_conjugate_gradient_against_a_dense_solve(preconditioned: bool) -> None:
    a = noise(30, 30)
    system = a @ a.T + torch.diag(torch.logspace(-1, 3, 30, dtype=torch.float64))
    right = noise(30, seed=1)
    diagonal = system.diagonal()
    before = right.clone()
    x, convergence = conjugate_gradient(
        lambda v: system @ v,
        right,
        precondition=(lambda v: v / diagonal) if preconditioned else None,
        tolerance=1e-11,
        max_iterations=200,
    )
    assert convergence.converged
    torch.testing.assert_close(x, torch.linalg.solve(system, right), rtol=1e-7, atol=1e-9)
    assert torch.equal(right, before)


@pytest.mark.parametrize(("rows", "columns"), [(30, 12), (12, 12), (12, 30)])
@pytest.mark.parametrize("steps", [1, 4, 9])
def test_lsmr_takes_the_steps_of_another_lsmr(rows: int, columns: int, steps: int) -> None:
    system, right = noise(rows, columns), noise(rows, seed=1)
    expected = scipy.sparse.linalg.lsmr(
        system.numpy(), right.numpy(), atol=0, btol=0, conlim=0, maxiter=steps
    )[0]
    x, convergence = lsmr(
        lambda v: system @ v, lambda v: system.T @ v, right, tolerance=0, max_iterations=steps
    )
    np.testing.assert_allclose(x.numpy(), expected, rtol=1e-8, atol=1e-10)
    assert convergence.iterations == steps
    normal = (system.T @ (system @ x - right)).norm() / (system.T @ right).norm()
    assert math.isclose(convergence.change, normal.item(), rel_tol=1e-6, abs_tol=1e-9)


def test_lsmr_against_a_dense_solve() -> None:
    system, right = noise(30, 12), noise(30, seed=1)
    before = right.clone()
    x, convergence = lsmr(
        lambda v: system @ v, lambda v: system.T @ v, right, tolerance=1e-10, max_iterations=50
    )
    assert convergence.converged
    expected = torch.linalg.lstsq(system, right[:, None]).solution[:, 0]
    torch.testing.assert_close(x, expected, rtol=1e-7, atol=1e-9)
    assert torch.equal(right, before)


@pytest.mark.parametrize("solve", ["cg", "lsmr"])
def test_nothing_to_solve_is_solved_at_once(solve: str) -> None:
    zero = torch.zeros(5)
    if solve == "cg":
        x, convergence = conjugate_gradient(torch.clone, zero, tolerance=0, max_iterations=3)
    else:
        x, convergence = lsmr(torch.clone, torch.clone, zero, tolerance=0, max_iterations=3)
    assert torch.equal(x, zero)
    assert convergence.converged
    assert convergence.iterations == 0


@pytest.mark.parametrize("axes", [*itertools.permutations(range(3))], ids=str)
def test_axes_are_interchangeable(axes: tuple[int, int, int]) -> None:
    """On odd grids, where every frequency of an oblique kernel has its mirror image."""
    chi, zooms = noise(9, 15, 25), (1, 2, 3)
    expected = Dipole.on_grid(chi, zooms, OBLIQUE, margin=0)(chi)
    turned = chi.permute(axes)
    field = Dipole.on_grid(
        turned,
        tuple(zooms[axis] for axis in axes),
        tuple(OBLIQUE[axis] for axis in axes),
        margin=0,
    )(turned)
    torch.testing.assert_close(field, expected.permute(axes))
