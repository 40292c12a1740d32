"""Nipype interfaces to :mod:`qsmpipe.numerics.inversion`."""

from pathlib import Path
from typing import Any, ClassVar, get_args

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
from qsmpipe.methods import parameters_of
from qsmpipe.nets.inversion import cpsi_net, meta_qsm, qsmgan, si_qsm, unet
from qsmpipe.nets.reconstruction import Grid
from qsmpipe.numerics.inversion.common import Curve
from qsmpipe.numerics.inversion.direct import Prior, l2, tkd, tsvd
from qsmpipe.numerics.inversion.hd import hdqsm
from qsmpipe.numerics.inversion.ilsqr import ilsqr
from qsmpipe.numerics.inversion.l1 import l1qsm
from qsmpipe.numerics.inversion.medi import medi
from qsmpipe.numerics.inversion.ndi import ndi
from qsmpipe.numerics.inversion.nonlinear import nltv
from qsmpipe.numerics.inversion.rts import rts
from qsmpipe.numerics.inversion.single_step import sstv
from qsmpipe.numerics.inversion.tfi import tfi
from qsmpipe.numerics.inversion.tgv import nltgv, tgv
from qsmpipe.numerics.inversion.tgv_phase import tgvqsm
from qsmpipe.numerics.inversion.tikhonov import tikhonov
from qsmpipe.numerics.inversion.tv import tv
from qsmpipe.numerics.inversion.two_level import two_level
from qsmpipe.numerics.inversion.weak_harmonic import whqsm


def _defaults(method: str) -> dict[str, Any]:
    rows = parameters_of("inversion", method)
    return {name: parameter.default for name, parameter in rows.items()}


_RHO = "penalty of the gradient's split over lambda (mm/ppm): speed only"
_MU = "penalty of the field's split: speed only"
_VARIATION = "weight of the total variation (ppm mm)"
_PENALTY = "weight of the penalty (mm2, 1 or mm4)"
_RULES = ("l-curve", "discrepancy")


def _weight(value: float | str, desc: str, *words: str) -> traits.Union:
    """Make the weight of a regularisation: a number above 0, or a word for how to choose it."""
    return traits.Union(
        traits.Range(low=0.0, exclude_low=True, value=1.0),
        traits.Enum(*words),
        default_value=value,
        usedefault=True,
        desc=f"{desc}, or {' or '.join(words)}",
    )


def _threshold(value: float) -> traits.Range:
    return traits.Range(
        low=0.0,
        high=2 / 3,
        exclude_low=True,
        value=value,
        usedefault=True,
        desc="least dipole kernel that is divided by",
    )


def _edges(value: float) -> traits.Range:
    return traits.Range(
        low=0.0,
        high=1.0,
        exclude_high=True,
        value=value,
        usedefault=True,
        desc="share of the gradient's components that cost nothing: edges of `magnitude`",
    )


def _prior(value: str) -> traits.Enum:
    return traits.Enum(
        value,
        *(name for name in get_args(Prior) if name != value),
        usedefault=True,
        desc="what is penalised: the map's gradient, the map itself, or its Laplacian",
    )


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
    b0_direction = direction("field")


class _InversionOutputSpec(StageOutputSpec):
    chi = File(exists=True, desc="susceptibility (ppm), not referenced; 0 outside `mask`")


class _Inversion(Stage):
    input_spec, output_spec = _InversionInputSpec, _InversionOutputSpec
    stage = "inversion"
    data: ClassVar[str] = "field"

    def _compute(self, cwd: Path, device: torch.device) -> None:
        like = getattr(self.inputs, self.data)
        result = self._call_and_note(
            images.load(like, device=device),
            images.load(self.inputs.mask, like=like, dtype=torch.bool, device=device),
            images.zooms_of(like),
            **self._supplied(like=like, device=device),
        )
        self._record(result.convergence)
        self._step["parameters"] |= result.chosen
        self._note(result.curve)
        self._results["chi"] = images.save(result.chi, cwd / "chi.nii.gz", like=like)

    def _note(self, curve: Curve | None) -> None:
        """Keep what lambda was chosen from; a rule that found none is a warning."""
        if curve is None:
            return
        self._step["curve"] = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in curve._asdict().items()
        }
        if not curve.found:
            self._step["warnings"].append(
                f"{self.stage} ({self.method}): the rule {curve.rule} found no lambda from "
                f"{curve.lambdas[0]:.3g} to {curve.lambdas[-1]:.3g}, and "
                f"{curve.lambda_:.3g} was taken: look at the curve, give a number"
            )


_TKD = _defaults("tkd")


class _TKDInputSpec(_InversionInputSpec):
    threshold = _threshold(_TKD["threshold"])


class TKD(_Inversion):
    """Divide by the thresholded kernel (:func:`qsmpipe.numerics.inversion.direct.tkd`)."""

    input_spec = _TKDInputSpec
    method = "tkd"
    function = staticmethod(tkd)


_TSVD = _defaults("tsvd")


class _TSVDInputSpec(_InversionInputSpec):
    threshold = _threshold(_TSVD["threshold"])


class TSVD(_Inversion):
    """Divide where the kernel is large (:func:`qsmpipe.numerics.inversion.direct.tsvd`)."""

    input_spec = _TSVDInputSpec
    method = "tsvd"
    function = staticmethod(tsvd)


_L2 = _defaults("l2")


class _L2InputSpec(_InversionInputSpec):
    prior = _prior(_L2["prior"])
    lambda_ = _weight(_L2["lambda_"], _PENALTY, *_RULES)


class L2(_Inversion):
    """Invert with a squared penalty (:func:`qsmpipe.numerics.inversion.direct.l2`)."""

    input_spec = _L2InputSpec
    method = "l2"
    function = staticmethod(l2)


_TIKHONOV = _defaults("tikhonov")


class _TikhonovInputSpec(_InversionInputSpec):
    prior = _prior(_TIKHONOV["prior"])
    lambda_ = _weight(_TIKHONOV["lambda_"], _PENALTY, *_RULES)
    tolerance = stops_below(_TIKHONOV["tolerance"], "relative residual that stops")
    max_iterations = at_most(_TIKHONOV["max_iterations"])


class Tikhonov(_Inversion):
    """Invert with a squared penalty (:func:`qsmpipe.numerics.inversion.tikhonov.tikhonov`)."""

    input_spec = _TikhonovInputSpec
    method = "tikhonov"
    function = staticmethod(tikhonov)


_ILSQR = _defaults("ilsqr")


class _ILSQRInputSpec(_InversionInputSpec):
    threshold = traits.Range(
        low=0.0,
        high=2 / 3,
        value=_ILSQR["threshold"],
        usedefault=True,
        desc="dipole kernel below which frequencies may hold streaks",
    )
    tolerance = stops_below(_ILSQR["tolerance"], "relative residual that stops")
    max_iterations = at_most(_ILSQR["max_iterations"])


class ILSQR(_Inversion):
    """Least squares, streaks taken out (:func:`qsmpipe.numerics.inversion.ilsqr.ilsqr`)."""

    input_spec = _ILSQRInputSpec
    method = "ilsqr"
    function = staticmethod(ilsqr)


_TWO_LEVEL = _defaults("two-level")


class _TwoLevelInputSpec(_InversionInputSpec):
    lambda_ = _weight(
        _TWO_LEVEL["lambda_"], "weight of the total variation, second level (ppm mm)", "auto"
    )
    ratio = positive(_TWO_LEVEL["ratio"], "weight at the first level over lambda")
    strong = not_negative(_TWO_LEVEL["strong"], "least size of a strong source (ppm)")
    rho = positive(_TWO_LEVEL["rho"], _RHO)
    tolerance = stops_below(_TWO_LEVEL["tolerance"])
    max_iterations = at_most(_TWO_LEVEL["max_iterations"])


class TwoLevel(_Inversion):
    """Strong sources first (:func:`qsmpipe.numerics.inversion.two_level.two_level`)."""

    input_spec = _TwoLevelInputSpec
    method = "two-level"
    function = staticmethod(two_level)


_RTS = _defaults("rts")


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


_TV = _defaults("tv")


class _TVInputSpec(_InversionInputSpec):
    lambda_ = _weight(_TV["lambda_"], _VARIATION, "auto", *_RULES)
    edges = _edges(_TV["edges"])
    rho = positive(_TV["rho"], _RHO)
    mu = positive(_TV["mu"], _MU)
    tolerance = stops_below(_TV["tolerance"])
    max_iterations = at_most(_TV["max_iterations"])


class TV(_Inversion):
    """Invert with total variation (:func:`qsmpipe.numerics.inversion.tv.tv`)."""

    input_spec = _TVInputSpec
    method = "tv"
    function = staticmethod(tv)


_NLTV = _defaults("nltv")


class _NonlinearTVInputSpec(_InversionInputSpec):
    lambda_ = _weight(_NLTV["lambda_"], _VARIATION, "auto")
    edges = _edges(_NLTV["edges"])
    rho = positive(_NLTV["rho"], _RHO)
    mu = positive(_NLTV["mu"], _MU)
    tolerance = stops_below(_NLTV["tolerance"])
    max_iterations = at_most(_NLTV["max_iterations"])


class NonlinearTV(_Inversion):
    """Invert the phase by TV (:func:`qsmpipe.numerics.inversion.nonlinear.nltv`)."""

    input_spec = _NonlinearTVInputSpec
    method = "nltv"
    function = staticmethod(nltv)


_TGV = _defaults("tgv")
_TGV_RHO = "penalty of both splits over their weights (mm/ppm): speed only"


class _TGVInputSpec(_InversionInputSpec):
    lambda_ = _weight(_TGV["lambda_"], "weight of the first order (ppm mm)", "auto")
    ratio = positive(_TGV["ratio"], "weight of the second order over that (mm)")
    rho = positive(_TGV["rho"], _TGV_RHO)
    mu = positive(_TGV["mu"], _MU)
    tolerance = stops_below(_TGV["tolerance"])
    max_iterations = at_most(_TGV["max_iterations"])


class TGV(_Inversion):
    """Invert with total generalised variation (:func:`qsmpipe.numerics.inversion.tgv.tgv`)."""

    input_spec = _TGVInputSpec
    method = "tgv"
    function = staticmethod(tgv)


_NLTGV = _defaults("nltgv")


class _NonlinearTGVInputSpec(_TGVInputSpec):
    rho = positive(_NLTGV["rho"], _TGV_RHO)
    mu = positive(_NLTGV["mu"], _MU)


class NonlinearTGV(_Inversion):
    """Invert the phase by TGV (:func:`qsmpipe.numerics.inversion.tgv.nltgv`)."""

    input_spec = _NonlinearTGVInputSpec
    method = "nltgv"
    function = staticmethod(nltgv)


_WHQSM = _defaults("whqsm")


class _WeakHarmonicInputSpec(_InversionInputSpec):
    lambda_ = _weight(_WHQSM["lambda_"], _VARIATION, "auto")
    beta = positive(_WHQSM["beta"], "weight of the remnant's squared Laplacian (mm4)")
    rho = positive(_WHQSM["rho"], _RHO)
    mu = positive(_WHQSM["mu"], _MU)
    nu = positive(_WHQSM["nu"], "penalty of the Laplacian's split (mm4): speed only")
    tolerance = stops_below(_WHQSM["tolerance"])
    max_iterations = at_most(_WHQSM["max_iterations"])


class WeakHarmonicQSM(_Inversion):
    """Invert with a remnant field (:func:`qsmpipe.numerics.inversion.weak_harmonic.whqsm`)."""

    input_spec = _WeakHarmonicInputSpec
    method = "whqsm"
    function = staticmethod(whqsm)


_L1QSM = _defaults("l1qsm")


class _L1QSMInputSpec(_InversionInputSpec):
    lambda_ = positive(_L1QSM["lambda_"], "weight of the total variation (mm)")
    rho = positive(_L1QSM["rho"], _RHO)
    mu = positive(_L1QSM["mu"], "penalty of the field's split (1/ppm): speed only")
    tolerance = stops_below(_L1QSM["tolerance"])
    max_iterations = at_most(_L1QSM["max_iterations"])


class L1QSM(_Inversion):
    """Invert with absolute residuals (:func:`qsmpipe.numerics.inversion.l1.l1qsm`)."""

    input_spec = _L1QSMInputSpec
    method = "l1qsm"
    function = staticmethod(l1qsm)


_HDQSM = _defaults("hdqsm")


class _HDQSMInputSpec(_InversionInputSpec):
    lambda_ = _weight(_HDQSM["lambda_"], _VARIATION, "auto")
    l1_lambda = positive(
        _HDQSM["l1_lambda"], "weight of the total variation in the first stage (mm)"
    )
    l1_iterations = at_most(_HDQSM["l1_iterations"], "iterations of the first stage")
    rho = positive(_HDQSM["rho"], _RHO)
    mu = positive(_HDQSM["mu"], _MU)
    tolerance = stops_below(_HDQSM["tolerance"])
    max_iterations = at_most(_HDQSM["max_iterations"], "iterations of the second stage at most")


class HDQSM(_Inversion):
    """Invert with a hybrid data term (:func:`qsmpipe.numerics.inversion.hd.hdqsm`)."""

    input_spec = _HDQSMInputSpec
    method = "hdqsm"
    function = staticmethod(hdqsm)


_MEDI = _defaults("medi")


class _MEDIInputSpec(_InversionInputSpec):
    lambda_ = _weight(_MEDI["lambda_"], "weight of the data (1/(rad mm))", "auto")
    edges = _edges(_MEDI["edges"])
    radius = not_negative(
        _MEDI["radius"], "of the ball whose mean is taken off field and kernel (mm); 0: none"
    )
    merit = traits.Bool(
        _MEDI["merit"], usedefault=True, desc="weight down voxels of large residual"
    )
    csf_weight = not_negative(
        _MEDI["csf_weight"],
        "weight of the variance in the ventricles (1/(rad mm)), which needs `r2star`; 0: none",
    )
    tolerance = stops_below(_MEDI["tolerance"])
    max_iterations = at_most(_MEDI["max_iterations"], "Gauss-Newton steps at most")


class MEDI(_Inversion):
    """Invert off the magnitude's edges (:func:`qsmpipe.numerics.inversion.medi.medi`)."""

    input_spec = _MEDIInputSpec
    method = "medi"
    function = staticmethod(medi)


_NDI = _defaults("ndi")


class _NDIInputSpec(_InversionInputSpec):
    step = positive(_NDI["step"], "length of a step, without unit; below 2.25")
    alpha = not_negative(_NDI["alpha"], "Tikhonov regularisation, without unit; 0: none")
    tolerance = stops_below(_NDI["tolerance"])
    max_iterations = at_most(_NDI["max_iterations"])


class NDI(_Inversion):
    """Invert by gradient descent (:func:`qsmpipe.numerics.inversion.ndi.ndi`)."""

    input_spec = _NDIInputSpec
    method = "ndi"
    function = staticmethod(ndi)


_SSTV = _defaults("sstv")


class _SSTVInputSpec(_InversionInputSpec):
    field = File(exists=True, mandatory=True, desc="total field (ppm)")
    radii = traits.List(
        traits.Float, value=list(_SSTV["radii"]), usedefault=True, desc="ball radii (mm)"
    )
    lambda_ = _weight(_SSTV["lambda_"], _VARIATION, "auto")
    edges = _edges(_SSTV["edges"])
    rho = positive(_SSTV["rho"], _RHO)
    mu = positive(_SSTV["mu"], "penalty of the fields' splits: speed only")
    tolerance = stops_below(_SSTV["tolerance"])
    max_iterations = at_most(_SSTV["max_iterations"])


class SSTV(_Inversion):
    """Invert the total field (:func:`qsmpipe.numerics.inversion.single_step.sstv`)."""

    input_spec = _SSTVInputSpec
    method = "sstv"
    function = staticmethod(sstv)


_TFI = _defaults("tfi")


class _TFIInputSpec(_InversionInputSpec):
    field = File(exists=True, mandatory=True, desc="total field (ppm)")
    lambda_ = _weight(_TFI["lambda_"], _VARIATION, "auto")
    edges = _edges(_TFI["edges"])
    margin = not_negative(_TFI["margin"], "space around the mask's box that has sources (mm)")
    preconditioner = positive(
        _TFI["preconditioner"], "scale of sources outside the mask over tissue: speed only"
    )
    tolerance = stops_below(_TFI["tolerance"])
    max_iterations = at_most(_TFI["max_iterations"], "Gauss-Newton steps at most")


class TFI(_Inversion):
    """Invert the total field (:func:`qsmpipe.numerics.inversion.tfi.tfi`)."""

    input_spec = _TFIInputSpec
    method = "tfi"
    function = staticmethod(tfi)


class _PhaseInversionInputSpec(StageInputSpec):
    phase = File(exists=True, mandatory=True, desc="wrapped phase (rad), echoes last")
    mask = File(exists=True, mandatory=True, desc="where `phase` is read, on its grid")
    magnitude = File(exists=True, desc="magnitude, on the grid of `phase`, echoes last")
    echo_times = traits.List(traits.Float, mandatory=True, desc="echo times (s)")
    field_strength = traits.Float(mandatory=True, desc="B0 (T)")
    b0_direction = direction("phase")


class _PhaseInversion(_Inversion):
    """From the wrapped phase of all echoes to susceptibility."""

    input_spec = _PhaseInversionInputSpec
    data = "phase"


_TGVQSM = _defaults("tgvqsm")


class _TGVQSMInputSpec(_PhaseInversionInputSpec):
    alpha1 = positive(_TGVQSM["alpha1"], "weight of the gradient less its smooth part (rad mm)")
    alpha0 = positive(_TGVQSM["alpha0"], "weight of that part's derivative (rad mm2)")
    erosion = not_negative(_TGVQSM["erosion"], "rim of the mask without data (mm)")
    tolerance = stops_below(_TGVQSM["tolerance"], "relative change of a step that stops")
    max_iterations = at_most(_TGVQSM["max_iterations"])


class TGVQSM(_PhaseInversion):
    """Invert wrapped phase (:func:`qsmpipe.numerics.inversion.tgv_phase.tgvqsm`)."""

    input_spec = _TGVQSMInputSpec
    method = "tgvqsm"
    function = staticmethod(tgvqsm)


# Networks

_GRID = "whether images outside the weights' domain are resampled to it, or taken as they are"


def _weights(name: str) -> traits.Str:
    return traits.Str(
        name,
        usedefault=True,
        desc="the package's own weights by name, or a .safetensors file with its card beside it",
    )


def _licence() -> traits.Str:
    return traits.Str(
        "", usedefault=True, desc="licence of the weights that is accepted, if not qsmpipe's own"
    )


def _grid() -> traits.Enum:
    return traits.Enum(*get_args(Grid), usedefault=True, desc=_GRID)


def _voxels(desc: str) -> traits.Range:
    return traits.Range(low=0, value=0, usedefault=True, desc=f"{desc} (voxels); 0: the card's")


def _mirror() -> traits.Bool:
    return traits.Bool(
        True, usedefault=True, desc="the map is the mean of those of all eight mirror images"
    )


def _sha256() -> traits.Str:
    return traits.Str(desc="hash of the weights: others of the same name are other inputs")


class _NetworkInputSpec(_InversionInputSpec):
    sha256 = _sha256()
    licence = _licence()
    grid = _grid()
    patch = _voxels("edge of the patches that are mapped at a time")
    halo = _voxels("neighbours that a patch reads on every side")
    mirror = _mirror()


class _UNetInputSpec(_NetworkInputSpec):
    weights = _weights("unet")


class UNet(_Inversion):
    """Invert by a 3D U-Net (:func:`qsmpipe.nets.inversion.unet`)."""

    input_spec = _UNetInputSpec
    method = "unet"
    function = staticmethod(unet)


class _QSMGANInputSpec(_NetworkInputSpec):
    weights = _weights("qsmgan")


class QSMGAN(_Inversion):
    """Invert by QSMGAN's generator (:func:`qsmpipe.nets.inversion.qsmgan`)."""

    input_spec = _QSMGANInputSpec
    method = "qsmgan"
    function = staticmethod(qsmgan)


class _SIQSMInputSpec(_NetworkInputSpec):
    weights = _weights("si-qsm")


class SIQSM(_Inversion):
    """Invert by SI-QSM (:func:`qsmpipe.nets.inversion.si_qsm`)."""

    input_spec = _SIQSMInputSpec
    method = "si-qsm"
    function = staticmethod(si_qsm)


class _MetaQSMInputSpec(_NetworkInputSpec):
    weights = _weights("meta-qsm")


class MetaQSM(_Inversion):
    """Invert by Meta-QSM (:func:`qsmpipe.nets.inversion.meta_qsm`)."""

    input_spec = _MetaQSMInputSpec
    method = "meta-qsm"
    function = staticmethod(meta_qsm)


class _CPsiNetInputSpec(_PhaseInversionInputSpec):
    filtered = traits.Bool(
        False, usedefault=True, desc="the scanner has high-pass filtered `phase` already"
    )
    weights = _weights("cpsi-net")
    sha256 = _sha256()
    licence = _licence()
    grid = _grid()
    patch = _voxels("edge of the patches that are mapped at a time")
    halo = _voxels("neighbours that a patch reads on every side")
    mirror = _mirror()


class CPsiNet(_PhaseInversion):
    """Invert filtered phase (:func:`qsmpipe.nets.inversion.cpsi_net`)."""

    input_spec = _CPsiNetInputSpec
    method = "cpsi-net"
    function = staticmethod(cpsi_net)
