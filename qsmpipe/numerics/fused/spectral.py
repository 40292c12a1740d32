"""The steps that solve for maps, frequency by frequency."""

from collections.abc import Sequence

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qsmpipe.numerics.fused import loops
from qsmpipe.numerics.fused.loops import parallel


def dipole_step(
    right: Tensor,
    residual: Tensor,
    field: Tensor,
    transfer: Tensor,
    lines: Sequence[Tensor],
    *,
    weights: tuple[float, float, float],
) -> None:
    r"""Solve for susceptibility and predict its field, in k-space.

    .. math:: X = \frac{R + \mu D (P + C)}{s L + \mu D^2 + e}, \quad P \leftarrow D X

    Parameters
    ----------
    right : (X, Y, Z) complex tensor
        R, written to: X afterwards.
    residual : (X, Y, Z) complex tensor
        C.
    field : (X, Y, Z) complex tensor
        P, written to: the field of X afterwards.
    transfer : (X, Y, Z) real tensor
        D.
    lines : 3 real tensors
        What each axis adds to L, that broadcast.
    weights : 3 floats
        :math:`s, \mu, e`.
    """
    if loops.usable(transfer):
        _dipole_step_loops(
            *(x.numpy() for x in (right, residual, field, transfer)),
            *(line.reshape(-1).numpy() for line in lines),
            np.array([*weights, 1], transfer.numpy().dtype),
        )
        return
    s, mu, e = weights
    right.add_((field + residual) * transfer, alpha=mu)
    right.div_(s * sum(lines) + mu * transfer**2 + e)
    torch.mul(right, transfer, out=field)


@parallel
def _dipole_step_loops(
    right: NDArray,
    residual: NDArray,
    field: NDArray,
    transfer: NDArray,
    line_x: NDArray,
    line_y: NDArray,
    line_z: NDArray,
    weights: NDArray,
) -> None:
    s, mu, e, one = weights
    for i in numba.prange(right.shape[0]):
        for j in range(right.shape[1]):
            level = line_x[i] + line_y[j]
            for k in range(right.shape[2]):
                d = transfer[i, j, k]
                inverse = one / (s * (level + line_z[k]) + mu * d * d + e)
                chi = right[i, j, k] + (field[i, j, k] + residual[i, j, k]) * (mu * d)
                chi = chi * inverse
                right[i, j, k] = chi
                field[i, j, k] = chi * d


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
    if loops.usable(transfer):
        kind = transfer.numpy().dtype.type
        arrays = (x.reshape(-1).numpy() for x in (right, residual, transfer))
        _draw_step_loops(*arrays, kind(weight))
        return
    right.add_(residual * transfer, alpha=weight)


@parallel
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
    if loops.usable(gain):
        _settle_step_loops(*(x.reshape(-1).numpy() for x in (right, previous, gain, inverse)))
        return
    right.add_(previous * gain).mul_(inverse)


@parallel
def _settle_step_loops(right: NDArray, previous: NDArray, gain: NDArray, inverse: NDArray) -> None:
    for i in numba.prange(right.size):
        right[i] = (right[i] + previous[i] * gain[i]) * inverse[i]


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
    if loops.usable(transfer):
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


@parallel
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
