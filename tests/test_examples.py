"""Example datasets: valid BIDS, byte for byte the same, and showing what they were made from."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nb
import numpy as np
import pytest

from qsmpipe import images
from qsmpipe.examples import RECIPES, Recipe, load, rotation, write

COMMITTED = Path(__file__).parents[1] / "bids_examples"
TINY = ("gre3t", "gre7t", "mixed")
GAMMA = 42.577478518

SMALL: dict[str, Any] = {
    "name": "Small",
    "text": "A small head.",
    "head": {"tilt": [10.0, 0.0, 0.0]},
    "grid": {"shape": [17, 20, 15], "zooms": [10, 11, 12], "angles": [0, 0, 20], "factor": 1},
    "scan": {"imaging_frequency": 123.2, "echo_times": [0.004, 0.009], "snr": 50},
    "metadata": {"MagneticFieldStrength": 3},
    "acquisitions": [{"subject": "a", "stored": "siemens"}],
}
"""Made at once; too coarse to be of use."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("examples")
    for name in TINY:
        write(name, root / name)
    return root


def files(root: Path) -> list[Path]:
    return sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())


def values(path: Path) -> np.ndarray:
    return np.asarray(nb.load(path).dataobj, dtype=np.float64)


def wrapped(phase: np.ndarray) -> np.ndarray:
    return np.angle(np.exp(1j * phase))


def test_the_recipes_are_those_that_are_promised() -> None:
    assert set(RECIPES) == {"demo", *TINY}
    for name in RECIPES:
        assert isinstance(load(name), Recipe)
    shape = load("gre7t").grid.shape
    assert all(n % 2 for n in shape)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("part", [".", "derivatives/truth"])
def test_the_validator_has_no_errors(name: str, part: str, made: Path) -> None:
    validator = shutil.which("bids-validator-deno", path=Path(sys.executable).parent)
    if not validator:
        pytest.skip("bids-validator-deno is not installed (extra 'test')")
    command = [validator, made / name / part, "--format", "json"]
    found = subprocess.run(command, capture_output=True, check=False)
    issues = json.loads(found.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []
    assert found.returncode == 0


@pytest.mark.parametrize("name", TINY)
def test_the_committed_datasets_are_what_is_written_now(name: str, made: Path) -> None:
    """Text byte for byte; images to a step in a few voxels, as processors round differently."""
    assert files(COMMITTED / name) == files(made / name)
    for path in files(made / name):
        kept, new = COMMITTED / name / path, made / name / path
        if ".nii" not in path.name:
            assert kept.read_bytes() == new.read_bytes(), path
            continue
        assert nb.load(kept).header == nb.load(new).header, path
        assert np.mean(values(kept) != values(new)) < 1e-3, path


def test_the_committed_datasets_are_small() -> None:
    sizes = [path.stat().st_size for name in TINY for path in (COMMITTED / name).rglob("*.*")]
    assert sum(sizes) < 4e6


def test_the_same_recipe_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(SMALL, tmp_path / name)
    assert files(tmp_path / "one")
    for path in files(tmp_path / "one"):
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()


def test_the_seed_changes_the_noise_alone(tmp_path: Path) -> None:
    write(SMALL, tmp_path / "one")
    write({**SMALL, "acquisitions": [{**SMALL["acquisitions"][0], "seed": 1}]}, tmp_path / "two")
    name = "sub-a/anat/sub-a_echo-1_part-mag_MEGRE.nii.gz"
    one, two = values(tmp_path / "one" / name), values(tmp_path / "two" / name)
    assert (one != two).mean() > 0.5
    truth = "derivatives/truth/sub-a/fmap/sub-a_magnitude.nii.gz"
    assert (tmp_path / "one" / truth).read_bytes() == (tmp_path / "two" / truth).read_bytes()
    clean = values(tmp_path / "one" / truth)
    mask = values(tmp_path / "one/derivatives/truth/sub-a/anat/sub-a_desc-brain_mask.nii.gz") > 0
    noise = (one - clean)[mask]
    assert noise.std() == pytest.approx(clean[mask].mean() / 50, rel=0.1)


def truth(root: Path, stem: str, name: str) -> np.ndarray:
    (path,) = (root / "derivatives" / "truth").rglob(f"{stem}_{name}.nii.gz")
    return values(path)


def test_siemens_phase_grows_as_the_field_says(made: Path) -> None:
    root = made / "gre3t"
    stem = root / "sub-01" / "anat" / "sub-01"
    image = nb.load(f"{stem}_echo-1_part-phase_MEGRE.nii.gz")
    assert image.get_data_dtype() == np.int16
    assert (image.dataobj.slope, image.dataobj.inter) == (2, -4096)
    stored = np.asarray(image.dataobj.get_unscaled())
    assert (stored.min(), stored.max()) == (0, 4095)
    phases = [values(Path(f"{stem}_echo-{i}_part-phase_MEGRE.nii.gz")) * np.pi / 4096
              for i in (1, 2, 3)]  # fmt: skip
    sidecar = json.loads(Path(f"{stem}_echo-2_part-phase_MEGRE.json").read_text())
    assert sidecar["EchoTime"] == 0.010
    assert sidecar["Units"] == "arbitrary"
    assert sidecar["ImagingFrequency"] == 123.25
    mask = truth(root, "sub-01", "desc-brain_mask") > 0
    hertz = truth(root, "sub-01", "desc-total_fieldmap")
    for first, second in ((0, 1), (1, 2)):
        error = wrapped(phases[second] - phases[first] - 2 * np.pi * hertz * 0.005)[mask]
        assert abs(np.median(error)) < 0.02
        assert np.median(abs(error)) < 0.05


def test_radians_at_seven_tesla(made: Path) -> None:
    root = made / "gre7t"
    folder = root / "sub-01" / "ses-1" / "anat"
    mask = truth(root, "sub-01_ses-1", "desc-brain_mask") > 0
    hertz = truth(root, "sub-01_ses-1", "desc-total_fieldmap")
    for run in (1, 2):
        paths = [folder / f"sub-01_ses-1_run-{run}_echo-0{i}_part-phase_MEGRE.nii.gz"
                 for i in (1, 2)]  # fmt: skip
        first, second = (values(path) for path in paths)
        assert nb.load(paths[0]).get_data_dtype() == np.float32
        assert 3.1 < abs(first).max() < math.pi + 1e-6
        error = wrapped(second - first - 2 * np.pi * hertz * 0.003)[mask]
        assert np.median(abs(error)) < 0.08
    b0 = images.b0_direction_of(paths[0])
    assert b0 == pytest.approx(tuple(rotation((18, -9, 0))[2]), abs=1e-5)
    assert math.degrees(math.acos(b0[2])) > 15
    chi = truth(root, "sub-01_ses-1", "Chimap")
    assert chi[mask].min() < -1
    assert chi[mask].max() > 0.15


def test_two_vendors_show_the_same_head(made: Path) -> None:
    root = made / "mixed"
    anat = root / "sub-01" / "anat"
    real, imaginary = (values(anat / f"sub-01_part-{p}_T2starw.nii") for p in ("real", "imag"))
    signal = real + 1j * imaginary
    signal[..., 1::2] *= -1
    phase = values(root / "sub-02/anat/sub-02_part-phase_T2starw.nii") * np.pi / 4096
    mask = truth(root, "sub-01", "desc-brain_mask") > 0
    error = wrapped(np.angle(signal.conj()) - phase)[mask]
    assert np.median(abs(error)) < 0.05
    magnitude = values(root / "sub-02/anat/sub-02_part-mag_T2starw.nii")
    assert np.median(magnitude[mask] / abs(signal[mask])) == pytest.approx(1, abs=0.02)


def test_what_is_common_is_inherited(made: Path) -> None:
    root = made / "mixed"
    common = json.loads((root / "T2starw.json").read_text())
    assert common["EchoTime"] == 0.015
    assert "Manufacturer" not in common
    vendors = [
        json.loads((root / f"sub-0{i}" / f"sub-0{i}_T2starw.json").read_text())["Manufacturer"]
        for i in (1, 2)
    ]
    assert vendors == ["GE", "Siemens"]
    assert {path.suffix for path in root.glob("sub-*/anat/*T2starw.*")} == {".nii", ".json"}
    assert not (root / "sub-02/anat/sub-02_part-mag_T2starw.json").exists()


@pytest.mark.parametrize("name", TINY)
def test_the_truth_adds_up(name: str, made: Path) -> None:
    root = made / name
    stem = "sub-01_ses-1" if name == "gre7t" else "sub-01"
    mask = truth(root, stem, "desc-brain_mask") > 0
    total, local = (truth(root, stem, f"desc-{k}_fieldmap") for k in ("total", "local"))
    assert not total[~mask].any()
    assert not local[~mask].any()
    assert total[mask].std() > 2 * local[mask].std()
    chi = truth(root, stem, "Chimap")
    assert 1.0e6 < mask.sum() * math.prod(load(name).grid.zooms) < 1.7e6
    assert chi.max() == pytest.approx(9.4, abs=1e-3)
    labels = truth(root, stem, "dseg")
    assert np.median(chi[labels == 22]) == pytest.approx(0.14, abs=0.05)
    assert labels[mask].min() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "the recipe: there is no 'colour'; it may hold name"),
        ({"grid": {"shape": [4, 4, 4]}}, "the recipe: grid.zooms is missing"),
        ({"grid": {"shape": [4, 4, 0], "zooms": [1, 1, 1]}}, "entry 3 of grid.shape is 0: give a"),
        ({"grid": {"shape": [4, 4], "zooms": [1, 1, 1]}}, "entry 3 of grid.shape is missing"),
        ({"grid": 4}, "grid is 4: give a table"),
        ({"scan": {"imaging_frequency": 123.2, "tr": 1}}, "there is no 'tr' in scan"),
        ({"scan": {"imaging_frequency": "123"}}, 'scan.imaging_frequency is "123": give a number'),
        ({"scan": {"imaging_frequency": 123.2, "echo_times": []}}, r"echo_times is \[\]: give"),
        ({"acquisitions": []}, "acquisitions is \\[\\]: give a list, each a table, not empty"),
        ({"acquisitions": {"subject": "a"}}, "give a list, each a table"),
        ({"acquisitions": [{"stored": "complex"}]}, "subject in entry 1 of acqui.* missing"),
        ({"acquisitions": [{"subject": "a", "stored": "x"}]},
         "stored in entry 1 of acquisitions is .x.: give 'siemens', 'radians', or 'complex'"),
        ({"acquisitions": [{"subject": "../a", "stored": "complex"}]},
         r"^the recipe: entry 1 of acquisitions: subject is '../a': a label [\w ]+ alone$"),
        (
            {"acquisitions": [{"subject": "a", "stored": "complex", "suffix": "T2starw"}]},
            "holds one echo",
        ),
    ],
)  # fmt: skip
def test_a_recipe_that_makes_no_sense_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load({**SMALL, **change})


def test_an_unknown_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose from demo, gre3t, gre7t, mixed"):
        write("gre5t", tmp_path / "out")
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(ValueError, match=r"bad\.toml: not a readable TOML file"):
        write(tmp_path / "bad.toml", tmp_path / "out")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        write(SMALL, tmp_path)
    assert files(tmp_path) == [Path("notes.txt")]


def test_angles_turn_in_the_named_order() -> None:
    assert rotation((90, 0, 0)) @ (0, 1, 0) == pytest.approx((0, 0, 1))
    assert rotation((0, 90, 0)) @ (0, 0, 1) == pytest.approx((1, 0, 0))
    assert rotation((0, 0, 90)) @ (1, 0, 0) == pytest.approx((0, 1, 0))
    assert rotation((90, 0, 90)) @ (0, 1, 0) == pytest.approx((0, 0, 1))
