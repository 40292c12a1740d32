"""What every method of the stage shares: its result, and how it takes several volumes."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qsmpipe.numerics.solvers import Convergence, dot


class LocalField(NamedTuple):
    """A field without its background."""

    field: Tensor
    """Field (..., X, Y, Z) of the sources inside ``mask``, in the unit that went in; 0 outside."""
    mask: Tensor
    """Where ``field`` is trusted, (X, Y, Z) bool; never larger than the mask that went in."""
    convergence: Convergence | None
    """How the iteration ended; None for a direct method."""


def one_by_one(
    solve: Callable[[Tensor], tuple[Tensor, Convergence]], fields: Tensor
) -> tuple[Tensor, Convergence]:
    """Solve for each (X, Y, Z) of (..., X, Y, Z); tell how the slowest of them ended."""
    if fields.ndim == 3:
        return solve(fields)
    results = [solve(field) for field in fields.reshape(-1, *fields.shape[-3:])]
    ends = [end for _, end in results]
    slowest = Convergence(
        all(end.converged for end in ends),
        max(end.iterations for end in ends),
        max(end.change for end in ends),
        ends[0].tolerance,
    )
    return torch.stack([local for local, _ in results]).reshape(fields.shape), slowest


def minimal_residual(
    apply: Callable[[Tensor], Tensor],
    right: Tensor,
    *,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Convergence]:
    r"""Minimise ``|right - apply(x)|`` for a symmetric positive semi-definite ``apply``.

    Conjugate residuals. With ``apply`` :math:`= A A^T` they make, step by step, what conjugate
    gradients make of the normal equations of :math:`A`: both minimise
    :math:`\| b - A A^T x \|` over the same spaces. But here vectors have the size of the data,
    not of the unknowns.

    Parameters
    ----------
    apply : callable
        The system; a new tensor.
    right : real Tensor
        The right-hand side, which need not be in the range of ``apply``.
    tolerance : float
        Stop when :math:`|A^T r| \leq` ``tolerance`` :math:`|A| |r|` with the residual r: what is
        left is then out of reach of :math:`A`, but for that fraction. For r no less than
        ``tolerance`` times ``right`` is taken, so that it ends where all is in reach;
        for :math:`|A|` the largest :math:`|A^T r| / |r|` seen.
    max_iterations : int
        Stop here at the latest.

    Returns
    -------
    x : Tensor
    convergence : Convergence
        ``change`` is :math:`|A^T r| / (|A| |r|)`, with r as above.
    """
    x = torch.zeros_like(right)
    norm = dot(right, right) ** 0.5
    if norm == 0:
        return x, Convergence(True, 0, 0.0, tolerance)
    residual, direction = right.clone(), right.clone()
    del right  # volumes are large: hold none longer than needed
    along = apply(direction)
    gradient, largest, iterations = dot(residual, along), 0.0, 0
    while True:
        size = dot(residual, residual) ** 0.5
        steep = max(gradient, 0.0) ** 0.5
        largest = max(largest, steep / size) if size > 0 else largest
        change = steep / (largest * max(size, tolerance * norm)) if steep > 0 else 0.0
        if change <= tolerance or iterations >= max_iterations:
            return x, Convergence(change <= tolerance, iterations, change, tolerance)
        step = gradient / dot(along, along)
        x.add_(direction, alpha=step)
        residual.sub_(along, alpha=step)
        iterations += 1
        image = apply(residual)
        gradient, previous = dot(residual, image), gradient
        direction.mul_(gradient / previous).add_(residual)
        along.mul_(gradient / previous).add_(image)
        del image
