"""What a run tells of itself: frozen dataclasses, one writer, one reader.

A run writes into a folder of its own, ``logs/<id>/``: ``run.json`` holds the :class:`Run`, and
``acquisitions/<name>.json`` the :class:`Record` of each acquisition. No run writes into the folder
of another, so that runs may share an output folder at the same time. :func:`read` gives them all.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from qsmpipe import __version__, files

FORMAT = 1
"""Format of what is written; it counts up when an older reader would misunderstand."""

T = TypeVar("T")

Status: TypeAlias = Literal["started", "done", "failed", "refused", "interrupted"]


@dataclass(frozen=True)
class Finding:
    """One thing that the input check found."""

    level: Literal["error", "warning", "note"]
    check: str
    message: str
    """File, value, remedy."""


@dataclass(frozen=True)
class Convergence:
    """How an iteration ended (:class:`qsmpipe.numerics.solvers.Convergence`)."""

    converged: bool
    iterations: int
    change: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Planned:
    """A step that shall be done."""

    name: str
    stage: str
    method: str
    takes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What it takes to the names of the steps that give it."""

    @property
    def told(self) -> str:
        """What it takes, in words.

        >>> Planned("mask bet", "mask", "bet", {"magnitude": ("phase prepare",)}).told
        'magnitude of phase prepare'
        """
        by_source: dict[tuple[str, ...], list[str]] = {}
        for what, sources in self.takes.items():
            by_source.setdefault(sources, []).append(what.replace("_", " "))
        parts = [f"{', '.join(what)} of {' and '.join(s)}" for s, what in by_source.items()]
        return "; ".join(parts)


@dataclass(frozen=True)
class Step:
    """What one step did."""

    stage: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """All of them, defaults included, and what the method found for itself."""
    convergence: Convergence | None = None
    """None: the method does not iterate."""
    warnings: tuple[str, ...] = ()
    device: str = ""
    """The kind of GPU, where one was to be used."""
    inversion: str = ""
    """Of several inversions, the one whose map this step belongs to."""
    curve: Mapping[str, Any] = field(default_factory=dict)
    """What the weight of the penalty was chosen from
    (:class:`qsmpipe.numerics.inversion.common.Curve`)."""


@dataclass(frozen=True)
class Number:
    """A key number."""

    label: str
    value: float | int | tuple[float, ...] | None
    """Two for a range; None where it is not known."""
    unit: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture."""

    file: str
    """Path within the output folder."""
    title: str = ""
    caption: str = ""
    section: str = ""


@dataclass(frozen=True)
class NodeRun:
    """What one node took."""

    name: str
    status: Literal["done", "failed", "not run"]
    wall_seconds: float | None = None
    peak_memory_mb: float | None = None


@dataclass(frozen=True)
class Failure:
    """Why an acquisition has no maps of this run."""

    node: str
    message: str
    crash_file: str = ""


@dataclass(frozen=True)
class Earlier:
    """Maps that one earlier run left and that this run has not replaced."""

    files: tuple[str, ...]
    """Paths within the output folder."""
    written: datetime
    """When the newest of them was written."""
    run: str = ""
    """The run that made them; empty if none of those on record did."""


@dataclass(frozen=True)
class Record:
    """What became of one acquisition in one run."""

    name: str
    subject: str
    """Label without ``sub-``."""
    run: str
    """The run's ``id``."""
    status: Status = "started"
    """``started`` stays if the run ends without a word."""
    written: datetime | None = None
    """When this record was written."""
    acquisition: Mapping[str, str] = field(default_factory=dict)
    """Label to value."""
    findings: tuple[Finding, ...] = ()
    plan: tuple[Planned, ...] = ()
    """Each step behind those that it follows from."""
    steps: tuple[Step, ...] = ()
    numbers: tuple[Number, ...] = ()
    figures: tuple[Figure, ...] = ()
    nodes: tuple[NodeRun, ...] = ()
    failures: tuple[Failure, ...] = ()
    earlier: tuple[Earlier, ...] = ()
    format: int = FORMAT


@dataclass(frozen=True)
class Run:
    """One call of the app."""

    id: str
    """Date, time and a random part; the name of the run's folder."""
    command: str = ""
    started: datetime | None = None
    finished: datetime | None = None
    """None while the run goes on, and if it ended without a word."""
    stopped_by: str = ""
    """The signal that ended the run before its time."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package to version."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """As in ``config.toml``."""
    format: int = FORMAT
    problem: str = ""
    """Why nothing more is known of this run: its record cannot be read."""


@dataclass(frozen=True)
class Logbook:
    """All runs that wrote into an output folder, and all their records."""

    runs: Mapping[str, Run]
    """By ``id``, the earliest first."""
    records: tuple[Record, ...]
    """By name; those of one acquisition in the order in which they were written."""

    @cached_property
    def current(self) -> tuple[Record, ...]:
        """The last record of each acquisition, by name."""
        return tuple({record.name: record for record in self.records}.values())

    def shown(self, subject: str | None = None) -> tuple[Record, ...]:
        """List what the page of a subject tells of, or all pages together.

        That is the last record of each acquisition, and behind one that is not done the record
        of the run whose maps are still there.
        """
        known = {(record.name, record.run): record for record in self.records}
        shown = []
        for record in self.current:
            if subject not in (None, record.subject):
                continue
            shown.append(record)
            newest = sorted(record.earlier, key=lambda earlier: earlier.written)[-1:]
            old = [known.get((record.name, earlier.run)) for earlier in newest]
            shown += [each for each in old if each and record.status != "done"]
        return tuple(shown)

    def runs_of(self, records: Iterable[Record]) -> tuple[Run, ...]:
        """List the runs of ``records``, the earliest first."""
        wanted = {record.run for record in records}
        return tuple(run for name, run in self.runs.items() if name in wanted)


def log_folder(output_dir: str | Path, run: str) -> Path:
    """Folder of a run's own files."""
    return Path(output_dir) / "logs" / run


def write_run(output_dir: str | Path, run: Run) -> Path:
    """Write ``logs/<id>/run.json``."""
    return files.write(log_folder(output_dir, run.id) / "run.json", _dump(run))


def write_record(output_dir: str | Path, record: Record) -> Path:
    """Write ``logs/<id>/acquisitions/<name>.json``, with the time."""
    path = log_folder(output_dir, record.run) / "acquisitions" / _file_name(record.name)
    return files.write(path, _dump(replace(record, written=now())))


def _file_name(name: str) -> str:
    """Name the file of a record; file systems take no more than 255 bytes."""
    if len(name.encode()) > 200:
        digest = hashlib.sha256(name.encode()).hexdigest()[:12]
        name = f"{name.encode()[:180].decode(errors='ignore')}-{digest}"
    return f"{name}.json"


def read(output_dir: str | Path) -> Logbook:
    """Read the records of all runs of an output folder.

    A record that cannot be read counts as an acquisition that failed and says so.

    Parameters
    ----------
    output_dir : path
        Where the runs wrote their results.
    """
    folder = Path(output_dir) / "logs"
    paths = sorted(folder.glob("*/acquisitions/*.json"))
    timed = [(_moment(record, path), record) for path in paths if (record := _record(path))]
    records = [record for _, record in sorted(timed, key=lambda pair: (pair[1].name, pair[0]))]
    known = {path.parent.name: _run(path) for path in folder.glob("*/run.json")}
    for record in records:
        if record.run not in known:
            missing = f"{folder / record.run / 'run.json'} is missing"
            known[record.run] = Run(record.run, problem=missing)
    return Logbook(dict(sorted(known.items())), tuple(records))


def read_record(output_dir: str | Path, run: str, name: str) -> Record | None:
    """Read what another process has written of an acquisition in a run; None if nothing.

    One that cannot be read counts as an acquisition that failed, as for :func:`read`.
    """
    path = log_folder(output_dir, run) / "acquisitions" / _file_name(name)
    files.look_anew(path.parent)
    return _record(path) if path.exists() else None


def stamp(output_dir: str | Path) -> frozenset[tuple[str, int, int]]:
    """Tell one state of all records from another: their paths, inodes and times of change."""
    folder = Path(output_dir) / "logs"
    found = [*folder.glob("*/acquisitions/*.json"), *folder.glob("*/run.json")]
    states = [(str(path), path.stat()) for path in found]
    return frozenset((path, state.st_ino, state.st_mtime_ns) for path, state in states)


def earlier(book: Logbook, name: str, left: Mapping[str, datetime]) -> tuple[Earlier, ...]:
    """Tell which runs made the maps of an acquisition that are still there.

    Parameters
    ----------
    book : Logbook
        What is on record of earlier runs.
    name : str
        The acquisition.
    left : mapping
        Path of each map within the output folder to the time when it was written.
    """
    done = [r for r in book.records if r.name == name and r.status == "done" and r.written]
    by_run: dict[str, list[str]] = {}
    for path, written in left.items():
        # Maps come before the record of their run, and after the record of the run before it.
        run = next((r.run for r in done if r.written and r.written >= written), "")
        by_run.setdefault(run, []).append(path)
    return tuple(
        Earlier(tuple(paths), max(left[path] for path in paths), run)
        for run, paths in by_run.items()
    )


def said_of(maps: Earlier, record: Record) -> str:
    """Say that maps of an earlier run are still there, beside what ``record`` tells."""
    count = len(maps.files)
    stay, more = ("stay", f" and {count - 1} more") if count > 1 else ("stays", "")
    what = {
        "done": f"{stay} beside those of this run",
        "refused": f"{stay}, though this run refused the acquisition",
    }.get(record.status, f"{stay}, though this run did not finish the acquisition")
    run = f"run {maps.run}" if maps.run else "a run that left no record"
    return (
        f"{count} map{'s' * (count != 1)} of an earlier run {what}: {maps.files[0]}{more}, "
        f"written {maps.written:%Y-%m-%d %H:%M:%S} by {run}; delete or move "
        f"{'them' if count > 1 else 'it'} unless wanted"
    )


def take(kind: type[T], tables: Sequence[Mapping[str, Any]]) -> tuple[T, ...]:
    """Make dataclasses of tables, as interfaces give them.

    Raises
    ------
    ValueError
        If one does not fit; the message names every place.
    """
    taken: tuple[T, ...] = _validated(tuple[kind, ...], tables)  # type: ignore[valid-type]
    return taken


def now() -> datetime:
    """Give the time, in this place's zone."""
    return datetime.now().astimezone()


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _validated(kind: Any, content: Any) -> Any:
    """Take ``content`` as ``kind``; a ``ValueError`` names every place that does not fit."""
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_python(content)
    except ValidationError as error:
        places = [(".".join(map(str, e["loc"])), e["msg"]) for e in error.errors()]
        raise ValueError("; ".join(f"{place}: {said}" for place, said in places)) from error


def _dump(value: Run | Record) -> str:
    kind: Any = type(value)
    return str(_adapter(kind).dump_json(value, indent=2).decode()) + "\n"


def _load(path: Path, kind: type[T]) -> T:
    """Read one record.

    Raises
    ------
    ValueError
        If it cannot be read; the message names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.get("format") if isinstance(content, dict) else None
        if not isinstance(version, int):
            msg = "it has no format"
            raise ValueError(msg)
    except (OSError, ValueError) as error:
        msg = f"{path} is not a readable record ({error}): run this acquisition again"
        raise ValueError(msg) from error
    if version > FORMAT:
        msg = (
            f"{path} has format {version}, and qsmpipe {__version__} reads format {FORMAT}: use "
            "the qsmpipe that wrote it, or a later one"
        )
        raise ValueError(msg)
    try:
        loaded: T = _validated(kind, content)
    except ValueError as error:
        msg = f"{path} is not a readable record ({error}): run this acquisition again"
        raise ValueError(msg) from error
    return loaded


def _run(path: Path) -> Run:
    try:
        return replace(_load(path, Run), id=path.parent.name)
    except ValueError as error:
        return Run(path.parent.name, problem=str(error))


def _record(path: Path) -> Record:
    name, run = path.stem, path.parents[1].name
    try:
        return replace(_load(path, Record), run=run)
    except ValueError as error:
        subject = name.split("_")[0].removeprefix("sub-")
        failure = Failure("record", str(error))
        return Record(name, subject, run, status="failed", failures=(failure,))


def _moment(record: Record, path: Path) -> datetime:
    return record.written or datetime.fromtimestamp(path.stat().st_mtime).astimezone()
