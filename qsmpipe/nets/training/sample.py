"""What networks are trained on: one sample, and a batch of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qsmpipe.nets.training.draws import Direction, Draws, Range
from qsmpipe.numerics.fourier import Shape, Zooms
from qsmpipe.numerics.units import radians_per_ppm


class Scan(NamedTuple):
    """How a sample is measured."""

    zooms: Zooms
    """Voxel size (mm)."""
    b0_direction: Direction
    """Unit vector along B0 in voxel axes."""
    field_strength: float
    """In T."""
    echo_time: float
    """In s."""

    @property
    def radians_per_ppm(self) -> float:
        """Phase (rad) at the echo for a field of 1 ppm."""
        return radians_per_ppm(self.field_strength, self.echo_time)


@dataclass(frozen=True, kw_only=True)
class Scans:
    """Ranges from which each sample's scan is drawn, uniformly.

    The defaults draw nothing: 1 mm, axial, 3 T, 20 ms.

    Parameters
    ----------
    zooms : tuple of 3 ranges
        Voxel size along each axis (mm). Meta-QSM [1]_: 0.5 to 1, 0.5 to 1, 2 to 4.
    alike : int
        So many axes, counted from the first, have the size that is drawn for the first.
    tilt : float
        Largest angle between B0 and the third axis (degrees).
    field_strengths : sequence of float
        One of these (T).
    echo_time : range
        In s. C-Psi-Net [2]_: 20 ms at 3 T, 1.1 x 1.1 x 1.6 mm.

    References
    ----------
    .. [1] Liu, Koch. Meta-QSM: an image-resolution-arbitrary network for QSM reconstruction
       (2019), arXiv:1908.00206
    .. [2] Lu et al. Reconstruction of quantitative susceptibility maps from phase of
       susceptibility weighted imaging with cross-connected Psi-Net. ISBI (2021)
    """

    zooms: tuple[Range, Range, Range] = ((1.0, 1.0),) * 3
    alike: int = 1
    tilt: float = 0.0
    field_strengths: tuple[float, ...] = (3.0,)
    echo_time: Range = (0.020, 0.020)

    def draw(self, draws: Draws) -> Scan:
        """Give the scan of one sample."""
        sizes = [draws.number(within) for within in self.zooms]
        x, y, z = (sizes[0] if axis < self.alike else sizes[axis] for axis in range(3))
        direction = draws.tilted(self.tilt)
        strength = draws.one_of(self.field_strengths)
        return Scan((x, y, z), direction, strength, draws.number(self.echo_time))


PLAIN = Scans()
"""1 mm, axial, 3 T, 20 ms."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Susceptibility and its field, with all that must be known to tell one from the other."""

    chi: Tensor
    """Susceptibility (X, Y, Z), ppm; 0 outside ``mask``."""
    field: Tensor
    """Local field (X, Y, Z), ppm of B0: of ``chi`` alone until it is measured; 0 outside."""
    mask: Tensor
    """Where both are known, (X, Y, Z) bool."""
    scan: Scan
    magnitude: Tensor | None = None
    """Signal at the echo (X, Y, Z), in any unit."""
    background: Tensor | None = None
    """Field of sources outside ``mask`` (X, Y, Z), ppm, if there are any."""
    filtered: Tensor | None = None
    """High-pass filtered phase (X, Y, Z), rad; 0 outside ``mask``."""
    margin: Shape = (0, 0, 0)
    """Voxels on each side that are there for the physics only, see :meth:`cut`."""

    def map(self, change: Callable[[Tensor], Tensor], **others: Any) -> "Sample":
        """Change all images alike, and ``others`` by name."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        changed: dict[str, Any] = {
            name: change(x) for name, x in values.items() if isinstance(x, Tensor)
        }
        return replace(self, **changed, **others)

    def masked(self) -> "Sample":
        """With what is known set to 0 outside the mask."""
        filtered = None if self.filtered is None else self.filtered * self.mask
        return replace(
            self, chi=self.chi * self.mask, field=self.field * self.mask, filtered=filtered
        )

    def cut(self) -> "Sample":
        """Without the margin; all images contiguous."""
        box = tuple(slice(m, n - m) for m, n in zip(self.margin, self.chi.shape, strict=True))
        return self.map(lambda image: image[box].contiguous(), margin=(0, 0, 0))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of one size, stacked."""

    chi: Tensor
    """(B, 1, X, Y, Z), ppm; as are the next."""
    field: Tensor
    mask: Tensor
    """(B, 1, X, Y, Z) bool."""
    filtered: Tensor | None
    """(B, 1, X, Y, Z), rad."""
    zooms: Tensor
    """(B, 3), mm."""
    b0_direction: Tensor
    """(B, 3) unit vectors in voxel axes."""
    radians_per_ppm: Tensor
    """(B,)."""


def stack(samples: Sequence[Sample]) -> Batch:
    """Make a batch.

    Raises
    ------
    ValueError
        If the samples differ in size.
    """
    sizes = {tuple(sample.chi.shape) for sample in samples}
    if len(sizes) != 1:
        msg = f"samples of {' and '.join(map(str, sorted(sizes)))} voxels do not make a batch"
        raise ValueError(msg)
    scans, like = [sample.scan for sample in samples], samples[0].chi
    filtered = [sample.filtered for sample in samples if sample.filtered is not None]
    return Batch(
        chi=torch.stack([sample.chi for sample in samples])[:, None],
        field=torch.stack([sample.field for sample in samples])[:, None],
        mask=torch.stack([sample.mask for sample in samples])[:, None],
        filtered=torch.stack(filtered)[:, None] if len(filtered) == len(samples) else None,
        zooms=like.new_tensor([scan.zooms for scan in scans]),
        b0_direction=like.new_tensor([scan.b0_direction for scan in scans]),
        radians_per_ppm=like.new_tensor([scan.radians_per_ppm for scan in scans]),
    )
