"""Between ppm of B0, Hz and radians; and what an echo time may be."""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

__all__ = ["GAMMA", "hz_per_ppm", "radians_per_ppm"]

GAMMA = 42.577478518
"""Gyromagnetic ratio of the proton over 2 pi (MHz/T, CODATA 2018)."""


def hz_per_ppm(field_strength: float) -> float:
    """Precession in 1 ppm of B0.

    Parameters
    ----------
    field_strength : float
        B0 (T).

    Returns
    -------
    float
        Frequency (Hz).

    Raises
    ------
    ValueError
        If B0 is not above 0.

    Examples
    --------
    >>> round(hz_per_ppm(3.0), 3)
    127.732
    """
    if not field_strength > 0:
        msg = f"field_strength {field_strength!r} is not above 0: give B0 in T"
        raise ValueError(msg)
    return GAMMA * field_strength


def radians_per_ppm(field_strength: float, echo_time: float) -> float:
    """Phase that 1 ppm of B0 collects until an echo.

    Parameters
    ----------
    field_strength : float
        B0 (T).
    echo_time : float
        In s.

    Returns
    -------
    float
        Phase (rad).

    Raises
    ------
    ValueError
        If B0 is not above 0.

    Examples
    --------
    >>> round(radians_per_ppm(3.0, 0.020), 2)
    16.05
    """
    return 2 * math.pi * hz_per_ppm(field_strength) * echo_time


def check_echo_times(
    images: Tensor, echo_times: Sequence[float], *, at_least: int = 1
) -> list[float]:
    """Echo times (s) as a list, if they fit the echoes of ``images`` (E, X, Y, Z).

    Raises
    ------
    ValueError
        If they are not one for each echo, not ascending, not in seconds, or too few.
    """
    times = [float(time) for time in echo_times]
    if images.ndim != 4 or images.shape[0] != len(times):
        msg = (
            f"images of shape {tuple(images.shape)} and {len(times)} echo times do not match: "
            "give (E, X, Y, Z) with one echo time for each of the E echoes"
        )
        raise ValueError(msg)
    if len(times) < at_least:
        msg = f"{len(times)} echo(es) given where {at_least} are needed"
        raise ValueError(msg)
    ascending = all(a < b for a, b in pairwise([0.0, *times]))
    if not ascending or times[-1] >= 1:
        msg = f"echo times {times} are not seconds above 0 in ascending order (are they in ms?)"
        raise ValueError(msg)
    return times
