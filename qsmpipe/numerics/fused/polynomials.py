"""Fitting polynomials to images: one axis at a time, in two passes over the grid."""

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qsmpipe.numerics.fused import loops
from qsmpipe.numerics.fused.loops import parallel, serial


def moments_along(image: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    r"""Give :math:`\sum_y w f p_n(y)` for every plane x and every z.

    Parameters
    ----------
    image, weight : (X, Y, Z) real tensors
        f and w.
    table : (Y, N) float64 tensor
        :math:`p_n`.

    Returns
    -------
    (X, N, Z) float64 tensor
    """
    if not loops.usable(image):
        product = (image * weight).double()
        return torch.einsum("xyz,yn->xnz", product, table.to(image.device))
    out = np.zeros((image.shape[0], table.shape[1], image.shape[2]))
    _moments_loops(image.numpy(), weight.numpy(), table.numpy(), out)
    return torch.from_numpy(out)


def subtract_along(image: Tensor, profiles: Tensor, table: Tensor) -> Tensor:
    r"""Give :math:`f - \sum_n a_n p_n(y)`.

    Parameters
    ----------
    image : (X, Y, Z) real tensor
        f.
    profiles : (X, N, Z) real tensor
        :math:`a_n` for every plane x and every z.
    table : (Y, N) real tensor
        :math:`p_n`.

    Returns
    -------
    (X, Y, Z) tensor
    """
    profiles, table = profiles.to(image), table.to(image)
    if not loops.usable(image):
        return image - torch.einsum("xnz,yn->xyz", profiles, table)
    out = torch.empty_like(image)
    _subtract_loops(image.numpy(), profiles.numpy(), table.numpy(), out.numpy())
    return out


@parallel
def _moments_loops(image: NDArray, weight: NDArray, table: NDArray, out: NDArray) -> None:
    for i in numba.prange(len(image)):
        _moments_plane(image[i], weight[i], table, out[i])


@serial
def _moments_plane(image: NDArray, weight: NDArray, table: NDArray, out: NDArray) -> None:
    product = np.empty(image.shape[1])
    for j in range(len(image)):
        values, weights = image[j], weight[j]
        for k in range(len(product)):
            product[k] = np.float64(values[k]) * np.float64(weights[k])
        for n in range(len(out)):
            factor, total = table[j, n], out[n]
            for k in range(len(product)):
                total[k] += factor * product[k]


@parallel
def _subtract_loops(image: NDArray, profiles: NDArray, table: NDArray, out: NDArray) -> None:
    for i in numba.prange(len(image)):
        _subtract_plane(image[i], profiles[i], table, out[i])


@serial
def _subtract_plane(image: NDArray, profiles: NDArray, table: NDArray, out: NDArray) -> None:
    rest = np.empty(image.shape[1], image.dtype)
    for j in range(len(image)):
        rest[:] = image[j]
        for n in range(len(profiles)):
            factor, profile = table[j, n], profiles[n]
            for k in range(len(rest)):
                rest[k] -= factor * profile[k]
        out[j] = rest
