"""What all unwrapping methods ask of their input."""

import math
from collections.abc import Sequence

from torch import Tensor


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
        If they differ, or an echo time is not positive.
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
    echoes = len(phase) if phase.ndim == 4 else 1
    if echo_times is not None and len(echo_times) != echoes:
        msg = f"phase has {echoes} echoes and echo_times {len(echo_times)}: give one time per echo"
        raise ValueError(msg)
    if echo_times is not None and not all(0 < time < math.inf for time in echo_times):
        msg = f"echo_times {tuple(echo_times)} must be positive (s)"
        raise ValueError(msg)
