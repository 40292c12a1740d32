"""From the scanner's images to magnitude and phase in radians, free of its offset."""

from collections.abc import Mapping
from typing import Any

from nipype.interfaces.utility import IdentityInterface, Merge
from nipype.pipeline.engine import Node, Workflow

from qsmpipe.chain import Chain
from qsmpipe.interfaces.phase import Prepare
from qsmpipe.workflows.offset import init_offset_wf
from qsmpipe.workflows.stage import estimate_needs, take_gpus

INPUTS = (
    "magnitude", "phase", "real", "imag", "phase_slope", "phase_intercept", "phase_sign",
    "alternating", "slice_axes", "b0_direction", "echo_times",
)  # fmt: skip

AS_STORED: dict[str, Any] = {
    "phase_slope": [1.0], "phase_intercept": [0.0], "phase_sign": 1, "alternating": [],
    "slice_axes": [],
}  # fmt: skip
"""How phase is read where nothing is said."""


def init_phase_wf(
    *,
    echoes: int = 2,
    offset: str = Chain.offset,
    parameters: Mapping[str, Any] | None = None,
    omp_nthreads: int = 1,
    use_gpu: bool = False,
    name: str = "phase_wf",
) -> Workflow:
    """Read magnitude and phase of all echoes and remove the phase offset.

    Parameters
    ----------
    echoes : int
        Number of echoes; with one, no offset can be told from the field, and none is removed.
    offset : str
        A key of ``METHODS["offset"]`` in :mod:`qsmpipe.methods`, or ``"none"``.
    parameters : mapping, optional
        Parameters of the offset's method, where the default is not wanted.
    omp_nthreads : int
        CPU threads.
    use_gpu : bool
        Run on CUDA what can.
    name : str
        Name of the workflow.

    Inputs
    ------
    magnitude, phase
        Lists of files, one per echo, in the order of ``echo_times``.
    real, imag
        Lists of files, instead of magnitude and phase.
    phase_slope, phase_intercept
        Phase is ``phase_slope * value + phase_intercept`` (rad); 1 and 0 by default. One number
        for all echoes, or a list with one per echo.
    phase_sign
        -1 where a paramagnetic field lowers the phase (GE), else 1, the default.
    alternating
        List of the voxel axes along which every second plane is shifted by pi; [] by default.
    slice_axes
        List of the voxel axes along which each plane has a phase offset of its own, alike in all
        echoes, which is then removed; [] by default.
    b0_direction
        Unit vector along B0 in voxel axes (optional): from the header of the images by default.
    echo_times
        Echo times (s).

    Outputs
    -------
    magnitude
        Magnitude, echoes last.
    combined
        Root of the sum of squares of the magnitude over the echoes.
    phase
        Phase (rad) in (-pi, pi], echoes last, without its offset.
    offset
        Phase at echo time 0 (rad); undefined where none was removed.
    b0_direction
        Unit vector along B0 in voxel axes.
    steps
        List of what was done.
    """
    fields = ["magnitude", "combined", "phase", "offset", "b0_direction", "steps"]
    remove = offset != "none" and echoes > 1
    workflow = Workflow(name=name)
    inputnode = Node(IdentityInterface(fields=list(INPUTS)), name="inputnode")
    inputnode.inputs.trait_set(**AS_STORED)
    outputnode = Node(IdentityInterface(fields=fields), name="outputnode")
    prepare = Node(
        Prepare(num_threads=omp_nthreads, use_gpu=use_gpu), name="prepare", n_procs=omp_nthreads
    )
    steps = Node(Merge(2 if remove else 1), name="steps", run_without_submitting=True)

    workflow.connect([
        (inputnode, prepare, [(field, field) for field in INPUTS]),
        (prepare, steps, [("step", "in1")]),
        (prepare, outputnode, [("magnitude", "magnitude"), ("combined", "combined"),
                               ("b0_direction", "b0_direction")]),
        (steps, outputnode, [("out", "steps")]),
    ])  # fmt: skip
    if not remove:
        workflow.connect(prepare, "phase", outputnode, "phase")
        take_gpus(workflow)
        estimate_needs(workflow)
        return workflow
    offset_wf = init_offset_wf(
        method=offset, parameters=parameters, omp_nthreads=omp_nthreads, use_gpu=use_gpu
    )
    workflow.connect([
        (inputnode, offset_wf, [("echo_times", "inputnode.echo_times")]),
        (prepare, offset_wf, [("phase", "inputnode.phase"), ("magnitude", "inputnode.magnitude")]),
        (offset_wf, steps, [("outputnode.step", "in2")]),
        (offset_wf, outputnode, [("outputnode.phase", "phase"), ("outputnode.offset", "offset")]),
    ])  # fmt: skip
    take_gpus(workflow)
    estimate_needs(workflow)
    return workflow
