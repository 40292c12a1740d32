"""Nipype interfaces to :mod:`qsmpipe.numerics.unwrap`."""

from pathlib import Path

import torch
from nipype.interfaces.base import File, isdefined, traits

from qsmpipe import images
from qsmpipe.interfaces.base import Stage, StageInputSpec, StageOutputSpec
from qsmpipe.numerics.unwrap.bestpath import bestpath
from qsmpipe.numerics.unwrap.laplacian import laplacian
from qsmpipe.numerics.unwrap.romeo import DEFAULT_UNCERTAIN, WEIGHTS, romeo


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
        self._results["phase"] = images.save(phase, cwd / "unwrapped.nii.gz", like=like)


class _LaplacianInputSpec(_UnwrapInputSpec):
    boundary = traits.Enum(
        "mask", "neumann", "periodic", usedefault=True, desc="where the equations end"
    )


class Laplacian(_Unwrap):
    """Unwrap by the Laplacian (:func:`qsmpipe.numerics.unwrap.laplacian.laplacian`)."""

    input_spec = _LaplacianInputSpec
    method = "laplacian"
    function = staticmethod(laplacian)


class _ExactInputSpec(_UnwrapInputSpec):
    template = traits.Range(
        low=1, value=1, usedefault=True, desc="echo that is unwrapped in space, from 1"
    )
    individual = traits.Bool(
        False, usedefault=True, desc="unwrap each echo in space, not by its neighbour in time"
    )


class BestPath(_Unwrap):
    """Unwrap along the best path (:func:`qsmpipe.numerics.unwrap.bestpath.bestpath`)."""

    input_spec = _ExactInputSpec
    method = "bestpath"
    function = staticmethod(bestpath)


class _RomeoInputSpec(_ExactInputSpec):
    weights = traits.Enum(*WEIGHTS, usedefault=True, desc="what makes an edge reliable")
    uncertain = traits.Range(
        low=0.0,
        high=1.0,
        exclude_low=True,
        value=DEFAULT_UNCERTAIN,
        usedefault=True,
        desc="how far from the neighbour in time a voxel is unwrapped in space instead (pi)",
    )
    correct_global = traits.Bool(
        True, usedefault=True, desc="shift all by the multiple of 2 pi that brings the median to 0"
    )


class Romeo(_Unwrap):
    """Unwrap by ROMEO (:func:`qsmpipe.numerics.unwrap.romeo.romeo`)."""

    input_spec = _RomeoInputSpec
    method = "romeo"
    function = staticmethod(romeo)
