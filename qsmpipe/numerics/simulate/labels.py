"""Real heads from label maps: which tissue a label is, and what must be mended first.

The labels are those of FreeSurfer for the brain and of the CHARM head segmentation (5xx)
outside it. Arrays are in RAS+ order: the last axis runs from the neck to the vertex.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.masks.morphology import dilate, erode
from qsmpipe.numerics.simulate.field import AIR
from qsmpipe.numerics.simulate.tissues import Tissue, brain_of

SPECK = 10
"""Label-0 components of so many voxels or fewer are noise."""

WET_SPECK = 1000
"""Up to so many voxels if most of what is around them is fluid or brain."""

VAULT = 35.0
"""The skull vault starts so far above the eyes' centre (mm); it holds no air."""

EYES = 506
CSF = 24
VEIN = 514
ARTERY = 502

_SIDES: dict[tuple[int, int], Tissue] = {
    (2, 41): Tissue("cerebral white matter", -0.03, 20.0, 0.75, True),
    (3, 42): Tissue("cerebral cortex", 0.02, 16.0, 0.66, True),
    (4, 43): Tissue("lateral ventricle", 0.0, 3.0, 0.40, True),
    (5, 44): Tissue("inferior lateral ventricle", 0.0, 3.0, 0.40, True),
    (7, 46): Tissue("cerebellar white matter", -0.02, 20.0, 0.74, True),
    (8, 47): Tissue("cerebellar cortex", 0.02, 17.0, 0.66, True),
    (10, 49): Tissue("thalamus", 0.02, 21.0, 0.69, True),
    (11, 50): Tissue("caudate", 0.06, 24.0, 0.68, True),
    (12, 51): Tissue("putamen", 0.07, 27.0, 0.68, True),
    (13, 52): Tissue("pallidum", 0.16, 42.0, 0.70, True),
    (17, 53): Tissue("hippocampus", 0.01, 17.0, 0.67, True),
    (18, 54): Tissue("amygdala", 0.01, 17.0, 0.67, True),
    (25, 57): Tissue("white matter lesion", 0.01, 15.0, 0.72, True),
    (26, 58): Tissue("accumbens area", 0.04, 22.0, 0.68, True),
    (28, 60): Tissue("ventral diencephalon", 0.03, 26.0, 0.71, True),
    (30, 62): Tissue("perivascular space", 0.0, 8.0, 0.5, True),
    (136, 163): Tissue("choroid plexus", 0.0, 10.0, 0.5, True),
    (137, 164): Tissue("choroid plexus, inferior horn", 0.0, 10.0, 0.5, True),
}

TISSUES: dict[int, Tissue] = {
    0: Tissue("air", AIR, 0.0, 0.0),
    14: Tissue("3rd ventricle", 0.0, 3.0, 0.40, True),
    15: Tissue("4th ventricle", 0.0, 3.0, 0.40, True),
    16: Tissue("brainstem", -0.015, 20.0, 0.72, True),
    72: Tissue("5th ventricle", 0.0, 3.0, 0.40, True),
    85: Tissue("optic chiasm", -0.03, 20.0, 0.72),
    CSF: Tissue("cerebrospinal fluid", 0.0, 3.0, 0.42),
    ARTERY: Tissue("artery", -0.03, 10.0, 0.8),
    EYES: Tissue("eyeball", 0.0, 3.0, 0.4),
    507: Tissue("muscle and fat", 0.1, 30.0, 0.6),
    508: Tissue("eye muscle", 0.0, 30.0, 0.55),
    509: Tissue("mucosa", 0.0, 20.0, 0.6),
    511: Tissue("skin", 0.2, 35.0, 0.8),
    512: Tissue("spinal cord", -0.02, 20.0, 0.72),
    VEIN: Tissue("vein", 0.3, 35.0, 0.6),
    515: Tissue("cortical bone", -2.1, 400.0, 0.12),
    516: Tissue("cancellous bone", -0.4, 120.0, 0.5),
    530: Tissue("optic nerve", -0.03, 20.0, 0.72),
    **{label: tissue for pair, tissue in _SIDES.items() for label in pair},
}
"""What each label is made of."""


WET = (CSF, EYES, *(label for label, tissue in TISSUES.items() if tissue.brain))
"""No air lies next to these: a hole that they wall in is noise, up to a size."""


class Cleaned(NamedTuple):
    """A head ready for simulation."""

    labels: Tensor
    """(X, Y, Z) labels, cropped to the head, the neck made longer."""
    start: tuple[int, int, int]
    """Where its corner lies in the array that was given; the last may be negative."""


def clean(labels: Tensor, zooms: Zooms, *, neck: float = 40.0) -> Cleaned:
    """Mend what would wreck a field simulation.

    Islands in the outside air go; specks of label 0, larger ones that brain or fluid walls in,
    and all label 0 shut in the skull vault take the label of the nearest tissue; the lowest
    complete slice is repeated downwards, so that the cut through the neck lies far from the
    brain. Sinuses, pharynx and mastoid cells stay air.

    Parameters
    ----------
    labels : (X, Y, Z) integer tensor
        In RAS+ order, 0 for air.
    zooms : tuple of float
        Voxel size (mm).
    neck : float
        How far to repeat the neck below the lowest complete slice (mm).

    Returns
    -------
    Cleaned
        Labels in the given dtype.

    Raises
    ------
    ValueError
        If there is no head.
    """
    array = labels.cpu().numpy().copy()
    if not array.any():
        msg = "the label map holds nothing but 0 (air): there is no head in it"
        raise ValueError(msg)
    components, _ = ndimage.label(array > 0)
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    array[components != sizes.argmax()] = 0

    eyes = np.argwhere(array == EYES)
    if len(eyes):
        base = round(eyes[:, 2].mean() + VAULT / zooms[2])
        _fill(array[..., base:], _shut_in(array[..., base:]))
    _fill(array, _specks(array))
    i, j, k = ndimage.find_objects((array > 0).astype(np.uint8))[0]
    array = array[i, j, k]
    bottom = _lowest_complete(array > 0)
    array = array[..., bottom:]
    repeats = round(neck / zooms[2])
    array = np.concatenate([np.repeat(array[..., :1], repeats, axis=2), array], axis=2)
    start = (i.start, j.start, k.start + bottom - repeats)
    return Cleaned(torch.from_numpy(np.ascontiguousarray(array)).to(labels.device), start)


def _lowest_complete(head: np.ndarray) -> int:
    """Lowest slice that is as large as those above it, or nearly: no ragged rest of a cut."""
    areas = head.sum((0, 1))
    for k in range(len(areas) // 2):
        if areas[k] >= 0.8 * np.median(areas[k : k + 12]):
            return k
    return 0


def _specks(array: np.ndarray) -> np.ndarray:
    """Components of label 0 that are no air: small ones, and those with wet walls."""
    components, _ = ndimage.label(array == 0)
    sizes = np.bincount(components.ravel())
    keep = (sizes <= SPECK) & (sizes > 0)
    keep[0] = False
    boxes = ndimage.find_objects(components)
    for number in np.flatnonzero(~keep[1:]) + 1:
        if sizes[number] < WET_SPECK:
            wide = _wider(boxes[number - 1])
            hole = components[wide] == number
            walls = array[wide][ndimage.binary_dilation(hole) & ~hole]
            keep[number] = np.isin(walls, WET).mean() > 0.5
    numbers = np.where(keep, np.cumsum(keep), 0)
    return numbers[components]


def _shut_in(array: np.ndarray) -> np.ndarray:
    """Components of label 0 that reach neither the sides nor the top of the array.

    Its bottom is a cut through the head: what touches that alone is shut in as well.
    """
    open_sides = np.pad(array == 0, ((1, 1), (1, 1), (0, 1)), constant_values=True)
    components, _ = ndimage.label(open_sides)
    components[components == components[0, 0, -1]] = 0
    return components[1:-1, 1:-1, :-1]


def _wider(box: tuple[slice, ...]) -> tuple[slice, ...]:
    return tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in box)


def _fill(array: np.ndarray, components: np.ndarray) -> None:
    """Give each voxel of the numbered components the nearest label around it."""
    for number, box in enumerate(ndimage.find_objects(components), start=1):
        if box is None:
            continue
        wide = _wider(box)
        hole = components[wide] == number
        nearest = ndimage.distance_transform_edt(
            array[wide] == 0, return_distances=False, return_indices=True
        )
        array[wide][hole] = array[wide][tuple(nearest)][hole]


def brain_mask(
    labels: Tensor,
    zooms: Zooms,
    *,
    tissues: Mapping[int, Tissue] = TISSUES,
    closing: float = 5.0,
) -> Tensor:
    """Brain with its sulci: brain labels, and what fluid and blood a closing adds to them.

    Parameters
    ----------
    labels : (X, Y, Z) integer tensor
        Label map, cleaned.
    zooms : tuple of float
        Voxel size (mm).
    tissues : mapping
        Label to tissue.
    closing : float
        Radius of the ball (mm).

    Returns
    -------
    (X, Y, Z) bool tensor
    """
    brain = brain_of(labels, tissues)
    pad = tuple(int(closing / zoom) + 2 for zoom in reversed(zooms) for _ in range(2))
    wide = torch.nn.functional.pad(brain, pad)
    closed = erode(dilate(wide, zooms, radius=closing), zooms, radius=closing)
    x, y, z = (slice(amount, amount + n) for amount, n in zip(pad[::-2], brain.shape, strict=True))
    fluid = torch.isin(labels, torch.tensor([CSF, ARTERY, VEIN], device=labels.device))
    return brain | (closed[x, y, z] & fluid)
