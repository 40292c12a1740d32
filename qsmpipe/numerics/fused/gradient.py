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
