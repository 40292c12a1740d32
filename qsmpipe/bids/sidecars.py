"""Metadata of images by the inheritance principle."""

import functools
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsmpipe.bids.entities import relative
from qsmpipe.bids.names import part_of


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
        self._read = functools.cache(self._load)

    def of(self, image: File) -> tuple[dict[str, Any], list[str]]:
        """Metadata of an image, and what was wrong with its sidecars."""
        metadata: dict[str, Any] = {}
        problems = []
        for item in self._applicable(image):
            content = self._read(item.path)
            if isinstance(content, str):
                problems.append(content)
            else:
                metadata |= content
        return {k: v for k, v in metadata.items() if v is not None}, problems

    def _applicable(self, image: File) -> Iterator[File]:
        depth = len(image.folder.relative_to(self._root).parts)
        for folder in reversed([image.folder, *image.folder.parents][: depth + 1]):
            here = [
                item
                for item in self._by_place[folder, image.suffix]
                if item.entities.items() <= image.entities.items()
            ]
            yield from sorted(here, key=lambda item: len(item.entities))

    def _load(self, path: Path) -> dict[str, Any] | str:
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            return f"{relative(path, self._root)}: not readable as JSON ({error}); mend the file"
        if not isinstance(content, dict):
            return (
                f"{relative(path, self._root)}: holds a JSON {type(content).__name__} instead of "
                "key: value pairs; mend the file"
            )
        return content
