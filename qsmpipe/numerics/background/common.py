"""What every method of the stage shares: its result, and how it takes several volumes."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qsmpipe.numerics.solvers import Convergence


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
