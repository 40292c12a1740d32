"""Nipype interfaces to :mod:`qsmpipe.numerics.field`, one for each method of the stage."""

from pathlib import Path

import torch
from nipype.interfaces.base import File, traits

from qsmpipe import images
from qsmpipe.interfaces.base import Stage, StageInputSpec, StageOutputSpec, interfaces_of
from qsmpipe.methods import METHODS

__all__ = [row.interface for row in METHODS["field"].values()]


class _FieldInputSpec(StageInputSpec):
    phase = File(exists=True, mandatory=True, desc="unwrapped phase (rad), echoes last")
    mask = File(exists=True, mandatory=True, desc="where to compute, on the grid of `phase`")
    magnitude = File(exists=True, mandatory=True, desc="magnitude, on the grid of `phase`")
    echo_times = traits.List(traits.Float, mandatory=True, desc="echo times (s)")
    field_strength = traits.Float(mandatory=True, desc="B0 (T)")


class _FieldOutputSpec(StageOutputSpec):
    field = File(exists=True, desc="total field (ppm); 0 outside `mask`")
    noise = File(exists=True, desc="standard deviation of `field` (ppm); 0 outside `mask`")
    residual = File(exists=True, desc="signal that the fit leaves over the signal itself")


class _Field(Stage):
    input_spec, output_spec = _FieldInputSpec, _FieldOutputSpec
    stage = "field"

    def _compute(self, cwd: Path, device: torch.device) -> None:
        inputs, like = self.inputs, self.inputs.phase
        phase = images.load(like, device=device)
        magnitude = images.load(inputs.magnitude, like=like, device=device)
        result = self._call(
            phase if phase.ndim == 4 else phase[None],
            images.load(inputs.mask, like=like, dtype=torch.bool, device=device),
            magnitude=magnitude if magnitude.ndim == 4 else magnitude[None],
            echo_times=inputs.echo_times,
            field_strength=inputs.field_strength,
        )
        self._record(result.convergence)
        for name in ("field", "noise", "residual"):
            path = cwd / f"{name}.nii"
            self._results[name] = images.save(getattr(result, name), path, like=like)


__getattr__ = interfaces_of("field", lambda row: _Field)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
