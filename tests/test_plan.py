"""The plan of a run agrees with the graph that is run, and is told and drawn as it is."""

import copy
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import datasets
import networkx as nx
import pytest
from nipype.interfaces.utility import IdentityInterface, Merge
from nipype.pipeline.engine import Node, Workflow
from nipype.pipeline.engine.utils import generate_expanded_graph

from qsmpipe import bids, checks, records
from qsmpipe.cli import execute, main
from qsmpipe.cli.execute import build
from qsmpipe.records import Failure, Planned
from qsmpipe.reports import flow
from qsmpipe.settings import combine
from qsmpipe.workflows import base
from qsmpipe.workflows.plan import label, plans

CHOICES: dict[str, dict[str, Any]] = {
    "default": {},
    "many": {
        "inversion": "tv,medi", "background": "lbv+vsharp", "two_pass": True,
        "reference": "csf", "swi": "homodyne", "mask_residual": 0.3, "mask": "bet & (threshold)",
    },
    "uncertain": {"inversion": "tv,medi", "background": "lbv+vsharp", "uncertainty": 3},
    "from phase": {"inversion": "ndi", "relaxation": "none", "offset": "none"},
    "orientations": {"cosmos": "cosmos", "inversion": "tkd", "background": "vsharp"},
}  # fmt: skip


@pytest.fixture(scope="module")
def examinations(tmp_path_factory: pytest.TempPathFactory) -> list[checks.Examination]:
    root = tmp_path_factory.mktemp("bids")
    datasets.write(root)
    datasets.write(root, prefix="sub-02_run-1")
    datasets.write(root, prefix="sub-02_run-2")
    return [checks.examine(acquisition) for acquisition in bids.find(root)]


def graph(examinations: list[checks.Examination], choices: dict[str, Any]) -> Workflow:
    settings = combine({"output_dir": "/nowhere", "work_dir": "/nowhere"} | choices)
    workflow, unbuilt = build(examinations, settings, {})
    assert workflow is not None, unbuilt
    assert unbuilt == {}
    return workflow


def computing(node: Node) -> bool:
    return not isinstance(node.interface, IdentityInterface | Merge) and node.name not in (
        "reportlets", "reportlets_chi", "derivatives",
    )  # fmt: skip


def followers(expanded: nx.DiGraph, node: Node) -> Iterator[Node]:
    """Nodes that a node's outputs reach, through merges alone."""
    for _, target in expanded.out_edges(node):
        if isinstance(target.interface, Merge):
            yield from followers(expanded, target)
        elif computing(target):
            yield target


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_the_plan_is_that_of_the_graph(
    choices: dict[str, Any], examinations: list[checks.Examination]
) -> None:
    """Nipype's own expansion of the graph is the oracle: every node, every edge, no other."""
    workflow = graph(examinations, choices)
    planned = plans(workflow)
    expanded = generate_expanded_graph(copy.deepcopy(workflow._create_flat_graph()))
    nodes = [node for node in expanded.nodes() if computing(node)]

    def named(node: Node) -> tuple[str, str]:
        parts = node.fullname.split(".")
        return parts[2], label(parts[3:])

    steps = {(name, step.name) for name, plan in planned.items() for step in plan}
    assert steps == {named(node) for node in nodes}
    assert len(steps) == len(nodes), "every step has a name of its own"
    followed = {
        (named(node), named(other)) for node in nodes for other in followers(expanded, node)
    }
    spoken = {name.removesuffix("_wf").replace("_", "-"): name for name in planned}

    def owner(source: str, name: str) -> tuple[str, str]:
        """Steps of other acquisitions stand with these before them."""
        first, _, rest = source.partition(" ")
        return (spoken[first], rest) if first in spoken else (name, source)

    told = {
        (owner(source, name), (name, step.name))
        for name, plan in planned.items()
        for step in plan
        for sources in step.takes.values()
        for source in sources
    }
    assert told == followed
    for name, plan in planned.items():
        place = {step.name: n for n, step in enumerate(plan)}
        for (_, before), (target, after) in (e for e in told if e[0][0] == e[1][0] == name):
            assert place[before] < place[after], target
        for step in plan:
            assert step.stage
            assert step.method


def test_the_default_chain_is_what_the_field_knows(
    examinations: list[checks.Examination],
) -> None:
    planned = {step.name: step for step in plans(graph(examinations, {}))["sub_01_wf"]}
    takes = {name: dict(step.takes) for name, step in planned.items()}
    assert takes["phase prepare"] == {}
    assert takes["phase offset mcpc3ds"]["phase"] == ("phase prepare",)
    assert takes["mask combine_1"] == {"masks": ("mask bet", "mask quality")}
    assert takes["unwrap romeo"]["phase"] == ("phase offset mcpc3ds",)
    assert takes["unwrap romeo"]["mask"] == ("mask refine",)
    assert takes["field weighted"]["phase"] == ("unwrap romeo",)
    assert takes["relaxation loglinear"]["magnitude"] == ("phase prepare",)
    assert takes["background pdf"]["field"] == ("field weighted",)
    assert takes["inversion tfi"]["field"] == ("field weighted",), "the total field"
    assert takes["inversion tfi"]["noise"] == ("field weighted",)
    assert takes["reference_tfi brain"]["chi"] == ("inversion tfi",)


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset of three, of which no graph of sub-03 can be built."""
    built = base.init_acquisition_wf

    def fails(examination: checks.Examination, *rest: Any, **choices: Any) -> Workflow:
        if examination.acquisition.subject == "03":
            msg = "sub-03 is a Tuesday"
            raise ValueError(msg)
        return built(examination, *rest, **choices)

    monkeypatch.setattr(base, "init_acquisition_wf", fails)
    monkeypatch.setattr(execute, "init_acquisition_wf", fails)
    for subject in ("sub-01", "sub-02", "sub-03"):
        datasets.write(tmp_path / "bids", prefix=subject)
    return tmp_path / "bids"


def words(root: Path, *options: str) -> list[str]:
    return [str(root), str(root.parent / "out"), "participant", "--skip-bids-validation", "-w",
            str(root.parent / "work"), *options]  # fmt: skip


def test_a_graph_that_cannot_be_built_stops_no_other(
    faulty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(graph: execute.Graph, *_: Any, **__: Any) -> execute.Ending:
        ran.extend(plans(graph.workflow))
        return execute.Ending(ended=())

    monkeypatch.setattr(execute, "execute", run)
    assert main(words(faulty)) == 1
    assert ran == ["sub_01_wf", "sub_02_wf"]
    said = capsys.readouterr().err
    assert "sub-03: failed in graph: sub-03 is a Tuesday" in said
    found = {r.name: r for r in records.read(faulty.parent / "out").current}
    assert found["sub-03"].failures == (Failure("graph", "sub-03 is a Tuesday"),)
    assert found["sub-03"].plan == ()
    assert found["sub-01"].failures[0].node == "run"
    html = (faulty.parent / "out" / "sub-01.html").read_text()
    assert 'class="flow"' in html
    assert "inversion tfi takes field, noise of field weighted" in html


def test_a_dry_run_tells_the_plan_and_what_cannot_be_built(
    faulty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(faulty, "--dry-run", "--reference", "csf")) == 0
    said = capsys.readouterr().out
    assert "-> would fail: sub-03 is a Tuesday" in said
    assert said.count("-> would be processed") == 2
    assert said.count("plan of ") == 1
    plan = said.split("plan of sub-01, sub-02\n")[1].splitlines()
    names = [re.match(r" +\d+\. ([^:]+)", line)[1] for line in plan]  # type: ignore[index]
    assert names[:2] == ["phase prepare", "phase offset mcpc3ds"]
    assert names[-1] == "reference_tfi csf"
    assert plan[1] == "  2. phase offset mcpc3ds: phase, magnitude of phase prepare"
    assert [path.name for path in faulty.parent.iterdir()] == ["bids"], "nothing is written"


def drawn(plan: list[Planned], states: dict[str, str]) -> ElementTree.Element:
    return ElementTree.fromstring(flow.draw(plan, states, "x"))


def test_the_drawing_is_the_same_in_every_process() -> None:
    """Python orders sets of words anew in each one."""
    program = (
        "from qsmpipe.records import Planned\n"
        "from qsmpipe.reports.flow import draw\n"
        "steps = [Planned('a', '', ''), *(Planned(x, '', '', {'of': ('a',)}) for x in 'bcdefg'),\n"
        "         Planned('end', '', '', {'of': tuple('abcdefg')})]\n"
        "print(draw(steps, {}, 'x'))"
    )
    drawn = {
        subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in "1234"
    }  # fmt: skip
    assert len(drawn) == 1


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_the_drawing_is_legible(
    choices: dict[str, Any], examinations: list[checks.Examination]
) -> None:
    """Boxes lie inside and apart, lines join them and pass through none."""
    for plan in plans(graph(examinations, choices)).values():
        svg = drawn(list(plan), {plan[0].name: "done"})
        width, height = (float(svg.attrib[name]) for name in ("width", "height"))
        boxes = [
            tuple(float(rect.attrib[name]) for name in ("x", "y", "width", "height"))
            for rect in svg.iter("rect")
        ]
        names = {source for step in plan for sources in step.takes.values() for source in sources}
        assert len(boxes) == len(names | {step.name for step in plan})
        for x, y, w, h in boxes:
            assert 0 <= x <= x + w <= width
            assert 0 <= y <= y + h <= height
        for (x0, y0, w, h), (x1, y1, *_) in itertools.combinations(boxes, 2):
            assert abs(x0 - x1) >= w or abs(y0 - y1) >= h
        paths = [path.attrib["d"] for path in svg.iter("path")]
        reach = nx.DiGraph(
            (source, step.name)
            for step in plan
            for sources in step.takes.values()
            for source in sources
        )
        assert len(paths) == len(nx.transitive_reduction(reach).edges)
        for path in paths:
            numbers = [float(number) for number in re.findall(r"-?[\d.]+", path)]
            start, end = tuple(numbers[:2]), tuple(numbers[-2:])
            assert any(
                x <= start[0] <= x + w and abs(y + h - start[1]) < 1 for x, y, w, h in boxes
            )
            assert any(x <= end[0] <= x + w and abs(y - end[1]) < 1 for x, y, w, h in boxes)
            for x, y in re.findall(r"([\d.]+) [\d.]+V([\d.]+)", path):  # past a layer
                assert not any(
                    x0 < float(x) < x0 + w and y0 < float(y) <= y0 + h for x0, y0, w, h in boxes
                )


def test_a_drawing_tells_its_text_and_hides_no_markup() -> None:
    plan = [
        Planned("a <b>", "mask", "bet"),
        Planned("c", "field", "weighted", {"mask": ("a <b>",), "phase_x": ("a <b>",)}),
    ]
    svg = drawn(plan, {"a <b>": "failed", "c": "not run"})
    (text,) = svg.iter("desc")
    assert text.text == "a <b> takes the images. c takes mask, phase x of a <b>."
    assert [group.attrib["class"] for group in svg.iter("g")] == ["failed", "not-run"]
    ids = {element.attrib["id"] for element in svg.iter() if "id" in element.attrib}
    assert set(svg.attrib["aria-labelledby"].split()) == ids
    json.dumps(flow.draw([], {}, "x"))
