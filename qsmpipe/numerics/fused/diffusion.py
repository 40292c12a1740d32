"""Diffusion with a diffusivity of its own for every difference, in one pass over the grid."""

import numba
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qsmpipe.numerics.fourier import SPACE, Zooms
from qsmpipe.numerics.fused import loops
from qsmpipe.numerics.fused.loops import parallel


def diffusion(image: Tensor, diffusivity: Tensor, zooms: Zooms, *, out: Tensor) -> None:
    r"""Add :math:`\nabla^T (v \nabla x)` to ``out``.

    Parameters
    ----------
    image : (X, Y, Z) real tensor
        x; the grid is periodic.
    diffusivity : (3, X, Y, Z) real tensor
        v, one for each forward difference.
    zooms : tuple of float
        Voxel size (mm).
    out : (X, Y, Z) real tensor
        Written to; none of the above.
    """
    if loops.usable(image):
        kind = image.numpy().dtype.type
        _diffusion_loops(
            image.numpy(),
            diffusivity.numpy(),
            np.array([1 / zoom**2 for zoom in zooms], kind),
            out.numpy(),
        )
    else:
        _diffusion_torch(image, diffusivity, zooms, out)


def _diffusion_torch(image: Tensor, diffusivity: Tensor, zooms: Zooms, out: Tensor) -> None:
    for component, axis, zoom in zip(diffusivity, SPACE, zooms, strict=True):
        flow = (image.roll(-1, axis) - image).mul_(component).div_(zoom**2)
        out.add_(flow.roll(1, axis)).sub_(flow)


@parallel
def _diffusion_loops(image: NDArray, diffusivity: NDArray, per: NDArray, out: NDArray) -> None:
    nx, ny, nz = image.shape
    for i in numba.prange(nx):
        left, right = (i - 1) % nx, (i + 1) % nx
        for j in range(ny):
            down, up = (j - 1) % ny, (j + 1) % ny
            here, result = image[i, j], out[i, j]
            for k in range(nz):
                result[k] += per[0] * (
                    diffusivity[0, left, j, k] * (here[k] - image[left, j, k])
                    + diffusivity[0, i, j, k] * (here[k] - image[right, j, k])
                ) + per[1] * (
                    diffusivity[1, i, down, k] * (here[k] - image[i, down, k])
                    + diffusivity[1, i, j, k] * (here[k] - image[i, up, k])
                )
            flow = diffusivity[2, i, j]
            for k in range(nz - 1):
                moved = per[2] * flow[k] * (here[k] - here[k + 1])
                result[k] += moved
                result[k + 1] -= moved
            moved = per[2] * flow[nz - 1] * (here[nz - 1] - here[0])
            result[nz - 1] += moved
            result[0] -= moved
