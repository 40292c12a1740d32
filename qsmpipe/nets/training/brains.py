"""Brains from label maps, with what a label map lacks: texture, veins, small nuclei, lesions."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from qsmpipe.nets.training.draws import Draws, Range
from qsmpipe.nets.training.heads import LabelMap
from qsmpipe.nets.training.sample import Sample, Scan, Scans
from qsmpipe.nets.training.solids import Kind, Solid, draw_solids
from qsmpipe.numerics.fourier import Shape, Zooms
from qsmpipe.numerics.grids import Box
from qsmpipe.numerics.operators import Dipole
from qsmpipe.numerics.simulate.field import AIR, shim
from qsmpipe.numerics.simulate.labels import TISSUES, VEIN
from qsmpipe.numerics.simulate.tissues import Tissue, maps_of

CLINICAL = Scans(zooms=((0.5, 1.0), (0.5, 1.0), (2.0, 4.0)))
"""Voxel sizes (mm) of clinical scans, as in Meta-QSM."""

VEIN_CHI: Range = (0.15, 0.45)
"""Susceptibility of venous blood relative to water (ppm): oxygenation of 55 to 75 %."""


class Nucleus(NamedTuple):
    """A nucleus that the label maps hold within a larger structure."""

    labels: tuple[int, int]
    """Of that structure, left and right."""
    chi: Range
    """In ppm."""
    axes: tuple[float, float, float]
    """Half axes (mm)."""


NUCLEI = {
    "red nucleus": Nucleus((28, 60), (0.07, 0.17), (3.0, 3.0, 4.0)),
    "substantia nigra": Nucleus((28, 60), (0.08, 0.22), (2.5, 6.0, 3.0)),
    "dentate nucleus": Nucleus((7, 46), (0.06, 0.18), (5.0, 8.0, 5.0)),
}
"""Values as reported for adults; the place is drawn within the structure."""


def chi_range(label: int) -> Range:
    """Give where the susceptibility of a label is drawn from (ppm), around the literature value.

    >>> [round(end, 3) for end in chi_range(13)]
    [0.086, 0.234]
    """
    if label == VEIN:
        return VEIN_CHI
    chi = TISSUES[label].chi
    if chi == AIR:
        return chi, chi
    spread = 0.01 + 0.4 * abs(chi) if TISSUES[label].brain else 0.2 * abs(chi)
    return chi - spread, chi + spread


def draw_tissues(draws: Draws) -> dict[int, Tissue]:
    """Tissues of one person: susceptibility by :func:`chi_range`, R2* +-20 %, signal +-15 %."""
    return {
        label: tissue._replace(
            chi=draws.number(chi_range(label)),
            r2star=tissue.r2star * draws.number((0.8, 1.2)),
            s0=tissue.s0 * draws.number((0.85, 1.15)),
        )
        for label, tissue in TISSUES.items()
    }


class Placement(NamedTuple):
    """Where the voxels of a region lie in a label map."""

    shape: Shape
    """Of the region."""
    start: Tensor
    """Of the region's first voxel, (3,), in voxels of the label map."""
    steps: Tensor
    """From the region's voxels to those of the label map, (3, 3)."""
    bends: Tensor
    """Displacements at control points spread evenly over the region, (3, X, Y, Z), voxels."""

    def box(self, within: Sequence[int]) -> Box:
        """Give the part of a label map that the region may touch."""
        ends = ((-0.5, n - 0.5) for n in self.shape)
        corners = torch.tensor([*product(*ends)], dtype=torch.float64)
        points = corners @ self.steps.T + self.start
        reach = self.bends.abs().amax((1, 2, 3))
        first = (points.amin(0) - reach).floor().long().tolist()
        last = (points.amax(0) + reach).ceil().long().tolist()
        x, y, z = (
            slice(min(max(a, 0), n - 2), max(min(b + 1, n), 2))
            for a, b, n in zip(first, last, within, strict=True)
        )
        return x, y, z

    def points(self, like: Tensor) -> Tensor:
        """Voxels of the label map at those of the region, (3, X, Y, Z)."""
        bends = functional.interpolate(
            self.bends[None].to(like), self.shape, mode="trilinear", align_corners=True
        )[0]
        x, y, z = (torch.arange(n, device=like.device, dtype=like.dtype) for n in self.shape)
        for row, (a, b, c), start in zip(bends, self.steps.tolist(), self.start.tolist(),
                                         strict=True):  # fmt: skip
            row += (start + a * x)[:, None, None] + (b * y)[:, None] + c * z
        return bends


def resample(images: Tensor, box: Box, place: Placement, *, parts: Sequence[int]) -> Tensor:
    """Mean over the voxels of a region, from ``parts`` points along each of their axes.

    Parameters
    ----------
    images : (C, X, Y, Z) tensor
        Part of images on the grid of a label map; linear between voxels.
    box : tuple of 3 slices
        Which part it is.
    place : Placement
        Of the region.
    parts : sequence of 3 ints
        So many points stand for each voxel along each axis.

    Returns
    -------
    (C, X', Y', Z') tensor
    """
    points = place.points(images)
    starts = points.new_tensor([side.start for side in box])
    halves = points.new_tensor([(n - 1) / 2 for n in images.shape[1:]])
    points = ((points.movedim(0, -1) - starts) / halves - 1).flip(-1)[None]
    total = torch.zeros((), dtype=images.dtype, device=images.device)
    for steps in product(*map(range, parts)):
        shift = torch.tensor([(step + 0.5) / n - 0.5 for step, n in zip(steps, parts,
                                                                        strict=True)])  # fmt: skip
        moved = ((place.steps @ shift.double()).to(halves) / halves).flip(0)
        total = total + functional.grid_sample(
            images[None], points + moved, padding_mode="border", align_corners=True
        )
    return total[0] / math.prod(parts)


class _Region(NamedTuple):
    """Images (X, Y, Z) of a patch and its surroundings."""

    chi: Tensor
    """Of everything (ppm), relative to the brain's mean."""
    local: Tensor
    """The brain's part in it: no bone in the voxels at its edge."""
    magnitude: Tensor
    """Signal at the echo."""
    mask: Tensor
    """Voxels that are brain by half or more."""
    mean: float
    """Of the whole brain, relative to water (ppm)."""


@dataclass(frozen=True, kw_only=True)
class Brains:
    """Patches of brains, from label maps [1]_.

    The work deforms one measured map; here, maps are made from labels with tissues drawn for each
    sample. Susceptibility is relative to the mean over the whole brain, as that of a map after a
    background removal is. All is made in a region around the patch, whose sources count; those
    beyond do not.

    Parameters
    ----------
    heads : sequence of LabelMap
        All on the training device.
    shape : tuple of int
        Patch; its centre lies in the brain.
    margin : float
        Of the region beyond the patch (mm). V-SHARP wants its largest ball. In four patches of
        48 mm, sources beyond 8, 16, 24 and 32 mm made 14, 7, 4 and 2 % of the field, a smooth
        part.
    scans : Scans
        Voxel size, direction of B0, field strength, echo time.
    background : bool
        Whether to simulate the field of what is around the brain in the region, shimmed.
    texture : range
        Standard deviation of the tissue's texture (ppm).
    turn : float
        Largest rotation of the head in the grid (degrees).
    size : range
        Factor of the head's size.
    bend : float
        Largest elastic displacement along each axis (mm), at control points ``bend_spacing`` mm
        apart or a little more, linear in between: no folds below a sixth of that.
    bend_spacing : float
    veins : range of int
        In the region.
    vein_radius : range
        In mm.
    lesions : range of int
        Bleedings and calcifications in the region: ellipsoids, spheres, cuboids, cylinders.
    lesion_size : range
        Half axes (mm).
    bleeding, calcification : range
        Susceptibility (ppm), each the kind of every second lesion.

    References
    ----------
    .. [1] Liu, Koch. Meta-QSM: an image-resolution-arbitrary network for QSM reconstruction
       (2019), arXiv:1908.00206
    """

    heads: Sequence[LabelMap]
    shape: Shape = (128, 128, 64)
    margin: float = 16.0
    scans: Scans = CLINICAL
    background: bool = True
    texture: Range = (0.0, 0.01)
    turn: float = 15.0
    size: Range = (0.9, 1.1)
    bend: float = 3.0
    bend_spacing: float = 24.0
    veins: tuple[int, int] = (0, 12)
    vein_radius: Range = (0.3, 1.5)
    lesions: tuple[int, int] = (0, 4)
    lesion_size: Range = (1.0, 8.0)
    bleeding: Range = (0.3, 2.0)
    calcification: Range = (-2.0, -0.3)

    def draw(self, draws: Draws, device: torch.device) -> Sample:
        """Draw a sample, without noise, on its region."""
        head = draws.one_of(self.heads)
        if head.labels.device.type != device.type:
            msg = f"{head.name} is on {head.labels.device}, the samples on {device}: move it there"
            raise ValueError(msg)
        scan = self.scans.draw(draws)
        mx, my, mz = (math.ceil(self.margin / zoom) for zoom in scan.zooms)
        nx, ny, nz = self.shape
        place = self._place(head, (nx + 2 * mx, ny + 2 * my, nz + 2 * mz), scan.zooms, draws)
        region = self._anatomy(head, place, draw_tissues(draws), scan, draws)
        self._paint(region, scan.zooms, draws)
        return self._sample(region, scan, margin=(mx, my, mz))

    def _sample(self, region: _Region, scan: Scan, *, margin: Shape) -> Sample:
        mask = region.mask
        chi = region.local * mask
        sources = torch.stack([chi, region.chi - chi]) if self.background else chi[None]
        # Periodic images this far away make 1 % of a patch's field at the most.
        apart = 3 * self.margin
        dipole = Dipole.on_grid(chi, scan.zooms, scan.b0_direction, margin=apart)
        field, *others = dipole(sources)
        for other in others:
            other += shim(other, mask, scan.zooms)
        return Sample(
            chi=chi,
            field=field * mask,
            mask=mask,
            scan=scan,
            magnitude=region.magnitude,
            background=others[0] if others else None,
            margin=margin,
        )

    def _place(self, head: LabelMap, region: Shape, zooms: Zooms, draws: Draws) -> Placement:
        """Centre on a voxel of the brain; turned, scaled and bent as drawn."""
        voxel = 1 / torch.tensor(head.zooms, dtype=torch.float64)
        edges = torch.tensor(zooms, dtype=torch.float64)
        turn = draws.rotations(1, degrees=self.turn)[0] / draws.number(self.size)
        steps = voxel[:, None] * turn * edges
        middle = (torch.tensor(region, dtype=torch.float64) - 1) / 2
        controls = [
            max(int(n * zoom / self.bend_spacing), 1) + 1
            for n, zoom in zip(region, zooms, strict=True)
        ]
        bends = draws.uniform((-self.bend, self.bend), 3, *controls)
        start = _somewhere(head.brain, draws) - steps @ middle
        return Placement(region, start, steps, voxel[:, None, None, None] * bends)

    def _anatomy(
        self,
        head: LabelMap,
        place: Placement,
        tissues: Mapping[int, Tissue],
        scan: Scan,
        draws: Draws,
    ) -> _Region:
        """Draw what a region holds, but for :meth:`_paint`."""
        box = place.box(head.labels.shape)
        labels, brain = head.labels[box], head.brain[box]
        chi, r2star, s0 = maps_of(
            labels, tissues, head.zooms, field_strength=scan.field_strength,
            texture=draws.number(self.texture), seed=draws.seed(),
        )  # fmt: skip
        for solid, value, pair in _nuclei(labels, head.zooms, draws):
            part = solid.box(labels.shape, head.zooms)
            share = solid.cover(part, head.zooms, parts=(2, 2, 2), like=chi)
            share *= torch.isin(labels[part], torch.tensor(pair, device=labels.device))
            chi[part].lerp_(torch.full_like(share, value), share)
        mean = _mean_of_brain(head, tissues)
        chi -= mean
        signal = s0 * torch.exp(-scan.echo_time * r2star)
        parts = [max(round(zoom / min(head.zooms)), 1) for zoom in scan.zooms]
        images = torch.stack([chi, chi * brain, signal, brain.to(signal)])
        chi, local, magnitude, share = resample(images, box, place, parts=parts)
        return _Region(chi, local, magnitude, share >= 0.5, mean)

    def _paint(self, region: _Region, zooms: Zooms, draws: Draws) -> None:
        """Add veins and lesions, in the brain alone."""
        shape = region.chi.shape
        extent = [(n - 1) * zoom for n, zoom in zip(shape, zooms, strict=True)]
        parts = [min(max(round(2 * zoom), 2), 6) for zoom in zooms]
        for solid, value, signal in (*self._veins(extent, draws), *self._lesions(extent, draws)):
            box = solid.box(shape, zooms)
            share = solid.cover(box, zooms, parts=parts, like=region.chi) * region.mask[box]
            for image in (region.chi, region.local):
                image[box].lerp_(torch.full_like(share, value - region.mean), share)
            region.magnitude[box] *= 1 - (1 - signal) * share

    def _veins(
        self, extent: Sequence[float], draws: Draws
    ) -> Iterator[tuple[Solid, float, float]]:
        """Chains of cylinders, with susceptibility and relative signal."""
        for _ in range(draws.integer(self.veins)):
            value, radius = draws.number(VEIN_CHI), draws.number(self.vein_radius)
            point = draws.uniform((0.0, 1.0), 3) * torch.tensor(extent, dtype=torch.float64)
            directions = draws.directions(draws.integer((4, 10)))
            along = directions[0]
            for bend in directions:
                along = along + 0.5 * bend
                along = along / along.norm()
                yield _rod(point, along, length=6.0, radius=radius), value, 0.9
                point = point + 6.0 * along

    def _lesions(
        self, extent: Sequence[float], draws: Draws
    ) -> Iterator[tuple[Solid, float, float]]:
        """Bleedings and calcifications, with susceptibility and relative signal."""
        corners = ((0.0, 0.0, 0.0), extent)
        count = draws.integer(self.lesions)
        for solid in draw_solids(draws, count, within=corners, size=self.lesion_size):
            value = draws.number(draws.one_of((self.bleeding, self.calcification)))
            yield solid, value, draws.number((0.05, 0.8))


def _mean_of_brain(head: LabelMap, tissues: Mapping[int, Tissue]) -> float:
    weighted = sum(count * tissues[label].chi for label, count in head.counts.items())
    return weighted / sum(head.counts.values())


def _somewhere(mask: Tensor, draws: Draws) -> Tensor:
    """Any voxel of a mask (3,)."""
    shape = torch.tensor(mask.shape, dtype=torch.float64)
    while True:
        tries = (draws.uniform((0.0, 1.0), 64, 3) * shape).long()
        inside = mask[tuple(tries.T.to(mask.device))].nonzero()
        if len(inside):
            return tries[int(inside[0])].double()


def _nuclei(
    labels: Tensor, zooms: Zooms, draws: Draws
) -> Iterator[tuple[Solid, float, tuple[int, int]]]:
    """Nuclei that the labels lack, with susceptibility and the labels that hold them."""
    for nucleus in NUCLEI.values():
        for label in nucleus.labels:
            value, turn = draws.number(nucleus.chi), draws.rotations(1, degrees=30.0)[0]
            chosen = draws.number((0.0, 1.0))
            places = (labels == label).nonzero()
            if len(places):
                place = places[int(chosen * (len(places) - 1))].tolist()
                centre = tuple(i * zoom for i, zoom in zip(place, zooms, strict=True))
                solid = Solid(Kind.ELLIPSOID, centre, nucleus.axes, turn.tolist())
                yield solid, value, nucleus.labels


def _rod(point: Tensor, along: Tensor, *, length: float, radius: float) -> Solid:
    """Cylinder from a point along a unit vector, a little longer: bends have no gaps."""
    frame = torch.linalg.svd(along[:, None], full_matrices=True).U
    turn = torch.stack([frame[:, 1], frame[:, 2], along], dim=1)
    centre = tuple((point + length / 2 * along).tolist())
    half = (radius, radius, length / 2 + radius / 2)
    return Solid(Kind.CYLINDER, centre, half, turn.tolist())
