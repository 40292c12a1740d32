"""ROMEO: phase unwrapping by growing regions along the most reliable edges.

Compiled code is cached on disk where numba finds a folder that it may write to
(``NUMBA_CACHE_DIR`` names one); elsewhere every process compiles it again.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

import numpy as np
import torch
from annotated_types import Interval
from scipy.ndimage import label
from torch import Tensor

from qsmpipe.numerics.compiled import compiled
from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.grids import bounding_box, in_place, surrounded
from qsmpipe.numerics.parameters import Count, checked
from qsmpipe.numerics.unwrap.common import TWO_PI, check, merge_regions, unwrap_echoes
from qsmpipe.numerics.unwrap.edges import edge_weights

Weights: TypeAlias = Literal["romeo", "romeo2", "romeo3", "romeo6"]

WEIGHTS: dict[Weights, tuple[bool, ...]] = {
    "romeo": (True, True, True, True, False, False),
    "romeo2": (True, False, False, True, False, False),
    "romeo3": (True, True, False, True, False, False),
    "romeo6": (True, True, True, True, True, True),
}
"""Named sets of edge weights, of the six kinds of :mod:`.edges`."""

DEFAULT_UNCERTAIN = 0.5
"""Deviation from the neighbour in time (pi) beyond which a voxel is unwrapped in space."""


UNREACHED = np.int32(-(2**31))
"""Stands for the turns of a voxel that is still to be unwrapped."""


@compiled()
def _queue(
    voxel: int, costs: np.ndarray, strides: np.ndarray, tops: np.ndarray, queue: np.ndarray
) -> int:
    """Queue the edges from a voxel that are there, which takes them away; the least cost."""
    cheapest, voxels = 256, costs.size // 3
    for axis in range(3):
        stride = strides[axis]
        for back in range(2):
            edge = axis * voxels + voxel
            if back:
                if voxel < stride:
                    continue
                edge -= stride
            cost = costs[edge]
            if cost > 0:
                costs[edge] = 0
                queue[tops[cost]] = 8 * voxel + 2 * axis + back
                tops[cost] += 1
                cheapest = min(cheapest, cost)
    return cheapest


@compiled()
def _grow(
    phase: np.ndarray,
    costs: np.ndarray,
    strides: np.ndarray,
    starts: np.ndarray,
    again: bool,
    turns: np.ndarray,
    tops: np.ndarray,
    queue: np.ndarray,
) -> int:
    """Unwrap the voxels that are :data:`UNREACHED`, cheapest edge first; counts regions.

    Everything is flat. ``costs`` has, for each axis, that of the edge from every voxel to its
    next: 1 to 255, or 0 where there is none; it is used up. Every cost has a stack in ``queue``
    from its place in ``tops`` on; among equal costs the edge queued last goes first. An edge is
    the number of the voxel that it was reached from times 8, plus its direction.

    ``turns``, how many times 2 pi is to be added, is known in ``starts``. What they do not reach
    is left, or, ``again``, grown in regions of their own from the first voxel left over.
    """
    bottoms = tops.copy()
    scan, count, cheapest = 0, 1, 256
    for voxel in starts:
        cheapest = min(cheapest, _queue(voxel, costs, strides, tops, queue))
    while True:
        while cheapest < 256 and tops[cheapest] == bottoms[cheapest]:
            cheapest += 1
        if cheapest < 256:
            tops[cheapest] -= 1
            edge = queue[tops[cheapest]]
            old, stride = edge >> 3, strides[(edge >> 1) & 3]
            new = old - stride if edge & 1 else old + stride
            if turns[new] != UNREACHED:
                continue
            more = np.rint((np.float64(phase[old]) - phase[new]) / TWO_PI)
            turns[new] = turns[old] + np.int32(more)
        else:
            while again and scan < turns.size and turns[scan] != UNREACHED:
                scan += 1
            if not again or scan == turns.size:
                return count
            count += 1
            new = scan
            turns[new] = 0
        cheapest = min(cheapest, _queue(new, costs, strides, tops, queue))


def _as_array(image: Tensor) -> np.ndarray:
    return np.ascontiguousarray(image.detach().cpu().numpy(), dtype=np.float32)


def _costs(weights: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Integer costs 1 to 255 of the edges between voxels ``inside``; 0 is no edge."""
    scaled = torch.from_numpy(weights).neg_().add_(1).mul_(255).round_().clamp_(1, 255)
    costs = scaled.to(torch.uint8).numpy()
    for axis in range(3):
        along = np.moveaxis(costs[axis], axis, 0)
        within = np.moveaxis(inside, axis, 0)
        along[:-1] *= within[:-1] & within[1:]
        along[-1] = 0
    return costs


def _run(
    phase: np.ndarray, costs: np.ndarray, starts: np.ndarray, turns: np.ndarray, *, again: bool
) -> int:
    """Call :func:`_grow` with images; ``costs`` and ``turns`` are written to."""
    _, y, z = phase.shape
    parts = torch.from_numpy(costs).reshape(-1).split(1 << 20)
    counts = np.sum([torch.bincount(part, minlength=256).numpy() for part in parts], axis=0)
    counts[0] = 0
    tops = np.concatenate([[0], counts.cumsum()])[:256]
    queue = np.empty(counts.sum(), np.int32 if 8 * turns.size < 2**31 else np.int64)
    return _grow(
        phase.reshape(-1), costs.reshape(-1), np.array([y * z, z, 1]), starts, again,
        turns.reshape(-1), tops, queue,
    )  # fmt: skip


def _seed(costs: np.ndarray, inside: np.ndarray) -> int:
    """Find the first voxel ``inside`` with the cheapest edge to a next one."""
    cheapest = np.where(costs == 0, 255, costs).min(0)
    return int(np.where(inside, cheapest, np.int16(256)).argmin())


def _unwrap_space(
    phase: np.ndarray, costs: np.ndarray, inside: np.ndarray, zooms: Zooms
) -> np.ndarray:
    """How many times 2 pi to add to every voxel of one echo, (X, Y, Z) int32."""
    turns = np.where(inside, UNREACHED, np.int32(0))
    starts = np.array([_seed(costs, inside)])
    turns.reshape(-1)[starts] = 0
    if _run(phase, costs, starts, turns, again=True) > 1:
        regions, count = label(inside)
        merge_regions(phase, turns, regions, count, zooms)
    return turns


@checked
def romeo(
    phase: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    magnitude: Tensor | None = None,
    echo_times: Sequence[float] | None = None,
    weights: Weights = "romeo",
    template: Count = 1,
    individual: bool = False,
    uncertain: Annotated[float, Interval(gt=0, le=1)] = DEFAULT_UNCERTAIN,
    correct_global: bool = True,
) -> Tensor:
    r"""Unwrap phase by ROMEO [1]_, exactly: every voxel changes by a multiple of 2 pi.

    Each pair of neighbours in ``mask`` is an edge whose weight is the product of how coherent
    phase, phase gradient over echoes, phase curvature and magnitude are across it. A region grows
    from a seed over the most reliable edge first; a new voxel takes the multiple of 2 pi nearest
    to its neighbour. The template echo is unwrapped so, each other echo by the phase that its
    neighbour in time foretells, :math:`\phi_{e'} TE_e / TE_{e'}`, so that the offset common to
    all echoes must be gone; voxels that deviate much from it are regrown from the others.

    Where ``mask`` is not connected, each region grows by itself and is then shifted to the largest
    one by the median difference over the shortest gaps: right when the phase changes by less than
    pi over the gap. Runs on the CPU, whatever the device of ``phase``.

    Parameters
    ----------
    phase : (X, Y, Z) or (E, X, Y, Z) real tensor
        Wrapped phase (rad).
    mask : (X, Y, Z) bool tensor
        Where to unwrap; all must be finite there.
    zooms : tuple of float
        Voxel size (mm); measures the gaps between regions.
    magnitude : tensor like ``phase``, optional
        In any unit; without it the weights that need it are left out.
    echo_times : sequence of float
        In s; needed for more than one echo.
    weights : str
        What makes an edge reliable: a key of :data:`WEIGHTS`.
    template : int
        Number of the echo that is unwrapped in space, from 1.
    individual : bool
        Unwrap each echo in space by itself, and not by its neighbour in time.
    uncertain : float
        Deviation from what the neighbour in time foretells (in pi) beyond which a voxel is
        unwrapped in space instead. 1 for none.
    correct_global : bool
        Shift the template by a multiple of 2 pi. The median of its number of turns becomes 0, or
        up to 2 away where the next echo agrees clearly better with that (which it can tell unless
        its time is a multiple of the template's). With ``individual``, shift each other echo by
        the median over voxels of what its neighbour in time foretells.

    Returns
    -------
    tensor like ``phase``
        Unwrapped phase (rad); 0 outside ``mask``.

    Raises
    ------
    ValueError
        If grids or echoes differ, echo times are missing, a choice does not exist, or phase or
        magnitude is not finite inside the mask.

    References
    ----------
    .. [1] Dymerska et al. Magn Reson Med 85 (2021) 2294, doi:10.1002/mrm.28563
    """
    check(phase, mask, magnitude=magnitude, echo_times=echo_times)
    if weights not in WEIGHTS:
        msg = f"weights {weights!r} is none of {', '.join(WEIGHTS)}"
        raise ValueError(msg)
    if not mask.any():
        return torch.zeros_like(phase)
    box = bounding_box(mask)
    inside = mask[box].cpu().contiguous()
    known = inside.numpy()
    wrapped = phase[(..., *box)].detach().cpu().reshape(-1, *inside.shape)
    values = _as_array(wrapped)
    amplitude = None
    if magnitude is not None:
        amplitude = _as_array(magnitude[(..., *box)].reshape(wrapped.shape))
    template_costs = np.empty(0, np.uint8)

    def in_space(echo: int) -> Tensor:
        nonlocal template_costs
        edges = edge_weights(values, amplitude, echo, echo_times, WEIGHTS[weights], known)
        costs = _costs(edges, known)
        if len(values) > 1 and not individual:
            template_costs = costs.copy()
        return torch.from_numpy(_unwrap_space(values[echo], costs, known, zooms))

    def regrow(echo: int, turns: Tensor, doubt: Tensor) -> Tensor:
        wraps = turns.nan_to_num().int().masked_fill_(doubt, int(UNREACHED))
        starts = np.flatnonzero((~surrounded(~doubt) & ~doubt).numpy())
        _run(values[echo], template_costs.copy(), starts, wraps.numpy(), again=False)
        return torch.where(wraps == int(UNREACHED), turns, wraps)

    unwrapped = unwrap_echoes(
        wrapped, inside, in_space, echo_times=echo_times, template=template,
        individual=individual, correct_global=correct_global, uncertain=uncertain, regrow=regrow,
    )  # fmt: skip
    whole = in_place(unwrapped, box, like=mask)
    return whole.reshape(phase.shape).to(phase.device)


def quality_map(
    phase: Tensor,
    *,
    magnitude: Tensor | None = None,
    echo_times: Sequence[float] | None = None,
) -> Tensor:
    """How reliable the phase of each voxel is: the mean weight of its six edges in ROMEO [1]_.

    Parameters
    ----------
    phase : (X, Y, Z) or (E, X, Y, Z) real tensor
        Wrapped phase (rad). The first echo counts, and the second one's gradient.
    magnitude : tensor like ``phase``, optional
        In any unit.
    echo_times : sequence of float, optional
        In s; without it only the first echo counts.

    Returns
    -------
    (X, Y, Z) tensor
        In [0, 1]; low at the border of the grid, 0 where the phase is not finite.

    References
    ----------
    .. [1] Dymerska et al. Magn Reson Med 85 (2021) 2294, doi:10.1002/mrm.28563
    """
    check(phase, magnitude=magnitude, echo_times=echo_times)
    values = _as_array(phase.reshape(-1, *phase.shape[-3:]))
    amplitude = None if magnitude is None else _as_array(magnitude.reshape(values.shape))
    edges = edge_weights(values, amplitude, 0, echo_times, WEIGHTS["romeo"])
    total = edges.sum(0)
    if not np.isfinite(total.sum()):
        np.nan_to_num(edges, copy=False, nan=0.0)
        total = edges.sum(0)
    for axis in range(3):
        before = np.moveaxis(edges[axis], axis, 0)
        np.moveaxis(total, axis, 0)[1:] += before[:-1]
    total /= 6
    return torch.from_numpy(total).to(device=phase.device, dtype=phase.dtype)
