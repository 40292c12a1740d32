"""From the wrapped to the unwrapped phase."""

from collections.abc import Mapping
from typing import Any

from nipype.interfaces.utility import IdentityInterface
from nipype.pipeline.engine import Node, Workflow

from qsmpipe.methods import interface_of


def init_unwrap_wf(
    *,
    method: str = "romeo",
    parameters: Mapping[str, Any] | None = None,
    omp_nthreads: int = 1,
    use_gpu: bool = False,
    name: str = "unwrap_wf",
) -> Workflow:
    """Unwrap the phase of all echoes.

    Parameters
    ----------
    method : str
        A key of ``METHODS["unwrap"]`` in :mod:`qsmpipe.methods`.
    parameters : mapping, optional
        Parameters of the method, where the default is not wanted.
    omp_nthreads : int
        CPU threads.
    use_gpu : bool
        Run on CUDA. ROMEO has no use for one and takes no GPU slot.
    name : str
        Name of the workflow.

    Inputs
    ------
    phase
        Wrapped phase (rad), echoes last, without the offset common to all echoes.
    mask
        Where to unwrap.
    magnitude
        Magnitude, echoes last.
    echo_times
        Echo times (s).

    Outputs
    -------
    phase
        Unwrapped phase (rad), echoes last; 0 outside ``mask``.
    step
        What was done.
    """
    inputs = ("phase", "mask", "magnitude", "echo_times")
    outputs = ("phase", "step")
    workflow = Workflow(name=name)
    inputnode = Node(IdentityInterface(fields=list(inputs)), name="inputnode")
    outputnode = Node(IdentityInterface(fields=list(outputs)), name="outputnode")
    interface = interface_of("unwrap", method)(
        num_threads=omp_nthreads, use_gpu=use_gpu and method != "romeo", **(parameters or {})
    )
    unwrap = Node(interface, name=method, n_procs=omp_nthreads)

    workflow.connect([
        (inputnode, unwrap, [(field, field) for field in inputs]),
        (unwrap, outputnode, [(field, field) for field in outputs]),
    ])  # fmt: skip
    return workflow
