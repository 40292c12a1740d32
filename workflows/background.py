"""From the total to the local field."""

from collections.abc import Mapping
from typing import Any

from nipype.pipeline.engine import Workflow

from qsmpipe.chain import Chain
from qsmpipe.workflows.stage import stage_wf


def init_background_wf(
    *,
    method: str = Chain.background,
    parameters: Mapping[str, Any] | None = None,
    omp_nthreads: int = 1,
    use_gpu: bool = False,
    name: str = "background_wf",
) -> Workflow:
    """Remove the field of all sources outside the mask.

    Parameters
    ----------
    method : str
        A key of ``METHODS["background"]`` in :mod:`qsmpipe.methods`.
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
    field
        Total field (ppm).
    mask
        Where ``field`` is known.
    noise
        Standard deviation of ``field``, up to a scale; optional, and of use to PDF alone.
    b0_direction
        Unit vector along B0 in voxel axes; of use to PDF alone, which takes it from the affine of
        ``field`` when it is not given.

    Outputs
    -------
    field
        Field of the sources inside ``mask`` (ppm); 0 outside.
    mask
        Where the local field is trusted: what uses spherical means loses a rim, PDF and LBV none.
    step
        What was done.
    """
    return stage_wf(
        "background",
        method,
        inputs=("field", "mask", "noise", "b0_direction"),
        outputs=("field", "mask", "step"),
        parameters=parameters,
        omp_nthreads=omp_nthreads,
        use_gpu=use_gpu,
        name=name,
    )
