"""Dataclasses from the tables of a TOML file, checked value by value, and back.

The annotations of a dataclass are the rules: types, ``Literal`` choices, and bounds as
``Annotated[float, Gt(0)]`` with the classes of :mod:`annotated_types`. Pydantic compares; the
sentences are ours.
"""

import collections.abc
import difflib
import json
import math
import tomllib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import MinLen
from pydantic import AfterValidator, TypeAdapter, ValidationError

from qsmpipe.numerics.parameters import Kind

Part = TypeVar("Part")
Place = tuple[str | int, ...]

LARGEST = 2.0**1000
"""No number is as large as this, be it infinite or too long for a float; NaN is not below it."""

MISSING = {"missing", "missing_argument", "missing_keyword_only_argument"}
UNKNOWN = {"unexpected_keyword_argument", "extra_forbidden"}
"""What pydantic calls a key that is lacking, and one that nobody knows."""


def frozen(value: Any) -> Any:
    """Turn lists into tuples, within tables, too.

    >>> frozen({"widths": [16, [32, 64]]})
    {'widths': (16, (32, 64))}
    """
    if isinstance(value, list | tuple):
        return tuple(map(frozen, value))
    if isinstance(value, Mapping):
        return {key: frozen(one) for key, one in value.items()}
    return value


Options = Annotated[Mapping[str, Any], AfterValidator(frozen)]
"""A table whose keys only the one who reads it knows."""


def read_table(path: str | Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises
    ------
    ValueError
        If it cannot be read, or is not TOML; it names the file.
    """
    try:
        return tomllib.loads(Path(path).read_bytes().decode())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        msg = f"{path}: not TOML, which is UTF-8, and byte {error.start} is not: save it as UTF-8"
        raise ValueError(msg) from error
    except RecursionError as error:
        raise ValueError(f"{path}: not a TOML file that can be read: nested too deeply") from error
    except ValueError as error:  # TOMLDecodeError, and numbers that are too long for Python
        raise ValueError(f"{path}: not a readable TOML file ({error})") from error


def from_table(
    part: type[Part],
    table: Mapping[str, Any],
    where: str,
    *,
    spelled: Callable[[str], str] = str,
) -> Part:
    """Make a dataclass of a table; lists become tuples.

    Parameters
    ----------
    part : dataclass
        What to make.
    table : mapping
        Its fields by name, as TOML has them: no ``None``.
    where : str
        The file or what else the table comes from, which messages begin with; may be empty.
    spelled : callable
        How the user writes the name of a field.

    Raises
    ------
    ValueError
        If a key is unknown or missing or its value does not fit; it names ``where``, the key, the
        value and what is expected, of all that is wrong.
    """
    return checked(part, table, where, spelled=spelled)


def checked(
    kind: Any, value: Any, where: str, *, spelled: Callable[[str], str] = str, name: str = ""
) -> Any:
    """Insist that a value has a type, which may be any annotation; see :func:`from_table`.

    ``name`` is that of the whole value.
    """
    faults: dict[Place, str] = {}
    for place, one in _leaves(value):
        if isinstance(one, str) and "\0" in one:
            faults[place] = f"{_written(kind, place, spelled, name)} holds a NUL character"
        elif not isinstance(one, str) and not _is_plain(one):
            faults[place] = _sentence(kind, place, one, spelled, name)
    if not faults:
        try:
            return _adapter(kind).validate_json(_json(value), strict=True, extra="forbid")
        except ValidationError as error:
            for fault in error.errors(include_url=False):
                place = _known_part(kind, fault["loc"])
                faults.setdefault(place, _told(kind, place, fault, spelled, name))
    # A list whose entry does not fit counts as too short, too.
    innermost = [
        text
        for place, text in faults.items()
        if not any(other[: len(place)] == place for other in faults if other != place)
    ]
    lead = f"{where}: " if where else ""
    raise ValueError(lead + "; ".join(innermost))


def check_keywords(
    function: Callable[..., Any], given: Mapping[str, Any], name: str, *, but: Sequence[str] = ()
) -> None:
    """Insist that keyword arguments exist, are complete and have the types that are annotated.

    ``name`` is that of the table; the parameters in ``but`` do not come from it.

    Raises
    ------
    ValueError
        As for :func:`from_table`.
    """
    known = {
        key: parameter
        for key, parameter in signature(function).parameters.items()
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and key not in but
    }
    for key, value in given.items():
        if key not in known:
            raise ValueError(_unknown(key, [*known], f" in {name}"))
        checked(known[key].annotation, value, "", name=f"{name}.{key}")
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in given:
            raise ValueError(f"{name}.{key} is missing")


def _unknown(key: str, known: Sequence[str], inside: str) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"it may hold {', '.join(known)}"
    return f"there is no {key!r}{inside}; {hint}"


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _json(value: Any) -> str:
    """Text that pydantic reads strictly and yet takes its lists for tuples."""
    return json.dumps(value)


def _leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """All that is neither table nor list, with its keys and indices."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _leaves(one, (*place, key))
    elif isinstance(value, list | tuple):
        for index, one in enumerate(value):
            yield from _leaves(one, (*place, index))
    else:
        yield place, value


def _is_plain(value: Any) -> bool:
    """Whether a value is a number or a truth: no date, which nothing here takes, and finite."""
    return isinstance(value, int | float) and abs(value) < LARGEST


def _told(
    kind: Any, place: Place, fault: Mapping[str, Any], spelled: Callable[[str], str], name: str
) -> str:
    """Say what is wrong with one value."""
    if fault["type"] in UNKNOWN:
        known = [spelled(one.name) for one in fields(_bare(_annotation(kind, place[:-1])))]
        inside = f" in {_written(kind, place[:-1], spelled, name)}" if place[1:] else ""
        return _unknown(spelled(str(place[-1])), known, inside)
    if fault["type"] in MISSING:
        return f"{_written(kind, place, spelled, name)} is missing"
    if fault["type"] == "value_error":
        reason = str(fault["ctx"]["error"])
        return f"{_written(kind, place, spelled, name)}: {reason}" if place else reason
    return _sentence(kind, place, fault["input"], spelled, name)


def _sentence(
    kind: Any, place: Place, value: Any, spelled: Callable[[str], str], name: str
) -> str:
    known = _known_part(kind, place)
    what = expected(_annotation(kind, known)) if known == place else "another value"
    if isinstance(value, float) and not math.isfinite(value):
        what = what.replace("a number", "a finite number")
    return f"{_written(kind, place, spelled, name)} is {shown(value)}: give {what}"


def shown(value: Any) -> str:
    """Write a value as in TOML, or nearly so: ``true``, ``"text"``."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    text = {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}.get(text, text)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _written(kind: Any, place: Place, spelled: Callable[[str], str], name: str) -> str:
    """Name of a place: ``data.scans``, ``stored in entry 2 of acquisitions``."""
    text = name
    for step in place:
        if isinstance(step, int):
            text = f"entry {step + 1} of {text}"
        elif " of " in text:
            text = f"{step} in {text}"
        else:
            text = f"{text}.{step}" if text else spelled(step)
    return text


def _known_part(kind: Any, place: Sequence[str | int]) -> Place:
    """Leave out of a place the kinds of a union, which pydantic adds to keys and indices."""
    known: Place = ()
    for step in place:
        inner = _inner(kind, step)
        known = (*known, step) if inner is not None or _is_part(kind) else known
        if inner is None:
            break
        kind = inner
    return known


def _annotation(kind: Any, place: Place) -> Any:
    for step in place:
        kind = _inner(kind, step)
    return kind


def _inner(kind: Any, step: str | int) -> Any:
    """Annotation of what stands under a key or an index; None where that is not known."""
    bare = _bare(kind)
    if _is_part(kind):
        return get_type_hints(bare, include_extras=True).get(str(step))
    origin, inside = get_origin(bare), get_args(bare)
    if isinstance(step, str):
        return inside[1] if origin is collections.abc.Mapping else None
    if origin is tuple:
        return inside[0] if inside[1:] == (...,) else dict(enumerate(inside)).get(step)
    return inside[0] if origin is collections.abc.Sequence else None


def _bare(kind: Any) -> Any:
    """Without bounds, and without ``None``."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    choices = [one for one in _choices(kind) if one is not types.NoneType]
    return kind if len(choices) != 1 or choices[0] is kind else _bare(choices[0])


def _choices(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _is_part(kind: Any) -> bool:
    return is_dataclass(_bare(kind))


def expected(kind: Any) -> str:
    """Say what an annotation asks for.

    >>> from qsmpipe.numerics.parameters import Positive
    >>> expected(Positive | None), expected(tuple[float, float])
    ('a number above 0', 'a list of 2, each a number')
    """
    if get_origin(kind) is Annotated:
        bare, *limits = get_args(kind)
        least = [limit.min_length for limit in limits if isinstance(limit, MinLen)]
        if least:
            return expected(bare) + (", not empty" if least == [1] else f", {least[0]} at least")
    choices = [one for one in _choices(kind) if one is not types.NoneType]
    if kind is Any:
        return "a finite number, a text, true or false"
    try:
        return str(Kind.of(Union[tuple(choices)]))  # noqa: UP007  # of as many as there are
    except TypeError:  # no choice of a method, but a table or a list
        bare = _bare(kind)
        if get_origin(bare) is not tuple:
            return "a table"
    inside = get_args(bare)
    count = "" if inside[1:] == (...,) else f" of {len(inside)}"
    return f"a list{count}, each {expected(inside[0])}"


def merged(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Put ``changes`` into a table, and into those that it holds.

    >>> merged({"data": {"source": "shapes", "options": {"rim": 8}}, "seed": 0},
    ...        {"data": {"source": "brains"}})
    {'data': {'source': 'brains'}, 'seed': 0}
    """
    kept = dict(table)
    if any(changes.get(name, table.get(name)) != table.get(name)
           for name in ("architecture", "source")):  # fmt: skip
        kept.pop("options", None)
    for name, value in changes.items():
        inner = kept.get(name)
        if isinstance(value, dict) and isinstance(inner, dict):
            value = merged(inner, value)
        kept[name] = value
    return kept


def to_table(part: Any) -> dict[str, Any]:
    """Make a table of a dataclass, which :func:`from_table` takes; what is None is left out."""
    return {
        one.name: _thawed(value)
        for one in fields(part)
        if (value := getattr(part, one.name)) is not None
    }


def _thawed(value: Any) -> Any:
    if is_dataclass(value):
        return to_table(value)
    if isinstance(value, Mapping):
        return {key: _thawed(one) for key, one in value.items()}
    return [_thawed(one) for one in value] if isinstance(value, tuple | list) else value
