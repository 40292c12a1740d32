"""Susceptibility to field to multi-echo signal, and heads to start from.

What tests, examples and training share: :func:`fields` and :func:`simulate` for the physics,
:func:`analytic.head` for a head without a file, :mod:`labels` for real label maps.
"""

from qsmpipe.numerics.simulate.field import (
    AIR,
    Fields,
    FreeSpace,
    block_mean,
    fields,
    shim,
    upsample,
)
from qsmpipe.numerics.simulate.signal import Scan, Simulation, add_noise, simulate, voxel_signal
from qsmpipe.numerics.simulate.tissues import Tissue, TissueMaps, brain_of, maps_of

__all__ = [
    "AIR",
    "Fields",
    "FreeSpace",
    "Scan",
    "Simulation",
    "Tissue",
    "TissueMaps",
    "add_noise",
    "block_mean",
    "brain_of",
    "fields",
    "maps_of",
    "shim",
    "simulate",
    "upsample",
    "voxel_signal",
]
