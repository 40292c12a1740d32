"""Every map that is written: its name, its meaning, its unit."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Output:
    """A row of :data:`OUTPUTS`."""

    suffix: str
    source: str
    """Output of :func:`qsmpipe.workflows.qsm.init_qsm_wf` that the map is written from."""
    description: str
    units: str = ""
    datatype: str = "anat"
    part: str = ""
    desc: str = ""
    stages: tuple[str, ...] = ()
    """Stages whose methods are named as the map's algorithm."""
    is_mask: bool = False
    mask_type: str = ""
    skull_stripped: bool = True
    intermediate: bool = False
    """Written on request only."""


OUTPUTS: dict[str, Output] = {
    "chi": Output(
        "Chimap", "chi", "Magnetic susceptibility relative to the reference; 0 outside the mask",
        "ppm", stages=("inversion",),
    ),
    "unreferenced": Output(
        "Chimap", "unreferenced", "Magnetic susceptibility before referencing",
        "ppm", desc="unreferenced", stages=("inversion",),
    ),
    "chi_by_method": Output(
        "Chimap", "compared",
        "Magnetic susceptibility by another inversion of the same run; 0 outside its mask",
        "ppm", desc="{method}", stages=("inversion",),
    ),
    "median": Output(
        "Chimap", "median",
        "Median over the run's inversions, where all of them know susceptibility",
        "ppm", desc="median", stages=("inversion",),
    ),
    "cosmos": Output(
        "Chimap", "cosmos",
        "Magnetic susceptibility by all orientations together, on the grid of the first",
        "ppm", desc="cosmos", stages=("cosmos",),
    ),
    "cosmos_mask": Output(
        "mask", "cosmos_mask", "Where two or more orientations know their local field",
        desc="cosmos", stages=("cosmos",), is_mask=True, mask_type="ROI",
    ),
    "deviation": Output(
        "Chimap", "deviation",
        "Standard deviation that the noise of the field gives to magnetic susceptibility; errors "
        "of the method itself are not in it",
        "ppm", desc="std", stages=("inversion",),
    ),
    "r2star": Output(
        "R2starmap", "r2star", "Effective transverse relaxation rate", "1/s",
        stages=("relaxation",),
    ),
    "t2star": Output(
        "T2starmap", "t2star", "Effective transverse relaxation time", "s",
        stages=("relaxation",),
    ),
    "s0": Output(
        "S0map", "s0", "Signal at echo time 0", "arbitrary", stages=("relaxation",),
    ),
    "swi": Output(
        "swi", "swi", "Susceptibility-weighted image: magnitude darkened by the phase",
        "arbitrary", stages=("swi",),
    ),
    "minip": Output(
        "minIP", "minip", "Minimum of the susceptibility-weighted image over a slab of slices",
        "arbitrary", stages=("swi",),
    ),
    "combined": Output(
        "T2starw", "combined", "Magnitude, root of the sum of squares over echoes", "arbitrary",
        part="mag", desc="combined", skull_stripped=False,
    ),
    "mask": Output(
        "mask", "mask", "Brain mask", desc="brain", stages=("mask",), is_mask=True,
        mask_type="Brain",
    ),
    "qsm_mask": Output(
        "mask", "qsm_mask",
        "Where susceptibility is trusted: the brain mask, eroded as the background removal needs",
        desc="qsm", stages=("background",), is_mask=True, mask_type="ROI",
    ),
    "reference_region": Output(
        "mask", "reference_region",
        "The fluid of the ventricles whose mean susceptibility was subtracted",
        desc="reference", is_mask=True, mask_type="ROI",
    ),
    "field_magnitude": Output(
        "magnitude", "combined", "Magnitude that belongs to the field maps", "arbitrary",
        datatype="fmap", skull_stripped=False,
    ),
    "field": Output(
        "fieldmap", "field", "Total field relative to B0", "Hz", datatype="fmap", desc="total",
        stages=("unwrap", "field"),
    ),
    "local_field": Output(
        "fieldmap", "local_field", "Field of the sources inside the mask", "Hz",
        datatype="fmap", desc="local", stages=("background",),
    ),
    "noise": Output(
        "fieldmap", "noise", "Standard deviation of the total field", "Hz", datatype="fmap",
        desc="noise", stages=("field",), intermediate=True,
    ),
    "offset": Output(
        "T2starw", "offset", "Phase offset common to all echoes, removed before the fit", "rad",
        part="phase", desc="offset", stages=("offset",), intermediate=True,
    ),
    "unwrapped": Output(
        "T2starw", "unwrapped", "Unwrapped phase of all echoes, in the order of EchoTime", "rad",
        part="phase", desc="unwrapped", stages=("offset", "unwrap"), intermediate=True,
    ),
    "quality": Output(
        "T2starw", "quality", "Phase quality between 0 (noise) and 1", "arbitrary",
        desc="quality", stages=("unwrap",), intermediate=True,
    ),
}  # fmt: skip
"""Every map that is written, by key."""
