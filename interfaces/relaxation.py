"""Nipype interfaces to :mod:`qsmpipe.numerics.relaxation`, one for each method of the stage."""

from pathlib import Path

import torch
from nipype.interfaces.base import File, traits

from qsmpipe import images
from qsmpipe.interfaces.base import Stage, StageInputSpec, StageOutputSpec, interfaces_of
from qsmpipe.methods import METHODS

__all__ = [row.interface for row in METHODS["relaxation"].values()]


class _RelaxationInputSpec(StageInputSpec):
    magnitude = File(exists=True, mandatory=True, desc="magnitude, echoes last")
    mask = File(exists=True, mandatory=True, desc="where to fit, on the grid of `magnitude`")
    echo_times = traits.List(traits.Float, mandatory=True, desc="echo times (s)")


class _RelaxationOutputSpec(StageOutputSpec):
    r2star = File(exists=True, desc="R2* (1/s); 0 outside `mask`")
    t2star = File(exists=True, desc="T2* (s); 0 outside `mask`")
    s0 = File(exists=True, desc="magnitude at echo time 0; 0 outside `mask`")


class _Relaxation(Stage):
    input_spec, output_spec = _RelaxationInputSpec, _RelaxationOutputSpec
    stage = "relaxation"
    serial = True

    def _compute(self, cwd: Path, device: torch.device) -> None:
        like = self.inputs.magnitude
        result = self._call_and_note(
            images.load(like, device=device),
            images.load(self.inputs.mask, like=like, dtype=torch.bool, device=device),
            echo_times=self.inputs.echo_times,
        )
        self._record(result.convergence)
        for name in ("r2star", "t2star", "s0"):
            path = cwd / f"{name}.nii"
            self._results[name] = images.save(getattr(result, name), path, like=like)


__getattr__ = interfaces_of("relaxation", lambda row: _Relaxation)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
