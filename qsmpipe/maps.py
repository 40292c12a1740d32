"""Every map: what it is, which workflow gives it, its file, and its picture in the report.

A new map is a row of :data:`MAPS`, and a wire from the node that makes it. The fields of the
workflows' ``outputnode``, the inputs of the interfaces that write and draw, names, sidecars and
pictures follow from the row.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Giver: TypeAlias = Literal["qsm", "susceptibility", "head"]
"""A workflow of several stages that has a map as an output: that of ``init_qsm_wf``, that of
``init_susceptibility_wf`` in it, or that of a head at several orientations."""


@dataclass(frozen=True)
class Written:
    """The file of a map, as BIDS names and describes it."""

    suffix: str
    datatype: Literal["anat", "fmap"] = "anat"
    part: str = ""
    desc: str = ""
    units: str = ""
    """Unit in the file, where it is another one than in the workflows: ``"Hz"`` for a field."""
    stages: tuple[str, ...] = ()
    """Stages whose methods are named as the map's algorithm."""
    mask_type: str = ""
    """What the voxels of a mask are, in BIDS' words; empty for what is no mask."""
    skull_stripped: bool = True
    intermediate: bool = False
    """Written on request only."""
    extension: str = ".nii.gz"


@dataclass(frozen=True)
class Percentile:
    """A window that ends at a percentile of what is shown."""

    percent: float
    signed: bool = False
    """From minus to plus the percentile of the absolute values, and not from 0."""


@dataclass(frozen=True)
class Shown:
    """The picture of a map: a row of slices in each of three planes."""

    title: str
    caption: str
    """With ``{low}`` and ``{high}``, the ends of the window; ``{hertz}``, the same of a field in
    Hz; ``{outlines}``, which colour is which mask's. How left and right lie is added."""
    section: str
    """Of the report."""
    window: tuple[float, float] | Percentile
    colours: str = "gray"
    """Colour map of Matplotlib."""
    within: Literal["head", "brain", "qsm"] = "qsm"
    """Show the whole head, with the outlines of both masks, or the map in one of them alone."""
    label: str = ""
    """Of the colour bar; empty: the map's unit."""
    slices: int = 6
    """In each plane, at most."""
    file: str = ""
    """Name of the picture without ``.png``; empty: the map's key, with hyphens."""


@dataclass(frozen=True)
class Map:
    """A row of :data:`MAPS`."""

    description: str
    units: str = ""
    """Unit in the workflows; empty for masks."""
    written: Written | None = None
    """Its file; None: it is not written."""
    shown: Shown | None = None
    """Its picture; None: it has none, or those that :mod:`qsmpipe.reports.figures` makes of it."""
    measured: bool = False
    """Whether figures or numbers of their own in :mod:`qsmpipe.reports` take the map."""
    given_by: Giver = "qsm"
    """The innermost of these workflows."""
    source: str = ""
    """Output of that workflow; empty: the map's key."""
    only: str = ""
    """When it is there, as in ``with two echoes or more``; empty: always."""
    echoes: bool = False
    """Whether the last axis holds all echoes."""
    by_method: bool = False
    """Whether there is one for each of several inversions, as a list."""

    @property
    def summary(self) -> str:
        """What it is, its unit, and when it is there, for docstrings and descriptions."""
        parts = [self.description, "a list headed by the first inversion's" * self.by_method]
        parts[0] += f" ({self.units})" if self.units not in ("", "arbitrary") else ""
        parts.append(f"only {self.only}" if self.only else "")
        return "; ".join(filter(None, parts))

    @property
    def inverted(self) -> bool:
        """Whether it is there only when the dipole has been inverted."""
        return self.written is not None and "inversion" in self.written.stages

    @property
    def is_mask(self) -> bool:
        """Whether it holds 0 and 1."""
        return self.written is not None and bool(self.written.mask_type)

    @property
    def file(self) -> Written:
        """Its file.

        Raises
        ------
        ValueError
            If the map is not written.
        """
        if self.written is None:
            msg = f"{self.description}: this map is not written to a file"
            raise ValueError(msg)
        return self.written


MAPS: dict[str, Map] = {
    "chi": Map(
        "Magnetic susceptibility relative to the reference; 0 outside the mask", "ppm",
        Written("Chimap", stages=("inversion",)),
        measured=True, given_by="susceptibility",
    ),
    "unreferenced": Map(
        "Magnetic susceptibility before referencing", "ppm",
        Written("Chimap", desc="unreferenced", stages=("inversion",)),
        given_by="susceptibility",
    ),
    "compared": Map(
        "Magnetic susceptibility by another inversion of the same run; 0 outside its mask", "ppm",
        Written("Chimap", desc="{method}", stages=("inversion",)),
        measured=True, given_by="susceptibility", only="with several inversions", by_method=True,
    ),
    "median": Map(
        "Median over the run's inversions, where all of them know susceptibility", "ppm",
        Written("Chimap", desc="median", stages=("inversion",)),
        measured=True, given_by="susceptibility", only="with several inversions",
    ),
    "cosmos": Map(
        "Magnetic susceptibility by all orientations together, on the grid of the first", "ppm",
        Written("Chimap", desc="cosmos", stages=("cosmos",)),
        Shown(
            "Susceptibility by COSMOS",
            "All orientations inverted together, on the grid of the first, where two or more of "
            "them have a field. Grey from -0.1 to 0.1 ppm. Edges that look doubled come from a "
            "registration that failed.",
            "Susceptibility", (-0.1, 0.1), slices=5, file="susceptibility-cosmos",
        ),
        given_by="head",
    ),
    "cosmos_mask": Map(
        "Where two or more orientations know their local field",
        written=Written("mask", desc="cosmos", stages=("cosmos",), mask_type="ROI"),
        given_by="head",
    ),
    "deviation": Map(
        "Standard deviation that the noise of the field gives to magnetic susceptibility; errors "
        "of the method itself are not in it",
        "ppm",
        Written("Chimap", desc="std", stages=("inversion",)),
        Shown(
            "Uncertainty of susceptibility",
            "Standard deviation (ppm) that the noise of the field gives the map, up to the 98th "
            "percentile ({high:.4f} ppm). Errors of the method itself, such as too smooth a map "
            "or background left behind, are not in it.",
            "Susceptibility", Percentile(98), "magma", file="susceptibility-deviation",
        ),
        given_by="susceptibility", only="with ``uncertainty``",
    ),
    "r2star": Map(
        "Effective transverse relaxation rate", "1/s",
        Written("R2starmap", stages=("relaxation",)),
        Shown(
            "R2*",
            "Effective transverse relaxation rate, 0 to 100 1/s. Nuclei, veins and places near "
            "air are high; a rise towards sinuses is through-slice dephasing.",
            "Relaxation", (0, 100), "inferno", within="brain",
        ),
        measured=True, only="with two echoes or more",
    ),
    "t2star": Map(
        "Effective transverse relaxation time", "s",
        Written("T2starmap", stages=("relaxation",)),
        only="with two echoes or more",
    ),
    "s0": Map(
        "Signal at echo time 0", "arbitrary",
        Written("S0map", stages=("relaxation",)),
        only="with two echoes or more",
    ),
    "swi": Map(
        "Susceptibility-weighted image: magnitude darkened by the phase", "arbitrary",
        Written("swi", stages=("swi",)),
        measured=True, only="with a method ``swi``",
    ),
    "minip": Map(
        "Minimum of the susceptibility-weighted image over a slab of slices", "arbitrary",
        Written("minIP", stages=("swi",)),
        measured=True, only="with a method ``swi``",
    ),
    "magnitude": Map(
        "Magnitude of all echoes, on the last axis", "arbitrary", measured=True, echoes=True,
    ),
    "phase": Map(
        "Wrapped phase of all echoes, on the last axis, without the offset that they share", "rad",
        measured=True, echoes=True,
    ),
    "combined": Map(
        "Magnitude, root of the sum of squares over echoes", "arbitrary",
        Written("T2starw", part="mag", desc="combined", skull_stripped=False),
    ),
    "brain_mask": Map(
        "Brain mask",
        written=Written("mask", desc="brain", stages=("mask",), mask_type="Brain"),
        measured=True, source="mask",
    ),
    "qsm_mask": Map(
        "Where susceptibility is trusted: the brain mask, eroded as the background removal needs",
        written=Written("mask", desc="qsm", stages=("background",), mask_type="ROI"),
        measured=True, given_by="susceptibility",
    ),
    "reference_region": Map(
        "The fluid of the ventricles whose mean susceptibility was subtracted",
        written=Written("mask", desc="reference", mask_type="ROI"),
        given_by="susceptibility", only='with the reference ``"csf"``',
    ),
    "field_magnitude": Map(
        "Magnitude that belongs to the field maps", "arbitrary",
        Written("magnitude", "fmap", skull_stripped=False),
        source="combined",
    ),
    "field": Map(
        "Total field relative to B0", "ppm",
        Written("fieldmap", "fmap", desc="total", units="Hz", stages=("unwrap", "field")),
        Shown(
            "Total field",
            "Field of all sources, the air around included: smooth and strongest near sinuses "
            "and ear canals. Sharp steps are unwrapping errors. Red is above and blue below the "
            "scanner's frequency; the scale ends at the 99th percentile, {low:.3g} to {high:.3g} "
            "ppm{hertz}.",
            "Field", Percentile(99, signed=True), "RdBu_r", within="brain", file="field-total",
        ),
        measured=True,
    ),
    "local_field": Map(
        "Field of the sources inside the mask", "ppm",
        Written("fieldmap", "fmap", desc="local", units="Hz", stages=("background",)),
        Shown(
            "Local field",
            "Field of the tissue alone. Veins, nuclei and cortex should show; broad shades "
            "towards the mask's edge are background that was left behind. Red is above and blue "
            "below the scanner's frequency; the scale ends at the 99th percentile, {low:.3g} to "
            "{high:.3g} ppm{hertz}.",
            "Field", Percentile(99, signed=True), "RdBu_r", file="field-local",
        ),
        measured=True, given_by="susceptibility", only="with a method ``background``",
    ),
    "noise": Map(
        "Standard deviation of the total field", "ppm",
        Written(
            "fieldmap", "fmap", desc="noise", units="Hz", stages=("field",), intermediate=True
        ),
        Shown(
            "Field noise",
            "Standard deviation of the total field (ppm), as its fit gives it, up to the 98th "
            "percentile{hertz}. The inversion trusts dark voxels most.",
            "Field", Percentile(98), "magma", within="brain", file="field-noise",
        ),
        measured=True,
    ),
    "offset": Map(
        "Phase offset common to all echoes, removed before the fit", "rad",
        Written("T2starw", part="phase", desc="offset", stages=("offset",), intermediate=True),
        only="with a method ``offset`` and two echoes or more",
    ),
    "unwrapped": Map(
        "Unwrapped phase of all echoes, in the order of EchoTime", "rad",
        Written(
            "T2starw", part="phase", desc="unwrapped", stages=("offset", "unwrap"),
            intermediate=True,
        ),
        echoes=True,
    ),
    "quality": Map(
        "Phase quality between 0 (noise) and 1", "arbitrary",
        Written("T2starw", desc="quality", stages=("unwrap",), intermediate=True),
        Shown(
            "Phase quality",
            "How coherent the phase is over space and echoes: 0 none, 1 perfect. Low values "
            "inside the mask (sinuses, large veins, haemorrhage) are where fields are least "
            "sure. {outlines}",
            "Phase", (0, 1), within="head", label="quality",
        ),
    ),
}  # fmt: skip
"""Every map, by key, in the order in which files and pictures are listed."""


def written() -> dict[str, Map]:
    """Rows of the maps that have a file."""
    return {key: row for key, row in MAPS.items() if row.written}


def reported(*, inverted: bool | None = None) -> dict[str, Map]:
    """Rows of the maps that the report draws or measures.

    With ``inverted`` of those that are there only when the dipole has been inverted, or before.
    """
    return {
        key: row
        for key, row in MAPS.items()
        if (row.shown or row.measured) and inverted in (None, row.inverted)
    }


def given_by(*givers: Giver) -> dict[str, Map]:
    """Rows of the maps of some workflows, by the workflow's output; one for each output."""
    rows: dict[str, Map] = {}
    for key, row in MAPS.items():
        if row.given_by in givers:
            rows.setdefault(row.source or key, row)
    return rows
