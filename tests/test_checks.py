"""What cannot be processed is refused with file, value and remedy; what is good passes."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nb
import numpy as np
import pytest
from datasets import (
    AFFINE,
    SHAPE,
    SHARED,
    alter,
    edit,
    image,
    save,
    signal,
    state,
    write,
)

from qsmpipe import bids, images
from qsmpipe.checks import Examination, examine, examine_mask, with_siblings
from qsmpipe.numerics.phase import to_radians
from qsmpipe.numerics.stored_phase import scale_of

Break = Callable[[Path], object]


def look(root: Path, **choices: float) -> Examination:
    (acquisition,) = bids.find(root)
    return examine(acquisition, **choices)


# --- good input ------------------------------------------------------------------------------

TILT = math.radians(30)
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = np.array(
    [[1, 0, 0], [0, math.cos(TILT), -math.sin(TILT)], [0, math.sin(TILT), math.cos(TILT)]]
) @ np.diag([4.2, 4.2, 7.0])


def alternate(values: np.ndarray, echo: int) -> np.ndarray:
    return values * np.where(np.arange(values.shape[-1]) % 2, -1, 1)


GOOD = {
    "radians": {},
    "Siemens integers": {"stored": "siemens"},
    "Siemens integers, unscaled": {"stored": "unscaled"},
    "Philips milliradians": {"stored": "milliradians", "Manufacturer": "Philips"},
    "radians that do not say so": {"Units": "arbitrary"},
    "GE, real and imaginary": {"parts": ("real", "imag"), "Manufacturer": "GE"},
    "GE, slices alternate": {
        "parts": ("real", "imag"), "Manufacturer": "GE MEDICAL SYSTEMS", "change": alternate,
    },
    "one echo": {"suffix": "T2starw", "echo_times": (0.02,)},
    "two echoes": {"echo_times": (0.004, 0.01)},
    "uneven echoes": {"echo_times": (0.003, 0.009, 0.019, 0.02)},
    "padded echo index": {"echo_format": "echo-{:02d}"},
    "uncompressed": {"extension": ".nii"},
    "all entities": {"prefix": "sub-01_ses-a_acq-hi_ce-gd_rec-x_run-02"},
    "odd": {"shape": (23, 21, 17)},
    "oblique, anisotropic": {"affine": OBLIQUE},
    "left-handed": {"affine": np.diag([-6.0, 6.0, 6.0, 1.0])},
    "7 T": {"MagneticFieldStrength": 7, "ImagingFrequency": 297.2},
    "phase of a T1w": {"suffix": "T1w", "echo_times": (0.02,)},
}  # fmt: skip


@pytest.mark.parametrize("knobs", GOOD.values(), ids=GOOD)
def test_good_input_passes_and_is_not_written_to(knobs: dict, tmp_path: Path) -> None:
    root = write(tmp_path, **knobs)
    before = state(root)
    found = look(root)
    assert [f for f in found.findings if f.level != "note"] == []
    assert state(root) == before
    times = knobs.get("echo_times", (0.004, 0.009, 0.014))
    assert found.echo_times == times
    assert found.shape == knobs.get("shape", SHAPE)
    assert found.phase_sign == (-1 if knobs.get("Manufacturer", "").startswith("GE") else 1)
    assert found.alternating == ((2,) if "change" in knobs else ())
    assert found.slice_axes == ()


@pytest.mark.parametrize("stored", ["rad", "siemens", "unscaled", "milliradians"])
def test_the_scale_gives_radians(stored: str, tmp_path: Path) -> None:
    found = look(write(tmp_path, stored=stored))
    values = images.load(found.acquisition.phase[1])
    phase = to_radians(values, slope=found.phase_slope, intercept=found.phase_intercept)
    off = np.angle(np.exp(1j * phase.numpy()) / signal(0.009, seed=1))
    assert np.abs(off).max() < 0.003


def test_an_unknown_scale_is_one_turn_over_all_echoes(tmp_path: Path) -> None:
    def masked(values: np.ndarray, echo: int) -> np.ndarray:
        return np.where(np.abs(values) > 200, values, np.abs(values)) if echo == 0 else values

    found = look(write(tmp_path, stored="odd", change=masked))
    assert found.phase_slope == pytest.approx((1 / 77,), rel=1e-2)
    assert "taken to span one turn" in found.warnings[0].message


def test_slope_and_intercept_of_the_header_are_applied_once(tmp_path: Path) -> None:
    root = write(tmp_path, Units="arbitrary")
    for echo in (1, 2, 3):
        path = image(root, echo)
        old = nb.load(path)
        stored = nb.Nifti1Image(np.round(2048 + old.get_fdata() / np.pi * 2047), None, old.header)
        stored.set_data_dtype(np.int16)
        stored.header.set_slope_inter(2, -4096)
        stored.to_filename(path)
    found = look(root)
    assert not found.warnings
    assert found.phase_slope == pytest.approx((math.pi / 4096,))


def test_b0_of_an_oblique_anisotropic_grid(tmp_path: Path) -> None:
    found = look(write(tmp_path, affine=OBLIQUE))
    assert found.b0_direction == pytest.approx((0, 0.5, math.cos(TILT)), abs=1e-6)
    assert found.zooms == pytest.approx((4.2, 4.2, 7.0))
    assert found.summary()["Slices tilted against B0 (degrees)"] == "30.0"


@pytest.mark.parametrize(
    ("metadata", "given", "strength"),
    [
        ({"MagneticFieldStrength": 3}, None, 3.0),
        ({"MagneticFieldStrength": 3, "ImagingFrequency": 123.2535}, None, 2.8948),
        ({"MagneticFieldStrength": None, "ImagingFrequency": 297.2}, None, 6.9802),
        ({"MagneticFieldStrength": None}, 1.5, 1.5),
    ],
)
def test_field_strength(
    metadata: dict, given: float | None, strength: float, tmp_path: Path
) -> None:
    found = look(write(tmp_path, **metadata), field_strength=given)
    assert found.field_strength == pytest.approx(strength, abs=1e-4)
    assert not found.errors


def test_the_user_overrules_sign_and_field_strength(tmp_path: Path) -> None:
    found = look(write(tmp_path, Manufacturer="GE"), phase_sign=1, field_strength=1.5)
    assert (found.phase_sign, found.field_strength) == (1, 1.5)
    assert "MagneticFieldStrength says 3 T, --b0 1.5 T" in found.warnings[0].message


def test_a_scanners_own_combination_is_left_aside(tmp_path: Path) -> None:
    root = write(tmp_path)
    for echo in (1, 2, 3):
        plain = image(root, echo).with_name(f"sub-01_echo-{echo}_MEGRE.nii.gz")
        shutil.copy(image(root, echo, "mag"), plain)
    found = look(root)
    assert len(found.acquisition.magnitude) == 3
    assert not found.errors
    assert "left aside" in found.findings[0].message


def test_real_and_imaginary_beside_magnitude_and_phase(tmp_path: Path) -> None:
    found = look(write(tmp_path, parts=("mag", "phase", "real", "imag")))
    assert not found.errors
    assert not found.acquisition.is_complex
    assert len(found.acquisition.ignored) == 6


MEANT: dict[str, tuple[dict, Break | None, str]] = {
    "text": ({"MagneticFieldStrength": "3"}, None, "and 5 more: MagneticFieldStrength '3' is"),
    "text with its unit": (
        {"ImagingFrequency": "127.7 MHz"}, None, "ImagingFrequency '127.7 MHz' is read as 127.7",
    ),
    "a list of one": ({"MagneticFieldStrength": [3.0]}, None, "[3.0] is read as 3.0"),
    "echo times as text": (
        {}, lambda root: sidecars(
            root, lambda text: re.sub(r'"EchoTime": (\S+),', r'"EchoTime": "\1",', text)
        ),
        "and 5 more: EchoTime '0.004' is read as 0.004",
    ),
    "echo times as lists": (
        {}, lambda root: sidecars(
            root, lambda text: re.sub(r'"EchoTime": (\S+),', r'"EchoTime": [\1],', text)
        ),
        "and 5 more: EchoTime [0.004] is read as 0.004",
    ),
    "manufacturer in a list": ({"Manufacturer": ["Siemens"]}, None, "['Siemens'] is read as"),
    "Latin-1": (
        {"InstitutionName": "Universit\u00e4t"}, lambda root: sidecars(
            root, lambda text: text.replace("\\u00e4", "\u00e4").encode("latin-1")
        ),
        "and 5 more: not in UTF-8, and read as Latin-1",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("knobs", "harm", "remark"), MEANT.values(), ids=MEANT)
def test_what_is_meant_without_doubt_is_read_with_a_note(
    knobs: dict, harm: Break | None, remark: str, tmp_path: Path
) -> None:
    root = write(tmp_path, **knobs)
    if harm is not None:
        harm(root)
    found = look(root)
    assert not found.errors
    assert not found.warnings
    assert found.echo_times == (0.004, 0.009, 0.014)
    assert found.field_strength == pytest.approx(3, rel=1e-3)
    (told,) = (f.message for f in found.findings if f.check == "sidecar")
    assert told.startswith("sub-01/anat/sub-01_echo-1_part-mag_MEGRE.json")
    assert remark in told


@pytest.mark.parametrize("damage", ["{", "", "[1]"])
def test_nothing_follows_from_a_sidecar_that_cannot_be_read(damage: str, tmp_path: Path) -> None:
    root = write(tmp_path)
    sidecars(root, lambda text: damage)
    (finding,) = look(root).findings
    assert (finding.level, finding.check) == ("error", "sidecar")
    assert "and 5 more: " in finding.message


def test_a_small_drift_of_the_frequency_is_no_contradiction(tmp_path: Path) -> None:
    root = write(tmp_path, ImagingFrequency=127.731)
    edit(image(root, 3), ImagingFrequency=127.7312, Manufacturer="SIEMENS ")
    assert not look(root).warnings


@pytest.mark.parametrize("part", ["mag", "phase", "real", "imag"])
@pytest.mark.parametrize("times", [(0.02,), (0.004, 0.009)], ids=["one", "two"])
def test_half_of_an_acquisition_is_told_once(
    part: str, times: tuple[float, ...], tmp_path: Path
) -> None:
    found = look(write(tmp_path, parts=(part,), echo_times=times))
    assert [(f.level, f.check) for f in found.findings] == [("error", "parts")]


def test_a_small_animal_is_no_warning_to_who_knows_it(tmp_path: Path) -> None:
    root = write(tmp_path, affine=np.diag([0.4, 0.4, 0.5, 1.0]))
    assert not look(root, for_human_heads=False).warnings


@pytest.mark.parametrize("name", ["run-{}", "acq-echo{}", "rec-e{}", "acq-x_run-{}"])
def test_echoes_that_are_named_as_runs_are_told(name: str, tmp_path: Path) -> None:
    for n in (1, 2, 3):
        write(tmp_path, prefix=f"sub-01_{name.format(n)}", echo_times=(0.004 * n,))
    write(tmp_path, prefix="sub-02_run-1", echo_times=(0.004,))
    write(tmp_path, prefix="sub-02_run-2", echo_times=(0.004,))
    found = with_siblings([examine(acquisition) for acquisition in bids.find(tmp_path)])
    told = [[f.message for f in each.warnings if f.check == "echoes"] for each in found]
    assert [len(messages) for messages in told] == [1, 1, 1, 0, 0]
    label = name.split("_")[0].format(1)
    assert told[0][0].startswith(f"sub-01_{label}")
    assert "differ in echo time alone (4, 8, 12 ms)" in told[0][0]


def test_every_text_of_the_summary_can_be_written(tmp_path: Path) -> None:
    summary = look(write(tmp_path, ReceiveCoilName="Head", FlipAngle=15)).summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["TE1:ΔTE:TEmax (ms)"] == "4:5:14"


# --- broken input: what is done to it, level, check, words of the message ---------------------


def each_phase(root: Path, function: Callable[[np.ndarray], np.ndarray]) -> None:
    for echo in (1, 2, 3):
        alter(image(root, echo), function)


def remove(root: Path, pattern: str) -> None:
    for path in root.rglob(pattern):
        path.unlink()


def copy(root: Path, old: Path, name: str) -> None:
    shutil.copy(old, old.with_name(f"{name}.nii.gz"))
    sidecar = old.with_name(old.name.replace(".nii.gz", ".json"))
    shutil.copy(sidecar, old.with_name(f"{name}.json"))


def unwrapped(root: Path, scale: float = 1.0) -> None:
    x = np.linspace(-1, 1, SHAPE[0])[:, None, None]
    for echo in (1, 2, 3):
        alter(image(root, echo), lambda v, e=echo: (scale * 5 * e * x + 0 * v).astype("f4"))


def filtered(root: Path) -> None:
    for echo in (1, 2, 3):
        head = np.abs(signal(0.004)) > 200
        small = np.random.default_rng(echo).normal(0, 0.2, SHAPE)
        alter(image(root, echo), lambda v, s=small, h=head: np.where(h, s, v).astype("f4"))


def bipolar(values: np.ndarray, echo: int) -> np.ndarray:
    ramp = np.exp(1.5j * np.linspace(-1, 1, values.shape[0])[:, None, None] * (-1) ** echo)
    return values * ramp


def sheared(root: Path) -> None:
    affine = AFFINE.copy()
    affine[0, 1] = 0.4
    for path in root.rglob("*.nii.gz"):
        save(np.asanyarray(nb.load(path).dataobj), path, affine)


def unplaced(root: Path) -> None:
    for path in root.rglob("*.nii.gz"):
        old = nb.load(path)
        data = np.asanyarray(old.dataobj).copy()
        new = nb.Nifti1Image(data, None)
        new.to_filename(path)


def some(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        changed = values.astype(np.float32)
        changed[0, :5, 0] = value
        return changed

    return change


def sidecars(root: Path, change: Callable[[str], str | bytes], pattern: str = "*.json") -> None:
    """Rewrite the sidecars of all images."""
    for path in sorted(root.rglob(f"anat/{pattern}")):
        changed = change(path.read_text())
        path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())


def pointer(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text)


BROKEN: dict[str, tuple[dict, Break | None, str, str, list[str]]] = {
    "magnitude only": (
        {"parts": ("mag",)}, None, "error", "parts",
        ["sub-01_echo-1_part-mag_MEGRE.nii.gz", "no phase", "3 magnitude files", "export"],
    ),
    "phase only": (
        {"parts": ("phase",)}, None, "error", "parts", ["no magnitude", "add part-mag"],
    ),
    "real only": ({"parts": ("real",)}, None, "error", "parts", ["no part-imag", "add it"]),
    "imaginary only": ({"parts": ("imag",)}, None, "error", "parts", ["no part-real"]),
    "a phase echo is missing": (
        {}, lambda root: remove(root, "*echo-3_part-phase*"), "error", "echoes",
        ["magnitude has echoes 1, 2, 3, phase has 1, 2", "--bids-filter-file"],
    ),
    "one echo twice": (
        {}, lambda root: copy(root, image(root), "sub-01_echo-02_part-phase_MEGRE"),
        "error", "echoes", ["sub-01_echo-02_part-phase", "2 images of echo 2", "keep one"],
    ),
    "compressed and not": (
        {}, lambda root: nb.load(image(root)).to_filename(
            str(image(root)).removesuffix(".gz")
        ),
        "error", "echoes", ["2 images of echo 2", "keep one"],
    ),
    "single coils": (
        {}, lambda root: [
            copy(root, image(root, 1, part), f"sub-01_coil-{c}_echo-1_part-{part}_MEGRE")
            for c in (1, 2) for part in ("mag", "phase")
        ],
        "error", "echoes", ["single receive coils", "combine the coils first"],
    ),
    "single coils as echoes": (
        {"echo_times": (0.004, 0.009) * 4}, None, "error", "echo-times",
        ["8 echoes have 2 different echo times", "0.004 s stands in 4", "combine the coils"],
    ),
    "coils say they are not combined": (
        {"CoilCombinationMethod": "None"}, None, "error", "coils", ["combine the receive coils"],
    ),
    "coils in the fourth axis": (
        {}, lambda root: alter(image(root), lambda v: np.stack([v] * 8, -1)),
        "error", "image", ["echo-2_part-phase", "8 volumes", "combine them first"],
    ),
    "echoes in the fourth axis": (
        {"suffix": "T2starw", "echo_times": (0.004,), "EchoTime": [0.004, 0.009]},
        lambda root: [
            alter(path, lambda v: np.stack([v, v], -1)) for path in root.rglob("*.nii.gz")
        ],
        "error", "image", ["24 x 20 x 18 x 2", "all 2 echoes in one file", "split it"],
    ),
    "no echo time": (
        {}, lambda root: edit(image(root, 3), EchoTime=None), "error", "echo-times",
        ["echo-3_part-phase", "no EchoTime", "in seconds"],
    ),
    "no echo times at all": (
        {"EchoTime": None}, None, "error", "echo-times", ["and 2 more: no EchoTime"],
    ),
    "echo time in ms": (
        {}, lambda root: edit(image(root), EchoTime=9.0), "error", "echo-times",
        ["echo-2_part-phase", "EchoTime 9 is not in seconds", "write 0.009"],
    ),
    "echo time in us": (
        {}, lambda root: edit(image(root), EchoTime=9000), "error", "echo-times",
        ["EchoTime 9000", "in us", "write 0.009"],
    ),
    "echo time as text": (
        {"EchoTime": "4 ms"}, None, "error", "echo-times", ["'4 ms' is no number"],
    ),
    "echo time as list": (
        {"EchoTime": [0.004, 0.009]}, None, "error", "echo-times", ["a list of 2", "split"],
    ),
    "echo time not a number": (
        {}, lambda root: edit(image(root), EchoTime=math.nan), "error", "echo-times",
        ["EchoTime nan s is not above 0"],
    ),
    "field strength in words": (
        {"MagneticFieldStrength": "three"}, None, "error", "field-strength",
        ["MagneticFieldStrength 'three' is not one number: write it in T, or give --b0"],
    ),
    "field strengths in a list": (
        {"MagneticFieldStrength": [1.5, 3]}, None, "error", "field-strength",
        ["MagneticFieldStrength [1.5, 3] is not one number"],
    ),
    "a frequency in words beside a field strength": (
        {"ImagingFrequency": "high"}, None, "warning", "field-strength",
        ["ImagingFrequency 'high' is not one number: write it in MHz"],
    ),
    "two field strengths": (
        {}, lambda root: edit(image(root, 3, "mag"), MagneticFieldStrength=1.5), "warning",
        "agreement",
        ["echo-1_part-phase", "MagneticFieldStrength 3, but 1.5 in", "echo-3_part-mag",
         "3 is taken"],
    ),
    "two manufacturers": (
        {}, lambda root: [edit(image(root, e), Manufacturer="GE") for e in (2, 3)], "warning",
        "agreement", ["Manufacturer 'Siemens', but 'GE' in", "echo-2_part-phase", "and 1 more"],
    ),
    "two flip angles": (
        {"FlipAngle": 15}, lambda root: edit(image(root, 2), FlipAngle=20), "warning",
        "agreement", ["FlipAngle 15, but 20 in"],
    ),
    "two frequencies": (
        {"ImagingFrequency": 123.25}, lambda root: edit(image(root, 2), ImagingFrequency=127.7),
        "warning", "agreement", ["ImagingFrequency 123.25, but 127.7 in"],
    ),
    "2D and 3D": (
        {"MRAcquisitionType": "3D"}, lambda root: edit(image(root, 2), MRAcquisitionType="2D"),
        "warning", "agreement", ["MRAcquisitionType '3D', but '2D' in"],
    ),
    "echo time below 0": (
        {}, lambda root: edit(image(root), EchoTime=-1), "error", "echo-times",
        ["EchoTime -1 s is not above 0"],
    ),
    "echo time divided twice": (
        {"echo_times": (4e-6, 9e-6)}, None, "error", "echo-times", ["far too short", "twice"],
    ),
    "echo time of a spin echo": (
        {"echo_times": (0.01, 0.4), "change": lambda s, echo: signal(0.01 * (echo + 1))}, None,
        "warning", "echo-times", ["0.4 s is unusually long"],
    ),
    "echoes out of order": (
        {"echo_times": (0.009, 0.004)}, None, "error", "echo-times",
        ["EchoTime 0.004 s is shorter than the 0.009 s", "number the echoes"],
    ),
    "magnitude of another echo time": (
        {}, lambda root: edit(image(root, 2, "mag"), EchoTime=0.011), "error", "echo-times",
        ["EchoTime 0.009 s, but 0.011 s", "part-mag", "correct the wrong one"],
    ),
    "no field strength": (
        {"MagneticFieldStrength": None}, None, "error", "field-strength",
        ["neither ImagingFrequency (MHz) nor MagneticFieldStrength (T)", "--b0"],
    ),
    "field strength in gauss": (
        {"MagneticFieldStrength": 30000}, None, "error", "field-strength",
        ["30000 is no field strength in T", "write 3"],
    ),
    "frequency and field disagree": (
        {"ImagingFrequency": 63.87}, None, "warning", "field-strength",
        ["MagneticFieldStrength says 3 T, ImagingFrequency 1.5 T"],
    ),
    "frequency in Hz": (
        {"ImagingFrequency": 123253500}, None, "warning", "field-strength",
        ["cannot be that of protons"],
    ),
    "no manufacturer": (
        {"Manufacturer": None}, None, "warning", "phase-sign", ["no Manufacturer", "--phase-sign"],
    ),
    "a sidecar that is not JSON": (
        {}, lambda root: (image(root).with_name("sub-01_echo-2_part-phase_MEGRE.json")
                          .write_text('{"EchoTime": 0.009,')),
        "error", "sidecar", ["echo-2_part-phase_MEGRE.json: not readable as JSON", "mend"],
    ),
    "sidecars with comments": (
        {}, lambda root: sidecars(root, lambda text: text.replace("{", "{ // of our scanner\n")),
        "error", "sidecar",
        ["echo-1_part-mag_MEGRE.json and 5 more: not readable as JSON: it holds comments"],
    ),
    "sidecars with a comma too many": (
        {}, lambda root: sidecars(root, lambda text: text.replace("}", ",}")), "error", "sidecar",
        ["and 5 more: not readable as JSON: a comma before a closing bracket; take it out (line"],
    ),
    "sidecars in UTF-16": (
        {}, lambda root: sidecars(root, lambda text: text.encode("utf-16")), "error", "sidecar",
        ["and 5 more: not readable as JSON: it is in UTF-16; save it as UTF-8"],
    ),
    "an empty sidecar": (
        {}, lambda root: sidecars(root, lambda text: "", "*echo-2*.json"), "error", "sidecar",
        ["echo-2_part-mag_MEGRE.json and 1 more: not readable as JSON: the file is empty"],
    ),
    "a key with two values": (
        {}, lambda root: sidecars(
            root, lambda text: text.replace("{", '{"EchoTime": 0.1, ', 1), "*echo-2*.json"
        ),
        "error", "sidecar",
        ["and 1 more: not readable as JSON: EchoTime stands twice, as 0.1 and as 0.009; keep one"],
    ),
    "a sidecar not fetched": (
        {}, lambda root: (image(root).with_name("sub-01_echo-2_part-phase_MEGRE.json").unlink(),
                          image(root).with_name("sub-01_echo-2_part-phase_MEGRE.json")
                          .symlink_to("../../.git/annex/objects/x")),
        "error", "sidecar", ["echo-2_part-phase_MEGRE.json: its content is not here: datalad get"],
    ),
    "sidecars that are pointers": (
        {}, lambda root: sidecars(root, lambda text: "/annex/objects/MD5E-s9--0.json\n"), "error",
        "sidecar", ["and 5 more: its content is not here, but a pointer to it: datalad get"],
    ),
    "a sidecar that is a list": (
        {}, lambda root: (root / "MEGRE.json").write_text("[1, 2]"), "error", "sidecar",
        ["MEGRE.json: holds a JSON list"],
    ),
    "a field map in Hz": (
        {"Units": "Hz"}, None, "error", "field-map", ["finished field map", "fmap/"],
    ),
    "a field map by its type": (
        {"ImageType": ["ORIGINAL", "PRIMARY", "B0 MAP", "UNSPECIFIED"]}, None, "error",
        "field-map", ["ImageType 'B0 MAP'", "fmap/"],
    ),
    "a phase difference": (
        {"EchoTime1": 0.004, "EchoTime2": 0.009}, None, "error", "field-map",
        ["EchoTime1 0.004 and EchoTime2 0.009", "phase difference"],
    ),
    "another size": (
        {}, lambda root: alter(image(root), lambda v: v[:-1]), "error", "grid",
        ["echo-2_part-phase", "(23, 20, 18)", "(24, 20, 18)", "one grid"],
    ),
    "another place": (
        {}, lambda root: save(
            np.asanyarray(nb.load(image(root, 1, "mag")).dataobj).copy(),
            image(root, 1, "mag"), AFFINE + np.eye(4, k=3) * 2,
        ),
        "error", "grid", ["echo-1_part-mag", "affines that differ by up to 2"],
    ),
    "shear": ({}, sheared, "error", "geometry", ["not orthogonal (shear)", "grid"]),
    "no place": (
        {}, unplaced, "warning", "geometry", ["neither qform nor sform", "third axis"],
    ),
    "micrometres": (
        {"affine": np.diag([700.0, 700.0, 700.0, 1.0])}, None, "error", "geometry",
        ["voxels of 700 x 700 x 700 mm", "lengths in mm", "xyzt_units"],
    ),
    "two slices": (
        {"shape": (24, 20, 2)}, None, "error", "slices", ["24 x 20 x 2 voxels: fewer than 3"],
    ),
    "one slice without third axis": (
        {}, lambda root: [alter(p, lambda v: v[..., 0]) for p in root.rglob("*.nii.gz")],
        "error", "image", ["24 x 20 voxels: fewer than 3 slices"],
    ),
    "complex numbers": (
        {}, lambda root: alter(image(root), lambda v: v.astype(np.complex64)),
        "error", "image", ["complex numbers", "part-mag and part-phase"],
    ),
    "truncated": (
        {}, lambda root: image(root, 1, "mag").write_bytes(
            image(root, 1, "mag").read_bytes()[:9000]
        ),
        "error", "image", ["sub-01/anat/sub-01_echo-1_part-mag", "truncated", "copy it again"],
    ),
    "empty": (
        {}, lambda root: image(root).write_bytes(b""), "error", "image",
        ["sub-01/anat/sub-01_echo-2_part-phase", "not a readable NIfTI image"],
    ),
    "not fetched": (
        {}, lambda root: (image(root).unlink(), image(root).symlink_to("../.git/annex/x")),
        "error", "image", ["no such image (its content is not here: datalad get"],
    ),
    "a link to nowhere": (
        {}, lambda root: (image(root).unlink(), image(root).symlink_to("/mnt/x/y.nii.gz")),
        "error", "image", ["no such image (a link to /mnt/x/y.nii.gz, which is not here"],
    ),
    "a pointer": (
        {}, lambda root: pointer(image(root), "/annex/objects/MD5E-s9--0.nii.gz\n"),
        "error", "image", ["no image (its content is not here, but a pointer to it: datalad get"],
    ),
    "a pointer of Git LFS, uncompressed": (
        {"extension": ".nii"}, lambda root: pointer(
            Path(str(image(root)).removesuffix(".gz")),
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        ),
        "error", "image", ["a pointer to it: git lfs pull"],
    ),
    "without its checksum": (
        {}, lambda root: image(root).write_bytes(image(root).read_bytes()[:-6]), "error", "image",
        ["echo-2_part-phase", "truncated or damaged", "copy it again"],
    ),
    "with another checksum": (
        {}, lambda root: image(root).write_bytes(image(root).read_bytes()[:-8] + bytes(8)),
        "error", "image", ["truncated or damaged"],
    ),
    "with more behind it": (
        {}, lambda root: image(root).write_bytes(image(root).read_bytes() + b"more of it"),
        "error", "image", ["truncated or damaged"],
    ),
    "longer than its header says": (
        {"extension": ".nii"}, lambda root: (
            path := Path(str(image(root)).removesuffix(".gz"))
        ).write_bytes(path.read_bytes() + bytes(100)),
        "error", "image", ["it holds 35012 bytes, but its header speaks of 34912"],
    ),
    "shorter than its header says": (
        {"extension": ".nii"}, lambda root: (
            path := Path(str(image(root)).removesuffix(".gz"))
        ).write_bytes(path.read_bytes()[:-3]),
        "error", "image", ["it holds 34909 bytes, but its header speaks of 34912"],
    ),
    "some NaN": (
        {}, lambda root: alter(image(root), some(np.nan)), "warning", "values",
        ["echo-2_part-phase", "5 voxels are NaN and 0 infinite", "set to 0"],
    ),
    "some infinite": (
        {}, lambda root: alter(image(root, 1, "mag"), some(np.inf)), "warning", "values",
        ["echo-1_part-mag", "0 voxels are NaN and 5 infinite"],
    ),
    "all NaN": (
        {}, lambda root: alter(image(root), lambda v: v * np.float32(np.nan)), "error", "values",
        ["echo-2_part-phase", "all voxels are NaN"],
    ),
    "an echo of zeros": (
        {}, lambda root: alter(image(root, 3, "mag"), lambda v: 0 * v), "error", "values",
        ["echo-3_part-mag", "all voxels are 0", "leave the echo out"],
    ),
    "magnitude and phase swapped": (
        {}, lambda root: [
            path.replace(path.with_name(path.name.replace("part-mag", "part-tmp")))
            and image(root, e).replace(path)
            and path.with_name(path.name.replace("part-mag", "part-tmp")).replace(image(root, e))
            for e in (1, 2, 3) for path in [image(root, e, "mag")]
        ],
        "error", "values", ["echo-1_part-mag", "values down to -3.1", "swapped"],
    ),
    "magnitude exported twice": (
        {}, lambda root: shutil.copy(image(root, 1, "mag"), image(root, 1)), "error", "values",
        ["hold the same numbers", "exported twice"],
    ),
    "an echo copied": (
        {}, lambda root: shutil.copy(image(root, 1), image(root, 2)), "error", "values",
        ["echo-2_part-phase", "same numbers as the echo before"],
    ),
    "phase that does not vary": (
        {}, lambda root: each_phase(root, lambda v: v * 0 + np.float32(1.5)), "error", "values",
        ["same numbers as the echo before"],
    ),
    "one constant phase": (
        {"suffix": "T2starw", "echo_times": (0.02,)},
        lambda root: [
            alter(path, lambda v: v * 0 + np.float32(1.5)) for path in root.rglob("*phase*.nii.gz")
        ],
        "error", "phase-scale", ["all values 1.5 to 1.5", "no phase"],
    ),
    "an echo in another scale": (
        {"stored": "siemens"},
        lambda root: alter(image(root), lambda v: (v / 4096 * np.pi).astype("f4")),
        "note", "phase-scale",
        ["scales of their own", "(radians, -pi to pi)", "(-4096 to 4094 (Siemens))"],
    ),
    "Siemens integers called radians": (
        {"stored": "siemens", "Units": "rad"}, None, "error", "phase-scale",
        ['Units "rad", but values -4094 to 4094', 'write "Units": "arbitrary"'],
    ),
    "radians scaled twice": (
        {}, lambda root: each_phase(root, lambda v: v * np.float32(0.00117)), "error",
        "phase-scale", ["hardly any phase", "slope was applied twice"],
    ),
    "arbitrary called radians": (
        {}, lambda root: each_phase(root, lambda v: v * np.float32(1000.7)), "error",
        "phase-scale", ["milliradians", "arbitrary"],
    ),
    "field called radians": (
        {}, lambda root: unwrapped(root, 300), "error", "phase-scale", ["turns: no radians"],
    ),
    "Units differ": (
        {}, lambda root: edit(image(root), Units="arbitrary"), "warning", "phase-scale",
        ["Units differ", "'arbitrary', 'rad'", "by its own"],
    ),
    "no Units": ({"Units": None}, None, "warning", "phase-scale", ['no Units', '"arbitrary"']),
    "unknown Units": (
        {"Units": "a.u."}, None, "warning", "phase-scale", ['Units "a.u." is not known'],
    ),
    "unknown scale": (
        {"stored": "odd"}, None, "warning", "phase-scale", ["fit no known scale of phase"],
    ),
    "unwrapped, in radians": (
        {}, unwrapped, "warning", "phase-scale", ["span 4.77 turns", "unwrapped already"],
    ),
    "unwrapped, scaled": (
        {"Units": "arbitrary"}, lambda root: unwrapped(root, 10), "error", "phase-scale",
        ["values -150 to 150", "wraps nowhere", "unwrapped already", '"Units": "rad"'],
    ),
    "range not filled": (
        {}, lambda root: each_phase(root, lambda v: (v / 2).astype("f4")), "warning",
        "phase-scale", ["fill 50 % of one turn", "check the scale"],
    ),
    "high-pass filtered": (
        {}, filtered, "warning", "filtered", ["echo-3_part-phase", "stays near 0", "unfiltered"],
    ),
    "filtered by its name": (
        {"SeriesDescription": "Pha_Images"}, None, "warning", "filtered",
        ["'Pha_Images'", "high-pass filtered"],
    ),
    "noise": (
        {"change": lambda s, echo: 5 * np.abs(s) * np.exp(
            1j * np.random.default_rng(echo).uniform(-np.pi, np.pi, s.shape))},
        None, "error", "wraps", ["echo-2_part-phase", "cannot be unwrapped", "echo spacing"],
    ),
    "steps above pi": (
        {"hertz": 2200.0}, None, "error", "wraps", ["neighbours along", "in the head", "shorten"],
    ),
    "steps near pi": (
        {"hertz": 165.0, "suffix": "T2starw", "echo_times": (0.015,)}, None, "warning", "wraps",
        ["unwrapping may fail", "shorten the echo time"],
    ),
    "2D": (
        {"MRAcquisitionType": "2D"}, None, "warning", "acquisition", ["MRAcquisitionType 2D"],
    ),
    "gaps": (
        {"SliceThickness": 3, "SpacingBetweenSlices": 3.6}, None, "warning", "acquisition",
        ["slices of 3 mm every 3.6 mm"],
    ),
    "bipolar": (
        {"change": bipolar}, None, "warning", "bipolar",
        ["odd and even echoes differ", "along i", "one readout polarity"],
    ),
    "a small animal": (
        {"affine": np.diag([0.4, 0.4, 0.5, 1.0])}, None, "warning", "geometry",
        ["9.6 x 8 x 9 mm", "for which the lengths of all methods are meant",
         "--preset small-animal", "--mask given"],
    ),
    "slices alternate without GE": (
        {"change": alternate}, None, "warning", "alternation", ["jumps by pi", "mended"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("knobs", "harm", "level", "check", "words"), BROKEN.values(), ids=BROKEN)
def test_broken_input_is_told(
    knobs: dict, harm: Break | None, level: str, check: str, words: list[str], tmp_path: Path
) -> None:
    root = write(tmp_path, **knobs)
    if harm is not None:
        harm(root)
    before = state(root)
    found = look(root)
    assert state(root) == before
    told = [f.message for f in found.findings if (f.level, f.check) == (level, check)]
    assert any(all(word in message for word in words) for message in told), found.findings
    assert all(str(tmp_path) not in f.message for f in found.findings)
    if level == "warning":
        assert not found.errors, found.errors


@pytest.mark.parametrize("parts", [("mag",), ("phase",), ("real",), ("imag",)])
def test_an_image_is_not_compared_with_itself(parts: tuple[str, ...], tmp_path: Path) -> None:
    (error,) = look(write(tmp_path, parts=parts)).errors
    assert error.check == "parts"


def test_every_second_check_is_told_at_once(tmp_path: Path) -> None:
    root = write(tmp_path, MagneticFieldStrength=None, EchoTime=20)
    alter(image(root), some(np.nan))
    checks = {f.check for f in look(root).findings}
    assert {"field-strength", "echo-times", "values"} <= checks


@pytest.mark.parametrize(
    ("least", "greatest", "maker", "text"),
    [
        (-math.pi, math.pi, "", "radians, -pi"),
        (0.0, 6.2831, "", "radians, 0 to 2 pi"),
        (-4096.0, 4094.0, "", "-4096"),
        (0.0, 4095.0, "", "0 to 4095"),
        (-3142.0, 3140.0, "", "milliradians"),
        (-180.0, 180.0, "", "degrees"),
        (-2900.0, 2800.0, "Siemens", "-4096"),
        (10.0, 3100.0, "SIEMENS", "0 to 4095"),
    ],
)
def test_known_scales(least: float, greatest: float, maker: str, text: str) -> None:
    rule = scale_of(least, greatest, manufacturer=maker)
    assert rule is not None
    assert rule.text.startswith(text)


@pytest.mark.parametrize("extremes", [(-217.0, 217.0), (-0.0037, 0.0037), (-2900.0, 2800.0)])
def test_unknown_scales(extremes: tuple[float, float]) -> None:
    assert scale_of(*extremes) is None


MASKS = {
    "good": (lambda m: m, None),
    "another grid": (lambda m: m[:-1], "is not on the grid of"),
    "not binary": (lambda m: m * np.arange(SHAPE[0])[:, None, None], "make it binary"),
    "empty": (lambda m: 0 * m, "holds no voxel"),
}


@pytest.mark.parametrize(("change", "message"), MASKS.values(), ids=MASKS)
def test_a_given_mask_is_looked_at(change: Callable, message: str | None, tmp_path: Path) -> None:
    (acquisition,) = bids.find(write(tmp_path / "raw"))
    mask = change(np.abs(signal(0.004)) > 200).astype(np.uint8)
    path = save(mask, tmp_path / "mask.nii.gz")
    messages = [finding.message for finding in examine_mask(path, acquisition)]
    assert [message in m for m in messages] == [True] if message else not messages


# --- real data -------------------------------------------------------------------------------


def real(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"shared test data not found: {name}")
    return folder


def put(source: Path, target: Path, **metadata: object) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(f"{source}.nii.gz", f"{target}.nii.gz")
    content = json.loads(Path(f"{source}.json").read_text()) | metadata
    Path(f"{target}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("units", ["rad", None])
def test_the_philips_head_passes(units: str | None, tmp_path: Path) -> None:
    folder = real("philips-head") / "reference"
    for echo in (1, 2):
        source = folder / f"2001_WIP_fcMRI_Field_Mapping_cl_e{echo}"
        target = tmp_path / "sub-01" / "anat" / f"sub-01_echo-{echo}_part-"
        put(source, Path(f"{target}mag_MEGRE"))
        put(
            Path(f"{source}_ph"),
            Path(f"{target}phase_MEGRE"),
            **({"Units": units} if units else {}),
        )
    found = look(tmp_path)
    assert not found.errors
    assert [f.check for f in found.warnings] == ([] if units else ["phase-scale"])
    assert found.phase_slope == (1.0,)
    assert found.field_strength == pytest.approx(127.748512 / 42.577478518)
    assert found.echo_times == (0.0023, 0.0046)
    assert math.degrees(math.acos(found.b0_direction[2])) == pytest.approx(3.5, abs=0.1)


def test_the_siemens_phase_difference_is_refused(tmp_path: Path) -> None:
    folder = real("siemens-fieldmap") / "reference"
    target = tmp_path / "sub-01" / "anat"
    for echo in (1, 2):
        put(
            folder / f"Si_2_gre_field_magph_e{echo}", target / f"sub-01_echo-{echo}_part-mag_MEGRE"
        )
    put(folder / "Si_3_gre_field_magph_e2_ph", target / "sub-01_echo-2_part-phase_MEGRE")
    found = look(tmp_path)
    assert {f.check for f in found.errors} == {"echoes", "field-map"}
    assert "phase difference of two echoes; move it to fmap/" in found.errors[1].message
    assert "MRAcquisitionType 2D" in found.warnings[0].message


@pytest.mark.parametrize(("units", "level"), [("arbitrary", "warning"), ("rad", "error")])
def test_a_slope_applied_twice_is_told(units: str, level: str, tmp_path: Path) -> None:
    folder = real("romeo-small") / "clearswi"
    for name, part in (("Mag", "mag"), ("Phase", "phase")):
        old = nb.load(folder / f"{name}.nii")
        for echo in (1, 2, 3):
            path = save(old.get_fdata()[..., echo - 1], image(tmp_path, echo, part), old.affine)
            content = {"EchoTime": 0.004 * echo, "Units": units, "MagneticFieldStrength": 7,
                       "Manufacturer": "Siemens"}  # fmt: skip
            path.with_name(path.name.replace(".nii.gz", ".json")).write_text(json.dumps(content))
    found = look(tmp_path, for_human_heads=False)  # a crop of one
    (finding,) = found.findings
    assert (finding.level, finding.check) == (level, "phase-scale")
    assert "values -0.00367438 to 0.00367438" in finding.message
    if level == "warning":
        assert found.phase_slope == pytest.approx((math.pi / 0.00367438,), rel=1e-4)


@pytest.mark.parametrize("units", ["Hz", "arbitrary"])
def test_the_ge_field_map_is_refused(units: str, tmp_path: Path) -> None:
    folder = real("ge-fieldmap") / "reference"
    target = tmp_path / "sub-01" / "anat"
    put(folder / "GE_6_CV_Neuro_HH_Adv", target / "sub-01_part-mag_T2starw")
    put(
        folder / "GE_6_CV_Neuro_HH_Adv_fieldmaphz",
        target / "sub-01_part-phase_T2starw",
        Units=units,
    )
    found = look(tmp_path)
    assert found.errors[0].check == "field-map"
    assert "move it to fmap/" in found.errors[0].message


def test_bids_examples_are_refused_in_words() -> None:
    qsm = look(real("bids-examples") / "qmri_qsm")
    assert {f.check for f in qsm.errors} == {"image"}
    assert "sub-01_part-mag_T1w.nii: not a readable NIfTI image" in qsm.errors[0].message
    megre = look(real("bids-examples") / "qmri_megre")
    assert "no phase (8 magnitude files only)" in megre.errors[0].message
