"""From multi-echo magnitude and phase to a susceptibility map: the whole chain."""

from collections.abc import Mapping
from typing import Any

from nipype.interfaces.utility import IdentityInterface, Merge
from nipype.pipeline.engine import Node, Workflow

from qsmpipe.interfaces.mask import ExcludeResidual
from qsmpipe.workflows.field import init_field_wf
from qsmpipe.workflows.mask import init_mask_wf
from qsmpipe.workflows.phase import init_phase_wf
from qsmpipe.workflows.relaxation import init_relaxation_wf
from qsmpipe.workflows.susceptibility import init_susceptibility_wf
from qsmpipe.workflows.swi import init_swi_wf
from qsmpipe.workflows.unwrap import init_unwrap_wf

INPUTS = (
    "magnitude", "phase", "real", "imag", "phase_slope", "phase_intercept", "phase_sign",
    "alternating", "echo_times", "field_strength", "mask", "region",
)  # fmt: skip

OUTPUTS = (
    "chi", "unreferenced", "reference_value", "qsm_mask", "mask", "quality", "magnitude",
    "combined", "phase", "offset", "unwrapped", "field", "noise", "local_field", "r2star",
    "t2star", "s0", "b0_direction", "steps", "compared", "median", "reference_region",
    "deviation",
    "swi", "minip",
)  # fmt: skip

Choices = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Stage to method to parameter to value."""


def init_qsm_wf(
    *,
    echoes: int,
    offset: str = "mcpc3ds",
    mask: str = "bet & quality",
    mask_erosion: float = 0.0,
    mask_residual: float = 0.0,
    unwrap: str = "romeo",
    field: str = "weighted",
    relaxation: str = "loglinear",
    swi: str = "none",
    background: str = "pdf",
    inversion: str = "tfi",
    reference: str = "brain",
    two_pass: bool = False,
    uncertainty: int = 0,
    parameters: Choices | None = None,
    omp_nthreads: int = 1,
    use_gpu: bool = False,
    name: str = "qsm_wf",
) -> Workflow:
    """Map susceptibility from the echoes of one gradient-echo acquisition.

    Parameters
    ----------
    echoes : int
        Number of echoes. With one there is neither an offset removal nor a relaxation fit.
    offset, unwrap, field, relaxation, swi : str
        Methods: keys of :data:`qsmpipe.methods.METHODS`. ``offset``, ``relaxation`` and ``swi``
        may be ``"none"``.
    background : str
        A method, or several that follow on one another, as in ``"lbv+vsharp"``. It gives the
        local field, and may be ``"none"`` where no inversion starts from that.
    inversion : str
        A method, or several that share what comes before them, as in ``"tv,rts"``: the first one
        gives ``chi``.
    mask : str
        A mask method, several joined by ``&``, ``|`` and brackets, or ``"given"`` for the input
        ``mask``.
    mask_erosion : float
        Erode the brain mask by this much (mm).
    mask_residual : float
        Before the background is removed, leave voxels out whose relative residual of the field
        fit is larger, 0.3 for example; 0 for none.
    reference : str
        ``"brain"``, ``"none"``, ``"region"`` for the mean over the input ``region``, or ``"csf"``
        for the fluid of the ventricles, which needs R2*.
    uncertainty : int
        With how many noisy fields to estimate the standard deviation of ``chi``; 0: not at all.
    two_pass : bool
        Map susceptibility where the phase is reliable and once more in the whole mask, and fill
        the holes of the first map from the second: sources that spoil the phase around them then
        spoil less of the map. It takes twice the time.
    parameters : mapping, optional
        Stage to method to parameter to value, where the default is not wanted:
        ``{"inversion": {"tv": {"lambda_": 1e-4}}}``.
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
    phase_slope, phase_intercept, phase_sign, alternating
        How to read the phase: to radians (1 and 0 by default), +1 or -1 (-1 where the scanner
        counts precession the other way round, as GE does), and whether every second slice is
        shifted by pi.
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
    chi
        Susceptibility (ppm) by the first inversion, referenced; 0 outside ``qsm_mask``.
    deviation
        Standard deviation of ``chi`` (ppm) that the field's noise gives it, with ``uncertainty``.
    compared, median
        With several inversions: the list of their maps (ppm), in their order, each referenced;
        and the median of these maps where all are known, referenced.
    unreferenced
        Susceptibility (ppm) before the reference was subtracted.
    reference_value
        What was subtracted (ppm).
    qsm_mask
        Where ``chi`` is trusted: the brain mask, eroded as the background removal needs.
    reference_region
        The fluid whose mean was subtracted, with ``reference="csf"``; undefined otherwise.
    mask, quality
        Brain mask, and phase quality in [0, 1].
    magnitude, phase
        All echoes (echo last), phase in rad, wrapped, offset removed.
    combined
        Magnitude, root of the sum of squares over echoes.
    offset
        The phase offset that was removed (rad); undefined where none was.
    unwrapped
        Unwrapped phase of all echoes (rad).
    field, noise, local_field
        Total field, its standard deviation, and the field of the sources inside the mask (ppm);
        the last undefined with background ``"none"``.
    r2star, t2star, s0
        1/s, s, and the unit of the magnitude; undefined for one echo.
    swi, minip
        Susceptibility-weighted image and its minimum intensity projection; undefined with
        ``swi="none"``.
    b0_direction
        Unit vector along B0 in voxel axes.
    steps
        List of what was done: stage, method, parameters, convergence, warnings.
    """
    if reference == "csf" and (relaxation == "none" or echoes < 2):
        msg = (
            f"reference 'csf' finds the ventricles by their R2*, and there is none: relaxation is "
            f"{relaxation!r}, the acquisition has {echoes} echo(es). Fit R2* to two echoes or "
            "more, or choose another reference"
        )
        raise ValueError(msg)
    chosen = parameters or {}
    threads: dict[str, Any] = {"omp_nthreads": omp_nthreads, "use_gpu": use_gpu}
    relax = relaxation != "none" and echoes > 1

    workflow = Workflow(name=name)
    inputnode = Node(IdentityInterface(fields=list(INPUTS)), name="inputnode")
    inputnode.inputs.trait_set(
        phase_slope=1.0, phase_intercept=0.0, phase_sign=1, alternating=False
    )
    outputnode = Node(IdentityInterface(fields=list(OUTPUTS)), name="outputnode")

    def one(stage: str, method: str) -> Mapping[str, Any]:
        return chosen.get(stage, {}).get(method, {})

    phase_wf = init_phase_wf(
        echoes=echoes, offset=offset, parameters=one("offset", offset), **threads
    )
    mask_wf = init_mask_wf(
        method=mask, parameters=chosen.get("mask", {}), erosion=mask_erosion, **threads
    )
    unwrap_wf = init_unwrap_wf(method=unwrap, parameters=one("unwrap", unwrap), **threads)
    field_wf = init_field_wf(method=field, parameters=one("field", field), **threads)
    done = [
        (phase_wf, "outputnode.steps"), (mask_wf, "outputnode.steps"),
        (unwrap_wf, "outputnode.step"), (field_wf, "outputnode.step"),
    ]  # fmt: skip

    workflow.connect([
        (inputnode, phase_wf, [(x, f"inputnode.{x}") for x in (
            "magnitude", "phase", "real", "imag", "phase_slope", "phase_intercept", "phase_sign",
            "alternating", "echo_times")]),
        (inputnode, mask_wf, [("echo_times", "inputnode.echo_times"),
                              ("mask", "inputnode.mask_given")]),
        (phase_wf, mask_wf, [("outputnode.magnitude", "inputnode.magnitude"),
                             ("outputnode.phase", "inputnode.phase")]),
        (inputnode, unwrap_wf, [("echo_times", "inputnode.echo_times")]),
        (phase_wf, unwrap_wf, [("outputnode.magnitude", "inputnode.magnitude"),
                               ("outputnode.phase", "inputnode.phase")]),
        (mask_wf, unwrap_wf, [("outputnode.mask", "inputnode.mask")]),
        (inputnode, field_wf, [("echo_times", "inputnode.echo_times"),
                               ("field_strength", "inputnode.field_strength")]),
        (phase_wf, field_wf, [("outputnode.magnitude", "inputnode.magnitude")]),
        (mask_wf, field_wf, [("outputnode.mask", "inputnode.mask")]),
        (unwrap_wf, field_wf, [("outputnode.phase", "inputnode.phase")]),
        (phase_wf, outputnode, [("outputnode.magnitude", "magnitude"),
                                ("outputnode.combined", "combined"),
                                ("outputnode.phase", "phase"),
                                ("outputnode.offset", "offset"),
                                ("outputnode.b0_direction", "b0_direction")]),
        (mask_wf, outputnode, [("outputnode.mask", "mask"), ("outputnode.quality", "quality")]),
        (unwrap_wf, outputnode, [("outputnode.phase", "unwrapped")]),
        (field_wf, outputnode, [("outputnode.field", "field"), ("outputnode.noise", "noise")]),
    ])  # fmt: skip

    relaxation_wf = None
    if relax:
        relaxation_wf = init_relaxation_wf(
            method=relaxation, parameters=one("relaxation", relaxation), **threads
        )
        workflow.connect([
            (inputnode, relaxation_wf, [("echo_times", "inputnode.echo_times")]),
            (phase_wf, relaxation_wf, [("outputnode.magnitude", "inputnode.magnitude")]),
            (mask_wf, relaxation_wf, [("outputnode.mask", "inputnode.mask")]),
            (relaxation_wf, outputnode, [("outputnode.r2star", "r2star"),
                                         ("outputnode.t2star", "t2star"),
                                         ("outputnode.s0", "s0")]),
        ])  # fmt: skip
        done.append((relaxation_wf, "outputnode.step"))

    if swi != "none":
        swi_wf = init_swi_wf(method=swi, parameters=one("swi", swi), **threads)
        workflow.connect([
            (inputnode, swi_wf, [("echo_times", "inputnode.echo_times")]),
            (phase_wf, swi_wf, [(f"outputnode.{x}", f"inputnode.{x}") for x in (
                "phase", "magnitude", "b0_direction")]),
            (mask_wf, swi_wf, [("outputnode.mask", "inputnode.mask")]),
            (swi_wf, outputnode, [("outputnode.swi", "swi"), ("outputnode.minip", "minip")]),
        ])  # fmt: skip
        done.append((swi_wf, "outputnode.step"))

    susceptibility_wf = init_susceptibility_wf(
        background=background,
        inversion=inversion,
        reference=reference,
        two_pass=two_pass,
        uncertainty=uncertainty,
        parameters=chosen,
        **threads,
    )
    workflow.connect([
        (inputnode, susceptibility_wf, [(x, f"inputnode.{x}") for x in (
            "echo_times", "field_strength", "region")]),
        (phase_wf, susceptibility_wf, [(f"outputnode.{x}", f"inputnode.{x}") for x in (
            "phase", "magnitude", "combined", "b0_direction")]),
        (field_wf, susceptibility_wf, [("outputnode.field", "inputnode.field"),
                                       ("outputnode.noise", "inputnode.noise")]),
        (susceptibility_wf, outputnode, [(f"outputnode.{x}", x) for x in (
            "chi", "unreferenced", "reference_value", "local_field", "qsm_mask", "compared",
            "median", "reference_region", "deviation")]),
    ])  # fmt: skip
    trusted: tuple[Any, str] = (mask_wf, "outputnode.mask")
    if mask_residual > 0:
        excluded = Node(
            ExcludeResidual(threshold=mask_residual, num_threads=omp_nthreads),
            name="exclude_residual",
            n_procs=omp_nthreads,
        )
        workflow.connect([
            (mask_wf, excluded, [("outputnode.mask", "mask")]),
            (field_wf, excluded, [("outputnode.residual", "residual")]),
        ])  # fmt: skip
        trusted = (excluded, "mask")
        done.append((excluded, "step"))
    if two_pass:  # the second pass is there for what the first leaves out
        workflow.connect(*trusted, susceptibility_wf, "inputnode.first_mask")
        workflow.connect(mask_wf, "outputnode.mask", susceptibility_wf, "inputnode.mask")
        workflow.connect(mask_wf, "outputnode.quality", susceptibility_wf, "inputnode.quality")
    else:
        workflow.connect(*trusted, susceptibility_wf, "inputnode.mask")
    if relaxation_wf:
        workflow.connect(relaxation_wf, "outputnode.r2star", susceptibility_wf, "inputnode.r2star")
    done.append((susceptibility_wf, "outputnode.steps"))

    steps = Node(Merge(len(done)), name="steps")
    for n, (part, output) in enumerate(done, 1):
        workflow.connect(part, output, steps, f"in{n}")
    workflow.connect(steps, "out", outputnode, "steps")
    return workflow
