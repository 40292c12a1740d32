"""Edges of the magnitude, across which susceptibility may change for nothing."""

from typing import Annotated, TypeAlias

import torch
from annotated_types import Interval
from torch import Tensor

from qsmpipe.numerics.fourier import SPACE, Zooms
from qsmpipe.numerics.grids import check_mask, surrounded
from qsmpipe.numerics.operators import gradient

Edges: TypeAlias = Annotated[float, Interval(ge=0, lt=1)]
"""Share of the gradient's components."""

DEFAULT_EDGES = 0.3
"""Share of the gradient's components inside the mask that count as edges."""


def smooth_parts(
    magnitude: Tensor, mask: Tensor, zooms: Zooms, *, edges: float = DEFAULT_EDGES
) -> Tensor:
    """Where the magnitude has no edge [1]_, component by component.

    The outermost voxels of the mask have no edges. There the magnitude falls because the tissue
    ends, whatever its susceptibility does; and where all differences of such a voxel cost
    nothing, nothing tells its susceptibility from that of sources beside it, outside the mask.

    Parameters
    ----------
    magnitude : (X, Y, Z) real tensor
        In any unit.
    mask : (X, Y, Z) bool tensor
        Where it is read.
    zooms : tuple of float
        Voxel size (mm).
    edges : float
        The share of the forward differences inside ``mask``, of all three axes together and but
        for the outermost voxels', that are taken for edges: the largest ones. 0.3 of the
        components is what 0.9 of the number of voxels is elsewhere. 0: no edge.

    Returns
    -------
    (3, X, Y, Z) bool tensor
        False on edges; True elsewhere, also outside ``mask`` and at its outermost voxels.

    Raises
    ------
    ValueError
        If the grids differ or ``edges`` is not in [0, 1).

    References
    ----------
    .. [1] Liu et al. NeuroImage 59 (2012) 2560, doi:10.1016/j.neuroimage.2011.08.082
    """
    check_mask(magnitude, mask)
    if not 0 <= edges < 1:
        msg = f"edges is {edges:g}: give the share of differences that are edges, 0 to below 1"
        raise ValueError(msg)
    steep = gradient(torch.where(mask, magnitude, 0), zooms).abs()
    core = surrounded(mask)
    within = torch.stack([core & core.roll(-1, axis) for axis in SPACE])
    steps = steep[within]
    flat = round((1 - edges) * steps.numel())
    if flat in (0, steps.numel()):
        return ~within if steps.numel() and flat == 0 else torch.ones_like(within)
    return (steep <= steps.kthvalue(flat).values) | ~within
