"""A small head made of ellipsoids and tubes, on any grid: it needs no file.

Head coordinates are mm from the middle of the brain: x to the right, y to the front, z to the
top. The numbers are a drawing of an adult head, not a fit to one; what matters to QSM is there:
air in the sinuses, bone, a folded cortex, ventricles, nuclei, veins.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import pairwise
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from qsmpipe.numerics.simulate.field import AIR
from qsmpipe.numerics.simulate.tissues import Tissue

Point: TypeAlias = tuple[float, float, float]


class Part(IntEnum):
    """Labels of the analytic head."""

    AIR = 0
    SOFT = 1
    FAT = 2
    BONE = 3
    MARROW = 4
    EYE = 5
    CSF = 6
    CORD = 7
    CISTERN = 8
    WHITE = 10
    CORTEX = 11
    VENTRICLE = 12
    CEREBELLAR_WHITE = 13
    CEREBELLAR_CORTEX = 14
    BRAINSTEM = 15
    CAUDATE = 20
    PUTAMEN = 21
    PALLIDUM = 22
    THALAMUS = 23
    RED_NUCLEUS = 24
    SUBSTANTIA_NIGRA = 25
    DENTATE = 26
    HIPPOCAMPUS = 27
    SINUS_VEIN = 30
    VEIN = 31
    CALCIFICATION = 40
    MICROBLEED = 41


TISSUES: dict[int, Tissue] = {
    Part.AIR: Tissue("air", AIR, 0.0, 0.0),
    Part.SOFT: Tissue("muscle", 0.0, 30.0, 0.55),
    Part.FAT: Tissue("fat", 0.6, 30.0, 1.1),
    Part.BONE: Tissue("bone", -2.1, 400.0, 0.12),
    Part.MARROW: Tissue("marrow", -0.4, 120.0, 0.5),
    Part.EYE: Tissue("eye", 0.0, 3.0, 0.4),
    Part.CSF: Tissue("cerebrospinal fluid", 0.0, 3.0, 0.42),
    Part.CISTERN: Tissue("cistern", 0.0, 3.0, 0.42),
    Part.CORD: Tissue("spinal cord", -0.02, 20.0, 0.72),
    Part.WHITE: Tissue("white matter", -0.03, 20.0, 0.75, True),
    Part.CORTEX: Tissue("cortex", 0.02, 16.0, 0.66, True),
    Part.VENTRICLE: Tissue("ventricle", 0.0, 3.0, 0.40, True),
    Part.CEREBELLAR_WHITE: Tissue("cerebellar white matter", -0.02, 20.0, 0.74, True),
    Part.CEREBELLAR_CORTEX: Tissue("cerebellar cortex", 0.02, 17.0, 0.66, True),
    Part.BRAINSTEM: Tissue("brainstem", -0.015, 20.0, 0.72, True),
    Part.CAUDATE: Tissue("caudate", 0.06, 24.0, 0.68, True),
    Part.PUTAMEN: Tissue("putamen", 0.07, 27.0, 0.68, True),
    Part.PALLIDUM: Tissue("pallidum", 0.16, 42.0, 0.70, True),
    Part.THALAMUS: Tissue("thalamus", 0.02, 21.0, 0.69, True),
    Part.RED_NUCLEUS: Tissue("red nucleus", 0.11, 36.0, 0.70, True),
    Part.SUBSTANTIA_NIGRA: Tissue("substantia nigra", 0.14, 38.0, 0.70, True),
    Part.DENTATE: Tissue("dentate nucleus", 0.12, 35.0, 0.70, True),
    Part.HIPPOCAMPUS: Tissue("hippocampus", 0.01, 17.0, 0.67, True),
    Part.SINUS_VEIN: Tissue("dural sinus", 0.3, 35.0, 0.6),
    Part.VEIN: Tissue("vein", 0.3, 40.0, 0.6, True),
    Part.CALCIFICATION: Tissue("calcification", -2.0, 80.0, 0.3, True),
    Part.MICROBLEED: Tissue("microbleed", 1.0, 100.0, 0.5, True),
}
"""What each part is made of."""


class Shape(Protocol):
    """What can be painted."""

    def box(self) -> tuple[Point, Point]:
        """Two opposite corners (mm) of a box around it."""

    def inside(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Whether points (mm) lie in it."""


@dataclass(frozen=True)
class Ellipsoid:
    """Half axes in mm, the first two turned by ``turn`` degrees about z."""

    centre: Point
    axes: Point
    turn: float = 0.0

    def mirrored(self) -> "Ellipsoid":
        """Its like on the other side of the head."""
        return replace(self, centre=_left(self.centre), turn=-self.turn)

    def box(self) -> tuple[Point, Point]:
        """Two opposite corners (mm)."""
        a, b, c = self.axes
        flat = max(a, b) if self.turn else None
        return _around(self.centre, (flat or a, flat or b, c))

    def inside(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Whether points (mm) lie in it."""
        x, y, z = (u - c for u, c in zip((x, y, z), self.centre, strict=True))
        cos, sin = math.cos(math.radians(self.turn)), math.sin(math.radians(self.turn))
        a, b, c = self.axes
        along, across = (cos * x + sin * y) / a, (cos * y - sin * x) / b
        return along**2 + across**2 + (z / c) ** 2 <= 1


@dataclass(frozen=True)
class Tube:
    """All points within ``radius`` mm of the line from ``start`` to ``end``."""

    start: Point
    end: Point
    radius: float

    def mirrored(self) -> "Tube":
        """Its like on the other side of the head."""
        return replace(self, start=_left(self.start), end=_left(self.end))

    def box(self) -> tuple[Point, Point]:
        """Two opposite corners (mm)."""
        low = [min(a, b) - self.radius for a, b in zip(self.start, self.end, strict=True)]
        high = [max(a, b) + self.radius for a, b in zip(self.start, self.end, strict=True)]
        return (low[0], low[1], low[2]), (high[0], high[1], high[2])

    def inside(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Whether points (mm) lie in it."""
        return self.depth(x, y, z) >= 0

    def depth(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """How deep (mm) points lie under its surface; negative outside."""
        dx, dy, dz = (b - a for a, b in zip(self.start, self.end, strict=True))
        x, y, z = (u - a for u, a in zip((x, y, z), self.start, strict=True))
        along = ((x * dx + y * dy + z * dz) / (dx**2 + dy**2 + dz**2)).clamp(0, 1)
        squared = (x - along * dx) ** 2 + (y - along * dy) ** 2 + (z - along * dz) ** 2
        return self.radius - squared.sqrt()


Solid = TypeVar("Solid", Ellipsoid, Tube)


def _around(centre: Point, half: Point) -> tuple[Point, Point]:
    x, y, z = centre
    a, b, c = half
    return (x - a, y - b, z - c), (x + a, y + b, z + c)


def _left(point: Point) -> Point:
    return -point[0], point[1], point[2]


def _both(*shapes: Solid) -> list[Solid]:
    return [side for shape in shapes for side in (shape, shape.mirrored())]


def _line(radius: float, *points: Point) -> list[Tube]:
    return [Tube(a, b, radius) for a, b in pairwise(points)]


FACE: list[Ellipsoid | Tube] = [
    Ellipsoid((0, -3, -6), (76, 93, 62)),
    Ellipsoid((0, 38, -58), (60, 58, 62)),
    Ellipsoid((0, 62, -100), (38, 36, 30)),
    Tube((0, -18, -60), (0, -28, -400), 57),
    Ellipsoid((0, 98, -54), (13, 14, 20)),
    *_both(Ellipsoid((75, -12, -32), (7, 15, 28))),
]
EYE_FAT = _both(Ellipsoid((30, 62, -26), (18, 20, 17)))
EYES = _both(Ellipsoid((31, 66, -26), (12, 12, 12)))
OPTIC_NERVES = _both(Tube((31, 56, -26), (8, 30, -21), 2))
FACIAL_BONE: list[Ellipsoid | Tube] = [
    Ellipsoid((0, 82, -8), (46, 10, 11)),
    Ellipsoid((0, 70, -76), (28, 22, 10)),
    *_both(
        Tube((45, 70, -42), (66, 12, -38), 4),
        Tube((54, 10, -50), (49, 22, -92), 5),
        Tube((49, 22, -92), (14, 84, -106), 6),
    ),
    Tube((0, -36, -66), (0, -44, -400), 19),
]
SPINAL_CANAL = [Tube((0, -26, -60), (0, -42, -400), 9)]
CORD = [Tube((0, -26, -66), (0, -42, -400), 5)]
AIRWAY: list[Ellipsoid | Tube] = [
    *_both(Ellipsoid((6, 70, -55), (4.5, 30, 15))),
    Tube((0, 22, -62), (0, 12, -140), 8),
    Tube((0, 12, -140), (0, 8, -400), 8),
    Ellipsoid((0, 58, -93), (18, 24, 3)),
]
SINUSES = [
    *_both(
        Ellipsoid((12, 84, -5), (11, 5, 9)),
        Ellipsoid((9, 28, -43), (9, 12, 10)),
        Ellipsoid((27, 58, -52), (13, 15, 14)),
    )
]
CELLS = _both(
    Ellipsoid((9, 60, -26), (6, 18, 9)),
    Ellipsoid((58, -26, -46), (8, 11, 13)),
)
"""Air in small cells, with bone between them: ethmoid and mastoid."""
EAR_CANALS = _both(Tube((88, -12, -38), (58, -10, -38), 3.5))

CEREBRUM = Ellipsoid((0, 0, 10), (66, 84, 62))
LOW_CEREBRUM = 42.0
"""The cerebrum's half axis downwards (mm): it is flatter below."""
TEMPORAL_LOBES = _both(Ellipsoid((37, 10, -19), (23, 40, 21)))
CEREBELLUM = _both(Ellipsoid((20, -48, -34), (31, 30, 23)))
BRAINSTEM = [
    Tube((0, -4, -8), (0, -10, -34), 13),
    Tube((0, -14, -36), (0, -26, -68), 8),
]
CISTERNS = [Ellipsoid((0, 14, -27), (13, 13, 7)), *_both(Ellipsoid((19, -14, -20), (5, 12, 9)))]
SYLVIAN_CORTEX = _both(Tube((40, 30, -5), (52, -22, 8), 5))
SYLVIAN_FISSURES = _both(Tube((41, 30, -5), (56, -22, 8), 2))
CALLOSUM = [
    Ellipsoid((0, 32, 10), (13, 5, 8)),
    Ellipsoid((0, 24, 20), (14, 9, 4)),
    Ellipsoid((0, 8, 25), (14, 12, 4)),
    Ellipsoid((0, -10, 26), (14, 12, 4)),
    Ellipsoid((0, -28, 21), (14, 9, 5)),
]
VENTRICLES: list[Ellipsoid | Tube] = [
    *_both(
        Tube((7, 34, 9), (9, 18, 16), 4.0),
        Tube((9, 18, 16), (12, -8, 19), 4.5),
        Tube((12, -8, 19), (21, -36, 14), 5.0),
        Tube((21, -36, 14), (25, -58, 8), 3.5),
        Tube((22, -34, 10), (36, 4, -18), 2.5),
    ),
    Ellipsoid((0, -4, 2), (2.2, 14, 9)),
    Tube((0, -16, -4), (0, -28, -24), 1.2),
    Ellipsoid((0, -29, -32), (7, 4, 9)),
]
NUCLEI: list[tuple[Part, Sequence[Ellipsoid | Tube]]] = [
    (Part.HIPPOCAMPUS, _both(Ellipsoid((28, -4, -17), (6, 17, 6), 10))),
    (Part.THALAMUS, _both(Ellipsoid((11, -3, 8), (8, 14, 9), 15))),
    (
        Part.CAUDATE,
        [
            *_both(Ellipsoid((13, 30, 8), (5, 9, 8), 8)),
            *_both(Tube((14, 24, 14), (18, 0, 20), 3.0), Tube((18, 0, 20), (26, -22, 17), 2.2)),
        ],
    ),
    (Part.PUTAMEN, _both(Ellipsoid((27, 20, 3), (5, 16, 10), 10))),
    (Part.PALLIDUM, _both(Ellipsoid((19.5, 14, 1), (4.5, 9, 6.5), 18))),
    (Part.RED_NUCLEUS, _both(Ellipsoid((5, -4, -9), (3.2, 3.2, 4)))),
    (Part.SUBSTANTIA_NIGRA, _both(Ellipsoid((9.5, 1, -13), (2.6, 7, 3), -25))),
    (Part.DENTATE, _both(Ellipsoid((15, -42, -33), (5, 8, 5), -15))),
]


def _sagittal_sinus() -> Iterator[Point]:
    for degrees in range(15, 181, 15):
        turn = math.radians(degrees)
        yield 0.0, 85.5 * math.cos(turn), 10 + 63.5 * math.sin(turn)


def _bridging_veins() -> Iterator[Tube]:
    for y in (55.0, 32.0, 8.0, -16.0, -40.0, -60.0):
        height = math.sqrt(1 - (y / 84) ** 2)
        turns = [math.radians(degrees) for degrees in (2, 20, 38, 54)]
        points = [
            (66 * height * math.sin(t), y - 12 * t, 10 + 61.5 * height * math.cos(t))
            for t in turns
        ]
        yield from _line(1.1, *points)


DURAL_SINUSES = [
    *_line(3.0, *_sagittal_sinus()),
    *_line(2.2, (0, -38, 13), (0, -80, 2)),
    *_both(*_line(3.0, (0, -85, 6), (40, -74, -8), (58, -44, -22), (54, -22, -60))),
]
VEINS = [
    *_both(
        *_line(1.1, (2.0, 18, 12), (2.5, -10, 17), (1.5, -30, 14)),
        *_line(0.9, (14, 4, 17), (8, 14, 15), (2, 18, 12)),
        *_line(0.9, (10, 12, -18), (15, -8, -10), (3, -30, 12)),
        *_line(0.8, (9, 30, 14), (17, 40, 22), (24, 48, 28)),
        *_line(0.8, (15, -12, 22), (24, -14, 32), (30, -15, 42)),
        *_line(0.8, (22, -36, 18), (32, -46, 28), (38, -52, 36)),
        *_bridging_veins(),
    ),
    Tube((0, -30, 14), (0, -38, 13), 2.0),
]
LESIONS: list[tuple[Part, list[Ellipsoid]]] = [
    (
        Part.CALCIFICATION,
        [Ellipsoid((-30, 34, 26), (5, 4, 4.5)), Ellipsoid((0, -32, 6), (3, 3, 3))],
    ),
    (
        Part.MICROBLEED,
        [
            Ellipsoid(centre, (2.2, 2.2, 2.2))
            for centre in (
                (36.0, -12.0, 24.0), (-40.0, -30.0, 18.0), (26.0, 46.0, 18.0),
                (-22.0, -52.0, 30.0), (30.0, -62.0, -34.0),
            )
        ],
    ),
]  # fmt: skip
"""A calcification in the frontal white matter and one of the pineal, and five microbleeds."""

CRANIUM_BOX = ((-84.0, -102.0, -90.0), (84.0, 102.0, 90.0))
"""Two opposite corners (mm) of a box around brain, skull and scalp."""

SLAB = 1 << 18
"""Voxels drawn at once: few enough to stay in the processor's cache."""

HEAD_BOX = ((-90.0, -105.0, -130.0), (90.0, 115.0, 90.0))
"""Two opposite corners (mm): what must be simulated, seen or not; the neck goes on below."""


class Head(NamedTuple):
    """An analytic head on a grid."""

    labels: Tensor
    """(X, Y, Z) uint8, see :class:`Part`."""
    brain: Tensor
    """(X, Y, Z) bool: the brain with its sulci and ventricles."""


@dataclass(frozen=True)
class _Canvas:
    """Label map that shapes are painted on, each in its own box only."""

    labels: Tensor
    to_head: Tensor
    """Voxel to head coordinates (mm), 4 x 4."""

    def box(self, corners: tuple[Point, Point]) -> tuple[slice, slice, slice]:
        """Voxels that may lie in a box given in mm."""
        low, high = corners
        points = torch.tensor(
            [[x, y, z, 1.0] for x in (low[0], high[0]) for y in (low[1], high[1])
             for z in (low[2], high[2])], dtype=torch.float64,
        )  # fmt: skip
        voxels = (points @ torch.linalg.inv(self.to_head).T)[:, :3]
        first, last = voxels.amin(0).floor().tolist(), voxels.amax(0).ceil().tolist()
        i, j, k = (
            slice(min(max(int(a), 0), n), min(max(int(b) + 1, 0), n))
            for a, b, n in zip(first, last, self.labels.shape, strict=True)
        )
        return i, j, k

    def coordinates(self, box: tuple[slice, slice, slice]) -> tuple[Tensor, Tensor, Tensor]:
        """Head coordinates (mm) of the voxels in ``box``."""
        i, j, k = (torch.arange(s.start, s.stop, dtype=torch.float64) for s in box)
        i, j = i[:, None, None], j[:, None]
        x, y, z = (row[0] * i + row[1] * j + row[2] * k + row[3] for row in self.to_head[:3])
        return x, y, z

    def paint(
        self,
        part: Part,
        shapes: Sequence[Shape],
        where: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        over: Sequence[Part] | None = None,
    ) -> None:
        """Give ``part`` to all that is inside, ``where`` it may and ``over`` what it may."""
        for shape in shapes:
            box = self.box(shape.box())
            if any(s.start >= s.stop for s in box):
                continue
            x, y, z = self.coordinates(box)
            hit = shape.inside(x, y, z)
            if where is not None:
                hit &= where(x, y, z)
            if over is not None:
                hit &= torch.isin(self.labels[box], torch.tensor(over, dtype=torch.uint8))
            self.labels[box].masked_fill_(hit, part)


def _depth(
    shape: Ellipsoid, x: Tensor, y: Tensor, z: Tensor, below: float | None = None
) -> Tensor:
    """About how deep (mm) points lie under the surface of an ellipsoid; negative outside."""
    x, y, z = (u - c for u, c in zip((x, y, z), shape.centre, strict=True))
    a, b, c = shape.axes
    squares = torch.where(z > 0, c, below or c) ** 2
    radius = (x**2 / a**2 + y**2 / b**2 + z**2 / squares).sqrt().clamp(min=1e-6)
    slope = (x**2 / a**4 + y**2 / b**4 + z**2 / squares**2).sqrt().clamp(min=1e-9)
    return (1 - radius) * radius / slope


def _cells(period: float, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Evaluate a bent gyroid: its zeros are sheets half a ``period`` (mm) apart, as folds are."""
    bend = 0.25 * period
    x, y, z = (
        x + bend * torch.sin(y / 23 + 0.7) + 0.4 * bend * torch.sin(z / 11),
        y + bend * torch.sin(z / 19 + 1.9) + 0.4 * bend * torch.sin(x / 13 + 1),
        z + bend * torch.sin(x / 21 + 0.3) + 0.4 * bend * torch.sin(y / 12 + 2),
    )
    k = 2 * math.pi / period
    return (
        torch.sin(k * x) * torch.cos(k * y)
        + torch.sin(k * y) * torch.cos(k * z)
        + torch.sin(k * z) * torch.cos(k * x)
    )


def head(
    shape: Sequence[int],
    to_scanner: Tensor,
    *,
    tilt: Tensor | None = None,
    lesions: bool = False,
) -> Head:
    """Draw the head on a grid.

    Parameters
    ----------
    shape : sequence of 3 ints
        Grid.
    to_scanner : (4, 4) tensor
        Voxel to scanner coordinates (mm), as in a NIfTI file: x to the right, y to the front,
        z along B0. The middle of the brain lies at the origin.
    tilt : (3, 3) tensor, optional
        Rotation from head to scanner coordinates; none by default.
    lesions : bool
        Add a frontal calcification, a calcified pineal and five microbleeds.

    Returns
    -------
    Head
        Labels and brain mask.
    """
    nx, ny, nz = shape
    to_head = to_scanner.to(torch.float64).clone()
    if tilt is not None:
        to_head[:3] = tilt.to(torch.float64).T @ to_head[:3]
    labels = torch.zeros((nx, ny, nz), dtype=torch.uint8)
    brain = torch.zeros((nx, ny, nz), dtype=torch.bool)
    thickness = max(1, SLAB // (ny * nz))
    for start in range(0, nx, thickness):
        shifted = to_head.clone()
        shifted[:3, 3] += start * to_head[:3, 0]
        part = slice(start, start + thickness)
        _draw(_Canvas(labels[part], shifted), brain[part], lesions=lesions)
    return Head(labels, brain)


def _draw(canvas: _Canvas, brain: Tensor, *, lesions: bool) -> None:
    """Paint everything from the outside inwards, and mark the brain."""
    canvas.paint(Part.SOFT, FACE)
    canvas.paint(Part.FAT, FACE, _marbling)
    box = canvas.box(CRANIUM_BOX)
    around = canvas.labels[box]
    if not around.numel():
        _draw_face(canvas)
        canvas.paint(Part.AIR, AIRWAY)
        return
    x, y, z = canvas.coordinates(box)
    upper, lower, stem = _brain_depths(x, y, z)
    depth = torch.maximum(torch.maximum(upper, lower), stem)

    around.masked_fill_(depth > -15, Part.SOFT)
    around.masked_fill_((depth > -15) & (depth < -11) & (z > -30), Part.FAT)
    _draw_face(canvas)
    around.masked_fill_((depth > -9.5) & (z > -74), Part.BONE)
    around.masked_fill_((depth > -7.3) & (depth < -5.2) & (z > -5), Part.MARROW)
    _draw_air(canvas)
    around.masked_fill_((depth > -4.2) & (z > -70), Part.BONE)
    around.masked_fill_(depth > -3, Part.CSF)
    canvas.paint(Part.SINUS_VEIN, DURAL_SINUSES)
    _draw_brain(around, x, y, z, upper, lower, stem)
    canvas.paint(Part.CISTERN, CISTERNS, over=(Part.WHITE, Part.CORTEX, Part.CSF))
    brain[box] = (depth > 0) & (around != Part.CISTERN)
    _draw_deep(canvas, lesions=lesions)


def _brain_depths(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Depths (mm) below the surface of cerebrum, cerebellum and brainstem."""
    upper = _depth(CEREBRUM, x, y, z, LOW_CEREBRUM)
    for lobe in TEMPORAL_LOBES:
        upper = torch.maximum(upper, _depth(lobe, x, y, z))
    first, second = (_depth(lobe, x, y, z) for lobe in CEREBELLUM)
    top, bottom = (tube.depth(x, y, z) for tube in BRAINSTEM)
    return upper, torch.maximum(first, second), torch.maximum(top, bottom)


def _marbling(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Fat between and under the muscles of face and neck."""
    return _cells(34.0, x, y, z).abs() < 0.35


def _draw_face(canvas: _Canvas) -> None:
    canvas.paint(Part.BONE, FACIAL_BONE)
    canvas.paint(Part.CSF, SPINAL_CANAL)
    canvas.paint(Part.CORD, CORD)
    canvas.paint(Part.FAT, EYE_FAT)
    canvas.paint(Part.EYE, EYES)
    canvas.paint(Part.CORD, OPTIC_NERVES)


def _draw_air(canvas: _Canvas) -> None:
    for sinus in SINUSES:
        a, b, c = sinus.axes
        canvas.paint(Part.BONE, [Ellipsoid(sinus.centre, (a + 1.3, b + 1.3, c + 1.3))])
    canvas.paint(Part.BONE, CELLS)
    canvas.paint(Part.AIR, [*SINUSES, *AIRWAY, *EAR_CANALS])
    canvas.paint(Part.AIR, CELLS, lambda x, y, z: _cells(9.0, x, y, z) < 0.5)


def _draw_brain(
    labels: Tensor, x: Tensor, y: Tensor, z: Tensor, upper: Tensor, lower: Tensor, stem: Tensor
) -> None:
    """Paint folded cortex, white matter, cerebellum and brainstem."""
    fold = _cells(24.0, x, y, z).abs()
    midline = (x.abs() < 4.2) & ((y / 52) ** 2 + ((z - 6) / 24) ** 2 > 1) & (z > -20)
    grey = (upper < 3) | (fold < 1.0 * (1 - upper / 26)) | midline
    fluid = (fold < 0.26 * (1 - upper / 21)) | (midline & (x.abs() < 1.1))
    inside = upper > 0
    labels.masked_fill_(inside, Part.WHITE)
    labels.masked_fill_(inside & grey, Part.CORTEX)
    labels.masked_fill_(inside & fluid, Part.CSF)

    fold = _cells(10.0, x, y, z).abs()
    core = ((x.abs() - 13) / 15) ** 2 + ((y + 43) / 16) ** 2 + ((z + 34) / 9) ** 2 < 1
    inside = (lower > 0) & ~((upper > 0) & (upper > lower))
    labels.masked_fill_(inside, Part.CEREBELLAR_CORTEX)
    labels.masked_fill_(inside & (fold > 1.0) & (lower > 2), Part.CEREBELLAR_WHITE)
    labels.masked_fill_(inside & (fold < 0.16) & (lower < 7), Part.CSF)
    labels.masked_fill_(inside & core, Part.CEREBELLAR_WHITE)
    tentorium = (lower > 0) & (upper > 0) & ((upper - lower).abs() < 1.2)
    labels.masked_fill_(tentorium, Part.CSF)
    labels.masked_fill_((stem > 0) & (upper < 12), Part.BRAINSTEM)


def _draw_deep(canvas: _Canvas, *, lesions: bool) -> None:
    tissue = (Part.WHITE, Part.CORTEX, Part.CSF)
    canvas.paint(Part.CORTEX, SYLVIAN_CORTEX, over=(Part.WHITE,))
    canvas.paint(Part.CSF, SYLVIAN_FISSURES, over=tissue)
    canvas.paint(Part.WHITE, CALLOSUM)
    canvas.paint(Part.VENTRICLE, VENTRICLES)
    for part, shapes in NUCLEI:
        canvas.paint(part, shapes)
    canvas.paint(Part.VEIN, VEINS)
    for part, spots in LESIONS if lesions else ():
        canvas.paint(part, spots)
