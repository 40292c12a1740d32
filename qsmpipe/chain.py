"""What a chain of stages does: the methods of each stage, and their parameters."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qsmpipe.methods import names_in


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Methods of all stages from the echoes to susceptibility, and their parameters.

    The defaults stand here and nowhere else. Methods are keys of
    :data:`qsmpipe.methods.METHODS`.
    """

    offset: str = "mcpc3ds"
    """Removal of the phase offset that all echoes share, or ``"none"``."""
    mask: str = "bet & quality"
    """A mask method, several joined by ``&``, ``|`` and brackets, or ``"given"`` for a mask of
    one's own."""
    mask_erosion: float = 0.0
    """Erode the brain mask by this much (mm)."""
    mask_residual: float = 0.0
    """Before the background is removed, leave voxels out whose relative residual of the field fit
    is larger, 0.3 for example; 0 for none."""
    unwrap: str = "romeo"
    """Unwrapping of the phase."""
    field: str = "weighted"
    """From the unwrapped phase of all echoes to the total field."""
    relaxation: str = "loglinear"
    """Fit of R2*, or ``"none"``."""
    swi: str = "none"
    """Susceptibility-weighted images, or ``"none"``."""
    background: str = "pdf"
    """A method, or several that follow on one another, as in ``"lbv+vsharp"``. It gives the local
    field, and may be ``"none"`` where no inversion starts from that."""
    inversion: str = "tfi"
    """A method, or several that share what comes before them, as in ``"tv,rts"``: the first one
    gives ``chi``."""
    reference: str = "brain"
    """``"brain"``, ``"none"``, ``"region"`` for the mean over the input ``region``, or ``"csf"``
    for the fluid of the ventricles, which needs R2*."""
    two_pass: bool = False
    """Map susceptibility where the phase is reliable and once more in the whole mask, and fill
    the holes of the first map from the second: sources that spoil the phase around them then
    spoil less of the map. It takes twice the time."""
    uncertainty: int = 0
    """With how many noisy fields to estimate the standard deviation of ``chi``; 0: not at all."""
    parameters: Mapping[str, Mapping[str, Mapping[str, Any]]] = dataclasses.field(
        default_factory=dict
    )
    """Stage to method to parameter to value, where the default is not wanted:
    ``{"inversion": {"tv": {"lambda_": 1e-4}}}``."""

    def methods(self, stage: str) -> tuple[str, ...]:
        """Names of the methods that ``stage`` runs; empty for ``none`` and ``given``."""
        return names_in(stage, getattr(self, stage))

    def parameters_of(self, stage: str, method: str) -> Mapping[str, Any]:
        """Parameters of a method that shall not have their default."""
        return self.parameters.get(stage, {}).get(method, {})


DEFAULT_CHAIN = Chain()
"""The chain that is run where nothing is chosen."""
