"""From the total field to susceptibility: backgrounds in a row, inversions side by side."""

from typing import Any

import pytest
import torch
from nipype.pipeline.engine import Workflow

from qsmpipe.chain import Chain
from qsmpipe.methods import METHODS
from qsmpipe.numerics.reference import median_map
from qsmpipe.settings import Settings
from qsmpipe.workflows.qsm import init_qsm_wf
from qsmpipe.workflows.susceptibility import init_susceptibility_wf

OWN = [n for n, row in METHODS["inversion"].items() if row.starts_from != "local field"]
"""Inversions that remove the background themselves."""


def sources(workflow: Workflow, part: str) -> dict[str, str]:
    """Input of a part to the name of the node or workflow that it comes from."""
    node = next(n for n in workflow._graph.nodes() if n.name == part)
    return {
        into.removeprefix("inputnode."): source.name
        for source, target, data in workflow._graph.edges(data="connect")
        for _, into in data
        if target is node
    }


def test_backgrounds_follow_on_one_another() -> None:
    workflow = init_susceptibility_wf(chain=Chain(background="vsharp + pdf", inversion="tkd"))
    assert sources(workflow, "background_vsharp_wf")["field"] == "inputnode"
    second = sources(workflow, "background_pdf_wf")
    assert {second["field"], second["mask"]} == {"background_vsharp_wf"}
    assert second["noise"] == "inputnode"
    assert sources(workflow, "inversion_tkd_wf")["mask"] == "background_pdf_wf"


def test_inversions_share_the_background() -> None:
    workflow = init_susceptibility_wf(chain=Chain(background="vsharp", inversion="tkd,tv,l2"))
    for name in ("tkd", "tv", "l2"):
        assert sources(workflow, f"inversion_{name}_wf")["field"] == "background_vsharp_wf"
    assert sources(workflow, "outputnode")["chi"] == "reference_tkd_wf"
    assert sources(workflow, "outputnode")["median"] == "median"
    alone = init_susceptibility_wf(chain=Chain(background="vsharp", inversion="tkd"))
    assert "median" not in alone.list_node_names()


@pytest.mark.parametrize("name", OWN)
def test_an_inversion_that_removes_the_background_itself_gets_the_whole_mask(name: str) -> None:
    workflow = init_susceptibility_wf(chain=Chain(inversion=name))
    assert sources(workflow, "outputnode")["local_field"] == "background_pdf_wf"
    assert sources(workflow, f"inversion_{name}_wf")["mask"] == "inputnode"
    bare = init_susceptibility_wf(chain=Chain(background="none", inversion=name))
    assert not any("background" in node for node in bare.list_node_names())
    both = init_susceptibility_wf(chain=Chain(background="vsharp", inversion=f"tkd,{name}"))
    assert sources(both, f"inversion_{name}_wf")["mask"] == "inputnode"
    assert sources(both, "inversion_tkd_wf")["mask"] == "background_vsharp_wf"
    assert Settings(inversion=name, background="none").methods("background") == ()
    Settings(inversion=name, background="none").check()


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"inversion": "tkd,"}, "cannot be '' in 'tkd,'"),
        ({"inversion": "tkd,tkd"}, "twice"),
        ({"inversion": "tkd+tv"}, "no method 'tkd\\+tv'"),
        ({"inversion": ""}, "cannot be ''"),
        ({"background": "none"}, None),
        ({"background": "none", "inversion": "tkd,sstv"}, "cannot be 'none'"),
        ({"background": "vsharp,pdf"}, "no method 'vsharp,pdf'"),
        ({"background": "vsharp+nothing"}, "no method 'nothing'"),
    ],
)
def test_expressions_are_checked(choice: dict[str, str], message: str | None) -> None:
    if message is None:
        Settings(**choice).check()
        return
    with pytest.raises(ValueError, match=message):
        Settings(**choice).check()


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"inversion": "nope"}, "inversion has no method 'nope'"),
        ({"inversion": ""}, "inversion cannot be ''"),
        ({"inversion": "tkd,tkd"}, "tkd is there twice"),
        ({"inversion": "tkd", "background": "none"}, "background cannot be 'none' before tkd"),
        ({"two_pass": True, "uncertainty": 3}, "two passes"),
        ({"inversion": "tgvqsm", "uncertainty": 3}, "uncertainty of tgvqsm is not known"),
        ({"mask_residual": -0.1}, "mask_residual is -0.1"),
        ({"parameters": {"inversoin": {"tv": {}}}}, "there is no stage 'inversoin'"),
        ({"parameters": {"inversion": {"tvv": {}}}}, "inversion has no method 'tvv'"),
        ({"parameters": {"inversion": {"tv": {"lambda": 1.0}}}}, "tv has no parameter 'lambda'"),
    ],
)
def test_a_chain_that_cannot_be_run_is_refused(choice: dict[str, Any], message: str) -> None:
    """By the factories themselves: none of them makes a map of something else."""
    with pytest.raises(ValueError, match=message):
        init_susceptibility_wf(chain=Chain(**choice))
    with pytest.raises(ValueError, match=message):
        init_qsm_wf(echoes=3, chain=Chain(**choice))


def test_parameters_go_to_the_method_that_has_them() -> None:
    settings = Settings(
        inversion="tkd,tv", parameters={"inversion": {"threshold": 0.2}, "inversion.tv": {"mu": 1}}
    )
    assert settings.parameters_for("inversion") == {"tkd": {"threshold": 0.2}, "tv": {"mu": 1.0}}


def test_the_median_is_that_of_where_all_are_known() -> None:
    masks = torch.ones(3, 4, 4, 4, dtype=torch.bool)
    masks[0, 0] = False
    maps = torch.stack([torch.full((4, 4, 4), value) for value in (0.1, 0.5, -0.3)])
    maps[:, 2, 2, 2] = torch.tensor([1.0, 2.0, 4.0])
    chi, mask = median_map([*maps], [*masks])
    assert torch.equal(mask, masks[0])
    assert not chi[~mask].any()
    assert abs(chi[mask].mean()) < 1e-6, "referenced"
    assert (chi[2, 2, 2] - chi[1, 1, 1]).item() == pytest.approx(2.0 - 0.1)
    even, _ = median_map([*maps[:2]], [*masks[:2]])
    assert (even[2, 2, 2] - even[1, 1, 1]).item() == pytest.approx(1.5 - 0.3)
    with pytest.raises(ValueError, match="different grids"):
        median_map([maps[0], maps[1, 1:]], [*masks[:2]])
    with pytest.raises(ValueError, match="one mask for each"):
        median_map([*maps], [*masks[:2]])
