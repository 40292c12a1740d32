"""What all unwrapping methods ask of their input, and what exact ones share."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.grids import check_finite, surrounded

TWO_PI = 2 * math.pi

SAMPLE = 100_000
"""Voxels that decide on the multiple of 2 pi of the whole template."""

TURN_PENALTY = 0.01
"""Disagreement between echoes (2 pi) that one more turn of the whole template must save."""


def check(
    phase: Tensor,
    mask: Tensor | None = None,
    *,
    magnitude: Tensor | None = None,
    echo_times: Sequence[float] | None = None,
) -> None:
    """Insist on one grid and one number of echoes.

    Raises
    ------
    ValueError
        If they differ, an echo time is not positive, or phase or magnitude is not finite inside.
    """
    if phase.ndim not in (3, 4):
        msg = f"phase {tuple(phase.shape)} must be (X, Y, Z) or (E, X, Y, Z)"
        raise ValueError(msg)
    if mask is not None and mask.shape != phase.shape[-3:]:
        msg = f"phase {tuple(phase.shape)} and mask {tuple(mask.shape)} are on different grids"
        raise ValueError(msg)
    if magnitude is not None and magnitude.shape != phase.shape:
        msg = (
            f"phase {tuple(phase.shape)} and magnitude {tuple(magnitude.shape)} differ in grid or "
            "number of echoes"
        )
        raise ValueError(msg)
    if mask is not None:
        check_finite(phase, mask, "phase")
        if magnitude is not None:
            check_finite(magnitude, mask, "magnitude")
    echoes = len(phase) if phase.ndim == 4 else 1
    if echo_times is not None and len(echo_times) != echoes:
        msg = f"phase has {echoes} echoes and echo_times {len(echo_times)}: give one time per echo"
        raise ValueError(msg)
    if echo_times is not None and not all(0 < time < math.inf for time in echo_times):
        msg = f"echo_times {tuple(echo_times)} must be positive (s)"
        raise ValueError(msg)


def unwrap_echoes(
    wrapped: Tensor,
    inside: Tensor,
    in_space: Callable[[int], Tensor],
    *,
    echo_times: Sequence[float] | None,
    template: int,
    individual: bool,
    correct_global: bool = True,
    uncertain: float = 1.0,
    regrow: Callable[[int, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Unwrap the template echo in space and the others by its phase, or each one in space.

    Parameters
    ----------
    wrapped : (E, X, Y, Z) real tensor
        Wrapped phase (rad).
    inside : (X, Y, Z) bool tensor
        Where to unwrap.
    in_space : callable
        From an echo's index to how many times 2 pi are to be added, (X, Y, Z).
    echo_times : sequence of float, optional
        In s; needed for more than one echo.
    template : int
        Number of the template echo, from 1.
    individual : bool
        Unwrap each echo in space.
    correct_global : bool
        Shift whole echoes by what their voxels have in common.
    uncertain : float
        Deviation (pi) from what the neighbour in time foretells beyond which ``regrow`` decides.
    regrow : callable, optional
        From an echo's index, its turns, and where these are in doubt, to better ones.

    Returns
    -------
    (E, X, Y, Z) tensor
        0 outside.

    Raises
    ------
    ValueError
        If echo times are missing or there is no such template.
    """
    echoes = len(wrapped)
    if echo_times is None:
        if echoes > 1:
            msg = f"phase has {echoes} echoes and no echo_times: give one time per echo (s)"
            raise ValueError(msg)
        echo_times = [1.0]
    if not 1 <= template <= echoes:
        msg = f"template {template} is not an echo: phase has {echoes}, counted from 1"
        raise ValueError(msg)
    unwrapped = torch.zeros_like(wrapped)
    if not inside.any():
        return unwrapped
    first = template - 1
    unwrapped[first] = wrapped[first] + TWO_PI * in_space(first)
    if correct_global:
        other, ratio = None, 1.0
        if echoes > 1:
            near = first + 1 if template < echoes else first - 1
            other, ratio = wrapped[near], echo_times[near] / echo_times[first]
        unwrapped[first] += TWO_PI * _global_turns(unwrapped[first], other, ratio, inside)
    for echo in [*range(first - 1, -1, -1), *range(first + 1, echoes)]:
        near = echo + 1 if echo < first else echo - 1
        foretold = unwrapped[near] * (echo_times[echo] / echo_times[near])
        if individual:
            unwrapped[echo] = wrapped[echo] + TWO_PI * in_space(echo)
            if correct_global:
                turns = (foretold - unwrapped[echo])[inside] / TWO_PI
                unwrapped[echo] += TWO_PI * turns.round().median()
        else:
            exact = (foretold - wrapped[echo]) / TWO_PI
            turns = exact.round()
            if regrow is not None:
                doubt = inside & ((exact - turns).abs() > uncertain / 2)
                if doubt.any():
                    turns = regrow(echo, turns, doubt)
            unwrapped[echo] = wrapped[echo] + TWO_PI * turns
    return torch.where(inside, unwrapped, 0.0)


def _global_turns(phase: Tensor, other: Tensor | None, ratio: float, inside: Tensor) -> int:
    """How many times 2 pi to add to an unwrapped echo, from what its voxels have in common.

    The median number of turns becomes 0, or up to 2 away where that agrees clearly better with
    the ``other`` echo, whose phase is ``ratio`` times as large.
    """
    values = phase[inside]
    middle = -int((values / TWO_PI).round().median())
    if other is None:
        return middle
    step = max(1, len(values) // SAMPLE)
    values, second = values[::step], other[inside][::step]

    def disagreement(turns: int) -> float:
        exact = ((values + TWO_PI * (middle + turns)) * ratio - second) / TWO_PI
        return float((exact - exact.round()).abs().median()) + TURN_PENALTY * abs(turns)

    return middle + min((0, 1, -1, 2, -2), key=disagreement)


def merge_regions(
    phase: np.ndarray, wraps: np.ndarray, region: np.ndarray, count: int, zooms: Zooms
) -> None:
    """Shift every region by the multiple of 2 pi that brings it closest to the largest one.

    Each voxel at the surface of a region, within one voxel of its shortest distance to the largest
    region, votes with the difference to the nearest voxel there; the median decides.
    """
    main = int(np.bincount(region[region > 0]).argmax())
    here, surface = (_surface(part) for part in ((region > 0) & (region != main), region == main))
    far, nearest = cKDTree(np.stack(surface, axis=1) * zooms).query(np.stack(here, axis=1) * zooms)
    there = tuple(index[nearest] for index in surface)
    label = region[here]
    shortest = np.full(count + 1, np.inf)
    np.minimum.at(shortest, label, far)
    facing = far <= shortest[label] + max(zooms)

    turns = (phase[there].astype(np.float64) - phase[here]) / TWO_PI
    votes = (np.rint(turns).astype(np.int32) + wraps[there] - wraps[here])[facing]
    label = label[facing]
    order = np.lexsort((votes, label))
    label, votes = label[order], votes[order]
    number, start, size = np.unique(label, return_index=True, return_counts=True)
    shift = np.zeros(count + 1, np.int32)
    shift[number] = votes[start + (size - 1) // 2]
    wraps += shift[region]


def _surface(part: np.ndarray) -> tuple[np.ndarray, ...]:
    """Find the voxels of (X, Y, Z) bool that are not surrounded by others."""
    return np.nonzero(part & ~surrounded(torch.from_numpy(part)).numpy())
