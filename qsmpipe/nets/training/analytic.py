"""Spheres and infinite cylinders with their fields in closed form: no dipole kernel at all."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsmpipe.nets.training.draws import Direction, Draws, Range
from qsmpipe.nets.training.sample import PLAIN, Sample, Scan, Scans
from qsmpipe.numerics.fourier import Shape


def sphere(
    offsets: Sequence[Tensor], radius: float, b0_direction: Direction
) -> tuple[Tensor, Tensor]:
    r"""Sphere of 1 ppm: where it is, and its field [1]_, the sphere of Lorentz taken out.

    0 inside; outside :math:`\frac{1}{3} (a/r)^3 (3 \cos^2 \theta - 1)`.

    Parameters
    ----------
    offsets : 3 tensors that broadcast to (X, Y, Z)
        From the centre (mm).
    radius : float
        :math:`a` (mm).
    b0_direction : tuple of 3 floats
        Unit vector along B0 in voxel axes.

    Returns
    -------
    inside : (X, Y, Z) bool tensor
    field : (X, Y, Z) tensor
        In ppm.

    References
    ----------
    .. [1] Salomir et al. Concepts Magn Reson B 19 (2003) 26, doi:10.1002/cmr.b.10083
    """
    squared = _dot(offsets, offsets).clamp_(min=radius**2 * 1e-6)
    inside = squared <= radius**2
    near = radius**2 / squared
    along = _dot(offsets, b0_direction).square_().mul_(3).div_(squared).sub_(1)
    field = along.mul_(near.mul_(near.sqrt())).div_(3)
    return inside, field.masked_fill_(inside, 0.0)


def cylinder(
    offsets: Sequence[Tensor], radius: float, axis: Direction, b0_direction: Direction
) -> tuple[Tensor, Tensor]:
    r"""Infinite cylinder of 1 ppm: where it is, and its field [1]_, the sphere of Lorentz out.

    Inside :math:`\frac{1}{6} (3 \cos^2 \theta - 1)` with the angle :math:`\theta` between axis
    and B0; outside :math:`\frac{1}{2} (a/\rho)^2 \sin^2 \theta \cos 2 \psi`, where :math:`\psi`
    is the angle to B0 as seen along the axis. SI-QSM prints the opposite sign.

    Parameters
    ----------
    offsets : 3 tensors that broadcast to (X, Y, Z)
        From a point on the axis (mm).
    radius : float
        :math:`a` (mm).
    axis, b0_direction : tuples of 3 floats
        Unit vectors in voxel axes.

    Returns
    -------
    inside : (X, Y, Z) bool tensor
    field : (X, Y, Z) tensor
        In ppm.

    References
    ----------
    .. [1] Salomir et al. Concepts Magn Reson B 19 (2003) 26, doi:10.1002/cmr.b.10083
    """
    cosine = sum(a * b for a, b in zip(axis, b0_direction, strict=True))
    along = _dot(offsets, axis)
    squared = _dot(offsets, offsets).sub_(along.square()).clamp_(min=radius**2 * 1e-6)
    inside = squared <= radius**2
    across = _dot(offsets, b0_direction).sub_(along, alpha=cosine)
    field = across.square_().mul_(2).div_(squared).sub_(1 - cosine**2)
    field.mul_(radius**2 / 2).div_(squared)
    return inside, field.masked_fill_(inside, (3 * cosine**2 - 1) / 6)


def _dot(offsets: Sequence[Tensor], others: Sequence[Tensor] | Direction) -> Tensor:
    x, y, z = offsets
    a, b, c = others
    return x * a + y * b + z * c


def offsets_from(
    point: Sequence[float], shape: Shape, scan: Scan, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Voxel centres of a grid (mm) from a point, mm from its first voxel, shaped to broadcast."""
    x, y, z = (
        (torch.arange(n, device=like.device) * zoom - middle).to(like)
        for n, zoom, middle in zip(shape, scan.zooms, point, strict=True)
    )
    return x[:, None, None], y[:, None], z


@dataclass(frozen=True, kw_only=True)
class Analytic:
    """Spheres and infinite cylinders of any direction [1]_.

    Both susceptibility and field are those at the voxels' centres. What overlaps adds up. Radii
    and places are not told in the text: centres of spheres, and a point of each axis, lie in the
    volume.

    Parameters
    ----------
    shape : tuple of int
        Grid.
    spheres, cylinders : range of int
        How many.
    amplitude : float
        Susceptibility of each lies within this and its negative (ppm).
    sphere_radius, cylinder_radius : range
        In voxels (of their shortest edge), uniform.
    scans : Scans
        Voxel size and direction of B0.

    References
    ----------
    .. [1] Larrain. Scale-invariant deep learning approach for QSM reconstruction: SI-QSM. Thesis,
       Pontificia Universidad Catolica de Chile (2022)
    """

    shape: Shape = (48, 48, 48)
    spheres: tuple[int, int] = (0, 128)
    cylinders: tuple[int, int] = (0, 32)
    amplitude: float = 0.01
    sphere_radius: Range = (1.0, 12.0)
    cylinder_radius: Range = (1.0, 6.0)
    scans: Scans = PLAIN

    def draw(self, draws: Draws, device: torch.device) -> Sample:
        """Draw a sample, without noise."""
        scan = self.scans.draw(draws)
        chi, field = torch.zeros((2, *self.shape), device=device)
        balls, rods = draws.integer(self.spheres), draws.integer(self.cylinders)
        places = self._places(draws, balls + rods, scan)
        values = draws.uniform((-self.amplitude, self.amplitude), balls + rods).tolist()
        unit = min(scan.zooms)
        radii = [*(draws.uniform(self.sphere_radius, balls) * unit).tolist(),
                 *(draws.uniform(self.cylinder_radius, rods) * unit).tolist()]  # fmt: skip
        axes = draws.directions(rods).tolist()
        for number, (place, value, radius) in enumerate(zip(places, values, radii, strict=True)):
            offsets = offsets_from(place, self.shape, scan, chi)
            if number < balls:
                inside, unit_field = sphere(offsets, radius, scan.b0_direction)
            else:
                axis = tuple(axes[number - balls])
                inside, unit_field = cylinder(offsets, radius, axis, scan.b0_direction)
            chi.add_(inside, alpha=value)
            field.add_(unit_field, alpha=value)
        return Sample(
            chi=chi,
            field=field,
            mask=torch.ones(self.shape, dtype=torch.bool, device=device),
            scan=scan,
        )

    def _places(self, draws: Draws, count: int, scan: Scan) -> list[list[float]]:
        """Points in the volume (mm)."""
        edges = [(n - 1) * zoom for n, zoom in zip(self.shape, scan.zooms, strict=True)]
        unit = draws.uniform((0.0, 1.0), count, 3)
        return (unit * torch.tensor(edges, dtype=torch.float64)).tolist()
