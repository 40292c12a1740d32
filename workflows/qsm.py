"""From multi-echo magnitude and phase to a susceptibility map: the whole chain."""

from typing import Any

from nipype.pipeline.engine import Node, Workflow

from qsmpipe.chain import DEFAULT_CHAIN, Chain
from qsmpipe.interfaces.mask import ExcludeResidual
from qsmpipe.maps import given_by
from qsmpipe.workflows.assembly import Assembly, Wires, lists_maps, take
from qsmpipe.workflows.field import init_field_wf
from qsmpipe.workflows.mask import init_mask_wf
from qsmpipe.workflows.phase import AS_STORED, init_phase_wf
from qsmpipe.workflows.phase import INPUTS as IMAGES
from qsmpipe.workflows.relaxation import init_relaxation_wf
from qsmpipe.workflows.stage import estimate_needs
from qsmpipe.workflows.susceptibility import OUTPUTS as SUSCEPTIBILITY
from qsmpipe.workflows.susceptibility import init_susceptibility_wf
from qsmpipe.workflows.swi import init_swi_wf
from qsmpipe.workflows.unwrap import init_unwrap_wf

INPUTS = (*IMAGES, "field_strength", "mask", "region")

OUTPUTS = (*given_by("qsm", "susceptibility"), "reference_value", "b0_direction", "steps")

FOR_SUSCEPTIBILITY = (
    "field", "noise", "b0_direction", "phase", "magnitude", "combined", "r2star", "echo_times",
    "field_strength", "region",
)  # fmt: skip


@lists_maps("qsm", "susceptibility")
def init_qsm_wf(
    *,
    echoes: int,
    chain: Chain = DEFAULT_CHAIN,
    omp_nthreads: int = 1,
    use_gpu: bool = False,
    name: str = "qsm_wf",
) -> Workflow:
    """Map susceptibility from the echoes of one gradient-echo acquisition.

    Parameters
    ----------
    echoes : int
        Number of echoes. With one there is neither an offset removal nor a relaxation fit.
    chain : Chain
        Methods of all stages and their parameters: ``Chain(inversion="tv")``.
    omp_nthreads : int
        CPU threads of a node.
    use_gpu : bool
        Run what can on CUDA; each such node takes one GPU slot.
    name : str
        Name of the workflow.

    Inputs
    ------
    magnitude, phase
        Lists of files, one per echo, in the order of ``echo_times``. Phase is
        ``phase_slope * value + phase_intercept`` (rad).
    real, imag
        Lists of files, instead of magnitude and phase.
    phase_slope, phase_intercept, phase_sign, alternating, slice_axes
        How to read the phase: to radians (1 and 0 by default, or one number per echo), +1 or -1
        (-1 where the scanner counts precession the other way round, as GE does), and along which
        voxel axes every second plane is shifted by pi, or each plane has an offset of its own.
    b0_direction
        Unit vector along B0 in voxel axes (optional): from the header of the images by default.
    echo_times
        Echo times (s).
    field_strength
        B0 (T): best the imaging frequency over 42.577478518 MHz/T.
    mask
        Brain mask on the same grid, with ``mask="given"``.
    region
        Mask of the reference region, with ``reference="region"``.

    Outputs
    -------
    {maps}
    reference_value
        What was subtracted from susceptibility (ppm).
    b0_direction
        Unit vector along B0 in voxel axes.
    steps
        List of what was done: stage, method, parameters, convergence, warnings.

    Raises
    ------
    ValueError
        If a choice does not exist or does not go with the others, or the reference needs R2* and
        there is none.
    """
    chain.check()
    _check_reference(chain, echoes)
    threads: dict[str, Any] = {"omp_nthreads": omp_nthreads, "use_gpu": use_gpu}
    qsm = Assembly(name, INPUTS, OUTPUTS)
    qsm.inputnode.inputs.trait_set(**AS_STORED)
    wires = qsm.wires

    def chosen(stage: str) -> dict[str, Any]:
        return {"parameters": chain.parameters_of(stage, getattr(chain, stage)), **threads}

    wires |= qsm.add(
        init_phase_wf(echoes=echoes, offset=chain.offset, **chosen("offset")),
        take(wires, *IMAGES),
        ("magnitude", "combined", "phase", "offset", "b0_direction"),
        steps="steps",
    )
    wires |= qsm.add(
        init_mask_wf(
            method=chain.mask,
            parameters=chain.parameters.get("mask", {}),
            erosion=chain.mask_erosion,
            **threads,
        ),
        take(wires, "magnitude", "phase", "echo_times", mask_given="mask"),
        ("mask", "quality"),
        steps="steps",
    )
    wires |= qsm.add(
        init_unwrap_wf(method=chain.unwrap, **chosen("unwrap")),
        take(wires, "magnitude", "phase", "mask", "echo_times"),
        unwrapped="phase",
    )
    wires |= qsm.add(
        init_field_wf(method=chain.field, **chosen("field")),
        take(wires, "magnitude", "mask", "echo_times", "field_strength", phase="unwrapped"),
        ("field", "noise", "residual"),
    )
    if chain.relaxation != "none" and echoes > 1:
        wires |= qsm.add(
            init_relaxation_wf(method=chain.relaxation, **chosen("relaxation")),
            take(wires, "magnitude", "mask", "echo_times"),
            ("r2star", "t2star", "s0"),
        )
    if chain.swi != "none":
        wires |= qsm.add(
            init_swi_wf(method=chain.swi, **chosen("swi")),
            take(wires, "phase", "magnitude", "mask", "echo_times", "b0_direction"),
            ("swi", "minip"),
        )
    masks = _add_masks(qsm, wires, chain)
    wires |= qsm.add(
        init_susceptibility_wf(chain=chain, **threads),
        {name: wire for name, wire in wires.items() if name in FOR_SUSCEPTIBILITY} | masks,
        [name for name in SUSCEPTIBILITY if name != "steps"],
        steps="steps",
    )
    workflow = qsm.finish({name: wires[name] for name in OUTPUTS if name in wires})
    estimate_needs(workflow, echoes=echoes)
    return workflow


def _check_reference(chain: Chain, echoes: int) -> None:
    """Refuse a reference that is found by R2* where there is none."""
    if chain.reference == "csf" and (chain.relaxation == "none" or echoes < 2):
        msg = (
            f"reference 'csf' finds the ventricles by their R2*, and there is none: relaxation is "
            f"{chain.relaxation!r}, the acquisition has {echoes} echo(es). Fit R2* to two echoes "
            "or more, or choose another reference"
        )
        raise ValueError(msg)


def _add_masks(qsm: Assembly, wires: Wires, chain: Chain) -> Wires:
    """Tell where susceptibility is to be mapped, and by the first of two passes."""
    trusted = take(wires, "mask")
    if chain.mask_residual > 0:
        node = Node(ExcludeResidual(threshold=chain.mask_residual), name="exclude_residual")
        trusted = qsm.add(node, take(wires, "mask", "residual"), ["mask"])
    if not chain.two_pass:
        return trusted
    # The second pass is there for what the first leaves out.
    return take(wires, "mask", "quality") | {"first_mask": trusted["mask"]}
