"""The splits of the field: what each data term does with field and dual."""

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qsmpipe.numerics.fused import loops
from qsmpipe.numerics.fused.loops import parallel, serial


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
    if loops.usable(predicted):
        _data_split_loops(*(x.reshape(-1).numpy() for x in (predicted, dual, measured, trust)))
        return
    changed = (predicted + dual - measured) * trust
    torch.sub(dual, changed, alpha=2, out=predicted)
    dual.copy_(changed)


@parallel
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
    if loops.usable(predicted):
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


@serial
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


@parallel
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
