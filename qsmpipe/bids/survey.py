"""What lies in a dataset beside its acquisitions: images whose names nothing can be made of."""

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, overload

from pathspec import GitIgnoreSpec

from qsmpipe.bids.acquisition import Acquisition
from qsmpipe.bids.entities import ENTITIES, natural, relative
from qsmpipe.bids.names import Fault, entities_of, fault_of, looks_like_gradient_echo
from qsmpipe.bids.sidecars import File

APART = ("derivatives", "sourcedata", "rawdata", "code", "stimuli", "phenotype")
"""Folders of a dataset that hold no images of its own."""


@dataclass(frozen=True)
class LeftOut(Acquisition):
    """Images that cannot be read as an acquisition, but are reported like one."""

    where: str = ""
    """What has to change: folder or file within the dataset."""

    @property
    def name(self) -> str:
        """Path of what has to change, as a name."""
        return re.sub(r"(\.nii)?(\.\w+)?$", "", self.where).replace("/", "_")

    def _entities_in(self, datatype: str) -> Mapping[str, str]:
        # No map has this name: what lies in the output folder is of another acquisition.
        return {"subject": self.subject, "acquisition": re.sub(r"\W", "", self.name) + datatype}


@dataclass(frozen=True)
class Refusal:
    """Images that look like a gradient echo, and cannot be processed for their names' sake."""

    root: Path
    """The dataset."""
    subject: str
    """Label without ``sub-``, as the folder has it."""
    where: str
    """Folder or file within the dataset that has to change."""
    reason: str
    files: tuple[str, ...]
    """Images within the dataset that are left out."""

    @property
    def acquisition(self) -> LeftOut:
        """What takes the place of an acquisition in the report."""
        paths = tuple(self.root / name for name in self.files)
        return LeftOut(self.root, {"subject": self.subject}, "", ignored=paths, where=self.where)

    @property
    def message(self) -> str:
        """File or folder, what is wrong, what to do."""
        count = len(self.files)
        single = self.files[0] == self.where
        more = f" and {count - 1} more" if single and count > 1 else ""
        images = "" if single else f" ({count} image{'s' * (count > 1)} of it left out)"
        return f"{self.where}{more}: {self.reason}{images}"


@dataclass(frozen=True)
class Found(Sequence[Acquisition]):
    """Gradient-echo acquisitions in a dataset, and what was left out of them."""

    acquisitions: tuple[Acquisition, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()
    """What was passed over as it should be, a sentence each."""

    def __len__(self) -> int:
        return len(self.acquisitions)

    @overload
    def __getitem__(self, index: int) -> Acquisition: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Acquisition, ...]: ...

    def __getitem__(self, index: int | slice) -> Acquisition | tuple[Acquisition, ...]:
        return self.acquisitions[index]


class Survey:
    """All images of a dataset that look like gradient echoes, wherever they lie.

    Parameters
    ----------
    root : Path
        The dataset.
    participants : sequence of str
        Labels to look for, with or without ``sub-``. Empty: all.

    Raises
    ------
    ValueError
        If the dataset has no subjects, or not those that are asked for.
    """

    def __init__(self, root: Path, participants: Sequence[str]) -> None:
        self._root = root
        # sub-01, and what is meant to be like it: Sub-01, sub_01, a broken link
        self._folders = [
            path for path in sorted(root.iterdir())
            if re.match(r"sub", path.name, re.IGNORECASE) and (path.is_dir() or path.is_symlink())
        ]  # fmt: skip
        if not self._folders:
            msg = f"{root}: no folder sub-*; give the root of a BIDS dataset"
            raise ValueError(msg)
        present = [_label(path.name) for path in self._folders]
        asked = [str(label).removeprefix("sub-") for label in participants]
        if missing := [label for label in asked if label not in present]:
            shown = ", ".join(present[:20]) + (", ..." if len(present) > 20 else "")
            msg = f"{root}: no participant {', '.join(missing)}; there are {shown}"
            raise ValueError(msg)
        self.wanted = tuple(asked or present)
        """Labels of subjects."""
        self._ignored = _ignored(root / ".bidsignore")
        self.unreadable: list[Path] = []
        """Folders of these subjects that may not be listed."""
        self._images = [
            path
            for folder in self._folders
            if _label(folder.name) in self.wanted
            for path in _walk(folder, self.unreadable)
            if self._looks_right(path)
        ]

    def ignores(self, path: Path) -> bool:
        """Whether ``.bidsignore`` names a file."""
        return self._ignored.match_file(relative(path, self._root))

    def _looks_right(self, path: Path) -> bool:
        return looks_like_gradient_echo(PurePosixPath(relative(path, self._root)))

    def refusals(
        self, used: Collection[Path], indexed: Collection[Path], selection: Mapping[str, Any]
    ) -> list[Refusal]:
        """Tell why images that are not ``used`` are left out, those selected alone."""
        faults: dict[tuple[str, str], list[Path]] = defaultdict(list)
        where: dict[tuple[str, str], str] = {}
        for path in self._images:
            if path in used or self.ignores(path) or not _selected(path, selection):
                continue
            own = PurePosixPath(relative(path, self._root))
            fault = fault_of(own) or Fault(own.as_posix(), _unlisted(path, indexed))
            key = own.parent.as_posix() if fault.where == own.as_posix() else fault.where
            faults[key, fault.reason].append(path)
            where.setdefault((key, fault.reason), fault.where)
        found = [self._refusal(where[key], key[1], paths) for key, paths in faults.items()]
        found += [
            self._refusal(
                relative(path, self._root), "may not be read: look at its permissions", [path]
            )
            for path in self.unreadable
        ]
        lost = [path for path in self._folders if path.is_symlink() and not path.exists()]
        found += [
            Refusal(self._root, _label(path.name), path.name,
                    "a link to a folder that is not here: mount or fetch it", (path.name,))
            for path in lost if _label(path.name) in self.wanted
        ]  # fmt: skip
        return found

    def refusal(self, files: Sequence[File], reason: str) -> Refusal:
        """Refuse the files of one acquisition together."""
        paths = [item.path for item in files]
        return self._refusal(relative(paths[0], self._root), reason, paths)

    def _refusal(self, where: str, reason: str, paths: Sequence[Path]) -> Refusal:
        files = tuple(_printable(relative(path, self._root)) for path in paths)
        subject = _label(files[0].split("/")[0])
        return Refusal(self._root, subject, _printable(where), _printable(reason), files)

    def notes(self) -> tuple[str, ...]:
        """Say what was passed over: by ``.bidsignore``, outside of subjects, empty folders."""
        said = []
        if ignored := [path for path in self._images if self.ignores(path)]:
            said.append(
                f".bidsignore leaves out {len(ignored)} image{'s' * (len(ignored) > 1)} that look "
                f"like gradient echoes ({_printable(relative(ignored[0], self._root))}"
                f"{', ...' if len(ignored) > 1 else ''})"
            )
        beside = [
            path
            for folder in sorted(self._root.iterdir())
            if folder.is_dir()
            and folder not in self._folders
            and not folder.name.startswith((".", *APART))
            for path in _walk(folder, [])
            if self._looks_right(path) and not self.ignores(path)
        ]
        if beside:
            more = f" and {len(beside) - 1} more" if len(beside) > 1 else ""
            said.append(
                f"{_printable(relative(beside[0], self._root))}{more}: gradient echoes, by their "
                "names, that belong to no subject: not looked at; move them into sub-<label>"
            )
        said += [
            f"{_printable(folder.name)}: an empty folder; a DataLad subdataset needs datalad get"
            for folder in self._folders
            if _label(folder.name) in self.wanted
            and folder.is_dir()
            and folder not in self.unreadable
            and not any(folder.iterdir())
        ]
        return tuple(said)


def _label(folder: str) -> str:
    """Label of a subject's folder, right or wrong.

    >>> _label("sub-01"), _label("Sub_02"), _label("sub-01-02")
    ('01', '02', '01-02')
    """
    return re.sub(r"^sub(?:ject)?[-_. ]?", "", folder, flags=re.IGNORECASE)


def _unlisted(path: Path, indexed: Collection[Path]) -> str:
    """Say why an image with a name that BIDS allows belongs to no acquisition."""
    if path in indexed:
        return (
            "its name speaks of phase, but not as BIDS does: call it ..._part-phase_MEGRE.nii.gz "
            "(T2starw for a single echo)"
        )
    return "the index of pybids does not hold it: delete the folder of --bids-database-dir"


def _ignored(path: Path) -> GitIgnoreSpec:
    """Patterns of a ``.bidsignore``; a line that is none says nothing."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    patterns = []
    for line in lines:
        with suppress(ValueError):
            GitIgnoreSpec.from_lines([line])
            patterns.append(line)
    return GitIgnoreSpec.from_lines(patterns)


def _walk(folder: Path, unreadable: list[Path]) -> Iterator[Path]:
    """Files below a folder, links followed once; no hidden folders, and no other dataset's."""
    seen = set()

    def note(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # a link to nowhere
            unreadable.append(Path(error.filename))

    for here, folders, files in os.walk(folder, onerror=note, followlinks=True):
        real = os.path.realpath(here)
        if real in seen or "dataset_description.json" in files:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=natural)
        yield from (Path(here, name) for name in sorted(files, key=natural))


def _selected(path: Path, selection: Mapping[str, Any]) -> bool:
    """Whether an image may be one that is asked for: what its name tells does not contradict."""
    said = entities_of(path.name)
    sessions = [name for name in path.parts if name.startswith("ses-")]
    if sessions:
        said["session"] = sessions[-1].removeprefix("ses-")
    for name, wanted in selection.items():
        labels = wanted if isinstance(wanted, list | tuple) else [wanted]
        if name in ENTITIES and name in said and None not in labels:
            bare = {str(label).removeprefix(f"{ENTITIES[name]}-") for label in labels}
            same = {label.lstrip("0") for label in bare} if said[name].isdecimal() else set()
            if "*" not in bare and said[name] not in bare and said[name].lstrip("0") not in same:
                return False
    return True


def _printable(text: str) -> str:
    """Bytes of a file's name that are no UTF-8, made fit for a log."""
    return os.fsencode(text).decode("utf-8", "replace")
