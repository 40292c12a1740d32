"""The derivative dataset: what its maps' sidecars say, and what describes it as a whole."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote, unquote

from qsmpipe import __version__, files
from qsmpipe.bids import BIDS_VERSION, Acquisition
from qsmpipe.checks import Examination
from qsmpipe.maps import MAPS, Written, written
from qsmpipe.methods import METHODS
from qsmpipe.references import references

ACQUISITION_KEYS = (
    "Manufacturer", "ManufacturersModelName", "SoftwareVersions", "ImagingFrequency",
    "ReceiveCoilName", "CoilCombinationMethod", "MRAcquisitionType", "PulseSequenceType",
    "ScanningSequence", "SequenceVariant", "SequenceName", "NonlinearGradientCorrection",
    "RepetitionTime", "RepetitionTimeExcitation", "FlipAngle", "PixelBandwidth",
    "ParallelReductionFactorInPlane", "ParallelAcquisitionTechnique", "PartialFourier",
    "SliceThickness",
)  # fmt: skip
"""What a map's sidecar takes over from the scanner's; no field that could name a person."""

WRITER = "derivatives"
"""Name of the node that writes the maps of an acquisition, its last one."""

IGNORED_FILES = ("*.html", "figures", "*_stats.tsv", "*_swi.*", "*_minIP.*")
"""Lines of ``.bidsignore``. The validator does not understand ``figures/``."""


def sidecar(
    examination: Examination,
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
        The map: a key of :data:`qsmpipe.maps.MAPS`.
    steps
        Stage, method, parameters and warnings of each step that led to the map.
    reference : str
        What susceptibility is relative to: ``brain``, ``none`` or ``region:LABEL``.
    software : mapping, optional
        Package to version, beside this package's own.
    """
    acquisition, row, file = examination.acquisition, MAPS[key], MAPS[key].file
    times = list(examination.echo_times)
    content: dict[str, Any] = {
        "Description": row.description,
        "Sources": [uri(path, acquisition.root) for path in acquisition.sources],
        "SpatialReference": "orig",
    }
    content |= {"Type": file.mask_type} if row.is_mask else {"SkullStripped": file.skull_stripped}
    units = file.units or row.units
    content |= {"Units": units} if units else {}
    algorithm, citations = _estimation(file, steps)
    content |= {"EstimationAlgorithm": algorithm} if algorithm else {}
    content |= {"EstimationReference": citations} if citations else {}
    if times:
        content["EchoTime"] = times[0] if len(times) == 1 else times
    if examination.field_strength:
        content["MagneticFieldStrength"] = round(examination.field_strength, 6)
    content |= {k: acquisition.metadata[k] for k in ACQUISITION_KEYS if k in acquisition.metadata}
    if file.suffix == "Chimap":
        region, _, label = reference.partition(":")
        named = {
            "brain": f"whole brain (the mask desc-{'cosmos' if key == 'cosmos' else 'qsm'}_mask)",
            "csf": "cerebrospinal fluid of the ventricles (the mask desc-reference_mask)",
            "none": "none",
        }
        where = named.get(region, label or region)
        content["ReferenceRegion"] = "none" if file.desc == "unreferenced" else where
        values = [step["parameters"].get("value") for step in steps
                  if step.get("stage") == "reference"]  # fmt: skip
        referenced = content["ReferenceRegion"] != "none" and key != "deviation"
        if len(values) == 1 and values[0] is not None and referenced:
            content["ReferenceValue"] = float(values[0])
            content["ReferenceValueUnits"] = "ppm"
    if examination.b0_direction:
        content["B0Direction"] = [round(x, 9) for x in examination.b0_direction]
        content["B0DirectionFrame"] = "voxel axes (i, j, k)"
        content["B0DirectionSource"] = examination.b0_source
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
    old = _description(target)
    linked = str(old.get("DatasetLinks", {}).get("raw", link))
    if linked != link and (output / unquote(linked)).is_dir():
        msg = (
            f"{output} holds maps of another dataset, {(output / unquote(linked)).resolve()}, to "
            f"which their sidecars refer: choose another output folder for those of {root}"
        )
        raise ValueError(msg)
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
    made = [each for each in old.get("GeneratedBy", []) if each != maker]
    content = {
        "Name": f"Susceptibility maps of {raw.get('Name') or root.name}",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [*made, maker],
        "SourceDatasets": [source],
        "DatasetLinks": {"raw": link},
    }
    _write(target, json.dumps(content, indent=2) + "\n")
    ignored = output / ".bidsignore"
    lines = ignored.read_text(encoding="utf-8").splitlines() if ignored.exists() else []
    lines += [line for line in IGNORED_FILES if line not in lines]
    _write(ignored, "\n".join(lines) + "\n")
    if not (output / "README.md").exists():
        _write(output / "README.md", _readme())


State: TypeAlias = Mapping[str, tuple[int, int]]
"""Path of a map within the output folder to its inode and time of change (ns)."""


def state(output_dir: str | Path, acquisition: Acquisition, *, joined: bool = False) -> State:
    """List the maps of an acquisition that are there, with what changes when one is written.

    Parameters
    ----------
    output_dir : path
        Root of the derivative dataset.
    acquisition
        The acquisition.
    joined : bool
        Whether it stands for all orientations of a head together.
    """
    paths = [
        acquisition.output(key, method=method)
        for key, row in written().items()
        if (row.given_by == "head") == joined
        for method in (METHODS["inversion"] if row.by_method else ("",))
    ]
    found = {path: Path(output_dir) / path for path in paths}
    return {
        path.as_posix(): (place.stat().st_ino, place.stat().st_mtime_ns)
        for path, place in found.items()
        if place.is_file()
    }


def unchanged(output_dir: str | Path, before: State) -> dict[str, datetime]:
    """Tell which maps have not been written since :func:`state` gave ``before``, and when."""
    left = {}
    for path, seen in before.items():
        with suppress(OSError):
            now = (Path(output_dir) / path).stat()
            if (now.st_ino, now.st_mtime_ns) == seen:
                left[path] = datetime.fromtimestamp(now.st_mtime).astimezone()
    return left


def _estimation(file: Written, steps: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Methods behind a map as a paper names them, and where they were published."""
    summaries: list[str] = []
    keys: dict[str, None] = {}
    for step in steps:
        stage, name = step.get("stage", ""), step.get("method", "")
        if stage in file.stages and name in METHODS.get(stage, {}):
            method = METHODS[stage][name]
            summaries.append(method.summary)
            keys |= dict.fromkeys(method.cite)
    known = references()
    sources = (f"doi:{known[key].doi}" if known[key].doi else key for key in keys)
    return "; ".join(dict.fromkeys(summaries)), "; ".join(sources)


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
        files.write(path, text)


def _readme() -> str:
    rows = []
    for row in written().values():
        file = row.file
        name = "_".join(
            filter(None, [file.part and f"part-{file.part}", file.desc and f"desc-{file.desc}"])
        )
        units = file.units or row.units
        unit = f" ({units})" if units else ""
        on_request = "; on request" if file.intermediate else ""
        rows.append(
            f"- `{file.datatype}/*_{name + '_' if name else ''}{file.suffix}{file.extension}`: "
            f"{row.description}{unit}{on_request}"
        )
    return (
        "# Susceptibility maps\n\n"
        f"Made by qsmpipe {__version__} (quantitative susceptibility mapping). Open "
        "`index.html` for the reports; `logs/CITATION.md` is the methods text. Each run has a "
        "folder in `logs/` with its settings (`config.toml`) and its log.\n\n"
        "Paramagnetic susceptibility is positive. Every map's `.json` file tells its unit, its "
        "sources, the direction of B0 and each step with all parameters.\n\n"
        + "\n".join(rows)
        + "\n"
    )
