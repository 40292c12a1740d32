"""From a dataset to graphs: the run, each subject, each acquisition."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nipype.interfaces.base import isdefined
from nipype.interfaces.utility import IdentityInterface, Merge
from nipype.pipeline.engine import Node, Workflow

from qsmpipe import __version__
from qsmpipe.checks import Examination, heads
from qsmpipe.interfaces.derivatives import WriteDerivatives
from qsmpipe.interfaces.reports import Reportlets
from qsmpipe.maps import Map, reported, written
from qsmpipe.settings import Settings, versions
from qsmpipe.workflows.qsm import OUTPUTS, init_qsm_wf
from qsmpipe.workflows.reference import init_reference_wf
from qsmpipe.workflows.stage import estimate_needs


def init_run_wf(
    examinations: Sequence[Examination],
    settings: Settings,
    given: Mapping[str, Mapping[str, Path]],
    *,
    threads: int,
    use_gpu: bool = False,
) -> Workflow:
    """Process every acquisition of a run, grouped by subject.

    Parameters
    ----------
    examinations
        Acquisitions that passed the input check.
    settings
        The run's choices.
    given
        Acquisition name to ``mask`` and ``region`` files of the user, where the settings ask
        for them.
    threads
        CPU threads of a node.
    use_gpu
        Run what can on CUDA.
    """
    joined = heads(examinations) if settings.methods("cosmos") else []
    run = Workflow(name=f"qsmpipe_{__version__.replace('.', '_')}_wf", base_dir=settings.work_dir)
    for subject in dict.fromkeys(e.acquisition.subject for e in examinations):
        subject_wf = Workflow(name=f"subject_{subject.replace('+', '_plus_')}_wf")
        parts = [
            init_acquisition_wf(
                examination,
                settings,
                given.get(examination.acquisition.name, {}),
                threads=threads,
                use_gpu=use_gpu,
            )
            for examination in examinations
            if examination.acquisition.subject == subject
        ]
        subject_wf.add_nodes(parts)
        for head in joined:
            if head.acquisition.subject == subject and not head.errors:
                _add_head(subject_wf, parts, head, settings, threads=threads, use_gpu=use_gpu)
        run.add_nodes([subject_wf])
    return run


def init_acquisition_wf(
    examination: Examination,
    settings: Settings,
    given: Mapping[str, Path],
    *,
    threads: int = 1,
    use_gpu: bool = False,
) -> Workflow:
    """Map one acquisition, write its derivatives and draw its figures.

    Parameters
    ----------
    examination
        An acquisition that passed the input check, with how to read its phase.
    settings
        The run's choices.
    given
        The user's own ``mask`` and ``region`` files, where the settings ask for them.
    threads
        CPU threads of a node.
    use_gpu
        Run what can on CUDA.
    """
    acquisition = examination.acquisition
    workflow = Workflow(name=f"{acquisition.node_name}_wf")
    qsm_wf = init_qsm_wf(
        echoes=len(examination.echo_times),
        chain=settings.chain(),
        omp_nthreads=threads,
        use_gpu=use_gpu,
    )
    inputnode = qsm_wf.get_node("inputnode")
    for part in ("magnitude", "phase", "real", "imag"):
        if files := getattr(acquisition, part):
            setattr(inputnode.inputs, part, [str(path) for path in files])
    inputnode.inputs.phase_slope = list(examination.phase_slope)
    inputnode.inputs.phase_intercept = list(examination.phase_intercept)
    inputnode.inputs.phase_sign = examination.phase_sign
    inputnode.inputs.alternating = list(examination.alternating)
    inputnode.inputs.slice_axes = list(examination.slice_axes)
    inputnode.inputs.b0_direction = list(examination.b0_direction)
    inputnode.inputs.echo_times = list(examination.echo_times)
    inputnode.inputs.field_strength = examination.field_strength
    for name, path in given.items():
        setattr(inputnode.inputs, name, str(path))

    maps = Node(IdentityInterface(fields=list(OUTPUTS)), name="maps")
    beside = {
        "field_strength": examination.field_strength,
        "echo_times": list(examination.echo_times),
        "inversions": list(settings.methods("inversion")),
    }
    # The maps that are there first are drawn while the inversion runs.
    before, after = reported(inverted=False), reported(inverted=True)
    outlines = {key: row for key, row in before.items() if row.is_mask}
    early, late = (
        Node(Reportlets(about=list(rows), **beside), name=name)
        for name, rows in (("reportlets", before), ("reportlets_chi", after))
    )
    gathered = {
        field: Node(Merge(2), name=field, run_without_submitting=True)
        for field in ("figures", "captions", "numbers")
    }
    derivatives = _writer(
        examination,
        settings,
        intermediates=settings.intermediates,
        inversions=list(settings.methods("inversion")),
    )
    workflow.connect([
        (qsm_wf, maps, [(f"outputnode.{key}", key) for key in OUTPUTS]),
        (maps, early, _wires(before)),
        (maps, late, [*_wires(after | outlines), ("reference_value", "reference_value"),
                      ("steps", "steps")]),
        (maps, derivatives, [*_wires(written()), ("steps", "steps")]),
        *((part, node, [(field, f"in{place}")])
          for field, node in gathered.items() for place, part in enumerate((early, late), 1)),
        *((node, derivatives, [("out", field)]) for field, node in gathered.items()),
    ])  # fmt: skip
    estimate_needs(
        workflow, voxels=math.prod(examination.shape), echoes=len(examination.echo_times)
    )
    return workflow


def _writer(examination: Examination, settings: Settings, **choices: Any) -> Node:
    """Make the node that writes the maps of an acquisition, or of a head."""
    interface = WriteDerivatives(
        examination=examination,
        output_dir=settings.output_dir,
        reference=settings.reference,
        software=versions(),
        **choices,
    )
    return Node(interface, name="derivatives")


def _wires(rows: Mapping[str, Map]) -> list[tuple[str, str]]:
    """From the outputs of the chain to inputs that are named by the maps' keys."""
    return [(row.source or key, key) for key, row in rows.items() if row.given_by != "head"]


def head_workflow(head: Examination) -> str:
    """Name the workflow that inverts all orientations of a head."""
    return f"{head.acquisition.node_name}_cosmos_wf"


ORIENTATION = {
    "magnitude": "combined", "brain_mask": "mask", "local_field": "local_field",
    "mask": "qsm_mask", "noise": "noise", "b0_direction": "b0_direction",
}  # fmt: skip
"""Input of the workflow that inverts a head to the output of each orientation's chain."""


def _add_head(
    subject_wf: Workflow,
    parts: Sequence[Workflow],
    head: Examination,
    settings: Settings,
    *,
    threads: int,
    use_gpu: bool,
) -> None:
    """Invert a subject's acquisitions (``parts``) together, and write the map."""
    workflow = _init_head_wf(head, len(parts), settings, threads=threads, use_gpu=use_gpu)
    for n, part in enumerate(parts, 1):
        subject_wf.connect([
            (part, workflow, [(f"maps.{output}", f"{field}.in{n}")
                              for field, output in ORIENTATION.items()]),
        ])  # fmt: skip
    # The map lies on the first orientation's grid: so does what is known of its regions.
    subject_wf.connect([
        (parts[0], workflow, [("maps.r2star", "reference_wf.inputnode.r2star"),
                              ("maps.combined", "reference_wf.inputnode.magnitude")]),
    ])  # fmt: skip
    region = parts[0].get_node("qsm_wf.inputnode").inputs.region
    if isdefined(region):
        workflow.get_node("reference_wf.inputnode").inputs.region = region
    estimate_needs(workflow, voxels=math.prod(head.shape), echoes=len(parts))


def _init_head_wf(
    head: Examination, orientations: int, settings: Settings, *, threads: int, use_gpu: bool
) -> Workflow:
    """Invert all orientations of a head together, write the map and draw its picture.

    What is known of each orientation goes into ``in1``, ``in2`` and so on of a node that is named
    like a key of :data:`ORIENTATION`.
    """
    from qsmpipe.workflows.cosmos import init_cosmos_wf  # loads SimpleITK

    workflow = Workflow(name=head_workflow(head))
    cosmos_wf = init_cosmos_wf(
        orientations=orientations,
        parameters=settings.parameters_for("cosmos")["cosmos"],
        omp_nthreads=threads,
        use_gpu=use_gpu,
    )
    reference_wf = init_reference_wf(
        method=settings.reference.partition(":")[0],
        parameters=settings.reference_parameters(),
    )
    derivatives = _writer(head, settings)
    reportlets = Node(Reportlets(), name="reportlets")
    steps = Node(Merge(2), name="steps", run_without_submitting=True)
    gathered = {
        field: Node(Merge(orientations), name=field, run_without_submitting=True)
        for field in ORIENTATION
    }
    gathered["b0_direction"].inputs.no_flatten = True
    workflow.connect([
        *((node, cosmos_wf, [("out", f"inputnode.{field}")]) for field, node in gathered.items()),
        (cosmos_wf, reference_wf, [("outputnode.chi", "inputnode.chi"),
                                   ("outputnode.mask", "inputnode.mask")]),
        (cosmos_wf, steps, [("outputnode.step", "in1")]),
        (reference_wf, steps, [("outputnode.step", "in2")]),
        (steps, derivatives, [("out", "steps")]),
        (cosmos_wf, derivatives, [("outputnode.mask", "cosmos_mask")]),
        (reference_wf, derivatives, [("outputnode.chi", "cosmos")]),
        (cosmos_wf, reportlets, [("outputnode.mask", "qsm_mask")]),
        (reference_wf, reportlets, [("outputnode.chi", "cosmos")]),
        (reportlets, derivatives, [("figures", "figures"), ("captions", "captions"),
                                   ("numbers", "numbers")]),
    ])  # fmt: skip
    return workflow
