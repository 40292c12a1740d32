"""From magnitude and phase to the mask that the rest of the pipeline works in."""

from collections.abc import Mapping
from typing import Any

from nipype.interfaces.utility import IdentityInterface, Merge
from nipype.pipeline.engine import Node, Workflow

from qsmpipe.chain import Chain
from qsmpipe.interfaces.mask import Combine, Given, QualityMap, Refine
from qsmpipe.methods import GIVEN, mask_steps, parameters_of
from qsmpipe.methods import method as row_of
from qsmpipe.workflows.stage import estimate_needs, interface_with

SYMBOLS = {"&": "and", "|": "or"}
"""How masks are joined, to :data:`qsmpipe.numerics.masks.morphology.OPERATIONS`."""


def init_mask_wf(
    *,
    method: str = Chain.mask,
    parameters: Mapping[str, Mapping[str, Any]] | None = None,
    erosion: float = 0.0,
    omp_nthreads: int = 1,
    use_gpu: bool = False,
    name: str = "mask_wf",
) -> Workflow:
    """Make the mask, and the quality map of the phase.

    Parameters
    ----------
    method : str
        Keys of ``METHODS["mask"]`` in :mod:`qsmpipe.methods` joined by ``&`` (in both) and ``|``
        (in either), as in ``"bet & quality"`` or ``"(bet | threshold) & quality"``; without
        brackets ``&`` comes first. ``"given"`` stands for the input ``mask_given``.
    parameters : mapping, optional
        Method to parameter to value, where the default is not wanted:
        ``{"bet": {"fractional_intensity": 0.4}}``.
    erosion : float
        Radius of the ball that erodes the mask (mm).
    omp_nthreads : int
        CPU threads of a node.
    use_gpu : bool
        Taken for the sake of one signature; masks are made on the CPU.
    name : str
        Name of the workflow.

    Inputs
    ------
    magnitude
        Magnitude, echoes last.
    phase
        Wrapped phase (rad), echoes last.
    echo_times
        Echo times (s).
    mask_given
        The user's own mask, with ``"given"``: whole numbers on the grid of ``magnitude``.

    Outputs
    -------
    mask
        One piece without holes, eroded.
    quality
        Phase quality, 0 to 1.
    steps
        List of what was done.

    Raises
    ------
    ValueError
        If the expression or a parameter's name is wrong.
    """
    order = mask_steps(method)
    _check_parameters(parameters or {})
    workflow = Workflow(name=name)
    inputnode = Node(
        IdentityInterface(fields=["magnitude", "phase", "echo_times", "mask_given"]),
        name="inputnode",
    )
    outputnode = Node(IdentityInterface(fields=["mask", "quality", "steps"]), name="outputnode")
    quality_map = Node(QualityMap(), name="quality_map")
    workflow.connect([
        (inputnode, quality_map, [(x, x) for x in ("phase", "magnitude", "echo_times")]),
        (quality_map, outputnode, [("quality", "quality")]),
    ])  # fmt: skip

    done = [quality_map]
    joined: list[Node] = []
    for key in order:
        if key in SYMBOLS:
            second, first = joined.pop(), joined.pop()
            combined = 1 + sum(isinstance(node.interface, Combine) for node in done)
            node = _combine(workflow, SYMBOLS[key], combined, (first, second))
        else:
            node = _method(key, (parameters or {}).get(key, {}))
            workflow.connect([(inputnode, node, [("magnitude", "magnitude")])])
            if "echo_times" in node.inputs.copyable_trait_names():
                workflow.connect([(inputnode, node, [("echo_times", "echo_times")])])
            if key == GIVEN:
                workflow.connect([(inputnode, node, [("mask_given", "mask")])])
            if key == "quality":
                workflow.connect([(quality_map, node, [("quality", "quality")])])
        done.append(node)
        joined.append(node)
    (last,) = joined

    refine = Node(Refine(erosion=erosion), name="refine")
    done.append(refine)
    steps = Node(Merge(len(done)), name="steps", run_without_submitting=True)
    workflow.connect([
        (last, refine, [("mask", "mask")]),
        *((node, steps, [("step", f"in{place}")]) for place, node in enumerate(done, start=1)),
        (refine, outputnode, [("mask", "mask")]),
        (steps, outputnode, [("out", "steps")]),
    ])  # fmt: skip
    estimate_needs(workflow)
    return workflow


def _method(key: str, chosen: Mapping[str, Any]) -> Node:
    """Make the node of a mask method, or of the user's own mask."""
    return Node(Given() if key == GIVEN else interface_with("mask", key, chosen), name=key)


def _combine(workflow: Workflow, operation: str, number: int, masks: tuple[Node, Node]) -> Node:
    """Join two masks."""
    pair = Node(Merge(2), name=f"pair_{number}", run_without_submitting=True)
    node = Node(Combine(operation=operation), name=f"combine_{number}")
    workflow.connect([
        (masks[0], pair, [("mask", "in1")]),
        (masks[1], pair, [("mask", "in2")]),
        (pair, node, [("out", "masks")]),
    ])  # fmt: skip
    return node


def _check_parameters(parameters: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a method or parameter that does not exist; those of unused methods may stand."""
    for key, chosen in parameters.items():
        if key == GIVEN:
            continue
        row_of("mask", key)
        known = parameters_of("mask", key)
        for parameter in chosen:
            if parameter not in known:
                msg = f"mask {key} has no parameter {parameter!r}: choose from {', '.join(known)}"
                raise ValueError(msg)
