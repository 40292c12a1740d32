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
    direction,
    not_negative,
    positive,
    stops_below,
)
from qsmpipe.numerics.background.laplace import (
    HARPERELLA_LAMBDA,
    HARPERELLA_MAX_ITERATIONS,
    HARPERELLA_RADIUS,
    HARPERELLA_TOLERANCE,
    LBV_MAX_ITERATIONS,
    LBV_PEEL,
    LBV_TOLERANCE,
    harperella,
    lbv,
)
from qsmpipe.numerics.background.pdf import PDF_MARGIN, PDF_MAX_ITERATIONS, PDF_TOLERANCE, pdf
from qsmpipe.numerics.background.sharp import (
    ISMV_MAX_ITERATIONS,
    ISMV_RADIUS,
    ISMV_TOLERANCE,
    RESHARP_LAMBDA,
    RESHARP_MAX_ITERATIONS,
    RESHARP_RADIUS,
    RESHARP_TOLERANCE,
    SHARP_RADIUS,
    SHARP_THRESHOLD,
    VSHARP_RADII,
    VSHARP_THRESHOLD,
    ismv,
    resharp,
    sharp,
    vsharp,
)


class _BackgroundInputSpec(StageInputSpec):
    field = File(exists=True, mandatory=True, desc="total field (ppm), 3D or volumes last")
    mask = File(exists=True, mandatory=True, desc="where `field` is known, on its grid")
    noise = File(exists=True, desc="standard deviation of `field` up to a scale, 3D, on its grid")
    b0_direction = direction("field")


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


class _SharpInputSpec(_BackgroundInputSpec):
    radius = positive(SHARP_RADIUS, "ball radius (mm), which the mask loses at its edge")
    threshold = traits.Range(
        low=0.0,
        high=1.0,
        value=SHARP_THRESHOLD,
        usedefault=True,
        desc="smallest value of the high-pass filter that is inverted",
    )


class Sharp(_Background):
    """Remove the background by SHARP (:func:`qsmpipe.numerics.background.sharp.sharp`)."""

    input_spec = _SharpInputSpec
    method = "sharp"
    function = staticmethod(sharp)


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


class _ISMVInputSpec(_BackgroundInputSpec):
    radius = positive(ISMV_RADIUS, "ball radius (mm), which the mask loses at its edge")
    tolerance = stops_below(ISMV_TOLERANCE, "relative residual that stops")
    max_iterations = at_most(ISMV_MAX_ITERATIONS)


class ISMV(_Background):
    """Remove the background by iSMV (:func:`qsmpipe.numerics.background.sharp.ismv`)."""

    input_spec = _ISMVInputSpec
    method = "ismv"
    function = staticmethod(ismv)


class _LBVInputSpec(_BackgroundInputSpec):
    peel = not_negative(LBV_PEEL, "radius of the ball that erodes the mask first (mm)")
    tolerance = stops_below(LBV_TOLERANCE, "relative residual of the Laplacian that stops")
    max_iterations = at_most(LBV_MAX_ITERATIONS)


class LBV(_Background):
    """Solve for the background (:func:`qsmpipe.numerics.background.laplace.lbv`)."""

    input_spec = _LBVInputSpec
    method = "lbv"
    function = staticmethod(lbv)


class _HarperellaInputSpec(_BackgroundInputSpec):
    radius = positive(HARPERELLA_RADIUS, "radius of the ball over which means are even (mm)")
    lambda_ = not_negative(HARPERELLA_LAMBDA, "weight of the norm of the Laplacian outside")
    tolerance = stops_below(
        HARPERELLA_TOLERANCE, "relative residual of the normal equations that stops"
    )
    max_iterations = at_most(HARPERELLA_MAX_ITERATIONS)


class Harperella(_Background):
    """Complete the Laplacian (:func:`qsmpipe.numerics.background.laplace.harperella`)."""

    input_spec = _HarperellaInputSpec
    method = "harperella"
    function = staticmethod(harperella)


class _PDFInputSpec(_BackgroundInputSpec):
    margin = not_negative(
        PDF_MARGIN, "zeros between the mask and its periodic image, where sources may lie (mm)"
    )
    tolerance = stops_below(PDF_TOLERANCE, "part of the rest that sources could still explain")
    max_iterations = at_most(PDF_MAX_ITERATIONS)


class PDF(_Background):
    """Project onto dipoles outside (:func:`qsmpipe.numerics.background.pdf.pdf`)."""

    input_spec = _PDFInputSpec
    method = "pdf"
    function = staticmethod(pdf)
