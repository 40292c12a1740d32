"""From susceptibility up to a constant to susceptibility relative to something."""

from collections.abc import Mapping
from typing import Any

from nipype.interfaces.utility import IdentityInterface
from nipype.pipeline.engine import Node, Workflow

from qsmpipe.interfaces.reference import CSFReference, Reference
from qsmpipe.workflows.stage import estimate_needs

METHODS = ("brain", "none", "region", "csf")
"""The mean over the mask becomes 0, nothing changes, the mean over a region becomes 0, or that of
the cerebrospinal fluid of the ventricles."""


def init_reference_wf(
    *,
    method: str = "brain",
    parameters: Mapping[str, Any] | None = None,
    omp_nthreads: int = 1,
    use_gpu: bool = False,
    name: str = "reference_wf",
) -> Workflow:
    """Make susceptibility relative to the whole mask or to a region.

    Parameters
    ----------
    method : {"brain", "none", "region", "csf"}
        Subtract the mean over ``mask``, nothing, the mean over ``region``, or the mean over the
        fluid of the ventricles, which is found by its R2*; where there is none to be found, the
        node fails.
    parameters : mapping, optional
        Parameters of ``"csf"``, where the default is not wanted: ``{"threshold": 8.0}``.
    omp_nthreads, use_gpu : int, bool
        Taken for the sake of one signature; a mean needs neither.
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
    r2star, magnitude
        R2* (1/s), with ``"csf"``, and magnitude, which keeps voxels without signal out of the
        fluid (optional).

    Outputs
    -------
    chi
        Susceptibility (ppm), referenced.
    value
        What was subtracted (ppm).
    deviation
        Standard deviation over the region (ppm); undefined with ``"none"``.
    region
        The fluid, with ``"csf"``; undefined otherwise.
    step
        What was done.
    """
    if method not in METHODS:
        msg = f"reference has no method {method!r}: choose from {', '.join(METHODS)}"
        raise ValueError(msg)
    workflow = Workflow(name=name)
    inputnode = Node(
        IdentityInterface(fields=["chi", "mask", "region", "r2star", "magnitude"]),
        name="inputnode",
    )
    outputnode = Node(
        IdentityInterface(fields=["chi", "value", "deviation", "region", "step"]),
        name="outputnode",
    )
    if method == "none":
        outputnode.inputs.value = 0.0
        outputnode.inputs.step = {
            "stage": "reference", "method": "none", "parameters": {}, "warnings": [],
        }  # fmt: skip
        workflow.connect([(inputnode, outputnode, [("chi", "chi")])])
        return workflow

    used = ["chi", "mask", *{"region": ["region"], "csf": ["r2star", "magnitude"]}.get(method, [])]
    interface = CSFReference(**(parameters or {})) if method == "csf" else Reference()
    node = Node(interface, name=method)
    workflow.connect([
        (inputnode, node, [(field, field) for field in used]),
        (node, outputnode, [(x, x) for x in ("chi", "value", "deviation", "step")]),
    ])  # fmt: skip
    if method == "csf":
        workflow.connect(node, "region", outputnode, "region")
    estimate_needs(workflow)
    return workflow
