"""From phase and magnitude to susceptibility-weighted images."""

from collections.abc import Mapping
from typing import Any

from nipype.pipeline.engine import Workflow

from qsmpipe.workflows.stage import stage_wf


def init_swi_wf(
    *,
    method: str = "homodyne",
    parameters: Mapping[str, Any] | None = None,
    omp_nthreads: int = 1,
    use_gpu: bool = False,
    name: str = "swi_wf",
) -> Workflow:
    """Weight the magnitude by the phase.

    Parameters
    ----------
    method : str
        A key of ``METHODS["swi"]`` in :mod:`qsmpipe.methods`.
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
        Phase (rad), wrapped or not, echoes last, without the offset common to all echoes; it
        grows with the field.
    magnitude
        Magnitude of the same echoes.
    mask
        What to image.
    echo_times
        Echo times (s).
    b0_direction
        Unit vector along B0 in voxel axes; from the affine of ``phase`` when not given.

    Outputs
    -------
    swi
        Susceptibility-weighted image; 0 outside ``mask``.
    minip
        Its minimum over a slab around each slice, on the same grid.
    step
        What was done.
    """
    return stage_wf(
        "swi",
        method,
        inputs=("phase", "magnitude", "mask", "echo_times", "b0_direction"),
        outputs=("swi", "minip", "step"),
        parameters=parameters,
        omp_nthreads=omp_nthreads,
        use_gpu=use_gpu,
        name=name,
    )
