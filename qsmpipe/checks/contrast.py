"""Contrast: which image is the magnitude, and whether it decays as tissue does."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from qsmpipe.bids import Acquisition
from qsmpipe.checks.examination import Notebook
from qsmpipe.checks.voxels import Echo, Scan, Views, long_steps, padding, triple, zigzags

SMALL = 0.25
"""Magnitudes below 0 by less than this share of the bright ones are ripples of a filter."""

RISE = 1.15
"""Growth of the typical voxel's magnitude between echoes that no tissue shows."""

MOST_DECAY = 200.0
"""R2* of the typical voxel (1/s) that no head reaches."""

UNEVEN = 1.6
"""Factor by which an echo may lie off the decay that the others show."""


JUMPS = 0.005
"""Share of long steps between neighbours, and of zigzags, that no magnitude has."""


def check_contrast(acquisition: Acquisition, scan: Scan, notes: Notebook) -> None:
    """Magnitude and phase swapped, one of them given twice, signed magnitudes."""
    if acquisition.is_complex:
        _check_parts(acquisition, scan, notes)
        return
    swapped: list[int] = []
    signed: list[int] = []
    for i, echo in enumerate(scan.echoes):
        known = _known(echo)
        if same := _same_picture(echo, known):
            kind = "phase" if zigzags(echo.magnitude, known) > JUMPS else "magnitude"
            _tell_twice(acquisition, i, kind, same, notes)
            return
        if _jumps_more(echo, known) or (_is_signed(echo) and echo.extremes[0] >= 0):
            swapped.append(i)
        elif _is_signed(echo):
            signed.append(i)
    if not swapped and _phase_decays(scan):
        swapped = [*range(len(scan.echoes))]
    if swapped:
        _tell_swapped(acquisition, scan, swapped, notes)
    elif signed:
        _tell_signed(acquisition, scan, signed, notes)
    elif rippled := [i for i, echo in enumerate(scan.echoes) if echo.negative[0] < 0]:
        _tell_rippled(acquisition, scan, rippled, notes)


def _known(echo: Echo) -> Views:
    """Voxels that neither image fills with one value."""
    empty = padding(echo.magnitude), padding(echo.phase)
    return triple(
        (m != empty[0]) & (p != empty[1]) for m, p in zip(echo.magnitude, echo.phase, strict=True)
    )


def _jumps_more(echo: Echo, known: Views) -> bool:
    """Whether what is called magnitude has the jumps of phase, and what is called phase not."""
    kinds = [zigzags]
    if not math.isnan(padding(echo.magnitude)):
        # Without noise there are wraps to look for, and no edge of a head to be taken for one.
        kinds.append(long_steps)
    for count in kinds:
        magnitude, phase = count(echo.magnitude, known), count(echo.phase, known)
        if magnitude > JUMPS and magnitude > 5 * phase:
            return True
    return False


def _same_picture(echo: Echo, known: Views) -> str:
    """Say how magnitude and phase are alike; "" if they are not."""
    if np.array_equal(echo.phase[0], echo.magnitude[0]):
        return "hold the same numbers"
    magnitude, phase = echo.magnitude[2][known[2]], echo.phase[2][known[2]]
    if magnitude.size < 500 or magnitude.std() == 0 or phase.std() == 0:
        return ""
    alike = abs(float(np.corrcoef(magnitude, phase)[0, 1])) > 0.95
    return "show the same picture" if alike else ""


def _is_signed(echo: Echo) -> bool:
    """Whether the magnitude has more below 0 than ripples of a filter."""
    return -echo.negative[0] > SMALL * float(np.percentile(echo.magnitude[2], 99))


def _phase_decays(scan: Scan) -> bool:
    """Whether what is called phase falls from echo to echo, and what is called magnitude not.

    For masked images in which nothing wraps, so that no step is long.
    """
    if len(scan.echoes) < 2 or min(echo.extremes[0] for echo in scan.echoes) < 0:
        return False
    first, last = scan.echoes[0], scan.echoes[-1]
    bright = first.phase[2] > 0.2 * np.percentile(first.phase[2], 98)
    if not bright.any():
        return False

    def falling(views: list[np.ndarray]) -> float:
        return min(float((after < before)[bright].mean()) for before, after in pairwise(views))

    phases = [echo.phase[2] for echo in scan.echoes]
    alike = float(np.corrcoef(first.phase[2][bright], last.phase[2][bright])[0, 1])
    return (
        alike > 0.8
        and falling(phases) > 0.8
        and falling([echo.magnitude[2] for echo in scan.echoes]) < 0.7
    )


def _pair(acquisition: Acquisition, echo: int) -> str:
    magnitude = acquisition.relative(acquisition.magnitude[echo])
    return f"{magnitude} and {acquisition.relative(acquisition.signal[echo])}"


def _tell_swapped(
    acquisition: Acquisition, scan: Scan, swapped: Sequence[int], notes: Notebook
) -> None:
    first, count = swapped[0], len(scan.echoes)
    echoes = "in every echo" if len(swapped) == count else f"in {len(swapped)} of {count} echoes"
    least = scan.echoes[first].negative[0]
    down = f"; this magnitude has values down to {least:.3g}" if least < 0 else ""
    notes.error(
        "values",
        f"{_pair(acquisition, first)}: magnitude and phase are swapped {echoes}: what is named "
        "magnitude jumps between the ends of its range as wrapped phase and its noise do, and "
        f"what is named phase does not{down}; rename the files and their sidecars, or convert "
        "them again",
    )


def _tell_twice(
    acquisition: Acquisition, echo: int, kind: str, same: str, notes: Notebook
) -> None:
    notes.error(
        "values",
        f"{_pair(acquisition, echo)} {same}: the {kind} was exported twice; convert them again",
    )


def _tell_signed(
    acquisition: Acquisition, scan: Scan, echoes: Sequence[int], notes: Notebook
) -> None:
    least, bright = _darkest(scan, echoes)
    notes.error(
        "values",
        f"{_files(acquisition, echoes)}: a magnitude with values down to {least:.3g}, where the "
        f"bright ones have {bright:.3g}: an image with signs, as phase and real part are. Are "
        "magnitude and phase swapped? Rename the files, or convert them again",
    )


def _tell_rippled(
    acquisition: Acquisition, scan: Scan, echoes: Sequence[int], notes: Notebook
) -> None:
    least, bright = _darkest(scan, echoes)
    share = 100 * max(scan.echoes[i].negative[1] for i in echoes)
    notes.note(
        "values",
        f"{_files(acquisition, echoes)}: up to {share:.2g} % of the voxels are below 0, down to "
        f"{least:.3g}, where the bright ones have {bright:.3g}: interpolation or denoising left "
        "them; they are read as 0",
    )


def _darkest(scan: Scan, echoes: Sequence[int]) -> tuple[float, float]:
    """Least magnitude of some echoes, and the bright voxels' in the same echo."""
    darkest = min((scan.echoes[i] for i in echoes), key=lambda echo: echo.negative[0])
    return darkest.negative[0], float(np.percentile(darkest.magnitude[2], 99))


def _files(acquisition: Acquisition, echoes: Sequence[int]) -> str:
    first = acquisition.relative(acquisition.magnitude[echoes[0]])
    return first + (f" and {len(echoes) - 1} more" if len(echoes) > 1 else "")


def _check_parts(acquisition: Acquisition, scan: Scan, notes: Notebook) -> None:
    """Real and imaginary part in one scale, about 0."""
    if len(acquisition.real) != len(acquisition.imag):
        return
    for i, echo in enumerate(scan.echoes):
        if echo.parts is None:
            continue
        real, imag = acquisition.real[i], acquisition.imag[i]
        pair = f"{acquisition.relative(real)} and {acquisition.relative(imag)}"
        if min(echo.parts.least) >= 0:
            notes.error(
                "values",
                f"{pair}: no value is below 0 ({echo.parts.least[0]:.4g} and "
                f"{echo.parts.least[1]:.4g} are the least): real and imaginary part stored with "
                "an offset; subtract it (scl_inter of the header), or convert them again",
            )
        elif echo.parts.noise and min(echo.parts.noise) > 0:
            ratio = echo.parts.noise[0] / echo.parts.noise[1]
            if not 1 / 1.4 < ratio < 1.4:
                notes.error(
                    "values",
                    f"{pair}: the noise outside the head has a standard deviation of "
                    f"{echo.parts.noise[0]:.3g} in one and {echo.parts.noise[1]:.3g} in the "
                    "other: they are not in one scale, or one of them is another image; correct "
                    "scl_slope in the header, or convert them again",
                )


def check_decay(
    acquisition: Acquisition, scan: Scan, times: Sequence[float], notes: Notebook
) -> None:
    """Magnitudes that do not fall as any tissue's do: a factor of one echo, or another order."""
    if len(times) < 2 or len(times) != len(scan.echoes):
        return
    head = scan.head[2]
    inside = [np.maximum(echo.magnitude[2][head], 1e-30) for echo in scan.echoes]
    level = [float(np.median(values)) for values in inside]
    floor = [float(np.median(e.magnitude[2][~head])) if not head.all() else 0.0
             for e in scan.echoes]  # fmt: skip
    files = acquisition.real if acquisition.is_complex else acquisition.magnitude
    told = (
        "no tissue does that. Has an echo a slope of its own in its header, or are the echoes out "
        "of order? R2* and all weights would be wrong; convert the echoes again"
    )
    names = [acquisition.relative(path) for path in files]
    for later in range(1, len(times)):
        ratio, before = max((float(np.median(inside[later] / inside[i])), i) for i in range(later))
        if ratio > RISE:
            notes.warn(
                "decay",
                f"{names[later]}: the magnitude is {ratio:.3g} times that of {names[before]} in "
                f"the typical voxel, though {1000 * times[later]:.4g} ms come after "
                f"{1000 * times[before]:.4g} ms: {told}",
            )
            return
        ratio = float(np.median(inside[later] / inside[later - 1]))
        rate = -math.log(max(ratio, 1e-30)) / (times[later] - times[later - 1])
        if rate > MOST_DECAY and level[later] > 2 * floor[later]:
            notes.warn(
                "decay",
                f"{names[later]}: the magnitude is {ratio:.3g} times that of the echo before in "
                f"the typical voxel, {1000 * (times[later] - times[later - 1]):.4g} ms later, "
                f"which is an R2* of {rate:.0f}/s: {told}",
            )
            return
    lit = [i for i in range(len(times)) if level[i] > 5 * floor[i]]
    if len(lit) < 3:
        return
    for i in lit:
        others = [j for j in lit if j != i]
        slope, constant = np.polyfit([times[j] for j in others], [math.log(level[j])
                                     for j in others], 1)  # fmt: skip
        factor = level[i] / math.exp(slope * times[i] + constant)
        if not 1 / UNEVEN < factor < UNEVEN:
            notes.warn(
                "decay",
                f"{names[i]}: the magnitude is {factor:.3g} times what the decay of the other "
                f"echoes gives at {1000 * times[i]:.4g} ms in the typical voxel: {told}",
            )
            return
