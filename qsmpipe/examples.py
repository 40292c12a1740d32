"""Example datasets: a recipe to a BIDS dataset of an analytic head, with its truth.

``python -m qsmpipe.examples gre3t out`` writes one. A recipe is a TOML file, one of those in
``data/examples`` or one's own; :class:`Recipe` and the classes that it is made of say what may
stand in it. The same recipe gives the same bytes.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, MinLen
from torch import Tensor

from qsmpipe import __version__, images
from qsmpipe.numerics.simulate import (
    Scan,
    Simulation,
    add_noise,
    block_mean,
    maps_of,
    simulate,
)
from qsmpipe.numerics.simulate.analytic import HEAD_BOX, TISSUES, head
from qsmpipe.numerics.simulate.signal import Window
from qsmpipe.numerics.units import GAMMA, hz_per_ppm
from qsmpipe.placement import b0_direction
from qsmpipe.tables import Options, from_table, read_table

FOLDER = Path(__file__).parent / "data" / "examples"

RECIPES = tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))
"""Names of the recipes that come with the package."""

BIDS_VERSION = "1.10.0"

PEAK = 1500
"""Largest magnitude of the first echo, as stored; 12 bits hold 4095."""

Count = Annotated[int, Gt(0)]
Positive = Annotated[float, Gt(0)]


@dataclass(frozen=True)
class HeadRecipe:
    """``[head]``: which head lies in the scanner, and how."""

    tilt: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Turn of the head about the scanner's x, y and z (degrees)."""
    lesions: bool = False
    """Whether it has a calcification and microbleeds."""
    texture: Annotated[float, Ge(0)] = 0.006
    """How much the susceptibility varies within a tissue (ppm, standard deviation)."""
    seed: int = 0


@dataclass(frozen=True)
class GridRecipe:
    """``[grid]``: what is acquired."""

    shape: tuple[Count, Count, Count]
    zooms: tuple[Positive, Positive, Positive]
    """Voxel size (mm)."""
    angles: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Turn of the slices about the scanner's x, y and z (degrees)."""
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Scanner coordinates of the grid's middle (mm)."""
    flip: tuple[bool, bool, bool] = (False, False, False)
    """Axes that run the other way: (true, false, false) is LAS."""
    factor: Count = 2
    """How much finer the head is simulated."""

    @property
    def affine(self) -> np.ndarray:
        """Voxel to scanner coordinates (mm)."""
        signs = np.where(self.flip, -1.0, 1.0)
        affine = np.eye(4)
        affine[:3, :3] = rotation(self.angles) * (signs * self.zooms)
        affine[:3, 3] = self.centre - affine[:3, :3] @ ((np.array(self.shape) - 1) / 2)
        return np.round(affine, 6)


@dataclass(frozen=True)
class ScanRecipe:
    """``[scan]``: field, echoes, coil and noise."""

    imaging_frequency: Positive
    """In MHz; the field strength follows."""
    echo_times: Annotated[tuple[Positive, ...], MinLen(1)]
    """In s."""
    snr: Positive = 60.0
    """Brain's mean magnitude in the first echo over the standard deviation of the noise."""
    coil_phase: float = 1.5
    """Phase offset of all echoes (rad)."""


@dataclass(frozen=True)
class Acquisition:
    """``[[acquisitions]]``: one set of files; all of a recipe show the same head."""

    subject: Annotated[str, MinLen(1)]
    stored: Literal["siemens", "radians", "complex"]
    """``siemens`` (12-bit integers), ``radians`` (floats) or ``complex`` (real and imaginary)."""
    suffix: Annotated[str, MinLen(1)] = "MEGRE"
    session: str = ""
    run: str = ""
    seed: int = 0
    """Of the noise."""
    digits: Count = 1
    """Digits of the echo's index."""
    conjugate: bool = False
    """Whether the phase runs backwards, as on GE."""
    alternating: bool = False
    """Whether every second slice has its sign changed, as on GE."""
    metadata: Options = field(default_factory=dict)
    """Added to the sidecars."""

    def __post_init__(self) -> None:
        for name in ("subject", "session", "run"):
            label = getattr(self, name)
            if label and not (label.isascii() and label.isalnum()):
                raise ValueError(
                    f"{name} is {label!r}: a label of BIDS has letters and digits alone"
                )

    @property
    def prefix(self) -> str:
        """Entities as in a file name, without echo and part."""
        return f"{self.visit}_run-{self.run}" if self.run else self.visit

    @property
    def visit(self) -> str:
        """Entities that name its subject and session; the truth is the same for all runs."""
        return f"sub-{self.subject}" + f"_ses-{self.session}" * bool(self.session)

    @property
    def folder(self) -> Path:
        """Where its files lie, relative to the dataset."""
        session = f"ses-{self.session}" if self.session else ""
        return Path(f"sub-{self.subject}") / session


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole dataset."""

    name: str
    text: str
    """What the README says."""
    head: HeadRecipe = HeadRecipe()
    grid: GridRecipe
    scan: ScanRecipe
    acquisitions: Annotated[tuple[Acquisition, ...], MinLen(1)]
    metadata: Options = field(default_factory=dict)
    """Goes into all sidecars."""
    extension: Literal[".nii.gz", ".nii"] = ".nii.gz"
    inherit: bool = False
    """Whether common metadata stand once, at the top and in the subject's folder."""

    def __post_init__(self) -> None:
        for acquisition in self.acquisitions:
            if acquisition.suffix != "MEGRE" and len(self.scan.echo_times) > 1:
                msg = f"{acquisition.suffix} holds one echo, [scan] has several: use MEGRE"
                raise ValueError(msg)


def rotation(angles: Sequence[float]) -> np.ndarray:
    """Turn about x, then y, then z, by ``angles`` in degrees."""
    result = np.eye(3)
    for axis, angle in enumerate(angles):
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        turn = np.eye(3)
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn[i, i] = turn[j, j] = cos
        turn[i, j], turn[j, i] = -sin, sin
        result = turn @ result
    return result


def load(recipe: str | Path | Mapping[str, Any]) -> Recipe:
    """Recipe by name, from a TOML file or from its tables.

    Raises
    ------
    ValueError
        If there is no such recipe, or it cannot be read.
    """
    if isinstance(recipe, Mapping):
        return from_table(Recipe, recipe, "the recipe")
    path = FOLDER / f"{recipe}.toml" if str(recipe) in RECIPES else Path(recipe)
    if not path.exists():
        msg = f"no recipe {str(recipe)!r}: choose from {', '.join(RECIPES)}, or give a TOML file"
        raise ValueError(msg)
    return from_table(Recipe, read_table(path), str(path))


def write(recipe: str | Path | Mapping[str, Any], out_dir: str | Path) -> Path:
    """Write the dataset of a recipe, and its truth in ``derivatives/truth``.

    Parameters
    ----------
    recipe : str, Path or mapping
        One of :data:`RECIPES`, a TOML file, or the tables of one.
    out_dir : str or Path
        The dataset's folder; made where it is missing, refused where it holds anything.

    Returns
    -------
    Path
        ``out_dir``.

    Raises
    ------
    ValueError
        If there is no such recipe, or ``out_dir`` is not empty.
    """
    plan = load(recipe)
    root = Path(out_dir)
    if root.exists() and any(root.iterdir()):
        msg = f"{root} is not empty: give a new folder, nothing is overwritten"
        raise ValueError(msg)
    scanned, labels = scan(plan)
    _write_dataset(plan, root)
    truth = root / "derivatives" / "truth"
    _write_truth_dataset(plan, truth)
    for acquisition in plan.acquisitions:
        _write_acquisition(plan, acquisition, scanned, root)
    for session in {(each.subject, each.session): each for each in plan.acquisitions}.values():
        _write_truth(plan, session, scanned, labels, truth)
    return root


def scan(recipe: Recipe) -> tuple[Simulation, Tensor]:
    """Simulate what a recipe describes, without noise; also the labels on the acquired grid.

    The head is drawn as far as it goes, not only as far as it is seen: what lies outside the
    field of view still makes a field inside it.
    """
    grid, factor = recipe.grid, recipe.grid.factor
    tilt = rotation(recipe.head.tilt)
    affine, shape, window = _whole(grid, tilt)
    fine = affine.copy()
    fine[:3, :3] /= factor
    fine[:3, 3] += fine[:3, :3] @ np.full(3, (1 - factor) / 2)
    drawn = head(
        [factor * n for n in shape], torch.from_numpy(fine),
        tilt=torch.from_numpy(tilt), lesions=recipe.head.lesions,
    )  # fmt: skip
    field_strength = recipe.scan.imaging_frequency / GAMMA
    x, y, z = (zoom / factor for zoom in grid.zooms)
    maps = maps_of(
        drawn.labels, TISSUES, (x, y, z), field_strength=field_strength,
        texture=recipe.head.texture, seed=recipe.head.seed, dtype=torch.float64,
    )  # fmt: skip
    setup = Scan(
        field_strength,
        recipe.scan.echo_times,
        b0_direction=b0_direction(grid.affine),
        factor=factor,
        coil_phase=recipe.scan.coil_phase,
        coil_seed=recipe.head.seed,
    )
    scanned = simulate(maps, drawn.brain, grid.zooms, setup, window=window)
    seen = tuple(slice(factor * part.start, factor * part.stop) for part in window)
    return scanned, _majority(drawn.labels[seen], factor)


def _whole(grid: GridRecipe, tilt: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int], Window]:
    """Affine and shape of a grid that holds the whole head, and the acquired window in it."""
    corners = np.array(list(product(*zip(*HEAD_BOX, strict=True)))) @ tilt.T
    to_voxel = np.linalg.inv(grid.affine)
    voxels = corners @ to_voxel[:3, :3].T + to_voxel[:3, 3]
    low = np.minimum(np.floor(voxels.min(0)).astype(int), 0)
    high = np.maximum(np.ceil(voxels.max(0)).astype(int) + 1, grid.shape)
    affine = grid.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ low
    i, j, k = (slice(int(-a), int(n - a)) for a, n in zip(low, grid.shape, strict=True))
    nx, ny, nz = (int(n) for n in high - low)
    return affine, (nx, ny, nz), (i, j, k)


def _majority(labels: Tensor, factor: int) -> Tensor:
    """Most frequent label of each block, the lower one of equals."""
    best, winner = torch.zeros(()), torch.zeros((), dtype=labels.dtype)
    for label in labels.unique():
        share = block_mean((labels == label).float(), factor)
        winner = torch.where(share > best, label, winner)
        best = torch.maximum(share, best)
    return winner


def _siemens(signal: Tensor, scale: float) -> dict[str, tuple[np.ndarray, float, float]]:
    """12-bit integers; the phase becomes -4096..4094 by slope 2 and intercept -4096."""
    steps = ((signal.angle() / math.pi + 1) * 2048).round().to(torch.int16) % 4096
    size = (signal.abs() * scale).round().clamp(max=4095).to(torch.int16)
    return {
        "mag": (size.numpy(), 1.0, 0.0),
        "phase": (steps.numpy(), 2.0, -4096.0),
    }


def _radians(signal: Tensor, scale: float) -> dict[str, tuple[np.ndarray, float, float]]:
    """Floats: whole magnitudes, phase in radians in steps of pi / 2048."""
    steps = (signal.angle() / math.pi * 2048).round() * (math.pi / 2048)
    size = (signal.abs() * scale).round()
    return {
        "mag": (size.numpy().astype(np.float32), 1.0, 0.0),
        "phase": (steps.numpy().astype(np.float32), 1.0, 0.0),
    }


def _complex(signal: Tensor, scale: float) -> dict[str, tuple[np.ndarray, float, float]]:
    """Real and imaginary part as integers."""
    parts = {"real": signal.real, "imag": signal.imag}
    return {
        key: ((value * scale).round().to(torch.int16).numpy(), 1.0, 0.0)
        for key, value in parts.items()
    }


STORED = {"siemens": _siemens, "radians": _radians, "complex": _complex}
"""How a signal becomes files: part to stored numbers, slope, intercept."""

PHASE_UNITS = {"siemens": "arbitrary", "radians": "rad", "complex": "arbitrary"}


def _write_acquisition(
    recipe: Recipe, acquisition: Acquisition, scanned: Simulation, root: Path
) -> None:
    scale = PEAK / scanned.signal[0].abs().max().item()
    signal = add_noise(scanned.signal, scanned.mask, snr=recipe.scan.snr, seed=acquisition.seed)
    if acquisition.conjugate:
        signal = signal.conj().resolve_conj()
    if acquisition.alternating:
        signal[..., 1::2] *= -1
    folder = root / acquisition.folder / "anat"
    folder.mkdir(parents=True, exist_ok=True)
    for index, (time, echo) in enumerate(zip(recipe.scan.echo_times, signal, strict=True), 1):
        for part, (stored, slope, intercept) in STORED[acquisition.stored](echo, scale).items():
            entity = f"_echo-{index:0{acquisition.digits}}" * (acquisition.suffix == "MEGRE")
            stem = f"{acquisition.prefix}{entity}_part-{part}_{acquisition.suffix}"
            images.store(
                stored, folder / f"{stem}{recipe.extension}",
                affine=recipe.grid.affine, slope=slope, intercept=intercept,
            )  # fmt: skip
            own: dict[str, Any] = {} if part in ("mag", "real") else {
                "Units": PHASE_UNITS[acquisition.stored]
            }  # fmt: skip
            if not recipe.inherit:
                own = {**_common(recipe), **acquisition.metadata, "EchoTime": time, **own}
            if own:
                _json(folder / f"{stem}.json", own)
    if recipe.inherit:
        common = _common(recipe)
        if len(recipe.scan.echo_times) == 1:
            common["EchoTime"] = recipe.scan.echo_times[0]
        _json(root / f"{acquisition.suffix}.json", common)
        if acquisition.metadata:
            subject = f"sub-{acquisition.subject}"
            _json(root / subject / f"{subject}_{acquisition.suffix}.json", acquisition.metadata)


def _common(recipe: Recipe) -> dict[str, Any]:
    return {**recipe.metadata, "ImagingFrequency": recipe.scan.imaging_frequency}


def _write_dataset(recipe: Recipe, root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    _json(
        root / "dataset_description.json",
        {
            "Name": recipe.name,
            "BIDSVersion": BIDS_VERSION,
            "DatasetType": "raw",
            "License": "CC0-1.0",
            "Authors": ["qsmpipe"],
            "GeneratedBy": [{"Name": "qsmpipe.examples", "Version": __version__}],
        },
    )
    _text(root / "README.md", f"# {recipe.name}\n\n{recipe.text.strip()}\n")
    subjects = sorted({acquisition.subject for acquisition in recipe.acquisitions})
    rows = "".join(f"sub-{subject}\n" for subject in subjects)
    _text(root / "participants.tsv", f"participant_id\n{rows}")


def _write_truth_dataset(recipe: Recipe, root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    _json(
        root / "dataset_description.json",
        {
            "Name": f"Truth of: {recipe.name}",
            "BIDSVersion": BIDS_VERSION,
            "DatasetType": "derivative",
            "License": "CC0-1.0",
            "Authors": ["qsmpipe"],
            "GeneratedBy": [
                {
                    "Name": "truth",
                    "Version": __version__,
                    "Description": "What qsmpipe.examples simulated the images from",
                }
            ],
            "DatasetLinks": {"raw": "../.."},
        },
    )
    _text(
        root / "README.md",
        f"# Truth of: {recipe.name}\n\n"
        "Susceptibility is relative to water. The total field is what the phase shows, shim\n"
        "included; the local field is that of the sources inside the brain mask, relative to\n"
        "their mean, so that its inversion is the map referenced to the whole mask. Fields are\n"
        "0 outside the mask. All maps are means over the voxel, from a finer grid.\n",
    )


def _write_truth(
    recipe: Recipe, acquisition: Acquisition, scanned: Simulation, labels: Tensor, root: Path
) -> None:
    mask = scanned.mask
    hertz = hz_per_ppm(recipe.scan.imaging_frequency / GAMMA)
    magnitude = scanned.signal[0].abs() * (PEAK / scanned.signal[0].abs().max())
    head_map = {"SkullStripped": False, "SpatialReference": "orig"}
    brain_map = {"SkullStripped": True, "SpatialReference": "orig"}
    rows: list[tuple[str, str, Tensor, float, dict[str, Any]]] = [
        ("anat", "Chimap", scanned.chi, 5e-4, {
            **head_map, "Units": "ppm", "Description": "Susceptibility relative to water"}),
        ("anat", "R2starmap", scanned.r2star, 0.05, {
            **head_map, "Units": "1/s", "Description": "Relaxation without dephasing by fields"}),
        ("anat", "S0map", scanned.s0, 1e-3, {
            **head_map, "Units": "arbitrary", "Description": "Signal at echo time 0"}),
        ("anat", "desc-brain_mask", mask, 1, {
            "Type": "Brain", "Description": "Voxels that are brain by half or more"}),
        ("anat", "dseg", labels, 1, {"Description": "Most frequent tissue of each voxel"}),
        ("fmap", "magnitude", magnitude, 1, {
            **head_map, "Units": "arbitrary", "Description": "First echo without noise"}),
        ("fmap", "desc-total_fieldmap", scanned.total * mask * hertz, 0.02, {
            **brain_map, "Units": "Hz", "Description": "Total field, shim included"}),
        ("fmap", "desc-local_fieldmap", scanned.local * mask * hertz, 0.02, {
            **brain_map, "Units": "Hz", "Description": "Field of the sources in the mask"}),
    ]  # fmt: skip
    for datatype, name, values, step, sidecar in rows:
        folder = root / acquisition.folder / datatype
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{acquisition.visit}_{name}"
        images.store(
            _steps(values, step), folder / f"{stem}.nii.gz", affine=recipe.grid.affine, slope=step
        )
        _json(folder / f"{stem}.json", sidecar)
        if name == "dseg":
            names = "".join(f"{label:d}\t{TISSUES[label].name}\n" for label in sorted(TISSUES))
            _text(folder / f"{stem}.tsv", f"index\tname\n{names}")


def _steps(values: Tensor, step: float) -> np.ndarray:
    """Integers, ``step`` apart: they pack well, and hide the last bit of another machine."""
    if values.dtype in (torch.bool, torch.uint8):
        return values.numpy().astype(np.uint8)
    whole = (values / step).round().numpy()
    return whole.astype(np.int16 if np.abs(whole).max() < 2**15 else np.int32)


def _json(path: Path, content: Mapping[str, Any]) -> None:
    _text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _text(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: python -m qsmpipe.examples {{{','.join(RECIPES)}}} out_dir")
    try:
        write(sys.argv[1], sys.argv[2])
    except ValueError as error:
        sys.exit(str(error))
