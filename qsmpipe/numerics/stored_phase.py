"""What scanners store phase as: ranges of numbers, and how to make radians of them."""

import math
from typing import NamedTuple

TURN = 2 * math.pi


class Rule(NamedTuple):
    """Phase in rad is ``slope * value + intercept``."""

    slope: float
    intercept: float
    text: str


class Range(NamedTuple):
    """Numbers that scanners store phase as."""

    least: float
    greatest: float
    rule: Rule


RANGES = (
    Range(-math.pi, math.pi, Rule(1.0, 0.0, "radians, -pi to pi")),
    Range(0.0, TURN, Rule(1.0, 0.0, "radians, 0 to 2 pi")),
    Range(-180.0, 180.0, Rule(math.pi / 180, 0.0, "degrees, -180 to 180")),
    Range(-3142.0, 3142.0, Rule(1e-3, 0.0, "milliradians, -3142 to 3142 (Philips, GE)")),
    Range(-4096.0, 4096.0, Rule(math.pi / 4096, 0.0, "-4096 to 4094 (Siemens)")),
    Range(0.0, 4096.0, Rule(math.pi / 2048, -math.pi, "0 to 4095 (Siemens, unscaled)")),
)
"""Noise fills a phase image, so that its extremes tell what it is stored as."""


def scale_of(least: float, greatest: float, *, manufacturer: str = "") -> Rule | None:
    """Known rule for phase that runs from ``least`` to ``greatest``; None if there is none.

    >>> scale_of(-4096, 4094).text
    '-4096 to 4094 (Siemens)'
    >>> scale_of(-17, 2000) is None
    True
    """
    for low, high, rule in RANGES:
        slack = 0.01 * (high - low)
        inside = low - slack <= least and greatest <= high + slack
        if inside and greatest - least > 0.93 * (high - low):
            return rule
    # Without background noise (a masked image) the range is not filled.
    if manufacturer.lower().startswith("siemens") and greatest - least > 1000:
        low, high, rule = RANGES[4] if least < 0 else RANGES[5]
        if low <= least and greatest <= high:
            return rule
    return None
