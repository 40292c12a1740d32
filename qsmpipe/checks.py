"""The input check: what an acquisition is, and whether it can be processed, before any node runs.

What cannot be processed is an error, what is unusual a warning, what was decided silently a note;
every message names the file, the value and the remedy.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from qsmpipe import images
from qsmpipe.bids import Acquisition, echo_of, together
from qsmpipe.numerics.phase import alternates
from qsmpipe.numerics.units import GAMMA

TURN = 2 * math.pi

SAMPLES = 200_000
"""Voxels of one image that statistics of neighbours look at, along each axis."""

LONG = 0.03
"""Echo time times field strength (T s) from which a head's phase must have wrapped."""


@dataclass(frozen=True)
class Finding:
    """One thing that the check found."""

    level: Literal["error", "warning", "note"]
    check: str
    message: str
    """File, value, remedy."""


@dataclass(frozen=True)
class Examination:
    """An acquisition, how to read it, and what is wrong with it.

    Phase is ``phase_sign * (phase_slope * value + phase_intercept)`` (rad). Where there are
    errors, what could not be found out has its default.
    """

    acquisition: Acquisition
    findings: tuple[Finding, ...]
    phase_slope: float = 1.0
    phase_intercept: float = 0.0
    phase_sign: int = 1
    alternating: bool = False
    """Whether every second slice is shifted by pi."""
    field_strength: float = 0.0
    """B0 (T)."""
    b0_direction: tuple[float, ...] = ()
    """Unit vector along B0 in voxel axes."""
    echo_times: tuple[float, ...] = ()
    """One per echo (s)."""
    zooms: tuple[float, ...] = ()
    """Voxel size (mm)."""
    shape: tuple[int, ...] = ()
    phase_scale: str = ""
    """Where slope and intercept come from, in words."""

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings for which the acquisition is refused."""
        return tuple(f for f in self.findings if f.level == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Findings that are unusual."""
        return tuple(f for f in self.findings if f.level == "warning")

    def summary(self) -> dict[str, str]:
        """Give the acquisition as label and text, for the report and for a dry run."""
        acquisition, metadata = self.acquisition, self.acquisition.metadata
        times = [1000 * time for time in self.echo_times]
        rows: dict[str, Any] = {
            "Files": f"{len(acquisition.sources)} {acquisition.suffix} ({_parts(acquisition)})",
            "Echoes": len(acquisition.signal),
            "Echo times (ms)": ", ".join(f"{time:.4g}" for time in times),
        }
        if len(times) > 1:
            spacing = (times[-1] - times[0]) / (len(times) - 1)
            rows["TE1:ΔTE:TEmax (ms)"] = f"{times[0]:.4g}:{spacing:.4g}:{times[-1]:.4g}"
        rows |= {
            "Field strength (T)": f"{self.field_strength:.4g}" if self.field_strength else "",
            "Imaging frequency (MHz)": metadata.get("ImagingFrequency"),
            "Matrix": " x ".join(map(str, self.shape)),
            "Voxel size (mm)": " x ".join(f"{zoom:.4g}" for zoom in self.zooms),
            "B0 direction (voxel axes)": ", ".join(f"{b:.4f}" for b in self.b0_direction),
        }
        if self.b0_direction:
            tilt = math.degrees(math.acos(min(1.0, abs(self.b0_direction[2]))))
            rows["Slices tilted against B0 (degrees)"] = f"{tilt:.1f}"
        rows |= {
            "Phase scale": self.phase_scale,
            "Phase sign": f"{self.phase_sign:+d}",
            "Slices alternate in sign": "yes, mended" if self.alternating else "no",
        }
        rows |= {label: metadata.get(key) for label, key in REPORTED.items()}
        return {label: _text(value) for label, value in rows.items() if value not in (None, "")}


def heads(examinations: Sequence[Examination]) -> list[Examination]:
    """Join each subject's acquisitions into one of a head at several orientations.

    A subject with a single acquisition that passed the check gets an error.
    """
    subjects = dict.fromkeys(each.acquisition.subject for each in examinations)
    joined = []
    for subject in subjects:
        own = [each for each in examinations if each.acquisition.subject == subject]
        ready = [each for each in own if not each.errors]
        first = (ready or own)[0]
        findings = tuple(dict.fromkeys(f for each in ready for f in each.warnings))
        if len(ready) < 2:
            names = ", ".join(each.acquisition.name for each in ready) or "none"
            findings = (Finding(
                "error",
                "cosmos",
                f"COSMOS needs 2 or more acquisitions of sub-{subject} that pass the input check, "
                f"the head turned between them, and there is {len(ready)} ({names}): leave out "
                "--cosmos, or select more sessions, runs or acquisitions",
            ),)  # fmt: skip
        same_echoes = all(each.echo_times == first.echo_times for each in ready)
        joined.append(replace(
            first,
            acquisition=together([each.acquisition for each in ready or own]),
            findings=findings,
            echo_times=first.echo_times if same_echoes else (),
            b0_direction=(),
        ))  # fmt: skip
    return joined


def head_name(examination: Examination) -> str:
    """Name the record of what :func:`heads` joined, as its map is named."""
    return f"{examination.acquisition.name}_desc-cosmos"


REPORTED = {
    "Manufacturer": "Manufacturer",
    "Model": "ManufacturersModelName",
    "Scanner software": "SoftwareVersions",
    "Receive coil": "ReceiveCoilName",
    "Coil combination": "CoilCombinationMethod",
    "Sequence": "SequenceName",
    "Pulse sequence": "PulseSequenceType",
    "Acquisition": "MRAcquisitionType",
    "Repetition time (s)": "RepetitionTime",
    "Repetition time of excitation (s)": "RepetitionTimeExcitation",
    "Flip angle (degrees)": "FlipAngle",
    "Bandwidth (Hz per pixel)": "PixelBandwidth",
    "Parallel imaging": "ParallelAcquisitionTechnique",
    "In-plane acceleration": "ParallelReductionFactorInPlane",
    "Partial Fourier": "PartialFourier",
}
"""What the report tells of the acquisition beside what the check found out itself."""


class _Notebook(list[Finding]):
    """Findings so far."""

    def error(self, check: str, message: str) -> None:
        self.append(Finding("error", check, message))

    def warn(self, check: str, message: str) -> None:
        self.append(Finding("warning", check, message))

    def note(self, check: str, message: str) -> None:
        self.append(Finding("note", check, message))

    @property
    def refused(self) -> bool:
        return any(finding.level == "error" for finding in self)


def examine(
    acquisition: Acquisition,
    *,
    field_strength: float | None = None,
    phase_sign: int | None = None,
) -> Examination:
    """Look at an acquisition's names, sidecars, headers and voxels.

    Parameters
    ----------
    acquisition
        As found by :func:`qsmpipe.bids.find`.
    field_strength : float, optional
        B0 (T), instead of what the sidecars say.
    phase_sign : int, optional
        +1 or -1, instead of what the manufacturer is known for.
    """
    notes = _Notebook()
    _check_parts(acquisition, notes)
    _check_kind(acquisition, notes)
    echo_times = _check_echo_times(acquisition, notes)
    strength = _check_field_strength(acquisition, field_strength, notes)
    placed = _check_headers(acquisition, notes)
    found: dict[str, Any] = {
        "phase_sign": _check_sign(acquisition, phase_sign, notes),
        "field_strength": strength,
        "echo_times": echo_times,
    }
    if placed is not None:
        found |= placed._asdict()
    if placed is not None and not any(finding.check == "field-map" for finding in notes):
        scan = _scan(acquisition, notes)
        if scan is not None:
            rule = _check_scale(acquisition, scan, notes)
            found |= {
                "phase_slope": rule.slope,
                "phase_intercept": rule.intercept,
                "phase_scale": rule.text,
            }
            if not notes.refused:
                found["alternating"] = _check_phase(
                    acquisition, scan, rule, echo_times, strength, notes
                )
    return Examination(acquisition, tuple(notes), **found)


def examine_mask(mask: Path, acquisition: Acquisition) -> tuple[Finding, ...]:
    """Look at a mask that the user gives for an acquisition: grid, values, size."""
    notes = _Notebook()
    try:
        values, _ = images.read(mask)
        fits = images.same_grid(mask, acquisition.signal[0])
    except ValueError as error:
        notes.error("mask", str(error))
        return tuple(notes)
    if not fits:
        notes.error(
            "mask",
            f"{mask} {values.shape} is not on the grid of "
            f"{acquisition.relative(acquisition.signal[0])} "
            f"{images.shape_of(acquisition.signal[0])}: resample the mask onto it",
        )
    levels = np.unique(values)
    if not np.isin(levels, (0, 1)).all():
        notes.error(
            "mask",
            f"{mask}: holds {len(levels)} different values up to {levels[-1]:g}, where a mask has "
            "0 and 1: make it binary",
        )
    elif not values.any():
        notes.error("mask", f"{mask}: holds no voxel (all 0): make it again")
    return tuple(notes)


# ---------------------------------------------------------------------------------------------
# Names and sidecars
# ---------------------------------------------------------------------------------------------


def _check_parts(acquisition: Acquisition, notes: _Notebook) -> None:
    """Magnitude and phase, or real and imaginary, of the same echoes, each once."""
    for problem in acquisition.problems:
        notes.error("sidecar", problem)
    for path in acquisition.ignored:
        notes.note(
            "parts",
            f"{acquisition.relative(path)}: left aside, the other files say the same",
        )
    first = acquisition.relative(acquisition.signal[0])
    count = len(acquisition.signal)
    if acquisition.is_complex:
        names = ("real", "imag")
        if not (acquisition.real and acquisition.imag):
            lack = "imag" if acquisition.real else "real"
            notes.error("parts", f"{first}: has no part-{lack} beside it: add it")
    else:
        names = ("magnitude", "phase")
        if not acquisition.phase:
            notes.error(
                "parts",
                f"{first}: no phase ({count} magnitude file{'s' * (count > 1)} only): "
                "susceptibility is computed from phase; export part-phase, or part-real and "
                "part-imag, from the scanner",
            )
        elif not acquisition.magnitude:
            notes.error(
                "parts",
                f"{first}: no magnitude beside the phase, which masks and weights are made from: "
                "add part-mag, or part-real and part-imag",
            )
    one, other = (getattr(acquisition, name) for name in names)
    for paths in (one, other):
        _check_duplicates(acquisition, paths, notes)
    echoes, others = ([echo_of(path) for path in paths] for paths in (one, other))
    unnumbered = len(one) == len(other) == 1 and None in (*echoes, *others)
    if one and other and set(echoes) != set(others) and not unnumbered:
        texts = [", ".join(map(str, sorted({e or 0 for e in e_}))) for e_ in (echoes, others)]
        notes.error(
            "echoes",
            f"{first}: {names[0]} has echoes {texts[0]}, {names[1]} has {texts[1]}: add what is "
            "missing, or leave the others out with --bids-filter-file "
            '({"qsm": {"echo": [...]}}); a single phase of two echoes may be a phase difference, '
            "which belongs into fmap/",
        )


def _check_duplicates(acquisition: Acquisition, paths: Sequence[Path], notes: _Notebook) -> None:
    counts = Counter(echo_of(path) for path in paths)
    for echo, count in counts.items():
        if count < 2:
            continue
        same = [path for path in paths if echo_of(path) == echo]
        shown = ", ".join(acquisition.relative(path) for path in same[:3])
        more = ", ..." if count > 3 else ""
        coils = any(re.search(r"_(coil|ch|channel)-", path.name) for path in same)
        if coils:
            remedy = (
                "these are the images of single receive coils: combine the coils first (on the "
                "scanner, or with ASPIRE or MCPC-3D-S)"
            )
        elif echo is None:
            remedy = "give each echo its index (echo-1, echo-2, ...)"
        else:
            remedy = (
                "keep one; if they are the images of single receive coils, combine the coils first"
            )
        which = "without echo index" if echo is None else f"of echo {echo}"
        notes.error("echoes", f"{shown}{more}: {count} images {which}: {remedy}")


FIELD_MAP_TYPES = re.compile(
    r"^(FIELD ?MAP(HZ)?|B0 ?MAP|B0|PHASE ?DIFF(ERENCE)?|FREQ(UENCY)? ?MAP)$", re.IGNORECASE
)
"""Words of ImageType that stand for a field map or a phase difference."""

FILTERED = re.compile(r"pha_images|high.?pass|\bhpf?\b|(?<!un)filtered|homodyne", re.IGNORECASE)
"""Words of a sidecar that tell of filtered phase."""


def _check_kind(acquisition: Acquisition, notes: _Notebook) -> None:
    """Look for field maps, single coils, filtered phase and 2D slices in the sidecars."""
    for path in acquisition.signal:
        name = acquisition.relative(path)
        metadata = acquisition.sidecars.get(path, {})
        units = str(metadata.get("Units", "")).strip()
        if units.lower() in ("hz", "khz", "rad/s", "t", "tesla", "ppm"):
            notes.error(
                "field-map",
                f'{name}: Units "{units}": this is a finished field map and no phase; move it to '
                "fmap/ and give the phase of each echo (part-phase)",
            )
            continue
        words = [str(word) for word in _listed(metadata.get("ImageType"))]
        telling = [word for word in words if FIELD_MAP_TYPES.match(word.strip())]
        if telling:
            notes.error(
                "field-map",
                f"{name}: ImageType {telling[0]!r}: this is a field map or a phase difference and "
                "no phase; move it to fmap/ and give the phase of each echo (part-phase)",
            )
        elif {"EchoTime1", "EchoTime2"} <= metadata.keys() and acquisition.phase:
            notes.error(
                "field-map",
                f"{name}: its sidecar has EchoTime1 {metadata['EchoTime1']} and EchoTime2 "
                f"{metadata['EchoTime2']}: this is the phase difference of two echoes; move it to "
                "fmap/ and give the phase of each echo (part-phase)",
            )
        combination = str(metadata.get("CoilCombinationMethod", "")).lower()
        if combination in ("none", "uncombined"):
            notes.error(
                "coils",
                f"{name}: CoilCombinationMethod {combination!r}: combine the receive coils first "
                "(on the scanner, or with ASPIRE or MCPC-3D-S)",
            )
    metadata = acquisition.metadata
    first = acquisition.relative(acquisition.signal[0])
    described = " ".join(
        str(word)
        for key in ("ImageType", "SeriesDescription", "ProtocolName", "ProcessingSteps")
        for word in _listed(metadata.get(key))
    )
    if (match := FILTERED.search(described)) and not notes.refused:
        notes.warn(
            "filtered",
            f"{first}: its sidecar says {match[0]!r}: high-pass filtered phase (as exported with "
            "SWI) has lost the field that susceptibility is computed from; export unfiltered "
            "phase",
        )
    if str(metadata.get("MRAcquisitionType", "")).upper() == "2D":
        notes.warn(
            "acquisition",
            f"{first}: MRAcquisitionType 2D: phase may differ from slice to slice, and fields "
            "between slices are missed; a 3D acquisition is recommended",
        )
    gap, thickness = (
        _float(metadata.get(key)) for key in ("SpacingBetweenSlices", "SliceThickness")
    )
    if gap and thickness and gap > 1.02 * thickness:
        notes.warn(
            "acquisition",
            f"{first}: slices of {thickness:g} mm every {gap:g} mm: the field in the gaps is "
            "unknown; acquire without gaps",
        )


def _check_echo_times(acquisition: Acquisition, notes: _Notebook) -> tuple[float, ...]:
    """Echo times in s, () where any is missing or wrong."""
    raw = [acquisition.sidecars.get(p, {}).get("EchoTime") for p in acquisition.signal]
    names = [acquisition.relative(path) for path in acquisition.signal]
    before = len(notes)
    absent = [name for name, value in zip(names, raw, strict=True) if value is None]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        notes.error(
            "echo-times",
            f"{absent[0]}{more}: no EchoTime: write it into the .json beside the image, in "
            'seconds ("EchoTime": 0.02)',
        )
    for name, value in zip(names, raw, strict=True):
        number = _float(value)
        if value is None:
            continue
        if isinstance(value, list):
            notes.error(
                "echo-times",
                f"{name}: EchoTime is a list of {len(value)}: split the image into one file per "
                "echo (echo-1, echo-2, ...), each with its own EchoTime",
            )
        elif number is None:
            notes.error(
                "echo-times", f"{name}: EchoTime {value!r} is no number: write it in seconds"
            )
        elif not 0 < number < math.inf:
            notes.error("echo-times", f"{name}: EchoTime {number:g} s is not above 0: correct it")
        elif number > 1:
            unit, factor = ("ms", 1e-3) if number <= 500 else ("us", 1e-6)
            notes.error(
                "echo-times",
                f"{name}: EchoTime {number:g} is not in seconds: if it is in {unit}, write "
                f"{number * factor:g}",
            )
    times = acquisition.echo_times
    if len(notes) > before:
        return ()
    valid = tuple(time for time in times if time is not None)
    if not valid:
        return ()
    if max(valid) < 1e-4:
        notes.error(
            "echo-times",
            f"{names[-1]}: EchoTime {max(valid):g} s is far too short: it seems to have been "
            "divided by 1000 twice; write it in seconds",
        )
    elif max(valid) > 0.3:
        notes.warn(
            "echo-times",
            f"{names[-1]}: EchoTime {max(valid):g} s is unusually long for a gradient echo: check "
            "that it is in seconds",
        )
    _check_order(acquisition, valid, names, notes)
    _check_same_times(acquisition, notes)
    return () if _refused_since(notes, before) else valid


def _check_order(
    acquisition: Acquisition, times: Sequence[float], names: Sequence[str], notes: _Notebook
) -> None:
    counts = Counter(times)
    repeated = [time for time, count in counts.items() if count > 1]
    numbered = len({echo_of(path) for path in acquisition.signal}) == len(times)
    if repeated and numbered:
        notes.error(
            "echo-times",
            f"{names[0]}: {len(times)} echoes have {len(counts)} different echo times "
            f"({repeated[0]:g} s stands in {counts[repeated[0]]} sidecars): if these are the "
            "images of single receive coils, combine the coils first; else correct EchoTime",
        )
    elif numbered:
        for i, (a, b) in enumerate(itertools.pairwise(times)):
            if b < a:
                notes.error(
                    "echo-times",
                    f"{names[i + 1]}: EchoTime {b:g} s is shorter than the {a:g} s of "
                    f"{names[i]}: number the echoes in the order of their times, or correct "
                    "EchoTime",
                )


def _check_same_times(acquisition: Acquisition, notes: _Notebook) -> None:
    """Magnitude and phase of an echo must tell one echo time."""
    partner = acquisition.imag if acquisition.is_complex else acquisition.magnitude
    if len(partner) != len(acquisition.signal) or partner == acquisition.signal:
        return
    for path, other in zip(acquisition.signal, partner, strict=True):
        mine = _float(acquisition.sidecars.get(path, {}).get("EchoTime"))
        its = _float(acquisition.sidecars.get(other, {}).get("EchoTime"))
        if mine and its and abs(mine - its) > 0.01 * mine:
            notes.error(
                "echo-times",
                f"{acquisition.relative(path)}: EchoTime {mine:g} s, but {its:g} s in "
                f"{acquisition.relative(other)}: correct the wrong one",
            )


def _check_field_strength(
    acquisition: Acquisition, given: float | None, notes: _Notebook
) -> float:
    """B0 (T): the user's, the imaging frequency's, the nominal one; 0 where there is none."""
    name, metadata = acquisition.relative(acquisition.signal[0]), acquisition.metadata
    frequency = _float(metadata.get("ImagingFrequency"))
    nominal = _float(metadata.get("MagneticFieldStrength"))
    if frequency is not None and not 0.5 < frequency < 1300:
        notes.warn(
            "field-strength",
            f"{name}: ImagingFrequency {frequency:g} MHz cannot be that of protons: not used",
        )
        frequency = None
    measured = frequency / GAMMA if frequency else None
    strength = given or measured or nominal
    if not strength:
        notes.error(
            "field-strength",
            f"{name}: neither ImagingFrequency (MHz) nor MagneticFieldStrength (T) in its "
            "sidecar: add one, or give --b0",
        )
        return 0.0
    if not 0.02 < strength < 30:
        source = "--b0" if given else "MagneticFieldStrength"
        unit = f"; if it is in gauss, write {strength / 1e4:g}" if strength > 1000 else ""
        notes.error(
            "field-strength",
            f"{name}: {source} {strength:g} is no field strength in T: correct it{unit}",
        )
        return 0.0
    said = {"ImagingFrequency": measured, "MagneticFieldStrength": nominal}
    for key, value in said.items():
        if value and abs(value - strength) > 0.1 * strength:
            used = "--b0" if given else "ImagingFrequency"
            notes.warn(
                "field-strength",
                f"{name}: {key} says {value:.3g} T, {used} {strength:.3g} T, which is used: check "
                "the sidecar, or give --b0",
            )
    return strength


def _check_sign(acquisition: Acquisition, given: int | None, notes: _Notebook) -> int:
    name = acquisition.relative(acquisition.signal[0])
    maker = str(acquisition.metadata.get("Manufacturer", "")).strip()
    if given is not None:
        if given not in (1, -1):
            notes.error("phase-sign", f"phase sign {given!r}: give 1 or -1")
            return 1
        return given
    if re.match(r"GE\b|General Electric", maker, re.IGNORECASE):
        notes.note(
            "phase-sign",
            f"{name}: Manufacturer {maker}: the phase is negated, as GE counts precession the "
            "other way round; --phase-sign 1 leaves it",
        )
        return -1
    if not maker:
        notes.warn(
            "phase-sign",
            f"{name}: no Manufacturer in its sidecar, so that the sign of the phase is taken as "
            "it is; if veins come out diamagnetic (dark), give --phase-sign -1",
        )
    return 1


# ---------------------------------------------------------------------------------------------
# Headers
# ---------------------------------------------------------------------------------------------


class _Placed(NamedTuple):
    shape: tuple[int, ...]
    zooms: tuple[float, ...]
    b0_direction: tuple[float, ...]


def _check_headers(acquisition: Acquisition, notes: _Notebook) -> _Placed | None:
    """One 3D grid for all images, with its direction of B0; None where it cannot be had."""
    headers: dict[Path, images.Header] = {}
    usable = True
    for path in acquisition.sources:
        name = acquisition.relative(path)
        try:
            headers[path] = header = images.header(path)
        except ValueError as error:
            usable = False
            lost = path.is_symlink() and not path.exists()
            remedy = " (its content is not here: datalad get, or git annex get)" if lost else ""
            notes.error("image", str(error).replace(str(path), name) + remedy)
            continue
        wrong = _wrong_shape(header, acquisition.sidecars.get(path, {}))
        if wrong:
            usable = False
            notes.error("image", f"{name}: {wrong}")
    if not usable:
        return None
    reference = acquisition.signal[0]
    first, name = headers[reference], acquisition.relative(reference)
    shape = first.shape[:3]
    for path, header in headers.items():
        if header.shape[:3] != shape:
            notes.error(
                "grid",
                f"{acquisition.relative(path)} {header.shape[:3]} and {name} {shape} differ in "
                "size: all images of an acquisition must lie on one grid; convert it again",
            )
            usable = False
        elif not np.allclose(header.affine, first.affine, atol=1e-3):
            off = np.abs(header.affine - first.affine).max()
            notes.error(
                "grid",
                f"{acquisition.relative(path)} and {name} have affines that differ by up to "
                f"{off:.3g}: all images of an acquisition must lie on one grid; resample none of "
                "them, convert it again",
            )
            usable = False
    if min(shape) < 3:
        notes.error(
            "slices",
            f"{name}: {' x '.join(map(str, shape))} voxels: fewer than 3 slices hold no field "
            "that could be inverted; was the volume converted completely?",
        )
        usable = False
    return _place(name, first, notes) if usable else None


def _wrong_shape(header: images.Header, metadata: Mapping[str, Any]) -> str:
    """Say what is wrong with an image's size or type; "" if nothing is."""
    shape = " x ".join(map(str, header.shape))
    if header.dtype.kind not in "iuf":
        kind = "complex" if header.dtype.kind == "c" else str(header.dtype)
        return f"holds {kind} numbers: write part-mag and part-phase as real numbers"
    if len(header.shape) < 3:
        return f"{shape} voxels: fewer than 3 slices; was the volume converted completely?"
    extra = math.prod(header.shape[3:])
    if extra == 1:
        return ""
    times = metadata.get("EchoTime")
    if isinstance(times, list) and len(times) == extra:
        return (
            f"{shape}: all {extra} echoes in one file, which BIDS does not know: split it into "
            "one file per echo (echo-1, echo-2, ...), each with its own EchoTime"
        )
    return (
        f"{shape}: {extra} volumes, where one is expected: if they are receive coils, combine "
        "them first; if they are echoes, split them into one file per echo; if repetitions, into "
        "runs (run-1, run-2, ...)"
    )


def _place(name: str, header: images.Header, notes: _Notebook) -> _Placed | None:
    zooms = tuple(float(z) for z in np.linalg.norm(header.affine[:3, :3], axis=0))
    if not all(math.isfinite(zoom) and zoom > 0 for zoom in zooms):
        notes.error("geometry", f"{name}: voxel size {zooms} mm: correct the header")
        return None
    if not header.is_placed:
        notes.warn(
            "geometry",
            f"{name}: neither qform nor sform: where the head lay in the scanner is unknown, and "
            "B0 is assumed along the third axis; convert it again from DICOM",
        )
    if max(zooms) > 10 or min(zooms) < 0.05:
        notes.warn(
            "geometry",
            f"{name}: voxel size {' x '.join(f'{z:.3g}' for z in zooms)} mm is unusual: check "
            "that the header is in mm",
        )
    try:
        direction = images.b0_direction(header.affine)
    except ValueError as error:
        notes.error("geometry", f"{name}: {error}")
        return None
    return _Placed(header.shape[:3], zooms, direction)


# ---------------------------------------------------------------------------------------------
# Voxels
# ---------------------------------------------------------------------------------------------

Views = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Lines of an image along each axis, taken at a stride from the other two."""


class _Scan(NamedTuple):
    """What one reading of the images left behind."""

    extremes: list[tuple[float, float]]
    """Least and greatest phase of each echo, in the scanner's unit."""
    phase: list[Views]
    """In the scanner's unit; of real and imaginary parts in rad."""
    head: Views
    """Where there is signal."""


def _scan(acquisition: Acquisition, notes: _Notebook) -> _Scan | None:
    """Read every image once; None where any of them is useless."""
    partner = acquisition.imag if acquisition.is_complex else acquisition.magnitude
    extremes: list[tuple[float, float]] = []
    phase: list[Views] = []
    head: Views | None = None
    before = len(notes)
    for i, path in enumerate(acquisition.signal):
        values = _read(acquisition, path, notes)
        if values is None:
            continue
        finite = values[np.isfinite(values)] if not np.isfinite(values).all() else values
        extremes.append((float(finite.min()), float(finite.max())))
        views = _views(values)
        del values, finite
        magnitude: Views | None = None
        if i < len(partner):
            other = _read(acquisition, partner[i], notes, signed=acquisition.is_complex)
            magnitude = None if other is None else _views(other)
            del other
        if acquisition.is_complex and magnitude is not None:
            pairs = list(zip(views, magnitude, strict=True))
            views = _triple(np.arctan2(imag, real) for real, imag in pairs)
            magnitude = _triple(np.hypot(real, imag) for real, imag in pairs)
        elif magnitude is not None and np.array_equal(views[0], magnitude[0]):
            notes.error(
                "values",
                f"{acquisition.relative(path)} and {acquisition.relative(partner[i])} hold the "
                "same numbers: one of magnitude and phase was exported twice; convert them again",
            )
        if phase and np.array_equal(views[0], phase[-1][0]):
            notes.error(
                "values",
                f"{acquisition.relative(path)} holds the same numbers as the echo before: convert "
                "the echoes again",
            )
        phase.append(views)
        if head is None and magnitude is not None:
            head = _head(magnitude)
    if _refused_since(notes, before) or head is None or not phase:
        return None
    return _Scan(extremes, phase, head)


def _read(
    acquisition: Acquisition, path: Path, notes: _Notebook, *, signed: bool = True
) -> np.ndarray | None:
    """Voxels of an image, after a look at them; None where it has none to speak of."""
    name = acquisition.relative(path)
    try:
        values, _ = images.read(path)
    except ValueError as error:
        notes.error("image", str(error).replace(str(path), name))
        return None
    values = values.reshape(values.shape[:3])
    nan = int(np.isnan(values).sum())
    infinite = int(np.isinf(values).sum())
    if nan + infinite == values.size:
        notes.error("values", f"{name}: all voxels are NaN or infinite: convert it again")
        return None
    if nan or infinite:
        share = 100 * (nan + infinite) / values.size
        notes.warn(
            "values",
            f"{name}: {nan} voxels are NaN and {infinite} infinite ({share:.2g} %): they are set "
            "to 0; check how the image was made",
        )
    if not values.any():
        notes.error("values", f"{name}: all voxels are 0: convert it again, or leave the echo out")
        return None
    if not signed and np.count_nonzero(values < 0) > 0.001 * values.size:
        notes.error(
            "values",
            f"{name}: a magnitude with values down to {np.nanmin(values):g}: are magnitude and "
            "phase swapped? rename the files, or convert them again",
        )
    return values


def _triple(arrays: Iterable[np.ndarray]) -> Views:
    x, y, z = arrays
    return x, y, z


def _views(values: np.ndarray) -> Views:
    """Lines along each axis, about SAMPLES voxels each, without NaN and infinity."""
    step = max(1, round(math.sqrt(values.size / SAMPLES)))
    parts = (values[:, ::step, ::step], values[::step, :, ::step], values[::step, ::step, :])
    return _triple(np.nan_to_num(part, nan=0.0, posinf=0.0, neginf=0.0) for part in parts)


def _head(magnitude: Views) -> Views:
    """Voxels with signal: above a fifth of the bright ones."""
    bright = np.percentile(magnitude[2][magnitude[2] > 0], 98)
    return _triple(view > 0.2 * bright for view in magnitude)


# ---------------------------------------------------------------------------------------------
# Phase
# ---------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """Phase in rad is ``slope * value + intercept``."""

    slope: float
    intercept: float
    text: str


class Range(NamedTuple):
    """Numbers that scanners store phase as."""

    least: float
    greatest: float
    rule: Rule


RANGES = (
    Range(-math.pi, math.pi, Rule(1.0, 0.0, "radians, -pi to pi")),
    Range(0.0, TURN, Rule(1.0, 0.0, "radians, 0 to 2 pi")),
    Range(-180.0, 180.0, Rule(math.pi / 180, 0.0, "degrees, -180 to 180")),
    Range(-3142.0, 3142.0, Rule(1e-3, 0.0, "milliradians, -3142 to 3142 (Philips, GE)")),
    Range(-4096.0, 4096.0, Rule(math.pi / 4096, 0.0, "-4096 to 4094 (Siemens)")),
    Range(0.0, 4096.0, Rule(math.pi / 2048, -math.pi, "0 to 4095 (Siemens, unscaled)")),
)
"""Noise fills a phase image, so that its extremes tell what it is stored as."""


def scale_of(least: float, greatest: float, *, manufacturer: str = "") -> Rule | None:
    """Known rule for phase that runs from ``least`` to ``greatest``; None if there is none.

    >>> scale_of(-4096, 4094).text
    '-4096 to 4094 (Siemens)'
    >>> scale_of(-17, 2000) is None
    True
    """
    for low, high, rule in RANGES:
        slack = 0.01 * (high - low)
        inside = low - slack <= least and greatest <= high + slack
        if inside and greatest - least > 0.93 * (high - low):
            return rule
    # Without background noise (a masked image) the range is not filled.
    if manufacturer.lower().startswith("siemens") and greatest - least > 1000:
        low, high, rule = RANGES[4] if least < 0 else RANGES[5]
        if low <= least and greatest <= high:
            return rule
    return None


def _check_scale(acquisition: Acquisition, scan: _Scan, notes: _Notebook) -> Rule:
    """Units first, then the vendors' ranges, then the extremes of all echoes."""
    name = acquisition.relative(acquisition.signal[0])
    if acquisition.is_complex:
        return Rule(1.0, 0.0, "angle of real and imaginary parts")
    least = min(low for low, _ in scan.extremes)
    greatest = max(high for _, high in scan.extremes)
    values = f"values {least:.6g} to {greatest:.6g}"
    if least == greatest:
        notes.error("phase-scale", f"{name}: all {values}: no phase; convert it again")
        return Rule(1.0, 0.0, "")
    units = str(acquisition.metadata.get("Units", "")).strip()
    others = {
        str(acquisition.sidecars.get(path, {}).get("Units", "")).strip()
        for path in acquisition.signal
    }
    if len(others) > 1:
        shown = ", ".join(sorted(repr(other) for other in others))
        notes.error(
            "phase-scale", f"{name}: Units differ between its echoes ({shown}): make them the same"
        )
    maker = str(acquisition.metadata.get("Manufacturer", ""))
    known = scale_of(least, greatest, manufacturer=maker)
    if units.lower() in ("rad", "radian", "radians"):
        rule = _radians(name, least, greatest, known, notes)
    else:
        if units != "arbitrary":
            said = f'Units "{units}" is not known' if units else "no Units in its sidecar"
            notes.warn(
                "phase-scale",
                f'{name}: {said}: taken as "arbitrary" ({values}); write "rad" or "arbitrary"',
            )
        if known is not None:
            rule = known
        else:
            slope = TURN / (greatest - least)
            text = f"{least:.6g} to {greatest:.6g}, taken as one turn"
            rule = Rule(slope, -math.pi - slope * least, text)
            notes.warn(
                "phase-scale",
                f"{name}: {values} fit no known scale of phase, and are taken to span one turn "
                '(-pi to pi) over all echoes: check; if they are radians, write "Units": "rad"',
            )
    _check_filled(acquisition, scan, rule, notes)
    return rule


def _radians(
    name: str, least: float, greatest: float, known: Rule | None, notes: _Notebook
) -> Rule:
    """Phase whose sidecar says that it is in rad."""
    values = f"values {least:.6g} to {greatest:.6g}"
    span = greatest - least
    if known is not None and known.slope != 1:
        notes.error(
            "phase-scale",
            f'{name}: Units "rad", but {values}: that is {known.text}; write "Units": "arbitrary"',
        )
    elif span < 0.5:
        notes.error(
            "phase-scale",
            f'{name}: Units "rad", but {values}: hardly any phase; if a slope was applied twice, '
            'mend the header, or write "Units": "arbitrary"',
        )
    elif span > 200 * math.pi:
        notes.error(
            "phase-scale",
            f'{name}: Units "rad", but {values} span {span / TURN:.0f} turns: no radians; write '
            '"Units": "arbitrary"',
        )
    elif span > TURN * 1.01:
        notes.warn(
            "phase-scale",
            f"{name}: {values} rad span {span / TURN:.2f} turns: the phase seems to be unwrapped "
            "already, and is wrapped again; give the phase as the scanner made it",
        )
    return Rule(1.0, 0.0, "radians, as its sidecar says")


def _check_filled(acquisition: Acquisition, scan: _Scan, rule: Rule, notes: _Notebook) -> None:
    """Phase that does not use its range is not what its scale says."""
    least = min(low for low, _ in scan.extremes)
    greatest = max(high for _, high in scan.extremes)
    turns = rule.slope * (greatest - least) / TURN
    name = acquisition.relative(acquisition.signal[0])
    if turns < 0.9 and not notes.refused:
        notes.warn(
            "phase-scale",
            f"{name}: values {least:.6g} to {greatest:.6g} fill {100 * turns:.0f} % of one turn "
            f"({rule.text}): check the scale; noise around the head fills it, unless the phase is "
            "masked or filtered",
        )
    for path, (low, high) in zip(acquisition.signal, scan.extremes, strict=True):
        if high - low < 0.05 * (greatest - least):
            notes.error(
                "phase-scale",
                f"{acquisition.relative(path)}: values {low:.6g} to {high:.6g}, where all echoes "
                f"run from {least:.6g} to {greatest:.6g}: it does not vary, or has another scale "
                "than the others; convert it again",
            )


def _check_phase(
    acquisition: Acquisition,
    scan: _Scan,
    rule: Rule,
    times: Sequence[float],
    strength: float,
    notes: _Notebook,
) -> bool:
    """Slices that alternate, wraps between neighbours, filtering, bipolar readout.

    Returns whether slices alternate.
    """
    name = acquisition.relative(acquisition.signal[0])
    maker = str(acquisition.metadata.get("Manufacturer", ""))
    lines = torch.from_numpy(scan.phase[0][2] * rule.slope + rule.intercept)
    alternating = alternates(lines, magnitude=torch.from_numpy(scan.head[2]).to(lines))
    if alternating:
        level = notes.note if maker.upper().startswith("GE") else notes.warn
        level(
            "alternation",
            f"{name}: the phase jumps by pi from each slice to the next, as in 3D data of GE: "
            "every second slice is mended; convert it again if that is not from GE",
        )
    phasors = [_phasors(views, rule, alternating) for views in scan.phase]
    _check_wraps(acquisition, phasors, scan.head, times, notes)
    if len(times) == len(phasors) and times[-1] * strength > LONG:
        _check_filtered(acquisition, phasors[-1], scan, rule, notes)
    if len(times) == len(phasors) >= 3:
        _check_bipolar(name, phasors, scan.head, times, notes)
    return alternating


def _phasors(views: Views, rule: Rule, alternating: bool) -> Views:
    """exp(i phase); slices along the last axis of the third view mended."""
    phasors = _triple(np.exp(1j * (view * rule.slope + rule.intercept)) for view in views)
    if alternating:
        phasors[2][..., 1::2] *= -1
    return phasors


def _steps(view: np.ndarray, head: np.ndarray, axis: int) -> np.ndarray:
    """Phasor of the difference of neighbours along ``axis``, both in the head."""
    ahead, behind = np.moveaxis(view, axis, 0)[1:], np.moveaxis(view, axis, 0)[:-1]
    inside = np.moveaxis(head, axis, 0)
    return (ahead * behind.conj())[inside[1:] & inside[:-1]]


def _check_wraps(
    acquisition: Acquisition,
    phasors: Sequence[Views],
    head: Views,
    times: Sequence[float],
    notes: _Notebook,
) -> None:
    """Look whether neighbours in space can be told apart from their wrapped phase.

    Where the true steps exceed pi, or where there is only noise, wrapped steps are long: half of
    them exceed pi/2 if they are random.
    """
    if len(phasors) > 1:
        spacings = np.diff(times) if len(times) == len(phasors) else np.ones(len(phasors) - 1)
        closest = int(np.argmin(spacings))
        pair = phasors[closest], phasors[closest + 1]
        evolution = _triple(b * a.conj() for a, b in zip(*pair, strict=True))
        path = acquisition.signal[closest + 1]
        what = "the phase that it gains on the echo before"
        if len(times) == len(phasors):
            what += f" (in {1000 * spacings[closest]:.3g} ms)"
        remedy = "shorten the echo spacing or the voxels"
    else:
        evolution, path = phasors[0], acquisition.signal[0]
        what, remedy = "its phase", "shorten the echo time or the voxels"
    name = acquisition.relative(path)
    shares = [
        float(np.mean(np.abs(np.angle(steps)) > math.pi / 2)) if steps.size > 100 else 0.0
        for axis, (view, mask) in enumerate(zip(evolution, head, strict=True))
        for steps in [_steps(view, mask, axis)]
    ]
    worst = max(shares)
    axis_name = "ijk"[shares.index(worst)]
    if worst > 0.4:
        notes.error(
            "wraps",
            f"{name}: {what} changes by more than a quarter turn between {100 * worst:.0f} % of "
            f"neighbours along {axis_name} in the head, as noise would, or steps above pi: it "
            f"cannot be unwrapped; {remedy}, or check that this is phase",
        )
    elif worst > 0.15:
        notes.warn(
            "wraps",
            f"{name}: {what} changes by more than a quarter turn between {100 * worst:.0f} % of "
            f"neighbours along {axis_name} in the head: unwrapping may fail there; {remedy}",
        )


def _check_filtered(
    acquisition: Acquisition, last: Views, scan: _Scan, rule: Rule, notes: _Notebook
) -> None:
    """Phase of a long echo that stays near 0 all over the head, or that never wraps."""
    name = acquisition.relative(acquisition.signal[-1])
    # Means over short lines leave noise and fine structure out: what is left is what a high-pass
    # filter takes away. Simulated heads at 3 T and 7 T have 0.1 to 0.5, filtered ones 0.6 to 0.9.
    run = min(6, last[2].shape[2])
    signal = (last[2] * scan.head[2])[..., : last[2].shape[2] // run * run]
    means = signal.reshape(*signal.shape[:2], -1, run).sum(-1)
    mean = complex(means.sum() / max(float(np.abs(means).sum()), 1e-30))
    if abs(mean) > 0.7 and abs(math.atan2(mean.imag, mean.real)) < 0.3:
        notes.warn(
            "filtered",
            f"{name}: the phase stays near 0 all over the head (its smooth part "
            f"agrees with 0 to {100 * abs(mean):.0f} %), where at this echo time it should have "
            "wrapped: high-pass filtered, as exported with SWI? Export unfiltered phase",
        )
    elif not acquisition.is_complex and "taken as one turn" in rule.text:
        steps = [
            np.abs(np.diff(view, axis=axis)).max() * rule.slope
            for axis, view in enumerate(scan.phase[-1])
        ]
        if max(steps) < math.pi:
            notes.warn(
                "filtered",
                f"{name}: the phase wraps nowhere: unwrapped already? Then its scale is unknown; "
                "give the phase as the scanner made it",
            )


def _check_bipolar(
    name: str, phasors: Sequence[Views], head: Views, times: Sequence[float], notes: _Notebook
) -> None:
    """Odd against even echoes: with one readout polarity the phase grows evenly."""
    spacing = np.diff(times)
    if np.ptp(spacing) > 0.02 * spacing.mean():
        return
    shifts = []
    for k in range(min(2, len(phasors) - 2)):
        curvature = _triple(
            a * b.conj() ** 2 * c for a, b, c in zip(*phasors[k : k + 3], strict=True)
        )
        ramps = []
        for axis, (view, mask) in enumerate(zip(curvature, head, strict=True)):
            extent = np.flatnonzero(mask.any(axis=tuple(i for i in range(3) if i != axis)))
            steps = _steps(view, mask, axis)
            gradient = float(np.angle(steps.sum())) if steps.size else 0.0
            ramps.append(gradient * (np.ptp(extent) if extent.size else 0))
        mean = curvature[2][head[2]].mean() if head[2].any() else 0j
        constant = float(np.angle(mean)) if abs(mean) > 0.5 else 0.0
        shifts.append([*ramps, constant])
    first = shifts[0]
    largest = int(np.argmax(np.abs(first) / np.array([1.0, 1.0, 1.0, 0.5])))
    size = first[largest]
    # What turns with the readout changes sign with each echo; other curvature does not.
    alternates_too = len(shifts) < 2 or size * shifts[1][largest] < -0.25 * size**2
    if abs(size) > (1.0 if largest < 3 else 0.5) and alternates_too:
        where = f"across the head along {'ijk'[largest]}" if largest < 3 else "in the head"
        notes.warn(
            "bipolar",
            f"{name}: odd and even echoes differ by {abs(size) / 2:.2g} rad {where}: a bipolar "
            "readout? --set offset.bipolar=true corrects it; or acquire with one readout "
            "polarity, or leave out every second echo with --bids-filter-file",
        )


# ---------------------------------------------------------------------------------------------


def _parts(acquisition: Acquisition) -> str:
    parts = ("magnitude", "phase", "real", "imag")
    return ", ".join(part for part in parts if getattr(acquisition, part))


def _refused_since(notes: _Notebook, start: int) -> bool:
    return any(finding.level == "error" for finding in notes[start:])


def _float(value: Any) -> float | None:
    valid = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if valid else None


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
