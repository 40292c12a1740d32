"""Nipype interface to :mod:`qsmpipe.numerics.reference`."""

from pathlib import Path

import torch
from nipype.interfaces.base import File, isdefined, traits

from qsmpipe import images
from qsmpipe.interfaces.base import Stage, StageInputSpec, StageOutputSpec
from qsmpipe.numerics.reference import median_map, reference


class _ReferenceInputSpec(StageInputSpec):
    chi = File(exists=True, mandatory=True, desc="susceptibility (ppm)")
    mask = File(exists=True, mandatory=True, desc="where `chi` is known, on its grid")
    region = File(exists=True, desc="mask of the reference region, on the grid of `chi`")


class _ReferenceOutputSpec(StageOutputSpec):
    chi = File(exists=True, desc="susceptibility (ppm) relative to the region; 0 outside `mask`")
    value = traits.Float(desc="mean over the region (ppm), which was subtracted")
    deviation = traits.Float(desc="standard deviation over the region (ppm)")


class Reference(Stage):
    """Subtract a region's mean (:func:`qsmpipe.numerics.reference.reference`)."""

    input_spec, output_spec = _ReferenceInputSpec, _ReferenceOutputSpec
    stage, method = "reference", "brain"
    function = staticmethod(reference)

    def _compute(self, cwd: Path, device: torch.device) -> None:
        inputs, like = self.inputs, self.inputs.chi
        region = None
        if isdefined(inputs.region):
            region = images.load(inputs.region, like=like, dtype=torch.bool, device=device)
        result = reference(
            images.load(like, device=device),
            images.load(inputs.mask, like=like, dtype=torch.bool, device=device),
            region=region,
        )
        self._step["method"] = "brain" if region is None else "region"
        self._step["parameters"] = {
            "value": result.value, "deviation": result.deviation, "voxels": result.voxels,
        }  # fmt: skip
        self._results["chi"] = images.save(result.chi, cwd / "chi.nii.gz", like=like)
        self._results["value"] = result.value
        self._results["deviation"] = result.deviation


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
        self._results["chi"] = images.save(chi, cwd / "median.nii.gz", like=like)
