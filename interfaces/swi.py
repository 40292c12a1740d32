"""Nipype interfaces to :mod:`qsmpipe.numerics.swi`."""

from pathlib import Path
from typing import get_args

import torch
from nipype.interfaces.base import File, traits

from qsmpipe import images
from qsmpipe.interfaces.base import (
    Stage,
    StageInputSpec,
    StageOutputSpec,
    direction,
    not_negative,
    positive,
)
from qsmpipe.numerics.swi import (
    DEFAULT_BIAS_SIGMA,
    DEFAULT_POWER,
    DEFAULT_RESOLUTION,
    DEFAULT_SIGMA,
    DEFAULT_STRENGTH,
    DEFAULT_THICKNESS,
    Kind,
    Window,
    clear,
    homodyne,
)


class _SWIInputSpec(StageInputSpec):
    phase = File(
        exists=True,
        mandatory=True,
        desc="phase (rad) that grows with the field, wrapped or not, echoes last",
    )
    magnitude = File(exists=True, mandatory=True, desc="magnitude, echoes last, on its grid")
    mask = File(exists=True, mandatory=True, desc="what to image, on the grid of `phase`")
    echo_times = traits.List(traits.Float, desc="echo times (s); for the methods that take them")
    b0_direction = direction("phase")
    darkens = traits.Enum(
        *get_args(Kind), usedefault=True, desc="darken where the field is raised, or lowered"
    )
    thickness = positive(DEFAULT_THICKNESS, "slab of the minimum intensity projection (mm)")


class _SWIOutputSpec(StageOutputSpec):
    swi = File(exists=True, desc="susceptibility-weighted image; 0 outside `mask`")
    minip = File(exists=True, desc="its minimum over a slab around each slice; 0 outside `mask`")


class _SWI(Stage):
    input_spec, output_spec = _SWIInputSpec, _SWIOutputSpec
    stage = "swi"

    def _compute(self, cwd: Path, device: torch.device) -> None:
        like = self.inputs.phase
        result = self._call_and_note(
            images.load(like, device=device),
            images.load(self.inputs.mask, like=like, dtype=torch.bool, device=device),
            images.zooms_of(like),
            **self._supplied(like=like, device=device),
        )
        for name, image in result._asdict().items():
            self._results[name] = images.save(image, cwd / f"{name}.nii.gz", like=like)


class _HomodyneInputSpec(_SWIInputSpec):
    resolution = positive(DEFAULT_RESOLUTION, "voxel size of the phase that is removed (mm)")
    window = traits.Enum(
        *get_args(Window), usedefault=True, desc="how the low-pass filter falls off"
    )
    per_slice = traits.Bool(
        True, usedefault=True, desc="filter within slices, not along all three axes"
    )
    power = not_negative(DEFAULT_POWER, "how often the phase mask is multiplied")


class Homodyne(_SWI):
    """Weight by homodyne-filtered phase (:func:`qsmpipe.numerics.swi.homodyne`)."""

    input_spec = _HomodyneInputSpec
    method = "homodyne"
    function = staticmethod(homodyne)


class _ClearInputSpec(_SWIInputSpec):
    sigma = positive(DEFAULT_SIGMA, "width of the high-pass filter of the phase (mm)")
    strength = positive(DEFAULT_STRENGTH, "how steeply the phase mask falls")
    bias_sigma = not_negative(
        DEFAULT_BIAS_SIGMA, "smoothness of the shading that is divided out (mm); 0 for none"
    )


class Clear(_SWI):
    """Weight by the field of all echoes (:func:`qsmpipe.numerics.swi.clear`)."""

    input_spec = _ClearInputSpec
    method = "clear"
    function = staticmethod(clear)
