"""Nipype's cache: a node is computed anew when the code that it runs is another."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

import qsmpipe

SCRIPT = """
from pathlib import Path
from qsmpipe.workflows.inversion import init_inversion_wf

workflow = init_inversion_wf(method="tkd")
workflow.base_dir = str(Path("work").absolute())
for name in ("field", "mask"):
    setattr(workflow.inputs.inputnode, name, str(Path(f"{name}.nii.gz").absolute()))
workflow.run()
"""
"""As in a pipeline of others, which knows nothing of qsmpipe's version."""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package that may be changed."""
    return Path(shutil.copytree(
        Path(qsmpipe.__file__).parent,
        tmp_path / "site" / "qsmpipe",
        ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"),
    ))  # fmt: skip


def run(package: Path, folder: Path) -> Path:
    """Map a field by the copy of the package; the map."""
    where = {"PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", SCRIPT]
    subprocess.run(command, cwd=folder, env=os.environ | where, check=True, capture_output=True)
    (chi,) = folder.glob("work/inversion_wf/tkd/chi.nii")
    return chi


def change(source: Path, old: str, new: str) -> None:
    text = source.read_text()
    assert text.count(old) == 1
    source.write_text(text.replace(old, new))


def test_a_changed_function_is_run_again_and_nothing_else_is(
    package: Path, tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    field = generator.standard_normal((8, 9, 10)).astype(np.float32)
    for name, image in (("field", field), ("mask", np.ones_like(field))):
        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), tmp_path / f"{name}.nii.gz")

    chi = run(package, tmp_path)
    made, before = chi.stat().st_mtime_ns, nibabel.load(chi).get_fdata()
    assert before.any()

    change(package / "cli" / "logs.py", "What a run says", "What a run tells")
    assert run(package, tmp_path).stat().st_mtime_ns == made, "the command line computes nothing"

    # a function two imports away from that of the node
    change(package / "numerics" / "kernels.py", ".add_(1 / 3)", ".add_(1 / 4)")
    after = nibabel.load(run(package, tmp_path)).get_fdata()
    assert not np.allclose(after, before)
