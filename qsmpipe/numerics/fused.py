"""The memory-bound steps of ADMM, each in one pass over the grid.

Every step has two bodies: loops compiled by numba for the CPU, and torch operations for CUDA,
which are also the oracle of the loops' test. The steps write to their arguments: here alone, and
each says to which.

The loops run in blocks of :data:`PLANES` planes whatever the number of threads, and add up what
the blocks found in their order, with strict IEEE arithmetic: results depend on neither the number
of threads nor their timing. Threads are those of :func:`numba.set_num_threads`. Compiled code is
cached on disk where numba finds a folder that it may write to (``NUMBA_CACHE_DIR`` names one);
elsewhere every process compiles it again.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qsmpipe.numerics.compiled import compiled
from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.operators import gradient, gradient_adjoint

PLANES = 8
"""Planes of the first axis that one thread takes at a time."""

OBSERVED, ALLOWED = 1, 2
"""Bits of a zone: voxels whose change is watched, and voxels that may differ from 0."""
STEEP = (4, 8, 16)
"""Bits of a zone: voxels whose difference to the next voxel along an axis costs nothing."""


class Sums(NamedTuple):
    """Squared norms that a pass over the grid accumulates."""

    change: float
    """Of ``image - previous``, over the observed voxels."""
    size: float
    """Of ``image``, over the observed voxels."""
    gap: float
    """Of the gradient minus its split, over the whole grid."""

    @property
    def relative_change(self) -> float:
        """Norm of the change over the norm of the image; 0 where nothing changes."""
        if self.change == 0.0:
            return 0.0
        return (self.change / self.size) ** 0.5 if self.size > 0 else float("inf")


_serial = compiled()
_parallel = compiled(parallel=True)


def _on_loops(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)


def clip(state: Tensor, threshold: float) -> Tensor:
    """Scaled dual variable that a ``state`` of :func:`gradient_split` holds."""
    return state.clamp(-threshold, threshold)


def gradient_split(
    image: Tensor,
    previous: Tensor,
    state: Tensor,
    zone: Tensor,
    zooms: Zooms,
    *,
    threshold: float,
    weight: float,
    edges: bool = False,
    escape: Tensor | None = None,
    escape_weight: float = 0.0,
    out: Tensor,
) -> Sums:
    r"""Update split and dual of the total variation, and make the next right-hand side.

    ADMM for :math:`\lambda \|z\|_1` with :math:`z = \nabla x` and scaled dual u does

    .. math:: v = \nabla x + u, \quad z = \mathrm{shrink}(v, t), \quad u = v - z

    Since u is v clipped to [-t, t], v alone is stored; t is 0 for the components that the zone
    says are :data:`STEEP`. The right-hand side is :math:`w \nabla^T(z - u)`.

    With ``escape`` a second split holds x at 0 where the zone does not allow it; its scaled dual
    is e: :math:`e \leftarrow e + x` there and 0 elsewhere, and the right-hand side gains
    :math:`-w_e e` there, with the new e, and :math:`w_e x` elsewhere.

    Parameters
    ----------
    image, previous : (X, Y, Z) real tensors
        x of this step and of the one before.
    state : (3, X, Y, Z) real tensor
        v; written to. 0 at the start.
    zone : (X, Y, Z) uint8 tensor
        Sum of :data:`OBSERVED`, :data:`ALLOWED` and those of :data:`STEEP`.
    zooms : tuple of float
        Voxel size (mm).
    threshold : float
        t, in the unit of x per mm.
    weight : float
        w.
    edges : bool
        Whether the zone holds bits of :data:`STEEP`; they are not looked for without.
    escape : (X, Y, Z) real tensor, optional
        e; written to.
    escape_weight : float
        :math:`w_e`.
    out : (X, Y, Z) real tensor
        Where the right-hand side is written to; may be ``previous``, and none of the others.

    Returns
    -------
    Sums
    """
    if not _on_loops(image):
        return _gradient_split_torch(
            image,
            previous,
            state,
            zone,
            zooms,
            threshold,
            weight,
            edges,
            escape,
            escape_weight,
            out,
        )
    kind = image.numpy().dtype.type
    starts = torch.arange(0, len(image), PLANES)
    sums = np.zeros((len(starts), 3))
    _gradient_split_loops(
        image.numpy(),
        previous.numpy(),
        state.numpy(),
        # The old state of the plane before each block, which another block overwrites.
        state[0, (starts - 1) % len(image)].numpy(),
        zone.numpy(),
        zone.numpy() if edges else None,
        np.empty((0, 0, 0), kind) if escape is None else escape.numpy(),
        out.numpy(),
        np.array([1 / zoom for zoom in zooms], kind),
        np.array([threshold, weight, escape_weight, 2], kind),
        sums,
    )
    change, size, gap = sums.sum(axis=0).tolist()
    return Sums(change, size, gap)


def _gradient_split_torch(
    image: Tensor,
    previous: Tensor,
    state: Tensor,
    zone: Tensor,
    zooms: Zooms,
    threshold: float,
    weight: float,
    edges: bool,
    escape: Tensor | None,
    escape_weight: float,
    out: Tensor,
) -> Sums:
    seen = zone & OBSERVED > 0
    change = torch.where(seen, image - previous, 0.0).square().sum(dtype=torch.float64)
    size = torch.where(seen, image, 0.0).square().sum(dtype=torch.float64)
    smooth = torch.stack([zone & bit == 0 for bit in STEEP]) if edges else 1.0
    dual = clip(state, threshold) * smooth
    state.copy_(gradient(image, zooms) + dual)
    changed = clip(state, threshold) * smooth
    gap = (changed - dual).square().sum(dtype=torch.float64)
    out.copy_(gradient_adjoint(state - 2 * changed, zooms) * weight)
    if escape is not None:
        allowed = zone & ALLOWED > 0
        escape.copy_(torch.where(allowed, 0.0, escape + image))
        out.add_(torch.where(allowed, image, -escape), alpha=escape_weight)
    return Sums(change.item(), size.item(), gap.item())


@_parallel
def _gradient_split_loops(
    image: NDArray,
    previous: NDArray,
    state: NDArray,
    before: NDArray,
    zone: NDArray,
    steep: NDArray | None,
    escape: NDArray,
    out: NDArray,
    per_mm: NDArray,
    scale: NDArray,
    sums: NDArray,
) -> None:
    for block in numba.prange(len(sums)):
        _gradient_split_block(
            image, previous, state, before, zone, steep, escape, out, per_mm, scale, sums, block
        )


@_serial
def _clip(
    value: np.floating,
    threshold: np.floating,
    steep: NDArray | None,
    i: int,
    j: int,
    k: int,
    bit: int,
) -> np.floating:
    """Clip to the threshold, or to 0 where the component costs nothing.

    Without ``steep`` there is no such component: numba then compiles the test away.
    """
    if steep is None:
        return min(max(value, -threshold), threshold)
    limit = threshold * (steep[i, j, k] & bit == 0)
    return min(max(value, -limit), limit)


@_serial
def _gradient_split_block(
    image: NDArray,
    previous: NDArray,
    state: NDArray,
    before: NDArray,
    zone: NDArray,
    steep: NDArray | None,
    escape: NDArray,
    out: NDArray,
    per_mm: NDArray,
    scale: NDArray,
    sums: NDArray,
    block: int,
) -> None:
    """Do the planes of one block; ``scale`` is threshold, weight, escape weight and 2."""
    nx, ny, nz = image.shape
    threshold, weight, escape_weight, two = scale
    first = block * PLANES
    last = (first - 1) % nx
    x, y, z = STEEP
    # z - u along x on the plane before, along y on the row before, along z on this row
    plane = np.empty((ny, nz), image.dtype)
    row = np.empty(nz, image.dtype)
    line = np.empty(nz + 1, image.dtype)
    # Sums per k, added up at the end: a single one would forbid vector instructions.
    change, size, gap = np.zeros(nz), np.zeros(nz), np.zeros(nz)
    for j in range(ny):
        here, there, was = image[first, j], image[last, j], before[block, j]
        for k in range(nz):
            new = (here[k] - there[k]) * per_mm[0]
            new += _clip(was[k], threshold, steep, last, j, k, x)
            plane[j, k] = new - two * _clip(new, threshold, steep, last, j, k, x)
    for i in range(first, min(first + PLANES, nx)):
        here, there, was = image[i, 0], image[i, ny - 1], state[1, i, ny - 1]
        for k in range(nz):
            new = (here[k] - there[k]) * per_mm[1]
            new += _clip(was[k], threshold, steep, i, ny - 1, k, y)
            row[k] = new - two * _clip(new, threshold, steep, i, ny - 1, k, y)
        for j in range(ny):
            here, right, up = image[i, j], image[(i + 1) % nx, j], image[i, (j + 1) % ny]
            result, kind, then = out[i, j], zone[i, j], previous[i, j]
            for k in range(nz):
                seen = kind[k] & OBSERVED
                change[k] += seen * ((here[k] - then[k]) * (here[k] - then[k]))
                size[k] += seen * (here[k] * here[k])
            behind, was = plane[j], state[0, i, j]
            for k in range(nz):
                old = _clip(was[k], threshold, steep, i, j, k, x)
                new = (right[k] - here[k]) * per_mm[0] + old
                dual = _clip(new, threshold, steep, i, j, k, x)
                was[k] = new
                gap[k] += (dual - old) * (dual - old)
                now = new - two * dual
                result[k] = (behind[k] - now) * per_mm[0]
                behind[k] = now
            was = state[1, i, j]
            for k in range(nz):
                old = _clip(was[k], threshold, steep, i, j, k, y)
                new = (up[k] - here[k]) * per_mm[1] + old
                dual = _clip(new, threshold, steep, i, j, k, y)
                was[k] = new
                gap[k] += (dual - old) * (dual - old)
                now = new - two * dual
                result[k] += (row[k] - now) * per_mm[1]
                row[k] = now
            was = state[2, i, j]
            for k in range(nz):
                beyond = here[k + 1] if k + 1 < nz else here[0]
                old = _clip(was[k], threshold, steep, i, j, k, z)
                new = (beyond - here[k]) * per_mm[2] + old
                dual = _clip(new, threshold, steep, i, j, k, z)
                was[k] = new
                gap[k] += (dual - old) * (dual - old)
                line[k + 1] = new - two * dual
            line[0] = line[nz]
            for k in range(nz):
                result[k] = weight * (result[k] + (line[k] - line[k + 1]) * per_mm[2])
            if escape.size > 0:
                away = escape[i, j]
                for k in range(nz):
                    dual = away[k] + here[k]
                    away[k] = dual * 0 if kind[k] & ALLOWED else dual
                    result[k] += escape_weight * (here[k] if kind[k] & ALLOWED else -dual)
    for k in range(nz):
        sums[block, 0] += change[k]
        sums[block, 1] += size[k]
        sums[block, 2] += gap[k]


def dipole_step(
    right: Tensor,
    residual: Tensor,
    field: Tensor,
    transfer: Tensor,
    inverse: Tensor,
    weight: float,
) -> None:
    r"""Solve for susceptibility and predict its field, in k-space.

    .. math:: X = \frac{R + \mu D (P + C)}{n}, \quad P \leftarrow D X

    Parameters
    ----------
    right : (X, Y, Z) complex tensor
        R, written to: X afterwards.
    residual : (X, Y, Z) complex tensor
        C.
    field : (X, Y, Z) complex tensor
        P, written to: the field of X afterwards.
    transfer, inverse : (X, Y, Z) real tensors
        D and 1 / n.
    weight : float
        :math:`\mu`.
    """
    if _on_loops(transfer):
        kind = transfer.numpy().dtype.type
        _dipole_step_loops(
            *(x.reshape(-1).numpy() for x in (right, residual, field, transfer, inverse)),
            kind(weight),
        )
        return
    right.add_((field + residual) * transfer, alpha=weight).mul_(inverse)
    torch.mul(right, transfer, out=field)


@_parallel
def _dipole_step_loops(
    right: NDArray,
    residual: NDArray,
    field: NDArray,
    transfer: NDArray,
    inverse: NDArray,
    weight: np.floating,
) -> None:
    for i in numba.prange(right.size):
        chi = (right[i] + (field[i] + residual[i]) * (weight * transfer[i])) * inverse[i]
        right[i] = chi
        field[i] = chi * transfer[i]


def draw_step(right: Tensor, residual: Tensor, transfer: Tensor, weight: float) -> None:
    r"""Draw the map to one of several fields, in k-space: :math:`R \leftarrow R + \mu D C`.

    Parameters
    ----------
    right : (X, Y, Z) complex tensor
        R, written to.
    residual : (X, Y, Z) complex tensor
        C.
    transfer : (X, Y, Z) real tensor
        D.
    weight : float
        :math:`\mu`.
    """
    if _on_loops(transfer):
        kind = transfer.numpy().dtype.type
        arrays = (x.reshape(-1).numpy() for x in (right, residual, transfer))
        _draw_step_loops(*arrays, kind(weight))
        return
    right.add_(residual * transfer, alpha=weight)


@_parallel
def _draw_step_loops(
    right: NDArray, residual: NDArray, transfer: NDArray, weight: np.floating
) -> None:
    for i in numba.prange(right.size):
        right[i] += residual[i] * (weight * transfer[i])


def settle_step(right: Tensor, previous: Tensor, gain: Tensor, inverse: Tensor) -> None:
    r"""Solve for the map that several fields were drawn to: :math:`X = (R + g X_{old}) / n`.

    Parameters
    ----------
    right : (X, Y, Z) complex tensor
        R, written to: X afterwards.
    previous : (X, Y, Z) complex tensor
        :math:`X_{old}`.
    gain, inverse : (X, Y, Z) real tensors
        g, the sum of the fields' :math:`\mu D^2`, and 1 / n.
    """
    if _on_loops(gain):
        _settle_step_loops(*(x.reshape(-1).numpy() for x in (right, previous, gain, inverse)))
        return
    right.add_(previous * gain).mul_(inverse)


@_parallel
def _settle_step_loops(right: NDArray, previous: NDArray, gain: NDArray, inverse: NDArray) -> None:
    for i in numba.prange(right.size):
        right[i] = (right[i] + previous[i] * gain[i]) * inverse[i]


def data_split(predicted: Tensor, dual: Tensor, measured: Tensor, trust: Tensor) -> None:
    r"""Update the dual of the weighted data, and make what the next field lacks.

    ADMM for :math:`\tfrac12 \|W(y - f)\|^2` with :math:`y = D x`, scaled dual u and penalty
    :math:`\mu` does :math:`u' = \tau (D x + u - f)` with
    :math:`\tau = W^2 / (W^2 + \mu)`; the next right-hand side needs
    :math:`y - u' = D x + (u - 2 u')`.

    Parameters
    ----------
    predicted : (X, Y, Z) real tensor
        :math:`D x`, written to: :math:`u - 2 u'` afterwards.
    dual : (X, Y, Z) real tensor
        u, written to: u' afterwards.
    measured : (X, Y, Z) real tensor
        f.
    trust : (X, Y, Z) real tensor
        :math:`\tau`, from 0 (no data) to 1 (exact).
    """
    if _on_loops(predicted):
        _data_split_loops(*(x.reshape(-1).numpy() for x in (predicted, dual, measured, trust)))
        return
    changed = (predicted + dual - measured) * trust
    torch.sub(dual, changed, alpha=2, out=predicted)
    dual.copy_(changed)


@_parallel
def _data_split_loops(
    predicted: NDArray, dual: NDArray, measured: NDArray, trust: NDArray
) -> None:
    for i in numba.prange(predicted.size):
        changed = (predicted[i] + dual[i] - measured[i]) * trust[i]
        predicted[i] = dual[i] - (changed + changed)
        dual[i] = changed


def limit_split(predicted: Tensor, dual: Tensor, measured: Tensor, limit: Tensor) -> None:
    r"""Do what :func:`data_split` does for :math:`\|W (y - f)\|_1`.

    The dual is :math:`u' = D x + u - f`, clipped to :math:`\pm W / \mu`.

    Parameters
    ----------
    predicted, dual, measured : (X, Y, Z) real tensors
        As there.
    limit : (X, Y, Z) real tensor
        :math:`W / \mu`.
    """
    _term_split(predicted, dual, measured, limit, _LIMIT)


def phase_split(predicted: Tensor, dual: Tensor, measured: Tensor, weight: Tensor) -> None:
    r"""Do what :func:`data_split` does for :math:`\tfrac12 \|W (e^{iy} - e^{if})\|^2`.

    With :math:`r = D x + u - f`, turned by whole turns to at most :math:`\pi` in size, the split
    is :math:`y = D x + u - r + d`, where d between 0 and r is the one root of

    .. math:: d + w \sin d = r, \qquad w = W^2 / \mu

    The left side grows and bends down from 0 to the root: Newton's steps from
    :math:`r / (1 + w)` approach it from below and cannot fail. The dual is :math:`u' = r - d`.

    Parameters
    ----------
    predicted, dual, measured : (X, Y, Z) real tensors
        As there (rad).
    weight : (X, Y, Z) real tensor
        w.
    """
    _term_split(predicted, dual, measured, weight, _PHASE)


def phase_limit_split(predicted: Tensor, dual: Tensor, measured: Tensor, limit: Tensor) -> None:
    r"""Do what :func:`data_split` does for :math:`\|W (e^{iy} - e^{if})\|_1`.

    The norm is the sum of :math:`W |e^{iy} - e^{if}| = 2 W |\sin((y - f) / 2)|`. With r as in
    :func:`phase_split`, d is 0 for :math:`|r| \le w` and elsewhere, of the sign of r, the one root
    of

    .. math:: |d| + w \cos(d / 2) = |r|, \qquad w = W / \mu

    by Newton's steps from :math:`|r| - w`, which approach it from below.

    Parameters
    ----------
    predicted, dual, measured : (X, Y, Z) real tensors
        As there (rad).
    limit : (X, Y, Z) real tensor
        w.
    """
    _term_split(predicted, dual, measured, limit, _PHASE_LIMIT)


_LIMIT, _PHASE, _PHASE_LIMIT = range(3)
NEWTON_STEPS = 8
"""Most steps to a root; where it is not double, three reach single precision."""
FLATTEST = 1e-3
"""Least slope that a step divides by: the roots at half a turn are double where w is 1 or 2."""


def _term_split(
    predicted: Tensor, dual: Tensor, measured: Tensor, weight: Tensor, term: int
) -> None:
    if _on_loops(predicted):
        kind = predicted.numpy().dtype.type
        _term_split_loops(
            *(x.reshape(-1).numpy() for x in (predicted, dual, measured, weight)),
            kind(torch.finfo(predicted.dtype).eps),
            term,
        )
        return
    r = predicted + dual - measured
    if term == _LIMIT:
        changed = r.clamp(-weight, weight)
    else:
        r -= 2 * torch.pi * torch.floor(r / (2 * torch.pi) + 0.5)
        size = r.abs()
        d = size / (1 + weight) if term == _PHASE else torch.relu(size - weight)
        for _ in range(NEWTON_STEPS):
            if term == _PHASE:
                lack, slope = size - d - weight * d.sin(), 1 + weight * d.cos()
            else:
                lack = size - d - weight * (d / 2).cos()
                slope = 1 - weight / 2 * (d / 2).sin()
            d += lack / slope.clamp(min=FLATTEST)
            if term == _PHASE_LIMIT:
                d = torch.where(size > weight, d, 0.0)
        changed = (size - d).copysign(r)
    torch.sub(dual, changed, alpha=2, out=predicted)
    dual.copy_(changed)


@_serial
def _root(
    size: np.floating, weight: np.floating, precision: np.floating, term: int
) -> np.floating:
    """Find d for a residual of ``size``, by Newton's method."""
    if term == _PHASE_LIMIT and size <= weight:
        return size * 0
    d = size / (1 + weight) if term == _PHASE else size - weight
    for _ in range(NEWTON_STEPS):
        if term == _PHASE:
            lack, slope = size - d - weight * np.sin(d), 1 + weight * np.cos(d)
        else:
            lack = size - d - weight * np.cos(d / 2)
            slope = 1 - weight / 2 * np.sin(d / 2)
        step = lack / max(slope, FLATTEST)
        d += step
        if step * step <= precision * max(slope, FLATTEST) * d * d:  # it converges quadratically
            break
    return d


@_parallel
def _term_split_loops(
    predicted: NDArray,
    dual: NDArray,
    measured: NDArray,
    weight: NDArray,
    precision: np.floating,
    term: int,
) -> None:
    turn = predicted.dtype.type(2 * np.pi)
    half = predicted.dtype.type(0.5)
    for i in numba.prange(predicted.size):
        r, w = predicted[i] + dual[i] - measured[i], weight[i]
        if w == 0:
            r = r * 0
        elif term == _LIMIT:
            r = min(max(r, -w), w)
        else:
            r -= turn * np.floor(r / turn + half)
            rest = abs(r) - _root(abs(r), w, precision, term)
            r = rest if r >= 0 else -rest
        predicted[i] = dual[i] - (r + r)
        dual[i] = r


def harmonic_step(
    right: Tensor,
    residual: Tensor,
    bend: Tensor,
    field: Tensor,
    remnant: Tensor,
    transfer: Tensor,
    smooth: Tensor,
    *,
    weights: tuple[float, float, float, float],
) -> None:
    r"""Solve for susceptibility and a remnant field together, in k-space.

    .. math::
        \begin{pmatrix} s L + \mu D^2 + e & \mu D \\ \mu D & \mu + \nu L^2 \end{pmatrix}
        \begin{pmatrix} X \\ H \end{pmatrix} =
        \begin{pmatrix} R + \mu D (P + C) \\ \mu (P + C) + \nu L (L H + B) \end{pmatrix}, \qquad
        P \leftarrow D X + H, \quad B \leftarrow L H

    with the old H on the right.

    Parameters
    ----------
    right : (X, Y, Z) complex tensor
        R, written to: X afterwards.
    residual : (X, Y, Z) complex tensor
        C.
    bend : (X, Y, Z) complex tensor
        B, written to: L H with the new H afterwards.
    field : (X, Y, Z) complex tensor
        P, written to: the whole predicted field afterwards.
    remnant : (X, Y, Z) complex tensor
        H, written to.
    transfer, smooth : (X, Y, Z) real tensors
        D and L.
    weights : 4 floats
        :math:`s, \mu, \nu, e`.
    """
    arrays = (right, residual, bend, field, remnant, transfer, smooth)
    if _on_loops(transfer):
        kind = transfer.numpy().dtype.type
        _harmonic_step_loops(
            *(x.reshape(-1).numpy() for x in arrays), np.array([*weights, 1], kind)
        )
        return
    s, mu, nu, e = weights
    target = mu * (field + residual)
    second = target + nu * smooth * (smooth * remnant + bend)
    first = right + transfer * target
    a, b, c = s * smooth + mu * transfer**2 + e, mu * transfer, mu + nu * smooth**2
    scale = 1 / (a * c - b**2)
    torch.mul(c * first - b * second, scale, out=right)
    torch.mul(a * second - b * first, scale, out=remnant)
    torch.mul(smooth, remnant, out=bend)
    torch.add(transfer * right, remnant, out=field)


@_parallel
def _harmonic_step_loops(
    right: NDArray,
    residual: NDArray,
    bend: NDArray,
    field: NDArray,
    remnant: NDArray,
    transfer: NDArray,
    smooth: NDArray,
    weights: NDArray,
) -> None:
    s, mu, nu, e, one = weights
    for i in numba.prange(right.size):
        d, bent = transfer[i], smooth[i]
        target = (field[i] + residual[i]) * mu
        second = target + (remnant[i] * bent + bend[i]) * (nu * bent)
        first = right[i] + target * d
        a, b, c = s * bent + mu * d * d + e, mu * d, mu + nu * bent * bent
        scale = one / (a * c - b * b)
        chi = (first * c - second * b) * scale
        h = (second * a - first * b) * scale
        right[i] = chi
        remnant[i] = h
        bend[i] = h * bent
        field[i] = chi * d + h


PAIRS = ((0, 1), (0, 2), (1, 2))
"""Axes of the last three of the six components of a symmetric matrix; the first three are its
diagonal."""


def curvature_split(
    image: Tensor,
    previous: Tensor,
    slopes: Sequence[Tensor],
    first: Tensor,
    second: Tensor,
    zone: Tensor,
    escape: Tensor,
    zooms: Zooms,
    *,
    thresholds: tuple[float, float],
    weights: tuple[float, float, float],
    out: Tensor,
) -> Sums:
    r"""Update splits and duals of total generalised variation, and make the next right-hand sides.

    As :func:`gradient_split`, for :math:`z_1 = \nabla x - w` and
    :math:`z_2 = E w = \tfrac12 (\nabla_- w + (\nabla_- w)^T)`, with the backward differences
    :math:`\nabla_-`, so that :math:`E \nabla x` holds second differences about the voxel. The
    elements off the diagonal stand for two. The right-hand sides are
    :math:`r_1 \nabla^T (z_1 - u_1)`, with the escape's, and
    :math:`r_2 E^T (z_2 - u_2) - r_1 (z_1 - u_1)`.

    Parameters
    ----------
    image, previous : (X, Y, Z) real tensors
        x of this step and of the one before.
    slopes : 3 (X, Y, Z) real tensors
        w, written to: its right-hand side afterwards.
    first, second : (3, X, Y, Z) and (6, X, Y, Z) real tensors
        The states :math:`v_1` and :math:`v_2`; written to.
    zone, escape : (X, Y, Z) uint8 and real tensors
        As there; escape is written to.
    zooms : tuple of float
        Voxel size (mm).
    thresholds : 2 floats
        Of both splits.
    weights : 3 floats
        :math:`r_1, r_2` and that of the escape.
    out : (X, Y, Z) real tensor
        Where the right-hand side of x is written to; may be ``previous``.

    Returns
    -------
    Sums
        ``gap`` is that of both splits.
    """
    if not _on_loops(image):
        return _curvature_split_torch(
            image, previous, slopes, first, second, zone, escape, zooms, thresholds, weights, out
        )
    kind = image.numpy().dtype.type
    per_mm = np.array([1 / zoom for zoom in zooms], kind)
    numbers = np.array([*thresholds, *weights, 2, 0.5], kind)
    sums = np.zeros((len(image), 3))
    x, v1, v2, where = image.numpy(), first.numpy(), second.numpy(), zone.numpy()
    w = [slope.numpy() for slope in slopes]
    _curvature_states(x, previous.numpy(), *w, v1, v2, where, per_mm, numbers, sums)
    _curvature_rights(x, v1, v2, where, escape.numpy(), out.numpy(), *w, per_mm, numbers)
    change, size, gap = sums.sum(axis=0).tolist()
    return Sums(change, size, gap)


def _curvature_split_torch(
    image: Tensor,
    previous: Tensor,
    slopes: Sequence[Tensor],
    first: Tensor,
    second: Tensor,
    zone: Tensor,
    escape: Tensor,
    zooms: Zooms,
    thresholds: tuple[float, float],
    weights: tuple[float, float, float],
    out: Tensor,
) -> Sums:
    def backward(component: Tensor, axis: int) -> Tensor:
        return (component - component.roll(1, axis)) / zooms[axis]

    def backward_adjoint(component: Tensor, axis: int) -> Tensor:
        return (component - component.roll(-1, axis)) / zooms[axis]

    seen = zone & OBSERVED > 0
    change = torch.where(seen, image - previous, 0.0).square().sum(dtype=torch.float64)
    size = torch.where(seen, image, 0.0).square().sum(dtype=torch.float64)
    dual = clip(first, thresholds[0])
    first.copy_(gradient(image, zooms) - torch.stack([*slopes]) + dual)
    gap = (clip(first, thresholds[0]) - dual).square().sum(dtype=torch.float64)
    dual = clip(second, thresholds[1])
    for n in range(3):
        second[n] = backward(slopes[n], n)
    for n, (i, j) in enumerate(PAIRS, 3):
        second[n] = 0.5 * (backward(slopes[j], i) + backward(slopes[i], j))
    second += dual
    steps = (clip(second, thresholds[1]) - dual).square().sum((1, 2, 3), dtype=torch.float64)
    gap = gap + steps[:3].sum() + 2 * steps[3:].sum()
    one = first - 2 * clip(first, thresholds[0])
    two = second - 2 * clip(second, thresholds[1])
    allowed = zone & ALLOWED > 0
    escape.copy_(torch.where(allowed, 0.0, escape + image))
    out.copy_(gradient_adjoint(one, zooms) * weights[0])
    out.add_(torch.where(allowed, image, -escape), alpha=weights[2])
    for n in range(3):
        slopes[n].copy_(weights[1] * backward_adjoint(two[n], n) - weights[0] * one[n])
    for n, (i, j) in enumerate(PAIRS, 3):
        slopes[j].add_(backward_adjoint(two[n], i), alpha=weights[1])
        slopes[i].add_(backward_adjoint(two[n], j), alpha=weights[1])
    return Sums(change.item(), size.item(), gap.item())


@_parallel
def _curvature_states(
    image: NDArray,
    previous: NDArray,
    slope_x: NDArray,
    slope_y: NDArray,
    slope_z: NDArray,
    first: NDArray,
    second: NDArray,
    zone: NDArray,
    per_mm: NDArray,
    numbers: NDArray,
    sums: NDArray,
) -> None:
    nx, ny, nz = image.shape
    t1, t2, half = numbers[0], numbers[1], numbers[6]
    x, y, z = per_mm
    for i in numba.prange(nx):
        total, size, gap = 0.0, 0.0, 0.0
        for j in range(ny):
            here, right, up = image[i, j], image[(i + 1) % nx, j], image[i, (j + 1) % ny]
            then, kind = previous[i, j], zone[i, j]
            u, v, w = slope_x[i, j], slope_y[i, j], slope_z[i, j]
            left_u, left_v, left_w = slope_x[i - 1, j], slope_y[i - 1, j], slope_z[i - 1, j]
            down_u, down_v, down_w = slope_x[i, j - 1], slope_y[i, j - 1], slope_z[i, j - 1]
            for k in range(nz):
                seen = kind[k] & OBSERVED
                total += seen * ((here[k] - then[k]) * (here[k] - then[k]))
                size += seen * (here[k] * here[k])
                beyond = here[k + 1] if k + 1 < nz else here[0]
                gap += _advance(first[0, i, j], k, (right[k] - here[k]) * x - u[k], t1)
                gap += _advance(first[1, i, j], k, (up[k] - here[k]) * y - v[k], t1)
                gap += _advance(first[2, i, j], k, (beyond - here[k]) * z - w[k], t1)
                gap += _advance(second[0, i, j], k, (u[k] - left_u[k]) * x, t2)
                gap += _advance(second[1, i, j], k, (v[k] - down_v[k]) * y, t2)
                gap += _advance(second[2, i, j], k, (w[k] - w[k - 1]) * z, t2)
                bend = ((v[k] - left_v[k]) * x + (u[k] - down_u[k]) * y) * half
                gap += 2 * _advance(second[3, i, j], k, bend, t2)
                bend = ((w[k] - left_w[k]) * x + (u[k] - u[k - 1]) * z) * half
                gap += 2 * _advance(second[4, i, j], k, bend, t2)
                bend = ((w[k] - down_w[k]) * y + (v[k] - v[k - 1]) * z) * half
                gap += 2 * _advance(second[5, i, j], k, bend, t2)
        sums[i, 0], sums[i, 1], sums[i, 2] = total, size, gap


@_serial
def _advance(state: NDArray, k: int, value: np.floating, threshold: np.floating) -> np.floating:
    """State of the next step at one voxel; the squared step of its dual."""
    old = min(max(state[k], -threshold), threshold)
    new = value + old
    state[k] = new
    step = min(max(new, -threshold), threshold) - old
    return step * step


@_parallel
def _curvature_rights(
    image: NDArray,
    first: NDArray,
    second: NDArray,
    zone: NDArray,
    escape: NDArray,
    out: NDArray,
    slope_x: NDArray,
    slope_y: NDArray,
    slope_z: NDArray,
    per_mm: NDArray,
    numbers: NDArray,
) -> None:
    nx, ny, nz = image.shape
    t1, t2, r1, r2, away_weight, two, _ = numbers
    x, y, z = per_mm
    for i in numba.prange(nx):
        after = (i + 1) % nx
        for j in range(ny):
            above = (j + 1) % ny
            here, kind, away = image[i, j], zone[i, j], escape[i, j]
            for k in range(nz):
                beyond = k + 1 if k + 1 < nz else 0
                a = _mirrored(first[0, i, j, k], t1, two)
                b = _mirrored(first[1, i, j, k], t1, two)
                c = _mirrored(first[2, i, j, k], t1, two)
                total = (_mirrored(first[0, i - 1, j, k], t1, two) - a) * x
                total += (_mirrored(first[1, i, j - 1, k], t1, two) - b) * y
                total += (_mirrored(first[2, i, j, k - 1], t1, two) - c) * z
                dual = away[k] + here[k]
                away[k] = dual * 0 if kind[k] & ALLOWED else dual
                total *= r1
                total += away_weight * (here[k] if kind[k] & ALLOWED else -dual)
                out[i, j, k] = total
                xy = _mirrored(second[3, i, j, k], t2, two)
                xz = _mirrored(second[4, i, j, k], t2, two)
                yz = _mirrored(second[5, i, j, k], t2, two)
                total = _mirrored(second[0, i, j, k], t2, two)
                total = (total - _mirrored(second[0, after, j, k], t2, two)) * x
                total += (xy - _mirrored(second[3, i, above, k], t2, two)) * y
                total += (xz - _mirrored(second[4, i, j, beyond], t2, two)) * z
                slope_x[i, j, k] = r2 * total - r1 * a
                total = _mirrored(second[1, i, j, k], t2, two)
                total = (total - _mirrored(second[1, i, above, k], t2, two)) * y
                total += (xy - _mirrored(second[3, after, j, k], t2, two)) * x
                total += (yz - _mirrored(second[5, i, j, beyond], t2, two)) * z
                slope_y[i, j, k] = r2 * total - r1 * b
                total = _mirrored(second[2, i, j, k], t2, two)
                total = (total - _mirrored(second[2, i, j, beyond], t2, two)) * z
                total += (xz - _mirrored(second[4, after, j, k], t2, two)) * x
                total += (yz - _mirrored(second[5, i, above, k], t2, two)) * y
                slope_z[i, j, k] = r2 * total - r1 * c


@_serial
def _mirrored(state: np.floating, threshold: np.floating, two: np.floating) -> np.floating:
    """Split minus dual."""
    return state - two * min(max(state, -threshold), threshold)


def curvature_step(
    right: Tensor,
    slopes: Sequence[Tensor],
    residual: Tensor,
    field: Tensor,
    transfer: Tensor,
    symbols: Sequence[Tensor],
    *,
    weights: tuple[float, float, float, float],
) -> None:
    r"""Solve for susceptibility and the vector field of its slope together, in k-space.

    With g the spectrum of the forward differences and :math:`b = -\bar g` that of the backward
    ones,

    .. math::
        \begin{pmatrix} r_1 |g|^2 + \mu D^2 + e & -r_1 g^H \\ -r_1 g & A \end{pmatrix}
        \begin{pmatrix} X \\ W \end{pmatrix} =
        \begin{pmatrix} R + \mu D (P + C) \\ S \end{pmatrix}, \qquad
        A = r_1 + \tfrac{r_2}{2} (|b|^2 + b b^H)

    of which A is inverted by the formula of Sherman and Morrison, and X follows from what A
    leaves of the first row.

    Parameters
    ----------
    right : (X, Y, Z) complex tensor
        R, written to: X afterwards.
    slopes : 3 (X, Y, Z) complex tensors
        S, written to: W afterwards.
    residual, field : (X, Y, Z) complex tensors
        C and P; P is written to: the field of X afterwards.
    transfer : (X, Y, Z) real tensor
        D.
    symbols : 3 complex tensors
        g along each axis, that broadcast.
    weights : 4 floats
        :math:`r_1, r_2, \mu, e`.
    """
    if _on_loops(transfer):
        kind = transfer.numpy().dtype.type
        _curvature_step_loops(
            right.numpy(),
            *(slope.numpy() for slope in slopes),
            residual.numpy(),
            field.numpy(),
            transfer.numpy(),
            *(symbol.reshape(-1).numpy() for symbol in symbols),
            np.array([*weights, 0.5, 1], kind),
        )
        return
    r1, r2, mu, e = weights
    squared = sum(g.abs() ** 2 for g in symbols)
    a = r1 + r2 / 2 * squared
    c = (r2 / 2) / (a + r2 / 2 * squared)
    # b^H v = -sum(g v)
    along = c * sum(g * s for g, s in zip(symbols, slopes, strict=True))
    turned = c * sum(g * g for g in symbols)
    p = [(s - along * g.conj()) / a for g, s in zip(symbols, slopes, strict=True)]
    q = [(g - turned * g.conj()) / a for g in symbols]
    own = r1 * squared + mu * transfer**2 + e
    own = own - r1**2 * sum((g.conj() * v).real for g, v in zip(symbols, q, strict=True))
    right.add_((field + residual) * transfer, alpha=mu)
    right.add_(sum(g.conj() * v for g, v in zip(symbols, p, strict=True)), alpha=r1).div_(own)
    for slope, part, turn in zip(slopes, p, q, strict=True):
        torch.add(part, turn * right, alpha=r1, out=slope)
    torch.mul(right, transfer, out=field)


@_parallel
def _curvature_step_loops(
    right: NDArray,
    slope_x: NDArray,
    slope_y: NDArray,
    slope_z: NDArray,
    residual: NDArray,
    field: NDArray,
    transfer: NDArray,
    symbol_x: NDArray,
    symbol_y: NDArray,
    symbol_z: NDArray,
    weights: NDArray,
) -> None:
    r1, r2, mu, e, half, one = weights
    for i in numba.prange(right.shape[0]):
        gx = symbol_x[i]
        for j in range(right.shape[1]):
            gy = symbol_y[j]
            for k in range(right.shape[2]):
                gz, d = symbol_z[k], transfer[i, j, k]
                cx, cy, cz = gx.conjugate(), gy.conjugate(), gz.conjugate()
                squared = (gx * cx + gy * cy + gz * cz).real
                a = r1 + r2 * half * squared
                c = r2 * half / (a + r2 * half * squared)
                a = one / a
                sx, sy, sz = slope_x[i, j, k], slope_y[i, j, k], slope_z[i, j, k]
                along = (gx * sx + gy * sy + gz * sz) * c
                turned = (gx * gx + gy * gy + gz * gz) * c
                px, py, pz = (sx - along * cx) * a, (sy - along * cy) * a, (sz - along * cz) * a
                qx, qy, qz = (gx - turned * cx) * a, (gy - turned * cy) * a, (gz - turned * cz) * a
                own = r1 * squared + mu * d * d + e
                own -= r1 * r1 * (cx * qx + cy * qy + cz * qz).real
                chi = right[i, j, k] + (field[i, j, k] + residual[i, j, k]) * (mu * d)
                chi = (chi + (cx * px + cy * py + cz * pz) * r1) * (one / own)
                right[i, j, k] = chi
                field[i, j, k] = chi * d
                chi = chi * r1
                slope_x[i, j, k] = px + qx * chi
                slope_y[i, j, k] = py + qy * chi
                slope_z[i, j, k] = pz + qz * chi
