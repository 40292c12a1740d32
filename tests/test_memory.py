"""What nodes tell the scheduler of their memory."""

import pickle
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nipype.pipeline.engine import Node, Workflow

from qsmpipe.chain import Chain
from qsmpipe.interfaces.cosmos import Cosmos
from qsmpipe.interfaces.inversion import TKD, UNet
from qsmpipe.interfaces.phase import Prepare
from qsmpipe.interfaces.unwrap import BestPath, Romeo
from qsmpipe.workflows.inversion import init_inversion_wf
from qsmpipe.workflows.qsm import init_qsm_wf
from qsmpipe.workflows.stage import HEAD, estimate_needs
from qsmpipe.workflows.unwrap import init_unwrap_wf

INTERPRETER = 0.4
"""GB."""


def volumes(gb: float, voxels: int) -> float:
    """Memory beyond the interpreter's in float32 volumes."""
    return (gb - INTERPRETER) * 2**30 / (4 * voxels)


def nodes(workflow: Workflow) -> list[Node]:
    return [workflow.get_node(name) for name in workflow.list_node_names()]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Images of 20 x 30 x 40 voxels: one volume, and five."""
    for name, shape in (("one", (20, 30, 40)), ("five", (20, 30, 40, 5))):
        image = nibabel.Nifti1Image(np.zeros(shape, np.float32), np.eye(4))
        nibabel.save(image, tmp_path / f"{name}.nii.gz")
    return tmp_path


def test_every_node_of_the_chain_claims_memory_for_a_head() -> None:
    chain = Chain(inversion="tv,unet", background="lbv+vsharp", two_pass=True)
    workflow = init_qsm_wf(echoes=5, chain=chain)
    for node in nodes(workflow):
        assert volumes(node.mem_gb, HEAD) >= 6 + 4 * 5 - 1e-6, node.fullname


def test_methods_claim_what_their_rows_and_stages_say() -> None:
    claimed = {method: Node(method(), "node").interface.memory_gb(1000, 3) for method in (
        TKD, UNet, Romeo, BestPath, Cosmos)}  # fmt: skip
    assert volumes(claimed[TKD], 1000) == pytest.approx(42 + 12)
    assert volumes(claimed[BestPath], 1000) == pytest.approx(48 + 12)
    assert volumes(claimed[Romeo], 1000) == pytest.approx(16 + 12)
    assert volumes(claimed[Cosmos], 1000) == pytest.approx(6 + 12)
    assert claimed[UNet] - claimed[TKD] == pytest.approx(3.5)


def test_an_embedded_node_claims_by_the_grid_that_it_is_given(saved: Path) -> None:
    workflow = init_unwrap_wf(method="romeo")
    node = workflow.get_node("romeo")
    assert volumes(node.mem_gb, HEAD) == pytest.approx(16 + 4)
    node.inputs.phase, node.inputs.mask = str(saved / "five.nii.gz"), str(saved / "one.nii.gz")
    node = pickle.loads(pickle.dumps(node))
    assert volumes(node.mem_gb_runtime, 24000) == pytest.approx(16 + 4 * 5)
    assert node.mem_gb == node.mem_gb_runtime


def test_lists_of_images_are_volumes(saved: Path) -> None:
    workflow = Workflow("files")
    one = str(saved / "one.nii.gz")
    workflow.add_nodes([Node(Prepare(magnitude=[one] * 3, phase=[one] * 3), "prepare")])
    estimate_needs(workflow)
    node = workflow.get_node("prepare")
    assert volumes(node.mem_gb_runtime, 24000) == pytest.approx(40 + 4 * 3)


def test_echoes_that_the_caller_knows_count_for_a_stage_that_sees_none(saved: Path) -> None:
    workflow = init_inversion_wf(method="tkd")
    node = workflow.get_node("tkd")
    node.inputs.field = node.inputs.mask = str(saved / "one.nii.gz")
    estimate_needs(workflow, voxels=24000, echoes=5)
    assert volumes(node.mem_gb, 24000) == pytest.approx(42 + 4 * 5)
    assert volumes(node.mem_gb_runtime, 24000) == pytest.approx(42 + 4 * 5)


def test_an_image_that_cannot_be_read_leaves_the_complaint_to_the_node(tmp_path: Path) -> None:
    (tmp_path / "field.nii.gz").write_bytes(b"no image")
    node = init_inversion_wf(method="tkd").get_node("tkd")
    node.inputs.field = str(tmp_path / "field.nii.gz")
    assert node.mem_gb_runtime == pytest.approx(INTERPRETER)
