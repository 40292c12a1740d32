"""Gauss-Newton for fields that a dipole predicts, with gradients that an L1 norm keeps sparse."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qsmpipe.numerics.fourier import SPACE, Shape, Zooms, irfft, rfft
from qsmpipe.numerics.fused.diffusion import diffusion
from qsmpipe.numerics.kernels import laplacian
from qsmpipe.numerics.solvers import Convergence, conjugate_gradient, dot

INNER_TOLERANCE = 0.1
"""Relative residual at which the conjugate gradients of a step stop. 0.01 took three times as
long to the same map."""

SHARPER = 0.3
"""Factor from step to step by which the rounding of the L1 norm falls to its final value."""


@dataclass
class Problem:
    r"""What is to be minimised over maps x on a periodic grid.

    .. math:: g(D x) + \lambda \sum_{c, r} m_{cr} \sqrt{(\nabla_c x)_r^2 + \epsilon^2} +
       \tfrac12 \langle x, Q x \rangle

    A step replaces the data term by its largest curvature and the L1 norm by the parabola that
    touches it. Both lie above what they stand for, so that no step goes uphill, however early the
    conjugate gradients of a step stop.
    """

    shape: Shape
    """Grid of x."""
    zooms: Zooms
    """Voxel size (mm)."""
    kernel: Tensor
    """Half spectrum of D on ``shape``; real."""
    weight: Tensor
    """Largest curvature of g, on the corner of ``shape`` where there are data."""
    slope: Callable[[Tensor, bool], Tensor]
    """Derivative of g by the field predicted on that corner, which it may write to; and whether
    this is the first step."""
    smooth: Tensor
    """m, (3, X, Y, Z) on ``shape``; bool or real."""
    observed: Tensor
    """Where the change of x is watched: bool, on that corner."""
    lambda_: float
    """Weight of the L1 norm."""
    epsilon: float
    """Gradients below this are rounded off."""
    quadratic: Callable[[Tensor], Tensor] | None = None
    """Q: symmetric, not negative."""
    remove: Callable[[Tensor], Tensor] = lambda field: field
    """Takes from a predicted field the part that is free: a projection that is symmetric under
    ``weight``. ``slope`` has to do so, too."""
    outside: Tensor | None = None
    """On ``shape``: 0 where the preconditioner is the one for tissue, elsewhere the inverse of
    the curvature there. None: tissue everywhere."""

    def predict(self, image: Tensor) -> Tensor:
        """Field of ``image`` on the corner."""
        spectrum = rfft(image, self.shape).mul_(self.kernel)
        return irfft(spectrum, self.shape, self.weight.shape, overwrite=True)

    def spread(self, residual: Tensor) -> Tensor:
        """Adjoint of :meth:`predict`."""
        spectrum = rfft(residual, self.shape).mul_(self.kernel)
        return irfft(spectrum, self.shape, self.shape, overwrite=True)

    def diffusivity(self, image: Tensor, epsilon: float) -> Tensor:
        r""":math:`\lambda m / \sqrt{(\nabla x)^2 + \epsilon^2}`."""
        result = image.new_empty((3, *self.shape))
        for component, axis, zoom, where in zip(
            result, SPACE, self.zooms, self.smooth, strict=True
        ):
            torch.sub(image.roll(-1, axis), image, out=component)
            component.div_(zoom).square_().add_(epsilon**2).rsqrt_().mul_(self.lambda_)
            component.mul_(where)
        return result


def gauss_newton(
    problem: Problem,
    *,
    start: Tensor | None = None,
    rounding: float | None = None,
    after_step: Callable[[Tensor], None] = lambda image: None,
    tolerance: float,
    max_iterations: int,
    inner_iterations: int,
) -> tuple[Tensor, Convergence]:
    """Minimise ``problem``.

    Parameters
    ----------
    problem : Problem
        What to minimise.
    start : (X, Y, Z) tensor, optional
        First guess; 0 by default.
    rounding : float, optional
        Rounding of the L1 norm in the first step; from there it falls by :data:`SHARPER` a step
        to the problem's own. Fewer steps, and lower minima of terms that are not convex.
    after_step : callable
        What else to do with the map once the rounding is down, such as to change the weights.
    tolerance : float
        Stop when the map changes by less than this fraction of its norm where it is observed.
    max_iterations : int
        Steps at most.
    inner_iterations : int
        Conjugate gradients of a step at most.

    Returns
    -------
    x : (X, Y, Z) tensor
    convergence : Convergence
        ``change`` is the relative change of the map.
    """
    shape, crop = problem.shape, problem.weight.shape
    image = problem.weight.new_zeros(shape) if start is None else start.clone()
    corner = tuple(slice(n) for n in crop)
    epsilon = max(rounding or 0.0, problem.epsilon)
    curvature = laplacian(shape, problem.zooms, like=problem.weight)
    squared = problem.kernel**2
    change, iterations, done = float("inf"), 0, False
    while iterations < max_iterations and not done:
        sharp = epsilon <= problem.epsilon
        diffusivity = problem.diffusivity(image, epsilon)
        right = problem.spread(problem.slope(problem.predict(image), iterations == 0))
        diffusion(image, diffusivity, problem.zooms, out=right)
        if problem.quadratic is not None:
            right += problem.quadratic(image)
        right.neg_()
        precondition = _preconditioner(problem, diffusivity, curvature, squared)

        def apply(x: Tensor, diffusivity: Tensor = diffusivity) -> Tensor:
            result = problem.spread(problem.remove(problem.predict(x)).mul_(problem.weight))
            diffusion(x, diffusivity, problem.zooms, out=result)
            if problem.quadratic is not None:
                result += problem.quadratic(x)
            return result

        step, _ = conjugate_gradient(
            apply,
            right,
            precondition=precondition,
            tolerance=INNER_TOLERANCE,
            max_iterations=inner_iterations,
        )
        del right, diffusivity, apply, precondition
        image += step
        iterations += 1
        moved, size = step[corner][problem.observed], image[corner][problem.observed]
        gap, norm = dot(moved, moved) ** 0.5, dot(size, size) ** 0.5
        change = 0.0 if gap == 0 else gap / norm if norm > 0 else float("inf")
        done = sharp and change <= tolerance
        epsilon = max(SHARPER * epsilon, problem.epsilon)
        if sharp and not done:
            after_step(image)
    return image, Convergence(done, iterations, change, tolerance)


def _preconditioner(
    problem: Problem, diffusivity: Tensor, curvature: Tensor, squared: Tensor
) -> Callable[[Tensor], Tensor]:
    """Inverse of the system as it were with the mean diffusivity and full data, in k-space.

    With ``problem.outside`` that stands for the tissue alone, beside a diagonal for the rest.
    """
    shape, outside = problem.shape, problem.outside
    x, y, z = problem.weight.shape
    inside = problem.observed.expand(3, x, y, z)
    level = diffusivity[:, :x, :y, :z][inside].mean(dtype=torch.float64).item()
    data = problem.weight[problem.observed].mean(dtype=torch.float64).item()
    inverse = (level * curvature).add_(squared, alpha=data)
    # Of the zero frequency nothing is known; where all is edge, of the cone neither.
    floor = 1e-6 * inverse.max().item()
    inverse.clamp_(min=floor if floor > 0 else 1.0).reciprocal_()
    inverse[0, 0, 0] = 0.0

    def precondition(residual: Tensor) -> Tensor:
        if outside is None:
            return irfft(rfft(residual, shape).mul_(inverse), shape, shape, overwrite=True)
        inside = outside == 0
        spectrum = rfft(residual * inside, shape).mul_(inverse)
        tissue = irfft(spectrum, shape, shape, overwrite=True)
        return tissue.mul_(inside).addcmul_(outside, residual)

    return precondition
