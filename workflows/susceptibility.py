"""From the total field to susceptibility, by one inversion or by several side by side."""

from collections.abc import Mapping
from typing import Any, TypeAlias

from nipype.interfaces.utility import IdentityInterface, Merge
from nipype.pipeline.engine import Node, Workflow

from qsmpipe.interfaces.passes import MergePasses, Reliable
from qsmpipe.interfaces.reference import MedianMap
from qsmpipe.methods import METHODS, names_in, needs_background
from qsmpipe.workflows.background import init_background_wf
from qsmpipe.workflows.inversion import init_inversion_wf
from qsmpipe.workflows.reference import init_reference_wf
from qsmpipe.workflows.uncertainty import init_uncertainty_wf

INPUTS = (
    "field", "noise", "mask", "b0_direction", "phase", "magnitude", "combined", "r2star",
    "echo_times", "field_strength", "region", "first_mask", "quality",
)  # fmt: skip

Wire: TypeAlias = tuple[Any, str]
"""A node, or a workflow, and one of its outputs."""

OUTPUTS = (
    "chi", "unreferenced", "reference_value", "local_field", "qsm_mask", "reference_region",
    "compared", "median", "deviation", "steps",
)  # fmt: skip


def init_susceptibility_wf(
    *,
    background: str = "pdf",
    inversion: str = "tfi",
    reference: str = "brain",
    uncertainty: int = 0,
    two_pass: bool = False,
    parameters: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
    omp_nthreads: int = 1,
    use_gpu: bool = False,
    name: str = "susceptibility_wf",
) -> Workflow:
    """Remove the background, invert the dipole and reference the map.

    Parameters
    ----------
    background : str
        A method, or several that follow on one another, as in ``"lbv+vsharp"``. It gives the
        local field, and may be ``"none"`` where no inversion starts from that.
    inversion : str
        A method, or several that share what comes before them, as in ``"tv,rts"``.
    reference : str
        A method of :func:`qsmpipe.workflows.reference.init_reference_wf`.
    uncertainty : int
        With how many noisy fields to estimate the standard deviation of the first inversion's
        map; 0: not at all.
    two_pass : bool
        Map susceptibility twice, where the phase is reliable and in the whole mask, and fill the
        holes of the first map from the second.
    parameters : mapping, optional
        Stage to method to parameter to value, where the default is not wanted.
    omp_nthreads : int
        CPU threads of a node.
    use_gpu : bool
        Run what can on CUDA; each such node takes one GPU slot.
    name : str
        Name of the workflow.

    Inputs
    ------
    field, noise
        Total field and its standard deviation (ppm).
    mask
        Where they are known.
    b0_direction
        Unit vector along B0 in voxel axes.
    phase, magnitude
        All echoes (echo last), phase in rad, wrapped; for the inversions that start from phase.
    combined, r2star
        Magnitude of all echoes combined, and R2* (1/s), for the methods that take them.
    echo_times, field_strength
        s and T, for the methods that work with phase.
    region
        Mask of the reference region, with ``reference="region"``.
    first_mask, quality
        With ``two_pass``: the mask that the first pass may take, ``mask`` or a part of it, and the
        phase quality, 0 to 1, that leaves holes in it.

    Outputs
    -------
    chi
        Susceptibility (ppm) by the first inversion, referenced; 0 outside ``qsm_mask``.
    unreferenced, reference_value
        The same before the reference was subtracted, and what was subtracted (ppm).
    reference_region
        The fluid whose mean it was, with ``reference="csf"``; undefined otherwise.
    local_field
        Field of the sources inside the mask (ppm); undefined with background ``"none"``. That of
        the whole mask, with ``two_pass``.
    qsm_mask
        Where ``chi`` is trusted: ``mask``, eroded as the background removal needs.
    compared, median
        With several inversions: the list of their maps (ppm), in their order, each referenced;
        and the median of these maps where all are known, referenced to the whole of that.
    deviation
        Standard deviation of ``chi`` (ppm) that the field's noise gives it, with ``uncertainty``.
    steps
        List of what was done.
    """
    inversions = names_in("inversion", inversion)
    backgrounds = names_in("background", background)
    threads: dict[str, Any] = {"omp_nthreads": omp_nthreads, "use_gpu": use_gpu}

    workflow = Workflow(name=name)
    inputnode = Node(IdentityInterface(fields=list(INPUTS)), name="inputnode")
    outputnode = Node(IdentityInterface(fields=list(OUTPUTS)), name="outputnode")
    done: list[tuple[Any, Any]] = []
    parts: dict[str, Workflow] = {}

    def one(stage: str, method: str) -> Mapping[str, Any]:
        return (parameters or {}).get(stage, {}).get(method, {})

    def branch(mask: Wire, suffix: str = "") -> tuple[Wire, list[tuple[Wire, Wire]]]:
        """Background and inversions in a mask: the local field; each map and where it is known."""
        total = {"field": (inputnode, "field"), "mask": mask}
        local = total
        for method in () if suffix and not needs_background(inversions) else backgrounds:
            background_wf = init_background_wf(
                method=method,
                parameters=one("background", method),
                name=f"background_{method}{suffix}_wf",
                **threads,
            )
            workflow.connect([
                (inputnode, background_wf, [(x, f"inputnode.{x}") for x in (
                    "noise", "b0_direction")]),
                *((node, background_wf, [(output, f"inputnode.{x}")])
                  for x, (node, output) in local.items()),
            ])  # fmt: skip
            local = {x: (background_wf, f"outputnode.{x}") for x in ("field", "mask")}
            parts[f"{method}{suffix}"] = background_wf
            done.append((background_wf, "outputnode.step"))
        maps = []
        for method in inversions:
            starts_from = METHODS["inversion"][method].starts_from
            source = local if starts_from == "local field" else total
            inversion_wf = init_inversion_wf(
                method=method,
                parameters=one("inversion", method),
                name=f"inversion_{method}{suffix}_wf",
                **threads,
            )
            workflow.connect([
                (inputnode, inversion_wf, [(x, f"inputnode.{x}") for x in (
                    "b0_direction", "echo_times", "field_strength")]),
            ])  # fmt: skip
            workflow.connect(*source["mask"], inversion_wf, "inputnode.mask")
            if starts_from == "phase":
                workflow.connect([(inputnode, inversion_wf, [(x, f"inputnode.{x}") for x in (
                    "phase", "magnitude")])])  # fmt: skip
            else:
                workflow.connect([
                    (inputnode, inversion_wf, [("noise", "inputnode.noise"),
                                               ("r2star", "inputnode.r2star"),
                                               ("combined", "inputnode.magnitude")]),
                ])  # fmt: skip
                workflow.connect(*source["field"], inversion_wf, "inputnode.field")
            done.append((inversion_wf, "outputnode.step"))
            parts[f"{method}{suffix}"] = inversion_wf
            maps.append(((inversion_wf, "outputnode.chi"), source["mask"]))
        return local["field"], maps

    mapped: list[tuple[Wire, Wire]] = []
    if two_pass:
        reliable = Node(Reliable(num_threads=omp_nthreads), name="reliable")
        workflow.connect([(inputnode, reliable, [("quality", "quality"), ("first_mask", "mask")])])
        done.append((reliable, "step"))
        _, first = branch((reliable, "mask"), "_reliable")
    local_field, mapped = branch((inputnode, "mask"))
    if backgrounds:
        workflow.connect(*local_field, outputnode, "local_field")
    if two_pass:
        for n, method in enumerate(inversions):
            passes = Node(MergePasses(num_threads=omp_nthreads), name=f"passes_{method}")
            (filled, mask), (holed, known) = mapped[n], first[n]
            workflow.connect(*holed, passes, "chi_reliable")
            workflow.connect(*known, passes, "reliable")
            workflow.connect(*filled, passes, "chi_filled")
            mapped[n] = ((passes, "chi"), mask)

    maps, masks = [], []
    for method, (chi, mask) in zip(inversions, mapped, strict=True):
        reference_wf = init_reference_wf(
            method=reference,
            parameters=one("reference", reference),
            name=f"reference_{method}_wf",
        )
        workflow.connect([
            (inputnode, reference_wf, [("region", "inputnode.region"),
                                       ("r2star", "inputnode.r2star"),
                                       ("combined", "inputnode.magnitude")]),
        ])  # fmt: skip
        workflow.connect(*mask, reference_wf, "inputnode.mask")
        workflow.connect(*chi, reference_wf, "inputnode.chi")
        step = "outputnode.step"
        done.append((reference_wf, (step, _of, method) if len(inversions) > 1 else step))
        maps.append((reference_wf, "outputnode.chi"))
        masks.append(mask)
        if method == inversions[0]:
            workflow.connect(*mask, outputnode, "qsm_mask")
            workflow.connect(*chi, outputnode, "unreferenced")
            workflow.connect([
                (reference_wf, outputnode, [("outputnode.chi", "chi"),
                                            ("outputnode.value", "reference_value"),
                                            ("outputnode.region", "reference_region")]),
            ])  # fmt: skip
            referenced = reference_wf

    def merged(outputs: list[tuple[Any, Any]], name: str) -> Node:
        node = Node(Merge(len(outputs)), name=name)
        for n, (part, output) in enumerate(outputs, 1):
            workflow.connect(part, output, node, f"in{n}")
        return node

    if uncertainty:
        main = inversions[0]
        before = backgrounds if METHODS["inversion"][main].starts_from == "local field" else ()
        uncertainty_wf = init_uncertainty_wf(
            background=before,
            inversion=main,
            reference=reference if reference in ("brain", "none") else "region",
            realisations=uncertainty,
            **threads,
        )
        workflow.connect([
            (inputnode, uncertainty_wf, [(x, f"inputnode.{x}") for x in (
                "field", "noise", "mask", "b0_direction", "r2star", "echo_times",
                "field_strength")] + [("combined", "inputnode.magnitude")]),
            (parts[main], uncertainty_wf, [("outputnode.step", "inputnode.inversion")]),
            (uncertainty_wf, outputnode, [("outputnode.deviation", "deviation")]),
        ])  # fmt: skip
        if reference == "csf":
            workflow.connect(referenced, "outputnode.region", uncertainty_wf, "inputnode.region")
        elif reference == "region":
            workflow.connect(inputnode, "region", uncertainty_wf, "inputnode.region")
        if before:
            trail = merged([(parts[x], "outputnode.step") for x in before], "background_steps")
            workflow.connect(trail, "out", uncertainty_wf, "inputnode.background")
        done.append((uncertainty_wf, "outputnode.step"))
    workflow.connect(merged(done, "steps"), "out", outputnode, "steps")
    if len(inversions) > 1:
        compared = merged(maps, "maps")
        median = Node(MedianMap(num_threads=omp_nthreads), name="median")
        workflow.connect([
            (compared, median, [("out", "maps")]),
            (merged(masks, "masks"), median, [("out", "masks")]),
            (compared, outputnode, [("out", "compared")]),
            (median, outputnode, [("chi", "median")]),
        ])  # fmt: skip
    return workflow


def _of(step: dict, inversion: str) -> dict:
    """Say which inversion's map a step belongs to."""
    return {**step, "inversion": inversion}
