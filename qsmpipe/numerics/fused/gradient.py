"""The split of the gradient: total variation, and where the map may be."""

from typing import NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.fused import loops
from qsmpipe.numerics.fused.loops import PLANES, parallel, serial
from qsmpipe.numerics.operators import gradient, gradient_adjoint

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

    The norm counts the differences to the next voxel of the voxels in a box, which may be
    smaller than the grid. Those beyond cost nothing: their dual is 0, and they need no state.

    With ``escape`` a second split holds x at 0 where the zone does not allow it, and beyond the
    box; its scaled dual is e: :math:`e \leftarrow e + x` there and 0 elsewhere, and the
    right-hand side gains :math:`-w_e e` there, with the new e, and :math:`w_e x` elsewhere.

    Parameters
    ----------
    image : (X, Y, Z) real tensor
        x of this step.
    previous : real tensor
        x of the step before in the box, the corner of the grid; x afterwards.
    state : (3, ...) real tensor
        v in the box; written to. 0 at the start.
    zone : uint8 tensor
        Of the box: sum of :data:`OBSERVED`, :data:`ALLOWED` and those of :data:`STEEP`.
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
        Where the right-hand side is written to; none of the others.

    Returns
    -------
    Sums
    """
    if not loops.usable(image):
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
    behind = (starts - 1) % len(image)
    sums = np.zeros((len(starts), 3))
    _gradient_split_loops(
        image.numpy(),
        previous.numpy(),
        state.numpy(),
        # The old state of the plane before each block, which another block overwrites.
        state[0, behind.clamp(max=len(zone) - 1)].numpy(),
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


def in_box(image: Tensor, box: Tensor) -> Tensor:
    """View of the corner of ``image`` (..., X, Y, Z) that ``box`` (..., x, y, z) stands for."""
    x, y, z = box.shape[-3:]
    return image[..., :x, :y, :z]


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
    change, size = observe(image, previous, zone)
    smooth = torch.stack([zone & bit == 0 for bit in STEEP]) if edges else 1.0
    flow = gradient(image, zooms)
    dual = clip(state, threshold) * smooth
    state.copy_(in_box(flow, zone) + dual)
    changed = clip(state, threshold) * smooth
    gap = (changed - dual).square().sum(dtype=torch.float64)
    in_box(flow, zone).copy_(state - 2 * changed)
    out.copy_(gradient_adjoint(flow, zooms) * weight)
    if escape is not None:
        hold(image, escape, zone, escape_weight, out)
    return Sums(change, size, gap.item())


def observe(image: Tensor, previous: Tensor, zone: Tensor) -> tuple[float, float]:
    """Squared norms of change and image where they are watched; ``previous`` moves on."""
    seen, now = zone & OBSERVED > 0, in_box(image, zone)
    change = torch.where(seen, now - previous, 0.0).square().sum(dtype=torch.float64)
    size = torch.where(seen, now, 0.0).square().sum(dtype=torch.float64)
    previous.copy_(now)
    return change.item(), size.item()


def hold(image: Tensor, escape: Tensor, zone: Tensor, weight: float, out: Tensor) -> None:
    """Hold the image at 0 where the zone does not allow it."""
    allowed = torch.zeros_like(image, dtype=torch.bool)
    in_box(allowed, zone).copy_(zone & ALLOWED > 0)
    escape.copy_(torch.where(allowed, 0.0, escape + image))
    out.add_(torch.where(allowed, image, -escape), alpha=weight)


@parallel
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


@serial
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


@serial
def _advance(
    state: NDArray,
    slope: np.floating,
    threshold: np.floating,
    two: np.floating,
    steep: NDArray | None,
    i: int,
    j: int,
    k: int,
    bit: int,
    gap: NDArray,
) -> np.floating:
    """Give z - u of one component, whose v moves on in a row of ``state``."""
    old = _clip(state[k], threshold, steep, i, j, k, bit)
    new = slope + old
    dual = _clip(new, threshold, steep, i, j, k, bit)
    state[k] = new
    gap[k] += (dual - old) * (dual - old)
    return new - two * dual


@serial
def _across(
    result: NDArray,
    behind: NDArray,
    here: NDArray,
    beyond: NDArray,
    per_mm: np.floating,
    state: NDArray,
    threshold: np.floating,
    two: np.floating,
    steep: NDArray | None,
    i: int,
    j: int,
    bit: int,
    gap: NDArray,
) -> None:
    """Add what the first or second axis gives a row, of whose first voxels ``state`` is v.

    ``behind`` is z - u on the row before, and that on this row afterwards.
    """
    for k in range(len(state)):
        slope = (beyond[k] - here[k]) * per_mm
        now = _advance(state, slope, threshold, two, steep, i, j, k, bit, gap)
        result[k] += (behind[k] - now) * per_mm
        behind[k] = now
    # The rest of the row has its own indices: of one that begins at a number numba does not know
    # that it is 0 or above, and then makes no vector instructions.
    start = len(state)
    rest, free, after, ahead = result[start:], behind[start:], here[start:], beyond[start:]
    for k in range(len(rest)):
        now = (ahead[k] - after[k]) * per_mm
        rest[k] += (free[k] - now) * per_mm
        free[k] = now


@serial
def _along(
    line: NDArray,
    here: NDArray,
    per_mm: np.floating,
    state: NDArray,
    threshold: np.floating,
    two: np.floating,
    steep: NDArray | None,
    i: int,
    j: int,
    bit: int,
    gap: NDArray,
) -> None:
    """Find z - u of the third axis on a row, from the second element of ``line`` on."""
    nz = len(here)
    for k in range(len(state)):
        beyond = here[k + 1] if k + 1 < nz else here[0]
        slope = (beyond - here[k]) * per_mm
        line[k + 1] = _advance(state, slope, threshold, two, steep, i, j, k, bit, gap)
    rest, free = here[len(state) :], line[len(state) + 1 :]
    for k in range(len(rest) - 1):
        free[k] = (rest[k + 1] - rest[k]) * per_mm
    if len(rest) > 0:
        line[nz] = (here[0] - here[nz - 1]) * per_mm
    line[0] = line[nz]


@serial
def observe_row(
    here: NDArray, then: NDArray, kind: NDArray, change: NDArray, size: NDArray
) -> None:
    """Add to the sums what a row of the box has; ``then`` moves on."""
    for k in range(len(then)):
        seen = kind[k] & OBSERVED
        change[k] += seen * ((here[k] - then[k]) * (here[k] - then[k]))
        size[k] += seen * (here[k] * here[k])
        then[k] = here[k]


@serial
def hold_row(
    here: NDArray, away: NDArray, kind: NDArray, weight: np.floating, result: NDArray
) -> None:
    """Hold a row at 0 where it is not allowed; of its first voxels ``kind`` is the zone."""
    for k in range(len(kind)):
        dual = away[k] + here[k]
        away[k] = dual * 0 if kind[k] & ALLOWED else dual
        result[k] += weight * (here[k] if kind[k] & ALLOWED else -dual)
    rest, dual_rest, given = here[len(kind) :], away[len(kind) :], result[len(kind) :]
    for k in range(len(rest)):
        dual_rest[k] += rest[k]
        given[k] -= weight * dual_rest[k]


@serial
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
    bx, by, bz = zone.shape
    threshold, weight, escape_weight, two = scale
    first = block * PLANES
    last = (first - 1) % nx
    x, y, z = STEEP
    # Rows beyond the box have no state.
    nothing, nowhere = np.empty(0, image.dtype), np.empty(0, zone.dtype)
    # z - u along x on the plane before, along y on the row before, along z on this row
    plane, row = np.zeros((ny, nz), image.dtype), np.zeros(nz, image.dtype)
    line, unused = np.empty(nz + 1, image.dtype), np.empty(nz, image.dtype)
    # Sums per k, added up at the end: a single one would forbid vector instructions.
    change, size, gap, spare = np.zeros(bz), np.zeros(bz), np.zeros(bz), np.zeros(bz)
    for j in range(ny):
        was = before[block, j] if last < bx and j < by else nothing
        _across(
            unused, plane[j], image[last, j], image[first, j], per_mm[0], was,
            threshold, two, steep, last, j, x, spare,
        )  # fmt: skip
    for i in range(first, min(first + PLANES, nx)):
        was = state[1, i, ny - 1].copy() if i < bx and by == ny else nothing
        _across(
            unused, row, image[i, ny - 1], image[i, 0], per_mm[1], was,
            threshold, two, steep, i, ny - 1, y, spare,
        )  # fmt: skip
        for j in range(ny):
            here, result = image[i, j], out[i, j]
            v_x, v_y, v_z, kind = nothing, nothing, nothing, nowhere
            if i < bx and j < by:
                v_x, v_y, v_z, kind = state[0, i, j], state[1, i, j], state[2, i, j], zone[i, j]
                observe_row(here, previous[i, j], kind, change, size)
            for k in range(nz):
                result[k] = 0
            _across(
                result, plane[j], here, image[(i + 1) % nx, j], per_mm[0], v_x,
                threshold, two, steep, i, j, x, gap,
            )  # fmt: skip
            _across(
                result, row, here, image[i, (j + 1) % ny], per_mm[1], v_y,
                threshold, two, steep, i, j, y, gap,
            )  # fmt: skip
            _along(line, here, per_mm[2], v_z, threshold, two, steep, i, j, z, gap)
            for k in range(nz):
                result[k] = weight * (result[k] + (line[k] - line[k + 1]) * per_mm[2])
            if escape.size > 0:
                hold_row(here, escape[i, j], kind, escape_weight, result)
    for k in range(bz):
        sums[block, 0] += change[k]
        sums[block, 1] += size[k]
        sums[block, 2] += gap[k]
