"""Best-path unwrapping: pieces join along the most reliable edges. By scikit-image."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.ndimage import label
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.grids import bounding_box
from qsmpipe.numerics.parameters import Count, checked
from qsmpipe.numerics.unwrap.common import TWO_PI, check, merge_regions, unwrap_echoes

SEED = 0
"""Of the order in which voxels at the mask's edge, whose reliability is unknown, are joined."""


@checked
def bestpath(
    phase: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    echo_times: Sequence[float] | None = None,
    template: Count = 1,
    individual: bool = False,
) -> Tensor:
    r"""Unwrap phase along the best path [1]_, exactly: voxels change by multiples of 2 pi.

    A voxel is reliable where the phase is straight: :math:`R = 1 / \sqrt{\sum_n D_n^2}` with
    :math:`D_n = \gamma(\phi_{-n} - \phi) - \gamma(\phi - \phi_n)` over the 13 pairs of opposite
    neighbours. The edge between two neighbours is as reliable as both together; pieces join along
    the most reliable edge first, the smaller one shifted by the multiple of 2 pi that fits. The
    implementation is that of scikit-image [2]_. No magnitude is needed, and none used.

    Echoes, and pieces of the mask that do not touch, are treated as in
    :func:`~qsmpipe.numerics.unwrap.romeo.romeo`. Runs on the CPU, whatever the device of
    ``phase``.

    Parameters
    ----------
    phase : (X, Y, Z) or (E, X, Y, Z) real tensor
        Wrapped phase (rad).
    mask : (X, Y, Z) bool tensor
        Where to unwrap; all must be finite there.
    zooms : tuple of float
        Voxel size (mm); measures the gaps between regions.
    echo_times : sequence of float
        In s; needed for more than one echo.
    template : int
        Number of the echo that is unwrapped in space, from 1; the others follow by the ratio of
        echo times, so that the offset common to all echoes must be gone.
    individual : bool
        Unwrap each echo in space by itself; then shift it by the median over voxels of what its
        neighbour in time foretells.

    Returns
    -------
    tensor like ``phase``
        Unwrapped phase (rad); 0 outside ``mask``.

    Raises
    ------
    ValueError
        If grids or echoes differ, echo times are missing, or the phase is not finite inside the
        mask.

    References
    ----------
    .. [1] Abdul-Rahman et al. Appl Opt 46 (2007) 6623, doi:10.1364/AO.46.006623
    .. [2] van der Walt et al. PeerJ 2 (2014) e453, doi:10.7717/peerj.453
    """
    check(phase, mask, echo_times=echo_times)
    wrapped = phase.detach().cpu().reshape(-1, *phase.shape[-3:])
    inside = mask.cpu()

    def in_space(echo: int) -> Tensor:
        box = bounding_box(inside)
        turns = torch.zeros(inside.shape, dtype=torch.int32)
        values, known = wrapped[echo][box].numpy(), inside[box].numpy()
        turns[box] = torch.from_numpy(_turns(values, known, zooms))
        return turns

    unwrapped = unwrap_echoes(
        wrapped, inside, in_space,
        echo_times=echo_times, template=template, individual=individual,
    )  # fmt: skip
    return unwrapped.reshape(phase.shape).to(phase.device)


def _turns(phase: np.ndarray, inside: np.ndarray, zooms: Zooms) -> np.ndarray:
    """How many times 2 pi to add to every voxel of one echo, (X, Y, Z) int32."""
    from skimage.restoration import unwrap_phase

    # A NaN that is masked would send its sorting round for ever.
    phase = np.where(inside, phase, 0)
    values, masked = phase, ~inside
    if flat := tuple(n for n, size in enumerate(phase.shape) if size == 1)[:1]:
        values, masked = values.squeeze(flat), masked.squeeze(flat)  # straight in two dimensions
    values, masked = np.pad(values, 1), np.pad(masked, 1, constant_values=True)
    exact = np.asarray(unwrap_phase(np.ma.array(values, mask=masked), rng=SEED))
    exact = exact[(slice(1, -1),) * exact.ndim].reshape(phase.shape)
    wraps = np.where(inside, np.rint((exact - phase) / TWO_PI), 0).astype(np.int32)
    regions, count = label(inside)
    if count > 1:
        regions = np.where(inside, regions, -1).astype(np.int32)
        merge_regions(phase, wraps, regions, count, zooms)
    return wraps
