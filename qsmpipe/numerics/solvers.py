"""Solvers for linear systems; they know no QSM."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Convergence(NamedTuple):
    """How an iterative method ended."""

    converged: bool
    """Whether the stopping rule was met before the iterations ran out."""
    iterations: int
    """Steps taken."""
    change: float
    """The last value of what the stopping rule watches (each method says what)."""
    tolerance: float
    """The value of ``change`` that stops."""


def dot(x: Tensor, y: Tensor) -> float:
    """Inner product as a Python float."""
    return torch.dot(x.reshape(-1), y.reshape(-1)).item()


def conjugate_gradient(
    apply: Callable[[Tensor], Tensor],
    right: Tensor,
    *,
    start: Tensor | None = None,
    precondition: Callable[[Tensor], Tensor] = lambda residual: residual,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Convergence]:
    """Solve ``apply(x) = right`` for a symmetric positive semi-definite ``apply``.

    Parameters
    ----------
    apply : callable
        The system.
    right : Tensor
        The right-hand side.
    start : Tensor, optional
        First guess; 0 by default.
    precondition : callable
        Symmetric positive definite, near the inverse of ``apply``.
    tolerance : float
        Stop when the residual's norm is this fraction of ``right``'s.
    max_iterations : int
        Stop here at the latest.

    Returns
    -------
    x : Tensor
    convergence : Convergence
        ``change`` is the relative residual.
    """
    x = torch.zeros_like(right) if start is None else start.clone()
    residual = right - apply(x) if start is not None else right.clone()
    norm = dot(right, right) ** 0.5
    relative = dot(residual, residual) ** 0.5 / norm if norm > 0 else 0.0
    iterations = 0
    if relative > tolerance:
        z = precondition(residual)
        direction, rho = z.clone(), dot(residual, z)
    while relative > tolerance and iterations < max_iterations:
        image = apply(direction)
        curvature = dot(direction, image)
        if curvature <= 0:
            break
        step = rho / curvature
        x.add_(direction, alpha=step)
        residual.sub_(image, alpha=step)
        iterations += 1
        relative = dot(residual, residual) ** 0.5 / norm
        z = precondition(residual)
        rho, previous = dot(residual, z), rho
        direction.mul_(rho / previous).add_(z)
    return x, Convergence(relative <= tolerance, iterations, relative, tolerance)
