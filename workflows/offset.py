"""From phase to phase that is 0 at echo time 0."""

from collections.abc import Mapping
from typing import Any

from nipype.interfaces.utility import IdentityInterface
from nipype.pipeline.engine import Node, Workflow

from qsmpipe.methods import interface_of


def init_offset_wf(
    *,
    method: str = "mcpc3ds",
    parameters: Mapping[str, Any] | None = None,
    omp_nthreads: int = 1,
    use_gpu: bool = False,
    name: str = "offset_wf",
) -> Workflow:
    """Remove the phase that all echoes share.

    Parameters
    ----------
    method : str
        A key of ``METHODS["offset"]`` in :mod:`qsmpipe.methods`.
    parameters : mapping, optional
        Parameters of the method, where the default is not wanted.
    omp_nthreads : int
        CPU threads.
    use_gpu : bool
        Run on CUDA.
    name : str
        Name of the workflow.

    Inputs
    ------
    phase
        Phase (rad) of 2 or more echoes, echoes last.
    magnitude
        Magnitude of the same echoes.
    echo_times
        Echo times (s).

    Outputs
    -------
    phase
        Phase (rad, wrapped) without the offset, echoes last.
    offset
        Phase at echo time 0 (rad).
    step
        What was done.
    """
    inputs, outputs = ("phase", "magnitude", "echo_times"), ("phase", "offset", "step")
    workflow = Workflow(name=name)
    inputnode = Node(IdentityInterface(fields=list(inputs)), name="inputnode")
    outputnode = Node(IdentityInterface(fields=list(outputs)), name="outputnode")
    interface = interface_of("offset", method)(
        num_threads=omp_nthreads, use_gpu=use_gpu, **(parameters or {})
    )
    remove = Node(interface, name=method, n_procs=omp_nthreads)

    workflow.connect([
        (inputnode, remove, [(field, field) for field in inputs]),
        (remove, outputnode, [(field, field) for field in outputs]),
    ])  # fmt: skip
    return workflow
