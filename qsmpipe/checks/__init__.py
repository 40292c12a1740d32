"""The input check: what an acquisition is, and whether it can be processed, before any node runs.

What cannot be processed is an error, what is unusual a warning, what was decided silently a note;
every message names the file, the value and the remedy.
"""

from collections.abc import Sequence
from typing import Any

from qsmpipe.bids import Acquisition, Refusal
from qsmpipe.checks.contrast import check_contrast, check_decay
from qsmpipe.checks.examination import Examination, Finding, Notebook, head_name, heads
from qsmpipe.checks.given import examine_mask, with_given
from qsmpipe.checks.headers import check_headers
from qsmpipe.checks.phase import check_phase
from qsmpipe.checks.scale import check_scale
from qsmpipe.checks.siblings import with_siblings
from qsmpipe.checks.sidecars import (
    check_agreement,
    check_echo_times,
    check_field_strength,
    check_kind,
    check_parts,
    check_sign,
)
from qsmpipe.checks.voxels import Scan, read_scan

__all__ = [
    "Examination", "Finding", "examine", "examine_mask", "head_name", "heads", "refused",
    "with_given", "with_siblings",
]  # fmt: skip


def examine(
    acquisition: Acquisition,
    *,
    field_strength: float | None = None,
    phase_sign: int | None = None,
    b0_direction: Sequence[float] = (),
    for_human_heads: bool = True,
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
    b0_direction : sequence of float, optional
        Unit vector along B0 in voxel axes, instead of what the headers say.
    for_human_heads : bool
        Whether the lengths of the methods are those of human heads, so that a smaller field of
        view deserves a warning.
    """
    notes = Notebook()
    check_parts(acquisition, notes)
    check_kind(acquisition, notes)
    check_agreement(acquisition, notes)
    echo_times = check_echo_times(acquisition, notes)
    strength = check_field_strength(acquisition, field_strength, notes)
    placed = check_headers(acquisition, notes, b0_direction, for_human_heads=for_human_heads)
    found: dict[str, Any] = {
        "phase_sign": check_sign(acquisition, phase_sign, notes),
        "field_strength": strength,
        "echo_times": echo_times,
    }
    if placed is not None:
        found |= placed._asdict()
    readable = not acquisition.problems and not any(f.check == "field-map" for f in notes)
    if placed is not None and readable:
        scan = read_scan(acquisition, placed.shape, notes)
        if scan is not None:
            found |= _read_phase(acquisition, scan, echo_times, strength, notes)
    return Examination(acquisition, tuple(notes), **found)


def refused(refusal: Refusal) -> Examination:
    """Report images that :func:`qsmpipe.bids.find` left out like an acquisition."""
    notes = Notebook()
    notes.error("names", refusal.message)
    return Examination(refusal.acquisition, tuple(notes))


def _read_phase(
    acquisition: Acquisition,
    scan: Scan,
    echo_times: tuple[float, ...],
    strength: float,
    notes: Notebook,
) -> dict[str, Any]:
    """Find how to make radians of the phase, where magnitude and phase are what they are named."""
    before = len(notes)
    check_contrast(acquisition, scan, notes)
    if notes.refused_since(before):
        return {}
    check_decay(acquisition, scan, echo_times, notes)
    rules = check_scale(acquisition, scan, notes)
    scales = list(dict.fromkeys((rule.slope, rule.intercept) for rule in rules))
    if len(scales) > 1:
        scales = [(rule.slope, rule.intercept) for rule in rules]
    found: dict[str, Any] = {
        "phase_slope": tuple(slope for slope, _ in scales),
        "phase_intercept": tuple(intercept for _, intercept in scales),
        "phase_scale": "; ".join(dict.fromkeys(rule.text for rule in rules)),
    }
    if not notes.refused:
        found |= check_phase(acquisition, scan, rules, echo_times, strength, notes)._asdict()
    return found
