"""The scale of stored phase: what makes radians of it, echo by echo."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qsmpipe.bids import Acquisition
from qsmpipe.checks.examination import Notebook
from qsmpipe.checks.voxels import Echo, Scan, long_steps, padding, triple
from qsmpipe.numerics.stored_phase import TURN, Rule, scale_of

WRAPS = 1e-3
"""Share of long steps between neighbours from which a range is known to be one turn: wrapped
phase and noise jump from its one end to the other."""

NOISE = 0.01
"""Share of long steps from which noise fills the range to its ends."""


@dataclass(frozen=True)
class _Values:
    """The numbers of one echo."""

    name: str
    least: float
    greatest: float
    jumps: float
    """Share of long steps."""
    radians: bool
    """Whether its sidecar says that they are radians."""

    @property
    def is_turn(self) -> bool:
        """Whether these numbers run over one whole turn."""
        return self.jumps > WRAPS

    def __str__(self) -> str:
        return f"{self.least:.6g} to {self.greatest:.6g}"

    def lies_like(self, other: "_Values") -> bool:
        """Whether two ranges, each one turn, are the same turn in the same numbers."""
        # Of an image that wraps in few voxels, none may hold the very ends.
        loose = min(self.jumps, other.jumps) < NOISE
        slack = (0.08 if loose else 0.02) * (other.greatest - other.least)
        ends = (self.least - other.least, self.greatest - other.greatest)
        return all(abs(end) <= slack for end in ends)

    def lies_in(self, other: "_Values") -> bool:
        """Whether the numbers are among the other's."""
        slack = 0.02 * (other.greatest - other.least)
        return other.least - slack <= self.least and self.greatest <= other.greatest + slack


def check_scale(acquisition: Acquisition, scan: Scan, notes: Notebook) -> tuple[Rule, ...]:
    """Find the rule of each echo: Units first, then the vendors' ranges, then the extremes."""
    if acquisition.is_complex:
        return (Rule(1.0, 0.0, "angle of real and imaginary parts"),) * len(scan.echoes)
    name = acquisition.relative(acquisition.signal[0])
    least, greatest = scan.extremes
    if least == greatest:
        notes.error(
            "phase-scale",
            f"{name}: all values {least:.6g} to {greatest:.6g}: no phase; convert it again",
        )
        return (Rule(1.0, 0.0, ""),)
    echoes = [
        _values(acquisition, i, echo, is_radian)
        for i, (echo, is_radian) in enumerate(
            zip(scan.echoes, _check_units(acquisition, scan, notes), strict=True)
        )
    ]
    maker = str(acquisition.metadata.get("Manufacturer", ""))
    before = len(notes)
    if not notes.refused:
        _check_filled(echoes, least, greatest, notes)
    if notes.refused_since(before):
        return (Rule(1.0, 0.0, ""),)
    if all(echo.radians for echo in echoes):
        rules = _radians(echoes, scan, maker, notes)
    elif any(echo.radians for echo in echoes) or not _one_scale(echoes):
        rules = _own_scales(echoes, notes)
    else:
        rules = [_arbitrary(echoes, scan, maker, notes)] * len(echoes)
    if not notes.refused:
        _check_turn(echoes, rules, notes)
    return tuple(rules)


def _values(acquisition: Acquisition, i: int, echo: Echo, radians: bool) -> _Values:
    empty = padding(echo.phase)
    known = triple(view != empty for view in echo.phase)
    jumps = long_steps(echo.phase, known)
    return _Values(acquisition.relative(acquisition.signal[i]), *echo.extremes, jumps, radians)


def _check_units(acquisition: Acquisition, scan: Scan, notes: Notebook) -> list[bool]:
    """Whether each echo's sidecar says that it is in rad."""
    name = acquisition.relative(acquisition.signal[0])
    units = [
        str(acquisition.sidecars.get(path, {}).get("Units", "")).strip()
        for path in acquisition.signal
    ]
    radians = [unit.lower() in ("rad", "radian", "radians") for unit in units]
    if len(set(units)) > 1:
        shown = ", ".join(sorted(map(repr, set(units))))
        notes.warn(
            "phase-scale",
            f"{name}: Units differ between its echoes ({shown}): each is read by its own; make "
            "them the same if that is not so",
        )
    for unit in dict.fromkeys(units):
        if unit.lower() in ("rad", "radian", "radians", "arbitrary"):
            continue
        values = "values {:.6g} to {:.6g}".format(*scan.extremes)
        said = f'Units "{unit}" is not known' if unit else "no Units in its sidecar"
        where = acquisition.relative(acquisition.signal[units.index(unit)])
        notes.warn(
            "phase-scale",
            f'{where}: {said}: taken as "arbitrary" ({values}); write "rad" or "arbitrary"',
        )
    return radians


def _check_filled(
    echoes: Sequence[_Values], least: float, greatest: float, notes: Notebook
) -> None:
    for echo in echoes:
        if echo.greatest - echo.least < 0.05 * (greatest - least) and not echo.is_turn:
            notes.error(
                "phase-scale",
                f"{echo.name}: values {echo}, where all echoes run from {least:.6g} to "
                f"{greatest:.6g}: it does not vary, or has another scale than the others; convert "
                "it again",
            )


def _one_scale(echoes: Sequence[_Values]) -> bool:
    """Whether the numbers of all echoes can be of one scale.

    Echoes that wrap each run over one turn and must have the same ends; one that does not wrap
    (masked, at a short echo time) may run over a part of it.
    """
    turns = [echo for echo in echoes if echo.is_turn]
    if not turns:
        return True
    widest = max(turns, key=lambda echo: echo.greatest - echo.least)
    return all(echo.lies_like(widest) if echo.is_turn else echo.lies_in(widest) for echo in echoes)


def _own_scales(echoes: Sequence[_Values], notes: Notebook) -> list[Rule]:
    """Read each echo by a scale of its own, where its own numbers tell it."""
    rules: list[Rule] = []
    for echo in echoes:
        known = scale_of(echo.least, echo.greatest)
        if echo.radians and (known is None or known.slope == 1):
            known = Rule(1.0, 0.0, "radians, as its sidecar says")
        if known is None or not (echo.is_turn or echo.radians):
            shown = "; ".join(f"{each.name} {each}" for each in echoes)
            notes.error(
                "phase-scale",
                f"{echo.name}: values {echo} are of another scale than other echoes', and do not "
                f"tell of which: {shown}. Convert all echoes in one way, or correct scl_slope and "
                "scl_inter in the header",
            )
            return [Rule(1.0, 0.0, "")] * len(echoes)
        rules.append(known)
    if len({rule[:2] for rule in rules}) > 1:
        shown = "; ".join(
            f"{echo.name} {echo} ({rule.text})" for echo, rule in zip(echoes, rules, strict=True)
        )
        notes.note("phase-scale", f"echoes are stored in scales of their own: {shown}")
    return rules


def _radians(echoes: Sequence[_Values], scan: Scan, maker: str, notes: Notebook) -> list[Rule]:
    """Phase whose sidecars say that it is in rad."""
    least, greatest = scan.extremes
    span = greatest - least
    wrong = [
        (echo, known)
        for echo in echoes
        for known in [scale_of(echo.least, echo.greatest, manufacturer=maker)]
        if known is not None and known.slope != 1 and echo.is_turn
    ]
    joint = scale_of(least, greatest, manufacturer=maker)
    if joint is not None and joint.slope != 1 and not any(echo.is_turn for echo in echoes):
        wrong.append((echoes[0], joint))
    name = echoes[0].name
    if wrong:
        echo, known = wrong[0]
        notes.error(
            "phase-scale",
            f'{echo.name}: Units "rad", but values {echo}: that is {known.text}; write "Units": '
            '"arbitrary"',
        )
    elif span < 0.5:
        notes.error(
            "phase-scale",
            f'{name}: Units "rad", but values {least:.6g} to {greatest:.6g}: hardly any phase; if '
            'a slope was applied twice, mend the header, or write "Units": "arbitrary"',
        )
    elif span > 200 * math.pi:
        notes.error(
            "phase-scale",
            f'{name}: Units "rad", but values {least:.6g} to {greatest:.6g} span '
            f'{span / TURN:.0f} turns: no radians; write "Units": "arbitrary"',
        )
    elif max(echo.greatest - echo.least for echo in echoes) > TURN * 1.01:
        notes.warn(
            "phase-scale",
            f"{name}: values {least:.6g} to {greatest:.6g} rad span {span / TURN:.2f} turns: the "
            "phase seems to be unwrapped already, and is wrapped again; give the phase as the "
            "scanner made it",
        )
    elif span > TURN * 1.01:
        shown = "; ".join(f"{echo.name} {echo}" for echo in echoes)
        notes.note("phase-scale", f"echoes run over different ranges of one turn (rad): {shown}")
    return [Rule(1.0, 0.0, "radians, as its sidecar says")] * len(echoes)


def _arbitrary(echoes: Sequence[_Values], scan: Scan, maker: str, notes: Notebook) -> Rule:
    """Find the one scale of all echoes from the range that they fill together."""
    least, greatest = scan.extremes
    name, values = echoes[0].name, f"values {least:.6g} to {greatest:.6g}"
    # Noise fills its turn: what it leaves free is no part of the scale.
    noisy = any(echo.jumps > NOISE for echo in echoes)
    known = scale_of(least, greatest, manufacturer="" if noisy else maker)
    wraps = any(echo.is_turn for echo in echoes)
    if known is not None and (wraps or known.text != DEGREES):
        return known
    if not wraps:
        also = f", and are {known.text} only if it wraps" if known is not None else ""
        notes.error(
            "phase-scale",
            f"{name}: {values} fit no known scale of phase{also}, and the phase wraps nowhere, so "
            "that they need not span one turn: it is unwrapped already, or masked before it "
            'wraps. If the values are radians, write "Units": "rad"; else give the phase as the '
            "scanner made it",
        )
        return Rule(1.0, 0.0, "")
    slope = TURN / (greatest - least)
    text = f"{least:.6g} to {greatest:.6g}, taken as one turn"
    notes.warn(
        "phase-scale",
        f"{name}: {values} fit no known scale of phase, and are taken to span one turn "
        '(-pi to pi) over all echoes: check; if they are radians, write "Units": "rad"',
    )
    return Rule(slope, -math.pi - slope * least, text)


DEGREES = "degrees, -180 to 180"


def _check_turn(echoes: Sequence[_Values], rules: Sequence[Rule], notes: Notebook) -> None:
    """Phase that does not use its range is not what its scale says."""
    ends = [
        (rule.slope * value, value, rule)
        for echo, rule in zip(echoes, rules, strict=True)
        for value in (echo.least, echo.greatest)
    ]
    (low, least, rule), (high, greatest, _) = min(ends), max(ends)
    turns = (high - low) / TURN
    if turns < 0.9:
        notes.warn(
            "phase-scale",
            f"{echoes[0].name}: values {least:.6g} to {greatest:.6g} fill {100 * turns:.0f} % of "
            f"one turn ({rule.text}): check the scale; noise around the head fills it, unless the "
            "phase is masked or filtered",
        )
