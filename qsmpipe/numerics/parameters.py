"""What a parameter of a method may be: said once, by the annotations of its function.

A function of :mod:`qsmpipe.numerics` annotates each choice with one of the types below, or with a
like one of its own (:mod:`annotated_types` has the words), and describes it, with its unit, in the
section "Parameters" of its docstring. Whoever asks a user for values reads both from there.
"""

import math
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from numbers import Integral, Real
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    ParamSpec,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

from annotated_types import Ge, GroupedMetadata, Gt, Interval, Le, Lt

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

Positive: TypeAlias = Annotated[float, Gt(0)]
NotNegative: TypeAlias = Annotated[float, Ge(0)]
Share: TypeAlias = Annotated[float, Interval(ge=0, le=1)]
Count: TypeAlias = Annotated[int, Ge(1)]
"""Steps of an iteration, or whatever else there is one of at least."""


@dataclass(frozen=True)
class Kind:
    """Values that an annotation allows."""

    base: type | None = None
    """bool, int, float or str; None where there are only ``words``."""
    low: float | None = None
    high: float | None = None
    without_low: bool = False
    """Whether ``low`` itself is not allowed."""
    without_high: bool = False
    words: tuple[str, ...] = ()
    """Words that stand for a value, or for a rule that chooses one."""
    many: bool = False
    """Whether it is a sequence of such values."""

    @classmethod
    def of(cls, annotation: Any) -> "Kind":
        """Read an annotation.

        >>> Kind.of(Positive | Literal["auto"])
        Kind(base=<class 'float'>, low=0, high=None, without_low=True, without_high=False, \
words=('auto',), many=False)

        Raises
        ------
        TypeError
            If it is none of those that a parameter may have.
        """
        if annotation in (bool, int, float, str):
            return cls(annotation)
        origin, parts = get_origin(annotation), get_args(annotation)
        if origin is Literal:
            return cls(words=parts)
        if origin is Annotated:
            return cls.of(parts[0])._within(parts[1:])
        if origin is Sequence:
            return replace(cls.of(parts[0]), many=True)
        if origin in (Union, UnionType):
            kinds = [cls.of(part) for part in parts]
            values = [kind for kind in kinds if not kind.words]
            if len(values) == 1:
                return replace(values[0], words=tuple(w for kind in kinds for w in kind.words))
        raise TypeError(f"{annotation} is no type of a parameter: see {__name__}")

    def _within(self, limits: Sequence[Any]) -> "Kind":
        found: dict[str, Any] = {}
        for limit in limits:
            for one in limit if isinstance(limit, GroupedMetadata) else (limit,):
                match one:
                    case Gt(gt=low):
                        found |= {"low": low, "without_low": True}
                    case Ge(ge=low):
                        found |= {"low": low}
                    case Lt(lt=high):
                        found |= {"high": high, "without_high": True}
                    case Le(le=high):
                        found |= {"high": high}
        return replace(self, **found)

    def __str__(self) -> str:
        """Say what a user may give.

        >>> str(Kind.of(Positive | Literal["auto"])), str(Kind.of(Share)), str(Kind.of(bool))
        ("a number above 0, or 'auto'", 'a number from 0 to 1', 'true or false')
        """
        choices = [repr(word) for word in self.words]
        if self.base is not None:
            value = " ".join(filter(None, (NAMES[self.base], self._range())))
            choices.insert(0, f"a list, each {value}" if self.many else value)
        comma = "," if len(choices) > 2 or self.base is not None else ""
        return f"{comma} or ".join(filter(None, (", ".join(choices[:-1]), choices[-1])))

    def _range(self) -> str:
        low, high = (
            f"{limit:.4g}" if limit is not None else "" for limit in (self.low, self.high)
        )
        if low and high and not (self.without_low or self.without_high):
            return f"from {low} to {high}"
        above = low and (f"above {low}" if self.without_low else f"of {low} or more")
        below = high and (f"below {high}" if self.without_high else f"up to {high}")
        return " and ".join(filter(None, (above, below)))

    def fit(self, value: Any) -> Any:
        """Give ``value`` in the type that is wanted: a whole number is a number as well.

        Raises
        ------
        ValueError
            If it is none that may be given; it says what may.
        """
        if not self.takes(value):
            raise ValueError(f"is {value!r}: give {self}")
        if self.base is not float or isinstance(value, str):
            return value
        return tuple(map(float, value)) if self.many else float(value)

    def takes(self, value: Any) -> bool:
        """Whether a user may give ``value``; no truth value for a number, though Python would."""
        if isinstance(value, str):
            return value in self.words or (self.base is str and not self.many)
        if self.many:
            one = replace(self, many=False)
            return isinstance(value, Sequence) and all(map(one.takes, value))
        if isinstance(value, bool) or self.base is bool:
            return isinstance(value, bool) and self.base is bool
        number = {int: Integral, float: Real}.get(self.base or str)
        return number is not None and isinstance(value, number) and self.holds(float(value))

    def allows(self, value: Any) -> bool:
        """Whether ``value`` is one of the words, or a number of any type within the bounds."""
        return value in self.words if isinstance(value, str) else self.holds(float(value))

    def holds(self, number: float) -> bool:
        """Whether ``number`` is within the bounds; what is not finite never is."""
        if not math.isfinite(number):
            return False
        if self.low is not None and not number >= self.low:
            return False
        if self.high is not None and not number <= self.high:
            return False
        return not (
            (self.without_low and number == self.low)
            or (self.without_high and number == self.high)
        )


def checked(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a function refuse numbers out of the bounds of its annotations, and words not in them.

    It then raises a ``ValueError`` that names the argument and what it may be.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    kinds = {name: kind for name, hint in hints.items() if (kind := _bounded(hint))}

    @wraps(function)
    def call(*data: Arguments.args, **choices: Arguments.kwargs) -> Result:
        for name, value in choices.items():
            if name in kinds and not kinds[name].allows(value):
                raise ValueError(f"{name} is {value!r}: give {kinds[name]}")
        return function(*data, **choices)

    return call


def _bounded(annotation: Any) -> Kind | None:
    """Kind of what may be a number in bounds; None for all else."""
    try:
        kind = Kind.of(annotation)
    except TypeError:
        return None  # data
    is_number = kind.base in (int, float) and not kind.many
    return kind if is_number and (kind.low, kind.high, kind.words) != (None, None, ()) else None


NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
