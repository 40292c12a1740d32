"""What the loops of all steps share."""

import torch
from torch import Tensor

from qsmpipe.numerics.compiled import compiled

PLANES = 8
"""Planes of the first axis that one thread takes at a time."""

# Divisions as IEEE has them: with Python's, that may raise, there are no vector instructions.
serial = compiled(error_model="numpy")
parallel = compiled(error_model="numpy", parallel=True)


def usable(tensor: Tensor) -> bool:
    """Whether loops take this tensor, and not torch."""
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)
