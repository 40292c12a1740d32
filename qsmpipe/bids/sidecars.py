"""Metadata of images by the inheritance principle."""

import functools
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from qsmpipe.bids.entities import relative
from qsmpipe.bids.names import part_of
from qsmpipe.pointers import not_fetched


@dataclass(frozen=True)
class File:
    """An image or sidecar, and what its name says."""

    path: Path
    entities: Mapping[str, str]
    suffix: str
    extension: str

    @property
    def is_image(self) -> bool:
        """Whether it holds voxels."""
        return self.extension != ".json"

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.path.parent

    @property
    def shared(self) -> dict[str, str]:
        """Entities that all files of an acquisition have in common."""
        apart = {"echo", "part"}
        if self.part.startswith("rec-"):
            apart.add("reconstruction")
        elif self.part.startswith("acq-"):
            apart.add("acquisition")
        return {k: v for k, v in self.entities.items() if k not in apart}

    @property
    def group(self) -> tuple[Any, ...]:
        """What files of one acquisition have in common."""
        return self.folder, self.suffix, *sorted(self.shared.items())

    @property
    def query(self) -> dict[str, str]:
        """What a filter may ask for."""
        more = {"suffix": self.suffix, "datatype": "anat", "extension": self.extension}
        return {**self.entities, **more}

    @property
    def part(self) -> str:
        """Magnitude, unless the name says otherwise, by whatever word."""
        return part_of(self.entities)


NUMBERS = {
    "EchoTime": "s", "EchoTime1": "s", "EchoTime2": "s", "MagneticFieldStrength": "T",
    "ImagingFrequency": "MHz", "RepetitionTime": "s", "RepetitionTimeExcitation": "s",
    "FlipAngle": "deg", "PixelBandwidth": "Hz", "SliceThickness": "mm",
    "SpacingBetweenSlices": "mm",
}  # fmt: skip
"""Fields that are numbers, and their units in BIDS."""

WORDS = ("Manufacturer", "Units", "MRAcquisitionType", "CoilCombinationMethod")
"""Fields that are one text."""


class Content(NamedTuple):
    """What a sidecar says."""

    metadata: Mapping[str, Any]
    problem: str = ""
    """Why it cannot be read; "" where it can."""
    detail: str = ""
    """Where in the file."""
    remarks: Mapping[str, str] = MappingProxyType({})
    """What was read although it is not as BIDS has it: a key for each kind to a sentence."""


class Sidecars:
    """Metadata by the inheritance principle: the nearer to the image, the stronger.

    pybids gives up on a whole dataset for one sidecar that is not JSON; here that is a problem of
    the images that it belongs to.
    """

    def __init__(self, root: Path, sidecars: Iterable[File]) -> None:
        self._root = root
        self._by_place: dict[tuple[Path, str], list[File]] = defaultdict(list)
        for item in sidecars:
            self._by_place[item.folder, item.suffix].append(item)
        self._read = functools.cache(read)

    def of(self, image: File) -> dict[str, Any]:
        """Metadata of an image."""
        metadata: dict[str, Any] = {}
        for item in self._applicable(image):
            metadata |= self._read(item.path).metadata
        return {k: v for k, v in metadata.items() if v is not None}

    def told(self, images: Iterable[File]) -> tuple[list[str], list[str]]:
        """Problems and remarks of the sidecars of several images, a sentence for each kind."""
        paths = {item.path: None for image in images for item in self._applicable(image)}
        problems: dict[str, list[Path]] = defaultdict(list)
        remarks: dict[str, list[Path]] = defaultdict(list)
        for path in paths:
            content = self._read(path)
            if content.problem:
                problems[content.problem].append(path)
            for kind in content.remarks:
                remarks[kind].append(path)
        return (
            [
                f"{self._name(where)}: {problem}{self._read(where[0]).detail}"
                for problem, where in problems.items()
            ],
            [
                f"{self._name(where)}: {self._read(where[0]).remarks[kind]}"
                for kind, where in remarks.items()
            ],
        )

    def _name(self, paths: list[Path]) -> str:
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        return relative(paths[0], self._root) + more

    def _applicable(self, image: File) -> Iterator[File]:
        depth = len(image.folder.relative_to(self._root).parts)
        for folder in reversed([image.folder, *image.folder.parents][: depth + 1]):
            here = [
                item
                for item in self._by_place[folder, image.suffix]
                if item.entities.items() <= image.entities.items()
            ]
            yield from sorted(here, key=lambda item: len(item.entities))


def read(path: Path) -> Content:
    """Read a sidecar, and what can be told from one that is not quite as BIDS has it."""
    if remedy := not_fetched(path):
        return Content({}, remedy)
    try:
        stored = path.read_bytes()
    except OSError as error:
        return Content({}, f"cannot be read ({error.strerror}): look at its permissions")
    remarks = {}
    try:
        text = stored.decode("utf-8-sig")
    except UnicodeDecodeError:
        if stored.startswith((b"\xff\xfe", b"\xfe\xff")):
            return Content({}, "not readable as JSON: it is in UTF-16; save it as UTF-8")
        text = stored.decode("latin-1")
        remarks["encoding"] = "not in UTF-8, and read as Latin-1: save it as UTF-8"
    try:
        content = json.loads(text, object_pairs_hook=_once)
    except ValueError as error:
        return Content({}, *_explain(text, error))
    if not isinstance(content, dict):
        kind = type(content).__name__
        return Content({}, f"holds a JSON {kind} instead of key: value pairs; mend the file")
    for key, value in content.items():
        plain = _plain(key, value)
        if plain is not None:
            content[key] = plain
            remarks[key] = f"{key} {value!r} is read as {plain!r}"
    return Content(content, remarks=remarks)


def as_number(value: Any) -> float | None:
    """Give a number of JSON as float; None for anything else."""
    valid = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if valid else None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of pairs; a key that stands twice must say the same."""
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content and content[key] != value:
            msg = f"{key} stands twice, as {content[key]!r} and as {value!r}"
            raise ValueError(msg)
        content[key] = value
    return content


def _explain(text: str, error: ValueError) -> tuple[str, str]:
    """Say what keeps a text from being JSON, and where."""
    why = "not readable as JSON"
    if not text.strip():
        return f"{why}: the file is empty; convert it again", ""
    if not isinstance(error, json.JSONDecodeError):
        return f"{why}: {error}; keep one", ""
    start = text[: error.pos].rstrip()
    at = f" (line {error.lineno}, column {error.colno})"
    if re.match(r"//|/\*|#", text[error.pos :].lstrip()):
        return f"{why}: it holds comments, which JSON does not know; take them out", at
    if start.endswith(",") and text[error.pos :].lstrip()[:1] in ("}", "]"):
        return f"{why}: a comma before a closing bracket; take it out", at
    return f"{why} ({error.msg}); mend the file", at


def _plain(key: str, value: Any) -> float | str | None:
    """Give the number or text that a value stands for without doubt, unless it is one."""
    single = value[0] if isinstance(value, list) and len(value) == 1 else value
    if key in WORDS:
        return single if isinstance(value, list) and isinstance(single, str) else None
    if key not in NUMBERS:
        return None
    if isinstance(single, str):
        number = re.fullmatch(
            rf"\s*([-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)\s*(?:{NUMBERS[key]})?\s*", single
        )
        return float(number[1]) if number else None
    return as_number(single) if isinstance(value, list) else None
