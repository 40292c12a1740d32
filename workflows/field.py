"""From the unwrapped phase of all echoes to the total field."""

from collections.abc import Mapping
from typing import Any

from nipype.pipeline.engine import Workflow

from qsmpipe.chain import Chain
from qsmpipe.workflows.stage import stage_wf


def init_field_wf(
    *,
    method: str = Chain.field,
    parameters: Mapping[str, Any] | None = None,
    omp_nthreads: int = 1,
    use_gpu: bool = False,
    name: str = "field_wf",
) -> Workflow:
    """Compute the total field and its noise.

    Parameters
    ----------
    method : str
        A key of ``METHODS["field"]`` in :mod:`qsmpipe.methods`.
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
        Unwrapped phase (rad), echoes last.
    mask
        Where to compute.
    magnitude
        Magnitude, echoes last.
    echo_times
        Echo times (s).
    field_strength
        B0 (T).

    Outputs
    -------
    field
        Total field (ppm).
    noise
        Standard deviation of ``field`` (ppm).
    residual
        Signal that the fit leaves over the signal itself.
    step
        What was done.
    """
    return stage_wf(
        "field",
        method,
        inputs=("phase", "mask", "magnitude", "echo_times", "field_strength"),
        outputs=("field", "noise", "residual", "step"),
        parameters=parameters,
        omp_nthreads=omp_nthreads,
        use_gpu=use_gpu,
        name=name,
    )
