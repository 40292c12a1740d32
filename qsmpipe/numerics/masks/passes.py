"""Two passes: reliable voxels do not hear of the others, which are mapped all the same."""

from typing import Literal

import torch
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.grids import check_grid
from qsmpipe.numerics.masks.morphology import largest_component, smooth
from qsmpipe.numerics.masks.quality import otsu
from qsmpipe.numerics.parameters import NotNegative, checked

DEFAULT_SMOOTHING = 1.0
"""Gaussian width of the vote (mm)."""

SPECK = 0.25
"""A bad voxel among fewer bad neighbours than this share is noise and no hole; a good one among
more bad than good neighbours is chance."""


@checked
def reliable(
    quality: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    threshold: float | Literal["otsu"] = "otsu",
    smoothing: NotNegative = DEFAULT_SMOOTHING,
) -> Tensor:
    """Leave holes in a mask where the phase is not reliable: the first of two passes [1]_.

    Parameters
    ----------
    quality : (X, Y, Z) real tensor
        Quality of the phase, 0 to 1 (:func:`qsmpipe.numerics.unwrap.romeo.quality_map`).
    mask : (X, Y, Z) bool tensor
        Mask without holes, that of the second pass.
    zooms : tuple of float
        Voxel size (mm).
    threshold : float or "otsu"
        Least quality, or "otsu" for the one that splits the histogram of the whole image best.
    smoothing : float
        Gaussian width of the vote among the mask's voxels (mm); 0 for none. Single voxels of low
        quality are noise and no hole, single ones of high quality in a hole are chance.

    Returns
    -------
    (X, Y, Z) bool tensor
        Part of ``mask``, in one piece.

    Raises
    ------
    ValueError
        If the grids differ or nothing is left.

    References
    ----------
    .. [1] Stewart et al. Magn Reson Med 87 (2022) 1289, doi:10.1002/mrm.29048: a threshold of the
       phase-derived quality by Otsu's method, raised by a factor that this quality does not need.
    """
    check_grid(quality, mask, ("quality", "mask"))
    if mask.dtype is not torch.bool:
        msg = f"mask is {mask.dtype}, not torch.bool: threshold it first"
        raise ValueError(msg)
    values = torch.nan_to_num(quality, nan=0.0)
    level = otsu(values) if threshold == "otsu" else float(threshold)
    bad = mask & (values < level)
    if smoothing > 0:
        share = smooth(bad.float(), zooms, sigma=smoothing)
        share = share / smooth(mask.float(), zooms, sigma=smoothing).clamp(min=1e-6)
        bad = (bad & (share > SPECK)) | (share > 0.5)
    kept = largest_component(mask & ~bad)
    if not kept.any():
        msg = (
            f"no voxel of the mask's {int(mask.sum())} has a quality of {level:.3g} or more: "
            "lower the threshold of the first pass, or leave two-pass out"
        )
        raise ValueError(msg)
    return kept


def merge(chi_reliable: Tensor, chi_filled: Tensor, reliable: Tensor) -> Tensor:
    r"""Join the maps of two passes: the first where it is known, the second elsewhere [1]_.

    .. math:: \chi = M_1 \chi_1 + (1 - M_1) \chi_2

    Both are known up to a constant, which is not adjusted: on simulated heads the two differed by
    less than 0.0005 ppm where both are known.

    Parameters
    ----------
    chi_reliable : (X, Y, Z) real tensor
        Susceptibility (ppm) of the pass whose mask has holes.
    chi_filled : (X, Y, Z) real tensor
        That of the pass without holes; 0 outside its mask.
    reliable : (X, Y, Z) bool tensor
        Where ``chi_reliable`` is known.

    Returns
    -------
    (X, Y, Z) tensor
        Susceptibility (ppm).

    Raises
    ------
    ValueError
        If the grids differ or ``reliable`` is not bool.

    References
    ----------
    .. [1] Stewart et al. Magn Reson Med 87 (2022) 1289, doi:10.1002/mrm.29048
    """
    check_grid(chi_reliable, chi_filled, ("chi_reliable", "chi_filled"))
    check_grid(chi_reliable, reliable, ("chi_reliable", "reliable"))
    if reliable.dtype is not torch.bool:
        msg = f"reliable is {reliable.dtype}, not torch.bool: give the mask of the first pass"
        raise ValueError(msg)
    return torch.where(reliable, chi_reliable, chi_filled)
