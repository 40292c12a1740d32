"""Mask by the quality of the phase: where it is coherent over space and echoes."""

from typing import Literal

import numpy as np
import torch
from skimage.filters import threshold_otsu
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.masks.morphology import fill_holes, largest_core, majority
from qsmpipe.numerics.parameters import NotNegative, checked

BINS = 256
"""Histogram bins of Otsu's threshold."""


@checked
def quality(
    quality: Tensor,
    zooms: Zooms,
    *,
    threshold: float | Literal["otsu"] = "otsu",
    smoothing: NotNegative = 1.0,
    opening: NotNegative = 2.0,
    max_hole: NotNegative = 20.0,
) -> Tensor:
    """Mask the voxels of coherent phase [1]_.

    Quality above the threshold, a majority vote of neighbours, the largest piece once bridges are
    cut, its holes filled.

    Parameters
    ----------
    quality : (X, Y, Z) real tensor
        ROMEO's quality map, 0 to 1 (:func:`qsmpipe.numerics.unwrap.romeo.quality_map`).
    zooms : tuple of float
        Voxel size (mm).
    threshold : float or "otsu"
        Least quality, or "otsu" for the one that splits the histogram best. What noise scores
        depends on the number of echoes and on whether magnitude was given, so that the default is
        taken from the histogram [2]_; data whose background was removed before needs a number
        (ROMEO's own choice is 0.1).
    smoothing : float
        Gaussian width of the vote (mm); 0 for none.
    opening : float
        Half the width of the bridges that are cut (mm); 0 for the largest component.
    max_hole : float
        Largest hole that is filled (mL).

    Returns
    -------
    (X, Y, Z) bool tensor

    Raises
    ------
    ValueError
        If the map is not 3D, not within 0 and 1, or constant where ``threshold`` is "otsu".

    References
    ----------
    .. [1] Dymerska et al. Magn Reson Med 85 (2021) 2294, doi:10.1002/mrm.28563
    .. [2] Otsu, IEEE Trans Syst Man Cybern 9 (1979) 62, doi:10.1109/TSMC.1979.4310076
    """
    if quality.ndim != 3:
        msg = f"quality has shape {tuple(quality.shape)}, not (X, Y, Z): give one map"
        raise ValueError(msg)
    values = torch.nan_to_num(quality, nan=0.0)
    if values.min() < 0 or values.max() > 1 + 1e-5:
        msg = (
            f"quality goes from {values.min().item():g} to {values.max().item():g}, not from 0 to "
            "1: give ROMEO's quality map as it is"
        )
        raise ValueError(msg)
    level = otsu(values) if threshold == "otsu" else float(threshold)
    mask = majority(values > level, zooms, sigma=smoothing)
    mask = largest_core(mask, zooms, radius=opening)
    return fill_holes(mask, zooms, max_volume=max_hole)


def otsu(image: Tensor) -> float:
    """Threshold that splits the positive values with the largest variance between both parts.

    Raises
    ------
    ValueError
        If they are all the same.
    """
    least = torch.where(image > 0, image, torch.inf).min().item()
    greatest = image.max().item()
    if least >= greatest:
        msg = "the quality map is constant: Otsu's method finds no threshold in it, give a number"
        raise ValueError(msg)
    counts = torch.histc(image, BINS, least, greatest).cpu().numpy()
    edges = np.linspace(least, greatest, BINS + 1)
    return float(threshold_otsu(hist=(counts, (edges[:-1] + edges[1:]) / 2)))
