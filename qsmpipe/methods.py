"""Every method of every stage: one row each, readable without torch and Nipype.

A new method is a function in ``qsmpipe/numerics/<stage>``, a class in ``interfaces/<stage>.py``
and a row here. The command line, the workflow factories, the methods text, the tests of what
every method owes and the benchmarks read this table.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal


@dataclass(frozen=True)
class Method:
    """A row of :data:`METHODS`."""

    function: str
    """Where the numerics stand, ``module:function`` under :mod:`qsmpipe.numerics`."""
    interface: str
    """Class in ``qsmpipe.interfaces.<stage>``."""
    summary: str
    """One line for the help page."""
    text: str
    """What the methods section of a paper says; {parameters} by name."""
    cite: tuple[str, ...] = ()
    """Keys in ``data/references.bib``."""
    starts_from: Literal["local field", "total field", "phase"] = "local field"
    """What an inversion takes: one that takes the total field or the wrapped phase of the echoes
    removes the background itself."""


METHODS: dict[str, dict[str, Method]] = {
    "offset": {
        "mcpc3ds": Method(
            "phase:mcpc3ds",
            "MCPC3DS",
            "phase offset from the first two echoes, smoothed (MCPC-3D-S)",
            "The phase offset common to all echoes was estimated from the first two echoes, "
            "smoothed (Gaussian, sigma {sigma} mm) and removed (MCPC-3D-S).",
            ("eckstein2018",),
        ),
    },
    "unwrap": {
        "laplacian": Method(
            "unwrap.laplacian:laplacian",
            "Laplacian",
            "Laplacian (least squares in the mask); smooth, not exact to multiples of 2 pi",
            "Phase was unwrapped by the Laplacian method, in the least-squares sense within the "
            "mask.",
            ("schofield2003", "ghiglia1994"),
        ),
        "romeo": Method(
            "unwrap.romeo:romeo",
            "Romeo",
            "ROMEO region growing; exact",
            "Phase was unwrapped by region growing along the most reliable paths (ROMEO).",
            ("dymerska2021",),
        ),
    },
    "field": {
        "weighted": Method(
            "field:weighted_mean",
            "WeightedMean",
            "mean of phase over echo time, weighted by its precision",
            "The total field is the mean over echoes of unwrapped phase over echo time, weighted "
            "by its inverse variance (magnitude and echo time squared).",
            ("robinson2017",),
        ),
        "nonlinear": Method(
            "field:nonlinear",
            "NonlinearFit",
            "nonlinear fit of the complex signal with offset and noise map",
            "The total field was fitted to the complex signal of all echoes (Gauss-Newton), "
            "which also gave its standard deviation.",
            ("liu2013",),
        ),
    },
    "relaxation": {
        "loglinear": Method(
            "relaxation:loglinear",
            "LogLinear",
            "weighted straight line through the logarithm of the magnitude",
            "R2* was fitted log-linearly, weighted by the squared magnitude.",
            (),
        ),
        "arlo": Method(
            "relaxation:arlo",
            "Arlo",
            "auto-regression on linear operations; needs 3 or more evenly spaced echoes",
            "R2* was estimated by ARLO.",
            ("pei2015",),
        ),
    },
    "mask": {
        "threshold": Method(
            "masks.threshold:threshold",
            "Threshold",
            "robust threshold of the bias-corrected magnitude",
            "The magnitude was corrected for its bias field and thresholded robustly.",
            ("eckstein2021",),
        ),
        "quality": Method(
            "masks.quality:quality",
            "Quality",
            "where the phase is coherent over space and echoes",
            "Voxels of coherent phase were kept (quality above a threshold).",
            ("dymerska2021",),
        ),
        "bet": Method(
            "masks.bet:bet",
            "BET",
            "a surface grown onto the brain in the magnitude (BET type)",
            "The brain was extracted by a deformable surface (BET type, fractional intensity "
            "{fractional_intensity}).",
            ("smith2002",),
        ),
    },
    "background": {
        "vsharp": Method(
            "background.sharp:vsharp",
            "VSharp",
            "V-SHARP: spherical mean values of varying radius",
            "Background fields were removed by V-SHARP (ball radii {radii} mm, threshold "
            "{threshold}).",
            ("schweser2011", "wu2012"),
        ),
        "resharp": Method(
            "background.sharp:resharp",
            "Resharp",
            "RESHARP: spherical mean values, Tikhonov-regularised",
            "Background fields were removed by RESHARP (radius {radius} mm, lambda {lambda_}).",
            ("sun2014",),
        ),
        "pdf": Method(
            "background.pdf:pdf",
            "PDF",
            "PDF: projection onto dipoles outside the mask; keeps the edge",
            "Background fields were removed by projection onto the fields of dipoles outside "
            "the mask (PDF, conjugate gradients, tolerance {tolerance}).",
            ("liu2011",),
        ),
    },
    "inversion": {
        "tkd": Method(
            "inversion.direct:tkd",
            "TKD",
            "thresholded k-space division",
            "Susceptibility was computed by thresholded k-space division (threshold {threshold}).",
            ("shmueli2009",),
        ),
        "l2": Method(
            "inversion.direct:l2",
            "L2",
            "closed-form L2 regularisation of the gradient",
            "Susceptibility was computed by closed-form L2 regularisation of its gradient "
            "(lambda {lambda_}).",
            ("bilgic2014",),
        ),
        "rts": Method(
            "inversion.rts:rts",
            "RTS",
            "rapid two-step: well-conditioned part first, TV for the rest",
            "Susceptibility was computed by rapid two-step inversion (delta {delta}).",
            ("kames2018",),
        ),
        "tv": Method(
            "inversion.tv:tv",
            "TV",
            "total variation, data weighted by mask and noise (ADMM)",
            "Susceptibility was computed by total-variation regularised inversion, the data "
            "weighted by mask and noise (lambda {lambda_}, ADMM).",
            ("bilgic2014fast",),
        ),
    },
}
"""Stage to method to row, in the order in which the stages run."""


def method(stage: str, name: str) -> Method:
    """Row of a method.

    Raises
    ------
    ValueError
        If ``stage`` has no such method; names those that it has.
    """
    rows = METHODS[stage]
    if name not in rows:
        close = get_close_matches(name, rows, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        msg = f"{stage} has no method {name!r}: choose from {', '.join(rows)}{hint}"
        raise ValueError(msg)
    return rows[name]


OPERATORS = {"mask": "&|()", "background": "+", "inversion": ","}
"""What joins several methods of a stage: masks are combined, backgrounds follow on one another,
inversions stand side by side."""


def names_in(stage: str, expression: str) -> tuple[str, ...]:
    """List the methods that an expression of a stage names, in order.

    >>> names_in("mask", "bet & quality"), names_in("background", "lbv+vsharp")
    (('bet', 'quality'), ('lbv', 'vsharp'))
    >>> names_in("inversion", "rts, tv"), names_in("unwrap", "romeo"), names_in("mask", "given")
    (('rts', 'tv'), ('romeo',), ())
    """
    for operator in OPERATORS.get(stage, ""):
        expression = expression.replace(operator, " ")
    names = expression.split() if stage in OPERATORS else [expression]
    return tuple(name for name in names if name not in ("none", "given"))


def needs_background(inversions: Sequence[str]) -> bool:
    """Whether the background must be removed before one of these inversions."""
    return any(method("inversion", name).starts_from == "local field" for name in inversions)


def function_of(stage: str, name: str) -> Callable[..., Any]:
    """Numerics function of a method."""
    module, function = method(stage, name).function.split(":")
    return getattr(importlib.import_module(f"qsmpipe.numerics.{module}"), function)


def interface_of(stage: str, name: str) -> type:
    """Nipype interface class of a method."""
    row = method(stage, name)
    return getattr(importlib.import_module(f"qsmpipe.interfaces.{stage}"), row.interface)


SUPPLIED = frozenset({
    "b0_direction", "echo_times", "field_strength", "magnitude", "noise", "r2star", "start",
})  # fmt: skip
"""Keyword arguments that come from the data and not from the user."""


def parameters_of(stage: str, name: str) -> dict[str, inspect.Parameter]:
    """Parameters of a method that a user may set, from its function's own signature."""
    signature = inspect.signature(function_of(stage, name))
    return {
        key: parameter
        for key, parameter in signature.parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and key not in SUPPLIED
    }
