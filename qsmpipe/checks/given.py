"""Images that the user gives beside an acquisition: masks and reference regions."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from qsmpipe import images
from qsmpipe.bids import Acquisition, find_mask
from qsmpipe.checks.examination import Examination, Finding, Notebook


def examine_mask(mask: Path, acquisition: Acquisition) -> tuple[Finding, ...]:
    """Look at a mask that the user gives for an acquisition: grid, values, size."""
    notes = Notebook()
    try:
        values, _ = images.read(mask)
        fits = images.same_grid(mask, acquisition.signal[0])
    except ValueError as error:
        notes.error("mask", str(error))
        return tuple(notes)
    if not fits:
        notes.error(
            "mask",
            f"{mask} {values.shape} is not on the grid of "
            f"{acquisition.relative(acquisition.signal[0])} "
            f"{images.shape_of(acquisition.signal[0])}: resample the mask onto it",
        )
    levels = np.unique(values)
    if not np.isin(levels, (0, 1)).all():
        notes.error(
            "mask",
            f"{mask}: holds {len(levels)} different values up to {levels[-1]:g}, where a mask has "
            "0 and 1: make it binary",
        )
    elif not values.any():
        notes.error("mask", f"{mask}: holds no voxel (all 0): make it again")
    return tuple(notes)


def with_given(
    examinations: Sequence[Examination],
    *,
    mask: bool,
    reference: str,
    folders: Sequence[Path],
) -> tuple[list[Examination], dict[str, dict[str, Path]]]:
    """Find the user's own masks where they are asked for; an acquisition without one is refused.

    Parameters
    ----------
    examinations
        The acquisitions.
    mask
        Whether the brain mask is the user's.
    reference
        What susceptibility is relative to; ``region:LABEL`` asks for a mask of that label.
    folders
        Derivative datasets to look into.

    Returns
    -------
    examinations
        With what was found wrong.
    given
        Acquisition name to ``mask`` and ``region`` files.
    """
    wanted: dict[str, str | None] = {"mask": None} if mask else {}
    kind, _, label = reference.partition(":")
    if kind == "region":
        wanted["region"] = label
    given: dict[str, dict[str, Path]] = {}
    examined = []
    for examination in examinations:
        acquisition, notes = examination.acquisition, Notebook()
        if not acquisition.sources:  # left out for its name: nothing can belong to it
            examined.append(examination)
            continue
        if kind == "csf" and len(examination.echo_times) < 2:
            notes.error(
                "reference",
                f"{acquisition.name}: reference csf finds the ventricles by their R2*, which one "
                "echo does not give: choose another reference",
            )
        for name, region in wanted.items():
            try:
                path = find_mask(folders, acquisition, label=region)
            except ValueError as error:
                notes.error(name, str(error))
                continue
            if path is None:
                what = f"mask with label or desc {region!r}" if region else "brain mask"
                notes.error(
                    name,
                    f"{acquisition.name}: no {what} in {', '.join(map(str, folders))}: name it "
                    "after the acquisition, as in sub-01_desc-brain_mask.nii.gz",
                )
                continue
            notes += examine_mask(path, acquisition)
            given.setdefault(acquisition.name, {})[name] = path
        examined.append(replace(examination, findings=(*examination.findings, *notes)))
    return examined, given
