"""Cerebrospinal fluid of the ventricles from R2* alone: no T1-weighted image is needed."""

import math

import torch
from scipy import ndimage
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.grids import check_grid
from qsmpipe.numerics.masks.morphology import depth_of, largest_core, majority
from qsmpipe.numerics.masks.threshold import root_sum_of_squares
from qsmpipe.numerics.parameters import NotNegative, Positive, checked

SIGNAL = 0.1
"""Less magnitude than this share of the mask's median is no signal, and its R2* is noise."""

BRIDGE = 1 / 3
"""Fluid that is thinner than this share of its thickest part is a bridge, which is cut: the
ventricles lead to cisterns."""

MOST = 0.5
"""Fluid that fills more than this share of the ball is none: R2* is wrong, or its unit."""


@checked
def ventricles(
    r2star: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    magnitude: Tensor | None = None,
    threshold: Positive = 5.0,
    radius: Positive = 30.0,
    depth: NotNegative = 15.0,
    smoothing: NotNegative = 1.5,
    min_volume: NotNegative = 1.0,
) -> Tensor:
    """Find the fluid of the lateral ventricles, as far as it lies in the middle of the brain [1]_.

    Fluid is where R2* is low in a majority of neighbours; of it counts what lies within a ball
    about the brain's centre of mass and deep in the mask. Bridges are cut, and the largest piece
    is taken for the ventricles, mostly of both sides. The result shall be a reference: it has no
    need to hold all of the ventricles, but nothing else. So, other than in [1]_, neighbours vote,
    the cisterns below and behind the ventricles are kept out by their depth and the bridges, and
    the piece is not followed out of the ball, where it leads to more cisterns.

    Parameters
    ----------
    r2star : (X, Y, Z) real tensor
        R2* (1/s).
    mask : (X, Y, Z) bool tensor
        The brain.
    zooms : tuple of float
        Voxel size (mm).
    magnitude : ([E,] X, Y, Z) real tensor, optional
        Magnitude, any unit: voxels without signal, whose R2* is noise, are no fluid.
    threshold : float
        R2* of fluid is below this (1/s). 5 suits 3 T and below; partial volume and noise ask for
        more at 7 T.
    radius : float
        Radius of the ball about the brain's centre where ventricles are sought (mm).
    depth : float
        Distance from the mask's edge at least (mm).
    smoothing : float
        Gaussian width of the majority vote (mm); 0 for none.
    min_volume : float
        Less fluid (mL) is no plausible ventricle.

    Returns
    -------
    (X, Y, Z) bool tensor

    Raises
    ------
    ValueError
        If the grids differ, the mask is empty, no plausible ventricle is found, or nearly all
        of the ball seems to be fluid.

    References
    ----------
    .. [1] Liu et al. Magn Reson Med 79 (2018) 2795, doi:10.1002/mrm.26946
    """
    check_grid(r2star, mask, ("r2star", "mask"))
    if mask.dtype is not torch.bool or r2star.ndim != 3:
        msg = f"mask is {mask.dtype} and r2star {tuple(r2star.shape)}: give bool and (X, Y, Z)"
        raise ValueError(msg)
    if not mask.any():
        msg = f"mask {tuple(mask.shape)} is empty: there is no brain to find ventricles in"
        raise ValueError(msg)
    inside = mask & (r2star < threshold)  # NaN is not below
    if magnitude is not None:
        check_grid(magnitude, mask, ("magnitude", "mask"))
        signal = root_sum_of_squares(torch.where(mask, magnitude, 0))
        inside &= signal > SIGNAL * signal[mask].median()
    ball = _ball(mask, zooms, radius) & (depth_of(mask, zooms) > depth)
    fluid = ball & majority(inside, zooms, sigma=smoothing)
    if fluid.sum() > MOST * ball.sum():
        msg = (
            f"R2* is below {threshold:g} /s in {fluid.sum() / ball.sum():.0%} of the middle of "
            "the brain: that is no ventricle. Is the unit of R2* 1/s, and do the echoes differ?"
        )
        raise ValueError(msg)
    thickest = depth_of(fluid, zooms).max().item()
    found = largest_core(fluid, zooms, radius=BRIDGE * thickest)
    volume = int(found.sum()) * math.prod(zooms) / 1000
    if volume < min_volume or not volume:
        msg = (
            f"no ventricle was found: {volume:.2g} mL of fluid (R2* below {threshold:g} /s) in "
            f"one piece within {radius:g} mm of the brain's centre, {min_volume:g} mL at least "
            "are plausible. Look at the R2* map and the mask; raise the threshold (7 T, noise), "
            "or take another reference"
        )
        raise ValueError(msg)
    return found


def _ball(mask: Tensor, zooms: Zooms, radius: float) -> Tensor:
    """Voxels within ``radius`` mm of the centre of mass."""
    centre = ndimage.center_of_mass(mask.cpu().numpy())
    x, y, z = (
        ((torch.arange(n) - middle) * zoom) ** 2
        for n, middle, zoom in zip(mask.shape, centre, zooms, strict=True)
    )
    return (x[:, None, None] + y[:, None] + z < radius**2).to(mask.device)
