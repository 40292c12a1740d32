"""What leaves the mask after the field fit, and two passes: a strong source spoils less."""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nb
import numpy as np
import pytest
import torch
from nipype.pipeline.engine import Workflow
from phantoms import TILT, error, phantom

from qsmpipe import images
from qsmpipe.chain import Chain
from qsmpipe.interfaces.mask import ExcludeResidual
from qsmpipe.interfaces.passes import MergePasses, Reliable
from qsmpipe.numerics.field import weighted_mean
from qsmpipe.numerics.inversion import rts, tkd, tv
from qsmpipe.numerics.masks.passes import merge, reliable
from qsmpipe.numerics.masks.residual import exclude_residual
from qsmpipe.numerics.operators import Dipole
from qsmpipe.numerics.units import radians_per_ppm
from qsmpipe.settings import Settings
from qsmpipe.workflows.qsm import init_qsm_wf
from qsmpipe.workflows.susceptibility import init_susceptibility_wf

ECHO_TIMES = (0.005, 0.010, 0.015)


class Bleed(NamedTuple):
    """A head with a bleed, the phase around which is noise."""

    field: torch.Tensor
    mask: torch.Tensor
    quality: torch.Tensor
    chi: torch.Tensor
    spoilt: torch.Tensor
    zooms: tuple[float, float, float]
    b0_direction: Any


def bleed(
    shape: tuple[int, int, int] = (40, 41, 39),
    zooms: tuple[float, float, float] = (1.0, 1.0, 1.0),
    *,
    tilt: float = 0.0,
) -> Bleed:
    _, mask, _, chi, b0_direction = phantom(shape, zooms, tilt=tilt)
    x, y, z = torch.meshgrid(
        *((torch.arange(n) - (n - 1) / 2) * zoom for n, zoom in zip(shape, zooms, strict=True)),
        indexing="ij",
    )
    distance = ((x - 4) ** 2 + y**2 + (z + 6) ** 2).sqrt()
    chi = chi + 1.5 * torch.sigmoid((2.5 - distance) / 0.35) * mask
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator)
    spoilt = distance < 4.5
    field = Dipole.on_grid(chi, zooms, b0_direction)(chi)
    field = torch.where(spoilt, 0.5 * noise, field + 0.002 * noise)
    good = 0.8 + 0.1 * torch.rand(shape, generator=generator)
    bad = 0.2 * torch.rand(shape, generator=generator)
    quality = torch.where(mask & ~spoilt, good, bad)
    return Bleed(field, mask, quality, chi, spoilt, zooms, b0_direction)


# The residual of the field fit


def test_a_voxel_that_no_field_explains_leaves_the_mask() -> None:
    """Phase of two compartments is not linear in echo time; noise and an offset of 0 are."""
    shape = (12, 13, 14)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[1:-1, 1:-1, 1:-1] = True
    odd = torch.zeros_like(mask)
    odd[4:7, 5:8, 6:9] = True
    generator = torch.Generator().manual_seed(1)
    field = 0.02 * torch.randn(shape, generator=generator)
    phase = torch.stack([field * radians_per_ppm(3.0, time) for time in ECHO_TIMES])
    phase[1, odd] += 2.5
    phase += 0.02 * torch.randn(phase.shape, generator=generator)
    fit = weighted_mean(
        phase, mask, magnitude=torch.ones_like(phase), echo_times=ECHO_TIMES, field_strength=3.0
    )
    kept = exclude_residual(fit.residual, mask)
    assert torch.equal(kept, mask & ~odd)
    assert torch.equal(exclude_residual(fit.residual, mask, threshold=2.0), mask)


def test_what_the_residual_cuts_off_goes_and_what_is_not_known_goes() -> None:
    mask = torch.ones(9, 5, 5, dtype=torch.bool)
    residual = torch.zeros(9, 5, 5)
    residual[6] = 0.5
    residual[1, 1, 1] = torch.nan
    expected = mask.clone()
    expected[6:] = False
    expected[1, 1, 1] = False
    assert torch.equal(exclude_residual(residual, mask), expected)
    with pytest.raises(ValueError, match="raise mask_residual"):
        exclude_residual(residual + 1, mask)
    with pytest.raises(ValueError, match=r"residual \(9, 5, 5\) and mask \(9, 5, 4\)"):
        exclude_residual(residual, mask[..., 1:])
    with pytest.raises(ValueError, match="threshold it first"):
        exclude_residual(residual, mask.float())


# Two passes


def test_the_first_pass_has_holes_where_the_phase_is_bad() -> None:
    _, mask, quality, _, spoilt, zooms, _ = bleed()
    holed = reliable(quality, mask, zooms)
    assert not holed[spoilt & mask].any()
    assert (holed & ~spoilt).sum() > 0.99 * (mask & ~spoilt).sum()
    speck = quality.clone()
    speck[20, 30, 20] = 0.0
    assert reliable(speck, mask, zooms)[20, 30, 20], "a voxel of noise is no hole"
    assert not reliable(speck, mask, zooms, smoothing=0.0)[20, 30, 20]
    assert reliable(quality, mask, zooms, threshold=0.85).sum() < holed.sum()
    with pytest.raises(ValueError, match="lower the threshold"):
        reliable(quality, mask, zooms, threshold=1.1)
    with pytest.raises(ValueError, match="different grids"):
        reliable(quality[1:], mask, zooms)


def test_merging_takes_the_first_map_where_it_is_known() -> None:
    first, second = torch.randn(2, 5, 6, 7, generator=torch.Generator().manual_seed(2))
    known = first > 0
    merged = merge(first, second, known)
    assert torch.equal(merged[known], first[known])
    assert torch.equal(merged[~known], second[~known])
    with pytest.raises(ValueError, match="chi_filled"):
        merge(first, second[1:], known)
    with pytest.raises(ValueError, match="first pass"):
        merge(first, second, known.float())


@pytest.mark.parametrize("method", [tkd, rts, tv], ids=lambda method: method.__name__)
@pytest.mark.parametrize(
    "head",
    [{}, {"tilt": TILT, "zooms": (1.0, 1.2, 1.6), "shape": (40, 33, 25)}],
    ids=["isotropic", "anisotropic and tilted"],
)
def test_a_bleed_spoils_less_in_two_passes(method: Any, head: dict[str, Any]) -> None:
    field, mask, quality, chi, spoilt, zooms, b0_direction = bleed(**head)
    holed = reliable(quality, mask, zooms)
    first, second = (method(field, m, zooms, b0_direction=b0_direction).chi for m in (holed, mask))
    merged = merge(first, second, holed)
    around = mask & ~spoilt
    assert error(merged, chi, around) < 0.5 * error(second, chi, around)
    assert error(merged, chi, mask) < error(second, chi, mask)
    assert merged[spoilt & mask].abs().mean() > 0.1, "the hole is not left empty"


# Interfaces and graph


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    head = bleed((32, 33, 31), (1.2, 1.2, 1.2))
    values = {
        "field": head.field, "mask": head.mask, "quality": head.quality,
        "noise": torch.full(head.field.shape, 0.002),
        "residual": torch.where(head.spoilt, 0.6, 0.02),
    }  # fmt: skip
    for name, data in values.items():
        image = nb.Nifti1Image(data.numpy().astype(np.float32), np.diag([1.2, 1.2, 1.2, 1.0]))
        image.to_filename(tmp_path / f"given_{name}.nii.gz")
    return {name: tmp_path / f"given_{name}.nii.gz" for name in values}


def test_the_interfaces_do_what_the_functions_do(files: dict[str, Path], tmp_path: Path) -> None:
    mask = images.load(files["mask"], dtype=torch.bool)
    residual, quality = images.load(files["residual"]), images.load(files["quality"])
    for interface, expected in (
        (ExcludeResidual(residual=files["residual"], mask=files["mask"], threshold=0.1),
         exclude_residual(residual, mask, threshold=0.1)),
        (Reliable(quality=files["quality"], mask=files["mask"], threshold=0.4),
         reliable(quality, mask, images.zooms_of(files["mask"]), threshold=0.4)),
    ):  # fmt: skip
        outputs = interface.run(cwd=tmp_path).outputs
        assert torch.equal(images.load(outputs.mask, dtype=torch.bool), expected)
        assert outputs.step["parameters"]["threshold"] == interface.inputs.threshold
    merged = MergePasses(
        chi_reliable=files["field"], chi_filled=files["quality"], reliable=files["mask"]
    ).run(cwd=tmp_path)
    field = images.load(files["field"])
    torch.testing.assert_close(images.load(merged.outputs.chi), merge(field, quality, mask))


def test_two_passes_run(files: dict[str, Path], tmp_path: Path) -> None:
    """With a first mask that lacks more than the quality does, and two inversions."""
    first = images.load(files["mask"], dtype=torch.bool)
    first[:10] = False
    path = images.save(first, tmp_path / "first.nii.gz", like=files["mask"])
    chain = Chain(
        background="pdf", inversion="tkd,l2", reference="none", two_pass=True,
        parameters={"background": {"pdf": {"max_iterations": 5}}},
    )  # fmt: skip
    workflow = init_susceptibility_wf(chain=chain)
    for name in ("field", "mask", "quality", "noise"):
        setattr(workflow.inputs.inputnode, name, files[name])
    workflow.inputs.inputnode.first_mask = path
    workflow.base_dir = tmp_path
    done = {node.name: node.result.outputs for node in workflow.run().nodes()
            if hasattr(node.result, "outputs")}  # fmt: skip
    holed = images.load(done["reliable"].mask, dtype=torch.bool)
    assert not (holed & ~first).any()
    chi = images.load(done["passes_tkd"].chi)
    assert (chi[~holed & images.load(files["mask"], dtype=torch.bool)] != 0).all()
    names = [step["method"] for step in done["steps"].out]
    assert names == ["reliable", "pdf", "tkd", "l2", "pdf", "tkd", "l2", "none", "none"]


def wires(workflow: Workflow) -> set[tuple[str, str, str]]:
    return {
        (source.name, target.name, into)
        for source, target, edge in workflow._graph.edges(data="connect")
        for _, into in edge
    }


@pytest.mark.parametrize(("residual", "two_pass"), [*itertools.product([0.0, 0.3], [False, True])])
def test_the_chain_knows_both(residual: float, *, two_pass: bool) -> None:
    found = wires(init_qsm_wf(echoes=3, chain=Chain(mask_residual=residual, two_pass=two_pass)))
    into = {name: source for source, target, name in found if target == "susceptibility_wf"}
    trusted = "exclude_residual" if residual else "mask_wf"
    assert into["inputnode.mask"] == ("mask_wf" if two_pass else trusted)
    assert into.get("inputnode.first_mask") == (trusted if two_pass else None)
    assert into.get("inputnode.quality") == ("mask_wf" if two_pass else None)


def test_the_settings_know_both() -> None:
    settings = Settings(mask_residual=0.3, two_pass=True)
    settings.check()
    beside = [step for step in settings.resolved() if step["method"] in ("residual", "reliable")]
    assert beside == [
        {"stage": "mask", "method": "residual", "parameters": {"threshold": 0.3}},
        {"stage": "passes", "method": "reliable", "parameters": {"threshold": "otsu"}},
    ]
    with pytest.raises(ValueError, match="mask_residual is -1: give a number of 0 or more"):
        Settings(mask_residual=-1).check()
