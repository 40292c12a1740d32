"""From the local field to susceptibility."""

from collections.abc import Mapping
from typing import Any

from nipype.pipeline.engine import Workflow

from qsmpipe.chain import Chain
from qsmpipe.methods import method as row_of
from qsmpipe.methods import parameters_of
from qsmpipe.workflows.stage import stage_wf

INPUTS = (
    "field", "mask", "noise", "b0_direction", "magnitude", "r2star", "echo_times",
    "field_strength",
)  # fmt: skip

FROM_PHASE = ("phase", "mask", "b0_direction", "magnitude", "echo_times", "field_strength")
"""Inputs where the method starts from phase."""


def init_inversion_wf(
    *,
    method: str = Chain.inversion,
    parameters: Mapping[str, Any] | None = None,
    omp_nthreads: int = 1,
    use_gpu: bool = False,
    name: str = "inversion_wf",
) -> Workflow:
    """Invert the dipole.

    Parameters
    ----------
    method : str
        A key of ``METHODS["inversion"]`` in :mod:`qsmpipe.methods`.
    parameters : mapping, optional
        Parameters of the method, where the default is not wanted.
    omp_nthreads : int
        CPU threads.
    use_gpu : bool
        Run on CUDA.
    name : str
        Name of the workflow.

    Inputs
    ------
    field
        Field of the sources inside ``mask`` (ppm); the total field for a method that starts from
        that.
    phase
        In its place, for a method that starts from phase: wrapped phase (rad), echoes last.
        ``magnitude`` then has all echoes, too, and there are neither ``noise`` nor ``r2star``.
    mask
        Where ``field`` is known.
    noise
        Standard deviation of ``field``, in any unit (optional): weights the data of the methods
        that do so.
    b0_direction
        Unit vector along B0 in voxel axes (optional): from the affine of ``field`` by default.
    magnitude, r2star
        Magnitude of all echoes combined, and R2* (1/s), for the methods that take them (optional).
    echo_times, field_strength
        s and T, for the methods that work with phase (optional).

    Outputs
    -------
    chi
        Susceptibility (ppm), not referenced; 0 outside ``mask``.
    step
        What was done.
    """
    row = row_of("inversion", method)
    if row.trained:
        parameters = _with_hash(method, parameters or {})
    return stage_wf(
        "inversion",
        method,
        inputs=FROM_PHASE if row.starts_from == "phase" else INPUTS,
        outputs=("chi", "step"),
        parameters=parameters,
        omp_nthreads=omp_nthreads,
        use_gpu=use_gpu,
        name=name,
    )


def _with_hash(method: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Tie the node's cache to the weights and not to their name alone."""
    from qsmpipe.nets.cards import read_card

    default = parameters_of("inversion", method)["weights"].default
    _, card = read_card(parameters.get("weights", default))
    return {**parameters, "sha256": card.sha256}
