"""What the steps of each subject need of Slurm."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from heapq import nlargest

from nipype.pipeline.engine import Node

from qsmpipe.cli.execute import Graph, computing_nodes
from qsmpipe.settings import Settings
from qsmpipe.slurm import LARGEST_ARRAY, OVERHEAD_GB, Resources, parse

START_S, NODE_S, GIGABYTE_S = 900, 60, 600
"""Time that a job is given: to start and compile; for each node; for each GB of a node."""

SIDE_BY_SIDE = 2
"""Processors of a job at least, where the user says nothing: short nodes run side by side."""

MARGIN = 1.2
"""Memory that a job is given over what its nodes are expected to take."""


def needs(nodes: Sequence[Node], settings: Settings) -> Resources:
    """Tell what the nodes of a subject need together.

    Time is what they take one after the other, with plenty to spare: a job that asks for much
    waits a little longer, one that asks for too little is lost.
    """
    threads = max(node.n_procs for node in nodes)
    own = parse(settings.slurm)
    processors = int(own.get("cpus-per-task", settings.nprocs or max(threads, SIDE_BY_SIDE)))
    at_once = nlargest(max(1, processors // threads), (node.mem_gb for node in nodes))
    draws = [getattr(node.inputs, "realisations", 1) for node in nodes]
    seconds = (
        n * (NODE_S + GIGABYTE_S * node.mem_gb) for n, node in zip(draws, nodes, strict=True)
    )
    return Resources(
        processors=processors,
        memory_gb=settings.mem_gb or OVERHEAD_GB + MARGIN * sum(at_once),
        seconds=START_S + sum(seconds),
        use_gpu=any(node.is_gpu_node() for node in nodes),
    )


def arrays(
    graph: Graph, subjects: Mapping[str, str], settings: Settings
) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Put subjects together that ask Slurm for the same.

    Parameters
    ----------
    graph, settings
        As for :func:`qsmpipe.cli.slurm.run_jobs`.
    subjects
        Acquisition name to the label of its subject.

    Yields
    ------
    request : dict
        Options of ``sbatch`` by name.
    labels : list of str
        Of subjects, no more than an array may have.
    """
    nodes = computing_nodes(graph.workflow)
    by_subject: dict[str, list[Node]] = defaultdict(list)
    for name, workflow in graph.workflow_names.items():
        by_subject[subjects[name]] += nodes.get(workflow, [])
    alike: dict[tuple[tuple[str, str], ...], list[str]] = defaultdict(list)
    for subject, own in by_subject.items():
        if own:
            request = needs(own, settings).request(parse(settings.slurm))
            alike[tuple(request.items())].append(subject)
    for items, labels in alike.items():
        for n in range(0, len(labels), LARGEST_ARRAY):
            yield dict(items), labels[n : n + LARGEST_ARRAY]


def told(request: Mapping[str, str]) -> str:
    """Say what a job asks for.

    >>> told({"cpus-per-task": "4", "mem": "6G"})
    'cpus-per-task=4, mem=6G'
    """
    return ", ".join(f"{key}={value}" for key, value in request.items())
