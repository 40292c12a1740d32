"""Names and sidecars: parts, echoes, what kind of image it is, field strength, sign."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qsmpipe.bids import Acquisition, as_number, echo_of
from qsmpipe.checks.examination import Notebook
from qsmpipe.numerics.units import GAMMA


def check_parts(acquisition: Acquisition, notes: Notebook) -> None:
    """Magnitude and phase, or real and imaginary, of the same echoes, each once."""
    for problem in acquisition.problems:
        notes.error("sidecar", problem)
    for remark in acquisition.remarks:
        notes.note("sidecar", remark)
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


def _check_duplicates(acquisition: Acquisition, paths: Sequence[Path], notes: Notebook) -> None:
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


def check_kind(acquisition: Acquisition, notes: Notebook) -> None:
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
        words = [str(word) for word in listed(metadata.get("ImageType"))]
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
        for word in listed(metadata.get(key))
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
        as_number(metadata.get(key)) for key in ("SpacingBetweenSlices", "SliceThickness")
    )
    if gap and thickness and gap > 1.02 * thickness:
        notes.warn(
            "acquisition",
            f"{first}: slices of {thickness:g} mm every {gap:g} mm: the field in the gaps is "
            "unknown; acquire without gaps",
        )


def check_echo_times(acquisition: Acquisition, notes: Notebook) -> tuple[float, ...]:
    """Echo times in s, () where any is missing or wrong."""
    raw = [acquisition.sidecars.get(p, {}).get("EchoTime") for p in acquisition.signal]
    names = [acquisition.relative(path) for path in acquisition.signal]
    before = len(notes)
    absent = [name for name, value in zip(names, raw, strict=True) if value is None]
    if absent and not acquisition.problems:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        notes.error(
            "echo-times",
            f"{absent[0]}{more}: no EchoTime: write it into the .json beside the image, in "
            'seconds ("EchoTime": 0.02)',
        )
    for name, value in zip(names, raw, strict=True):
        number = as_number(value)
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
    return () if notes.refused_since(before) else valid


def _check_order(
    acquisition: Acquisition, times: Sequence[float], names: Sequence[str], notes: Notebook
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


def _check_same_times(acquisition: Acquisition, notes: Notebook) -> None:
    """Magnitude and phase of an echo must tell one echo time."""
    partner = acquisition.imag if acquisition.is_complex else acquisition.magnitude
    if len(partner) != len(acquisition.signal) or partner == acquisition.signal:
        return
    for path, other in zip(acquisition.signal, partner, strict=True):
        mine = as_number(acquisition.sidecars.get(path, {}).get("EchoTime"))
        its = as_number(acquisition.sidecars.get(other, {}).get("EchoTime"))
        if mine and its and abs(mine - its) > 0.01 * mine:
            notes.error(
                "echo-times",
                f"{acquisition.relative(path)}: EchoTime {mine:g} s, but {its:g} s in "
                f"{acquisition.relative(other)}: correct the wrong one",
            )


def check_field_strength(acquisition: Acquisition, given: float | None, notes: Notebook) -> float:
    """B0 (T): the user's, the imaging frequency's, the nominal one; 0 where there is none."""
    name, metadata = acquisition.relative(acquisition.signal[0]), acquisition.metadata
    frequency = as_number(metadata.get("ImagingFrequency"))
    nominal = as_number(metadata.get("MagneticFieldStrength"))
    sources = {"ImagingFrequency": (frequency, "MHz"), "MagneticFieldStrength": (nominal, "T")}
    wrong = [
        f"{key} {metadata[key]!r} is not one number: write it in {unit}"
        for key, (number, unit) in sources.items()
        if number is None and key in metadata
    ]
    if frequency is not None and not 0.5 < frequency < 1300:
        notes.warn(
            "field-strength",
            f"{name}: ImagingFrequency {frequency:g} MHz cannot be that of protons: not used",
        )
        frequency = None
    measured = frequency / GAMMA if frequency else None
    strength = given or measured or nominal
    for told in wrong:
        tell = notes.warn if strength else notes.error
        tell("field-strength", f"{name}: {told}, or give --b0")
    if not strength and (acquisition.problems or wrong):
        return 0.0
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


def check_sign(acquisition: Acquisition, given: int | None, notes: Notebook) -> int:
    """Find the sign of the phase: the user's, or what the manufacturer is known for."""
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
    if not maker and not acquisition.problems:
        notes.warn(
            "phase-sign",
            f"{name}: no Manufacturer in its sidecar, so that the sign of the phase is taken as "
            "it is; if veins come out diamagnetic (dark), give --phase-sign -1",
        )
    return 1


SAME_NUMBERS = {
    "MagneticFieldStrength": 0.01, "ImagingFrequency": 1e-3, "FlipAngle": 0.01,
    "RepetitionTime": 0.01, "RepetitionTimeExcitation": 0.01, "SliceThickness": 0.01,
    "SpacingBetweenSlices": 0.01,
}  # fmt: skip
"""Fields in which all files of an acquisition agree, and the share by which they may differ: a
scanner that adjusts its frequency anew moves it by far less than 1e-3."""

SAME_WORDS = (
    "Manufacturer", "ManufacturersModelName", "MRAcquisitionType", "SoftwareVersions",
    "ReceiveCoilName", "ScanningSequence", "PulseSequenceType", "PatientPosition",
)  # fmt: skip


def check_agreement(acquisition: Acquisition, notes: Notebook) -> None:
    """Look for sidecars of one acquisition that contradict each other."""
    tables = {path: acquisition.sidecars.get(path, {}) for path in acquisition.sources}
    keys: list[str] = [*SAME_NUMBERS, *SAME_WORDS]
    if acquisition.is_complex:
        keys.append("Units")
    used = acquisition.signal[0]
    for key in keys:
        said = {path: table[key] for path, table in tables.items() if key in table}
        if not said:
            continue
        first = used if used in said else next(iter(said))
        others = [path for path, value in said.items() if not _agree(key, said[first], value)]
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            notes.warn(
                "agreement",
                f"{acquisition.relative(first)}: {key} {said[first]!r}, but "
                f"{said[others[0]]!r} in {acquisition.relative(others[0])}{more}: the files of "
                f"one acquisition must agree; {said[first]!r} is taken; correct the wrong ones",
            )


def _agree(key: str, one: Any, other: Any) -> bool:
    numbers = as_number(one), as_number(other)
    if key in SAME_NUMBERS and None not in numbers:
        a, b = (number or 0.0 for number in numbers)
        return math.isclose(a, b, rel_tol=SAME_NUMBERS[key])
    return str(one).strip().lower() == str(other).strip().lower()


def listed(value: Any) -> list[Any]:
    """Give a value of JSON as list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
