"""Input specs: what signature, annotations and docstring of a function make of them."""

import inspect
import io
import math
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import Annotated, Literal

import pytest
from annotated_types import Interval
from traits.api import TraitError

from qsmpipe.interfaces import inversion
from qsmpipe.interfaces.base import StageInputSpec, takes
from qsmpipe.interfaces.inversion import TV
from qsmpipe.methods import METHODS, function_of, interface_of, parameters, parameters_of
from qsmpipe.numerics.parameters import Count, Kind, NotNegative, Positive, Share
from qsmpipe.workflows.stage import interface_with

ROWS = [(stage, name) for stage, rows in METHODS.items() for name in rows]

KINDS = {
    "positive": (Positive, [1, 0.5], [0, -1, math.nan, math.inf, True, "1", None]),
    "not negative": (NotNegative, [0, 0.5], [-1e-9, "auto"]),
    "share": (Share, [0, 0.5, 1], [-0.1, 1.1]),
    "open interval": (Annotated[float, Interval(gt=0, lt=1)], [0.5], [0, 1]),
    "count": (Count, [1, 7], [0, 1.0, True]),
    "whole number": (int, [0, -3], [1.5, False, "3"]),
    "number or word": (Positive | Literal["auto"], [2, "auto"], [0, "Auto", True]),
    "word": (Literal["a", "b"], ["a", "b"], ["c", 1]),
    "words beside text": (str, ["", "any"], [1, True]),
    "switch": (bool, [True, False], [0, 1, "true"]),
    "list": (Sequence[Positive], [[1, 2.5], (3,), []], [1, [0.0], ["x"], "12"]),
}


def ruled(kind: object) -> Callable[..., None]:
    """A function with one parameter of a kind."""

    def function(*, value: kind = None) -> None:  # type: ignore[valid-type]
        """Do nothing.

        Parameters
        ----------
        value : anything
            Width of the ball (mm). More is not told.
        """

    return function


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_takes_what_its_annotation_says(name: str) -> None:
    annotation, good, bad = KINDS[name]
    kind = Kind.of(annotation)
    for value in good:
        fitted = kind.fit(value)
        assert list(fitted) == list(value) if isinstance(value, list | tuple) else fitted == value
        if annotation is Positive:
            assert type(fitted) is float
    for value in bad:
        with pytest.raises(ValueError, match=f"^is {re.escape(repr(value))}: give "):
            kind.fit(value)


@pytest.mark.parametrize("name", [n for n in KINDS if n not in ("list", "words beside text")])
def test_an_input_takes_what_its_annotation_says(name: str) -> None:
    annotation, good, bad = KINDS[name]
    function = ruled(annotation)
    function.__kwdefaults__["value"] = good[0]

    @takes(function)
    class Spec(StageInputSpec):
        pass

    assert Spec().value == good[0]
    assert Spec().trait("value").desc == "Width of the ball (mm)"
    for value in good:
        assert Spec(value=value).value == value
    for value in bad:
        if not isinstance(value, bool) and str(value) not in ("inf", "nan"):  # traits let them be
            with pytest.raises(TraitError):
                Spec(value=value)


def test_an_annotation_without_meaning_is_refused_and_so_is_a_parameter_without_description() -> (
    None
):
    with pytest.raises(TypeError, match="dict"):
        parameters(ruled(dict))

    def silent(*, width: float = 1.0) -> None:
        """Do nothing."""

    with pytest.raises(TypeError, match="silent does not tell width"):
        parameters(silent)


@pytest.mark.parametrize(("stage", "name"), ROWS, ids=map("-".join, ROWS))
def test_every_parameter_is_told_and_fits_its_own_default(stage: str, name: str) -> None:
    for key, parameter in parameters_of(stage, name).items():
        assert len(parameter.description.split()) >= 2, f"{key}: {parameter.description!r}"
        assert not re.search(r"[:`]`|\\|\]_|^As ", parameter.description), f"{key}: marks are left"
        fitted = parameter.kind.fit(parameter.default)
        assert fitted == (
            tuple(parameter.default) if parameter.kind.many else parameter.default
        ), key


@pytest.mark.parametrize(("stage", "name"), ROWS, ids=map("-".join, ROWS))
def test_a_function_refuses_what_its_annotations_do_not_allow(stage: str, name: str) -> None:
    """Before it looks at its data, of which there are none here."""
    function = function_of(stage, name)
    data = [
        None
        for argument in inspect.signature(function).parameters.values()
        if argument.kind is argument.POSITIONAL_OR_KEYWORD
    ]
    for key, parameter in parameters_of(stage, name).items():
        kind = parameter.kind
        wrong = [] if kind.low is None else [kind.low - 0.5, math.nan, math.inf]
        wrong += [] if kind.high is None else [kind.high + 0.5]
        wrong += [kind.low] if kind.without_low else []
        wrong += ["nonsense"] if kind.base in (int, float) and kind.words else []
        for value in wrong:
            message = f"^{key} is {re.escape(repr(value))}: give {re.escape(str(kind))}$"
            with pytest.raises(ValueError, match=message):
                function(*data, **{key: value})


@pytest.mark.parametrize(("stage", "name"), ROWS, ids=map("-".join, ROWS))
def test_an_interface_is_found_by_its_name_and_pickled_by_it(stage: str, name: str) -> None:
    made = interface_of(stage, name)
    assert made.__name__ == METHODS[stage][name].interface
    assert made.__name__ in dir(sys.modules[made.__module__])
    assert interface_of(stage, name) is made
    again = pickle.loads(pickle.dumps(made(num_threads=3)))
    assert type(again) is made
    assert type(again.inputs) is made.input_spec
    assert again.inputs.num_threads == 3


def test_a_fresh_process_unpickles_an_interface() -> None:
    """As the workers of a pool and the readers of crash files do: no module is loaded yet."""
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).inputs.lambda_)"
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(TV(lambda_=0.25)), capture_output=True
    )
    assert (done.stdout, done.stderr) == (b"0.25\n", b"")


def test_a_module_of_interfaces_has_no_others() -> None:
    with pytest.raises(AttributeError, match=r"qsmpipe\.interfaces\.inversion.*'Nonsense'"):
        inversion.Nonsense  # noqa: B018


def test_help_tells_what_the_function_does_and_what_its_parameters_are() -> None:
    with redirect_stdout(io.StringIO()) as told:
        TV.help()
    text = " ".join(told.getvalue().split())
    assert text.startswith("Invert the dipole with total variation")
    assert ":func:`qsmpipe.numerics.inversion.tv.tv`" in text
    assert "rho: (a floating point number > 0.0, nipype default value: 100.0)" in text
    assert "Penalty of the gradient's split over `lambda_` (mm/ppm)" in text


def test_a_value_that_is_neither_number_nor_word_is_told_what_may_be() -> None:
    with pytest.raises(
        ValueError,
        match=r"^inversion\.tv\.lambda is 'gcv': give a number above 0, 'auto', 'l-curve', or "
        r"'discrepancy'$",
    ):
        interface_with("inversion", "tv", {"lambda_": "gcv"})
