"""Dataclasses from the tables of a TOML file, and back."""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, get_args

Part = TypeVar("Part")


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


def from_table(part: type[Part], table: Mapping[str, Any], where: str) -> Part:
    """Make a dataclass of a table; lists become tuples.

    Raises
    ------
    ValueError
        If a key is unknown or missing.
    """
    known = {one.name: one for one in fields(part)}  # type: ignore[arg-type]
    strangers = sorted(set(table) - set(known))
    if strangers:
        msg = f"{where} has no {', '.join(strangers)}: its keys are {', '.join(known)}"
        raise ValueError(msg)
    missing = [name for name, one in known.items() if name not in table
               and one.default is MISSING and one.default_factory is MISSING]  # fmt: skip
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    values = {}
    for name, value in table.items():
        inner = _part(known[name].type)
        values[name] = _frozen(value) if inner is None else from_table(inner, value, f"[{name}]")
    try:
        return part(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _part(kind: Any) -> type | None:
    """Give the dataclass that a field holds, if it is one."""
    return next((one for one in (kind, *get_args(kind)) if is_dataclass(one)), None)  # type: ignore[return-value]


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


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return {key: _frozen(one) for key, one in value.items()}
    return value
