"""The steps and the split of total generalised variation by ADMM."""

from collections.abc import Sequence

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.fused import loops
from qsmpipe.numerics.fused.gradient import Sums, clip, hold, hold_row, observe, observe_row
from qsmpipe.numerics.fused.loops import parallel, serial
from qsmpipe.numerics.operators import gradient, gradient_adjoint

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
    image : (X, Y, Z) real tensor
        x of this step.
    previous : real tensor
        x of the step before in a box, the corner of the grid; x afterwards.
    slopes : 3 (X, Y, Z) real tensors
        w, written to: its right-hand side afterwards.
    first, second : (3, X, Y, Z) and (6, X, Y, Z) real tensors
        The states :math:`v_1` and :math:`v_2`; written to.
    zone : uint8 tensor
        Of the box, as there. The norms count the whole grid.
    escape : (X, Y, Z) real tensor
        As there; written to.
    zooms : tuple of float
        Voxel size (mm).
    thresholds : 2 floats
        Of both splits.
    weights : 3 floats
        :math:`r_1, r_2` and that of the escape.
    out : (X, Y, Z) real tensor
        Where the right-hand side of x is written to; none of the others.

    Returns
    -------
    Sums
        ``gap`` is that of both splits.
    """
    if not loops.usable(image):
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

    change, size = observe(image, previous, zone)
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
    out.copy_(gradient_adjoint(one, zooms) * weights[0])
    hold(image, escape, zone, weights[2], out)
    for n in range(3):
        slopes[n].copy_(weights[1] * backward_adjoint(two[n], n) - weights[0] * one[n])
    for n, (i, j) in enumerate(PAIRS, 3):
        slopes[j].add_(backward_adjoint(two[n], i), alpha=weights[1])
        slopes[i].add_(backward_adjoint(two[n], j), alpha=weights[1])
    return Sums(change, size, gap.item())


@parallel
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
    bx, by, bz = zone.shape
    t1, t2, half = numbers[0], numbers[1], numbers[6]
    x, y, z = per_mm
    for i in numba.prange(nx):
        change, size, gap = np.zeros(bz), np.zeros(bz), 0.0
        for j in range(ny):
            here, right, up = image[i, j], image[(i + 1) % nx, j], image[i, (j + 1) % ny]
            if i < bx and j < by:
                observe_row(here, previous[i, j], zone[i, j], change, size)
            u, v, w = slope_x[i, j], slope_y[i, j], slope_z[i, j]
            left_u, left_v, left_w = slope_x[i - 1, j], slope_y[i - 1, j], slope_z[i - 1, j]
            down_u, down_v, down_w = slope_x[i, j - 1], slope_y[i, j - 1], slope_z[i, j - 1]
            for k in range(nz):
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
        sums[i, 0], sums[i, 1], sums[i, 2] = change.sum(), size.sum(), gap


@serial
def _advance(state: NDArray, k: int, value: np.floating, threshold: np.floating) -> np.floating:
    """State of the next step at one voxel; the squared step of its dual."""
    old = min(max(state[k], -threshold), threshold)
    new = value + old
    state[k] = new
    step = min(max(new, -threshold), threshold) - old
    return step * step


@parallel
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
    bx, by, _ = zone.shape
    t1, t2, r1, r2, away_weight, two, _ = numbers
    x, y, z = per_mm
    nowhere = np.empty(0, zone.dtype)
    for i in numba.prange(nx):
        after = (i + 1) % nx
        for j in range(ny):
            above = (j + 1) % ny
            for k in range(nz):
                beyond = k + 1 if k + 1 < nz else 0
                a = _mirrored(first[0, i, j, k], t1, two)
                b = _mirrored(first[1, i, j, k], t1, two)
                c = _mirrored(first[2, i, j, k], t1, two)
                total = (_mirrored(first[0, i - 1, j, k], t1, two) - a) * x
                total += (_mirrored(first[1, i, j - 1, k], t1, two) - b) * y
                total += (_mirrored(first[2, i, j, k - 1], t1, two) - c) * z
                out[i, j, k] = r1 * total
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
            kind = zone[i, j] if i < bx and j < by else nowhere
            hold_row(image[i, j], escape[i, j], kind, away_weight, out[i, j])


@serial
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
    if loops.usable(transfer):
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


@parallel
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
