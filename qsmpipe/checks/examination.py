"""What the input check found of an acquisition."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qsmpipe.bids import Acquisition, together
from qsmpipe.records import Finding


@dataclass(frozen=True)
class Examination:
    """An acquisition, how to read it, and what is wrong with it.

    Phase is ``phase_sign * (phase_slope * value + phase_intercept)`` (rad), with one slope and
    one intercept for each echo, or one for all. Where there are errors, what could not be found
    out has its default.
    """

    acquisition: Acquisition
    findings: tuple[Finding, ...]
    phase_slope: tuple[float, ...] = (1.0,)
    phase_intercept: tuple[float, ...] = (0.0,)
    phase_sign: int = 1
    alternating: tuple[int, ...] = ()
    """Voxel axes along which every second plane is shifted by pi."""
    slice_axes: tuple[int, ...] = ()
    """Voxel axes along which each plane has a phase offset of its own, alike in all echoes."""
    field_strength: float = 0.0
    """B0 (T)."""
    b0_direction: tuple[float, ...] = ()
    """Unit vector along B0 in voxel axes."""
    b0_source: str = ""
    """What tells it: a transform of the header, or the option."""
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
        if not acquisition.sources:
            left_out = ", ".join(acquisition.relative(path) for path in acquisition.ignored)
            return {"Files left out": left_out}
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
            "B0 direction by": self.b0_source,
        }
        if self.b0_direction:
            tilt = math.degrees(math.acos(min(1.0, abs(self.b0_direction[2]))))
            rows["Slices tilted against B0 (degrees)"] = f"{tilt:.1f}"
        rows |= {
            "Phase scale": self.phase_scale,
            "Phase sign": f"{self.phase_sign:+d}",
            "Slices alternate in sign": _axes(self.alternating, "mended"),
            "Slices have offsets of their own": _axes(self.slice_axes, "removed"),
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
            b0_source="",
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


class Notebook(list[Finding]):
    """Findings so far."""

    def error(self, check: str, message: str) -> None:
        """Add what the acquisition is refused for."""
        self.append(Finding("error", check, message))

    def warn(self, check: str, message: str) -> None:
        """Add what is unusual."""
        self.append(Finding("warning", check, message))

    def note(self, check: str, message: str) -> None:
        """Add what was decided silently."""
        self.append(Finding("note", check, message))

    @property
    def refused(self) -> bool:
        """Whether there is an error."""
        return any(finding.level == "error" for finding in self)

    def refused_since(self, start: int) -> bool:
        """Whether there is an error among the findings after the first ``start``."""
        return any(finding.level == "error" for finding in self[start:])


def _parts(acquisition: Acquisition) -> str:
    parts = ("magnitude", "phase", "real", "imag")
    return ", ".join(part for part in parts if getattr(acquisition, part))


def _axes(axes: Sequence[int], remedy: str) -> str:
    return f"along {' and '.join('ijk'[axis] for axis in axes)}, {remedy}" if axes else "no"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
