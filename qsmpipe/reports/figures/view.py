"""How a grid is looked at: slices in the voxel axes nearest to the anatomical ones.

There is no resampling. Slices are in radiological order: right on the left, anterior on top or on
the left.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SAGITTAL, CORONAL, AXIAL = 0, 1, 2
WIDE, TIGHT = 14.0, 2.0
"""What is shown around the brain mask (mm): of images of the head, of maps known inside it."""
STRAY = 0.001
"""Share of a mask, at each end of an axis, that does not widen what is shown."""


@dataclass(frozen=True)
class View:
    """How a grid is looked at: which voxel axis runs to the right, to the front and up.

    Attributes
    ----------
    order : tuple of int
        The voxel axes nearest to right, anterior and superior.
    signs : tuple of int
        -1 where such an axis runs the other way.
    zooms : tuple of float
        Voxel size along right, anterior and superior (mm).
    box : tuple of slice
        What is shown, in reordered voxels.
    span : tuple of (int, int)
        First and last slice worth showing on each axis, counted in the box.
    origin, pitch : tuple of float
        Scanner coordinate of the box's first slice on each axis, and what a slice adds (mm).
    """

    order: tuple[int, int, int]
    signs: tuple[int, int, int]
    zooms: tuple[float, float, float]
    box: tuple[slice, slice, slice]
    span: tuple[tuple[int, int], ...]
    origin: tuple[float, float, float]
    pitch: tuple[float, float, float]

    @classmethod
    def of(
        cls, affine: np.ndarray, mask: np.ndarray, margin: float, target: np.ndarray | None = None
    ) -> "View":
        """View of a grid, cropped to a mask.

        Parameters
        ----------
        affine : (4, 4) array
            Voxel to scanner coordinates (mm).
        mask : (X, Y, Z) bool array
            What is to be seen.
        margin : float
            What to show around it (mm).
        target : (X, Y, Z) bool array, optional
            What the slices go through; ``mask`` by default.
        """
        shape = mask.shape
        size = np.linalg.norm(affine[:3, :3], axis=0)
        rotation = affine[:3, :3] / size
        order = max(
            itertools.permutations(range(3)),
            key=lambda axes: sum(abs(rotation[world, axis]) for world, axis in enumerate(axes)),
        )
        signs = tuple(1 if rotation[world, axis] >= 0 else -1 for world, axis in enumerate(order))
        zooms = tuple(float(size[axis]) for axis in order)
        turned = _turn(mask, order, signs)
        aim = turned if target is None else _turn(target, order, signs)
        box, span = [], []
        for axis, (length, zoom) in enumerate(zip(turned.shape, zooms, strict=True)):
            others = tuple({0, 1, 2} - {axis})
            first, last = _extent(turned.sum(others))
            rim = round(margin / zoom)
            start, stop = max(first - rim, 0), min(last + rim + 1, length)
            box.append(slice(start, stop))
            first, last = np.clip(_extent(aim.sum(others)), start, stop - 1)
            span.append((int(first) - start, int(last) - start))
        centre = [
            (shape[axis] - 1) / 2 if axis != order[world] else 0.0
            for world in range(3)
            for axis in range(3)
        ]
        origin = []
        for world, axis in enumerate(order):
            voxel = np.array(centre[3 * world : 3 * world + 3])
            start = box[world].start
            voxel[axis] = start if signs[world] > 0 else shape[axis] - 1 - start
            origin.append(float(affine[world, :3] @ voxel + affine[world, 3]))
        pitch = [abs(float(affine[world, axis])) for world, axis in enumerate(order)]
        return cls(order, signs, zooms, tuple(box), tuple(span), tuple(origin), tuple(pitch))  # type: ignore[arg-type]

    def crop(self, volume: np.ndarray) -> np.ndarray:
        """Cut out what is shown, axes towards right, anterior and superior."""
        return _turn(volume, self.order, self.signs)[self.box]

    def cuts(self, plane: int, count: int) -> list[int]:
        """At most ``count`` slices, evenly spread over the mask without its ends."""
        first, last = self.span[plane]
        positions = first + (last - first) * (np.arange(count) + 0.8) / (count + 0.6)
        if count == 1 or last - first < 2:
            return [(first + last) // 2]
        return sorted({int(np.floor(p + 0.5)) for p in positions})

    def place(self, plane: int, cut: int) -> str:
        """Scanner coordinate of a slice, as in ``R 12 mm``."""
        where = round(self.origin[plane] + cut * self.pitch[plane])
        return f"{('RL', 'AP', 'SI')[plane][where < 0]} {abs(where)} mm"

    def size(self, plane: int) -> tuple[float, float]:
        """Width and height of a slice (mm)."""
        across, up = (axis for axis in range(3) if axis != plane)
        lengths = [(cut.stop - cut.start) * z for cut, z in zip(self.box, self.zooms, strict=True)]
        return lengths[across], lengths[up]


def _turn(volume: np.ndarray, order: Sequence[int], signs: Sequence[int]) -> np.ndarray:
    turned = np.transpose(volume, order)
    return turned[tuple(slice(None, None, sign) for sign in signs)]


def _extent(profile: np.ndarray) -> tuple[int, int]:
    """First and last place of a profile, a few stray counts at its ends left out."""
    total = np.cumsum(profile, dtype=np.float64)
    if not total[-1]:
        return 0, len(profile) - 1
    first, last = np.searchsorted(total, (STRAY * total[-1], (1 - STRAY) * total[-1]), "right")
    return int(first), min(int(last), len(profile) - 1)


def slice_of(cropped: np.ndarray, plane: int, cut: int) -> np.ndarray:
    """Take a slice as it is seen: first row on top, right (or anterior) on the left."""
    return np.take(cropped, cut, axis=plane).T[::-1, ::-1]
