"""From susceptibility up to a constant to susceptibility relative to something."""

from nipype.interfaces.utility import IdentityInterface
from nipype.pipeline.engine import Node, Workflow

from qsmpipe.interfaces.reference import Reference

METHODS = ("brain", "none", "region")
"""The mean over the mask becomes 0, nothing changes, or the mean over a region becomes 0."""


def init_reference_wf(
    *,
    method: str = "brain",
    omp_nthreads: int = 1,
    use_gpu: bool = False,
    name: str = "reference_wf",
) -> Workflow:
    """Make susceptibility relative to the whole mask or to a region.

    Parameters
    ----------
    method : {"brain", "none", "region"}
        Subtract the mean over ``mask``, nothing, or the mean over ``region``.
    omp_nthreads : int
        CPU threads.
    use_gpu : bool
        Taken for the sake of one signature; a mean needs none.
    name : str
        Name of the workflow.

    Inputs
    ------
    chi
        Susceptibility (ppm).
    mask
        Where ``chi`` is known.
    region
        Mask of the reference region, with ``"region"``.

    Outputs
    -------
    chi
        Susceptibility (ppm), referenced.
    value
        What was subtracted (ppm).
    deviation
        Standard deviation over the region (ppm); undefined with ``"none"``.
    step
        What was done.
    """
    if method not in METHODS:
        msg = f"reference has no method {method!r}: choose from {', '.join(METHODS)}"
        raise ValueError(msg)
    workflow = Workflow(name=name)
    inputnode = Node(IdentityInterface(fields=["chi", "mask", "region"]), name="inputnode")
    outputnode = Node(
        IdentityInterface(fields=["chi", "value", "deviation", "step"]), name="outputnode"
    )
    if method == "none":
        outputnode.inputs.value = 0.0
        outputnode.inputs.step = {
            "stage": "reference", "method": "none", "parameters": {}, "warnings": [],
        }  # fmt: skip
        workflow.connect([(inputnode, outputnode, [("chi", "chi")])])
        return workflow

    used = ("chi", "mask", "region") if method == "region" else ("chi", "mask")
    node = Node(Reference(num_threads=omp_nthreads), name=method, n_procs=omp_nthreads)
    workflow.connect([
        (inputnode, node, [(field, field) for field in used]),
        (node, outputnode, [(x, x) for x in ("chi", "value", "deviation", "step")]),
    ])  # fmt: skip
    return workflow
