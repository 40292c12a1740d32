"""Inputs of the interfaces that take maps, from the table of all maps."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from nipype.interfaces.base import BaseInterfaceInputSpec, File, traits

from qsmpipe.maps import Map

Spec = TypeVar("Spec", bound=type[BaseInterfaceInputSpec])


def takes(rows: Mapping[str, Map]) -> Callable[[Spec], Spec]:
    """Give an input spec an input for each of these maps, under the map's key."""

    def add(spec: Spec) -> Spec:
        for key, row in rows.items():
            spec.add_class_trait(key, _input(row))
        return spec

    return add


def _input(row: Map) -> traits.TraitType:
    if row.by_method:
        return traits.List(File(exists=True), desc=row.summary)
    return File(exists=True, desc=row.summary)
