"""The documentation's examples run as they stand."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from qsmpipe import examples

DOCS = Path(__file__).parents[1] / "docs"


def test_the_embedding_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples.write("gre3t", tmp_path / "bids")
    anat = next((tmp_path / "bids").glob("sub-*/anat"))
    names = {
        "work_dir": str(tmp_path / "work"),
        "magnitude_files": sorted(map(str, anat.glob("*part-mag*.nii.gz"))),
        "phase_files": sorted(map(str, anat.glob("*part-phase*.nii.gz"))),
        "echo_times": list(examples.load("gre3t").scan.echo_times),
        "field_strength": 2.895,
        "phase_slope": np.pi / 4096,
    }
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "embedding.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        script = tmp_path / f"block{number}.py"  # Nipype reads its functions from their file
        script.write_text(block)
        names |= runpy.run_path(str(script), init_globals=names)
    (measure,) = (node for node in names["graph"].nodes() if node.name == "measure")
    assert 0 < measure.result.outputs.spread < 1
    assert names["chi"].isfinite().all()
