"""What the factories of stages with one node have in common."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from nipype.interfaces.utility import IdentityInterface
from nipype.pipeline.engine import Node, Workflow

from qsmpipe.methods import SUPPLIED, function_of, interface_of


def stage_wf(
    stage: str,
    method: str,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    parameters: Mapping[str, Any] | None,
    omp_nthreads: int,
    use_gpu: bool,
    name: str,
) -> Workflow:
    """Put a method's interface between an ``inputnode`` and an ``outputnode``.

    The node is named after the method: Nipype's cache knows a node's name and inputs, not its
    class. What the method does not take is not connected, so that it need not be waited for. On
    a GPU the node asks for one processor, because Nipype counts GPU slots by processors.
    """
    workflow = Workflow(name=name)
    inputnode = Node(IdentityInterface(fields=list(inputs)), name="inputnode")
    outputnode = Node(IdentityInterface(fields=list(outputs)), name="outputnode")
    interface = interface_of(stage, method)(
        num_threads=omp_nthreads, use_gpu=use_gpu, **(parameters or {})
    )
    node = Node(interface, name=method, n_procs=1 if use_gpu else omp_nthreads)
    unused = SUPPLIED - set(inspect.signature(function_of(stage, method)).parameters)

    workflow.connect([
        (inputnode, node, [(field, field) for field in inputs if field not in unused]),
        (node, outputnode, [(field, field) for field in outputs]),
    ])  # fmt: skip
    return workflow
