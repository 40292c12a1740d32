"""Nipype interfaces to :mod:`qsmpipe.numerics.masks`: each method of the stage, and more."""

import math
from pathlib import Path
from typing import Any

import torch
from nipype.interfaces.base import File, InputMultiObject, isdefined, traits

from qsmpipe import images
from qsmpipe.interfaces.base import (
    Stage,
    StageInputSpec,
    StageOutputSpec,
    interfaces_of,
    not_negative,
    takes,
)
from qsmpipe.methods import METHODS, Method
from qsmpipe.numerics.masks.morphology import (
    OPERATIONS,
    combine,
    erode,
    fill_holes,
    largest_component,
)
from qsmpipe.numerics.masks.residual import exclude_residual
from qsmpipe.numerics.unwrap.romeo import quality_map

__all__ = [
    "Combine",
    "ExcludeResidual",
    "Given",
    "QualityMap",
    "Refine",
    *(row.interface for row in METHODS["mask"].values()),
]


class _MaskOutputSpec(StageOutputSpec):
    mask = File(exists=True, desc="the mask")


class _Mask(Stage):
    """A mask of one image, on the CPU: the time goes into distances and components."""

    output_spec = _MaskOutputSpec
    stage = "mask"
    serial = True

    def _make(self, like: str, cwd: Path, **choices: Any) -> None:
        mask = self._call(images.load(like), images.zooms_of(like), **choices)
        self._keep(mask, cwd, like=like)

    def _keep(self, mask: torch.Tensor, cwd: Path, *, like: str) -> None:
        self._results["mask"] = images.save(mask, cwd / "mask.nii", like=like)


class _MagnitudeInputSpec(StageInputSpec):
    magnitude = File(exists=True, mandatory=True, desc="magnitude, 3D or echoes last")
    echo_times = traits.List(traits.Float, desc="echo times (s)")
    quality = File(exists=True, desc="phase quality; not used")


class _MagnitudeMask(_Mask):
    input_spec = _MagnitudeInputSpec

    def _compute(self, cwd: Path, device: torch.device) -> None:
        times = self.inputs.echo_times
        self._make(self.inputs.magnitude, cwd, echo_times=times if isdefined(times) else None)


class _QualityInputSpec(StageInputSpec):
    quality = File(exists=True, mandatory=True, desc="phase quality, 0 to 1, 3D")
    magnitude = File(exists=True, desc="magnitude; not used")


class _QualityMask(_Mask):
    input_spec = _QualityInputSpec

    def _compute(self, cwd: Path, device: torch.device) -> None:
        self._make(self.inputs.quality, cwd)


def _base(row: Method) -> type[Stage]:
    return _QualityMask if row.interface == "Quality" else _MagnitudeMask


class _QualityMapInputSpec(StageInputSpec):
    phase = File(exists=True, mandatory=True, desc="wrapped phase (rad), 3D or echoes last")
    magnitude = File(exists=True, desc="magnitude, on the grid of `phase`")
    echo_times = traits.List(traits.Float, desc="echo times (s)")


class _QualityMapOutputSpec(StageOutputSpec):
    quality = File(exists=True, desc="phase quality, 0 to 1, 3D")


class QualityMap(Stage):
    """Quality of the phase (:func:`qsmpipe.numerics.unwrap.romeo.quality_map`)."""

    input_spec, output_spec = _QualityMapInputSpec, _QualityMapOutputSpec
    stage, method = "mask", "quality_map"
    serial = True
    function = staticmethod(quality_map)

    def _compute(self, cwd: Path, device: torch.device) -> None:
        inputs, like = self.inputs, self.inputs.phase
        supplied: dict[str, Any] = {}
        if isdefined(inputs.magnitude):
            supplied["magnitude"] = images.load(inputs.magnitude, like=like)
        if isdefined(inputs.echo_times):
            supplied["echo_times"] = inputs.echo_times
        quality = quality_map(images.load(like), **supplied)
        self._results["quality"] = images.save(quality, cwd / "quality.nii", like=like)


class _GivenInputSpec(StageInputSpec):
    mask = File(exists=True, mandatory=True, desc="0 outside, another whole number inside")
    magnitude = File(exists=True, mandatory=True, desc="image on whose grid the mask must be")


class Given(_Mask):
    """Take the user's own mask: whole numbers on the image's grid; it is never resampled."""

    input_spec = _GivenInputSpec
    method = "given"

    def _compute(self, cwd: Path, device: torch.device) -> None:
        path, like = self.inputs.mask, self.inputs.magnitude
        if not images.same_grid(path, like):
            msg = (
                f"the mask {path} {images.shape_of(path)} is not on the grid of {like} "
                f"{images.shape_of(like)[:3]} (shape or affine): resample it there with nearest "
                "neighbours, a mask is never resampled here"
            )
            raise ValueError(msg)
        values = images.load(path)
        if values.ndim == 4 and len(values) == 1:
            values = values[0]
        if values.ndim != 3:
            msg = f"the mask {path} has {len(values)} volumes: give one"
            raise ValueError(msg)
        if not torch.equal(values, values.round()):
            msg = (
                f"the mask {path} has values that are no whole numbers (a probability map, or a "
                "mask that was interpolated?): apply a threshold first"
            )
            raise ValueError(msg)
        self._keep(values != 0, cwd, like=like)


class _CombineInputSpec(StageInputSpec):
    masks = InputMultiObject(File(exists=True), mandatory=True, desc="masks on one grid")
    operation = traits.Enum(*OPERATIONS, usedefault=True, desc="voxels of all masks, or of any")


class Combine(_Mask):
    """Join masks (:func:`qsmpipe.numerics.masks.morphology.combine`)."""

    input_spec = _CombineInputSpec
    method = "combine"
    function = staticmethod(combine)

    def _compute(self, cwd: Path, device: torch.device) -> None:
        like, operation = self.inputs.masks[0], self.inputs.operation
        masks = [images.load(path, like=like, dtype=torch.bool) for path in self.inputs.masks]
        self._step["parameters"] = {"operation": operation, "masks": len(masks)}
        self._keep(combine(masks, operation), cwd, like=like)


@takes(exclude_residual)
class _ExcludeResidualInputSpec(StageInputSpec):
    residual = File(
        exists=True,
        mandatory=True,
        desc="signal that the field fit leaves over the signal itself, 3D",
    )
    mask = File(exists=True, mandatory=True, desc="where `residual` is known, on its grid")


class ExcludeResidual(_Mask):
    """Drop what no field explains.

    See :func:`qsmpipe.numerics.masks.residual.exclude_residual`.
    """

    input_spec = _ExcludeResidualInputSpec
    method = "residual"
    function = staticmethod(exclude_residual)

    def _compute(self, cwd: Path, device: torch.device) -> None:
        like = self.inputs.residual
        mask = images.load(self.inputs.mask, like=like, dtype=torch.bool)
        kept = self._call(images.load(like), mask)
        self._step["parameters"]["excluded"] = int(mask.sum()) - int(kept.sum())
        self._keep(kept, cwd, like=like)


class _RefineInputSpec(StageInputSpec):
    mask = File(exists=True, mandatory=True, desc="what to refine")
    max_hole = traits.Float(desc="largest hole that is filled (mL); every hole by default")
    erosion = not_negative(0.0, "radius of the ball that erodes (mm)")


class Refine(_Mask):
    """Fill holes, erode, keep the largest component; an empty mask is refused."""

    input_spec = _RefineInputSpec
    method = "refine"

    def _compute(self, cwd: Path, device: torch.device) -> None:
        inputs, zooms = self.inputs, images.zooms_of(self.inputs.mask)
        limit = {"max_volume": inputs.max_hole} if isdefined(inputs.max_hole) else {}
        self._step["parameters"] = {"erosion": inputs.erosion, **limit}
        mask = images.load(inputs.mask, dtype=torch.bool)
        if not mask.any():
            msg = (
                "the mask was empty before it was refined: none of the methods found anything, or "
                "masks joined by & have no voxel in common. Look at the magnitude, or try another "
                "method (threshold, quality, bet), | instead of &, or a mask of your own. For an "
                "animal or a sample: the methods' lengths are for human heads; --preset "
                "small-animal has others"
            )
            raise ValueError(msg)
        mask = fill_holes(mask, zooms, **limit)
        volume = int(mask.sum()) * math.prod(zooms) / 1000
        mask = erode(mask, zooms, radius=inputs.erosion)
        if not mask.any():
            msg = (
                f"eroding by {inputs.erosion:g} mm emptied the mask, which held {volume:.3g} mL: "
                "erode less (mask erosion, in mm), or make a larger mask"
            )
            raise ValueError(msg)
        self._keep(largest_component(mask), cwd, like=inputs.mask)


__getattr__ = interfaces_of("mask", _base)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
