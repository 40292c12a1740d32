"""Nipype interfaces to :mod:`qsmpipe.numerics.masks.passes`."""

from pathlib import Path

import torch
from nipype.interfaces.base import File

from qsmpipe import images
from qsmpipe.interfaces.base import Stage, StageInputSpec, StageOutputSpec, takes
from qsmpipe.numerics.masks.passes import merge, reliable


@takes(reliable)
class _ReliableInputSpec(StageInputSpec):
    quality = File(exists=True, mandatory=True, desc="phase quality, 0 to 1, 3D")
    mask = File(exists=True, mandatory=True, desc="mask without holes, on the grid of `quality`")


class _ReliableOutputSpec(StageOutputSpec):
    mask = File(exists=True, desc="`mask` with holes where the phase is not reliable")


class Reliable(Stage):
    """Make the mask of the first pass (:func:`qsmpipe.numerics.masks.passes.reliable`)."""

    input_spec, output_spec = _ReliableInputSpec, _ReliableOutputSpec
    stage, method = "passes", "reliable"
    serial = True
    function = staticmethod(reliable)

    def _compute(self, cwd: Path, device: torch.device) -> None:
        like = self.inputs.mask
        mask = images.load(like, dtype=torch.bool)
        kept = self._call(images.load(self.inputs.quality, like=like), mask, images.zooms_of(like))
        self._step["parameters"]["share"] = round(int(kept.sum()) / int(mask.sum()), 4)
        self._results["mask"] = images.save(kept, cwd / "reliable.nii", like=like)


class _MergePassesInputSpec(StageInputSpec):
    chi_reliable = File(exists=True, mandatory=True, desc="map (ppm) of the mask with holes")
    chi_filled = File(exists=True, mandatory=True, desc="map (ppm) of the mask without, its grid")
    reliable = File(exists=True, mandatory=True, desc="where `chi_reliable` is known, its grid")


class _MergePassesOutputSpec(StageOutputSpec):
    chi = File(exists=True, desc="map (ppm) of the first pass, its holes filled by the second")


class MergePasses(Stage):
    """Join the maps of two passes (:func:`qsmpipe.numerics.masks.passes.merge`)."""

    input_spec, output_spec = _MergePassesInputSpec, _MergePassesOutputSpec
    stage, method = "passes", "merge"
    serial = True
    function = staticmethod(merge)

    def _compute(self, cwd: Path, device: torch.device) -> None:
        inputs, like = self.inputs, self.inputs.chi_reliable
        chi = merge(
            images.load(like, device=device),
            images.load(inputs.chi_filled, like=like, device=device),
            images.load(inputs.reliable, like=like, dtype=torch.bool, device=device),
        )
        self._results["chi"] = images.save(chi, cwd / "chi.nii", like=like)
