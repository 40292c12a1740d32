"""Phase: its scale, and what its neighbours in space and echo time tell."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from qsmpipe.bids import Acquisition
from qsmpipe.checks.examination import Notebook
from qsmpipe.checks.voxels import Scan, Views, triple
from qsmpipe.numerics.phase import alternates
from qsmpipe.numerics.stored_phase import TURN, Rule, scale_of

LONG = 0.03
"""Echo time times field strength (T s) from which a head's phase must have wrapped."""


def check_scale(acquisition: Acquisition, scan: Scan, notes: Notebook) -> Rule:
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
    name: str, least: float, greatest: float, known: Rule | None, notes: Notebook
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


def _check_filled(acquisition: Acquisition, scan: Scan, rule: Rule, notes: Notebook) -> None:
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


def check_phase(
    acquisition: Acquisition,
    scan: Scan,
    rule: Rule,
    times: Sequence[float],
    strength: float,
    notes: Notebook,
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
    phasors = triple(np.exp(1j * (view * rule.slope + rule.intercept)) for view in views)
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
    notes: Notebook,
) -> None:
    """Look whether neighbours in space can be told apart from their wrapped phase.

    Where the true steps exceed pi, or where there is only noise, wrapped steps are long: half of
    them exceed pi/2 if they are random.
    """
    if len(phasors) > 1:
        spacings = np.diff(times) if len(times) == len(phasors) else np.ones(len(phasors) - 1)
        closest = int(np.argmin(spacings))
        pair = phasors[closest], phasors[closest + 1]
        evolution = triple(b * a.conj() for a, b in zip(*pair, strict=True))
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
    acquisition: Acquisition, last: Views, scan: Scan, rule: Rule, notes: Notebook
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
    name: str, phasors: Sequence[Views], head: Views, times: Sequence[float], notes: Notebook
) -> None:
    """Odd against even echoes: with one readout polarity the phase grows evenly."""
    spacing = np.diff(times)
    if np.ptp(spacing) > 0.02 * spacing.mean():
        return
    shifts = []
    for k in range(min(2, len(phasors) - 2)):
        curvature = triple(
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
