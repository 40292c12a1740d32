"""The loops of the CPU against the torch operations, and what both promise."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import numba
import pytest
import torch
from torch import Tensor

from qsmpipe.numerics.fused import loops
from qsmpipe.numerics.fused.curvature import curvature_split, curvature_step
from qsmpipe.numerics.fused.data import data_split, limit_split, phase_limit_split, phase_split
from qsmpipe.numerics.fused.gradient import ALLOWED, OBSERVED, STEEP, Sums, gradient_split
from qsmpipe.numerics.fused.spectral import dipole_step, harmonic_step
from qsmpipe.numerics.fused.vectors import descend, dot
from qsmpipe.numerics.operators import gradient, gradient_adjoint

ZOOMS = (1.0, 0.7, 2.5)
SHAPES = [(19, 7, 5), (8, 6, 4), (1, 5, 3), (17, 1, 2), (9, 4, 1)]
BOXES = [(11, 7, 5), (19, 3, 5), (19, 7, 2), (9, 4, 3), (1, 1, 1)]
"""Corners of the first of them."""
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")


class State(NamedTuple):
    image: Tensor
    previous: Tensor
    state: Tensor
    zone: Tensor
    escape: Tensor
    out: Tensor

    def copy(self, device: str = "cpu") -> "State":
        return State(*(tensor.clone().to(device) for tensor in self))


def random_state(
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    box: tuple[int, int, int] | None = None,
) -> State:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=dtype)

    box = box or shape
    zone = torch.randint(0, 32, box, generator=generator, dtype=torch.uint8)
    return State(
        normal(*shape), normal(*box), normal(3, *box), zone, normal(*shape), normal(*shape)
    )


def step(s: State, *, limited: bool = True, edges: bool = False) -> Sums:
    return gradient_split(
        s.image,
        s.previous,
        s.state,
        s.zone,
        ZOOMS,
        threshold=0.8,
        weight=1.7,
        edges=edges,
        escape=s.escape if limited else None,
        escape_weight=0.3,
        out=s.out,
    )


def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "usable", lambda tensor: False)


@pytest.mark.parametrize(("limited", "edges"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "box"), [(shape, shape) for shape in SHAPES] + [(SHAPES[0], box) for box in BOXES],
    ids=str,
)  # fmt: skip
def test_both_bodies_of_the_gradient_step_agree(
    shape: tuple[int, int, int],
    box: tuple[int, int, int],
    dtype: torch.dtype,
    limited: bool,
    edges: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = random_state(shape, dtype, box)
    theirs = ours.copy()
    found = step(ours, limited=limited, edges=edges)
    by_torch(monkeypatch)
    expected = step(theirs, limited=limited, edges=edges)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("edges", [False, True])
@pytest.mark.parametrize("body", ["loops", "torch"])
@pytest.mark.parametrize("box", [(11, 6, 5), (9, 4, 3)], ids=str)
def test_the_gradient_step_is_that_of_the_textbook(
    box: tuple[int, int, int], body: str, edges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the box the threshold is 0, and nothing is allowed."""
    if body == "torch":
        by_torch(monkeypatch)
    s = random_state((11, 6, 5), torch.float64, box)
    corner = tuple(slice(n) for n in box)
    zone = torch.zeros(11, 6, 5, dtype=torch.uint8)
    zone[corner] = s.zone
    threshold = torch.zeros(3, 11, 6, 5, dtype=torch.float64)
    threshold[:, *corner] = 0.8
    if edges:
        threshold *= torch.stack([zone & bit == 0 for bit in STEEP])
    before = s.copy()
    u = torch.zeros_like(threshold)
    u[:, *corner] = before.state
    u = u.clamp(-threshold, threshold)
    slope = gradient(s.image, ZOOMS)
    z = torch.sign(slope + u) * torch.relu((slope + u).abs() - threshold)
    dual = u + slope - z
    banned = zone & ALLOWED == 0
    moved = torch.zeros_like(s.image)
    held = torch.where(banned, 0.0, s.image)  # the split of x, that is x where it is allowed
    moved[banned] = (before.escape + s.image)[banned]
    sums = step(s, edges=edges)
    right = 1.7 * gradient_adjoint(z - dual, ZOOMS) + 0.3 * (held - moved)
    torch.testing.assert_close(s.state, (z + dual)[:, *corner])
    torch.testing.assert_close(s.escape, moved)
    torch.testing.assert_close(s.out, right)
    seen = s.zone & OBSERVED > 0
    image = s.image[corner]
    assert sums.change == pytest.approx((image - before.previous)[seen].square().sum().item())
    assert sums.size == pytest.approx(image[seen].square().sum().item())
    assert sums.gap == pytest.approx((slope - z).square().sum().item())
    assert torch.equal(s.image, before.image)
    assert torch.equal(s.previous, image)
    assert torch.equal(s.zone, before.zone)


def complex_arrays(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(5, 4, 7, generator=generator, dtype=dtype)

    return [torch.complex(normal(), normal()) for _ in range(3)] + [normal(), normal()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_bodies_of_the_dipole_step_agree(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, residual, field, transfer, other = ours = complex_arrays(dtype)
    ours[4:] = [other[:, :1, :1].square(), other[:1, :, :1].square(), other[:1, :1].square()]
    theirs = [x.clone() for x in ours]
    system = 1.7 * sum(ours[4:]) + 0.3 * transfer**2 + 0.2
    chi = (right + 0.3 * transfer * (field + residual)) / system

    def solve(arrays: list[Tensor]) -> None:
        dipole_step(*arrays[:4], arrays[4:], weights=(1.7, 0.3, 0.2))

    solve(ours)
    torch.testing.assert_close(right, chi)
    torch.testing.assert_close(field, transfer * chi)
    by_torch(monkeypatch)
    solve(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_bodies_of_the_data_step_agree(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = [torch.rand(5, 4, 7, generator=generator, dtype=dtype) for _ in range(4)]
    theirs = [x.clone() for x in ours]
    predicted, dual, measured, trust = (x.clone() for x in ours)
    data_split(*ours)
    # y = (W^2 f + mu (D x + u)) / (W^2 + mu), u' = u + D x - y, and y - u' - D x
    y = trust * measured + (1 - trust) * (predicted + dual)
    changed = dual + predicted - y
    torch.testing.assert_close(ours[1], changed)
    torch.testing.assert_close(ours[0], y - changed - predicted)
    by_torch(monkeypatch)
    data_split(*theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def cost(d: Tensor, weight: float, term: object) -> Tensor:
    """What a residual costs; ``weight`` is that of the term over the penalty."""
    if term is limit_split:
        return weight * d.abs()
    if term is phase_split:
        return weight * (1 - d.cos())
    return 2 * weight * (d / 2).sin().abs()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 1.9, 2.5, 40.0])
@pytest.mark.parametrize("term", [limit_split, phase_split, phase_limit_split])
def test_the_split_of_a_data_term_is_the_cheapest_of_many(term: object, weight: float) -> None:
    """y = D x + u - u' has the least cost(y - f) + (y - D x - u)^2 / 2 of 20001 tried."""
    predicted = torch.linspace(-4, 4, 41, dtype=torch.float64)
    dual = torch.full_like(predicted, 0.2)
    measured = torch.full_like(predicted, 0.3)
    wanted = predicted + dual
    out, changed = predicted.clone(), dual.clone()
    term(out, changed, measured, torch.full_like(predicted, weight))
    torch.testing.assert_close(out, dual - 2 * changed)

    def total(y: Tensor) -> Tensor:
        return cost(y - measured, weight, term) + (y - wanted) ** 2 / 2

    tried = torch.linspace(-10, 10, 20001, dtype=torch.float64)[:, None].expand(-1, 41)
    assert (total(wanted - changed) <= total(tried).min(0).values + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("term", [limit_split, phase_split, phase_limit_split])
def test_both_bodies_of_a_data_term_agree(
    term: object, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = [5 * torch.randn(9, 8, 7, generator=generator, dtype=dtype) for _ in range(4)]
    ours[3] = ours[3].abs()
    ours[3][0] = 0
    theirs = [x.clone() for x in ours]
    term(*ours)
    by_torch(monkeypatch)
    term(*theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("term", [phase_split, phase_limit_split])
def test_phase_knows_no_whole_turns(term: object) -> None:
    generator = torch.Generator().manual_seed(0)
    one = [torch.randn(6, 5, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    other = [x.clone() for x in one]
    other[2] += 2 * torch.pi * torch.randint(-3, 4, one[2].shape, generator=generator).double()
    for arguments in (one, other):
        term(*arguments, torch.full_like(one[0], 3.0))
    torch.testing.assert_close(one[:2], other[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_bodies_of_the_harmonic_step_solve_the_two_equations(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = complex_arrays(dtype)[:3] + complex_arrays(dtype)[1::-1]
    transfer, smooth = complex_arrays(dtype)[3:]
    smooth = smooth.abs()
    right, residual, bend, field, remnant = (x.clone() for x in ours)
    theirs = [x.clone() for x in ours]
    s, mu, nu, e = 0.4, 0.7, 1.3, 0.2
    harmonic_step(*ours, transfer, smooth, weights=(s, mu, nu, e))
    x, h = ours[0], ours[4]
    target = mu * (field + residual)
    first = (s * smooth + mu * transfer**2 + e) * x + mu * transfer * h
    second = mu * transfer * x + (mu + nu * smooth**2) * h
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(first, right + transfer * target, **close)
    torch.testing.assert_close(second, target + nu * smooth * (smooth * remnant + bend), **close)
    torch.testing.assert_close(ours[3], transfer * x + h, **close)
    torch.testing.assert_close(ours[2], smooth * h, **close)
    by_torch(monkeypatch)
    harmonic_step(*theirs, transfer, smooth, weights=(s, mu, nu, e))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **close)


def symmetric_derivative(slopes: Tensor) -> Tensor:
    """(3, 3, X, Y, Z) of backward differences, made symmetric."""
    back = torch.stack(
        [(slopes - slopes.roll(1, axis - 3)) / zoom for axis, zoom in enumerate(ZOOMS)]
    )
    return (back + back.transpose(0, 1)) / 2


class Curved(NamedTuple):
    slopes: list[Tensor]
    first: Tensor
    second: Tensor

    def step(self, s: State) -> Sums:
        return curvature_split(
            s.image, s.previous, self.slopes, self.first, self.second, s.zone, s.escape, ZOOMS,
            thresholds=(0.8, 0.5), weights=(1.7, 0.6, 0.3), out=s.out,
        )  # fmt: skip


def random_curved(shape: tuple[int, int, int], dtype: torch.dtype) -> Curved:
    generator = torch.Generator().manual_seed(1)
    parts = torch.randn(12, *shape, generator=generator, dtype=dtype)
    return Curved([part.clone() for part in parts[:3]], parts[3:6].clone(), parts[6:].clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_bodies_of_the_curvature_step_agree(
    shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = random_state(shape, dtype), random_state(shape, dtype)
    mine, other = random_curved(shape, dtype), random_curved(shape, dtype)
    found = mine.step(ours)
    by_torch(monkeypatch)
    assert found == pytest.approx(other.step(theirs), rel=1e-5)
    for a, b in zip((*ours, *mine), (*theirs, *other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_curvature_step_is_that_of_the_textbook() -> None:
    """Its right-hand sides are the derivatives of the penalties, found by autograd."""
    shape, t, weights = (7, 6, 5), (0.8, 0.5), (1.7, 0.6, 0.3)
    s, c = random_state(shape, torch.float64), random_curved(shape, torch.float64)
    image = s.image.clone().requires_grad_()
    w = torch.stack(c.slopes).requires_grad_()
    index = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))

    def parts() -> tuple[Tensor, Tensor]:
        derivative = symmetric_derivative(w)
        return gradient(image, ZOOMS) - w, torch.stack([derivative[i] for i in index])

    def shrunk(v: Tensor, threshold: float) -> Tensor:
        return torch.sign(v) * torch.relu(v.abs() - threshold)

    one, two = (part.detach() for part in parts())
    v1, v2 = one + c.first.clamp(-t[0], t[0]), two + c.second.clamp(-t[1], t[1])
    z1, z2 = shrunk(v1, t[0]), shrunk(v2, t[1])
    twice = torch.tensor([1.0, 1, 1, 2, 2, 2], dtype=torch.float64)[:, None, None, None]
    # gradient of sum(r <A(x, w), z - u>), which is the right-hand side r A'(z - u)
    now1, now2 = parts()
    pull = weights[0] * (now1 * (2 * z1 - v1)).sum()
    pull = pull + weights[1] * (twice * now2 * (2 * z2 - v2)).sum()
    for_image, for_w = torch.autograd.grad(pull, (image, w))
    allowed = s.zone & ALLOWED > 0
    moved = torch.where(allowed, 0.0, s.escape + s.image)
    for_image = for_image + weights[2] * torch.where(allowed, s.image, -moved)
    sums = c.step(s)
    torch.testing.assert_close(c.first, v1)
    torch.testing.assert_close(c.second, v2)
    torch.testing.assert_close(s.escape, moved)
    torch.testing.assert_close(s.out, for_image)
    torch.testing.assert_close(torch.stack(c.slopes), for_w)
    gap = (one - z1).square().sum() + (twice * (two - z2).square()).sum()
    assert sums.gap == pytest.approx(gap.item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_bodies_of_the_curvature_solution_solve_the_four_equations(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every frequency, as 4 by 4 systems by LAPACK."""
    generator = torch.Generator().manual_seed(0)
    kind = dtype.to_complex()
    r1, r2, mu, e = weights = (0.4, 0.7, 0.5, 0.2)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=kind)

    ours = [normal(5, 4, 3) for _ in range(6)]  # R, S, C, P
    theirs, before = [x.clone() for x in ours], [x.clone() for x in ours]
    transfer = torch.randn(5, 4, 3, generator=generator, dtype=dtype)
    symbols = [normal(5, 1, 1), normal(1, 4, 1), normal(1, 1, 3)]
    g = torch.stack(torch.broadcast_tensors(*symbols), -1)
    right, sx, sy, sz, residual, field = before
    system = torch.zeros(5, 4, 3, 4, 4, dtype=kind)
    squared = g.abs().square().sum(-1)
    system[..., 0, 0] = r1 * squared + mu * transfer**2 + e
    system[..., 0, 1:] = -r1 * g.conj()
    system[..., 1:, 0] = -r1 * g
    back = -g.conj()
    system[..., 1:, 1:] = r2 / 2 * back[..., :, None] * back[..., None, :].conj()
    system[..., 1:, 1:] += (r1 + r2 / 2 * squared)[..., None, None] * torch.eye(3, dtype=kind)
    known = torch.stack([right + mu * transfer * (field + residual), sx, sy, sz], -1)
    expected = torch.linalg.solve(system, known)

    def solve(arrays: list[Tensor]) -> None:
        curvature_step(
            arrays[0], arrays[1:4], arrays[4], arrays[5], transfer, symbols, weights=weights
        )

    close = {"rtol": 1e-3, "atol": 1e-4}
    solve(ours)
    torch.testing.assert_close(torch.stack(ours[:4], -1), expected, **close)
    torch.testing.assert_close(ours[5], transfer * ours[0])
    by_torch(monkeypatch)
    solve(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (7, 5, 9), (70, 60, 50)], ids=str)
def test_both_bodies_of_the_vector_steps_agree(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, image = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    theirs = ours.clone()
    found = dot(ours, image), descend(ours, image, 0.3)
    by_torch(monkeypatch)
    assert found == pytest.approx((dot(theirs, image), descend(theirs, image, 0.3)), rel=1e-5)
    torch.testing.assert_close(ours, theirs)


def test_the_number_of_threads_changes_no_bit() -> None:
    threads = numba.get_num_threads()
    results = []
    try:
        for count in sorted({1, numba.config.NUMBA_NUM_THREADS}):
            numba.set_num_threads(count)
            s = random_state((37, 20, 16))
            results.append((step(s), s))
    finally:
        numba.set_num_threads(threads)
    s = random_state((37, 20, 16))
    results.append((step(s), s))
    for sums, state in results[1:]:
        assert sums == results[0][0]
        assert all(torch.equal(a, b) for a, b in zip(state, results[0][1], strict=True))


def test_no_change_is_no_change_and_nothing_is_infinitely_much() -> None:
    assert Sums(0.0, 0.0, 1.0).relative_change == 0.0
    assert Sums(1.0, 0.0, 1.0).relative_change == float("inf")
    assert Sums(1.0, 4.0, 1.0).relative_change == 0.5


def test_not_a_number_stays_visible() -> None:
    s = random_state((9, 4, 3))
    s.image[2, 1, 1] = torch.nan
    s.zone.fill_(OBSERVED)
    assert not step(s).relative_change <= 1e300


def test_it_runs_where_no_folder_can_be_written_to(tmp_path: Path) -> None:
    """A read-only package, no home, a cache folder that is none: compile, do not crash."""
    code = """
        import numba.core.caching as caching
        def refuse(self):
            raise OSError("read-only file system")
        for kind in vars(caching).values():
            if isinstance(kind, type) and issubclass(kind, caching._CacheLocator):
                kind.ensure_cache_path = refuse
        import torch
        from qsmpipe.numerics.fused.data import data_split
        a, b, f, t = torch.ones(4), torch.zeros(4), torch.zeros(4), torch.full((4,), 0.5)
        data_split(a, b, f, t)
        assert b.tolist() == [0.5] * 4, b
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    environment["NUMBA_CACHE_DIR"] = str(tmp_path / "missing" / "folder")
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert not (tmp_path / "missing").exists()


@needs_cuda
@pytest.mark.parametrize("limited", [True, False])
def test_cuda_agrees_with_the_cpu(limited: bool) -> None:
    ours = random_state((33, 20, 14))
    theirs = ours.copy("cuda")
    found, expected = step(ours, limited=limited), step(theirs, limited=limited)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other.cpu(), rtol=1e-5, atol=1e-5)
    assert found == pytest.approx(expected, rel=1e-5)
