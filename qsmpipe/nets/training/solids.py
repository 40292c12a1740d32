"""Geometric solids of any size and direction, painted on a grid.

Coordinates are mm from the centre of the grid's first voxel, along its axes.
"""

import math
from collections.abc import Iterator, Sequence
from enum import Enum, auto
from typing import NamedTuple

import torch
from torch import Tensor

from qsmpipe.nets.training.draws import Draws, Range
from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.grids import Box


class Kind(Enum):
    """Of a solid."""

    ELLIPSOID = auto()
    SPHERE = auto()
    CUBOID = auto()
    CYLINDER = auto()


class Solid(NamedTuple):
    """One solid."""

    kind: Kind
    centre: tuple[float, ...]
    """In mm."""
    axes: tuple[float, ...]
    """Half axes, half edges, or two half axes and half the length (mm)."""
    turn: list[list[float]]
    """Rotation from its own axes to those of the grid."""

    def box(self, shape: Sequence[int], zooms: Zooms) -> Box:
        """Give voxels of a grid that may lie in it."""
        sides = []
        for row, middle, n, zoom in zip(self.turn, self.centre, shape, zooms, strict=True):
            reach = [r * a for r, a in zip(row, self.axes, strict=True)]
            if self.kind in (Kind.ELLIPSOID, Kind.SPHERE):
                half = math.hypot(*reach)
            else:
                half = sum(map(abs, reach))
            first = math.floor((middle - half) / zoom)
            last = math.ceil((middle + half) / zoom) + 1
            sides.append(slice(min(max(first, 0), n), min(max(last, 0), n)))
        x, y, z = sides
        return x, y, z

    def cover(self, box: Box, zooms: Zooms, *, parts: Sequence[int], like: Tensor) -> Tensor:
        """Share of each voxel of ``box`` that lies in it, by ``parts`` points along each axis."""
        x, y, z = (
            (((torch.arange(s.start * n, s.stop * n, device=like.device) + 0.5) / n - 0.5) * zoom
             - middle).to(like)
            for s, n, zoom, middle in zip(box, parts, zooms, self.centre, strict=True)
        )  # fmt: skip
        u, v, w = (
            (self.turn[0][i] / a * x)[:, None, None]
            + (self.turn[1][i] / a * y)[:, None]
            + self.turn[2][i] / a * z
            for i, a in enumerate(self.axes)
        )
        if self.kind is Kind.CUBOID:
            inside = torch.maximum(torch.maximum(u.abs(), v.abs()), w.abs()) <= 1
        elif self.kind is Kind.CYLINDER:
            inside = (u.square() + v.square() <= 1) & (w.abs() <= 1)
        else:
            inside = u.square() + v.square() + w.square() <= 1
        sizes = [m for s, n in zip(box, parts, strict=True) for m in (s.stop - s.start, n)]
        return inside.to(like).reshape(sizes).mean((1, 3, 5))


def draw_solids(
    draws: Draws,
    count: int,
    *,
    within: tuple[Sequence[float], Sequence[float]],
    size: Range,
    kinds: Sequence[Kind] = tuple(Kind),
) -> Iterator[Solid]:
    """Draw solids.

    Parameters
    ----------
    draws : Draws
        Random numbers.
    count : int
        How many.
    within : two sequences of 3 floats
        Opposite corners (mm) of a box that holds their centres.
    size : range
        Half axes (mm), each by itself, log-uniform.
    kinds : sequence of Kind
        Each is as likely as the others.

    Yields
    ------
    Solid
    """
    low, high = (torch.tensor(corner, dtype=torch.float64) for corner in within)
    centres = (low + (high - low) * draws.uniform((0.0, 1.0), count, 3)).tolist()
    axes = draws.log_uniform(size, count, 3).tolist()
    turns = draws.rotations(count).tolist()
    for centre, half, turn in zip(centres, axes, turns, strict=True):
        kind = draws.one_of(kinds)
        half = [half[0]] * 3 if kind is Kind.SPHERE else half
        yield Solid(kind, tuple(centre), tuple(half), turn)
