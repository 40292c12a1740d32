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

from qsmpipe.numerics import fused
from qsmpipe.numerics.fused import ALLOWED, OBSERVED, Sums, data_split, dipole_step, gradient_split
from qsmpipe.numerics.operators import gradient, gradient_adjoint

ZOOMS = (1.0, 0.7, 2.5)
SHAPES = [(19, 7, 5), (8, 6, 4), (1, 5, 3), (17, 1, 2), (9, 4, 1)]
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


def random_state(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=dtype)

    zone = torch.randint(0, 4, shape, generator=generator, dtype=torch.uint8)
    return State(
        normal(*shape), normal(*shape), normal(3, *shape), zone, normal(*shape), normal(*shape)
    )


def step(s: State, *, limited: bool = True) -> Sums:
    return gradient_split(
        s.image,
        s.previous,
        s.state,
        s.zone,
        ZOOMS,
        threshold=0.8,
        weight=1.7,
        escape=s.escape if limited else None,
        escape_weight=0.3,
        out=s.out,
    )


def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_on_loops", lambda tensor: False)


@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_bodies_of_the_gradient_step_agree(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    limited: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = random_state(shape, dtype)
    theirs = ours.copy()
    found = step(ours, limited=limited)
    by_torch(monkeypatch)
    expected = step(theirs, limited=limited)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("body", ["loops", "torch"])
def test_the_gradient_step_is_that_of_the_textbook(
    body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if body == "torch":
        by_torch(monkeypatch)
    s = random_state((11, 6, 5), torch.float64)
    threshold = 0.8
    before = s.copy()
    u = before.state.clamp(-threshold, threshold)
    slope = gradient(s.image, ZOOMS)
    z = torch.sign(slope + u) * torch.relu((slope + u).abs() - threshold)
    dual = u + slope - z
    banned = s.zone & ALLOWED == 0
    moved = torch.zeros_like(s.image)
    held = torch.where(banned, 0.0, s.image)  # the split of x, that is x where it is allowed
    moved[banned] = (before.escape + s.image)[banned]
    sums = step(s)
    right = 1.7 * gradient_adjoint(z - dual, ZOOMS) + 0.3 * torch.where(
        banned, s.image - 2 * moved, held
    )
    torch.testing.assert_close(s.state.clamp(-threshold, threshold), dual)
    torch.testing.assert_close(s.state - s.state.clamp(-threshold, threshold), z)
    torch.testing.assert_close(s.escape, moved)
    torch.testing.assert_close(s.out, right)
    seen = s.zone & OBSERVED > 0
    assert sums.change == pytest.approx((s.image - s.previous)[seen].square().sum().item())
    assert sums.size == pytest.approx(s.image[seen].square().sum().item())
    assert sums.gap == pytest.approx((slope - z).square().sum().item())
    assert torch.equal(s.image, before.image)
    assert torch.equal(s.previous, before.previous)
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
    right, residual, field, transfer, inverse = ours = complex_arrays(dtype)
    theirs = [x.clone() for x in ours]
    chi = (right + 0.3 * transfer * (field + residual)) * inverse
    dipole_step(*ours, 0.3)
    torch.testing.assert_close(right, chi)
    torch.testing.assert_close(field, transfer * chi)
    by_torch(monkeypatch)
    dipole_step(*theirs, 0.3)
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
        from qsmpipe.numerics.fused import data_split
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
