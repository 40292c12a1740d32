"""An acquisition: its files, what they say, and how its maps are named."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qsmpipe.bids.entities import ALLOWED, fold, join, relative
from qsmpipe.maps import MAPS


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
    """Sidecars that could not be read, one sentence for each kind."""
    remarks: tuple[str, ...] = ()
    """What was read in sidecars although it is not as BIDS has it."""
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
        return join(self._entities_in("anat"))

    @property
    def node_name(self) -> str:
        """``name`` as Nipype takes it.

        >>> Acquisition(Path("/data"), {"subject": "01", "run": "1"}, "MEGRE").node_name
        'sub_01_run_1'
        """
        return self.name.replace("-", "_").replace("+", "_plus_")

    def output(self, key: str, extension: str = "", *, method: str = "") -> Path:
        """Path of a map within the derivative dataset; its sidecar has the extension ``.json``.

        ``method`` tells which map is meant where there is one for each.

        >>> acquisition = Acquisition(Path("/data"), {"subject": "01"}, "MEGRE")
        >>> acquisition.output("chi").as_posix()
        'sub-01/anat/sub-01_Chimap.nii.gz'
        >>> acquisition.output("compared", ".json", method="two_level").as_posix()
        'sub-01/anat/sub-01_desc-twolevel_Chimap.json'
        """
        row = MAPS[key].file
        entities = self._entities_in(row.datatype)
        parts = [join(entities)]
        # part stands before chunk in a BIDS name, desc after everything
        if row.part:
            before = {k: v for k, v in entities.items() if k != "chunk"}
            chunk = [f"chunk-{entities['chunk']}"] if "chunk" in entities else []
            parts = [join(before), f"part-{row.part}", *chunk]
        desc = row.desc.format(method=re.sub(r"\W|_", "", method))
        parts += [f"desc-{desc}"] if desc else []
        folder = Path(f"sub-{self.subject}")
        if self.session:
            folder /= f"ses-{self.session}"
        name = "_".join([*parts, row.suffix]) + (extension or row.extension)
        return folder / row.datatype / name

    def relative(self, path: Path) -> str:
        """Path within the dataset, for messages."""
        return relative(path, self.root)

    def _entities_in(self, datatype: str) -> Mapping[str, str]:
        return self.labels.get(datatype) or fold(self.entities, ALLOWED[datatype])


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


def echo_of(path: Path) -> int | None:
    """Echo index in a file name, as a number.

    >>> echo_of(Path("sub-01_echo-02_part-phase_MEGRE.nii.gz"))
    2
    """
    match = re.search(r"_echo-(\d+)_", path.name)
    return int(match[1]) if match else None
