"""Referencing: the region's mean is 0, nothing else changes."""

from pathlib import Path

import nibabel as nb
import numpy as np
import pytest
import torch
from nipype.interfaces.utility import Merge
from nipype.pipeline.engine import Node, Workflow

from qsmpipe import images
from qsmpipe.chain import Chain
from qsmpipe.interfaces.reference import CSFReference
from qsmpipe.numerics.reference import reference
from qsmpipe.workflows.qsm import init_qsm_wf
from qsmpipe.workflows.reference import METHODS, init_reference_wf

SHAPE = (11, 9, 8)


@pytest.fixture
def maps() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[1:-1, 1:-1, 1:-1] = True
    region = torch.zeros(SHAPE, dtype=torch.bool)
    region[:4, 2:5, 3:6] = True  # one layer of it lies outside the mask
    chi = (torch.randn(SHAPE, generator=generator) * 0.05 + 0.02) * mask
    return {"chi": chi, "mask": mask, "region": region}


@pytest.mark.parametrize("name", [None, "region"])
def test_the_region_becomes_zero(name: str | None, maps: dict[str, torch.Tensor]) -> None:
    chi, mask = maps["chi"], maps["mask"]
    inside = maps["region"] & mask if name else mask
    result = reference(chi, mask, region=maps["region"] if name else None)
    assert result.chi[inside].double().mean().abs() < 1e-7
    assert not result.chi[~mask].any()
    assert result.value == pytest.approx(chi[inside].double().mean().item(), abs=1e-9)
    assert result.deviation == pytest.approx(np.std(chi[inside].numpy()), rel=1e-5)
    assert result.voxels == inside.sum()
    torch.testing.assert_close(result.chi[mask], chi[mask] - result.value, rtol=0, atol=1e-7)


def test_an_offset_changes_the_value_alone(maps: dict[str, torch.Tensor]) -> None:
    chi, mask = maps["chi"].double(), maps["mask"]
    first, second = reference(chi, mask), reference(chi + 0.3, mask)
    torch.testing.assert_close(first.chi, second.chi)
    assert second.value - first.value == pytest.approx(0.3)


def test_what_has_no_mean_is_refused(maps: dict[str, torch.Tensor]) -> None:
    chi, mask = maps["chi"], maps["mask"]
    with pytest.raises(ValueError, match="region is empty"):
        reference(chi, mask, region=torch.zeros_like(mask))
    with pytest.raises(ValueError, match="mask is empty"):
        reference(chi, torch.zeros_like(mask))
    with pytest.raises(ValueError, match=r"outside the mask \(378 voxels\)"):
        reference(chi, mask, region=~mask)
    with pytest.raises(ValueError, match=r"chi \(11, 9, 8\) and region \(11, 9, 7\)"):
        reference(chi, mask, region=mask[..., 1:])
    broken = chi.clone()
    broken[4, 4, 4] = torch.nan
    with pytest.raises(ValueError, match="not finite in 1"):
        reference(broken, mask)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "csf"])
def test_the_workflow_runs(method: str, maps: dict[str, torch.Tensor], tmp_path: Path) -> None:
    for name, data in maps.items():
        nb.Nifti1Image(data.numpy().astype(np.float32), np.eye(4)).to_filename(
            tmp_path / f"{name}.nii.gz"
        )
    reference_wf = init_reference_wf(method=method)
    for name in maps:
        setattr(reference_wf.inputs.inputnode, name, str(tmp_path / f"{name}.nii.gz"))
    outer = Workflow(name="outer", base_dir=tmp_path)
    end = Node(Merge(3), name="end")
    outer.connect([
        (reference_wf, end, [("outputnode.chi", "in1"), ("outputnode.value", "in2"),
                             ("outputnode.step", "in3")]),
    ])  # fmt: skip
    done = {node.name: node for node in outer.run().nodes()}
    chi, value, step = done["end"].result.outputs.out
    region = maps["region"] if method == "region" else None
    expected = reference(maps["chi"], maps["mask"], region=region)
    assert step["method"] == method
    if method == "none":
        assert value == 0
        assert chi == str(tmp_path / "chi.nii.gz")
    else:
        assert value == pytest.approx(expected.value)
        torch.testing.assert_close(images.load(chi), expected.chi)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="choose from brain, none, region, csf"):
        init_reference_wf(method="cfs")


@pytest.fixture
def fluid(tmp_path: Path) -> dict[str, Path]:
    """Brain of 100 mm at 5 mm; 12 mL of fluid in its middle, of 0.07 ppm; a void."""
    x, y, z = np.meshgrid(*[np.arange(-12, 13) * 5.0] * 3, indexing="ij")
    mask = x**2 + y**2 + z**2 < 50**2
    region = x**2 + y**2 + z**2 < 14**2
    void = (x - 20) ** 2 + y**2 + z**2 < 10**2
    values = {
        "chi": np.where(mask, 0.07 * region + 0.01 * np.sin(x), 0),
        "mask": mask,
        "r2star": np.where(mask, np.where(region | void, 6.0, 20.0), 0),
        "magnitude": np.stack([mask & ~void, 0.5 * (mask & ~void)], axis=-1),
        "truth": region,
    }
    for name, data in values.items():
        image = nb.Nifti1Image(data.astype(np.float32), np.diag([5.0, 5.0, 5.0, 1.0]))
        image.to_filename(tmp_path / f"{name}.nii.gz")
    return {name: tmp_path / f"{name}.nii.gz" for name in values}


def test_the_ventricles_become_zero(fluid: dict[str, Path], tmp_path: Path) -> None:
    reference_wf = init_reference_wf(method="csf", parameters={"threshold": 8.0, "smoothing": 0.0})
    for name in ("chi", "mask", "r2star", "magnitude"):
        setattr(reference_wf.inputs.inputnode, name, fluid[name])
    reference_wf.base_dir = tmp_path
    node = {node.name: node for node in reference_wf.run().nodes()}["csf"]
    outputs = node.result.outputs
    region = images.load(outputs.region, dtype=torch.bool)
    chi = images.load(outputs.chi)
    assert torch.equal(region, images.load(fluid["truth"], dtype=torch.bool))
    assert chi[region].double().mean().abs() < 1e-7
    assert not chi[~images.load(fluid["mask"], dtype=torch.bool)].any()
    expected = images.load(fluid["chi"])[region].double().mean().item()
    assert outputs.value == pytest.approx(expected, abs=1e-7)
    step = outputs.step
    assert (step["stage"], step["method"]) == ("reference", "csf")
    assert step["parameters"]["threshold"] == 8.0
    assert step["parameters"]["value"] == outputs.value
    assert step["parameters"]["voxels"] == region.sum()


def test_without_ventricles_there_is_no_reference(fluid: dict[str, Path], tmp_path: Path) -> None:
    """Nothing else is taken in their place: neither the brain nor nothing."""
    given = {name: fluid[name] for name in ("chi", "mask", "r2star")}
    with pytest.raises(ValueError, match=r"no ventricle was found.*take another reference"):
        CSFReference(**given).run(cwd=tmp_path)  # R2* of 6 /s is not below 5 /s
    with pytest.raises(ValueError, match="r2star"):
        CSFReference(chi=fluid["chi"], mask=fluid["mask"]).run(cwd=tmp_path)
    for echoes, relaxation in ((1, "loglinear"), (3, "none")):
        chain = Chain(reference="csf", relaxation=relaxation)
        with pytest.raises(ValueError, match=r"finds the ventricles by their R2\*"):
            init_qsm_wf(echoes=echoes, chain=chain)


def test_every_wire_of_the_ventricles_reaches_them() -> None:
    chain = Chain(
        inversion="tkd",
        reference="csf",
        parameters={"reference": {"csf": {"threshold": 8.0}}},
    )
    workflow = init_qsm_wf(echoes=3, chain=chain)
    inner = workflow.get_node("susceptibility_wf").get_node("reference_tkd_wf")
    assert inner.get_node("csf").inputs.threshold == 8.0
    wired = {name for _, node, edge in inner._graph.edges(data="connect")
             for name in [into for _, into in edge] if node.name == "csf"}  # fmt: skip
    assert wired == {"chi", "mask", "r2star", "magnitude"}
