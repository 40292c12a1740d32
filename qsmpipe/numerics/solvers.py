"""Solvers for linear systems; they know no QSM."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qsmpipe.numerics.fused.vectors import descend, dot


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


def conjugate_gradient(
    apply: Callable[[Tensor], Tensor],
    right: Tensor,
    *,
    start: Tensor | None = None,
    precondition: Callable[[Tensor], Tensor] | None = None,
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
    precondition : callable, optional
        Symmetric positive definite, near the inverse of ``apply``; a new tensor.
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
    residual = right.clone(memory_format=torch.contiguous_format)
    if start is not None:
        residual.sub_(apply(x))
    norm, squared = dot(right, right) ** 0.5, dot(residual, residual)
    del right  # volumes are large: hold none longer than needed
    relative = squared**0.5 / norm if norm > 0 else 0.0
    iterations, rho, direction = 0, 1.0, torch.zeros_like(residual)
    while relative > tolerance and iterations < max_iterations:
        z = residual if precondition is None else precondition(residual)
        rho, previous = squared if precondition is None else dot(residual, z), rho
        torch.add(z, direction, alpha=rho / previous, out=direction)
        del z
        image = apply(direction)
        curvature = dot(direction, image)
        if curvature <= 0:
            break
        x.add_(direction, alpha=rho / curvature)
        squared = descend(residual, image, rho / curvature)
        del image
        iterations += 1
        relative = squared**0.5 / norm
    return x, Convergence(relative <= tolerance, iterations, relative, tolerance)


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
    residual = right.clone(memory_format=torch.contiguous_format)
    direction = residual.clone()
    del right  # volumes are large: hold none longer than needed
    along = apply(direction)
    gradient, squared, largest, iterations = dot(residual, along), norm**2, 0.0, 0
    while True:
        size = squared**0.5
        steep = max(gradient, 0.0) ** 0.5
        largest = max(largest, steep / size) if size > 0 else largest
        change = steep / (largest * max(size, tolerance * norm)) if steep > 0 else 0.0
        if change <= tolerance or iterations >= max_iterations:
            return x, Convergence(change <= tolerance, iterations, change, tolerance)
        step = gradient / dot(along, along)
        x.add_(direction, alpha=step)
        squared = descend(residual, along, step)
        iterations += 1
        image = apply(residual)
        gradient, previous = dot(residual, image), gradient
        torch.add(residual, direction, alpha=gradient / previous, out=direction)
        torch.add(image, along, alpha=gradient / previous, out=along)
        del image


def lsmr(
    apply: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    right: Tensor,
    *,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Convergence]:
    """Least squares: minimise ``|apply(x) - right|`` from 0, by LSMR [1]_.

    Parameters
    ----------
    apply, adjoint : callable
        The system and its adjoint.
    right : real Tensor
        The right-hand side.
    tolerance : float
        Stop when ``|adjoint(apply(x) - right)|`` is this fraction of ``|adjoint(right)|``; it
        falls with every step.
    max_iterations : int
        Stop here at the latest.

    Returns
    -------
    x : Tensor
    convergence : Convergence
        ``change`` is the relative residual of the normal equations.

    References
    ----------
    .. [1] Fong, Saunders. SIAM J Sci Comput 33 (2011) 2950, doi:10.1137/10079687X
    """
    beta = dot(right, right) ** 0.5
    u = right / beta if beta > 0 else right.clone()
    v = adjoint(u)
    alpha = dot(v, v) ** 0.5
    x = torch.zeros_like(v)
    if alpha * beta == 0:
        return x, Convergence(True, 0, 0.0, tolerance)
    v = v / alpha
    normal = alpha * beta
    alpha_bar, zeta_bar, rho, rho_bar, c_bar, s_bar = alpha, normal, 1.0, 1.0, 1.0, 0.0
    h, h_bar = v.clone(), torch.zeros_like(v)
    change, iterations = 1.0, 0
    while change > tolerance and iterations < max_iterations:
        # one step of the bidiagonalisation of the system
        u = apply(v).sub_(u, alpha=alpha)
        beta = dot(u, u) ** 0.5
        if beta > 0:
            u.div_(beta)
            v = adjoint(u).sub_(v, alpha=beta)
            alpha = dot(v, v) ** 0.5
            if alpha > 0:
                v.div_(alpha)
        # two rotations, then x along the new direction
        rho_old, rho_bar_old = rho, rho_bar
        rho = math.hypot(alpha_bar, beta)
        c, s = alpha_bar / rho, beta / rho
        theta, alpha_bar = s * alpha, c * alpha
        theta_bar, rho_bar = s_bar * rho, math.hypot(c_bar * rho, theta)
        c_bar, s_bar = c_bar * rho / rho_bar, theta / rho_bar
        zeta, zeta_bar = c_bar * zeta_bar, -s_bar * zeta_bar
        h_bar.mul_(-theta_bar * rho / (rho_old * rho_bar_old)).add_(h)
        x.add_(h_bar, alpha=zeta / (rho * rho_bar))
        h.mul_(-theta / rho).add_(v)
        iterations += 1
        change = abs(zeta_bar) / normal
    return x, Convergence(change <= tolerance, iterations, change, tolerance)
