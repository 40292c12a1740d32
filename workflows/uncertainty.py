"""From the noise of the field to the standard deviation of susceptibility."""

import inspect
from collections.abc import Sequence

from nipype.interfaces.utility import IdentityInterface
from nipype.pipeline.engine import Node, Workflow

from qsmpipe.interfaces.uncertainty import Uncertainty
from qsmpipe.methods import SUPPLIED, function_of, method
from qsmpipe.numerics.uncertainty import DEFAULT_REALISATIONS
from qsmpipe.workflows.stage import estimate_needs, take_gpus

INPUTS = (
    "field", "noise", "mask", "background", "inversion", "region", "b0_direction", "magnitude",
    "r2star", "echo_times", "field_strength",
)  # fmt: skip


def init_uncertainty_wf(
    *,
    background: str | Sequence[str] = "pdf",
    inversion: str = "tv",
    reference: str = "brain",
    realisations: int = DEFAULT_REALISATIONS,
    seed: int = 0,
    omp_nthreads: int = 1,
    use_gpu: bool = False,
    name: str = "uncertainty_wf",
) -> Workflow:
    """Carry the field's noise through background removal, inversion and referencing.

    Parameters
    ----------
    background : str or sequence of str
        Methods of background removal, one after the other; ``"none"`` or nothing for an
        inversion that takes the total field, or for ``field`` without background.
    inversion : str
        A key of ``METHODS["inversion"]`` in :mod:`qsmpipe.methods`.
    reference : {"brain", "region", "none"}
        What susceptibility is relative to.
    realisations : int
        Noisy fields that go through the chain, which takes as many times its time.
    seed : int
        Of the noise.
    omp_nthreads : int
        CPU threads.
    use_gpu : bool
        Run on CUDA.
    name : str
        Name of the workflow.

    Inputs
    ------
    field, noise
        Total field and its standard deviation (ppm).
    mask
        Where ``field`` is known.
    background, inversion
        ``step`` of these stages as they ran, with the parameters that they chose. For several
        background removals a list, in their order.
    region
        Mask of the reference region, with ``reference="region"``.
    b0_direction
        Unit vector along B0 in voxel axes (optional): from the affine of ``field`` by default.
    magnitude, r2star, echo_times, field_strength
        For the inversions that take them (optional): magnitude of all echoes combined, 1/s, s, T.

    Outputs
    -------
    deviation
        Standard deviation of susceptibility (ppm); 0 where there is no susceptibility.
    step
        What was done.

    Raises
    ------
    ValueError
        If a method does not exist, or the inversion starts from the phase of the echoes.
    """
    if method("inversion", inversion).starts_from == "phase":
        msg = (
            f"the uncertainty of {inversion} is not known: it starts from the phase of the "
            "echoes, and the noise that is carried through is that of a field; choose another "
            "inversion, or leave the uncertainty out"
        )
        raise ValueError(msg)
    names = [background] if isinstance(background, str) else list(background)
    names = [one for one in names if one != "none"]
    functions = [function_of("background", one) for one in names]
    functions.append(function_of("inversion", inversion))
    taken = {key for function in functions for key in inspect.signature(function).parameters}
    unused = SUPPLIED - taken - {"noise", "b0_direction"}
    unused = unused | ({"region"} if reference != "region" else set())
    unused = unused | ({"background"} if not names else set())

    workflow = Workflow(name=name)
    inputnode = Node(IdentityInterface(fields=list(INPUTS)), name="inputnode")
    outputnode = Node(IdentityInterface(fields=["deviation", "step"]), name="outputnode")
    node = Node(
        Uncertainty(
            reference=reference,
            realisations=realisations,
            seed=seed,
            num_threads=omp_nthreads,
            use_gpu=use_gpu,
        ),
        name="realisations",
        n_procs=1 if use_gpu else omp_nthreads,
    )
    workflow.connect([
        (inputnode, node, [(field, field) for field in INPUTS if field not in unused]),
        (node, outputnode, [("deviation", "deviation"), ("step", "step")]),
    ])  # fmt: skip
    take_gpus(workflow)
    estimate_needs(workflow)
    return workflow
