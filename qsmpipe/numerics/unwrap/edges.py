"""How reliable the edges between neighbours are: the weights of ROMEO.

The loops are compiled by numba with strict IEEE arithmetic: the path of the growth hangs on the
last bit of every weight, so that the result depends on neither the number of threads nor the
vector width.
"""

import math
from collections.abc import Sequence

import numpy as np

from qsmpipe.numerics.compiled import compiled, in_pieces

KINDS = 6
"""Phase coherence, phase gradient coherence, phase linearity, magnitude coherence, and two that
favour magnitudes above and below half the maximum."""

GAIN = 0.9
"""Each kind of weight is between 1 less this and 1."""

LOOSE = 0.9
"""Linearity where the grid ends before it can be told."""

NONE, ALL, HALF, TWO = np.float32(0), np.float32(1), np.float32(0.5), np.float32(2)
TURN, PER_TURN = np.float32(2 * math.pi), np.float32(1 / (2 * math.pi))
PER_PI, UNTOLD = np.float32(1 / math.pi), np.float32(LOOSE)


@compiled(nogil=True, error_model="numpy")
def _weights_along(
    start: int,
    stop: int,
    phase: np.ndarray,
    second: np.ndarray,
    magnitude: np.ndarray,
    gains: np.ndarray,
    ratio: float,
    half: float,
    grid: tuple[int, int, int],
    weights: np.ndarray,
) -> None:
    """Weights of the edges along one axis, for the lines ``start`` to ``stop`` of flat images.

    ``grid`` is the length of a line, the distance of neighbours in the flat image, and how many of
    them there are in a row. Where the axis ends there is no edge: the weight is 0.
    """
    line, stride, count = grid
    coherent, matched, linear, alike, bright, dark = gains
    for number in range(start, stop):
        begin = number * line
        weight = weights[begin : begin + line]
        weight[:] = NONE
        size, first, last = line, 0, line
        if stride == 1:
            size, first, last = line - 1, 1, line - 2
        else:
            place = (begin // stride) % count
            if place + 1 == count:
                continue
            if place == 0 or place + 2 == count:
                last = 0
        here, there = phase[begin : begin + size], phase[begin + stride :]
        for i in range(size):
            weight[i] = (ALL - linear) + linear * UNTOLD
        if last > first:
            before, after = phase[begin + first - stride :], phase[begin + 2 * stride :]
            for i in range(first, last):
                left = before[i - first] - TWO * here[i] + there[i]
                left = ALL - abs(left - TURN * np.rint(left * PER_TURN)) * HALF
                right = here[i] - TWO * there[i] + after[i]
                right = ALL - abs(right - TURN * np.rint(right * PER_TURN)) * HALF
                left = HALF if left != left else max(left, NONE)
                right = HALF if right != right else max(right, NONE)
                weight[i] = (ALL - linear) + linear * left * right
        other, others = second[begin : begin + size], second[begin + stride :]
        a, b = magnitude[begin : begin + size], magnitude[begin + stride :]
        for i in range(size):
            step = there[i] - here[i]
            step -= TURN * np.rint(step * PER_TURN)
            match = others[i] - other[i]
            match -= TURN * np.rint(match * PER_TURN)
            match = ALL - abs(step - match * ratio)
            small, large = min(a[i], b[i]), max(a[i], b[i])
            share = small / large if large > NONE else NONE
            above = small / half if small < half else ALL
            below = half / large if large > half else ALL
            value = weight[i] * ((ALL - coherent) + coherent * (ALL - abs(step) * PER_PI))
            value *= (ALL - matched) + matched * (match if match > NONE else NONE)
            value *= (ALL - alike) + alike * share * share
            value *= (ALL - bright) + bright * (HALF + HALF * above)
            weight[i] = value * ((ALL - dark) + dark * (HALF + HALF * below))


def edge_weights(
    phase: np.ndarray,
    magnitude: np.ndarray | None,
    echo: int,
    echo_times: Sequence[float] | None,
    use: Sequence[bool],
    inside: np.ndarray | None = None,
) -> np.ndarray:
    """Weight in [0, 1] of the edge from every voxel to its next along each axis.

    Parameters
    ----------
    phase : (E, X, Y, Z) float32 array
        Wrapped phase (rad).
    magnitude : (E, X, Y, Z) float32 array, optional
        In any unit.
    echo : int
        Index of the echo whose edges are weighed.
    echo_times : sequence of float, optional
        In s; without them the echo counts alone.
    use : sequence of bool
        Which of the :data:`KINDS` count; those that lack their data do not.
    inside : (X, Y, Z) bool array, optional
        Voxels that the maximum of the magnitude is taken among.

    Returns
    -------
    (3, X, Y, Z) float32 array
        0 where the grid ends; NaN where the phase is.
    """
    other = echo - 1 if echo > 0 else 1
    several = echo_times is not None and len(phase) > 1
    second = phase[other] if several else phase[echo]
    ratio = echo_times[echo] / echo_times[other] if several and echo_times is not None else 1.0
    amplitude, maximum = phase[echo], 1.0
    if magnitude is not None:
        amplitude = magnitude[echo]
        if not np.isfinite(amplitude.sum()):
            amplitude = np.nan_to_num(amplitude, nan=0.0, posinf=0.0, neginf=0.0)
        if use[4] or use[5]:
            known = amplitude if inside is None else amplitude[inside]
            maximum = float(np.quantile(known, 0.95)) if known.size else 0.0
    lit = magnitude is not None
    available = (True, several, True, lit, lit, lit)
    gains = np.where(np.logical_and(use, available), GAIN, 0).astype(np.float32)
    shape = phase.shape[1:]
    weights = np.empty((3, *shape), np.float32)
    flat = [np.ascontiguousarray(image).reshape(-1) for image in (phase[echo], second, amplitude)]
    for axis, stride in enumerate((shape[1] * shape[2], shape[2], 1)):
        in_pieces(
            _weights_along, shape[0] * shape[1],
            *flat, gains, np.float32(ratio), np.float32(maximum / 2),
            (shape[2], stride, shape[axis]), weights[axis].reshape(-1),
        )  # fmt: skip
    return weights
