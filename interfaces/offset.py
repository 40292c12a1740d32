"""Nipype interfaces to the removal of the phase offset."""

from pathlib import Path

import torch
from nipype.interfaces.base import File, traits

from qsmpipe import images
from qsmpipe.interfaces.base import Stage, StageInputSpec, StageOutputSpec
from qsmpipe.numerics.phase import DEFAULT_SIGMA, mcpc3ds


class _OffsetInputSpec(StageInputSpec):
    phase = File(exists=True, mandatory=True, desc="phase (rad), echoes last")
    magnitude = File(exists=True, mandatory=True, desc="magnitude, on the grid of `phase`")
    echo_times = traits.List(traits.Float, mandatory=True, desc="echo times (s)")


class _OffsetOutputSpec(StageOutputSpec):
    phase = File(exists=True, desc="phase without the offset (rad) in (-pi, pi], echoes last")
    offset = File(exists=True, desc="phase at echo time 0 (rad)")
    difference = File(desc="what even echoes had beyond odd ones (rad), if bipolar")


class _Offset(Stage):
    input_spec, output_spec = _OffsetInputSpec, _OffsetOutputSpec
    stage = "offset"
    volumes = 40

    def _compute(self, cwd: Path, device: torch.device) -> None:
        like = self.inputs.phase
        result = self._call(
            images.load(like, device=device),
            images.load(self.inputs.magnitude, like=like, device=device),
            images.zooms_of(like),
            echo_times=self.inputs.echo_times,
        )
        self._record(result.convergence)
        self._results["phase"] = images.save(result.phase, cwd / "phase.nii", like=like)
        self._results["offset"] = images.save(result.offset, cwd / "offset.nii", like=like)
        if result.difference is not None:
            path = cwd / "difference.nii"
            self._results["difference"] = images.save(result.difference, path, like=like)


class _MCPC3DSInputSpec(_OffsetInputSpec):
    sigma = traits.Float(
        DEFAULT_SIGMA, usedefault=True, desc="standard deviation of the smoothing (mm)"
    )
    bipolar = traits.Bool(
        False, usedefault=True, desc="every second echo was read out in the opposite direction"
    )


class MCPC3DS(_Offset):
    """Remove the phase offset by MCPC-3D-S (:func:`qsmpipe.numerics.phase.mcpc3ds`)."""

    input_spec = _MCPC3DSInputSpec
    method = "mcpc3ds"
    function = staticmethod(mcpc3ds)
