"""The door between DICOM files and BIDS: gradient-echo series, classic or enhanced.

This reads what QSM needs and refuses the rest; whole studies are the business of dcm2niix,
heudiconv or bidscoin.
"""

import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from qsmpipe import __version__, images
from qsmpipe.bids import BIDS_VERSION
from qsmpipe.numerics.stored_phase import scale_of

logger = logging.getLogger(__name__)

MR_IMAGES = tuple(f"1.2.840.10008.5.1.4.1.1.4{end}" for end in ("", ".1", ".4"))
"""SOP classes: MR, Enhanced MR, Legacy Converted Enhanced MR Image Storage."""

PARTS = {
    "mag": ("MAGNITUDE", "M", "M_FFE"),
    "phase": ("PHASE", "P", "P_FFE", "PHASE MAP"),
    "real": ("REAL", "R", "R_FFE"),
    "imag": ("IMAGINARY", "I", "I_FFE"),
}
"""BIDS part to the words of ComplexImageComponent and ImageType."""

FIELD_MAPS = {"B0", "B0 MAP", "B0MAP", "B0_MAP", "FIELD MAP", "FIELDMAP", "FIELD_MAP"}
DIFFERENCES = {"PHASE DIFFERENCE", "PHASE_DIFFERENCE", "PHASEDIFF"}
PROCESSED = {"SWI", "MNIP", "MINIP", "MIP", "MPR", "MOSAIC", "T2_STAR_MAP", "PROJECTION IMAGE"}
"""Words of ImageType for what is computed from gradient echoes, or is none."""

GE_PART, GE_SEQUENCE = (0x0043, 0x102F), (0x0019, 0x109E)
SIEMENS_COIL, PHILIPS_SCALE = (0x0051, 0x100F), (0x2005, 0x100E)
"""Private elements; each is asked for with its own manufacturer alone."""

SIDECAR = {
    "Manufacturer": ("Manufacturer",), "ManufacturersModelName": ("ManufacturerModelName",),
    "SoftwareVersions": ("SoftwareVersions",), "MagneticFieldStrength": ("MagneticFieldStrength",),
    "ImagingFrequency": ("ImagingFrequency", "TransmitterFrequency"),
    "ReceiveCoilName": ("ReceiveCoilName",), "MRAcquisitionType": ("MRAcquisitionType",),
    "ScanningSequence": ("ScanningSequence",), "SequenceVariant": ("SequenceVariant",),
    "SequenceName": ("SequenceName", "PulseSequenceName"), "FlipAngle": ("FlipAngle",),
    "RepetitionTimeExcitation": ("RepetitionTime",), "PixelBandwidth": ("PixelBandwidth",),
    "SliceThickness": ("SliceThickness",),
}  # fmt: skip
"""Sidecar field to the DICOM keywords it is read from: no person, place, date or free text."""

NUMBERS = {"MagneticFieldStrength", "ImagingFrequency", "FlipAngle", "RepetitionTimeExcitation",
           "PixelBandwidth", "SliceThickness"}  # fmt: skip

TOLERANCE = 0.02
"""Positions that differ by less are the same (mm)."""


@dataclass(frozen=True)
class Volume:
    """One part of one echo."""

    part: str
    """mag, phase, real or imag."""
    echo: int
    """From 1, in the order of the echo times."""
    echo_time: float
    """s."""
    stored: np.ndarray
    """(X, Y, Z), as the scanner stored it; the value is ``slope * stored + intercept``."""
    slope: float
    intercept: float
    units: str | None = None
    """"rad" or "arbitrary" for phase, real and imaginary parts."""


@dataclass(frozen=True)
class Scan:
    """One gradient-echo acquisition."""

    volumes: tuple[Volume, ...]
    affine: np.ndarray
    """Voxel to scanner coordinates (RAS+, mm), 4 x 4."""
    metadata: Mapping[str, Any]
    """What all sidecars say; nothing that could name a person."""

    @property
    def echo_times(self) -> tuple[float, ...]:
        """Echo times (s), increasing."""
        return tuple(sorted({volume.echo_time for volume in self.volumes}))

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts that every echo has."""
        return tuple(part for part in PARTS if part in {volume.part for volume in self.volumes})


@dataclass(frozen=True)
class _Frame:
    """What the header says of one slice."""

    path: Path
    index: int
    """Within its file."""
    series: int
    part: str
    echo_time: float
    position: tuple[float, ...]
    grid: tuple[float, ...]
    """Rows, columns, PixelSpacing (2), ImageOrientationPatient (6)."""
    slope: float
    intercept: float
    bounds: tuple[float, float]
    """Least and greatest value that its bits can hold."""
    coil: str

    @property
    def normal(self) -> np.ndarray:
        return np.cross(self.grid[4:7], self.grid[7:10])

    @property
    def height(self) -> float:
        return float(np.dot(self.position, self.normal))


def read(folder: str | Path, *, series: Sequence[int] = ()) -> Scan:
    """Read the gradient echoes below a folder.

    Parameters
    ----------
    folder : path
        DICOM files of one acquisition, in any order and with any names, sub-folders included.
        Objects without MR pixels are passed over.
    series : sequence of int
        Series numbers to read; empty: all.

    Returns
    -------
    Scan
        Slices in the order of their position, every part with the same echoes.

    Raises
    ------
    ValueError
        If there is nothing to read, or if it is not one whole gradient-echo acquisition.
    """
    folder = Path(folder)
    if not folder.is_dir():
        msg = f"{folder}: no such folder; give the folder of one acquisition's DICOM files"
        raise ValueError(msg)
    with disable_value_validation():  # its warnings quote values, birth dates among them
        try:
            return _read(folder, series)
        finally:
            _file.cache_clear()


def write(
    scan: Scan,
    root: str | Path,
    *,
    subject: str,
    session: str | None = None,
    acquisition: str | None = None,
) -> list[Path]:
    """Write a scan into a BIDS dataset: MEGRE, or T2starw for a single echo.

    Parameters
    ----------
    scan : Scan
        With phase, or with real and imaginary parts.
    root : path
        The dataset; made, with its description, where there is none.
    subject, session, acquisition : str
        Labels, with or without ``sub-``, ``ses-``, ``acq-``.

    Returns
    -------
    list of Path
        The images; each has its sidecar beside it.

    Raises
    ------
    ValueError
        If a label is none, if a file is there already, or if QSM cannot use the scan.
    """
    if "phase" not in scan.parts and not {"real", "imag"} <= set(scan.parts):
        msg = (
            f"these {len(scan.volumes)} volumes are {' and '.join(scan.parts)} alone: QSM needs "
            "the phase, or real and imaginary parts; export these series, too"
        )
        raise ValueError(msg)
    labels = {"sub": subject, "ses": session, "acq": acquisition}
    entities = [f"{key}-{_label(key, label)}" for key, label in labels.items() if label]
    folder = Path(root, *(e for e in entities if not e.startswith("acq-")), "anat")
    many = len(scan.echo_times) > 1
    paths = []
    for volume in scan.volumes:
        echo = [f"echo-{volume.echo}"] if many else []
        name = [*entities, *echo, f"part-{volume.part}", "MEGRE" if many else "T2starw"]
        paths.append(folder / ("_".join(name) + ".nii.gz"))
    for path in paths:
        if path.exists():
            msg = f"{path}: is there already; give another acquisition or session label"
            raise ValueError(msg)
    folder.mkdir(parents=True, exist_ok=True)
    description = Path(root, "dataset_description.json")
    if not description.exists():
        made_by = [{"Name": "qsmpipe", "Version": __version__}]
        content = {"Name": "Gradient echoes", "BIDSVersion": BIDS_VERSION, "DatasetType": "raw"}
        _json(description, {**content, "GeneratedBy": made_by})
    for volume, path in zip(scan.volumes, paths, strict=True):
        images.store(
            volume.stored, path, affine=scan.affine,
            slope=volume.slope, intercept=volume.intercept,
        )  # fmt: skip
        units = {"Units": volume.units} if volume.units else {}
        sidecar = {**scan.metadata, "EchoTime": volume.echo_time, **units}
        _json(path.with_name(path.name.replace(".nii.gz", ".json")), sidecar)
    return paths


def _read(folder: Path, series: Sequence[int]) -> Scan:
    metadata: dict[str, Any] = {}
    frames: list[_Frame] = []
    for path, header in _headers(folder, series):
        for sources, index in _split(header):
            frames.append(_frame(path, index, sources, header))
            metadata = metadata or _metadata(sources)
    if not frames:
        chosen = f" of series {', '.join(map(str, series))}" if series else ""
        msg = f"{folder}: no MR images{chosen} among its files; give the DICOM folder"
        raise ValueError(msg)
    stacks = _stacks(frames)
    times = sorted({time for time, _ in stacks})
    scale = _phase_scale(stacks, str(metadata.get("Manufacturer", "")))
    volumes = tuple(
        _volume(stack, part, times.index(time) + 1, scale)
        for (time, part), stack in sorted(stacks.items())
    )
    return Scan(volumes, _affine(next(iter(stacks.values()))), metadata)


def _label(key: str, label: str) -> str:
    bare = label.removeprefix(f"{key}-")
    if not re.fullmatch(r"[0-9a-zA-Z+]+", bare):
        msg = f"{key}-{bare}: a label has letters and digits only"
        raise ValueError(msg)
    return bare


def _json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------
# Headers
# ---------------------------------------------------------------------------------------------


def _headers(folder: Path, series: Sequence[int]) -> Iterator[tuple[Path, Dataset]]:
    """MR images among the files, in the order of their names."""
    passed = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True)
        except InvalidDicomError:
            passed += 1
            continue
        except (OSError, EOFError, ValueError) as error:
            msg = f"{path}: damaged ({type(error).__name__}); copy or export it again"
            raise ValueError(msg) from error
        if header.get("SOPClassUID") not in MR_IMAGES or "Rows" not in header:
            passed += 1
        elif not series or header.get("SeriesNumber") in series:
            yield path, header
    if passed:
        logger.info("%d files are no MR images and are passed over", passed)


def _split(header: Dataset) -> Iterator[tuple[list[Dataset], int]]:
    """Each frame of a file: where to look its attributes up, nearest first, and its index."""
    shared = _groups(header.get("SharedFunctionalGroupsSequence", [])[:1])
    world = list(header.get("RealWorldValueMappingSequence", [])[:1])
    own = header.get("PerFrameFunctionalGroupsSequence", [])
    if not own:
        yield [header, *shared, *world], 0
    for index, groups in enumerate(own):
        yield [*_groups([groups]), *shared, header], index


def _groups(items: Iterable[Dataset]) -> list[Dataset]:
    """First item of each functional group."""
    return [group[0] for item in items for group in _values(item) if group]


def _values(item: Dataset) -> list[Any]:
    return [element.value for element in item if element.VR == "SQ"]


def _first(sources: Iterable[Dataset], *names: str | tuple[int, int]) -> Any:
    """Give the first value that is not empty, by name and then by source."""
    sources = list(sources)
    for name in names:
        for source in sources:
            value = source.get(name)
            value = getattr(value, "value", value) if isinstance(name, tuple) else value
            if value is not None and value != "" and value != b"":
                return value
    return None


def _words(value: Any) -> list[str]:
    """Values of an attribute that has none, one or many."""
    if value is None:
        return []
    many = isinstance(value, Sequence) and not isinstance(value, str)
    return [str(item) for item in value] if many else [str(value)]


def _metadata(sources: list[Dataset]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, names in SIDECAR.items():
        words = _words(_first(sources, *names))
        if words:
            found[key] = float(words[0]) if key in NUMBERS else "\\".join(words)
    if "RepetitionTimeExcitation" in found:
        found["RepetitionTimeExcitation"] = round(found["RepetitionTimeExcitation"] / 1000, 9)
    return found


def _frame(path: Path, index: int, sources: list[Dataset], header: Dataset) -> _Frame:
    time = _first(sources, "EffectiveEchoTime", "EchoTime")
    place = {
        "EchoTime": None if time is None or not float(time) > 0 else time,
        **{
            name: _first(sources, name)
            for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
        },
    }
    for name, value in place.items():
        if value is None:
            msg = f"{path}: no {name} in its header: no image of a gradient-echo scan"
            raise ValueError(msg)
    manufacturer = str(header.get("Manufacturer", "")).lower()
    part = _part(path, sources, manufacturer)
    slope = float(_first(sources, "RescaleSlope") or 1)
    intercept = float(_first(sources, "RescaleIntercept") or 0)
    bits, signed = int(header.BitsStored), int(header.get("PixelRepresentation", 0))
    least = -(2 ** (bits - 1)) if signed else 0
    bounds = (slope * least + intercept, slope * (least + 2**bits - 1) + intercept)
    if part != "phase" and manufacturer.startswith("philips"):
        # What is displayed is scaled image by image; divided so, images compare.
        scale = slope * float(_first(sources, PHILIPS_SCALE) or 1 / slope)
        slope, intercept = slope / scale, intercept / scale
    coil = _first(sources, SIEMENS_COIL) if manufacturer.startswith("siemens") else None
    return _Frame(
        path, index, int(header.get("SeriesNumber") or 0), part, round(float(time) / 1000, 6),
        tuple(map(float, place["ImagePositionPatient"])),
        (int(header.Rows), int(header.Columns), *map(float, place["PixelSpacing"]),
         *map(float, place["ImageOrientationPatient"])),
        slope, intercept, bounds, str(coil or _first(sources, "ReceiveCoilName")),
    )  # fmt: skip


def _part(path: Path, sources: list[Dataset], manufacturer: str) -> str:
    """Part of a frame; what is no image of an echo is refused."""
    words = [word.upper() for word in _words(_first(sources, "FrameType", "ImageType"))[2:]]
    component = str(_first(sources, "ComplexImageComponent") or "").upper()
    part = next((p for p, names in PARTS.items() if component == names[0]), None)
    if part is None:
        part = next((p for w in words for p, names in PARTS.items() if w in names), None)
    sequence = str(_first(sources, "SequenceName", "PulseSequenceName") or "").lower()
    if manufacturer.startswith("ge"):
        given = _first(sources, GE_PART)
        code = int.from_bytes(given[:2], "little") if isinstance(given, bytes) else given
        part = part or dict(enumerate(PARTS)).get(code)
        sequence = str(_first(sources, GE_SEQUENCE) or "").lower()
    units = _first(_first(sources, "MeasurementUnitsCodeSequence") or (), "CodeValue")
    series = f"{path} (series {_first(sources, 'SeriesNumber')})"
    choose = "leave it out, or name the gradient-echo series (--series)"
    if FIELD_MAPS & {*words} or "b0map" in sequence or "Hz" in (
        units, _first(sources, "RescaleType")
    ):  # fmt: skip
        msg = f"{series}: a field map in Hz, finished by the scanner, and no phase; {choose}"
    elif DIFFERENCES & {*words} or (part == "phase" and sequence.startswith("*fm")):
        msg = (
            f"{series}: the phase difference of two echoes (a field-mapping sequence), and not "
            f"the phase of each; {choose}"
        )
    elif PROCESSED & {*words}:
        msg = f"{series}: ImageType {words} is no image of an echo; {choose}"
    elif {"SE", "SPIN"} & {*_words(_first(sources, "ScanningSequence", "EchoPulseSequence"))}:
        msg = f"{series}: a spin echo, whose phase holds no field; {choose}"
    elif part is None:
        msg = f"{series}: ImageType {words} says neither magnitude nor phase; {choose}"
    else:
        return part
    raise ValueError(msg)


# ---------------------------------------------------------------------------------------------
# Slices to volumes
# ---------------------------------------------------------------------------------------------


def _stacks(frames: list[_Frame]) -> dict[tuple[float, str], list[_Frame]]:
    """Echo time and part to slices in order; all echoes and parts of one scan, all complete."""
    first = frames[0]
    for frame in frames:
        if not np.allclose(frame.grid, first.grid, atol=1e-3):
            msg = (
                f"{_grid(first)} and {_grid(frame)} are on different grids: these are several "
                "acquisitions; convert them one by one (--series)"
            )
            raise ValueError(msg)
    groups: dict[tuple[float, str], list[_Frame]] = defaultdict(list)
    for frame in sorted(frames, key=lambda frame: frame.height):
        groups[frame.echo_time, frame.part].append(frame)
    times, parts = ({key[i] for key in groups} for i in (0, 1))
    for time in sorted(times):
        for part in sorted(parts):
            if (time, part) not in groups:
                msg = (
                    f"no {part} image at echo time {1000 * time:g} ms, where there is one of "
                    "another part: the export is incomplete, or this is a phase difference"
                )
                raise ValueError(msg)
    heights = np.sort([frame.height for frame in frames])
    heights = heights[np.diff(heights, prepend=-np.inf) > TOLERANCE]
    for key, stack in groups.items():
        _check_stack(key, stack, heights)
    return groups


def _grid(frame: _Frame) -> str:
    rows, columns, *spacing = frame.grid[:4]
    return f"series {frame.series} ({columns:g} x {rows:g}, {spacing[1]:g} x {spacing[0]:g} mm)"


def _check_stack(key: tuple[float, str], stack: list[_Frame], heights: np.ndarray) -> None:
    name = f"{key[1]} at echo time {1000 * key[0]:g} ms"
    held = sorted({frame.series for frame in stack})
    numbers = ", ".join(map(str, held))
    own = np.array([frame.height for frame in stack])
    if (np.diff(own) <= TOLERANCE).any():
        coils = {frame.coil for frame in stack}
        if len(coils) > 1:
            why = f"one per coil ({len(coils)} coils): combine the coils before (ASPIRE, SVD ...)"
        elif len(held) > 1:
            why = f"series {numbers} hold the same: choose one (--series)"
        else:
            why = "repeats, or coils that are not combined; convert one of them by itself"
        msg = f"{name} (series {numbers}): several images at the same place: {why}"
        raise ValueError(msg)
    where = f"{name} (series {numbers}): incomplete volume"
    if len(stack) == 1:
        msg = f"{where}: 1 slice; give the folder with all slices of the acquisition"
        raise ValueError(msg)
    if len(own) != len(heights):
        lost = [h for h in heights if np.abs(own - h).min() > TOLERANCE]
        at = ", ".join(f"{h:.1f}" for h in lost[:3])
        msg = f"{where}: {len(own)} of {len(heights)} slices; none at {at} mm; export it again"
        raise ValueError(msg)
    gaps = np.diff(own)
    if np.ptp(gaps) > max(TOLERANCE, 0.01 * gaps.min()):
        at = own[gaps.argmax()]
        msg = (
            f"{where}: slices are {gaps.min():.4g} mm apart, but {gaps.max():.4g} mm after the "
            f"one at {at:.1f} mm: slices are missing; export it again"
        )
        raise ValueError(msg)
    place = np.array([frame.position for frame in stack])
    shift = place - place[0] - np.outer(own - own[0], stack[0].normal)
    if np.abs(shift).max() > 0.1:
        msg = f"{name} (series {numbers}): its slices do not lie above each other (sheared stack)"
        raise ValueError(msg)


def _affine(stack: list[_Frame]) -> np.ndarray:
    """RAS+ affine of volumes whose second axis runs against DICOM's rows, as dcm2niix has it."""
    rows, _, row_spacing, column_spacing = stack[0].grid[:4]
    along_row, along_column = np.array(stack[0].grid[4:7]), np.array(stack[0].grid[7:10])
    first, last = np.array(stack[0].position), np.array(stack[-1].position)
    affine = np.eye(4)
    affine[:3, 0] = along_row * column_spacing
    affine[:3, 1] = -along_column * row_spacing
    affine[:3, 2] = (last - first) / (len(stack) - 1)
    affine[:3, 3] = first + along_column * row_spacing * (rows - 1)
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _pixels(frame: _Frame) -> np.ndarray:
    pixels = _file(frame.path)
    return pixels[frame.index] if pixels.ndim == 3 else pixels


@lru_cache(maxsize=2)
def _file(path: Path) -> np.ndarray:
    try:
        return pydicom.dcmread(path).pixel_array
    except (OSError, EOFError, ValueError, AttributeError, RuntimeError, KeyError) as error:
        why = str(error).split(":", 1)[0] if isinstance(error, RuntimeError) else "truncated"
        msg = f"{path}: its pixels cannot be read ({why}); export it again, uncompressed"
        raise ValueError(msg) from error


def _phase_scale(
    stacks: Mapping[tuple[float, str], list[_Frame]], manufacturer: str
) -> tuple[float, float, str]:
    """Slope and intercept that bring rescaled phase into the unit, which is named third."""
    phase = [frame for (_, part), stack in stacks.items() if part == "phase" for frame in stack]
    if not phase:
        return 1.0, 0.0, "arbitrary"
    rule = scale_of(min(f.bounds[0] for f in phase), max(f.bounds[1] for f in phase))
    if rule is None:
        extremes = [
            frame.slope * value + frame.intercept
            for frame in phase
            for value in (float(_pixels(frame).min()), float(_pixels(frame).max()))
        ]
        rule = scale_of(min(extremes), max(extremes), manufacturer=manufacturer)
    return (rule.slope, rule.intercept, "rad") if rule else (1.0, 0.0, "arbitrary")


def _volume(
    stack: list[_Frame], part: str, echo: int, phase_scale: tuple[float, float, str]
) -> Volume:
    stored = np.stack([_pixels(frame).T[:, ::-1] for frame in stack], axis=-1)
    scales = {(frame.slope, frame.intercept) for frame in stack}
    slope, intercept = scales.pop()
    if scales:  # a NIfTI file has but one
        slopes, intercepts = np.array([(f.slope, f.intercept) for f in stack]).T
        stored = (stored * slopes + intercepts).astype(np.float32)
        slope, intercept = 1.0, 0.0
    elif stored.dtype.kind in "ui" and np.abs(stored.astype(np.int64)).max() < 2**15:
        stored = stored.astype(np.int16)
    if part == "mag" and slope * float(stored.min()) + intercept < -0.01 * slope * stored.max():
        msg = f"{stack[0].path} (series {stack[0].series}): magnitude below 0: a field map in Hz?"
        raise ValueError(msg)
    units = None
    if part != "mag":
        factor, constant, units = phase_scale if part == "phase" else (1.0, 0.0, "arbitrary")
        slope, intercept = factor * slope, factor * intercept + constant
    return Volume(part, echo, stack[0].echo_time, stored, slope, intercept, units)
