"""Nipype interfaces to :mod:`qsmpipe.numerics.relaxation`."""

from pathlib import Path

import torch
from nipype.interfaces.base import File, traits

from qsmpipe import images
from qsmpipe.interfaces.base import Stage, StageInputSpec, StageOutputSpec
from qsmpipe.numerics.relaxation import arlo, loglinear


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

    def _compute(self, cwd: Path, device: torch.device) -> None:
        like = self.inputs.magnitude
        result = self._call(
            images.load(like, device=device),
            images.load(self.inputs.mask, like=like, dtype=torch.bool, device=device),
            echo_times=self.inputs.echo_times,
        )
        for name, image in result._asdict().items():
            self._results[name] = images.save(image, cwd / f"{name}.nii.gz", like=like)


class LogLinear(_Relaxation):
    """Fit R2* log-linearly (:func:`qsmpipe.numerics.relaxation.loglinear`)."""

    method = "loglinear"
    function = staticmethod(loglinear)


class Arlo(_Relaxation):
    """Estimate R2* by ARLO (:func:`qsmpipe.numerics.relaxation.arlo`)."""

    method = "arlo"
    function = staticmethod(arlo)
