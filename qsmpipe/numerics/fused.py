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
    escape: Tensor | None = None,
    escape_weight: float = 0.0,
    out: Tensor,
) -> Sums:
    r"""Update split and dual of the total variation, and make the next right-hand side.

    ADMM for :math:`\lambda \|z\|_1` with :math:`z = \nabla x` and scaled dual u does

    .. math:: v = \nabla x + u, \quad z = \mathrm{shrink}(v, t), \quad u = v - z

    Since u is v clipped to [-t, t], v alone is stored. The right-hand side is
    :math:`w \nabla^T(z - u)`.

    With ``escape`` a second split holds x at 0 where the zone does not allow it:
    :math:`e \leftarrow e + x` there and 0 elsewhere, and the right-hand side gains
    :math:`w_e (x - 2 e)` there, with the new e, and :math:`w_e x` elsewhere.

    Parameters
    ----------
    image, previous : (X, Y, Z) real tensors
        x of this step and of the one before.
    state : (3, X, Y, Z) real tensor
        v; written to. 0 at the start.
    zone : (X, Y, Z) uint8 tensor
        Sum of :data:`OBSERVED` and :data:`ALLOWED`.
    zooms : tuple of float
        Voxel size (mm).
    threshold : float
        t, in the unit of x per mm.
    weight : float
        w.
    escape : (X, Y, Z) real tensor, optional
        e; written to.
    escape_weight : float
        :math:`w_e`.
    out : (X, Y, Z) real tensor
        Where the right-hand side is written to; none of the above.

    Returns
    -------
    Sums
    """
    if not _on_loops(image):
        return _gradient_split_torch(
            image, previous, state, zone, zooms, threshold, weight, escape, escape_weight, out
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
    escape: Tensor | None,
    escape_weight: float,
    out: Tensor,
) -> Sums:
    dual = clip(state, threshold)
    state.copy_(gradient(image, zooms) + dual)
    changed = clip(state, threshold)
    gap = (changed - dual).square().sum(dtype=torch.float64)
    out.copy_(gradient_adjoint(state - 2 * changed, zooms) * weight)
    if escape is not None:
        escape.copy_(torch.where(zone & ALLOWED > 0, 0.0, escape + image))
        out.add_(image - 2 * escape, alpha=escape_weight)
    seen = zone & OBSERVED > 0
    change = torch.where(seen, image - previous, 0.0).square().sum(dtype=torch.float64)
    size = torch.where(seen, image, 0.0).square().sum(dtype=torch.float64)
    return Sums(change.item(), size.item(), gap.item())


@_parallel
def _gradient_split_loops(
    image: NDArray,
    previous: NDArray,
    state: NDArray,
    before: NDArray,
    zone: NDArray,
    escape: NDArray,
    out: NDArray,
    per_mm: NDArray,
    scale: NDArray,
    sums: NDArray,
) -> None:
    for block in numba.prange(len(sums)):
        _gradient_split_block(
            image, previous, state, before, zone, escape, out, per_mm, scale, sums, block
        )


@_serial
def _gradient_split_block(
    image: NDArray,
    previous: NDArray,
    state: NDArray,
    before: NDArray,
    zone: NDArray,
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
    # z - u along x on the plane before, along y on the row before, along z on this row
    plane = np.empty((ny, nz), image.dtype)
    row = np.empty(nz, image.dtype)
    line = np.empty(nz + 1, image.dtype)
    # Sums per k, added up at the end: a single one would forbid vector instructions.
    change, size, gap = np.zeros(nz), np.zeros(nz), np.zeros(nz)
    for j in range(ny):
        here, there, was = image[first, j], image[(first - 1) % nx, j], before[block, j]
        for k in range(nz):
            new = (here[k] - there[k]) * per_mm[0] + min(max(was[k], -threshold), threshold)
            plane[j, k] = new - two * min(max(new, -threshold), threshold)
    for i in range(first, min(first + PLANES, nx)):
        here, there, was = image[i, 0], image[i, ny - 1], state[1, i, ny - 1]
        for k in range(nz):
            new = (here[k] - there[k]) * per_mm[1] + min(max(was[k], -threshold), threshold)
            row[k] = new - two * min(max(new, -threshold), threshold)
        for j in range(ny):
            here, right, up = image[i, j], image[(i + 1) % nx, j], image[i, (j + 1) % ny]
            result, kind, then = out[i, j], zone[i, j], previous[i, j]
            last, was = plane[j], state[0, i, j]
            for k in range(nz):
                old = min(max(was[k], -threshold), threshold)
                new = (right[k] - here[k]) * per_mm[0] + old
                dual = min(max(new, -threshold), threshold)
                was[k] = new
                gap[k] += (dual - old) * (dual - old)
                now = new - two * dual
                result[k] = (last[k] - now) * per_mm[0]
                last[k] = now
            was = state[1, i, j]
            for k in range(nz):
                old = min(max(was[k], -threshold), threshold)
                new = (up[k] - here[k]) * per_mm[1] + old
                dual = min(max(new, -threshold), threshold)
                was[k] = new
                gap[k] += (dual - old) * (dual - old)
                now = new - two * dual
                result[k] += (row[k] - now) * per_mm[1]
                row[k] = now
            was = state[2, i, j]
            for k in range(nz):
                beyond = here[k + 1] if k + 1 < nz else here[0]
                old = min(max(was[k], -threshold), threshold)
                new = (beyond - here[k]) * per_mm[2] + old
                dual = min(max(new, -threshold), threshold)
                was[k] = new
                gap[k] += (dual - old) * (dual - old)
                line[k + 1] = new - two * dual
            line[0] = line[nz]
            for k in range(nz):
                result[k] = weight * (result[k] + (line[k] - line[k + 1]) * per_mm[2])
            if escape.size > 0:
                away = escape[i, j]
                for k in range(nz):
                    away[k] = away[k] * 0 if kind[k] & ALLOWED else away[k] + here[k]
                    result[k] += escape_weight * (here[k] - two * away[k])
            for k in range(nz):
                seen = kind[k] & OBSERVED
                change[k] += seen * ((here[k] - then[k]) * (here[k] - then[k]))
                size[k] += seen * (here[k] * here[k])
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
