"""How far a susceptibility map is from the truth. Every metric says which variant it is.

All take ``(recon, truth, mask)``, or regions besides: maps (X, Y, Z) in ppm and a bool mask; what
the maps hold outside the mask does not count. They compute in float64 on the CPU.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from torch import Tensor

__all__ = [
    "Calcification",
    "calcification",
    "detrended_nrmse",
    "hfen",
    "linearity_error",
    "nrmse",
    "xsim",
]

LOG_SIGMA = 1.5
"""Width of the Laplacian of a Gaussian in HFEN (voxels); its kernel has 15 voxels."""

XSIM_SIGMA, XSIM_RADIUS = 1.5, 3
"""Width and half size of XSIM's Gaussian window (voxels)."""

CORE, SHELL = 3, 4
"""How much wider than a calcification is the box it is looked for in, and the shell around that,
on each side (voxels)."""

XSIM_CONSTANTS = (0.01**2, 0.001**2)
"""(K L)^2 of XSIM for maps in ppm: K = 0.01 and 0.001, L = 1."""


def nrmse(recon: Tensor, truth: Tensor, mask: Tensor) -> float:
    """Error's norm over truth's, in percent, both in the mask and not demeaned [1]_.

    Parameters
    ----------
    recon, truth : (X, Y, Z) tensors
        Maps in one unit.
    mask : (X, Y, Z) bool tensor
        Where they are compared.

    Returns
    -------
    float
        Error (%); 0 for equal maps.

    References
    ----------
    .. [1] Langkammer et al. Magn Reson Med 79 (2018) 1661, doi:10.1002/mrm.26830
    """
    r, t, inside = _arrays(recon, truth, mask)
    return 100 * _relative(r[inside], t[inside])


def detrended_nrmse(recon: Tensor, truth: Tensor, mask: Tensor) -> float:
    """:func:`nrmse` of demeaned maps after ``recon = slope * truth + intercept`` is undone [1]_.

    Of the three variants in use this is the one that fits the reconstruction to the truth and
    inverts the line (B): the errors of scale and offset vanish, and a map without any relation to
    the truth has an infinite error rather than one of 100 %.

    Parameters
    ----------
    recon, truth : (X, Y, Z) tensors
        Maps in one unit.
    mask : (X, Y, Z) bool tensor
        Where they are compared.

    Returns
    -------
    float
        Error (%); 0 for equal maps.

    References
    ----------
    .. [1] Marques et al. Magn Reson Med 86 (2021) 526, doi:10.1002/mrm.28716
    """
    r, t, inside = _arrays(recon, truth, mask)
    r, t = r[inside] - r[inside].mean(), t[inside] - t[inside].mean()
    slope = r @ t / (t @ t) if np.any(t) else math.nan
    if slope == 0:
        return math.inf
    return 100 * _relative(r / slope, t)


def xsim(recon: Tensor, truth: Tensor, mask: Tensor) -> float:
    """Structural similarity for susceptibility, at most 1, mean over the mask [1]_.

    Gaussian window of 7^3 voxels and sigma 1.5, edges replicated, constants for ppm. Some programs
    call a uniform 5^3 window XSIM too; it gives other numbers.

    Parameters
    ----------
    recon, truth : (X, Y, Z) tensors
        ppm.
    mask : (X, Y, Z) bool tensor
        Where they are compared.

    Returns
    -------
    float
        Similarity; 1 for equal maps.

    References
    ----------
    .. [1] Milovic et al. Magn Reson Med 93 (2025) 411, doi:10.1002/mrm.30271
    """
    r, t, inside = _arrays(recon, truth, mask)

    def local(image: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(image, XSIM_SIGMA, mode="nearest", radius=XSIM_RADIUS)

    mean_r, mean_t = local(r), local(t)
    var_r, var_t = local(r * r) - mean_r**2, local(t * t) - mean_t**2
    covariance = local(r * t) - mean_r * mean_t
    c1, c2 = XSIM_CONSTANTS
    similarity = (2 * mean_r * mean_t + c1) * (2 * covariance + c2)
    similarity /= (mean_r**2 + mean_t**2 + c1) * (var_r + var_t + c2)
    return float(similarity[inside].mean())


def hfen(recon: Tensor, truth: Tensor, mask: Tensor) -> float:
    """:func:`nrmse` of the maps' Laplacian of a Gaussian, in percent: the edges' error [1]_ [2]_.

    Kernel of 15^3 voxels and sigma 1.5; the maps are 0 outside the mask, and the norms are over
    the whole grid, so that the mask's rim counts.

    Parameters
    ----------
    recon, truth : (X, Y, Z) tensors
        Maps in one unit.
    mask : (X, Y, Z) bool tensor
        Where they are compared.

    Returns
    -------
    float
        Error (%); 0 for equal maps.

    References
    ----------
    .. [1] Ravishankar & Bresler, IEEE Trans Med Imaging 30 (2011) 1028,
       doi:10.1109/TMI.2010.2090538
    .. [2] Langkammer et al. Magn Reson Med 79 (2018) 1661, doi:10.1002/mrm.26830
    """
    r, t, _ = _arrays(recon, truth, mask)
    edges = [
        ndimage.gaussian_laplace(image, LOG_SIGMA, mode="constant", truncate=4.5)
        for image in (r, t)
    ]
    return 100 * _relative(*edges)


def linearity_error(recon: Tensor, truth: Tensor, regions: Tensor) -> float:
    """How far from 1 is the slope of regions' mean susceptibility on their true one [1]_.

    Parameters
    ----------
    recon, truth : (X, Y, Z) tensors
        ppm.
    regions : (X, Y, Z) int tensor
        Number of the region, such as a deep nucleus; 0 elsewhere.

    Returns
    -------
    float
        Distance of the slope from 1; 0 at best.

    Raises
    ------
    ValueError
        If the grids differ, or there are no two regions of different susceptibility.

    References
    ----------
    .. [1] Marques et al. Magn Reson Med 86 (2021) 526, doi:10.1002/mrm.28716
    """
    r, t, _ = _arrays(recon, truth, regions != 0)
    numbers = regions.cpu().numpy()
    names = np.unique(numbers[numbers != 0])
    found, true = (np.array([x[numbers == name].mean() for name in names]) for x in (r, t))
    true = true - true.mean()
    if not np.any(np.abs(true) > 0):
        msg = "all regions have the same true susceptibility: a slope needs two that differ"
        raise ValueError(msg)
    return float(abs(1 - true @ found / (true @ true)))


class Calcification(NamedTuple):
    """What a map makes of a calcification, or of a bleeding turned negative."""

    moment: float
    """Difference of the found and the true sum of susceptibility over that one (%)."""
    streak: float
    """Standard deviation around it of what is no line of the truth, over the mean susceptibility
    that was found in it (%)."""


def calcification(recon: Tensor, truth: Tensor, mask: Tensor, region: Tensor) -> Calcification:
    """Moment of a calcification and the streaks around it [1]_.

    The calcification is looked for in the map in the box around ``region``, 3 voxels wider: there
    is susceptibility below the first of 0, -0.01, ... ppm below which nothing lies in the shell of
    4 voxels around the box. In that shell the streaks are measured. The challenge gives the
    moment's difference in ppm; here it is a share of the true one.

    Parameters
    ----------
    recon, truth : (X, Y, Z) tensors
        ppm.
    mask, region : (X, Y, Z) bool tensors
        Brain, and the calcification in it.

    Returns
    -------
    Calcification
        Error of the moment, and streaks, both in percent.

    Raises
    ------
    ValueError
        If the grids differ or the region is empty.

    References
    ----------
    .. [1] Marques et al. Magn Reson Med 86 (2021) 526, doi:10.1002/mrm.28716
    """
    r, t, inside = _arrays(recon, truth, mask)
    _, _, lesion = _arrays(recon, truth, region)
    box, around = (_grown(lesion, by) for by in (CORE, CORE + SHELL))
    shell = around & ~box & inside
    threshold = min(0.0, math.floor(100 * r[shell].min()) / 100)
    found = r[box & inside & (r < threshold)]
    true = t[lesion].sum()
    moment = 100 * abs(found.sum() / true - 1)
    known = np.stack([t[shell], np.ones(shell.sum())], axis=1)
    rest = r[shell] - known @ np.linalg.lstsq(known, r[shell])[0]
    streak = 100 * rest.std() / abs(found.mean()) if found.size else math.inf
    return Calcification(float(moment), float(streak))


def _grown(region: np.ndarray, by: int) -> np.ndarray:
    """Box around a region, wider by so many voxels on each side."""
    box = np.zeros_like(region)
    box[tuple(slice(max(n.min() - by, 0), n.max() + by + 1) for n in region.nonzero())] = True
    return box


def _relative(r: np.ndarray, t: np.ndarray) -> float:
    norm = np.linalg.norm(t)
    if norm == 0:
        msg = "the truth is constant or 0 in the mask: a relative error has no meaning there"
        raise ValueError(msg)
    return float(np.linalg.norm(r - t) / norm)


def _arrays(
    recon: Tensor, truth: Tensor, mask: Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both maps as float64, 0 outside the mask, and the mask."""
    if not recon.shape == truth.shape == mask.shape:
        msg = (
            f"recon {tuple(recon.shape)}, truth {tuple(truth.shape)} and mask "
            f"{tuple(mask.shape)} are on different grids: resample them onto one"
        )
        raise ValueError(msg)
    inside = mask.cpu().numpy().astype(bool)
    if not inside.any():
        msg = "the mask is empty: there is nothing to compare"
        raise ValueError(msg)
    r, t = (np.where(inside, x.detach().cpu().double().numpy(), 0.0) for x in (recon, truth))
    return r, t, inside
