"""Leave out voxels whose signal no field explains."""

import torch
from torch import Tensor

from qsmpipe.numerics.grids import check_grid
from qsmpipe.numerics.masks.morphology import largest_component
from qsmpipe.numerics.parameters import Positive, checked

DEFAULT_THRESHOLD = 0.3
"""Relative residual of the field fit beyond which a voxel is left out, as in the consensus."""


@checked
def exclude_residual(
    residual: Tensor, mask: Tensor, *, threshold: Positive = DEFAULT_THRESHOLD
) -> Tensor:
    """Drop the voxels in which the field fit leaves much of the signal over [1]_.

    A residual beyond a few tenths comes from phase that is not linear in echo time: flow, fat,
    several compartments, a wrong multiple of 2 pi. Noise alone gives one over the signal-to-noise
    ratio. Holes stay holes; pieces that are cut off the largest one go as well.

    Parameters
    ----------
    residual : (X, Y, Z) real tensor
        Signal that the fit leaves over the signal itself, 0 to 2
        (:class:`qsmpipe.numerics.field.TotalField`).
    mask : (X, Y, Z) bool tensor
        Where ``residual`` is known.
    threshold : float
        Largest residual that is kept.

    Returns
    -------
    (X, Y, Z) bool tensor

    Raises
    ------
    ValueError
        If the grids differ or nothing is left.

    References
    ----------
    .. [1] QSM Consensus Organization Committee, Magn Reson Med 91 (2024) 1834,
       doi:10.1002/mrm.30006: the code of its example weights the data by
       ``(threshold - residual) / threshold``, 0 beyond; here such voxels leave the mask.
    """
    check_grid(residual, mask, ("residual", "mask"))
    if mask.dtype is not torch.bool:
        msg = f"mask is {mask.dtype}, not torch.bool: threshold it first"
        raise ValueError(msg)
    kept = largest_component(mask & (residual <= threshold))
    if not kept.any():
        msg = (
            f"no voxel of the mask's {int(mask.sum())} has a relative residual of {threshold:g} "
            "or less: raise mask_residual, or look at the echoes, the offset and the unwrapping"
        )
        raise ValueError(msg)
    return kept
