"""Mask by a robust threshold of the magnitude, its bias field removed first."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d, interpolate, pad

from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.masks.morphology import fill_holes, largest_core, majority, smooth
from qsmpipe.numerics.parameters import NotNegative, Positive, checked

BIAS_ROUNDS = 4
"""Rounds of foreground and bias field: parts too dim for one round are found by the next."""

FINE = 4.0
"""The bias field is computed in blocks of voxels this many times smaller than its width."""

FAR = 0.01
"""Share of foreground in the Gaussian's reach below which the bias field levels off."""


@checked
def threshold(
    magnitude: Tensor,
    zooms: Zooms,
    *,
    factor: Positive = 1.0,
    bias_sigma: NotNegative = 20.0,
    smoothing: NotNegative = 1.4,
    opening: NotNegative = 3.0,
    max_hole: NotNegative = 100.0,
    echoes: Literal["combined", "all"] = "combined",
) -> Tensor:
    """Mask the object in a magnitude by a robust threshold [1]_.

    The echoes are joined by the root of their sum of squares, which has the best signal-to-noise
    ratio and is still led by the early echoes, where little signal is lost. Its bias field is
    divided out (:func:`bias_field`), :func:`robust_level` gives the threshold, a majority vote of
    neighbours removes specks, bridges (to the scalp) are cut, holes are filled, and a second,
    stricter vote smooths the edge. In a head without dark skull, scalp stays in the mask: combine
    it with BET.

    Parameters
    ----------
    magnitude : ([E,] X, Y, Z) real tensor
        Magnitude, any unit.
    zooms : tuple of float
        Voxel size (mm).
    factor : float
        Multiplies the threshold: above 1 for a tighter mask.
    bias_sigma : float
        Smoothness of the bias field (mm); 0 takes the magnitude as it is.
    smoothing : float
        Gaussian width of the votes (mm); 0 for none.
    opening : float
        Half the width of the bridges that are cut (mm); 0 for the largest component.
    max_hole : float
        Largest hole that is filled (mL).
    echoes : {"combined", "all"}
        What exceeds the threshold: the echoes joined, or every one of them, each with a threshold
        of its own under the bias field of all. The latter leaves out what decays before the last
        echo, for methods that need signal in all of them.

    Returns
    -------
    (X, Y, Z) bool tensor

    Raises
    ------
    ValueError
        If the magnitude, or one of the echoes where ``"all"`` count, has no signal, or ``echoes``
        is neither.

    References
    ----------
    .. [1] Eckstein et al. (2021), MriResearchTools, ``robustmask``: the quantiles and levels.
       Its lengths, in voxels there, are in mm here, and it votes over boxes.
    """
    if echoes not in ("combined", "all"):
        msg = f"echoes {echoes!r}: choose 'combined' or 'all'"
        raise ValueError(msg)
    image = root_sum_of_squares(magnitude)
    bias = bias_field(image, zooms, sigma=bias_sigma) if bias_sigma > 0 else 1.0
    one_by_one = echoes == "all" and magnitude.ndim == 4
    each = [root_sum_of_squares(echo) for echo in magnitude] if one_by_one else [image]
    above = [echo / bias > factor * robust_level(echo / bias) for echo in each]
    mask = torch.stack(above).all(0)
    mask = majority(mask, zooms, sigma=smoothing, level=0.4)
    mask = largest_core(mask, zooms, radius=opening)
    mask = fill_holes(mask, zooms, max_volume=max_hole)
    return majority(mask, zooms, sigma=0.8 * smoothing, level=0.6)


def root_sum_of_squares(magnitude: Tensor) -> Tensor:
    """Join echoes ([E,] X, Y, Z) to (X, Y, Z); what is not finite counts as 0.

    Raises
    ------
    ValueError
        If the shape is neither 3D nor 4D, or all is 0.
    """
    if magnitude.ndim not in {3, 4}:
        msg = (
            f"magnitude has shape {tuple(magnitude.shape)}, not ([E,] X, Y, Z): give one volume "
            "per echo"
        )
        raise ValueError(msg)
    image = torch.nan_to_num(magnitude, nan=0.0, posinf=0.0, neginf=0.0)
    image = image.square().sum(0).sqrt() if image.ndim == 4 else image.abs()
    if not image.any():
        msg = "the magnitude is 0 everywhere: no mask can be made from it (wrong file or scaling?)"
        raise ValueError(msg)
    return image


def robust_level(image: Tensor) -> float:
    """Threshold between noise and signal, from quantiles of all voxels but those of value 0.

    A fifth of the typical signal (mean of what lies between the 80th and 99th percentile), or five
    times the noise (mean of the lowest 15 %, or of the lowest 5 % if those hold signal) when that
    is more. An image without background has no noise to measure, and the first rule decides.
    """
    values = image[image > 0].cpu().numpy()
    q05, q15, q80, q99 = np.quantile(values, [0.05, 0.15, 0.80, 0.99])
    high = values[(values >= q80) & (values <= q99)].mean(dtype=np.float64)
    noise = 0.0
    for quantile in (q15, q05):
        low = values[values <= quantile].mean(dtype=np.float64)
        if low <= high / 10:
            noise = low
            break
    return float(max(5 * noise, high / 5))


def bias_field(magnitude: Tensor, zooms: Zooms, *, sigma: float) -> Tensor:
    """Smooth shading of a magnitude: the Gaussian mean of its foreground.

    Foreground is what exceeds :func:`robust_level` after division by the field of the round
    before. Far from it the field levels off to the foreground's mean, so that noise is not
    amplified.

    Parameters
    ----------
    magnitude : (X, Y, Z) real tensor
        Magnitude, any unit.
    zooms : tuple of float
        Voxel size (mm).
    sigma : float
        Width of the Gaussian (mm).

    Returns
    -------
    (X, Y, Z) tensor
        Positive, of mean 1 over the foreground.
    """
    blocks = [max(1, int(sigma / (FINE * zoom))) for zoom in zooms]
    padding = [-n % block for n, block in zip(magnitude.shape, blocks, strict=True)]
    padded = pad(
        magnitude[None, None], (0, padding[2], 0, padding[1], 0, padding[0]), mode="replicate"
    )
    coarse = avg_pool3d(padded, blocks)[0, 0]
    x, y, z = (zoom * block for zoom, block in zip(zooms, blocks, strict=True))

    field = torch.ones_like(coarse)
    for _ in range(BIAS_ROUNDS):
        corrected = coarse / field
        inside = corrected > robust_level(corrected)
        mean = coarse[inside].mean()
        share = smooth(inside.to(coarse), (x, y, z), sigma=sigma)
        total = smooth(coarse * inside, (x, y, z), sigma=sigma)
        field = (total + FAR * mean) / (share + FAR)
        field = field / field[inside].mean()
    fine = interpolate(field[None, None], size=padded.shape[2:], mode="trilinear")[0, 0]
    return fine[tuple(slice(n) for n in magnitude.shape)]
