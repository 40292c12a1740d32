"""The plan of a run: which steps an acquisition takes, and which of them follow from which.

It is read off the graph that is run, so that the two cannot disagree.
"""

from collections.abc import Iterator, Sequence

import networkx as nx
from nipype.interfaces.utility import IdentityInterface, Merge
from nipype.pipeline.engine import Node, Workflow

from qsmpipe.interfaces.derivatives import WriteDerivatives
from qsmpipe.interfaces.reports import Reportlets
from qsmpipe.records import Planned

TOLD = "steps"
"""Inputs of this name take what the steps tell of themselves, which is no data."""


def plans(workflow: Workflow) -> dict[str, tuple[Planned, ...]]:
    """Give the plan of each acquisition of a run.

    Parameters
    ----------
    workflow : Workflow
        Of :func:`qsmpipe.workflows.base.init_run_wf`.

    Returns
    -------
    plans : dict
        Name of an acquisition's workflow to its steps, each behind those that it follows from.
    """
    flat = workflow._create_flat_graph()
    steps = nx.DiGraph()
    for node in flat.nodes():
        if not is_plumbing(node) and not isinstance(node.interface, Reportlets | WriteDerivatives):
            steps.add_node(node)
    for node in list(steps):
        for field, source, output in _inputs(flat, node):
            steps.add_edge(source, node)
            steps.edges[source, node].setdefault("takes", {})[field] = output
    order = {node: place for place, node in enumerate(flat.nodes())}
    found: dict[str, list[Planned]] = {}
    for node in nx.lexicographical_topological_sort(steps, key=order.__getitem__):
        takes: dict[str, list[str]] = {}
        for source, _, joined in steps.in_edges(node, data=True):
            for field in joined["takes"]:
                takes.setdefault(field, []).append(_named(source, beside=node))
        found.setdefault(_acquisition(node), []).append(
            Planned(
                label(node.fullname.split(".")[3:]),
                getattr(node.interface, "stage", ""),
                getattr(node.interface, "method", node.name),
                {field: tuple(names) for field, names in takes.items()},
            )
        )
    return {name: tuple(planned) for name, planned in found.items()}


def _inputs(flat: nx.DiGraph, node: Node) -> Iterator[tuple[str, Node, str]]:
    """List the inputs of a node that come from another step: field, step, output."""
    for source, _, joined in flat.in_edges(node, data=True):
        for output, field in joined["connect"]:
            if field != TOLD:
                for step, made in _makers(flat, source, _name(output)):
                    yield field, step, made


def _makers(flat: nx.DiGraph, node: Node, output: str) -> Iterator[tuple[Node, str]]:
    """Follow an output back through the plumbing to the steps that it comes from."""
    if not is_plumbing(node):
        yield node, output
        return
    for source, _, joined in flat.in_edges(node, data=True):
        for made, field in joined["connect"]:
            # All inputs of a Merge become its one output.
            if field == output or isinstance(node.interface, Merge):
                yield from _makers(flat, source, _name(made))


def _name(output: str | tuple[str, ...]) -> str:
    """Name of an output; Nipype may pair it with a function."""
    return output if isinstance(output, str) else output[0]


def _acquisition(node: Node) -> str:
    return str(node.fullname.split(".")[2])


def _named(step: Node, *, beside: Node) -> str:
    """Name a step, with its acquisition where that is another."""
    name = label(step.fullname.split(".")[3:])
    own = _acquisition(step)
    return name if own == _acquisition(beside) else f"{spoken(own)} {name}"


def label(parts: Sequence[str]) -> str:
    """Name a node by its path within the acquisition.

    >>> label(["qsm_wf", "susceptibility_wf", "background_vsharp_wf", "vsharp"])
    'background vsharp'
    """
    shown = [
        part.removesuffix("_wf") for part in parts if part not in ("qsm_wf", "susceptibility_wf")
    ]
    return " ".join([part.removesuffix(f"_{shown[-1]}") for part in shown[:-1]] + shown[-1:])


def is_plumbing(node: Node) -> bool:
    """Whether a node computes nothing."""
    return isinstance(node.interface, IdentityInterface | Merge)


def spoken(workflow: str) -> str:
    """Name an acquisition by its workflow.

    >>> spoken("sub_01_ses_2_wf")
    'sub-01-ses-2'
    """
    return workflow.removesuffix("_wf").replace("_", "-")
