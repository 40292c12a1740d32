"""ROMEO: phase unwrapping by growing regions along the most reliable edges.

The loops over voxels are compiled by numba with strict IEEE arithmetic: the path of the growth
hangs on the last bit of every edge weight, so that the result depends on neither the number of
threads nor the vector width. Compiled code is cached on disk where numba finds a folder that it
may write to (``NUMBA_CACHE_DIR`` names one); elsewhere every process compiles it again.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

import numba
import numpy as np
import torch
from annotated_types import Interval
from torch import Tensor

from qsmpipe.numerics.compiled import compiled
from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.parameters import Count, checked
from qsmpipe.numerics.unwrap.common import TWO_PI, check, merge_regions, unwrap_echoes

Weights: TypeAlias = Literal["romeo", "romeo2", "romeo3", "romeo6"]

WEIGHTS: dict[Weights, tuple[bool, ...]] = {
    "romeo": (True, True, True, True, False, False),
    "romeo2": (True, False, False, True, False, False),
    "romeo3": (True, True, False, True, False, False),
    "romeo6": (True, True, True, True, True, True),
}
"""Named sets of edge weights: phase coherence, phase gradient coherence, phase linearity,
magnitude coherence, and two that favour magnitudes above and below half the maximum."""


DEFAULT_UNCERTAIN = 0.5
"""Deviation from the neighbour in time (pi) beyond which a voxel is unwrapped in space."""


@compiled(inline="always")
def _wrap(angle: float) -> float:
    return angle - TWO_PI * np.rint(angle / TWO_PI)


@compiled(inline="always")
def _linear(before: float, here: float, after: float) -> float:
    value = 1 - abs(_wrap(before - 2.0 * here + after)) / 2
    if np.isnan(value):
        return 0.5
    return max(0.0, value)


@compiled(parallel=True)
def _edge_weights(
    phase: np.ndarray,
    second: np.ndarray,
    ratio: float,
    magnitude: np.ndarray,
    maximum: float,
    use: tuple[bool, ...],
) -> np.ndarray:
    """Weight in [0, 1] of the edge from every voxel to its next along each axis, (X, Y, Z, 3)."""
    size_x, size_y, size_z = phase.shape
    weights = np.zeros((size_x, size_y, size_z, 3), np.float32)
    for x in numba.prange(size_x):
        for y in range(size_y):
            for z in range(size_z):
                for axis in range(3):
                    dx, dy, dz = int(axis == 0), int(axis == 1), int(axis == 2)
                    if x + dx == size_x or y + dy == size_y or z + dz == size_z:
                        continue
                    here, there = phase[x, y, z], phase[x + dx, y + dy, z + dz]
                    step = _wrap(np.float64(there) - here)
                    weight = 1.0
                    if use[0]:
                        weight *= 0.1 + 0.9 * (1 - abs(step) / math.pi)
                    if use[1]:
                        other = _wrap(np.float64(second[x + dx, y + dy, z + dz]) - second[x, y, z])
                        weight *= 0.1 + 0.9 * max(0.0, 1 - abs(step - other * ratio))
                    if use[2]:
                        linear = 0.9
                        if (
                            (x >= dx and y >= dy and z >= dz)
                            and (x + 2 * dx < size_x)
                            and (y + 2 * dy < size_y)
                            and (z + 2 * dz < size_z)
                        ):
                            linear = _linear(phase[x - dx, y - dy, z - dz], here, there)
                            linear *= _linear(
                                here, there, phase[x + 2 * dx, y + 2 * dy, z + 2 * dz]
                            )
                        weight *= 0.1 + 0.9 * linear
                    if use[3] or use[4] or use[5]:
                        a = np.float64(magnitude[x, y, z])
                        b = np.float64(magnitude[x + dx, y + dy, z + dz])
                        small, large = min(a, b), max(a, b)
                        if use[3]:
                            coherence = (small / large) ** 2 if large > 0 else 0.0
                            weight *= 0.1 + 0.9 * coherence
                        if use[4]:
                            bright = min(1.0, small / (0.5 * maximum)) if maximum > 0 else 0.0
                            weight *= 0.1 + 0.9 * (0.5 + 0.5 * bright)
                        if use[5]:
                            dark = min(1.0, 0.5 * maximum / large) if large > 0 else 1.0
                            weight *= 0.1 + 0.9 * (0.5 + 0.5 * dark)
                    weights[x, y, z, axis] = weight
    return weights


@compiled(inline="always")
def _queue(
    voxel: int,
    reached: bool,
    costs: np.ndarray,
    strides: tuple[int, int, int],
    region: np.ndarray,
    tops: np.ndarray,
    below: np.ndarray,
) -> int:
    """Queue the edges to neighbours that are ``reached`` or not; returns the least cost."""
    cheapest = 256
    for axis in range(3):
        stride = strides[axis]
        for neighbour, edge in (
            (voxel + stride, 3 * voxel + axis),
            (voxel - stride, 3 * (voxel - stride) + axis),
        ):
            if edge < 0:
                continue
            cost = costs[edge]
            if cost > 0 and (region[neighbour] > 0) == reached:
                below[edge] = tops[cost]
                tops[cost] = edge
                cheapest = min(cheapest, cost)
    return cheapest


@compiled()
def _grow(
    phase: np.ndarray,
    costs: np.ndarray,
    strides: tuple[int, int, int],
    seed: int,
    region: np.ndarray,
    wraps: np.ndarray,
    below: np.ndarray,
) -> int:
    """Unwrap all voxels whose ``region`` is 0, cheapest edge first; returns the last region.

    Everything is flat. An edge has the number ``3 * voxel + axis`` and a cost of 1 to 255, or 0
    where there is none. Every cost has a stack of edges, linked through ``below`` (an edge is
    queued once at most); among equal costs the edge queued last goes first.

    ``region`` becomes the number of the connected region (from 1), ``wraps`` how many times 2 pi
    is to be added. ``seed`` is the first one, later ones are the first voxels left over. With -1
    the growth starts from the voxels that have a region, and what they do not reach is left.
    """
    tops = np.full(256, -1, below.dtype)
    cheapest, count, scan = 256, 0, 0
    if seed < 0:
        scan = region.size
        for voxel in range(region.size):
            if region[voxel] == 0:
                cost = _queue(voxel, True, costs, strides, region, tops, below)
                cheapest = min(cheapest, cost)
    else:
        count = 1
        region[seed] = count
        cheapest = _queue(seed, False, costs, strides, region, tops, below)
    while True:
        while cheapest < 256 and tops[cheapest] < 0:
            cheapest += 1
        if cheapest < 256:
            edge = tops[cheapest]
            tops[cheapest] = below[edge]
            old = edge // 3
            new = old + strides[edge % 3]
            if region[old] == 0:
                old, new = new, old
            if region[new] != 0:
                continue
            turns = (np.float64(phase[old]) - phase[new]) / TWO_PI
            wraps[new] = wraps[old] + np.int32(np.rint(turns))
            region[new] = region[old]
        else:
            while scan < region.size and region[scan] != 0:
                scan += 1
            if scan == region.size:
                return count
            count += 1
            new = scan
            region[new] = count
        cheapest = min(cheapest, _queue(new, False, costs, strides, region, tops, below))


def _as_array(image: Tensor) -> np.ndarray:
    return np.ascontiguousarray(image.detach().cpu().numpy(), dtype=np.float32)


def _weights(
    phase: np.ndarray,
    magnitude: np.ndarray | None,
    echo: int,
    echo_times: Sequence[float] | None,
    use: Sequence[bool],
    inside: np.ndarray | None = None,
) -> np.ndarray:
    """Edge weights of one echo of (E, X, Y, Z); what lacks its data is left out of ``use``."""
    other = echo - 1 if echo > 0 else 1
    several = echo_times is not None and len(phase) > 1
    second = phase[other] if several else phase[echo]
    ratio = echo_times[echo] / echo_times[other] if several and echo_times is not None else 1.0
    amplitude, maximum = phase[echo], 1.0
    if magnitude is not None:
        amplitude = np.nan_to_num(magnitude[echo], nan=0.0, posinf=0.0, neginf=0.0)
        if use[4] or use[5]:
            known = amplitude if inside is None else amplitude[inside]
            maximum = float(np.quantile(known, 0.95)) if known.size else 0.0
    lit = magnitude is not None
    available = (True, several, True, lit, lit, lit)
    chosen = tuple(bool(a and b) for a, b in zip(use, available, strict=True))
    return _edge_weights(phase[echo], second, ratio, amplitude, maximum, chosen)


def _costs(weights: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Integer costs 1 to 255 of the edges between voxels ``inside``; 0 is no edge."""
    scaled = torch.from_numpy(weights).mul(-1).add_(1).mul_(255).round_().clamp_(1, 255)
    costs = scaled.to(torch.uint8).numpy()
    for axis in range(3):
        along = np.moveaxis(costs[..., axis], axis, 0)
        within = np.moveaxis(inside, axis, 0)
        along[:-1] *= within[:-1] & within[1:]
        along[-1] = 0
    return costs


def _run(
    phase: np.ndarray, costs: np.ndarray, seed: int, region: np.ndarray, wraps: np.ndarray
) -> int:
    """Call :func:`_grow` with images; ``region`` and ``wraps`` are written to."""
    _, y, z = phase.shape
    below = np.empty(costs.size, np.int32 if costs.size < 2**31 else np.int64)
    return _grow(
        phase.reshape(-1), costs.reshape(-1), (y * z, z, 1), seed,
        region.reshape(-1), wraps.reshape(-1), below,
    )  # fmt: skip


def _unwrap_space(
    phase: np.ndarray, costs: np.ndarray, inside: np.ndarray, zooms: Zooms
) -> np.ndarray:
    """How many times 2 pi to add to every voxel of one echo, (X, Y, Z) int32."""
    region = np.where(inside, 0, -1).astype(np.int32)
    wraps = np.zeros(phase.shape, np.int32)
    best = np.where(costs == 0, 255, costs).min(-1).astype(np.int32)
    best[~inside] = 256
    count = _run(phase, costs, int(best.argmin()), region, wraps)
    if count > 1:
        merge_regions(phase, wraps, region, count, zooms)
    return wraps


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
    wrapped = phase.detach().cpu().reshape(-1, *phase.shape[-3:])
    inside = mask.cpu()
    known = inside.numpy()
    values = _as_array(wrapped)
    amplitude = None if magnitude is None else _as_array(magnitude.reshape(wrapped.shape))
    template_costs = np.empty(0, np.uint8)

    def in_space(echo: int) -> Tensor:
        nonlocal template_costs
        edges = _weights(values, amplitude, echo, echo_times, WEIGHTS[weights], known)
        costs = _costs(edges, known)
        if echo == template - 1 and not individual:
            template_costs = costs
        return torch.from_numpy(_unwrap_space(values[echo], costs, known, zooms))

    def regrow(echo: int, turns: Tensor, doubt: Tensor) -> Tensor:
        region = (inside.int() - doubt.int() - (~inside).int()).numpy()
        wraps = turns.nan_to_num().int()
        _run(values[echo], template_costs, -1, region, wraps.numpy())
        return wraps.to(turns.dtype)

    unwrapped = unwrap_echoes(
        wrapped, inside, in_space, echo_times=echo_times, template=template,
        individual=individual, correct_global=correct_global, uncertain=uncertain, regrow=regrow,
    )  # fmt: skip
    return unwrapped.reshape(phase.shape).to(phase.device)


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
    edges = np.nan_to_num(
        _weights(values, amplitude, 0, echo_times, WEIGHTS["romeo"]), copy=False, nan=0.0
    )
    total = edges.sum(-1)
    for axis in range(3):
        before = np.moveaxis(edges[..., axis], axis, 0)
        np.moveaxis(total, axis, 0)[1:] += before[:-1]
    return torch.from_numpy(total / 6).to(device=phase.device, dtype=phase.dtype)
