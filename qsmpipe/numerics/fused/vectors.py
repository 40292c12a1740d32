"""Inner products and steps of Krylov solvers, each in one pass over the vectors.

Sums are in double precision, in pieces of :data:`PIECE` elements whatever the number of threads,
added up in their order: results depend on neither the number of threads nor their timing.
"""

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qsmpipe.numerics.fused import loops
from qsmpipe.numerics.fused.loops import parallel

PIECE = 1 << 16
"""Elements of which one thread makes a sum."""
LANES = 256
"""Elements of a piece that are added up side by side, so that vector instructions can."""


def dot(x: Tensor, y: Tensor) -> float:
    """Inner product as a Python float.

    Parameters
    ----------
    x, y : real tensors
        Of one shape, in any layout.

    Returns
    -------
    float
    """
    x, y = x.reshape(-1), y.reshape(-1)
    if not loops.usable(x):
        return torch.dot(x.double(), y.double()).item()
    sums = np.empty(-(-x.numel() // PIECE))
    _dot_loops(x.numpy(), y.numpy(), sums)
    return float(sums.sum())


def descend(residual: Tensor, image: Tensor, step: float) -> float:
    """Subtract ``step`` images from the residual; give its squared norm from there on.

    Parameters
    ----------
    residual : real tensor
        Contiguous. Written to.
    image : real tensor
        Of its shape, in any layout.
    step : float
        How many of them.

    Returns
    -------
    float
    """
    if not loops.usable(residual):
        residual.sub_(image, alpha=step)
        return dot(residual, residual)
    flat = residual.view(-1).numpy()
    sums = np.empty(-(-flat.size // PIECE))
    _descend_loops(flat, image.reshape(-1).numpy(), flat.dtype.type(step), sums)
    return float(sums.sum())


@parallel
def _dot_loops(x: NDArray, y: NDArray, sums: NDArray) -> None:
    for piece in numba.prange(len(sums)):
        first, last = piece * PIECE, min((piece + 1) * PIECE, len(x))
        lanes = np.zeros(LANES)
        whole = first + (last - first) // LANES * LANES
        for start in range(first, whole, LANES):
            for lane in range(LANES):
                lanes[lane] += np.float64(x[start + lane]) * np.float64(y[start + lane])
        for place in range(whole, last):
            lanes[place - whole] += np.float64(x[place]) * np.float64(y[place])
        sums[piece] = lanes.sum()


@parallel
def _descend_loops(residual: NDArray, image: NDArray, step: np.floating, sums: NDArray) -> None:
    for piece in numba.prange(len(sums)):
        first, last = piece * PIECE, min((piece + 1) * PIECE, len(residual))
        lanes = np.zeros(LANES)
        whole = first + (last - first) // LANES * LANES
        for start in range(first, whole, LANES):
            for lane in range(LANES):
                new = residual[start + lane] - step * image[start + lane]
                residual[start + lane] = new
                lanes[lane] += np.float64(new) * np.float64(new)
        for place in range(whole, last):
            new = residual[place] - step * image[place]
            residual[place] = new
            lanes[place - whole] += np.float64(new) * np.float64(new)
        sums[piece] = lanes.sum()
