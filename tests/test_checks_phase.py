"""What the voxels of magnitude and phase tell: each kind of mix-up, and what is good, on a head.

Every case is one change to the committed example at 3 T (five echoes, Siemens).
"""

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from datasets import save, write
from scipy import ndimage

from qsmpipe import bids, images
from qsmpipe.checks import Examination, examine
from qsmpipe.numerics.phase import to_radians
from qsmpipe.numerics.unwrap import romeo

EXAMPLE = Path(__file__).parents[1] / "bids_examples" / "gre3t" / "sub-01" / "anat"
TIMES = (0.005, 0.01, 0.015, 0.02, 0.025)
PI = math.pi


class Echoes(NamedTuple):
    """Lists of five echoes."""

    radians: list[np.ndarray]
    magnitude: list[np.ndarray]


@cache
def example() -> Echoes:
    radians, magnitude = (
        [
            images.read(EXAMPLE / f"sub-01_echo-{echo}_part-{part}_MEGRE.nii.gz")[0]
            for echo in range(1, 6)
        ]
        for part in ("phase", "mag")
    )
    return Echoes([phase * np.float32(PI / 4096) for phase in radians], magnitude)


@cache
def head() -> np.ndarray:
    first = example().magnitude[0]
    bright = first > 0.2 * np.percentile(first, 98)
    return ndimage.binary_fill_holes(ndimage.binary_opening(bright))


def look(
    root: Path,
    phase: list[np.ndarray],
    magnitude: list[np.ndarray],
    units: str | list[str] = "arbitrary",
    **metadata: object,
) -> Examination:
    """Write echoes and examine them."""
    folder = root / "sub-01" / "anat"
    affine = images.affine_of(EXAMPLE / "sub-01_echo-1_part-mag_MEGRE.nii.gz")
    for i, time in enumerate(TIMES[: len(phase)]):
        for part, image in (("phase", phase[i]), ("mag", magnitude[i])):
            echo = f"_echo-{i + 1}" if len(phase) > 1 else ""
            suffix = "MEGRE" if echo else "T2starw"
            path = folder / f"sub-01{echo}_part-{part}_{suffix}.nii"
            stored = image.astype(np.float32) if image.dtype == np.float64 else image
            save(np.ascontiguousarray(stored), path, affine)
            content = {"EchoTime": time, "MagneticFieldStrength": 3, "Manufacturer": "Siemens"}
            if part == "phase":
                content["Units"] = units if isinstance(units, str) else units[i]
            path.with_name(path.name.replace(".nii", ".json")).write_text(
                json.dumps(content | metadata)
            )
    (acquisition,) = bids.find(root)
    return examine(acquisition)


def siemens(phase: np.ndarray) -> np.ndarray:
    return phase * np.float32(4096 / PI)


def unsigned(phase: np.ndarray) -> np.ndarray:
    return ((phase / PI + 1) * 2048).round() % 4096


STORED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "-4096 to 4094": siemens,
    "0 to 4095": unsigned,
    "mrad": lambda phase: 1000 * phase,
    "rad": lambda phase: phase,
    "0 to 2 pi": lambda phase: phase % (2 * PI),
    "degrees": np.degrees,
}


def told(found: Examination, level: str, check: str, *words: str) -> None:
    messages = [f.message for f in found.findings if (f.level, f.check) == (level, check)]
    assert any(all(word in message for word in words) for message in messages), found.findings


def wrong_by(found: Examination, masked: bool = False) -> float:
    """Greatest error (rad) of the phase that the rules make of the files, in the head."""
    stored = torch.stack([images.load(path) for path in found.acquisition.phase])
    slope, intercept = found.phase_slope, found.phase_intercept
    phase = to_radians(stored, slope=slope, intercept=intercept, alternating=found.alternating)
    turned = np.exp(1j * (phase.numpy() - np.stack(example().radians)))
    return float(np.abs(np.angle(turned[:, head()] if masked else turned)).max())


# --- scale, echo by echo -----------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("stored", STORED)
def test_one_scale_for_all_echoes_is_no_finding(stored: str, masked: bool, tmp_path: Path) -> None:
    phase = [STORED[stored](p) for p in example().radians]
    if masked:
        phase = [np.where(head(), p, 0) for p in phase]
    found = look(tmp_path, phase, example().magnitude)
    assert found.findings == ()
    assert len(found.phase_slope) == 1
    assert wrong_by(found, masked) < 1e-3


@pytest.mark.parametrize("echo", [0, 2, 4])
@pytest.mark.parametrize("stored", ["0 to 4095", "mrad", "rad", "degrees"])
def test_an_echo_of_a_known_scale_is_read_by_it(stored: str, echo: int, tmp_path: Path) -> None:
    phase = [siemens(p) for p in example().radians]
    phase[echo] = STORED[stored](example().radians[echo])
    found = look(tmp_path, phase, example().magnitude)
    assert [f.level for f in found.findings] == ["note"]
    told(found, "note", "phase-scale", "scales of their own", f"echo-{echo + 1}_part-phase")
    assert len(found.phase_slope) == len(found.phase_intercept) == 5
    assert wrong_by(found) < 1e-3


def test_units_that_differ_are_heeded_echo_by_echo(tmp_path: Path) -> None:
    phase = [siemens(p) for p in example().radians]
    phase[3] = example().radians[3]
    units = ["arbitrary"] * 3 + ["rad", "arbitrary"]
    found = look(tmp_path, phase, example().magnitude, units)
    told(found, "warning", "phase-scale", "Units differ", "by its own")
    assert not found.errors
    assert wrong_by(found) < 1e-3


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "change",
    [lambda p: 2 * p, lambda p: p / 2, lambda p: 0.85 * p, lambda p: p + 1500, lambda p: p + 4096],
    ids=["x 2", "x 0.5", "x 0.85", "+ 1500", "+ 4096"],
)
def test_an_echo_of_an_unknown_scale_is_refused_with_both_ranges(
    change: Callable, masked: bool, tmp_path: Path
) -> None:
    phase = [siemens(p) for p in example().radians]
    phase[1] = change(phase[1])
    if masked:
        phase = [np.where(head(), p, 0) for p in phase]
    found = look(tmp_path, phase, example().magnitude)
    told(found, "error", "phase-scale", "echo-2_part-phase", "of another scale", "-4096 to 4094")


def test_ranges_of_one_turn_are_one_scale(tmp_path: Path) -> None:
    phase = list(example().radians)
    phase[1] = phase[1] % (2 * PI)
    found = look(tmp_path, phase, example().magnitude, "rad")
    assert [f.level for f in found.findings] == ["note"]
    told(found, "note", "phase-scale", "different ranges of one turn", "0 to 6.28")
    assert found.phase_slope == (1.0,)


@pytest.mark.parametrize("bound", [500, 2048, 10000])
def test_an_unknown_scale_that_noise_fills_is_one_turn(bound: int, tmp_path: Path) -> None:
    phase = [p * (bound / PI) for p in example().radians]
    found = look(tmp_path, phase, example().magnitude)
    told(found, "warning", "phase-scale", "fit no known scale", "one turn")
    assert len(found.findings) == 1
    assert wrong_by(found) < 0.01


@pytest.mark.parametrize("echo", [0, 1, 4])
def test_an_echo_that_runs_backwards_is_refused(echo: int, tmp_path: Path) -> None:
    phase = [siemens(p) for p in example().radians]
    phase[echo] = -phase[echo]
    found = look(tmp_path, phase, example().magnitude)
    told(found, "error", "phase-sign", f"echo-{echo + 1}_part-phase", "sign is reversed")


@cache
def unwrapped(masked: bool) -> list[np.ndarray]:
    inside = torch.from_numpy(head()) if masked else torch.ones(head().shape, dtype=torch.bool)
    phase, magnitude = (torch.from_numpy(np.stack(images)) for images in example())
    given = {"magnitude": magnitude, "echo_times": TIMES}
    return list(romeo(phase, inside, (4.2, 4.2, 4.2), **given).numpy())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("factor", [1.0, 1000.0, 0.1], ids=["rad", "mrad", "x 0.1"])
def test_unwrapped_phase_without_units_is_refused(
    factor: float, masked: bool, tmp_path: Path
) -> None:
    phase = [factor * p for p in unwrapped(masked)]
    found = look(tmp_path, phase, example().magnitude)
    told(found, "error", "phase-scale", "wraps nowhere", '"Units": "rad"')


def test_unwrapped_radians_that_say_so_are_wrapped_again(tmp_path: Path) -> None:
    found = look(tmp_path, unwrapped(False), example().magnitude, "rad")
    assert [f.level for f in found.findings] == ["warning"]
    told(found, "warning", "phase-scale", "unwrapped already", "wrapped again")
    assert wrong_by(found) < 1e-3


# --- magnitude and phase mixed up --------------------------------------------------------------


SWAPPED = [(stored, (0, 1, 2, 3, 4)) for stored in STORED]
SWAPPED += [(stored, which) for stored in ("-4096 to 4094", "rad") for which in ((1,), (4,))]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("stored", "which"), SWAPPED)
def test_swapped_magnitude_and_phase_are_refused(
    stored: str, which: tuple[int, ...], masked: bool, tmp_path: Path
) -> None:
    phase, magnitude = [STORED[stored](p) for p in example().radians], list(example().magnitude)
    if masked:
        phase, magnitude = ([np.where(head(), v, 0) for v in part] for part in (phase, magnitude))
    for i in which:
        phase[i], magnitude[i] = magnitude[i], phase[i]
    found = look(tmp_path, phase, magnitude)
    told(
        found, "error", "values", f"echo-{which[0] + 1}_part-mag",
        "swapped in every echo" if len(which) == 5 else f"swapped in {len(which)} of 5 echoes",
    )  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
def test_a_single_echo_swapped_is_refused(masked: bool, tmp_path: Path) -> None:
    phase, magnitude = unsigned(example().radians[4]), example().magnitude[4]
    if masked:
        phase, magnitude = np.where(head(), phase, 0), np.where(head(), magnitude, 0)
    found = look(tmp_path, [magnitude], [phase])
    told(found, "error", "values", "swapped")


def test_an_image_given_twice_is_refused(tmp_path: Path) -> None:
    magnitude = list(example().magnitude)
    twice = look(tmp_path / "a", [2 * m + 3 for m in magnitude], magnitude)
    told(twice, "error", "values", "the same picture", "the magnitude was exported twice")
    phase = [siemens(p) for p in example().radians]
    twice = look(tmp_path / "b", phase, [unsigned(p) for p in example().radians])
    told(twice, "error", "values", "the same picture", "the phase was exported twice")
    other_echo = look(tmp_path / "c", magnitude[1:] + magnitude[:1], magnitude)
    told(other_echo, "error", "values", "the magnitude was exported twice")


def test_ripples_below_0_are_read_as_0_and_signed_images_refused(tmp_path: Path) -> None:
    phase = [siemens(p) for p in example().radians]
    ripple = 10 * np.random.default_rng(0).random(head().shape)
    dark = [m - np.where(m < 10, ripple, 0) for m in example().magnitude]
    found = look(tmp_path / "a", phase, dark)
    assert [f.level for f in found.findings] == ["note"]
    told(found, "note", "values", "echo-1_part-mag", "and 4 more", "below 0", "read as 0")
    real = [m * np.cos(p) for m, p in zip(example().magnitude, example().radians, strict=True)]
    told(look(tmp_path / "b", phase, real), "error", "values", "an image with signs")


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        ((1, 1, 2.5, 1, 1), ["echo-3_part-mag", "2.2", "echo-2_part-mag"]),
        ((1, 1, 0.4, 1, 1), ["echo-3_part-mag"]),
        ((2.5, 1, 1, 1, 1), ["echo-2_part-mag", "R2*"]),
        ((0.4, 1, 1, 1, 1), ["echo-2_part-mag", "2.2"]),
        ((1, 1, 1, 1, 0.5), ["echo-5_part-mag"]),
        ((1, 1.35, 1.82, 2.46, 3.32), ["echo-2_part-mag"]),
    ],
)
def test_magnitudes_that_no_tissue_has_are_told(
    factors: tuple[float, ...], words: list[str], tmp_path: Path
) -> None:
    magnitude = [f * m for f, m in zip(factors, example().magnitude, strict=True)]
    found = look(tmp_path, [siemens(p) for p in example().radians], magnitude)
    assert [f.level for f in found.findings] == ["warning"]
    told(found, "warning", "decay", *words, "no tissue does that")


def test_echoes_down_to_the_noise_are_no_other_decay(tmp_path: Path) -> None:
    """R2* of 120/s: the last echoes hold 5 % of the signal, and noise."""
    generator = np.random.default_rng(1)
    magnitude = [
        np.hypot(m * np.exp(-100 * t) + generator.normal(0, 8, m.shape),
                 generator.normal(0, 8, m.shape))
        for m, t in zip(example().magnitude, TIMES, strict=True)
    ]  # fmt: skip
    found = look(tmp_path, [siemens(p) for p in example().radians], magnitude)
    assert not [f for f in found.findings if f.check == "decay"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda real, imag: (real, 3 * imag), ["part-real", "part-imag", "not in one scale"]),
        (lambda real, imag: (real + 2048, imag + 2048), ["no value is below 0", "offset"]),
    ],
)
def test_real_and_imaginary_part_must_be_of_one_scale(
    change: Callable, words: list[str], tmp_path: Path
) -> None:
    root = write(tmp_path, parts=("real", "imag"))
    for path in root.rglob("*part-real*.nii.gz"):
        other = path.with_name(path.name.replace("part-real", "part-imag"))
        parts = change(images.read(path)[0], images.read(other)[0])
        for target, values in zip((path, other), parts, strict=True):
            save(values.astype(np.int16), target)
    (acquisition,) = bids.find(root)
    told(examine(acquisition), "error", "values", *words)


# --- planes with phase of their own ------------------------------------------------------------

AXES = {"i": 0, "j": 1, "k": 2}


def planes(values: np.ndarray, axis: int) -> np.ndarray:
    return values.reshape([-1 if each == axis else 1 for each in range(3)])


def shifted(shift: np.ndarray | list[np.ndarray]) -> list[np.ndarray]:
    """Radians (wrapped) of all echoes, shifted by one image or by one each."""
    each = shift if isinstance(shift, list) else [shift] * 5
    return [
        np.angle(np.exp(1j * (p + s))).astype(np.float32)
        for p, s in zip(example().radians, each, strict=True)
    ]


@pytest.mark.parametrize("axes", ["i", "j", "k", "ij", "jk", "ijk"])
def test_planes_that_alternate_are_mended_along_any_axes(axes: str, tmp_path: Path) -> None:
    shape = head().shape
    total = sum(planes(PI * (np.arange(shape[AXES[a]]) % 2), AXES[a]) for a in axes)
    found = look(tmp_path, shifted(total), example().magnitude, "rad")
    assert [(f.level, f.check) for f in found.findings] == [("warning", "alternation")]
    told(found, "warning", "alternation", " and along ".join(axes), "mended")
    assert found.alternating == tuple(AXES[a] for a in axes)
    assert wrong_by(found) < 1e-3


def test_an_echo_that_alternates_alone_is_refused(tmp_path: Path) -> None:
    size = head().shape[1]
    shifts = [planes(PI * (np.arange(size) % 2) * (echo == 1), 1) for echo in range(5)]
    found = look(tmp_path, shifted(shifts), example().magnitude, "rad")
    told(found, "error", "alternation", "echo-2_part-phase", "along j", "against the echo before")


def offsets(axis: int, amplitude: float, seed: int = 3) -> np.ndarray:
    values = np.random.default_rng(seed).uniform(-amplitude, amplitude, head().shape[axis])
    return planes(values, axis)


@pytest.mark.parametrize(
    ("amplitude", "kind"),
    [(PI, {}), (1.0, {}), (0.2, {}), (PI, {"MRAcquisitionType": "2D"})],
    ids=["pi", "1", "0.2", "pi, 2D"],
)
@pytest.mark.parametrize("axis", AXES)
def test_offsets_of_planes_are_found_along_any_axis(
    kind: dict, axis: str, amplitude: float, tmp_path: Path
) -> None:
    phase = shifted(offsets(AXES[axis], amplitude))
    found = look(tmp_path, phase, example().magnitude, "rad", **kind)
    assert not found.errors
    told(found, "warning", "slice-offsets", f"along {axis}", "taken out")
    assert found.slice_axes == (AXES[axis],)


@pytest.mark.parametrize("jump", [1.5, PI])
def test_a_single_jump_between_planes_is_an_offset(jump: float, tmp_path: Path) -> None:
    step = planes(jump * (np.arange(head().shape[1]) > 23), 1)
    found = look(tmp_path, shifted(step), example().magnitude, "rad")
    assert found.slice_axes == (1,)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("amplitude", [PI, 0.7])
def test_offsets_that_differ_by_echo_are_refused(
    amplitude: float, axis: str, tmp_path: Path
) -> None:
    phase = shifted([offsets(AXES[axis], amplitude, seed) for seed in range(5)])
    found = look(tmp_path, phase, example().magnitude, "rad")
    told(found, "error", "slice-offsets", "echo-2_part-phase", f"along {axis}", "from the field")


@pytest.mark.parametrize("axis", AXES)
def test_offsets_of_planes_of_a_single_echo_are_refused(axis: str, tmp_path: Path) -> None:
    phase = shifted(offsets(AXES[axis], PI))
    found = look(tmp_path, phase[2:3], example().magnitude[2:3], "rad")
    told(found, "error", "slice-offsets", f"along {axis}", "a single echo cannot tell")


def test_phase_that_is_random_in_all_echoes_alike_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(-PI, PI, head().shape)
    found = look(tmp_path, shifted(noise), example().magnitude, "rad")
    told(found, "error", "wraps", "phase offset", "cannot be followed from voxel to voxel")
