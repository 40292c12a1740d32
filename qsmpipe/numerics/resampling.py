"""Images on another grid."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.ndimage import affine_transform, distance_transform_edt
from torch import Tensor


def extended(image: Tensor, mask: Tensor, zooms: Sequence[float]) -> Tensor:
    """Image (X, Y, Z) that goes on outside ``mask`` with the value of the nearest voxel inside."""
    outside = ~mask.cpu().numpy()
    _, nearest = distance_transform_edt(outside, sampling=zooms, return_indices=True)
    return torch.from_numpy(image.cpu().numpy()[tuple(nearest)]).to(image)


def resample(
    image: Tensor,
    affine: np.ndarray,
    motion: np.ndarray,
    *,
    to: np.ndarray,
    shape: Sequence[int],
    mask: Tensor | None = None,
    order: int = 3,
) -> Tensor:
    """Give an image the grid of another one that was registered to it.

    Parameters
    ----------
    image : (X, Y, Z) real tensor
        What to resample; a field is a number in every voxel and does not turn.
    affine : (4, 4) array
        Its voxel to world coordinates (mm).
    motion : (4, 4) array
        World of the other image to the world of this one: the identity for the same head, or what
        :func:`qsmpipe.registration.register` finds.
    to, shape : (4, 4) array, sequence of 3 ints
        Affine and shape of the other grid.
    mask : (X, Y, Z) bool tensor, optional
        Where ``image`` is known. Outside, it goes on with the value of the nearest voxel inside:
        an edge would ring into the head.
    order : int
        Of the spline: 3 is cubic; 1, linear, takes the fine detail out of a field, by up to all
        of it half way between voxels.

    Returns
    -------
    tensor of ``shape``
        Beyond the image it goes on with the value at its edge.
    """
    if mask is not None:
        image = extended(image, mask, np.linalg.norm(affine[:3, :3], axis=0).tolist())
    to_voxel = np.linalg.inv(affine) @ motion @ to
    moved = affine_transform(
        image.cpu().numpy(), to_voxel, output_shape=tuple(shape), order=order, mode="nearest"
    )
    return torch.from_numpy(moved).to(image)


def resample_mask(
    mask: Tensor, affine: np.ndarray, motion: np.ndarray, *, to: np.ndarray, shape: Sequence[int]
) -> Tensor:
    """Give a mask another grid: what is more in than out, with what :func:`resample` takes."""
    to_voxel = np.linalg.inv(affine) @ motion @ to
    inside = mask.cpu().numpy().astype(np.float32)
    share = affine_transform(inside, to_voxel, output_shape=tuple(shape), order=1, mode="constant")
    return torch.from_numpy(share > 0.5).to(mask.device)
