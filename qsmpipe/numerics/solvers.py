"""Solvers for linear systems; they know no QSM."""

import math
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


PIECE = 1 << 14
"""Elements whose products are added up at a time."""


def dot(x: Tensor, y: Tensor) -> float:
    """Inner product as a Python float, in double precision: whatever the number of threads."""
    x, y = x.reshape(-1), y.reshape(-1)
    size = x.numel() if x.is_cuda else PIECE  # in pieces, no copy of the whole is made
    pieces = zip(x.split(size), y.split(size), strict=True)
    return torch.stack([torch.dot(a.double(), b.double()) for a, b in pieces]).sum().item()


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
    del right  # volumes are large: hold none longer than needed
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
        del image
        iterations += 1
        relative = dot(residual, residual) ** 0.5 / norm
        z = precondition(residual)
        rho, previous = dot(residual, z), rho
        direction.mul_(rho / previous).add_(z)
    return x, Convergence(relative <= tolerance, iterations, relative, tolerance)


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
