"""From the magnitude of all echoes to R2* and T2*."""

from collections.abc import Mapping
from typing import Any

from nipype.pipeline.engine import Workflow

from qsmpipe.chain import Chain
from qsmpipe.workflows.stage import stage_wf


def init_relaxation_wf(
    *,
    method: str = Chain.relaxation,
    parameters: Mapping[str, Any] | None = None,
    omp_nthreads: int = 1,
    use_gpu: bool = False,
    name: str = "relaxation_wf",
) -> Workflow:
    """Fit the decay of the magnitude.

    Parameters
    ----------
    method : str
        A key of ``METHODS["relaxation"]`` in :mod:`qsmpipe.methods`.
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
    magnitude
        Magnitude of 2 or more echoes (3 or more for ``"arlo"``), echoes last.
    mask
        Where to fit.
    echo_times
        Echo times (s).

    Outputs
    -------
    r2star
        R2* (1/s).
    t2star
        T2* (s).
    s0
        Magnitude at echo time 0.
    step
        What was done.
    """
    return stage_wf(
        "relaxation",
        method,
        inputs=("magnitude", "mask", "echo_times"),
        outputs=("r2star", "t2star", "s0", "step"),
        parameters=parameters,
        omp_nthreads=omp_nthreads,
        use_gpu=use_gpu,
        name=name,
    )
