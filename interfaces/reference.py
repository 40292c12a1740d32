"""Nipype interface to :mod:`qsmpipe.numerics.reference`."""

from pathlib import Path

import torch
from nipype.interfaces.base import File, isdefined, traits

from qsmpipe import images
from qsmpipe.interfaces.base import Stage, StageInputSpec, StageOutputSpec, takes
from qsmpipe.numerics.masks.ventricles import ventricles
from qsmpipe.numerics.reference import median_map, reference


class _ReferenceInputSpec(StageInputSpec):
    chi = File(exists=True, mandatory=True, desc="susceptibility (ppm)")
    mask = File(exists=True, mandatory=True, desc="where `chi` is known, on its grid")
    region = File(exists=True, desc="mask of the reference region, on the grid of `chi`")


class _ReferenceOutputSpec(StageOutputSpec):
    chi = File(exists=True, desc="susceptibility (ppm) relative to the region; 0 outside `mask`")
    value = traits.Float(desc="mean over the region (ppm), which was subtracted")
    deviation = traits.Float(desc="standard deviation over the region (ppm)")


class _Subtract(Stage):
    stage = "reference"
    serial = True

    def _subtract(
        self, mask: torch.Tensor, region: torch.Tensor | None, cwd: Path, device: torch.device
    ) -> None:
        like = self.inputs.chi
        result = reference(images.load(like, device=device), mask, region=region)
        self._step["parameters"] |= {
            "value": result.value, "deviation": result.deviation, "voxels": result.voxels,
        }  # fmt: skip
        self._results["chi"] = images.save(result.chi, cwd / "chi.nii", like=like)
        self._results["value"] = result.value
        self._results["deviation"] = result.deviation


class Reference(_Subtract):
    """Subtract a region's mean (:func:`qsmpipe.numerics.reference.reference`)."""

    input_spec, output_spec = _ReferenceInputSpec, _ReferenceOutputSpec
    method = "brain"
    function = staticmethod(reference)

    def _compute(self, cwd: Path, device: torch.device) -> None:
        inputs, like = self.inputs, self.inputs.chi
        region = None
        if isdefined(inputs.region):
            region = images.load(inputs.region, like=like, dtype=torch.bool, device=device)
        self._step["method"] = "brain" if region is None else "region"
        mask = images.load(inputs.mask, like=like, dtype=torch.bool, device=device)
        self._subtract(mask, region, cwd, device)


@takes(ventricles)
class _CSFReferenceInputSpec(StageInputSpec):
    chi = File(exists=True, mandatory=True, desc="susceptibility (ppm)")
    mask = File(exists=True, mandatory=True, desc="where `chi` is known, on its grid")
    r2star = File(exists=True, mandatory=True, desc="R2* (1/s), on the grid of `chi`")
    magnitude = File(exists=True, desc="magnitude, 3D or echoes last, on the grid of `chi`")


class _CSFReferenceOutputSpec(_ReferenceOutputSpec):
    region = File(exists=True, desc="the fluid whose mean was subtracted")


class CSFReference(_Subtract):
    """Subtract the mean over the ventricles' fluid.

    They are found by :func:`qsmpipe.numerics.masks.ventricles.ventricles`.
    """

    input_spec, output_spec = _CSFReferenceInputSpec, _CSFReferenceOutputSpec
    method = "csf"
    function = staticmethod(ventricles)

    def _compute(self, cwd: Path, device: torch.device) -> None:
        inputs, like = self.inputs, self.inputs.chi
        mask = images.load(inputs.mask, like=like, dtype=torch.bool, device=device)
        magnitude = None
        if isdefined(inputs.magnitude):
            magnitude = images.load(inputs.magnitude, like=like, device=device)
        region = self._call(
            images.load(inputs.r2star, like=like, device=device),
            mask,
            images.zooms_of(like),
            magnitude=magnitude,
        )
        self._results["region"] = images.save(region, cwd / "region.nii", like=like)
        self._subtract(mask, region, cwd, device)


class _MedianMapInputSpec(StageInputSpec):
    maps = traits.List(
        File(exists=True), mandatory=True, minlen=1, desc="susceptibility (ppm) by each method"
    )
    masks = traits.List(
        File(exists=True), mandatory=True, minlen=1, desc="where each map is known, on its grid"
    )


class _MedianMapOutputSpec(StageOutputSpec):
    chi = File(exists=True, desc="median of the maps (ppm), where all of them are known")


class MedianMap(Stage):
    """Take the median over methods (:func:`qsmpipe.numerics.reference.median_map`)."""

    input_spec, output_spec = _MedianMapInputSpec, _MedianMapOutputSpec
    stage, method = "median", "median"
    serial = True
    function = staticmethod(median_map)

    def _compute(self, cwd: Path, device: torch.device) -> None:
        like = self.inputs.maps[0]
        chi, _ = median_map(
            [images.load(path, like=like, device=device) for path in self.inputs.maps],
            [
                images.load(path, like=like, dtype=torch.bool, device=device)
                for path in self.inputs.masks
            ],
        )
        self._results["chi"] = images.save(chi, cwd / "median.nii", like=like)
