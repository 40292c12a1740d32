"""Nipype interface to :mod:`qsmpipe.numerics.reference`."""

from pathlib import Path

import torch
from nipype.interfaces.base import File, isdefined, traits

from qsmpipe import images
from qsmpipe.interfaces.base import Stage, StageInputSpec, StageOutputSpec
from qsmpipe.numerics.reference import reference


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
