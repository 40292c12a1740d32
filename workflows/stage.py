"""What the factories of stages with one node have in common."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from nipype.interfaces.base import BaseInterface
from nipype.interfaces.utility import IdentityInterface
from nipype.pipeline.engine import Node, Workflow

from qsmpipe.interfaces.base import Stage
from qsmpipe.interfaces.memory import MemoryByGrid
from qsmpipe.methods import SUPPLIED, fitted, function_of, interface_of, parameters_of


def interface_with(
    stage: str, method: str, parameters: Mapping[str, Any], **inputs: Any
) -> BaseInterface:
    """Make a method's interface.

    Raises
    ------
    ValueError
        If a parameter cannot have its value; it names stage, method and parameter.
    """
    known = parameters_of(stage, method)
    chosen = {
        name: fitted(stage, method, name, value) if name in known else value
        for name, value in parameters.items()
    }
    # traits takes a list for a list, and no tuple.
    chosen = {name: list(v) if isinstance(v, tuple) else v for name, v in chosen.items()}
    return interface_of(stage, method)(**inputs, **chosen)


def take_gpus(workflow: Workflow) -> None:
    """Let each node with ``use_gpu`` ask for one GPU: a slot of Nipype's, a device of Slurm's."""
    for node in map(workflow.get_node, workflow.list_node_names()):
        if node.is_gpu_node():
            node.n_procs = 1  # Nipype counts GPU slots by processors
            # It follows the user's own arguments, in a SLURMGraph without a space between.
            node.plugin_args = {"sbatch_args": " --gres=gpu:1"}


HEAD = 256 * 256 * 176
"""Voxels of a head at 1 mm."""


def estimate_needs(workflow: Workflow, *, voxels: int = HEAD, echoes: int = 1) -> None:
    """Tell the scheduler how much memory and how many processors each node will take.

    A stage that works on one thread asks for one processor, so that others run beside it.

    Nipype's MultiProc, and what derives from it, estimates the memory again when a node's images
    are there, by their size. What is given here holds until then, and for schedulers that do not
    do so.

    Parameters
    ----------
    workflow
        All its nodes; those that are no :class:`qsmpipe.interfaces.base.Stage` count as the least.
    voxels
        Of one echo.
    echoes
        How many there are.
    """
    for node in map(workflow.get_node, workflow.list_node_names()):
        is_stage = isinstance(node.interface, Stage)
        node._mem_gb = (node.interface if is_stage else Stage).memory_gb(voxels, echoes)
        if not is_stage:
            continue
        node.ram_estimator = MemoryByGrid(node.interface, echoes=echoes)
        if node.interface.serial:
            node.n_procs = node.inputs.num_threads = 1


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
    class. What the method does not take is not connected, so that it need not be waited for.
    """
    workflow = Workflow(name=name)
    inputnode = Node(IdentityInterface(fields=list(inputs)), name="inputnode")
    outputnode = Node(IdentityInterface(fields=list(outputs)), name="outputnode")
    interface = interface_with(
        stage, method, parameters or {}, num_threads=omp_nthreads, use_gpu=use_gpu
    )
    node = Node(interface, name=method, n_procs=omp_nthreads)
    unused = SUPPLIED - set(inspect.signature(function_of(stage, method)).parameters)

    workflow.connect([
        (inputnode, node, [(field, field) for field in inputs if field not in unused]),
        (node, outputnode, [(field, field) for field in outputs]),
    ])  # fmt: skip
    take_gpus(workflow)
    estimate_needs(workflow)
    return workflow
