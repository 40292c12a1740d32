"""How far a susceptibility map is from the truth. Every metric says which variant it is.

All take ``(recon, truth, mask)``: maps (X, Y, Z) in ppm and a bool mask; what the maps hold
outside the mask does not count. They compute in float64 on the CPU.
"""

import math

import numpy as np
from scipy import ndimage
from torch import Tensor

LOG_SIGMA = 1.5
"""Width of the Laplacian of a Gaussian in HFEN (voxels); its kernel has 15 voxels."""

XSIM_SIGMA, XSIM_RADIUS = 1.5, 3
"""Width and half size of XSIM's Gaussian window (voxels)."""

XSIM_CONSTANTS = (0.01**2, 0.001**2)
"""(K L)^2 of XSIM for maps in ppm: K = 0.01 and 0.001, L = 1."""


def nrmse(recon: Tensor, truth: Tensor, mask: Tensor) -> float:
    """Error's norm over truth's, in percent, both in the mask and not demeaned [1]_.

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
