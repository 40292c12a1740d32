"""Nipype interfaces to :mod:`qsmpipe.numerics.relaxation`."""

from pathlib import Path

import torch
from nipype.interfaces.base import File, traits

from qsmpipe import images
from qsmpipe.interfaces.base import Stage, StageInputSpec, StageOutputSpec, at_most, stops_below
from qsmpipe.numerics.relaxation import (
    DEFAULT_MAX_ITERATIONS,
    DEFAULT_TOLERANCE,
    arlo,
    loglinear,
    nonlinear,
)


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
        result = self._call_and_note(
            images.load(like, device=device),
            images.load(self.inputs.mask, like=like, dtype=torch.bool, device=device),
            echo_times=self.inputs.echo_times,
        )
        self._record(result.convergence)
        for name in ("r2star", "t2star", "s0"):
            path = cwd / f"{name}.nii.gz"
            self._results[name] = images.save(getattr(result, name), path, like=like)


class LogLinear(_Relaxation):
    """Fit R2* log-linearly (:func:`qsmpipe.numerics.relaxation.loglinear`)."""

    method = "loglinear"
    function = staticmethod(loglinear)


class Arlo(_Relaxation):
    """Estimate R2* by ARLO (:func:`qsmpipe.numerics.relaxation.arlo`)."""

    method = "arlo"
    function = staticmethod(arlo)


class _NonlinearDecayInputSpec(_RelaxationInputSpec):
    noise_floor = traits.Union(
        traits.Range(low=0.0, value=0.0),
        traits.Enum("auto"),
        default_value=0.0,
        usedefault=True,
        desc="noise of real and imaginary part that the fit allows for (unit of `magnitude`); 0 "
        "for none, or auto: from the residuals",
    )
    tolerance = stops_below(DEFAULT_TOLERANCE, "a voxel is done when its signal moves less")
    max_iterations = at_most(DEFAULT_MAX_ITERATIONS, "steps at most")


class NonlinearDecay(_Relaxation):
    """Fit an exponential to the magnitude (:func:`qsmpipe.numerics.relaxation.nonlinear`)."""

    input_spec = _NonlinearDecayInputSpec
    method = "nonlinear"
    function = staticmethod(nonlinear)
