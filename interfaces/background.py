"""Nipype interfaces to :mod:`qsmpipe.numerics.background`."""

from pathlib import Path

import torch
from nipype.interfaces.base import File, traits

from qsmpipe import images
from qsmpipe.interfaces.base import (
    Stage,
    StageInputSpec,
    StageOutputSpec,
    at_most,
    not_negative,
    positive,
    stops_below,
)
from qsmpipe.numerics.background.pdf import PDF_MARGIN, PDF_MAX_ITERATIONS, PDF_TOLERANCE, pdf
from qsmpipe.numerics.background.sharp import (
    RESHARP_LAMBDA,
    RESHARP_MAX_ITERATIONS,
    RESHARP_RADIUS,
    RESHARP_TOLERANCE,
    VSHARP_RADII,
    VSHARP_THRESHOLD,
    resharp,
    vsharp,
)


class _BackgroundInputSpec(StageInputSpec):
    field = File(exists=True, mandatory=True, desc="total field (ppm), 3D or volumes last")
    mask = File(exists=True, mandatory=True, desc="where `field` is known, on its grid")
    noise = File(exists=True, desc="standard deviation of `field` up to a scale, 3D, on its grid")
    b0_direction = traits.List(
        traits.Float,
        minlen=3,
        maxlen=3,
        desc="unit vector along B0 in voxel axes; from the affine of `field` when not given",
    )


class _BackgroundOutputSpec(StageOutputSpec):
    field = File(exists=True, desc="field of the sources inside `mask` (ppm); 0 outside")
    mask = File(exists=True, desc="where the local field is trusted")


class _Background(Stage):
    input_spec, output_spec = _BackgroundInputSpec, _BackgroundOutputSpec
    stage = "background"

    def _compute(self, cwd: Path, device: torch.device) -> None:
        like = self.inputs.field
        local = self._call(
            images.load(like, device=device),
            images.load(self.inputs.mask, like=like, dtype=torch.bool, device=device),
            images.zooms_of(like),
            **self._supplied(like=like, device=device),
        )
        self._record(local.convergence)
        self._results["field"] = images.save(local.field, cwd / "local.nii.gz", like=like)
        self._results["mask"] = images.save(local.mask, cwd / "mask.nii.gz", like=like)


class _VSharpInputSpec(_BackgroundInputSpec):
    radii = traits.List(
        traits.Float, value=list(VSHARP_RADII), usedefault=True, desc="ball radii (mm)"
    )
    threshold = traits.Range(
        low=0.0,
        high=1.0,
        value=VSHARP_THRESHOLD,
        usedefault=True,
        desc="smallest value of the high-pass filter that is inverted",
    )


class VSharp(_Background):
    """Remove the background by V-SHARP (:func:`qsmpipe.numerics.background.sharp.vsharp`)."""

    input_spec = _VSharpInputSpec
    method = "vsharp"
    function = staticmethod(vsharp)


class _ResharpInputSpec(_BackgroundInputSpec):
    radius = positive(RESHARP_RADIUS, "ball radius (mm), which the mask loses at its edge")
    lambda_ = not_negative(RESHARP_LAMBDA, "weight of the local field's norm")
    tolerance = stops_below(RESHARP_TOLERANCE, "relative residual that stops")
    max_iterations = at_most(RESHARP_MAX_ITERATIONS)


class Resharp(_Background):
    """Remove the background by RESHARP (:func:`qsmpipe.numerics.background.sharp.resharp`)."""

    input_spec = _ResharpInputSpec
    method = "resharp"
    function = staticmethod(resharp)


class _PDFInputSpec(_BackgroundInputSpec):
    margin = not_negative(
        PDF_MARGIN, "zeros between the mask and its periodic image, where sources may lie (mm)"
    )
    tolerance = stops_below(PDF_TOLERANCE, "relative norm of the gradient that stops")
    max_iterations = at_most(PDF_MAX_ITERATIONS)


class PDF(_Background):
    """Project onto dipoles outside (:func:`qsmpipe.numerics.background.pdf.pdf`)."""

    input_spec = _PDFInputSpec
    method = "pdf"
    function = staticmethod(pdf)
