"""From the total to the local field."""

from collections.abc import Mapping
from typing import Any

from nipype.interfaces.utility import IdentityInterface
from nipype.pipeline.engine import Node, Workflow

from qsmpipe.methods import interface_of


def init_background_wf(
    *,
    method: str = "vsharp",
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
        Where the local field is trusted: V-SHARP and RESHARP lose a rim, PDF none.
    step
        What was done.
    """
    inputs = ("field", "mask", "noise", "b0_direction")
    outputs = ("field", "mask", "step")
    workflow = Workflow(name=name)
    inputnode = Node(IdentityInterface(fields=list(inputs)), name="inputnode")
    outputnode = Node(IdentityInterface(fields=list(outputs)), name="outputnode")
    interface = interface_of("background", method)(
        num_threads=omp_nthreads, use_gpu=use_gpu, **(parameters or {})
    )
    remove = Node(interface, name=method, n_procs=omp_nthreads)

    workflow.connect([
        (inputnode, remove, [(field, field) for field in inputs]),
        (remove, outputnode, [(field, field) for field in outputs]),
    ])  # fmt: skip
    return workflow
