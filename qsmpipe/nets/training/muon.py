"""Muon: momentum, made orthogonal for each kernel; Adam for all that is no kernel."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

POLYNOMIAL = (3.4445, -4.7750, 2.0315)
"""Of each Newton-Schulz step: factors of X, (X X') X and (X X')^2 X."""


class Muon(torch.optim.Optimizer):
    """Descend along momentum whose singular values are all near 1.

    A kernel is a matrix here, of outputs and whatever they are made of. Directions that the
    gradient hardly sees are followed as fast as those that it is full of; inverting a dipole has
    many of the former. Torch's own Muon takes matrices alone, and computes in bfloat16.

    Parameters
    ----------
    parameters : iterable of Parameter
    lr : float
        Learning rate. Steps of kernels are about as large as those of Adam at the same rate [2]_.
    weight_decay : float
        Weight of half the squared parameters in the loss.
    momentum : float
        Share of the former gradients in the next one.
    betas : pair of float
        Of Adam.

    References
    ----------
    .. [1] Bernstein, Newhouse (2024), arXiv:2409.20325
    .. [2] Liu et al. (2025), arXiv:2502.16982
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        ours = list(parameters)
        super().__init__(ours, {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas,
        })  # fmt: skip

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad.add(parameter, alpha=group["weight_decay"])
                state = self.state[parameter]
                if _is_kernel(parameter):
                    along = _orthogonal(gradient, state, group["momentum"])
                else:
                    along = _scaled(gradient, state, *group["betas"])
                parameter.sub_(along, alpha=group["lr"])


def _orthogonal(gradient: Tensor, state: dict[str, Any], momentum: float) -> Tensor:
    mean = state.setdefault("momentum_buffer", torch.zeros_like(gradient))
    mean.lerp_(gradient, 1 - momentum)
    matrix = gradient.lerp(mean, momentum).flatten(1)
    step = 0.2 * max(matrix.shape) ** 0.5 * orthogonalised(matrix)
    return step.view(gradient.shape)


def _scaled(gradient: Tensor, state: dict[str, Any], first: float, second: float) -> Tensor:
    mean = state.setdefault("exp_avg", torch.zeros_like(gradient))
    square = state.setdefault("exp_avg_sq", torch.zeros_like(gradient))
    state["step"] = count = state.get("step", 0) + 1
    mean.lerp_(gradient, 1 - first)
    square.lerp_(gradient.square(), 1 - second)
    deviation = (square / (1 - second**count)).sqrt_()
    return (mean / (1 - first**count)).div_(deviation + 1e-8)


def _is_kernel(parameter: Tensor) -> bool:
    """Whether it is a matrix of more than a row or a column."""
    return parameter.ndim > 1 and min(len(parameter), parameter[0].numel()) > 1


def orthogonalised(matrix: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values (n, m) of a matrix near 1, by Newton-Schulz steps.

    They end between 0.7 and 1.2, if none was below a hundredth of the norm.
    """
    a, b, c = POLYNOMIAL
    upright = len(matrix) > matrix.shape[1]
    found = matrix.mT if upright else matrix
    found = found / (found.norm() + 1e-7)
    for _ in range(steps):
        square = found @ found.mT
        found = a * found + (b * square + c * square @ square) @ found
    return found.mT if upright else found
