"""Every method of every stage: one row each, readable without torch and Nipype.

A new method is a function in ``qsmpipe/numerics/<stage>`` and a row here. The Nipype interfaces,
the command line, the workflow factories, the methods text, the tests of what every method owes
and the benchmarks read this table.
"""

import ast
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal

from docstring_parser import Docstring, DocstringStyle, parse

from qsmpipe.numerics.parameters import Kind


@dataclass(frozen=True)
class Method:
    """A row of :data:`METHODS`."""

    function: str
    """Where the numerics stand, ``module:function`` under :mod:`qsmpipe`."""
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
    trained: bool = False
    """Whether it is a network, with weights."""
    volumes: int | None = None
    """Memory in float32 volumes of the grid, where it is not that of the stage's other methods
    (``volumes`` of their interfaces)."""


METHODS: dict[str, dict[str, Method]] = {
    "offset": {
        "mcpc3ds": Method(
            "numerics.phase:mcpc3ds",
            "MCPC3DS",
            "phase offset from the first two echoes, smoothed (MCPC-3D-S)",
            "The phase offset common to all echoes was estimated from the first two echoes, "
            "smoothed (Gaussian, sigma {sigma} mm) and removed (MCPC-3D-S, correction of a "
            "bipolar readout: {bipolar}).",
            ("eckstein2018", "eckstein2021"),
        ),
    },
    "unwrap": {
        "laplacian": Method(
            "numerics.unwrap.laplacian:laplacian",
            "Laplacian",
            "Laplacian (least squares in the mask); smooth, not exact to multiples of 2 pi",
            "Phase was unwrapped by the Laplacian method, in the least-squares sense (boundary: "
            "{boundary}).",
            ("schofield2003", "ghiglia1994"),
        ),
        "bestpath": Method(
            "numerics.unwrap.bestpath:bestpath",
            "BestPath",
            "best path: pieces joined along the most reliable edges; exact",
            "Phase was unwrapped along the best path.",
            ("abdulrahman2007", "vanderwalt2014"),
            volumes=48,
        ),
        "romeo": Method(
            "numerics.unwrap.romeo:romeo",
            "Romeo",
            "ROMEO region growing; exact",
            "Phase was unwrapped by region growing along the most reliable paths (ROMEO).",
            ("dymerska2021",),
        ),
    },
    "field": {
        "weighted": Method(
            "numerics.field:weighted_mean",
            "WeightedMean",
            "mean of phase over echo time, weighted by its precision",
            "The total field is the mean over echoes of unwrapped phase over echo time, weighted "
            "by its inverse variance (magnitude and echo time squared).",
            ("robinson2017",),
        ),
        "linear": Method(
            "numerics.field:linear",
            "LinearFit",
            "straight line with offset through the phase, weighted by its precision",
            "The total field is the slope of a straight line with offset through the unwrapped "
            "phase of all echoes, weighted by its inverse variance (magnitude squared).",
            ("robinson2017",),
        ),
        "nonlinear": Method(
            "numerics.field:nonlinear",
            "NonlinearFit",
            "nonlinear fit of the complex signal, with or without offset",
            "The total field was fitted to the complex signal of all echoes by nonlinear least "
            "squares, which also gave its standard deviation.",
            ("liu2013", "nesterov2006"),
        ),
    },
    "relaxation": {
        "loglinear": Method(
            "numerics.relaxation:loglinear",
            "LogLinear",
            "weighted straight line through the logarithm of the magnitude",
            "R2* was fitted log-linearly, weighted by the squared magnitude.",
            (),
        ),
        "arlo": Method(
            "numerics.relaxation:arlo",
            "Arlo",
            "auto-regression on linear operations; needs 3 or more evenly spaced echoes",
            "R2* was estimated by ARLO.",
            ("pei2015",),
        ),
        "nonlinear": Method(
            "numerics.relaxation:nonlinear",
            "NonlinearDecay",
            "nonlinear least-squares fit of the decay itself; noise floor if wanted",
            "R2* was fitted to the magnitude by nonlinear least squares (Levenberg-Marquardt, "
            "Rician noise floor {noise_floor}).",
            ("marquardt1963", "gudbjartsson1995"),
        ),
    },
    "mask": {
        "threshold": Method(
            "numerics.masks.threshold:threshold",
            "Threshold",
            "robust threshold of the bias-corrected magnitude",
            "The magnitude was corrected for its bias field and thresholded robustly.",
            ("eckstein2021",),
        ),
        "quality": Method(
            "numerics.masks.quality:quality",
            "Quality",
            "where the phase is coherent over space and echoes",
            "Voxels of coherent phase were kept (quality above a threshold).",
            ("dymerska2021",),
        ),
        "bet": Method(
            "numerics.masks.bet:bet",
            "BET",
            "a surface grown onto the brain in the magnitude (BET type)",
            "The brain was extracted by a deformable surface (BET type, fractional intensity "
            "{fractional_intensity}).",
            ("smith2002",),
        ),
    },
    "swi": {
        "homodyne": Method(
            "numerics.swi:homodyne",
            "Homodyne",
            "magnitude times the homodyne-filtered phase mask, averaged over the echoes",
            "Susceptibility-weighted images were made of each echo by homodyne filtering (to "
            "{resolution} mm) and a phase mask to the power {power}, and averaged; they were "
            "projected over {thickness} mm by their minimum.",
            ("haacke2004", "haacke2009", "quinn2014"),
        ),
        "clear": Method(
            "numerics.swi:clear",
            "Clear",
            "CLEAR-SWI: homogeneous magnitude of all echoes, field by unwrapping and a Gaussian",
            "Susceptibility-weighted images were made by CLEAR-SWI (high-pass filter of sigma "
            "{sigma} mm, strength {strength}) and projected over {thickness} mm by their "
            "minimum.",
            ("eckstein2021",),
        ),
    },
    "background": {
        "sharp": Method(
            "numerics.background.sharp:sharp",
            "Sharp",
            "SHARP: spherical mean values of one radius",
            "Background fields were removed by SHARP (radius {radius} mm, threshold {threshold}).",
            ("schweser2011",),
        ),
        "vsharp": Method(
            "numerics.background.sharp:vsharp",
            "VSharp",
            "V-SHARP: spherical mean values of varying radius",
            "Background fields were removed by V-SHARP (ball radii {radii} mm, threshold "
            "{threshold}).",
            ("schweser2011", "wu2012"),
        ),
        "resharp": Method(
            "numerics.background.sharp:resharp",
            "Resharp",
            "RESHARP: spherical mean values, Tikhonov-regularised",
            "Background fields were removed by RESHARP (radius {radius} mm, lambda {lambda_}).",
            ("sun2014",),
        ),
        "ismv": Method(
            "numerics.background.sharp:ismv",
            "ISMV",
            "iSMV: spherical mean values, repeated to their fixed point",
            "Background fields were removed by iterative spherical mean values (iSMV, radius "
            "{radius} mm).",
            ("wen2014",),
        ),
        "lbv": Method(
            "numerics.background.laplace:lbv",
            "LBV",
            "LBV: harmonic field with the values at the mask's edge; keeps the edge",
            "Background fields were removed by solving the Laplacian boundary value problem "
            "(LBV, {peel} mm peeled off the mask).",
            ("zhou2014",),
        ),
        "harperella": Method(
            "numerics.background.laplace:harperella",
            "Harperella",
            "HARPERELLA: inverse of the Laplacian, completed outside the mask",
            "Background fields were removed by HARPERELLA from the total field (radius {radius} "
            "mm).",
            ("li2014harperella",),
        ),
        "pdf": Method(
            "numerics.background.pdf:pdf",
            "PDF",
            "PDF: projection onto dipoles outside the mask; keeps the edge",
            "Background fields were removed by projection onto the fields of dipoles outside "
            "the mask (PDF, conjugate gradients, tolerance {tolerance}).",
            ("liu2011",),
        ),
    },
    "inversion": {
        "tkd": Method(
            "numerics.inversion.direct:tkd",
            "TKD",
            "thresholded k-space division",
            "Susceptibility was computed by thresholded k-space division (threshold {threshold}).",
            ("shmueli2009",),
        ),
        "tsvd": Method(
            "numerics.inversion.direct:tsvd",
            "TSVD",
            "truncated singular values: division, 0 where the dipole is small",
            "Susceptibility was computed by truncated singular value decomposition (threshold "
            "{threshold}).",
            ("wharton2010",),
        ),
        "l2": Method(
            "numerics.inversion.direct:l2",
            "L2",
            "closed-form L2 regularisation of the gradient, the map or its Laplacian",
            "Susceptibility was computed by closed-form L2 regularisation (prior {prior}, lambda "
            "{lambda_}).",
            ("bilgic2014",),
        ),
        "tikhonov": Method(
            "numerics.inversion.tikhonov:tikhonov",
            "Tikhonov",
            "L2 regularisation, data weighted by mask and noise (conjugate gradients)",
            "Susceptibility was computed by Tikhonov regularisation, the data weighted by mask "
            "and noise (prior {prior}, lambda {lambda_}, conjugate gradients).",
            ("derochefort2010",),
        ),
        "ilsqr": Method(
            "numerics.inversion.ilsqr:ilsqr",
            "ILSQR",
            "iLSQR: least squares, then the streaks estimated and taken out",
            "Susceptibility was computed by iLSQR: least squares, less the streaks estimated "
            "with a sparse map as guide (threshold {threshold}).",
            ("li2015",),
        ),
        "two-level": Method(
            "numerics.inversion.two_level:two_level",
            "TwoLevel",
            "two-level TV (after STAR-QSM): strong sources first, the rest from what is left",
            "Susceptibility was computed by two-level total-variation regularised inversion, "
            "strong sources (beyond {strong} ppm) first, the data weighted by mask and noise "
            "(lambda {lambda_}, {ratio} times that for strong sources).",
            ("wei2015",),
        ),
        "rts": Method(
            "numerics.inversion.rts:rts",
            "RTS",
            "rapid two-step: well-conditioned part first, TV for the rest",
            "Susceptibility was computed by rapid two-step inversion (delta {delta}).",
            ("kames2018",),
        ),
        "tv": Method(
            "numerics.inversion.tv:tv",
            "TV",
            "total variation, data weighted by mask and noise (ADMM)",
            "Susceptibility was computed by total-variation regularised inversion, the data "
            "weighted by mask and noise (lambda {lambda_}, ADMM).",
            ("bilgic2014fast",),
        ),
        "nltv": Method(
            "numerics.inversion.nonlinear:nltv",
            "NonlinearTV",
            "nonlinear total variation (FANSI): phase for data, immune to whole turns",
            "Susceptibility was computed by nonlinear total-variation regularised inversion of "
            "the phase, weighted by mask and noise (lambda {lambda_}, ADMM).",
            ("milovic2018",),
        ),
        "tgv": Method(
            "numerics.inversion.tgv:tgv",
            "TGV",
            "total generalised variation of second order, which allows slopes",
            "Susceptibility was computed by inversion with total generalised variation, the data "
            "weighted by mask and noise (lambda {lambda_}, second order {ratio} mm times that, "
            "ADMM).",
            ("bredies2010", "milovic2018"),
        ),
        "nltgv": Method(
            "numerics.inversion.tgv:nltgv",
            "NonlinearTGV",
            "nonlinear total generalised variation (FANSI): phase for data",
            "Susceptibility was computed by nonlinear inversion of the phase with total "
            "generalised variation, weighted by mask and noise (lambda {lambda_}, second order "
            "{ratio} mm times that, ADMM).",
            ("milovic2018",),
        ),
        "whqsm": Method(
            "numerics.inversion.weak_harmonic:whqsm",
            "WeakHarmonicQSM",
            "nonlinear TV that also finds what is left of the background (weak harmonic)",
            "Susceptibility was computed together with a nearly harmonic remnant of the "
            "background by nonlinear total-variation regularised inversion (weak-harmonic QSM, "
            "lambda {lambda_}, beta {beta}).",
            ("milovic2019",),
        ),
        "l1qsm": Method(
            "numerics.inversion.l1:l1qsm",
            "L1QSM",
            "nonlinear TV with absolute residuals: gross errors of single voxels are forgiven",
            "Susceptibility was computed by total-variation regularised inversion with absolute "
            "residuals of the phase (L1-QSM, lambda {lambda_}).",
            ("milovic2022",),
        ),
        "hdqsm": Method(
            "numerics.inversion.hd:hdqsm",
            "HDQSM",
            "hybrid data term: absolute residuals find bad voxels, squared ones do the rest",
            "Susceptibility was computed by total-variation regularised inversion with a hybrid "
            "data term (HD-QSM, lambda {lambda_}).",
            ("lambert2022",),
        ),
        "medi": Method(
            "numerics.inversion.medi:medi",
            "MEDI",
            "MEDI: nonlinear, total variation off the magnitude's edges",
            "Susceptibility was computed by morphology-enabled dipole inversion (MEDI, nonlinear, "
            "lambda {lambda_}, nonlinear conjugate gradients).",
            ("liu2012", "liu2013", "liu2018"),
        ),
        "ndi": Method(
            "numerics.inversion.ndi:ndi",
            "NDI",
            "NDI: gradient descent on the phase, stopped early",
            "Susceptibility was computed by nonlinear dipole inversion (NDI, gradient descent, "
            "step {step}, tolerance {tolerance}).",
            ("polak2020",),
        ),
        "sstv": Method(
            "numerics.inversion.single_step:sstv",
            "SSTV",
            "single-step TV of the total field, background cut off by spherical means; keeps the "
            "edge",
            "Susceptibility was computed from the total field in a single step: total-variation "
            "regularised inversion of the field minus its spherical means (radii {radii} mm), "
            "which no background enters, the data weighted by mask and noise (lambda {lambda_}, "
            "ADMM).",
            ("chatnuntawech2017",),
            starts_from="total field",
        ),
        "tfi": Method(
            "numerics.inversion.tfi:tfi",
            "TFI",
            "TFI: tissue and background at once from the total field; keeps the edge",
            "Susceptibility was computed from the total field, together with its background, by "
            "preconditioned total field inversion (TFI, lambda {lambda_}, nonlinear conjugate "
            "gradients).",
            ("liu2017",),
            starts_from="total field",
        ),
        "tgvqsm": Method(
            "numerics.inversion.tgv_phase:tgvqsm",
            "TGVQSM",
            "single-step TGV from the wrapped phase of the echoes (TGV-QSM)",
            "Susceptibility was computed from the wrapped phase in one step, by total generalised "
            "variation (alpha1 {alpha1}, alpha0 {alpha0}).",
            ("langkammer2015", "pock2011"),
            starts_from="phase",
        ),
        "unet": Method(
            "nets.inversion:unet",
            "UNet",
            "network: 3D U-Net, of the kind of DeepQSM and QSMnet",
            "Susceptibility was computed by a 3D U-Net (weights {weights}).",
            ("bollmann2019", "ronneberger2015"),
            trained=True,
        ),
        "qsmgan": Method(
            "nets.inversion:qsmgan",
            "QSMGAN",
            "network: QSMGAN's generator, which sees more than it maps",
            "Susceptibility was computed by the generator of QSMGAN (weights {weights}).",
            ("chen2020",),
            trained=True,
        ),
        "si-qsm": Method(
            "nets.inversion:si_qsm",
            "SIQSM",
            "network: SI-QSM, trained on spheres and cylinders in closed form",
            "Susceptibility was computed by SI-QSM, a residual inception U-Net after Larraín "
            "(thesis, Pontificia Universidad Católica de Chile, 2022; weights {weights}).",
            (),
            trained=True,
        ),
        "meta-qsm": Method(
            "nets.inversion:meta_qsm",
            "MetaQSM",
            "network: Meta-QSM, whose kernels fit the voxel size",
            "Susceptibility was computed by Meta-QSM, whose convolution kernels are predicted "
            "from the voxel size (weights {weights}).",
            ("liu2019meta",),
            trained=True,
        ),
        "cpsi-net": Method(
            "nets.inversion:cpsi_net",
            "CPsiNet",
            "network: C-Psi-Net, from the high-pass filtered phase of SWI",
            "Susceptibility was computed from high-pass filtered phase by C-Psi-Net (weights "
            "{weights}).",
            ("lu2021",),
            starts_from="phase",
            trained=True,
        ),
    },
    "cosmos": {
        "cosmos": Method(
            "numerics.inversion.cosmos:cosmos",
            "Cosmos",
            "COSMOS: all orientations of a head inverted together",
            "The orientations of each head were registered rigidly to the first by their "
            "magnitudes (mutual information, SimpleITK), their local fields resampled (cubic "
            "spline), and susceptibility computed from all of them (COSMOS, weighted by the "
            "noise, lambda {lambda_}).",
            ("liu2009", "mattes2003", "lowekamp2013"),
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


GIVEN = "given"
"""Name of the user's own mask in an expression."""


SIGNS: dict[type[ast.operator], str] = {ast.BitAnd: "&", ast.BitOr: "|"}


def mask_steps(expression: str) -> tuple[str, ...]:
    """Read a mask expression into the order of work: each sign stands after its two masks.

    Python's own grammar decides: ``&`` (in both) comes before ``|`` (in either), brackets before
    both.

    >>> mask_steps("bet & quality"), mask_steps("given & (quality | threshold)")
    (('bet', 'quality', '&'), ('given', 'quality', 'threshold', '|', '&'))

    Raises
    ------
    ValueError
        If a name, a sign or a bracket is missing, or a name is no mask method or stands twice; it
        names the place.
    """
    words = [(word[0], word.start() + 1) for word in re.finditer(r"[&|()]|[^&|()\s]+", expression)]
    names = _mask_names(expression, words)
    # The grammar sees an identifier for each name, whatever letters the name has.
    plain = " ".join(f"m{names.index(word)}" if word in names else word for word, _ in words)
    try:
        tree = ast.parse(plain, mode="eval").body
    except (SyntaxError, MemoryError, RecursionError) as error:
        brackets = plain.count("(") != plain.count(")") or ")" in plain.partition("(")[0]
        what = "a bracket is missing its partner" if brackets else f"cannot be read ({error})"
        raise ValueError(f"mask {expression!r}: {what}") from error

    def steps(node: ast.expr) -> tuple[str, ...]:
        if isinstance(node, ast.BinOp):
            return (*steps(node.left), *steps(node.right), SIGNS[type(node.op)])
        assert isinstance(node, ast.Name)
        return (names[int(node.id[1:])],)

    return steps(tree)


def _mask_names(expression: str, words: Sequence[tuple[str, int]]) -> list[str]:
    """Names in a mask expression, once it is sure that names and signs take turns."""

    def wrong(what: str, place: int) -> ValueError:
        return ValueError(f"mask {expression!r}: {what} (at character {place})")

    names: list[str] = []
    for word, place in words:
        if word in "&|()":
            continue
        if word in ("and", "or", "not"):
            raise wrong(f"{word!r} means nothing here: write & for both, | for either", place)
        if word in names:
            raise wrong(f"{word} stands there twice; once is enough", place)
        if word != GIVEN:
            try:
                method("mask", word)
            except ValueError as error:
                raise wrong(f"{error}; or {GIVEN!r} for a mask of your own", place) from None
        names.append(word)
    bounds = [("(", 0), *words, (")", len(expression) + 1)]
    for (before, _), (word, place) in pairwise(bounds):
        wants, begins = before in "&|(", word == "(" or word in names
        if begins and not wants:
            raise wrong(f"a sign (& or |) is missing between {before!r} and {word!r}", place)
        if wants and not begins:
            raise wrong("a method is missing; write 'bet & quality', for example", place)
    return names


OPTIONAL = ("offset", "relaxation", "swi", "background", "cosmos")
"""Stages that may be left out, by ``none``."""


def check_choice(stage: str, expression: str) -> None:
    """Insist that a stage can run what is chosen for it.

    Raises
    ------
    ValueError
        Naming what is wrong, and what may be chosen.
    """
    if expression == "none" and stage in OPTIONAL:
        return
    if stage == "mask":
        if expression == "none":
            msg = "mask cannot be 'none': choose a method, an expression of methods, or 'given'"
            raise ValueError(msg)
        mask_steps(expression)
        return
    sign = OPERATORS.get(stage)
    names = [word.strip() for word in expression.split(sign)] if sign else [expression]
    for name in names:
        if name in ("none", ""):
            beside = f" in {expression!r}" if len(names) > 1 else ""
            msg = f"{stage} cannot be {name!r}{beside}: choose from {', '.join(METHODS[stage])}"
            raise ValueError(msg)
        method(stage, name)
        if names.count(name) > 1:
            raise ValueError(f"{stage} {expression!r}: {name} is there twice; name it once")


def needs_background(inversions: Sequence[str]) -> bool:
    """Whether the background must be removed before one of these inversions."""
    return any(method("inversion", name).starts_from == "local field" for name in inversions)


def function_of(stage: str, name: str) -> Callable[..., Any]:
    """Numerics function of a method."""
    module, function = method(stage, name).function.split(":")
    return getattr(importlib.import_module(f"qsmpipe.{module}"), function)


def interface_of(stage: str, name: str) -> type[Any]:
    """Nipype interface class of a method."""
    row = method(stage, name)
    return getattr(importlib.import_module(f"qsmpipe.interfaces.{stage}"), row.interface)


SUPPLIED = frozenset({
    "b0_direction", "b0_directions", "echo_times", "field_strength", "magnitude", "noise",
    "r2star", "start",
})  # fmt: skip
"""Keyword arguments that come from the data and not from the user."""


@dataclass(frozen=True)
class Parameter:
    """A choice of a method."""

    kind: Kind
    """What it may be."""
    default: Any
    description: str
    """What it is, with its unit: a sentence without its full stop."""


def parameters_of(stage: str, name: str) -> Mapping[str, Parameter]:
    """Parameters of a method that a user may set, from its function's own signature."""
    return parameters(function_of(stage, name))


def fitted(stage: str, name: str, key: str, value: Any) -> Any:
    """Give the value of a parameter in the type that its function wants.

    Raises
    ------
    ValueError
        If the parameter cannot have it; names stage, method, parameter and what it may be.
    """
    try:
        return parameters_of(stage, name)[key].kind.fit(value)
    except ValueError as error:
        raise ValueError(f"{stage}.{name}.{key.removesuffix('_')} {error}") from error


@cache
def parameters(function: Callable[..., Any]) -> Mapping[str, Parameter]:
    """Read the choices of a function: its keyword-only arguments that are no data.

    What each may be comes from its annotation, what it is from the docstring: the first sentence.

    Raises
    ------
    TypeError
        If an annotation is none that a parameter may have, or the docstring leaves one out.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    told = _descriptions(function)
    found = {}
    for name, argument in inspect.signature(function).parameters.items():
        if argument.kind is argument.KEYWORD_ONLY and name not in SUPPLIED:
            if name not in told:
                raise TypeError(f"the docstring of {function.__qualname__} does not tell {name}")
            found[name] = Parameter(Kind.of(hints[name]), argument.default, told[name])
    return MappingProxyType(found)


def summary(function: Callable[..., Any]) -> str:
    """First line of a docstring, plain."""
    return _plain(_parsed(function).short_description or "")


def _descriptions(function: Callable[..., Any]) -> dict[str, str]:
    return {
        name.strip(): _plain(re.split(r"\.\s", one.description or "")[0])
        for one in _parsed(function).params
        for name in one.arg_name.split(",")
    }


def _parsed(function: Callable[..., Any]) -> Docstring:
    return parse(inspect.getdoc(function) or "", DocstringStyle.NUMPYDOC)


def _plain(text: str) -> str:
    """``text`` without the marks of reStructuredText."""
    text = re.sub(r"\s*\[\d+\]_", "", " ".join(text.split()))
    text = re.sub(r":\w+:`[~.]?([^`]*)`", lambda found: found[1].replace("\\", ""), text)
    return text.replace("``", "`").rstrip(".")
