"""Losses of the papers, on the voxels of a mask."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From output, target and mask, all (B, 1, X, Y, Z), to one number."""


def _mean(image: Tensor, mask: Tensor) -> Tensor:
    """Mean in the mask, over all samples; 0 where there is none."""
    return (image * mask).sum() / mask.sum().clamp(min=1)


def absolute(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error: QSMGAN's generator, Meta-QSM."""
    return _mean((output - target).abs(), mask)


def squared(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Half the mean squared error: C-Psi-Net."""
    return _mean((output - target).square(), mask) / 2


def scale_invariant(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Squared error over the variance of the target, sample by sample [1]_.

    What is learnt from a sample does not depend on its amplitude. Samples whose target does not
    vary have nothing to tell, and count as 0.

    References
    ----------
    .. [1] Jochmann, Haueisen, Schweser. How to train a deep convolutional neural network for
       quantitative susceptibility mapping (QSM). ISMRM, abstract
    """
    inside = mask.to(output.dtype)
    count = inside.flatten(1).sum(1).clamp(min=1)
    mean = (target * inside).flatten(1).sum(1) / count
    spread = ((target - mean.view(-1, 1, 1, 1, 1)) * inside).square().flatten(1).sum(1)
    misfit = ((output - target) * inside).square().flatten(1).sum(1)
    known = spread > 0
    return torch.where(known, misfit / torch.where(known, spread, 1.0), 0.0).mean()


def si_qsm(
    output: Tensor, target: Tensor, mask: Tensor, *, beta: float = 1e-4, gamma: float = 1.0
) -> Tensor:
    """Squared error, ``beta`` times the absolute one, ``gamma`` times total variation [1]_.

    References
    ----------
    .. [1] Larrain. Scale-invariant deep learning approach for QSM reconstruction: SI-QSM. Thesis,
       Pontificia Universidad Catolica de Chile (2022)
    """
    error = output - target
    variation = output.new_zeros(())
    for axis in (-3, -2, -1):
        n = output.shape[axis] - 1
        both = mask.narrow(axis, 0, n) & mask.narrow(axis, 1, n)
        variation = variation + (output.diff(dim=axis).abs() * both).sum()
    variation = variation / mask.sum().clamp(min=1)
    return _mean(error.square(), mask) + beta * _mean(error.abs(), mask) + gamma * variation


LOSSES: dict[str, Loss] = {
    "absolute": absolute,
    "squared": squared,
    "scale-invariant": scale_invariant,
    "si-qsm": si_qsm,
}


def gradient_penalty(critic: nn.Module, true: Tensor, made: Tensor, share: Tensor) -> Tensor:
    r"""Make the critic's slope 1 on the way from made to true maps [1]_.

    .. math:: \langle (\| \nabla_x C(x) \| - 1)^2 \rangle, \qquad x = s t + (1 - s) m

    Parameters
    ----------
    critic : Module
        From (B, 1, X, Y, Z) to (B,).
    true, made : (B, 1, X, Y, Z) tensors
        t and m.
    share : (B,) tensor
        s, from 0 to 1.

    References
    ----------
    .. [1] Gulrajani et al. NeurIPS (2017) 5767, arXiv:1704.00028
    """
    between = torch.lerp(made.detach(), true, share.view(-1, 1, 1, 1, 1)).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()
