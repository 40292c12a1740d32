"""A real head in vivo, oblique, two echoes: from BIDS files to a report, as a user has it done."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nb
import numpy as np
import pytest
from datasets import SHARED, state
from scipy import ndimage

from qsmpipe.cli import main

REFERENCE = SHARED / "philips-head" / "reference"
STEM = "2001_WIP_fcMRI_Field_Mapping_cl_e{echo}{part}"
FIELDS = ("EchoTime", "ImagingFrequency", "MagneticFieldStrength", "Manufacturer",
          "ManufacturersModelName", "MRAcquisitionType", "FlipAngle")  # fmt: skip
TILT = 3.5
"""Of the slices against B0 (degrees), as the scanner's own header has it."""


def arrange(root: Path) -> Path:
    """Give the head its BIDS names."""
    anat = root / "sub-philips" / "anat"
    anat.mkdir(parents=True)
    for echo in (1, 2):
        for part, ending in (("mag", ""), ("phase", "_ph")):
            source = REFERENCE / STEM.format(echo=echo, part=ending)
            target = anat / f"sub-philips_echo-{echo}_part-{part}_MEGRE"
            shutil.copyfile(f"{source}.nii.gz", f"{target}.nii.gz")
            given = json.loads(Path(f"{source}.json").read_text())
            sidecar = {key: given[key] for key in FIELDS}
            sidecar |= {"Units": "rad"} if part == "phase" else {}
            Path(f"{target}.json").write_text(json.dumps(sidecar))
    description = {"Name": "A head", "BIDSVersion": "1.11.1", "DatasetType": "raw"}
    (root / "dataset_description.json").write_text(json.dumps(description))
    (root / "README").write_text("One head in vivo, two gradient echoes, for tests only.\n" * 3)
    return root


@pytest.fixture(scope="module")
def derivatives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not REFERENCE.is_dir():
        pytest.skip("shared test data not found: philips-head")
    folder = tmp_path_factory.mktemp("philips")
    dataset = arrange(folder / "bids")
    before = state(dataset)
    out = folder / "out"
    plugin = folder / "linear.yml"
    plugin.write_text("plugin: Linear\n")  # one process for all nodes: fast
    words = [dataset, out, "participant", "-w", folder / "work", "--skip-bids-validation",
             "--use-plugin", plugin, "--omp-nthreads", "1"]  # fmt: skip
    assert main([*map(str, words)]) == 0
    assert state(dataset) == before, "the input was written to"
    return out


def image(out: Path, name: str) -> np.ndarray:
    return nb.load(out / "sub-philips" / f"{name}.nii.gz").get_fdata()


def test_the_b0_direction_is_oblique_in_every_map(derivatives: Path) -> None:
    affine = nb.load(f"{REFERENCE / STEM.format(echo=1, part='')}.nii.gz").affine
    turned = np.linalg.inv(affine[:3, :3]) @ [0, 0, 3]  # 3 mm voxels: a unit vector
    sidecars = [*derivatives.glob("sub-philips/*/*map.json")]
    assert len(sidecars) >= 5
    for path in sidecars:
        direction = json.loads(path.read_text())["B0Direction"]
        np.testing.assert_allclose(direction, turned, atol=1e-3)
        angle = np.degrees(np.arccos(abs(direction[2])))
        assert angle == pytest.approx(TILT, abs=0.1)


def test_the_brain_is_a_brain_and_its_susceptibility_small(derivatives: Path) -> None:
    voxel = 27 / 1000  # mL
    brain = image(derivatives, "anat/sub-philips_desc-brain_mask") > 0
    trusted = image(derivatives, "anat/sub-philips_desc-qsm_mask") > 0
    assert 1250 < brain.sum() * voxel < 1600
    assert 0.6 * brain.sum() < trusted.sum() <= brain.sum()
    chi = image(derivatives, "anat/sub-philips_Chimap")
    assert not chi[~trusted].any()
    assert 0.02 < chi[trusted].std() < 0.1
    inner = ndimage.binary_erosion(trusted, iterations=5)  # 15 mm in, no skull base
    assert inner.sum() > 5000
    assert 0.02 < chi[inner].std() < 0.08
    local = image(derivatives, "fmap/sub-philips_desc-local_fieldmap")
    total = image(derivatives, "fmap/sub-philips_desc-total_fieldmap")
    assert local[trusted].std() < 5  # Hz
    assert total[brain].std() < 100


def test_a_background_that_led_to_no_map_is_said_to_be_for_itself(derivatives: Path) -> None:
    """Total field inversion is the default: PDF gives the local field and nothing else."""
    stages = {
        name: [
            step["stage"]
            for step in json.loads((derivatives / "sub-philips" / f"{name}.json").read_text())[
                "ProcessingSteps"
            ]
        ]
        for name in ("anat/sub-philips_Chimap", "fmap/sub-philips_desc-local_fieldmap")
    }
    assert "inversion" in stages["anat/sub-philips_Chimap"]
    assert "background" not in stages["anat/sub-philips_Chimap"]
    assert "background" in stages["fmap/sub-philips_desc-local_fieldmap"]
    text = (derivatives / "logs" / "CITATION.md").read_text()
    assert "For the local field alone, background fields were removed" in text


def test_its_derivatives_are_valid_and_reported(derivatives: Path) -> None:
    assert (derivatives / "sub-philips.html").stat().st_size > 10_000
    assert [*derivatives.glob("sub-philips/figures/*")]
    validator = shutil.which("bids-validator-deno", path=Path(sys.executable).parent)
    if not validator:
        pytest.skip("bids-validator-deno is not installed (extra 'test')")
    found = subprocess.run(
        [validator, derivatives, "--format", "json"], capture_output=True, check=False
    )
    issues = json.loads(found.stdout)["issues"]["issues"]
    assert not [issue for issue in issues if issue["severity"] == "error"]
