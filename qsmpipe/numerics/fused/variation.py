r"""The rounded total variation :math:`w \sum m \sqrt{(\nabla x)^2 + \epsilon^2}`: its derivatives.

A step of a descent needs three of them: the slope, its curvature along a direction, and the
diagonal of that curvature. The curvature is that of the parabola which touches the variation at x
and lies above it elsewhere, :math:`w m / \sqrt{(\nabla x)^2 + \epsilon^2}`.
"""

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qsmpipe.numerics.fourier import SPACE, Zooms
from qsmpipe.numerics.fused import loops
from qsmpipe.numerics.fused.loops import PLANES, parallel, serial
from qsmpipe.numerics.operators import gradient, gradient_adjoint

COUNTED = (1, 2, 4)
"""Bits of a voxel: whether its difference to the next voxel along an axis is counted, m."""


def counted_bits(counted: Tensor) -> Tensor:
    """Pack m, (3, X, Y, Z) bool, into (X, Y, Z) uint8: the sum of :data:`COUNTED`."""
    x, y, z = (bit * part.to(torch.uint8) for bit, part in zip(COUNTED, counted, strict=True))
    return x + y + z


def add_variation_slope(
    image: Tensor, counted: Tensor, zooms: Zooms, *, weight: float, epsilon: float, out: Tensor
) -> None:
    r"""Add :math:`w \nabla^T (m \nabla x / \sqrt{(\nabla x)^2 + \epsilon^2})` to ``out``.

    Parameters
    ----------
    image : (X, Y, Z) real tensor
        x; the grid is periodic.
    counted : (X, Y, Z) uint8 tensor
        m, as :func:`counted_bits` packs it.
    zooms : tuple of float
        Voxel size (mm).
    weight, epsilon : float
        w, and the gradient below which the variation is rounded off.
    out : (X, Y, Z) real tensor
        Written to; none of the above.
    """
    if loops.usable(image):
        _pass(image, counted, zooms, weight, epsilon, out, diagonal=False)
    else:
        slope = gradient(image, zooms)
        flow = slope * _stiffness(slope, counted, weight, epsilon)
        out.add_(gradient_adjoint(flow, zooms))


def add_variation_diagonal(
    image: Tensor, counted: Tensor, zooms: Zooms, *, weight: float, epsilon: float, out: Tensor
) -> None:
    """Add the diagonal of the curvature to ``out``; parameters as :func:`add_variation_slope`."""
    if loops.usable(image):
        _pass(image, counted, zooms, weight, epsilon, out, diagonal=True)
        return
    stiffness = _stiffness(gradient(image, zooms), counted, weight, epsilon)
    for component, axis, zoom in zip(stiffness, SPACE, zooms, strict=True):
        out.add_(component + component.roll(1, axis), alpha=1 / zoom**2)


def variation_curvature(
    image: Tensor,
    direction: Tensor,
    counted: Tensor,
    zooms: Zooms,
    *,
    weight: float,
    epsilon: float,
) -> float:
    r"""Give :math:`w \sum m (\nabla p)^2 / \sqrt{(\nabla x)^2 + \epsilon^2}`.

    Parameters
    ----------
    image, direction : (X, Y, Z) real tensors
        x and p; the grid is periodic.
    counted, zooms, weight, epsilon
        As in :func:`add_variation_slope`.

    Returns
    -------
    float
    """
    if not loops.usable(image):
        stiffness = _stiffness(gradient(image, zooms), counted, weight, epsilon)
        bend = gradient(direction, zooms).square_().mul_(stiffness)
        return bend.sum(dtype=torch.float64).item()
    kind = image.numpy().dtype.type
    sums = np.zeros(len(image))
    _curvature_loops(
        image.numpy(),
        direction.numpy(),
        counted.numpy(),
        np.array([1 / zoom for zoom in zooms], kind),
        np.array([weight, epsilon**2], kind),
        sums,
    )
    return float(sums.sum())


def _stiffness(slope: Tensor, counted: Tensor, weight: float, epsilon: float) -> Tensor:
    m = torch.stack([counted & bit > 0 for bit in COUNTED])
    return (slope.square() + epsilon**2).rsqrt_().mul_(m).mul_(weight)


def _pass(
    image: Tensor,
    counted: Tensor,
    zooms: Zooms,
    weight: float,
    epsilon: float,
    out: Tensor,
    *,
    diagonal: bool,
) -> None:
    kind = image.numpy().dtype.type
    _add_loops(
        image.numpy(),
        counted.numpy(),
        out.numpy(),
        np.array([1 / zoom for zoom in zooms], kind),
        np.array([weight, epsilon**2, not diagonal, diagonal, 1 if diagonal else -1], kind),
    )


@serial
def _turn(row: NDArray, start: int, turned: NDArray) -> None:
    """Copy a row, periodic, from one of its elements on."""
    head, tail = row[start:], row[:start]
    for k in range(len(head)):
        turned[k] = head[k]
    rest = turned[len(head) :]
    for k in range(len(tail)):
        rest[k] = tail[k]


@parallel
def _add_loops(
    image: NDArray, counted: NDArray, out: NDArray, per_mm: NDArray, scale: NDArray
) -> None:
    for block in numba.prange((len(image) + PLANES - 1) // PLANES):
        _add_block(image, counted, out, per_mm, scale, block * PLANES)


@serial
def _add_block(
    image: NDArray, counted: NDArray, out: NDArray, per_mm: NDArray, scale: NDArray, first: int
) -> None:
    """Do some planes; ``scale`` holds what :func:`_pass` puts there."""
    nx, ny, nz = image.shape
    flows, before = np.zeros((3, ny, nz), image.dtype), np.zeros((ny, nz), image.dtype)
    some, had = np.zeros(ny, np.bool_), np.zeros(ny, np.bool_)
    turned = np.empty(nz, image.dtype)
    for i in range(first - 1, min(first + PLANES, nx)):
        before[:] = flows[0]
        had[:] = some
        for j in range(ny):
            start, stop = _span(counted[i, j])
            if some[j]:
                for axis in range(3):
                    flows[axis, j] = 0
            some[j] = start < stop
            if not some[j]:
                continue
            for axis in range(3):
                if axis == 0:
                    beyond = image[(i + 1) % nx, j]
                elif axis == 1:
                    beyond = image[i, (j + 1) % ny]
                else:
                    _turn(image[i, j], 1, turned)
                    beyond = turned
                _flow(
                    image[i, j][start:stop],
                    beyond[start:stop],
                    counted[i, j][start:stop],
                    COUNTED[axis],
                    per_mm[axis],
                    scale,
                    flows[axis, j][start:stop],
                )
        if i < first:
            continue
        for j in range(ny):
            if not (had[j] or some[j - 1] or some[j]):
                continue
            for axis in range(3):
                if axis == 0:
                    behind = before[j]
                elif axis == 1:
                    behind = flows[1, j - 1]
                else:
                    _turn(flows[2, j], nz - 1, turned)
                    behind = turned
                _exchange(out[i, j], behind, flows[axis, j], scale[4], per_mm[axis])


@serial
def _span(kind: NDArray) -> tuple[int, int]:
    """Find where a row holds differences that are counted, from the first to behind the last."""
    start, stop = 0, len(kind)
    while start < stop and kind[start] == 0:
        start += 1
    while stop > start and kind[stop - 1] == 0:
        stop -= 1
    return start, stop


@serial
def _flow(
    here: NDArray,
    beyond: NDArray,
    kind: NDArray,
    bit: int,
    per_mm: np.floating,
    scale: NDArray,
    flow: NDArray,
) -> None:
    """Give what the voxels of two rows exchange: the slope, or its curvature."""
    weight, rounding, sloping, level, _ = scale
    for k in range(len(flow)):
        slope = (beyond[k] - here[k]) * per_mm
        stiffness = weight * (kind[k] & bit != 0) / np.sqrt(slope * slope + rounding)
        flow[k] = stiffness * (sloping * slope + level * per_mm)


@serial
def _exchange(
    result: NDArray, behind: NDArray, flow: NDArray, side: np.floating, per_mm: np.floating
) -> None:
    for k in range(len(result)):
        result[k] += (behind[k] + side * flow[k]) * per_mm


@parallel
def _curvature_loops(
    image: NDArray,
    direction: NDArray,
    counted: NDArray,
    per_mm: NDArray,
    scale: NDArray,
    sums: NDArray,
) -> None:
    nx = len(image)
    for i in numba.prange(nx):
        end = (i + 1) % nx
        sums[i] = _curvature_plane(
            image[i], image[end], direction[i], direction[end], counted[i], per_mm, scale
        )


@serial
def _curvature_plane(
    image: NDArray,
    next_image: NDArray,
    direction: NDArray,
    next_direction: NDArray,
    counted: NDArray,
    per_mm: NDArray,
    scale: NDArray,
) -> float:
    ny, nz = image.shape
    total = np.zeros(nz)
    turned, swung = np.empty(nz, image.dtype), np.empty(nz, image.dtype)
    for j in range(ny):
        start, stop = _span(counted[j])
        if start == stop:
            continue
        for axis in range(3):
            if axis == 0:
                beyond, ahead = next_image[j], next_direction[j]
            elif axis == 1:
                beyond, ahead = image[(j + 1) % ny], direction[(j + 1) % ny]
            else:
                _turn(image[j], 1, turned)
                _turn(direction[j], 1, swung)
                beyond, ahead = turned, swung
            _bend(
                image[j][start:stop],
                beyond[start:stop],
                direction[j][start:stop],
                ahead[start:stop],
                counted[j][start:stop],
                COUNTED[axis],
                per_mm[axis],
                scale,
                total,
            )
    return total.sum()


@serial
def _bend(
    here: NDArray,
    beyond: NDArray,
    along: NDArray,
    ahead: NDArray,
    kind: NDArray,
    bit: int,
    per_mm: np.floating,
    scale: NDArray,
    total: NDArray,
) -> None:
    """Add the curvature between two rows to the sums of a plane."""
    weight, rounding = scale
    for k in range(len(here)):
        slope, turn = (beyond[k] - here[k]) * per_mm, (ahead[k] - along[k]) * per_mm
        stiffness = weight * (kind[k] & bit != 0) / np.sqrt(slope * slope + rounding)
        total[k] += stiffness * turn * turn
