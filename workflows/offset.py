"""From phase to phase that is 0 at echo time 0."""

from collections.abc import Mapping
from typing import Any

from nipype.pipeline.engine import Workflow

from qsmpipe.chain import Chain
from qsmpipe.workflows.stage import stage_wf


def init_offset_wf(
    *,
    method: str = Chain.offset,
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
    return stage_wf(
        "offset",
        method,
        inputs=("phase", "magnitude", "echo_times"),
        outputs=("phase", "offset", "step"),
        parameters=parameters,
        omp_nthreads=omp_nthreads,
        use_gpu=use_gpu,
        name=name,
    )
