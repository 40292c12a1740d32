"""From the total field to susceptibility, by one inversion or by several side by side."""

from typing import Any

from nipype.pipeline.engine import Node, Workflow

from qsmpipe.chain import DEFAULT_CHAIN, Chain
from qsmpipe.interfaces.passes import MergePasses, Reliable
from qsmpipe.interfaces.reference import MedianMap
from qsmpipe.maps import given_by
from qsmpipe.methods import METHODS, needs_background
from qsmpipe.workflows.assembly import Assembly, Wire, Wires, lists_maps, take
from qsmpipe.workflows.background import init_background_wf
from qsmpipe.workflows.inversion import init_inversion_wf
from qsmpipe.workflows.reference import init_reference_wf
from qsmpipe.workflows.uncertainty import init_uncertainty_wf

INPUTS = (
    "field", "noise", "mask", "b0_direction", "phase", "magnitude", "combined", "r2star",
    "echo_times", "field_strength", "region", "first_mask", "quality",
)  # fmt: skip

OUTPUTS = (*given_by("susceptibility"), "reference_value", "steps")


@lists_maps("susceptibility")
def init_susceptibility_wf(
    *,
    chain: Chain = DEFAULT_CHAIN,
    omp_nthreads: int = 1,
    use_gpu: bool = False,
    name: str = "susceptibility_wf",
) -> Workflow:
    """Remove the background, invert the dipole and reference the map.

    Parameters
    ----------
    chain : Chain
        What is done: its ``background``, ``inversion``, ``reference``, ``two_pass``,
        ``uncertainty`` and their ``parameters``.
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
    {maps}
    reference_value
        What was subtracted from susceptibility (ppm).
    steps
        List of what was done.

    Raises
    ------
    ValueError
        If a choice does not exist, or does not go with the others.
    """
    chain.check()
    graph = _Graph(name, chain, {"omp_nthreads": omp_nthreads, "use_gpu": use_gpu})
    inversions = chain.methods("inversion")
    holed: list[Wires] = []
    if chain.two_pass:
        node = Node(Reliable(), name="reliable")
        first = graph.add(node, take(graph.wires, "quality", mask="first_mask"), ["mask"])
        _, holed = _map_in(graph, first["mask"], "_reliable")
    fields, maps = _map_in(graph, graph.wires["mask"])
    if chain.two_pass:
        both = zip(inversions, holed, maps, strict=True)
        maps = [_fill_holes(graph, method, first, second) for method, first, second in both]
    referenced = [_reference(graph, *each) for each in zip(inversions, maps, strict=True)]

    given = take(referenced[0], "chi", reference_value="value", reference_region="region")
    given |= take(maps[0], unreferenced="chi", qsm_mask="mask")
    if chain.methods("background"):
        given |= take(fields[-1], local_field="field")
    if chain.uncertainty:
        given |= _estimate_deviation(graph, fields, maps[0], referenced[0])
    if len(inversions) > 1:
        given |= _compare(graph, referenced)
    return graph.finish(given)


class _Graph(Assembly):
    """The workflow of :func:`init_susceptibility_wf`, while it is put together."""

    def __init__(self, name: str, chain: Chain, threads: dict[str, Any]) -> None:
        super().__init__(name, INPUTS, OUTPUTS)
        self.chain, self.threads = chain, threads


def _map_in(graph: _Graph, mask: Wire, suffix: str = "") -> tuple[list[Wires], list[Wires]]:
    """Remove the background and invert the dipole in a mask.

    Returns
    -------
    fields, maps : list of dict
        As :func:`_remove_background` gives them, and what :func:`_invert` gives by each method.
    """
    inversions = graph.chain.methods("inversion")
    total = take(graph.wires, "field") | {"mask": mask}
    # The local field of the whole mask is a map of its own, and that of the first pass is not.
    unused = suffix and not needs_background(inversions)
    fields = [total] if unused else _remove_background(graph, total, suffix)
    return fields, [_invert(graph, method, fields, suffix) for method in inversions]


def _remove_background(graph: _Graph, total: Wires, suffix: str) -> list[Wires]:
    """Apply one method after the other: the field and its mask before, between and after them."""
    fields = [total]
    for method in graph.chain.methods("background"):
        part = init_background_wf(
            method=method,
            parameters=graph.chain.parameters_of("background", method),
            name=f"background_{method}{suffix}_wf",
            **graph.threads,
        )
        wires = take(graph.wires, "noise", "b0_direction") | take(fields[-1], "field", "mask")
        fields.append(graph.add(part, wires, ("field", "mask", "step")))
    return fields


def _invert(graph: _Graph, method: str, fields: list[Wires], suffix: str) -> Wires:
    """Invert the dipole: ``chi``, its ``mask``, and the ``step``."""
    starts_from = METHODS["inversion"][method].starts_from
    source = fields[-1] if starts_from == "local field" else fields[0]
    wires = take(graph.wires, "b0_direction", "echo_times", "field_strength")
    if starts_from == "phase":
        wires |= take(graph.wires, "phase", "magnitude") | take(source, "mask")
    else:
        wires |= take(graph.wires, "noise", "r2star", magnitude="combined")
        wires |= take(source, "field", "mask")
    part = init_inversion_wf(
        method=method,
        parameters=graph.chain.parameters_of("inversion", method),
        name=f"inversion_{method}{suffix}_wf",
        **graph.threads,
    )
    return graph.add(part, wires, ("chi", "step")) | take(source, "mask")


def _fill_holes(graph: _Graph, method: str, first: Wires, second: Wires) -> Wires:
    """Join the maps of two passes; otherwise as ``second``."""
    node = Node(MergePasses(), name=f"passes_{method}")
    wires = take(first, chi_reliable="chi", reliable="mask") | take(second, chi_filled="chi")
    return second | graph.connect(node, wires, ["chi"])


def _reference(graph: _Graph, method: str, inverted: Wires) -> Wires:
    """Make a map relative: ``chi``, its ``mask``, ``value`` and ``region`` of the reference."""
    reference = graph.chain.reference
    part = init_reference_wf(
        method=reference,
        parameters=graph.chain.parameters_of("reference", reference),
        name=f"reference_{method}_wf",
    )
    wires = take(graph.wires, "region", "r2star", magnitude="combined")
    wires |= take(inverted, "chi", "mask")
    several = len(graph.chain.methods("inversion")) > 1
    step = "outputnode.step"
    graph.done.append((part, (step, _of, method) if several else step))
    return graph.connect(part, wires, ("chi", "value", "region")) | take(inverted, "mask")


def _of(step: dict, inversion: str) -> dict:
    """Say which inversion's map a step belongs to."""
    return {**step, "inversion": inversion}


def _estimate_deviation(
    graph: _Graph, fields: list[Wires], inverted: Wires, referenced: Wires
) -> Wires:
    """Carry the noise of the field to the map of the first inversion: its ``deviation``."""
    chain, inversion = graph.chain, graph.chain.methods("inversion")[0]
    local = METHODS["inversion"][inversion].starts_from == "local field"
    backgrounds = chain.methods("background") if local else ()
    part = init_uncertainty_wf(
        background=backgrounds,
        inversion=inversion,
        reference=chain.reference if chain.reference in ("brain", "none") else "region",
        realisations=chain.uncertainty,
        **graph.threads,
    )
    wires = take(
        graph.wires, "field", "noise", "mask", "b0_direction", "r2star", "echo_times",
        "field_strength", magnitude="combined",
    ) | take(inverted, inversion="step")  # fmt: skip
    if chain.reference == "csf":
        wires |= take(referenced, "region")
    elif chain.reference == "region":
        wires |= take(graph.wires, "region")
    if backgrounds:
        steps = [field["step"] for field in fields[1:]]
        wires["background"] = graph.merge(steps, "background_steps")
    return graph.add(part, wires, ["deviation"])


def _compare(graph: _Graph, referenced: list[Wires]) -> Wires:
    """Collect the maps of several inversions: ``compared``, and their ``median``."""
    maps = graph.merge([each["chi"] for each in referenced], "maps")
    masks = graph.merge([each["mask"] for each in referenced], "masks")
    node = Node(MedianMap(), name="median")
    return {"compared": maps} | graph.connect(node, {"maps": maps, "masks": masks}, median="chi")
