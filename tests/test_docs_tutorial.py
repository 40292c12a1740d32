"""Every block of the tutorial runs, on a smaller head and with a shorter training."""

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"

SHORTER = {
    "simulate demo": "simulate gre3t",
    "[0.005, 0.011, 0.017, 0.023]": "[0.005, 0.010, 0.015, 0.020, 0.025]",
    "--inversion tfi,rts": "--inversion rts,tkd --use-plugin linear.yml",
    "--inversion tfi,unet": "--inversion rts,unet --dry-run",
    "steps = 500": "steps = 2",
    "validate_every = 100": "validate_every = 2\nvalidation_samples = 2",
}


def shorter() -> str:
    """Text of the tutorial, with less to compute."""
    text = (DOCS / "tutorial.md").read_text()
    for long, short in SHORTER.items():
        assert long in text
        text = text.replace(long, short)
    return text


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("linear.yml").write_text("plugin: Linear\n")  # one process for all nodes: fast
    names = runpy.run_path(str(DOCS / "pictures.py"))["run"](shorter(), tmp_path)
    assert names["nrmse"](names["chi"], names["truth"], names["brain"]) < 95
    (described,) = (node for node in names["graph"].nodes() if node.name == "words")
    spread = float(described.result.outputs.words.split()[2])
    assert 0.005 < spread < 0.05  # ppm
    assert Path("out/sub-01.html").is_file()
    assert Path("out/sub-01/anat/sub-01_desc-tkd_Chimap.nii.gz").is_file()
    assert Path("my_training/weights.safetensors").is_file()


def test_pictures_are_small() -> None:
    for picture in (DOCS / "pictures").glob("*.png"):
        assert picture.stat().st_size < 150_000, picture.name
