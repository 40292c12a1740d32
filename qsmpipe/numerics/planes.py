"""Planes of an acquisition that have a phase offset of their own, as slices of 2D data may."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qsmpipe.numerics.grids import check_grid, check_signal
from qsmpipe.numerics.phase import wrap
from qsmpipe.numerics.units import check_echo_times

__all__ = ["PlaneSteps", "plane_offsets", "plane_steps"]

LEAST_SHARED = 0.02
"""Signal that neighbouring planes share, over the most that two share, to tell their offsets."""

ROUGH = LEAST_SHARED, 0.3
"""Signal shared and coherence from which a step counts for the roughness."""

CERTAIN = 0.3, 0.7
"""Signal shared and coherence from which a single step may count as a jump."""

CHANCE = 4.0
"""Coherence of noise is at most this over the root of the number of voxels."""


class PlaneSteps(NamedTuple):
    """How the phase offset changes from each plane to the next, (N - 1,)."""

    step: Tensor
    """Mean change (rad, in (-pi, pi]); 0 where too little signal is shared."""
    coherence: Tensor
    """Length of the mean phasor: 1 where all voxels agree, 0 where none do."""
    shared: Tensor
    """Weight of the voxels that have signal in both planes, 1 for the pair with most."""
    voxels: Tensor
    """How many voxels of equal weight tell as much."""

    @property
    def roughness(self) -> float:
        """How much the step changes from pair to pair (rad): the median.

        Below 0.1 for a smooth offset, pi / 2 where each plane has an offset at random.
        """
        return _typical(wrap(self._known(*ROUGH).diff()))

    @property
    def curvature(self) -> float:
        """How much the change of the step changes from pair to pair (rad): the median.

        Near 0 for a field however steep, if it is smooth.
        """
        return _typical(wrap(wrap(self._known(*ROUGH).diff()).diff()))

    @property
    def jump(self) -> float:
        """Largest deviation of a step from the mean of the two before it and the two after (rad).

        The first and the last two steps are not looked at.
        """
        known = self._known(*CERTAIN).double()
        if len(known) < 5:
            return 0.0
        around = torch.polar(torch.ones_like(known), known).unfold(0, 5, 1)
        middle = known[2:-2]
        mean = (around.sum(1) - around[:, 2]).angle()
        return wrap(middle - mean).abs().max().item()

    def _known(self, shared: float, coherence: float) -> Tensor:
        chance = CHANCE / self.voxels.clamp(min=1).sqrt()
        return self.step[(self.shared > shared) & (self.coherence > chance.clamp(min=coherence))]


def _typical(values: Tensor) -> float:
    return values.abs().median().item() if len(values) else 0.0


def plane_steps(
    phase: Tensor, magnitude: Tensor, *, echo_times: Sequence[float], axis: int = 2
) -> PlaneSteps:
    r"""Change of the phase offset from each plane to the next.

    Between neighbours the field is smooth, so that their differences need no unwrapping: with
    :math:`\delta` from one voxel to the next along ``axis``

    .. math:: \delta \varphi_0 = \delta \varphi_1
              - \frac{t_1}{t_2 - t_1} \delta (\varphi_2 - \varphi_1)

    whose mean phasor over a plane, weighted by the signal, is the step. Of a single echo it is the
    step of its phase, field included.

    Parameters
    ----------
    phase : (E, X, Y, Z) real tensor
        Phase (rad), wrapped or not; two echoes are used at most.
    magnitude : (E, X, Y, Z) real tensor
        Magnitude, in any unit.
    echo_times : sequence of float
        Echo times (s).
    axis : int
        Space axis (0, 1 or 2) that the planes follow one another along.

    Returns
    -------
    PlaneSteps
        Of (N - 1) pairs of planes.
    """
    times = check_echo_times(phase, echo_times)
    check_grid(phase, magnitude, ("phase", "magnitude"))
    phase = check_signal(phase[:2], magnitude[:2])
    images, amplitude = phase[:2].movedim(axis + 1, -1), magnitude[:2].movedim(axis + 1, -1)
    step = images[0].diff(dim=-1)
    if len(times) > 1:
        step = step - times[0] / (times[1] - times[0]) * wrap((images[1] - images[0]).diff(dim=-1))
    amplitude = amplitude.double().clamp(min=0).prod(0)
    weight = (amplitude[..., 1:] * amplitude[..., :-1]).sqrt()
    total = torch.polar(weight, step.double()).sum((0, 1))
    shared = weight.sum((0, 1))
    voxels = shared.square() / weight.square().sum((0, 1)).clamp(min=1e-300)
    coherence = total.abs() / shared.clamp(min=1e-300)
    shared = shared / shared.max().clamp(min=1e-300)
    return PlaneSteps(
        torch.where(shared > LEAST_SHARED, total.angle(), 0.0).to(phase),
        coherence.to(phase),
        shared.to(phase),
        voxels.to(phase),
    )


def plane_offsets(
    phase: Tensor, magnitude: Tensor, *, echo_times: Sequence[float], axis: int = 2
) -> Tensor:
    """Phase offset of each plane, alike in all echoes, as a 2D acquisition may have.

    The steps of :func:`plane_steps`, summed up. A smooth offset's mean slope along ``axis`` goes
    with them; what is left is smooth, and for :func:`~qsmpipe.numerics.phase.mcpc3ds` to remove.

    Parameters
    ----------
    phase : (E, X, Y, Z) real tensor
        Phase (rad), wrapped or not, of 2 or more echoes.
    magnitude : (E, X, Y, Z) real tensor
        Magnitude, in any unit.
    echo_times : sequence of float
        Echo times (s).
    axis : int
        Space axis (0, 1 or 2) that the planes follow one another along.

    Returns
    -------
    (N,) tensor
        In rad, in (-pi, pi]; 0 in the first plane.

    Raises
    ------
    ValueError
        For a single echo: the offset of a plane could not be told from the field in it.
    """
    if len(echo_times) < 2:
        msg = (
            "2 echoes tell the phase offset of a slice from the field in it, and there is "
            f"{len(echo_times)}: leave the slices as they are"
        )
        raise ValueError(msg)
    steps = plane_steps(phase, magnitude, echo_times=echo_times, axis=axis)
    return wrap(torch.nn.functional.pad(steps.step.cumsum(0), (1, 0)))
