"""Nipype interfaces to :mod:`qsmpipe.numerics.unwrap`, one for each method of the stage."""

from pathlib import Path

import torch
from nipype.interfaces.base import File, isdefined, traits

from qsmpipe import images
from qsmpipe.interfaces.base import Stage, StageInputSpec, StageOutputSpec, interfaces_of
from qsmpipe.methods import METHODS, Method

__all__ = [row.interface for row in METHODS["unwrap"].values()]


class _UnwrapInputSpec(StageInputSpec):
    phase = File(exists=True, mandatory=True, desc="wrapped phase (rad), 3D or echoes last")
    mask = File(exists=True, mandatory=True, desc="where to unwrap, on the grid of `phase`")
    magnitude = File(exists=True, desc="magnitude, on the grid of `phase`")
    echo_times = traits.List(traits.Float, desc="echo times (s), needed for several echoes")


class _UnwrapOutputSpec(StageOutputSpec):
    phase = File(exists=True, desc="unwrapped phase (rad), as the input; 0 outside `mask`")


class _Unwrap(Stage):
    input_spec, output_spec = _UnwrapInputSpec, _UnwrapOutputSpec
    stage = "unwrap"
    volumes = 16

    def _compute(self, cwd: Path, device: torch.device) -> None:
        inputs, like = self.inputs, self.inputs.phase
        supplied = {}
        if isdefined(inputs.magnitude):
            supplied["magnitude"] = images.load(inputs.magnitude, like=like, device=device)
        if isdefined(inputs.echo_times):
            supplied["echo_times"] = inputs.echo_times
        phase = self._call_and_note(
            images.load(like, device=device),
            images.load(inputs.mask, like=like, dtype=torch.bool, device=device),
            images.zooms_of(like),
            **supplied,
        )
        self._results["phase"] = images.save(phase, cwd / "unwrapped.nii", like=like)


class _Grow(_Unwrap):
    """Voxel after voxel, each where the last one led."""

    serial = True


def _base(row: Method) -> type[Stage]:
    return _Unwrap if row.interface == "Laplacian" else _Grow


__getattr__ = interfaces_of("unwrap", _base)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
