"""A BIDS dataset to acquisitions, and an acquisition to the names and sidecars of its maps."""

import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from qsmpipe import __version__, images
from qsmpipe.methods import METHODS

BIDS_VERSION = "1.11.1"

ENTITIES = {
    "subject": "sub", "session": "ses", "sample": "sample", "task": "task",
    "acquisition": "acq", "nucleus": "nuc", "volume": "voi", "ceagent": "ce", "tracer": "trc",
    "staining": "stain", "reconstruction": "rec", "direction": "dir", "run": "run",
    "modality": "mod", "echo": "echo", "flip": "flip", "inv": "inv", "mt": "mt", "part": "part",
    "proc": "proc", "space": "space", "recording": "recording", "chunk": "chunk",
}  # fmt: skip
"""pybids' name of each entity to its key in file names, in the order of file names."""

ALWAYS = ("MEGRE", "T2starw")
"""Suffixes that are gradient echoes even where phase is missing; others need their phase."""

ALLOWED = {
    "anat": ("subject", "session", "task", "acquisition", "ceagent", "reconstruction", "run",
             "chunk"),
    "fmap": ("subject", "session", "acquisition", "run", "chunk"),
}  # fmt: skip
"""Entities that the validator accepts in the names of derived maps, by folder."""

ACQUISITION_KEYS = (
    "Manufacturer", "ManufacturersModelName", "SoftwareVersions", "ImagingFrequency",
    "ReceiveCoilName", "CoilCombinationMethod", "MRAcquisitionType", "PulseSequenceType",
    "ScanningSequence", "SequenceVariant", "SequenceName", "NonlinearGradientCorrection",
    "RepetitionTime", "RepetitionTimeExcitation", "FlipAngle", "PixelBandwidth",
    "ParallelReductionFactorInPlane", "ParallelAcquisitionTechnique", "PartialFourier",
    "SliceThickness",
)  # fmt: skip
"""What a map's sidecar takes over from the scanner's; no field that could name a person."""

IGNORED_FILES = ("*.html", "figures", "*_stats.tsv", "*_swi.*", "*_minIP.*")
"""Lines of ``.bidsignore``. The validator does not understand ``figures/``."""


@dataclass(frozen=True)
class Output:
    """A row of :data:`OUTPUTS`."""

    suffix: str
    source: str
    """Output of :func:`qsmpipe.workflows.qsm.init_qsm_wf` that the map is written from."""
    description: str
    units: str = ""
    datatype: str = "anat"
    part: str = ""
    desc: str = ""
    stages: tuple[str, ...] = ()
    """Stages whose methods are named as the map's algorithm."""
    is_mask: bool = False
    mask_type: str = ""
    skull_stripped: bool = True
    intermediate: bool = False
    """Written on request only."""


OUTPUTS: dict[str, Output] = {
    "chi": Output(
        "Chimap", "chi", "Magnetic susceptibility relative to the reference; 0 outside the mask",
        "ppm", stages=("inversion",),
    ),
    "unreferenced": Output(
        "Chimap", "unreferenced", "Magnetic susceptibility before referencing",
        "ppm", desc="unreferenced", stages=("inversion",),
    ),
    "chi_by_method": Output(
        "Chimap", "compared",
        "Magnetic susceptibility by another inversion of the same run; 0 outside its mask",
        "ppm", desc="{method}", stages=("inversion",),
    ),
    "median": Output(
        "Chimap", "median",
        "Median over the run's inversions, where all of them know susceptibility",
        "ppm", desc="median", stages=("inversion",),
    ),
    "cosmos": Output(
        "Chimap", "cosmos",
        "Magnetic susceptibility by all orientations together, on the grid of the first",
        "ppm", desc="cosmos", stages=("cosmos",),
    ),
    "cosmos_mask": Output(
        "mask", "cosmos_mask", "Where two or more orientations know their local field",
        desc="cosmos", stages=("cosmos",), is_mask=True, mask_type="ROI",
    ),
    "deviation": Output(
        "Chimap", "deviation",
        "Standard deviation that the noise of the field gives to magnetic susceptibility; errors "
        "of the method itself are not in it",
        "ppm", desc="std", stages=("inversion",),
    ),
    "r2star": Output(
        "R2starmap", "r2star", "Effective transverse relaxation rate", "1/s",
        stages=("relaxation",),
    ),
    "t2star": Output(
        "T2starmap", "t2star", "Effective transverse relaxation time", "s",
        stages=("relaxation",),
    ),
    "s0": Output(
        "S0map", "s0", "Signal at echo time 0", "arbitrary", stages=("relaxation",),
    ),
    "swi": Output(
        "swi", "swi", "Susceptibility-weighted image: magnitude darkened by the phase",
        "arbitrary", stages=("swi",),
    ),
    "minip": Output(
        "minIP", "minip", "Minimum of the susceptibility-weighted image over a slab of slices",
        "arbitrary", stages=("swi",),
    ),
    "combined": Output(
        "T2starw", "combined", "Magnitude, root of the sum of squares over echoes", "arbitrary",
        part="mag", desc="combined", skull_stripped=False,
    ),
    "mask": Output(
        "mask", "mask", "Brain mask", desc="brain", stages=("mask",), is_mask=True,
        mask_type="Brain",
    ),
    "qsm_mask": Output(
        "mask", "qsm_mask",
        "Where susceptibility is trusted: the brain mask, eroded as the background removal needs",
        desc="qsm", stages=("background",), is_mask=True, mask_type="ROI",
    ),
    "reference_region": Output(
        "mask", "reference_region",
        "The fluid of the ventricles whose mean susceptibility was subtracted",
        desc="reference", is_mask=True, mask_type="ROI",
    ),
    "field_magnitude": Output(
        "magnitude", "combined", "Magnitude that belongs to the field maps", "arbitrary",
        datatype="fmap", skull_stripped=False,
    ),
    "field": Output(
        "fieldmap", "field", "Total field relative to B0", "Hz", datatype="fmap", desc="total",
        stages=("unwrap", "field"),
    ),
    "local_field": Output(
        "fieldmap", "local_field", "Field of the sources inside the mask", "Hz",
        datatype="fmap", desc="local", stages=("background",),
    ),
    "noise": Output(
        "fieldmap", "noise", "Standard deviation of the total field", "Hz", datatype="fmap",
        desc="noise", stages=("field",), intermediate=True,
    ),
    "offset": Output(
        "T2starw", "offset", "Phase offset common to all echoes, removed before the fit", "rad",
        part="phase", desc="offset", stages=("offset",), intermediate=True,
    ),
    "unwrapped": Output(
        "T2starw", "unwrapped", "Unwrapped phase of all echoes, in the order of EchoTime", "rad",
        part="phase", desc="unwrapped", stages=("offset", "unwrap"), intermediate=True,
    ),
    "quality": Output(
        "T2starw", "quality", "Phase quality between 0 (noise) and 1", "arbitrary",
        desc="quality", stages=("unwrap",), intermediate=True,
    ),
}  # fmt: skip
"""Every map that is written, by key."""


@dataclass(frozen=True)
class Acquisition:
    """The files of one gradient-echo acquisition: magnitude and phase, or real and imaginary."""

    root: Path
    """The dataset."""
    entities: Mapping[str, str]
    """pybids' names to labels, as in the file names; without echo and part."""
    suffix: str
    magnitude: tuple[Path, ...] = ()
    """One file per echo, in the order of the echo index; so are the next three."""
    phase: tuple[Path, ...] = ()
    real: tuple[Path, ...] = ()
    imag: tuple[Path, ...] = ()
    echo_times: tuple[float | None, ...] = ()
    """Of ``signal`` (s); None where a sidecar gives no number."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Of the first file of ``signal``, inheritance applied."""
    sidecars: Mapping[Path, Mapping[str, Any]] = field(default_factory=dict)
    """Metadata of every file, inheritance applied."""
    problems: tuple[str, ...] = ()
    """Sidecars that could not be read, one sentence each."""
    ignored: tuple[Path, ...] = ()
    """Files of the same acquisition that are left aside, the others saying the same."""
    labels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Folder to entities of what is written there; empty: from ``entities``."""

    @property
    def is_complex(self) -> bool:
        """Whether real and imaginary parts are used instead of magnitude and phase."""
        return bool(self.real or self.imag)

    @property
    def signal(self) -> tuple[Path, ...]:
        """Files that carry the phase, or the magnitude where there is none."""
        return self.real or self.imag or self.phase or self.magnitude

    @property
    def sources(self) -> tuple[Path, ...]:
        """All files that the maps are computed from."""
        return self.magnitude + self.phase + self.real + self.imag

    @property
    def subject(self) -> str:
        """Label without ``sub-``."""
        return self.entities["subject"]

    @property
    def session(self) -> str | None:
        """Label without ``ses-``."""
        return self.entities.get("session")

    @property
    def name(self) -> str:
        """How this acquisition's files begin, as in ``sub-01_ses-1_acq-x_run-1``."""
        return _join(self._entities_in("anat"))

    @property
    def node_name(self) -> str:
        """``name`` as Nipype takes it.

        >>> Acquisition(Path("/data"), {"subject": "01", "run": "1"}, "MEGRE").node_name
        'sub_01_run_1'
        """
        return self.name.replace("-", "_").replace("+", "_plus_")

    def output(self, key: str, extension: str = ".nii.gz", *, method: str = "") -> Path:
        """Path of a map within the derivative dataset; ``method`` where there is one for each.

        >>> acquisition = Acquisition(Path("/data"), {"subject": "01"}, "MEGRE")
        >>> acquisition.output("chi").as_posix()
        'sub-01/anat/sub-01_Chimap.nii.gz'
        >>> acquisition.output("chi_by_method", ".json", method="two_level").as_posix()
        'sub-01/anat/sub-01_desc-twolevel_Chimap.json'
        """
        row = OUTPUTS[key]
        entities = self._entities_in(row.datatype)
        parts = [_join(entities)]
        # part stands before chunk in a BIDS name, desc after everything
        if row.part:
            before = {k: v for k, v in entities.items() if k != "chunk"}
            chunk = [f"chunk-{entities['chunk']}"] if "chunk" in entities else []
            parts = [_join(before), f"part-{row.part}", *chunk]
        desc = row.desc.format(method=re.sub(r"\W|_", "", method))
        parts += [f"desc-{desc}"] if desc else []
        folder = Path(f"sub-{self.subject}")
        if self.session:
            folder /= f"ses-{self.session}"
        return folder / row.datatype / ("_".join([*parts, row.suffix]) + extension)

    def relative(self, path: Path) -> str:
        """Path within the dataset, for messages."""
        return _relative(path, self.root)

    def _entities_in(self, datatype: str) -> Mapping[str, str]:
        return self.labels.get(datatype) or _fold(self.entities, ALLOWED[datatype])


def together(acquisitions: Sequence[Acquisition]) -> Acquisition:
    """Make one of several acquisitions of a subject: all their files, what they have in common.

    >>> runs = [Acquisition(Path("/data"), {"subject": "01", "run": run}, "MEGRE") for run in "12"]
    >>> together(runs).output("cosmos").as_posix()
    'sub-01/anat/sub-01_desc-cosmos_Chimap.nii.gz'
    """

    def common(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        first, *others = tables
        return {k: v for k, v in first.items() if all(v == other.get(k) for other in others)}

    def all_of(name: str) -> tuple[Path, ...]:
        return tuple(path for each in acquisitions for path in getattr(each, name))

    return replace(
        acquisitions[0],
        entities=common([each.entities for each in acquisitions]),
        labels={x: common([each._entities_in(x) for each in acquisitions]) for x in ALLOWED},
        metadata=common([each.metadata for each in acquisitions]),
        magnitude=all_of("magnitude"),
        phase=all_of("phase"),
        real=all_of("real"),
        imag=all_of("imag"),
    )


# ---------------------------------------------------------------------------------------------
# Dataset to acquisitions
# ---------------------------------------------------------------------------------------------


def find(
    root: str | Path,
    *,
    participants: Sequence[str] = (),
    sessions: Sequence[str] = (),
    runs: Sequence[str] = (),
    acquisitions: Sequence[str] = (),
    filters: Mapping[str, Any] | None = None,
    database: str | Path | None = None,
) -> list[Acquisition]:
    """Gradient-echo acquisitions in a dataset, those without phase included.

    Files of one folder ``anat`` that differ in ``echo`` and ``part`` alone are one acquisition.
    Candidates are all MEGRE and T2starw, and any other suffix with phase, real or imaginary
    parts. A file without ``part`` is magnitude. Nothing is written into the dataset.

    Parameters
    ----------
    root : path
        The dataset.
    participants, sessions, runs, acquisitions : sequence of str
        Labels to keep, with or without ``sub-``, ``ses-``, ``run-``, ``acq-``; indices compare
        as numbers. Empty: all.
    filters : mapping, optional
        ``{"qsm": {entity: value}}``, by pybids' names or the keys of file names: a label, a list
        of labels, None (entity absent) or ``"*"`` (entity present).
    database : path, optional
        Folder where pybids keeps its index for the next run.

    Raises
    ------
    ValueError
        If there is no such dataset or participant, or if a filter cannot be understood.
    """
    root = Path(root).absolute()
    if not root.is_dir():
        msg = f"{root}: no such folder; give the root of a BIDS dataset"
        raise ValueError(msg)
    if database is not None and Path(database).absolute().is_relative_to(root):
        msg = f"{database}: the index must not be kept inside the dataset; give another folder"
        raise ValueError(msg)
    wanted = _present(root, participants)
    query = _query(filters)
    chosen = {
        "session": [label.removeprefix("ses-") for label in sessions],
        "run": [str(label).removeprefix("run-") for label in runs],
        "acquisition": [label.removeprefix("acq-") for label in acquisitions],
    }
    selection = {key: labels for key, labels in chosen.items() if labels}

    everything = _index(root, wanted, database)
    sidecars = _Sidecars(root, [f for f in everything if f.extension == ".json"])
    groups: dict[tuple[Any, ...], list[_File]] = defaultdict(list)
    for item in everything:
        if item.extension in (".nii", ".nii.gz") and item.folder.name == "anat":
            groups[item.group].append(item)
    candidates = [group for group in groups.values() if _is_candidate(group)]
    labels = _labels([group[0] for group in candidates])
    found = []
    for group, named in zip(candidates, labels, strict=True):
        if named["anat"]["subject"] not in wanted or not _matches(group[0].shared, selection):
            continue
        kept = [item for item in group if _matches(item.query, query)]
        if kept:
            found.append(_assemble(root, kept, named, sidecars))
    return sorted(found, key=lambda acquisition: _natural(acquisition.name))


def echo_of(path: Path) -> int | None:
    """Echo index in a file name, as a number.

    >>> echo_of(Path("sub-01_echo-02_part-phase_MEGRE.nii.gz"))
    2
    """
    match = re.search(r"_echo-(\d+)_", path.name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class _File:
    path: Path
    entities: Mapping[str, str]
    suffix: str
    extension: str

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def shared(self) -> dict[str, str]:
        """Entities that all files of an acquisition have in common."""
        return {k: v for k, v in self.entities.items() if k not in ("echo", "part")}

    @property
    def group(self) -> tuple[Any, ...]:
        return self.folder, self.suffix, *sorted(self.shared.items())

    @property
    def query(self) -> dict[str, str]:
        """What a filter may ask for."""
        more = {"suffix": self.suffix, "datatype": "anat", "extension": self.extension}
        return {**self.entities, **more}

    @property
    def part(self) -> str:
        return self.entities.get("part", "mag")


def _index(root: Path, participants: Sequence[str], database: str | Path | None) -> list[_File]:
    """Images and sidecars that could belong to an acquisition, by pybids."""
    from bids.layout import BIDSLayout, BIDSLayoutIndexer, parse_file_entities

    # Matched against paths that begin with a slash at the dataset's root: what is no subject,
    # and within subjects what is neither anat nor a sidecar on the way to it.
    ignore = [
        re.compile(r"^/(?!sub-|[^/]*\.json$)[^/]+$"),
        re.compile(r"^/sub-[^/]+/(ses-[^/]+/)?(?!anat$|ses-|[^/]*\.json$)[^/]+$"),
    ]
    if database is None:
        labels = "|".join(map(re.escape, participants)) or "(?!)"
        ignore.append(re.compile(rf"^/sub-(?!(?:{labels})(?:/|$))"))
    layout = BIDSLayout(
        root,
        validate=False,
        database_path=database,
        indexer=BIDSLayoutIndexer(validate=False, ignore=ignore, index_metadata=False),
    )
    entities = [e for name, e in layout.get_entities(metadata=False).items() if name in ENTITIES]
    found = []
    for text in layout.get_files(scope="self"):
        path = Path(text)
        name = re.fullmatch(r"(?:.+_)?([a-zA-Z0-9+]+)(\.nii|\.nii\.gz|\.json)", path.name)
        if name is None:
            continue
        # Relative to the root: pybids searches whole paths, and an "acq-x" above is no entity.
        parsed = parse_file_entities(f"/{_relative(path, root)}", entities=entities)
        labels_here = {key: str(parsed[key]) for key in ENTITIES if key in parsed}
        found.append(_File(path, labels_here, name[1], name[2]))
    return sorted(found, key=lambda item: _natural(str(item.path)))


class _Sidecars:
    """Metadata by the inheritance principle: the nearer to the image, the stronger.

    pybids gives up on a whole dataset for one sidecar that is not JSON; here that is a problem of
    the images that it belongs to.
    """

    def __init__(self, root: Path, sidecars: Iterable[_File]) -> None:
        self._root = root
        self._by_place: dict[tuple[Path, str], list[_File]] = defaultdict(list)
        for item in sidecars:
            self._by_place[item.folder, item.suffix].append(item)
        self._read = functools.cache(self._load)

    def of(self, image: _File) -> tuple[dict[str, Any], list[str]]:
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

    def _applicable(self, image: _File) -> Iterator[_File]:
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
            return f"{_relative(path, self._root)}: not readable as JSON ({error}); mend the file"
        if not isinstance(content, dict):
            return (
                f"{_relative(path, self._root)}: holds a JSON {type(content).__name__} instead of "
                "key: value pairs; mend the file"
            )
        return content


def _present(root: Path, participants: Sequence[str]) -> list[str]:
    """Labels to look for; those asked for must have a folder."""
    present = sorted(
        path.name.removeprefix("sub-") for path in root.glob("sub-*") if path.is_dir()
    )
    if not present:
        msg = f"{root}: no folder sub-*; give the root of a BIDS dataset"
        raise ValueError(msg)
    wanted = [str(label).removeprefix("sub-") for label in participants]
    missing = [label for label in wanted if label not in present]
    if missing:
        shown = ", ".join(present[:20]) + (", ..." if len(present) > 20 else "")
        msg = f"{root}: no participant {', '.join(missing)}; there are {shown}"
        raise ValueError(msg)
    return wanted or present


def _query(filters: Mapping[str, Any] | None) -> dict[str, Any]:
    if filters is None:
        return {}
    if not isinstance(filters, Mapping) or not isinstance(filters.get("qsm"), Mapping):
        have = ", ".join(filters) if isinstance(filters, Mapping) else type(filters).__name__
        msg = f'the filter needs the form {{"qsm": {{entity: value}}}}; it has {have or "nothing"}'
        raise ValueError(msg)
    by_key = {key: name for name, key in ENTITIES.items()}
    query = {}
    for entity, value in filters["qsm"].items():
        name = by_key.get(entity, entity)
        if name not in (*ENTITIES, "suffix", "datatype", "extension"):
            known = ", ".join(ENTITIES)
            msg = f"the filter's entity {entity!r} does not exist: one of {known}, suffix"
            raise ValueError(msg)
        query[name] = value
    return query


def _matches(entities: Mapping[str, str], query: Mapping[str, Any]) -> bool:
    """Whether entities have what a query asks for."""

    def one(name: str, wanted: Any) -> bool:
        have = entities.get(name)
        if wanted is None or have is None:
            return wanted is None and have is None
        if isinstance(wanted, list | tuple):
            return any(one(name, item) for item in wanted)
        label = str(wanted).removeprefix(f"{ENTITIES.get(name, name)}-")
        return label in ("*", have) or (
            label.isdecimal() and have.isdecimal() and int(label) == int(have)
            and name in ("run", "echo", "inv", "flip", "chunk")
        )  # fmt: skip

    return all(one(name, wanted) for name, wanted in query.items())


def _is_candidate(group: Sequence[_File]) -> bool:
    return group[0].suffix in ALWAYS or any(f.part in ("phase", "real", "imag") for f in group)


def _assemble(
    root: Path,
    group: Sequence[_File],
    labels: Mapping[str, Mapping[str, str]],
    sidecars: _Sidecars,
) -> Acquisition:
    """Sort the files of one acquisition by part and echo."""
    parts: dict[str, list[_File]] = {"mag": [], "phase": [], "real": [], "imag": []}
    for item in sorted(group, key=lambda item: (echo_of(item.path) or 0, str(item.path))):
        parts[item.part].append(item)
    ignored = []
    if explicit := [item for item in parts["mag"] if "part" in item.entities]:
        # A scanner's own combination without "part" may stand beside the magnitude.
        ignored += [item for item in parts["mag"] if "part" not in item.entities]
        parts["mag"] = explicit
    polar = bool(parts["mag"] and parts["phase"])
    if parts["real"] and parts["imag"] and not polar:
        ignored += parts["mag"] + parts["phase"]
        parts |= {"mag": [], "phase": []}
    elif parts["phase"]:
        ignored += parts["real"] + parts["imag"]
        parts |= {"real": [], "imag": []}

    metadata = {}
    problems: dict[str, None] = {}
    for item in itertools.chain.from_iterable(parts.values()):
        metadata[item.path], wrong = sidecars.of(item)
        problems |= dict.fromkeys(wrong)
    files = {part: tuple(item.path for item in items) for part, items in parts.items()}
    signal = files["real"] or files["imag"] or files["phase"] or files["mag"]
    return Acquisition(
        root=root,
        entities=group[0].shared,
        suffix=group[0].suffix,
        magnitude=files["mag"],
        phase=files["phase"],
        real=files["real"],
        imag=files["imag"],
        echo_times=tuple(_number(metadata[path].get("EchoTime")) for path in signal),
        metadata=metadata[signal[0]],
        sidecars=metadata,
        problems=tuple(problems),
        ignored=tuple(item.path for item in ignored),
        labels=labels,
    )


def _number(value: Any) -> float | None:
    valid = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if valid else None


def _labels(groups: Sequence[_File]) -> list[dict[str, Mapping[str, str]]]:
    """Entities of the outputs of each acquisition, in ``anat`` and ``fmap``; no two alike.

    Derived maps take fewer entities than raw files: the others move into ``acq``. So does the
    suffix where a MEGRE and a T2starw would get one name. In ``fmap`` no name may be contained
    in another one, or the validator takes a field map to have two magnitudes.
    """
    anat = [_fold(item.shared, ALLOWED["anat"]) for item in groups]
    taken = [tuple(sorted(entities.items())) for entities in anat]
    for i, item in enumerate(groups):
        if taken.count(taken[i]) > 1 and item.suffix != "MEGRE":
            anat[i] = _with_acquisition(anat[i], anat[i].get("acquisition", "") + item.suffix)

    fmap = [_fold(entities, ALLOWED["fmap"]) for entities in anat]
    crowded = [
        any(
            i != j and (mine.items() <= other.items() or other.items() <= mine.items())
            for j, other in enumerate(fmap)
            if other["subject"] == mine["subject"] and other.get("session") == mine.get("session")
        )
        for i, mine in enumerate(fmap)
    ]
    for i in [i for i, is_crowded in enumerate(crowded) if is_crowded]:
        fmap[i] = _fold(anat[i], ("subject", "session", "acquisition"))
        if "acquisition" not in fmap[i]:
            fmap[i] = _with_acquisition(fmap[i], groups[i].suffix)
    return [{"anat": a, "fmap": f} for a, f in zip(anat, fmap, strict=True)]


def _fold(entities: Mapping[str, str], allowed: Sequence[str]) -> dict[str, str]:
    """Move entities that are not allowed into the label of ``acq``.

    >>> _fold({"subject": "1", "acquisition": "x", "inv": "2"}, ("subject", "acquisition"))
    {'subject': '1', 'acquisition': 'xInv2'}
    """
    kept = {key: label for key, label in entities.items() if key in allowed}
    moved = [
        ENTITIES[key].capitalize() + entities[key]
        for key in ENTITIES
        if key in entities and key not in allowed
    ]
    if not moved:
        return kept
    label = entities.get("acquisition", "") + "".join(moved)
    return _with_acquisition(kept, label[0].lower() + label[1:])


def _with_acquisition(entities: Mapping[str, str], label: str) -> dict[str, str]:
    changed = {**entities, "acquisition": label}
    return {key: changed[key] for key in ENTITIES if key in changed}


def _join(entities: Mapping[str, str]) -> str:
    return "_".join(f"{k}-{entities[name]}" for name, k in ENTITIES.items() if name in entities)


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(t), t) if t.isdecimal() else (-1, t) for t in re.split(r"(\d+)", text)]


# ---------------------------------------------------------------------------------------------
# Masks of the user
# ---------------------------------------------------------------------------------------------


def find_mask(
    derivatives: str | Path | Sequence[str | Path],
    acquisition: Acquisition,
    *,
    label: str | None = None,
) -> Path | None:
    """Mask of an acquisition in derivative datasets; None if there is none.

    Its name has the acquisition's entities, or some of them where it lies on the acquisition's
    grid. Of several the one with most entities wins, then the earlier folder.

    Parameters
    ----------
    derivatives : path or sequence of paths
        Roots of derivative datasets.
    acquisition
        What the mask is for.
    label : str, optional
        ``desc`` or ``label`` of the mask. Without it the brain mask is meant: ``brain``, or
        neither ``desc`` nor ``label``.

    Raises
    ------
    ValueError
        If the only masks of the right name are on another grid.
    """
    folders = [derivatives] if isinstance(derivatives, str | Path) else derivatives
    own = [dict(acquisition.entities), *map(dict, acquisition.labels.values())]
    ranked: list[tuple[tuple[int, ...], Path]] = []
    for position, folder in enumerate(folders):
        for path in sorted((Path(folder) / f"sub-{acquisition.subject}").rglob("*_mask.nii*")):
            have = _entities_of(path.name)
            kind = {have.pop("desc", None), have.pop("label", None)} - {None}
            for key in ("space", "part", "echo", "res", "den"):
                have.pop(key, None)
            if kind != {label or "brain"} and (label or kind):
                continue
            if not any(have.items() <= _by_key(entities).items() for entities in own):
                continue
            named = any(have == _by_key(entities) for entities in own)
            compressed = path.name.endswith(".gz")
            rank = (not named, -len(have), not kind, position, not compressed)
            ranked.append((tuple(map(int, rank)), path))
    ranked.sort()
    for _, path in ranked:
        if images.same_grid(path, acquisition.signal[0]):
            return path
    exact = [path for rank, path in ranked if not rank[0]]
    if exact:
        msg = (
            f"{exact[0]} {images.shape_of(exact[0])} is not on the grid of "
            f"{acquisition.relative(acquisition.signal[0])} "
            f"{images.shape_of(acquisition.signal[0])}: resample the mask onto it"
        )
        raise ValueError(msg)
    return None


def _entities_of(name: str) -> dict[str, str]:
    """Keys and labels in a file name, whatever the keys."""
    return dict(re.findall(r"(?:^|_)([a-z]+)-([a-zA-Z0-9+]+)(?=_)", name))


def _by_key(entities: Mapping[str, str]) -> dict[str, str]:
    return {ENTITIES[name]: label for name, label in entities.items()}


# ---------------------------------------------------------------------------------------------
# The derivative dataset
# ---------------------------------------------------------------------------------------------


class Examined(Protocol):
    """What :func:`sidecar` needs to know: :class:`qsmpipe.checks.Examination`."""

    @property
    def acquisition(self) -> Acquisition: ...  # noqa: D102
    @property
    def field_strength(self) -> float: ...  # noqa: D102
    @property
    def b0_direction(self) -> tuple[float, ...]: ...  # noqa: D102
    @property
    def echo_times(self) -> tuple[float, ...]: ...  # noqa: D102
    @property
    def warnings(self) -> Sequence[Any]: ...  # noqa: D102


def sidecar(
    examination: Examined,
    key: str,
    *,
    steps: Sequence[Mapping[str, Any]] = (),
    reference: str = "brain",
    software: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Metadata of a map: where it comes from, its unit, and everything that was done.

    Parameters
    ----------
    examination
        The acquisition and what its examination found.
    key
        The map: a key of :data:`OUTPUTS`.
    steps
        Stage, method, parameters and warnings of each step that led to the map.
    reference : str
        What susceptibility is relative to: ``brain``, ``none`` or ``region:LABEL``.
    software : mapping, optional
        Package to version, beside this package's own.
    """
    acquisition, row = examination.acquisition, OUTPUTS[key]
    times = list(examination.echo_times)
    content: dict[str, Any] = {
        "Description": row.description,
        "Sources": [uri(path, acquisition.root) for path in acquisition.sources],
        "SpatialReference": "orig",
    }
    content |= {"Type": row.mask_type} if row.is_mask else {"SkullStripped": row.skull_stripped}
    content |= {"Units": row.units} if row.units else {}
    algorithm, citations = _estimation(row, steps)
    content |= {"EstimationAlgorithm": algorithm} if algorithm else {}
    content |= {"EstimationReference": citations} if citations else {}
    if times:
        content["EchoTime"] = times[0] if len(times) == 1 else times
    if examination.field_strength:
        content["MagneticFieldStrength"] = round(examination.field_strength, 6)
    content |= {k: acquisition.metadata[k] for k in ACQUISITION_KEYS if k in acquisition.metadata}
    if row.suffix == "Chimap":
        region, _, label = reference.partition(":")
        named = {
            "brain": f"whole brain (the mask desc-{'cosmos' if key == 'cosmos' else 'qsm'}_mask)",
            "csf": "cerebrospinal fluid of the ventricles (the mask desc-reference_mask)",
            "none": "none",
        }
        where = named.get(region, label or region)
        content["ReferenceRegion"] = "none" if row.desc == "unreferenced" else where
        values = [step["parameters"].get("value") for step in steps
                  if step.get("stage") == "reference"]  # fmt: skip
        referenced = content["ReferenceRegion"] != "none" and key != "deviation"
        if len(values) == 1 and values[0] is not None and referenced:
            content["ReferenceValue"] = float(values[0])
            content["ReferenceValueUnits"] = "ppm"
    if examination.b0_direction:
        content["B0Direction"] = [round(x, 9) for x in examination.b0_direction]
        content["B0DirectionFrame"] = "voxel axes (i, j, k)"
    content["ProcessingSteps"] = [_plain(dict(step)) for step in steps]
    content["InputWarnings"] = [finding.message for finding in examination.warnings]
    content["Software"] = {"qsmpipe": __version__, **(software or {})}
    return content


def uri(path: str | Path, root: str | Path, dataset: str = "raw") -> str:
    """BIDS URI of a file, ``dataset`` being a key of DatasetLinks or "" for its own dataset.

    >>> uri("/data/sub-01/anat/sub-01_echo-1_MEGRE.nii.gz", "/data")
    'bids:raw:sub-01/anat/sub-01_echo-1_MEGRE.nii.gz'
    """
    return f"bids:{dataset}:{Path(path).absolute().relative_to(Path(root).absolute()).as_posix()}"


def write_description(output_dir: str | Path, root: str | Path) -> None:
    """Make ``output_dir`` a derivative dataset: its description, README and .bidsignore.

    Parameters
    ----------
    output_dir : path
        Where the maps go.
    root : path
        The dataset that they come from; linked as ``raw``.

    Raises
    ------
    ValueError
        If the folder holds a dataset of something else.
    """
    output, root = Path(output_dir).absolute(), Path(root).absolute()
    output.mkdir(parents=True, exist_ok=True)
    target = output / "dataset_description.json"
    if target.exists() and _maker(target) != "qsmpipe":
        msg = (
            f"{output} holds a dataset made by {_maker(target) or 'something else'}: choose "
            "another output folder"
        )
        raise ValueError(msg)
    link = quote(Path(os.path.relpath(root, output)).as_posix())
    raw = _description(root / "dataset_description.json")
    source = {"URL": link}
    if doi := raw.get("DatasetDOI"):
        source["DOI"] = str(doi)
    if version := raw.get("Version"):
        source["Version"] = str(version)
    maker: dict[str, Any] = {
        "Name": "qsmpipe",
        "Version": __version__,
        "Description": "Quantitative susceptibility mapping",
    }
    if container := os.environ.get("QSMPIPE_CONTAINER"):
        apptainer = os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_NAME")
        maker["Container"] = {"Type": "apptainer" if apptainer else "docker", "Tag": container}
    content = {
        "Name": f"Susceptibility maps of {raw.get('Name') or root.name}",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [maker],
        "SourceDatasets": [source],
        "DatasetLinks": {"raw": link},
    }
    _write(target, json.dumps(content, indent=2) + "\n")
    _write(output / ".bidsignore", "\n".join(IGNORED_FILES) + "\n")
    if not (output / "README.md").exists():
        _write(output / "README.md", _readme())


def validate(root: str | Path) -> list[str] | None:
    """Errors that bids-validator finds in a dataset; None where it is not installed.

    Raises
    ------
    ValueError
        If the validator itself fails.
    """
    beside = str(Path(sys.executable).parent)
    program = shutil.which("bids-validator-deno") or shutil.which(
        "bids-validator-deno", path=beside
    )
    if program is None:
        return None
    with tempfile.TemporaryDirectory() as cache:
        command = [program, str(Path(root).absolute()), "--format", "json", "--ignoreWarnings"]
        quiet = {"DENO_DIR": cache, "DENO_NO_UPDATE_CHECK": "1", "NO_COLOR": "1"}
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | quiet
        )
    try:
        issues = json.loads(done.stdout)["issues"]
    except (ValueError, KeyError) as error:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        msg = f"bids-validator-deno ended with {done.returncode}: {''.join(last)}"
        raise ValueError(msg) from error
    meaning = issues.get("codeMessages", {})
    return [
        ": ".join(
            str(part).strip()
            for part in (
                issue["code"],
                issue.get("location", "").lstrip("/"),
                issue.get("subCode"),
                issue.get("issueMessage") or meaning.get(issue["code"], ""),
            )
            if part
        )
        for issue in issues["issues"]
        if issue.get("severity") == "error"
    ]


def _estimation(row: Output, steps: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Methods behind a map as a paper names them, and where they were published."""
    summaries: list[str] = []
    keys: dict[str, None] = {}
    for step in steps:
        stage, name = step.get("stage", ""), step.get("method", "")
        if stage in row.stages and name in METHODS.get(stage, {}):
            method = METHODS[stage][name]
            summaries.append(method.summary)
            keys |= dict.fromkeys(method.cite)
    dois = _dois()
    return "; ".join(dict.fromkeys(summaries)), "; ".join(dois.get(key, key) for key in keys)


@functools.cache
def _dois() -> dict[str, str]:
    """Citation key to DOI, from the package's bibliography."""
    path = package_files("qsmpipe.data").joinpath("references.bib")
    if not path.is_file():
        return {}
    found = {}
    for entry in re.split(r"^@", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
        key = re.match(r"\w+\s*{\s*([^,\s]+)", entry)
        doi = re.search(r"\bdoi\s*=\s*[{\"]\s*([^}\"]+?)\s*[}\"]", entry, re.IGNORECASE)
        if key and doi:
            found[key[1]] = "doi:" + re.sub(r"^https?://(dx\.)?doi\.org/", "", doi[1])
    return found


def _plain(value: Any) -> Any:
    """``value`` in what JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | range):
        return [_plain(item) for item in value]
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    return value.item() if hasattr(value, "item") else str(value)


def _description(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _maker(description: Path) -> str:
    made = _description(description).get("GeneratedBy")
    first = made[0] if isinstance(made, list) and made else {}
    return str(first.get("Name", "")) if isinstance(first, dict) else ""


def _write(path: Path, text: str) -> None:
    """Write unless the file says so already: a rerun leaves its time alone."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _readme() -> str:
    rows = []
    for row in OUTPUTS.values():
        name = "_".join(
            filter(None, [row.part and f"part-{row.part}", row.desc and f"desc-{row.desc}"])
        )
        unit = f" ({row.units})" if row.units else ""
        on_request = "; on request" if row.intermediate else ""
        rows.append(
            f"- `{row.datatype}/*_{name + '_' if name else ''}{row.suffix}.nii.gz`: "
            f"{row.description}{unit}{on_request}"
        )
    return (
        "# Susceptibility maps\n\n"
        f"Made by qsmpipe {__version__} (quantitative susceptibility mapping). Open "
        "`index.html` for the reports; `logs/CITATION.md` is the methods text, "
        "`logs/config.toml` the settings.\n\n"
        "Paramagnetic susceptibility is positive. Every map's `.json` file tells its unit, its "
        "sources, the direction of B0 and each step with all parameters.\n\n"
        + "\n".join(rows)
        + "\n"
    )
