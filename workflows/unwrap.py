"""From the wrapped to the unwrapped phase."""

from collections.abc import Mapping
from typing import Any

from nipype.pipeline.engine import Workflow

from qsmpipe.chain import Chain
from qsmpipe.methods import interface_of
from qsmpipe.workflows.stage import stage_wf


def init_unwrap_wf(
    *,
    method: str = Chain.unwrap,
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
        Run on CUDA. ROMEO and best path have no use for one and take no GPU slot.
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
    return stage_wf(
        "unwrap",
        method,
        inputs=("phase", "mask", "magnitude", "echo_times"),
        outputs=("phase", "step"),
        parameters=parameters,
        omp_nthreads=omp_nthreads,
        use_gpu=use_gpu and not interface_of("unwrap", method).serial,  # these grow on the CPU
        name=name,
    )
