"""From the local fields of one head at several orientations to one susceptibility map."""

from collections.abc import Mapping
from typing import Any

from nipype.interfaces.utility import IdentityInterface, Merge
from nipype.pipeline.engine import Node, Workflow

from qsmpipe.interfaces.cosmos import RegisterRigid, ResampleTo
from qsmpipe.workflows.stage import estimate_needs, interface_with, take_gpus

INPUTS = ("magnitude", "brain_mask", "local_field", "mask", "noise", "b0_direction")


def init_cosmos_wf(
    *,
    orientations: int,
    parameters: Mapping[str, Any] | None = None,
    omp_nthreads: int = 1,
    use_gpu: bool = False,
    name: str = "cosmos_wf",
) -> Workflow:
    """Register all orientations to the first, and invert their fields together (COSMOS).

    Parameters
    ----------
    orientations : int
        How many there are, 2 or more.
    parameters : mapping, optional
        Parameters of :func:`qsmpipe.numerics.inversion.cosmos.cosmos`, where the default is not
        wanted.
    omp_nthreads : int
        CPU threads of a node.
    use_gpu : bool
        Run the inversion on CUDA.
    name : str
        Name of the workflow.

    Inputs
    ------
    magnitude
        List of magnitudes, echoes combined, one for each orientation; so are all inputs.
    brain_mask
        List of brain masks, by which the magnitudes are registered.
    local_field
        List of the fields (ppm) of the sources inside ``mask``.
    mask
        List of masks where the fields are known.
    noise
        List of the fields' standard deviations (ppm).
    b0_direction
        List of unit vectors along B0, each in the voxel axes of its own orientation.

    Outputs
    -------
    chi
        Susceptibility (ppm) on the grid of the first orientation, not referenced; 0 outside
        ``mask``.
    mask
        Where 2 or more orientations know their field.
    b0_directions
        List of unit vectors along B0 in the voxel axes of the first orientation.
    transforms
        List of text files, 4 x 4, for the second and later orientations: world coordinates (mm,
        RAS+) of the first to those of the other.
    step
        What was done.

    Raises
    ------
    ValueError
        If there are fewer than 2 orientations.
    """
    if orientations < 2:
        msg = f"COSMOS needs 2 orientations or more, and there is {orientations}"
        raise ValueError(msg)
    workflow = Workflow(name=name)
    inputnode = Node(IdentityInterface(fields=list(INPUTS)), name="inputnode")
    outputnode = Node(
        IdentityInterface(fields=["chi", "mask", "b0_directions", "transforms", "step"]),
        name="outputnode",
    )
    merged = {
        key: Node(Merge(count), name=key, run_without_submitting=True)
        for key, count in (
            ("fields", orientations), ("masks", orientations), ("noises", orientations),
            ("b0_directions", orientations), ("transforms", orientations - 1),
        )
    }  # fmt: skip
    merged["b0_directions"].inputs.no_flatten = True
    for n in range(orientations):
        _add_orientation(workflow, inputnode, merged, n, omp_nthreads)
    invert = Node(
        interface_with(
            "cosmos", "cosmos", parameters or {}, num_threads=omp_nthreads, use_gpu=use_gpu
        ),
        name="cosmos",
        n_procs=1 if use_gpu else omp_nthreads,
    )
    workflow.connect([
        *((node, invert, [("out", key)]) for key, node in merged.items()),
        (merged["b0_directions"], outputnode, [("out", "b0_directions")]),
        (merged["transforms"], outputnode, [("out", "transforms")]),
        (invert, outputnode, [(x, x) for x in ("chi", "mask", "step")]),
    ])  # fmt: skip
    take_gpus(workflow)
    estimate_needs(workflow)
    return workflow


def _add_orientation(
    workflow: Workflow, inputnode: Node, merged: Mapping[str, Node], n: int, threads: int
) -> None:
    """Bring an orientation onto the grid of the first one; ``merged`` collects what it gives."""
    resample = Node(ResampleTo(num_threads=threads), name=f"resample_{n + 1}")
    workflow.connect([
        (inputnode, resample, [(("local_field", _item, n), "field"),
                               (("mask", _item, n), "mask"),
                               (("noise", _item, n), "noise"),
                               (("b0_direction", _item, n), "b0_direction"),
                               (("local_field", _item, 0), "reference")]),
        (resample, merged["fields"], [("field", f"in{n + 1}")]),
        (resample, merged["masks"], [("mask", f"in{n + 1}")]),
        (resample, merged["noises"], [("noise", f"in{n + 1}")]),
        (resample, merged["b0_directions"], [("b0_direction", f"in{n + 1}")]),
    ])  # fmt: skip
    if n == 0:
        return
    register = Node(RegisterRigid(num_threads=threads), name=f"register_{n + 1}")
    workflow.connect([
        (inputnode, register, [(("magnitude", _item, 0), "fixed"),
                               (("brain_mask", _item, 0), "fixed_mask"),
                               (("magnitude", _item, n), "moving"),
                               (("brain_mask", _item, n), "moving_mask")]),
        (register, resample, [("transform", "transform")]),
        (register, merged["transforms"], [("transform", f"in{n}")]),
    ])  # fmt: skip


def _item(values: list, n: int) -> object:
    """One orientation's of a list."""
    return values[n]
