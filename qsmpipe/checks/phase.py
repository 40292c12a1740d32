"""Phase: what its neighbours in space and echo time tell."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qsmpipe.bids import Acquisition
from qsmpipe.checks.examination import Notebook
from qsmpipe.checks.voxels import Scan, Views, triple
from qsmpipe.numerics.grids import along
from qsmpipe.numerics.phase import alternates
from qsmpipe.numerics.planes import PlaneSteps, plane_offsets, plane_steps
from qsmpipe.numerics.stored_phase import Rule

LONG = 0.03
"""Echo time times field strength (T s) from which a head's phase must have wrapped."""

OFFSET = 0.08, 0.4
"""Roughness and jump of the phase offset (rad) from which the offsets of planes are removed;
smooth offsets of heads and kidneys have up to 0.04 and 0.15."""

FIELD = 0.2, 1.2
"""Roughness and jump of phase that holds a field (rad) from which no field explains it; fields of
heads and kidneys give up to 0.1 and 0.3."""

WILD = 0.5
"""Roughness of a single echo's phase (rad) from which it is refused."""


UNCLEAR = 0.15
"""Share of neighbours a quarter turn apart from which phase is hard to follow."""


class Peculiar(NamedTuple):
    """Planes of the phase that have to be mended."""

    alternating: tuple[int, ...] = ()
    """Voxel axes along which every second plane is shifted by pi."""
    slice_axes: tuple[int, ...] = ()
    """Voxel axes along which each plane has an offset of its own, alike in all echoes."""


def check_phase(
    acquisition: Acquisition,
    scan: Scan,
    rules: Sequence[Rule],
    times: Sequence[float],
    strength: float,
    notes: Notebook,
) -> Peculiar:
    """Planes that alternate or have offsets, wraps between neighbours, filtering, bipolar readout.

    Returns which planes have to be mended.
    """
    name = acquisition.relative(acquisition.signal[0])
    radians = [
        triple(view * rule.slope + rule.intercept for view in echo.phase)
        for echo, rule in zip(scan.echoes, rules, strict=True)
    ]
    alternating = _check_alternation(acquisition, radians, scan, notes)
    for axis in alternating:
        size = radians[0][axis].shape[axis]
        _shift_planes(radians, math.pi * (torch.arange(size) % 2), axis, scan.stride)
    timed = len(times) == len(radians)
    slice_axes: tuple[int, ...] = ()
    if timed and len(times) > 1:
        _check_direction(acquisition, _phasors(radians), scan.head, times, notes)
    if timed and not notes.refused:
        slice_axes = _check_planes(acquisition, radians, scan, times, notes)
    if notes.refused:
        return Peculiar(alternating, slice_axes)
    phasors = _phasors(radians)
    _check_wraps(acquisition, phasors, scan.head, times, notes)
    if timed:
        if len(times) > 1 and not notes.refused:
            _check_offset(acquisition, phasors, scan.head, times, notes)
        if times[-1] * strength > LONG:
            _check_filtered(acquisition, phasors[-1], scan, notes)
        if len(phasors) >= 3:
            _check_bipolar(name, phasors, scan.head, times, notes)
    return Peculiar(alternating, slice_axes)


def _phasors(radians: Sequence[Views]) -> list[Views]:
    return [triple(np.exp(1j * view) for view in views) for views in radians]


def _tensors(phase: Sequence[Views], scan: Scan, axis: int) -> tuple[Tensor, Tensor]:
    """Lines along ``axis``: phase and magnitude of the echoes ``phase``, (E, X, Y, Z)."""
    lines = torch.from_numpy(np.stack([views[axis] for views in phase]))
    amplitude = np.stack([echo.magnitude[axis] for echo in scan.echoes[: len(phase)]])
    return lines, torch.from_numpy(amplitude * scan.head[axis]).to(lines)


def _check_alternation(
    acquisition: Acquisition, radians: Sequence[Views], scan: Scan, notes: Notebook
) -> tuple[int, ...]:
    name = acquisition.relative(acquisition.signal[0])
    found = []
    for axis in range(3):
        phase, magnitude = _tensors(radians[:1], scan, axis)
        if alternates(phase, magnitude=magnitude, axis=axis):
            found.append(axis)
    if not found:
        return ()
    is_ge = str(acquisition.metadata.get("Manufacturer", "")).upper().startswith("GE")
    expected = is_ge and found == [2]
    level = notes.note if expected else notes.warn
    where = " and along ".join("ijk"[axis] for axis in found)
    why = (
        "as in 3D data of GE"
        if found == [2]
        else "as in 3D data of GE that was reoriented, or where a half-turn was left out of a "
        "Fourier transform"
    )
    level(
        "alternation",
        f"{name}: the phase jumps by pi from each plane to the next along {where}, {why}: every "
        "second plane is mended"
        + ("" if expected else "; check it, and convert the images again if that is wrong"),
    )
    return tuple(found)


def _check_planes(
    acquisition: Acquisition,
    radians: Sequence[Views],
    scan: Scan,
    times: Sequence[float],
    notes: Notebook,
) -> tuple[int, ...]:
    """Offsets of single planes; they are taken out of ``radians`` where echoes tell them."""
    name = acquisition.relative(acquisition.signal[0])
    found = []
    long = _long_steps(_phasors(radians), scan.head)
    for axis in range(3):
        # Where the field is as steep within the planes, _check_wraps tells of it.
        clear = [
            max(share for other, share in enumerate(each) if other != axis) <= UNCLEAR
            for each in long
        ]
        if not clear[0]:
            continue
        phase, magnitude = _tensors(radians, scan, axis)
        gains = [i for i in range(len(phase) - 1) if clear[i]]
        if not _gains_are_smooth(acquisition, phase, magnitude, axis, gains, notes):
            continue
        steps = plane_steps(phase, magnitude, echo_times=times, axis=axis)
        several = len(times) > 1
        rough = steps.roughness if several else min(steps.roughness, steps.curvature)
        limits = OFFSET if several else FIELD
        if rough <= limits[0] and steps.jump <= limits[1]:
            continue
        what = (
            f"{name}: planes along {'ijk'[axis]} have phase offsets of their own ({_say(steps)})"
        )
        if several:
            found.append(axis)
            notes.warn(
                "slice-offsets",
                f"{what}, alike in all echoes, as slices of 2D acquisitions may: what the echoes "
                "tell of them is taken out; a 3D acquisition has none",
            )
            continue
        level = notes.error if rough > WILD or steps.jump > FIELD[1] else notes.warn
        level(
            "slice-offsets",
            f"{what}, as slices of 2D acquisitions may, or a field that changes much from slice "
            "to slice: a single echo cannot tell them apart; acquire 2 or more echoes, or in 3D",
        )
    for axis in found:
        phase, magnitude = _tensors(radians, scan, axis)
        offsets = plane_offsets(phase, magnitude, echo_times=times, axis=axis)
        _shift_planes(radians, -offsets, axis, scan.stride)
    return tuple(found)


def _long_steps(phasors: Sequence[Views], head: Views) -> list[list[float]]:
    """Share of neighbours a quarter turn apart along each axis, in what each echo gains.

    Of a single echo in its phase.
    """
    fields = [
        triple(after * before.conj() for before, after in zip(*pair, strict=True))
        for pair in pairwise(phasors)
    ] or list(phasors)
    return [[_share_of_long(steps) for steps in _all_steps(views, head)] for views in fields]


def _share_of_long(steps: np.ndarray) -> float:
    """Share of steps (rad) above a quarter turn; 0 where there are too few to tell."""
    return float(np.mean(np.abs(steps) > math.pi / 2)) if steps.size > 100 else 0.0


def _gains_are_smooth(
    acquisition: Acquisition,
    phase: Tensor,
    magnitude: Tensor,
    axis: int,
    gains: Sequence[int],
    notes: Notebook,
) -> bool:
    """Look whether what the phase gains on these echoes is smooth from plane to plane."""
    for i in gains:
        gain, weight = (phase[i + 1] - phase[i])[None], magnitude[i + 1][None]
        steps = plane_steps(gain, weight, echo_times=[1e-3], axis=axis)
        name = acquisition.relative(acquisition.signal[i + 1])
        if steps.step.abs().median() > 0.9 * math.pi:
            notes.error(
                "alternation",
                f"{name}: against the echo before, the phase jumps by pi from each plane to the "
                f"next along {'ijk'[axis]}: one of the two alternates in sign and the other does "
                "not; convert the echoes again, all in one way",
            )
            return False
        if min(steps.roughness, steps.curvature) > FIELD[0] or steps.jump > FIELD[1]:
            notes.error(
                "slice-offsets",
                f"{name}: planes along {'ijk'[axis]} "
                "have phase offsets of their own that the echo before has not "
                f"({_say(steps)} of what the phase gains): they cannot be told from the field; "
                "convert the echoes again, or acquire in 3D",
            )
            return False
    return True


def _say(steps: PlaneSteps) -> str:
    return (
        f"the step from plane to plane changes by {steps.roughness:.2g} rad in the typical pair, "
        f"and jumps by up to {steps.jump:.2g} rad"
    )


def _shift_planes(phase: Sequence[Views], shifts: Tensor, axis: int, stride: int) -> None:
    """Add to each plane along ``axis`` its shift (rad), in all echoes and views."""
    for views in phase:
        for other, lines in enumerate(views):
            own = shifts if other == axis else shifts[::stride]
            lines += along(own, axis).numpy()


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
        shares = _long_steps(phasors[closest : closest + 2], head)[0]
        path = acquisition.signal[closest + 1]
        what = "the phase that it gains on the echo before"
        if len(times) == len(phasors):
            what += f" (in {1000 * spacings[closest]:.3g} ms)"
        remedy = "shorten the echo spacing or the voxels"
    else:
        shares, path = _long_steps(phasors, head)[0], acquisition.signal[0]
        what, remedy = "its phase", "shorten the echo time or the voxels"
    name = acquisition.relative(path)
    worst = max(shares)
    axis_name = "ijk"[shares.index(worst)]
    if worst > 0.4:
        notes.error(
            "wraps",
            f"{name}: {what} changes by more than a quarter turn between {100 * worst:.0f} % of "
            f"neighbours along {axis_name} in the head, as noise would, or steps above pi: it "
            f"cannot be unwrapped; {remedy}, or check that this is phase",
        )
    elif worst > UNCLEAR:
        notes.warn(
            "wraps",
            f"{name}: {what} changes by more than a quarter turn between {100 * worst:.0f} % of "
            f"neighbours along {axis_name} in the head: unwrapping may fail there; {remedy}",
        )


def _check_offset(
    acquisition: Acquisition,
    phasors: Sequence[Views],
    head: Views,
    times: Sequence[float],
    notes: Notebook,
) -> None:
    """Look whether the offset that all echoes share can be followed from voxel to voxel."""
    ratio = times[0] / (times[1] - times[0])
    shares = [
        _share_of_long(_wrap(first - ratio * _wrap(second - first)))
        for first, second in zip(*(_all_steps(views, head) for views in phasors[:2]), strict=True)
    ]
    if max(shares) > 0.4:
        notes.error(
            "wraps",
            f"{acquisition.relative(acquisition.signal[0])}: the phase offset (its phase without "
            "what it gains until the next echo) changes by more than a quarter turn between "
            f"{100 * max(shares):.0f} % of neighbours along {'ijk'[shares.index(max(shares))]} in "
            "the head: it cannot be followed from voxel to voxel and is no phase of coils; "
            "convert the echoes again",
        )


def _check_direction(
    acquisition: Acquisition,
    phasors: Sequence[Views],
    head: Views,
    times: Sequence[float],
    notes: Notebook,
) -> None:
    """Look for an echo whose phase runs against the others'."""
    # A ramp is a delay or a readout's direction: it tells nothing.
    steps = [
        np.concatenate([each - each.mean() for each in _all_steps(views, head) if each.size > 100])
        for views in phasors
        if head[2].sum() > 500
    ]
    usable = (
        np.all([np.abs(each) < math.pi / 2 for each in steps], axis=0) if steps else np.empty(0)
    )
    if usable.sum() < 500:
        return
    backward = _backward([each[usable] for each in steps], times)
    if backward is not None:
        notes.error(
            "phase-sign",
            f"{acquisition.relative(acquisition.signal[backward])}: its phase falls where the "
            "other echoes' phase grows: its sign is reversed; negate it (scl_slope of the "
            "header), or convert the echoes again",
        )


def _all_steps(views: Views, head: Views) -> list[np.ndarray]:
    """Give the steps (rad) between neighbours in the head along each axis."""
    return [np.angle(_steps(view, mask, axis))
            for axis, (view, mask) in enumerate(zip(views, head, strict=True))]  # fmt: skip


def _wrap(phase: np.ndarray) -> np.ndarray:
    return np.angle(np.exp(1j * phase))


def _backward(steps: Sequence[np.ndarray], times: Sequence[float]) -> int | None:
    """Echo whose steps fit the others' only if their sign is turned; None if all fit."""
    if len(steps) == 2:
        fit = float(np.corrcoef(steps[0], steps[1])[0, 1])
        return 1 if fit < -0.5 else None

    def misfit(echo: int, sign: int) -> float:
        """Mean square, over the triples that hold an echo, from what the other two foretell."""
        signed = [sign * each if i == echo else each for i, each in enumerate(steps)]
        errors = []
        for i in range(max(1, echo - 1), min(len(times) - 1, echo + 2)):
            share = (times[i] - times[i - 1]) / (times[i + 1] - times[i - 1])
            between = (1 - share) * signed[i - 1] + share * signed[i + 1]
            errors.append(float(np.mean(np.square(signed[i] - between))))
        return sum(errors)

    gain, best = min((misfit(i, -1) / max(misfit(i, 1), 1e-30), i) for i in range(len(times)))
    return best if gain < 0.5 else None


def _check_filtered(acquisition: Acquisition, last: Views, scan: Scan, notes: Notebook) -> None:
    """Phase of a long echo that stays near 0 all over the head."""
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
