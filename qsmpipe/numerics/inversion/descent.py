"""Descent for fields that a dipole predicts, with gradients that an L1 norm keeps sparse."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qsmpipe.numerics.fourier import Shape, Zooms, irfft, rfft
from qsmpipe.numerics.fused.variation import (
    add_variation_diagonal,
    add_variation_slope,
    variation_curvature,
)
from qsmpipe.numerics.fused.vectors import dot
from qsmpipe.numerics.kernels import laplacian
from qsmpipe.numerics.solvers import Convergence

ROUND = 10
"""Steps from one look at the map's change to the next."""

SHARPER = 0.3
"""Factor from round to round by which the rounding of the L1 norm falls to its final value."""


@dataclass
class Problem:
    r"""What is to be minimised over maps x on a periodic grid.

    .. math:: g(\Pi D x) + \lambda \sum_{c, r} m_{cr} \sqrt{(\nabla_c x)_r^2 + \epsilon^2} +
       \tfrac12 \langle x, Q x \rangle
    """

    shape: Shape
    """Grid of x."""
    zooms: Zooms
    """Voxel size (mm)."""
    kernel: Tensor
    """Half spectrum of D on ``shape``; real."""
    weight: Tensor
    """Largest curvature of g, on the corner of ``shape`` where there are data."""
    slope: Callable[[Tensor, int], Tensor]
    """Derivative of g by the field predicted on that corner, a new tensor; given also the number
    of steps taken."""
    counted: Tensor
    """m, as :func:`.fused.variation.counted_bits` packs it, on ``shape``."""
    observed: Tensor
    """Where the change of x is watched: bool, on that corner."""
    lambda_: float
    """Weight of the L1 norm."""
    epsilon: float
    """Gradients below this are rounded off."""
    quadratic: Callable[[Tensor], Tensor] | None = None
    """Q: symmetric, not negative."""
    remove: Callable[[Tensor], Tensor] = lambda field: field
    r""":math:`\Pi`, which takes from a predicted field the part that is free: a projection that is
    symmetric under ``weight``. ``slope`` has to be orthogonal to that part."""
    outside: Tensor | None = None
    """On ``shape``: 0 where there is tissue, elsewhere the inverse of the curvature there. None:
    tissue everywhere."""

    def predict(self, image: Tensor) -> Tensor:
        """Field of ``image`` on the corner."""
        spectrum = rfft(image, self.shape).mul_(self.kernel)
        return self.remove(irfft(spectrum, self.shape, self.weight.shape, overwrite=True))

    def spread(self, residual: Tensor) -> Tensor:
        """Adjoint of D: from the corner to ``shape``."""
        spectrum = rfft(residual, self.shape).mul_(self.kernel)
        return irfft(spectrum, self.shape, self.shape, overwrite=True)


def minimise(
    problem: Problem,
    *,
    start: Tensor | None = None,
    rounding: float | None = None,
    after_round: Callable[[Tensor], None] = lambda field: None,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Convergence]:
    """Minimise ``problem`` by nonlinear conjugate gradients (Polak and Ribiere).

    A step goes to the lowest point, along its direction, of a parabola that touches what is to be
    minimised: the data term with its largest curvature, and for the L1 norm the parabola that
    touches it. Both lie above what they stand for, so that no step goes uphill and none has to be
    tried twice. It costs two pairs of Fourier transforms.

    Parameters
    ----------
    problem : Problem
        What to minimise.
    start : (X, Y, Z) tensor, optional
        First guess; 0 by default.
    rounding : float, optional
        Rounding of the L1 norm in the first round; from there it falls by :data:`SHARPER` a round
        to the problem's own. Fewer steps, and lower minima of terms that are not convex.
    after_round : callable
        What else to do with the predicted field once the rounding is down, such as to change the
        weights.
    tolerance : float
        Stop when a round of :data:`ROUND` steps changes the map by less than this fraction of its
        norm where it is observed; at the earliest in the second round with the final rounding.
    max_iterations : int
        Steps at most.

    Returns
    -------
    x : (X, Y, Z) tensor
    convergence : Convergence
        ``change`` is the relative change of the map in the last round.
    """
    descent = _Descent(problem, start)
    epsilon = max(rounding or 0.0, problem.epsilon)
    change, iterations, done, sharp = float("inf"), 0, False, False
    while iterations < max_iterations and not done:
        before, settled = descent.seen(), sharp
        sharp = epsilon <= problem.epsilon
        planned = min(ROUND, max_iterations - iterations)
        taken = descent.take(planned, epsilon, iterations)
        iterations += taken
        after = descent.seen()
        moved = after - before
        gap, norm = dot(moved, moved) ** 0.5, dot(after, after) ** 0.5
        change = 0.0 if gap == 0 else gap / norm if norm > 0 else float("inf")
        # With fewer steps than planned it stands where nothing is steep.
        done = taken < planned or (settled and planned == ROUND and change <= tolerance)
        epsilon = max(SHARPER * epsilon, problem.epsilon)
        if sharp and not done:
            after_round(descent.field)
    return descent.image, Convergence(done, iterations, change, tolerance)


class _Descent:
    """Where the descent stands, and where it came from."""

    def __init__(self, problem: Problem, start: Tensor | None) -> None:
        self.problem = problem
        if start is None:
            self.image = problem.weight.new_zeros(problem.shape)
            self.field = torch.zeros_like(problem.weight)
        else:
            self.image, self.field = start.clone(), problem.predict(start)
        self.direction = torch.zeros_like(self.image)
        self.gradient, self.steep = torch.zeros_like(self.image), 0.0
        """The last gradient, and its square under the preconditioner."""

    def seen(self) -> Tensor:
        """Give the map where its change is watched."""
        x, y, z = self.problem.weight.shape
        return self.image[:x, :y, :z][self.problem.observed]

    def take(self, steps: int, epsilon: float, before: int) -> int:
        """Take steps after those ``before``; fewer than told where nothing is steep any more."""
        problem, image, zooms = self.problem, self.image, self.problem.zooms
        norm = {"weight": problem.lambda_, "epsilon": epsilon}
        precondition = _preconditioner(problem, image, epsilon)
        for taken in range(steps):
            gradient = problem.spread(problem.slope(self.field, before + taken))
            add_variation_slope(image, problem.counted, zooms, **norm, out=gradient)
            if problem.quadratic is not None:
                gradient += problem.quadratic(image)
            downhill = precondition(gradient)
            steep, kept = dot(downhill, gradient), dot(downhill, self.gradient)
            along = max(steep - kept, 0.0) / self.steep if self.steep > 0 else 0.0
            self.direction.mul_(along).sub_(downhill)
            self.gradient, self.steep = gradient, steep
            del downhill  # volumes are large: hold none longer than needed
            predicted = problem.predict(self.direction)
            curvature = dot(problem.weight * predicted, predicted)
            curvature += variation_curvature(image, self.direction, problem.counted, zooms, **norm)
            if problem.quadratic is not None:
                curvature += dot(self.direction, problem.quadratic(self.direction))
            if curvature <= 0:
                return taken
            length = -dot(gradient, self.direction) / curvature
            image.add_(self.direction, alpha=length)
            self.field.add_(predicted, alpha=length)
        return steps


def _preconditioner(problem: Problem, image: Tensor, epsilon: float) -> Callable[[Tensor], Tensor]:
    """Give what is near the inverse of the curvature at ``image``.

    That is the inverse with the mean diffusivity and full data everywhere, in k-space; it knows
    that what is smooth across the mask's edge costs little. Outside a diagonal adds to it.
    """
    shape, zooms, weight, outside = problem.shape, problem.zooms, problem.weight, problem.outside
    x, y, z = weight.shape
    diagonal = torch.zeros_like(image)
    add_variation_diagonal(
        image, problem.counted, zooms, weight=problem.lambda_, epsilon=epsilon, out=diagonal
    )
    level = diagonal[:x, :y, :z][problem.observed].mean(dtype=torch.float64).item()
    level /= sum(2 / zoom**2 for zoom in zooms)
    data = weight[problem.observed].mean(dtype=torch.float64).item()
    inverse = laplacian(shape, zooms, like=image).mul_(level)
    inverse.addcmul_(problem.kernel, problem.kernel, value=data)
    # Of the zero frequency nothing is known; where all is edge, of the cone neither.
    floor = 1e-6 * inverse.max().item()
    inverse.clamp_(min=floor if floor > 0 else 1.0).reciprocal_()
    inverse[0, 0, 0] = 0.0

    def precondition(residual: Tensor) -> Tensor:
        result = irfft(rfft(residual, shape).mul_(inverse), shape, shape, overwrite=True)
        return result if outside is None else result.addcmul_(outside, residual)

    return precondition
