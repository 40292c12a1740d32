"""From a dataset to graphs: the run, each subject, each acquisition."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from nipype.interfaces.utility import IdentityInterface
from nipype.pipeline.engine import Node, Workflow

from qsmpipe import __version__
from qsmpipe.checks import Examination
from qsmpipe.interfaces.derivatives import WriteDerivatives
from qsmpipe.interfaces.reports import Reportlets
from qsmpipe.settings import STAGES, Settings, versions
from qsmpipe.workflows.qsm import OUTPUTS, init_qsm_wf

VOLUMES = {"unwrap": 8, "inversion": 30, "background": 20}
"""Memory of a stage's nodes in float32 volumes per volume of data (all others: 6)."""


WRITTEN = tuple(k for k in OUTPUTS if k not in ("magnitude", "phase", "reference_value"))
"""Outputs of the chain that become derivatives."""


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
    run = Workflow(name=f"qsmpipe_{__version__.replace('.', '_')}_wf", base_dir=settings.work_dir)
    for subject in dict.fromkeys(e.acquisition.subject for e in examinations):
        subject_wf = Workflow(name=f"subject_{subject.replace('+', '_plus_')}_wf")
        subject_wf.add_nodes(
            [
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
        )
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
        mask_erosion=settings.mask_erosion,
        reference=settings.reference.partition(":")[0],
        parameters={stage: settings.parameters_for(stage) for stage in STAGES},
        omp_nthreads=threads,
        use_gpu=use_gpu,
        **{stage: getattr(settings, stage) for stage in STAGES},
    )
    inputnode = qsm_wf.get_node("inputnode")
    for part in ("magnitude", "phase", "real", "imag"):
        if files := getattr(acquisition, part):
            setattr(inputnode.inputs, part, [str(path) for path in files])
    inputnode.inputs.phase_slope = examination.phase_slope
    inputnode.inputs.phase_intercept = examination.phase_intercept
    inputnode.inputs.phase_sign = examination.phase_sign
    inputnode.inputs.alternating = examination.alternating
    inputnode.inputs.echo_times = list(examination.echo_times)
    inputnode.inputs.field_strength = examination.field_strength
    for name, path in given.items():
        setattr(inputnode.inputs, name, str(path))

    maps = Node(IdentityInterface(fields=list(OUTPUTS)), name="maps")
    reportlets = Node(
        Reportlets(
            field_strength=examination.field_strength,
            echo_times=list(examination.echo_times),
            inversions=list(settings.methods("inversion")),
        ),
        name="reportlets",
    )
    derivatives = Node(
        WriteDerivatives(
            examination=examination,
            output_dir=settings.output_dir,
            intermediates=settings.intermediates,
            reference=settings.reference,
            inversions=list(settings.methods("inversion")),
            software=versions(),
        ),
        name="derivatives",
    )
    workflow.connect([
        (qsm_wf, maps, [(f"outputnode.{key}", key) for key in OUTPUTS]),
        (maps, reportlets, [(key, key) for key in (
            "magnitude", "phase", "quality", "field", "noise", "local_field", "qsm_mask", "chi",
            "r2star", "reference_value", "compared", "median")] + [("mask", "brain_mask")]),
        (maps, derivatives, [(key, key) for key in WRITTEN]),
        (reportlets, derivatives, [("figures", "figures"), ("captions", "captions"),
                                   ("numbers", "numbers")]),
    ])  # fmt: skip
    _estimate_memory(workflow, math.prod(examination.shape), len(examination.echo_times))
    return workflow


def _estimate_memory(workflow: Workflow, voxels: int, echoes: int) -> None:
    """Tell the scheduler how much each node will take (GB): interpreter, volumes, echoes."""
    volume = 4 * voxels / 2**30
    for node in workflow._get_all_nodes():
        stage = getattr(node.interface, "stage", "")
        node._mem_gb = 0.4 + volume * (VOLUMES.get(stage, 6) + 4 * echoes)
