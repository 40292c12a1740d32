"""Nipype interfaces to :mod:`qsmpipe.numerics.inversion`."""

from pathlib import Path
from typing import Any

import torch
from nipype.interfaces.base import File, traits

from qsmpipe import images
from qsmpipe.interfaces.base import (
    Stage,
    StageInputSpec,
    StageOutputSpec,
    at_most,
    positive,
    stops_below,
)
from qsmpipe.methods import parameters_of
from qsmpipe.numerics.inversion import l2, rts, tkd, tv


def _defaults(method: str) -> dict[str, Any]:
    rows = parameters_of("inversion", method)
    return {name: parameter.default for name, parameter in rows.items()}


_TKD, _L2, _RTS, _TV = (_defaults(method) for method in ("tkd", "l2", "rts", "tv"))


class _InversionInputSpec(StageInputSpec):
    field = File(exists=True, mandatory=True, desc="field (ppm) of the sources inside `mask`")
    mask = File(exists=True, mandatory=True, desc="where `field` is known, on its grid")
    noise = File(
        exists=True,
        desc="standard deviation of `field`, on its grid; for the methods that weight the data",
    )
    magnitude = File(
        exists=True,
        desc="magnitude of all echoes combined, 3D; for the methods that use its edges",
    )
    r2star = File(exists=True, desc="R2* (1/s), 3D; for the methods that find the ventricles")
    echo_times = traits.List(
        traits.Float, desc="echo times (s); for the methods that work with phase"
    )
    field_strength = traits.Float(desc="B0 (T); for the methods that work with phase")
    b0_direction = traits.List(
        traits.Float,
        minlen=3,
        maxlen=3,
        desc="unit vector along B0 in voxel axes; from the affine of `field` when not given",
    )


class _InversionOutputSpec(StageOutputSpec):
    chi = File(exists=True, desc="susceptibility (ppm), not referenced; 0 outside `mask`")


class _Inversion(Stage):
    input_spec, output_spec = _InversionInputSpec, _InversionOutputSpec
    stage = "inversion"

    def _compute(self, cwd: Path, device: torch.device) -> None:
        like = self.inputs.field
        result = self._call(
            images.load(like, device=device),
            images.load(self.inputs.mask, like=like, dtype=torch.bool, device=device),
            images.zooms_of(like),
            **self._supplied(like=like, device=device),
        )
        self._record(result.convergence)
        self._step["parameters"] |= result.chosen
        self._results["chi"] = images.save(result.chi, cwd / "chi.nii.gz", like=like)


class _TKDInputSpec(_InversionInputSpec):
    threshold = traits.Range(
        low=0.0,
        high=2 / 3,
        exclude_low=True,
        value=_TKD["threshold"],
        usedefault=True,
        desc="least dipole kernel that is divided by",
    )


class TKD(_Inversion):
    """Divide by the thresholded kernel (:func:`qsmpipe.numerics.inversion.direct.tkd`)."""

    input_spec = _TKDInputSpec
    method = "tkd"
    function = staticmethod(tkd)


class _L2InputSpec(_InversionInputSpec):
    lambda_ = positive(_L2["lambda_"], "weight of the squared gradient (mm2)")


class L2(_Inversion):
    """Invert with the squared gradient (:func:`qsmpipe.numerics.inversion.direct.l2`)."""

    input_spec = _L2InputSpec
    method = "l2"
    function = staticmethod(l2)


class _RTSInputSpec(_InversionInputSpec):
    delta = traits.Range(
        low=0.0,
        high=2 / 3,
        value=_RTS["delta"],
        usedefault=True,
        desc="least dipole kernel whose frequencies the first step determines",
    )
    mu = positive(
        _RTS["mu"], "weight of those frequencies against the total variation (1/(ppm mm))"
    )
    rho = positive(_RTS["rho"], "penalty of the split at the start (mm/ppm)")
    tolerance = stops_below(_RTS["tolerance"])
    max_iterations = at_most(_RTS["max_iterations"])


class RTS(_Inversion):
    """Invert in two rapid steps (:func:`qsmpipe.numerics.inversion.rts.rts`)."""

    input_spec = _RTSInputSpec
    method = "rts"
    function = staticmethod(rts)


class _TVInputSpec(_InversionInputSpec):
    lambda_ = traits.Union(
        traits.Float,
        traits.Enum("auto"),
        default_value=_TV["lambda_"],
        usedefault=True,
        desc='weight of the total variation (ppm mm), or "auto" to follow the noise',
    )
    rho = positive(_TV["rho"], "penalty of the gradient's split over lambda (mm/ppm): speed only")
    mu = positive(_TV["mu"], "penalty of the field's split: speed only")
    tolerance = stops_below(_TV["tolerance"])
    max_iterations = at_most(_TV["max_iterations"])


class TV(_Inversion):
    """Invert with total variation (:func:`qsmpipe.numerics.inversion.tv.tv`)."""

    input_spec = _TVInputSpec
    method = "tv"
    function = staticmethod(tv)
