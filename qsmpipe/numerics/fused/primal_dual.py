"""Primal-dual steps of total generalised variation under a wave equation, one pass each."""

from typing import NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.fused import loops
from qsmpipe.numerics.fused.loops import parallel

KNOWN, SOLVED = 1, 2
"""Bits of a zone: voxels of the mask, and those of them whose equation counts."""

PAIRS = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))
"""Components of a symmetric tensor."""


class State(NamedTuple):
    """What the iteration moves, on a grid with a rim of one voxel that no zone holds.

    "Ahead" is twice the new value minus the old one.
    """

    chi: Tensor
    chi_ahead: Tensor
    rest: Tensor
    """What the equation leaves of the field."""
    rest_ahead: Tensor
    slope: Tensor
    """The smooth part of the gradient, (3, X, Y, Z)."""
    slope_ahead: Tensor
    wave: Tensor
    """Multiplier of the equation."""
    first: Tensor
    """Dual of the gradient minus its smooth part, (3, X, Y, Z)."""
    second: Tensor
    """Dual of the symmetrised derivative of that part, (6, X, Y, Z), as :data:`PAIRS`."""

    @classmethod
    def zeros(cls, like: Tensor) -> "State":
        """Start of the iteration, on the grid of ``like``."""
        sizes = (0, 0, 0, 0, 3, 3, 0, 3, 6)
        return cls(*(like.new_zeros((*((n,) if n else ()), *like.shape)) for n in sizes))


class Steps(NamedTuple):
    """Lengths of the steps; in voxel axes where there are several."""

    chi: float
    rest: float
    slope: tuple[float, ...]
    wave: float
    first: tuple[float, ...]
    second: tuple[float, ...]


def stencil_sum(image: Tensor, stencil: Tensor) -> Tensor:
    """Sum over the neighbours of every voxel, weighted by ``stencil`` (3, 3, 3), off the rim."""
    x, y, z = image.shape
    result = torch.zeros_like(image)
    inner = result[1:-1, 1:-1, 1:-1]
    for i, j, k in stencil.nonzero().tolist():
        part = image[i : x - 2 + i, j : y - 2 + j, k : z - 2 + k]
        inner.add_(part, alpha=stencil[i, j, k].item())
    return result


def dual_step(
    state: State,
    measured: Tensor,
    zone: Tensor,
    wave: Tensor,
    laplacian: Tensor,
    zooms: Zooms,
    alpha1: float,
    alpha0: float,
    steps: Steps,
) -> None:
    r"""Move the duals of ``state`` up, which it writes to.

    .. math:: \lambda \leftarrow \lambda + \sigma (\Delta \bar r - \square \bar\chi + l), \quad
       p \leftarrow P_{\alpha_1}(p + \sigma (\nabla \bar\chi - \bar w)), \quad
       q \leftarrow P_{\alpha_0}(q + \sigma E \bar w)

    Parameters
    ----------
    state : State
        Real tensors on one grid.
    measured : (X, Y, Z) tensor
        l, the Laplacian of the field.
    zone : (X, Y, Z) uint8 tensor
        Sum of :data:`KNOWN` and :data:`SOLVED`; 0 on the rim.
    wave, laplacian : (3, 3, 3) tensors
        Stencils of the wave operator and of the Laplacian, even under reversal of all axes.
    zooms : tuple of float
        Voxel size (mm).
    alpha1, alpha0 : float
        Largest lengths of p and q.
    steps : Steps
        The sigmas.
    """
    if not loops.usable(state.chi):
        _dual_torch(state, measured, zone, wave, laplacian, zooms, alpha1, alpha0, steps)
        return
    kind = state.chi.numpy().dtype.type
    _dual_loops(
        *(x.numpy() for x in (state.chi_ahead, state.rest_ahead, state.slope_ahead)),
        *(x.numpy() for x in (state.wave, state.first, state.second, measured, zone)),
        *_stencils(wave, laplacian, kind),
        np.array([1 / zoom for zoom in zooms], kind),
        np.array([alpha1, alpha0, steps.wave, *steps.first, *steps.second], kind),
    )


def primal_step(
    state: State, zone: Tensor, wave: Tensor, laplacian: Tensor, zooms: Zooms, steps: Steps
) -> float:
    r"""Move the maps of ``state`` down, which it writes to; return the relative change of chi.

    .. math:: r \leftarrow \frac{r - \tau \Delta \lambda}{1 + \tau}, \quad
       \chi \leftarrow \chi - \tau (\nabla^T p - \square \lambda), \quad
       w \leftarrow w - \tau (E^T q - p)

    Parameters are those of :func:`dual_step`.
    """
    if not loops.usable(state.chi):
        return _primal_torch(state, zone, wave, laplacian, zooms, steps)
    kind = state.chi.numpy().dtype.type
    sums = np.zeros((len(state.chi), 2))
    _primal_loops(
        *(x.numpy() for x in state),
        zone.numpy(),
        *_stencils(wave, laplacian, kind),
        np.array([1 / zoom for zoom in zooms], kind),
        np.array([steps.chi, steps.rest, *steps.slope], kind),
        sums,
    )
    return _relative(*sums.sum(axis=0).tolist())


def _relative(change: float, size: float) -> float:
    if change == 0:
        return 0.0
    return (change / size) ** 0.5 if size > 0 else float("inf")


def _stencils(wave: Tensor, laplacian: Tensor, kind: type) -> tuple[NDArray, ...]:
    """Offsets and weights of half the wave operator's stencil, and its centre; the Laplacian's.

    Both are even: a weight serves an offset and its opposite.
    """
    offsets, weights = [], []
    for i, j, k in wave.nonzero().tolist():
        if (i, j, k) > (1, 1, 1):
            offsets.append((i - 1, j - 1, k - 1))
            weights.append(wave[i, j, k].item())
    centre = [wave[1, 1, 1].item(), laplacian[1, 1, 1].item()]
    faces = [laplacian[2, 1, 1].item(), laplacian[1, 2, 1].item(), laplacian[1, 1, 2].item()]
    return (
        np.array(offsets, np.int64).reshape(-1, 3),
        np.array(weights, kind),
        np.array([*centre, *faces], kind),
    )


def _dual_torch(
    state: State,
    measured: Tensor,
    zone: Tensor,
    wave: Tensor,
    laplacian: Tensor,
    zooms: Zooms,
    alpha1: float,
    alpha0: float,
    steps: Steps,
) -> None:
    solved, known = zone & SOLVED > 0, zone & KNOWN > 0
    misfit = stencil_sum(state.rest_ahead, laplacian) - stencil_sum(state.chi_ahead, wave)
    state.wave.copy_(torch.where(solved, state.wave + steps.wave * (misfit + measured), 0))
    for axis, dual in enumerate(state.first):
        both = known & known.roll(-1, axis)
        rise = (state.chi_ahead.roll(-1, axis) - state.chi_ahead) / zooms[axis]
        moved = dual + steps.first[axis] * (rise - state.slope_ahead[axis])
        dual.copy_(torch.where(both, moved, 0))
    length = state.first.square().sum(0).sqrt_()
    state.first.div_((length / alpha1).clamp_(min=1))
    for number, (a, b) in enumerate(PAIRS):
        bend = torch.zeros_like(state.chi)
        for axis, component in ((a, b), (b, a)):
            both = known & known.roll(1, axis)
            w = state.slope_ahead[component]
            bend += torch.where(both, (w - w.roll(1, axis)) / (2 * zooms[axis]), 0)
        dual = state.second[number]
        dual.copy_(torch.where(known, dual + steps.second[number] * bend, 0))
    squares = state.second.square()
    length = (squares[:3].sum(0) + 2 * squares[3:].sum(0)).sqrt_()
    state.second.div_((length / alpha0).clamp_(min=1))


def _primal_torch(
    state: State, zone: Tensor, wave: Tensor, laplacian: Tensor, zooms: Zooms, steps: Steps
) -> float:
    known = zone & KNOWN > 0
    rest = state.rest - steps.rest * stencil_sum(state.wave, laplacian)
    rest = torch.where(known, rest / (1 + steps.rest), 0)
    torch.sub(2 * rest, state.rest, out=state.rest_ahead)
    state.rest.copy_(rest)
    pull = -stencil_sum(state.wave, wave)
    for axis, dual in enumerate(state.first):
        pull += (dual.roll(1, axis) - dual) / zooms[axis]
    chi = torch.where(known, state.chi - steps.chi * pull, 0)
    torch.sub(2 * chi, state.chi, out=state.chi_ahead)
    change = (chi - state.chi).double().square().sum().item()
    state.chi.copy_(chi)
    for component in range(3):
        pull = -state.first[component]
        for axis in range(3):
            number = PAIRS.index((min(axis, component), max(axis, component)))
            dual = state.second[number]
            flow = torch.where(known & known.roll(1, axis), dual, 0)
            pull += (flow - flow.roll(-1, axis)) / zooms[axis]
        old = state.slope[component]
        new = torch.where(known, old - steps.slope[component] * pull, 0)
        torch.sub(2 * new, old, out=state.slope_ahead[component])
        old.copy_(new)
    return _relative(change, chi.double().square().sum().item())


@parallel
def _dual_loops(
    chi: NDArray,
    rest: NDArray,
    slope: NDArray,
    wave: NDArray,
    first: NDArray,
    second: NDArray,
    measured: NDArray,
    zone: NDArray,
    offsets: NDArray,
    weights: NDArray,
    faces: NDArray,
    per: NDArray,
    scale: NDArray,
) -> None:
    nx, ny, nz = chi.shape
    zero = chi.dtype.type(0)
    half = chi.dtype.type(0.5)
    for i in numba.prange(1, nx - 1):
        for j in range(1, ny - 1):
            for k in range(1, nz - 1):
                kind = zone[i, j, k]
                if kind == 0:
                    continue
                here = chi[i, j, k]
                if kind & SOLVED:
                    misfit = (
                        measured[i, j, k]
                        + faces[1] * rest[i, j, k]
                        + faces[2] * (rest[i - 1, j, k] + rest[i + 1, j, k])
                        + faces[3] * (rest[i, j - 1, k] + rest[i, j + 1, k])
                        + faces[4] * (rest[i, j, k - 1] + rest[i, j, k + 1])
                        - faces[0] * here
                    )
                    for n in range(len(weights)):
                        a, b, c = offsets[n, 0], offsets[n, 1], offsets[n, 2]
                        misfit -= weights[n] * (
                            chi[i + a, j + b, k + c] + chi[i - a, j - b, k - c]
                        )
                    wave[i, j, k] += scale[2] * misfit
                wx, wy, wz = slope[0, i, j, k], slope[1, i, j, k], slope[2, i, j, k]
                px, py, pz = zero, zero, zero
                if zone[i + 1, j, k]:
                    rise = (chi[i + 1, j, k] - here) * per[0] - wx
                    px = first[0, i, j, k] + scale[3] * rise
                if zone[i, j + 1, k]:
                    rise = (chi[i, j + 1, k] - here) * per[1] - wy
                    py = first[1, i, j, k] + scale[4] * rise
                if zone[i, j, k + 1]:
                    rise = (chi[i, j, k + 1] - here) * per[2] - wz
                    pz = first[2, i, j, k] + scale[5] * rise
                length = np.sqrt(px * px + py * py + pz * pz)
                if length > scale[0]:
                    shrink = scale[0] / length
                    px, py, pz = px * shrink, py * shrink, pz * shrink
                first[0, i, j, k], first[1, i, j, k], first[2, i, j, k] = px, py, pz
                # backward differences of the slope, those that leave the mask 0
                xx, xy, xz = zero, zero, zero
                yx, yy, yz = zero, zero, zero
                zx, zy, zz = zero, zero, zero
                if zone[i - 1, j, k]:
                    xx = (wx - slope[0, i - 1, j, k]) * per[0]
                    xy = (wy - slope[1, i - 1, j, k]) * per[0]
                    xz = (wz - slope[2, i - 1, j, k]) * per[0]
                if zone[i, j - 1, k]:
                    yx = (wx - slope[0, i, j - 1, k]) * per[1]
                    yy = (wy - slope[1, i, j - 1, k]) * per[1]
                    yz = (wz - slope[2, i, j - 1, k]) * per[1]
                if zone[i, j, k - 1]:
                    zx = (wx - slope[0, i, j, k - 1]) * per[2]
                    zy = (wy - slope[1, i, j, k - 1]) * per[2]
                    zz = (wz - slope[2, i, j, k - 1]) * per[2]
                a = second[0, i, j, k] + scale[6] * xx
                b = second[1, i, j, k] + scale[7] * yy
                c = second[2, i, j, k] + scale[8] * zz
                d = second[3, i, j, k] + scale[9] * (half * (xy + yx))
                e = second[4, i, j, k] + scale[10] * (half * (xz + zx))
                f = second[5, i, j, k] + scale[11] * (half * (yz + zy))
                length = np.sqrt(
                    a * a + b * b + c * c + (d * d + e * e + f * f) + (d * d + e * e + f * f)
                )
                if length > scale[1]:
                    shrink = scale[1] / length
                    a, b, c = a * shrink, b * shrink, c * shrink
                    d, e, f = d * shrink, e * shrink, f * shrink
                second[0, i, j, k], second[1, i, j, k], second[2, i, j, k] = a, b, c
                second[3, i, j, k], second[4, i, j, k], second[5, i, j, k] = d, e, f


@parallel
def _primal_loops(
    chi: NDArray,
    chi_ahead: NDArray,
    rest: NDArray,
    rest_ahead: NDArray,
    slope: NDArray,
    slope_ahead: NDArray,
    wave: NDArray,
    first: NDArray,
    second: NDArray,
    zone: NDArray,
    offsets: NDArray,
    weights: NDArray,
    faces: NDArray,
    per: NDArray,
    scale: NDArray,
    sums: NDArray,
) -> None:
    nx, ny, nz = chi.shape
    for i in numba.prange(1, nx - 1):
        change, size = 0.0, 0.0
        for j in range(1, ny - 1):
            for k in range(1, nz - 1):
                if zone[i, j, k] == 0:
                    continue
                here = wave[i, j, k]
                force = (
                    faces[1] * here
                    + faces[2] * (wave[i - 1, j, k] + wave[i + 1, j, k])
                    + faces[3] * (wave[i, j - 1, k] + wave[i, j + 1, k])
                    + faces[4] * (wave[i, j, k - 1] + wave[i, j, k + 1])
                )
                old = rest[i, j, k]
                new = (old - scale[1] * force) / (1 + scale[1])
                rest[i, j, k] = new
                rest_ahead[i, j, k] = new + new - old
                pull = (
                    (first[0, i - 1, j, k] - first[0, i, j, k]) * per[0]
                    + (first[1, i, j - 1, k] - first[1, i, j, k]) * per[1]
                    + (first[2, i, j, k - 1] - first[2, i, j, k]) * per[2]
                    - faces[0] * here
                )
                for n in range(len(weights)):
                    a, b, c = offsets[n, 0], offsets[n, 1], offsets[n, 2]
                    pull -= weights[n] * (wave[i + a, j + b, k + c] + wave[i - a, j - b, k - c])
                old = chi[i, j, k]
                new = old - scale[0] * pull
                chi[i, j, k] = new
                chi_ahead[i, j, k] = new + new - old
                change += (new - old) * (new - old)
                size += new * new
                right, up, far = zone[i + 1, j, k], zone[i, j + 1, k], zone[i, j, k + 1]
                left, down, near = zone[i - 1, j, k], zone[i, j - 1, k], zone[i, j, k - 1]
                for c in range(3):
                    # rows of the symmetric tensor
                    if c == 0:
                        x, y, z = 0, 3, 4
                    elif c == 1:
                        x, y, z = 3, 1, 5
                    else:
                        x, y, z = 4, 5, 2
                    pull = -first[c, i, j, k]
                    if left:
                        pull += second[x, i, j, k] * per[0]
                    if right:
                        pull -= second[x, i + 1, j, k] * per[0]
                    if down:
                        pull += second[y, i, j, k] * per[1]
                    if up:
                        pull -= second[y, i, j + 1, k] * per[1]
                    if near:
                        pull += second[z, i, j, k] * per[2]
                    if far:
                        pull -= second[z, i, j, k + 1] * per[2]
                    old = slope[c, i, j, k]
                    new = old - scale[2 + c] * pull
                    slope[c, i, j, k] = new
                    slope_ahead[c, i, j, k] = new + new - old
        sums[i, 0] = change
        sums[i, 1] = size
