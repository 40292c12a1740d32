"""What a chain of stages does: the methods of each stage, and their parameters."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge

from qsmpipe.methods import (
    METHODS,
    check_choice,
    method,
    names_in,
    needs_background,
    parameters_of,
)
from qsmpipe.tables import from_table


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
    mask_erosion: Annotated[float, Ge(0)] = 0.0
    """Erode the brain mask by this much (mm)."""
    mask_residual: Annotated[float, Ge(0)] = 0.0
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
    uncertainty: Annotated[int, Ge(0)] = 0
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

    def check(self) -> None:
        """Check every choice, and whether the choices go together.

        Raises
        ------
        ValueError
            Naming the choice, its value and what it may be.
        """
        values = {name: value for name, value in vars(self).items() if name != "parameters"}
        from_table(Chain, values, "")
        for stage in METHODS:
            if stage in values:
                check_choice(stage, values[stage])
        if self.uncertainty and self.two_pass:
            msg = "the uncertainty of a map from two passes is not known: leave one of them out"
            raise ValueError(msg)
        inversions = self.methods("inversion")
        if self.uncertainty and method("inversion", inversions[0]).starts_from == "phase":
            msg = (
                f"the uncertainty of {inversions[0]} is not known, as it takes the phase and the "
                "noise is that of a field: choose another inversion, or leave the uncertainty out"
            )
            raise ValueError(msg)
        if needs_background(inversions) and not self.methods("background"):
            msg = (
                f"background cannot be {self.background!r} before {self.inversion}, which takes a "
                f"local field: choose from {', '.join(METHODS['background'])}"
            )
            raise ValueError(msg)
        self._check_parameters()

    def _check_parameters(self) -> None:
        """Refuse a stage, method or parameter that does not exist; unused methods may stand."""
        for stage, methods in self.parameters.items():
            if stage == "reference":
                continue
            if stage not in METHODS:
                msg = f"parameters: there is no stage {stage!r}: one of {', '.join(METHODS)}"
                raise ValueError(msg)
            for name, chosen in methods.items():
                known = parameters_of(stage, name)
                for parameter in chosen:
                    if parameter not in known:
                        takes = ", ".join(known) or "none"
                        msg = f"{stage} {name} has no parameter {parameter!r}; it has: {takes}"
                        raise ValueError(msg)


DEFAULT_CHAIN = Chain()
"""The chain that is run where nothing is chosen."""
