"""Changes of a sample that leave its physics true."""

from dataclasses import dataclass, replace
from typing import TypeVar

from qsmpipe.nets.training.draws import Direction, Draws, Range
from qsmpipe.nets.training.sample import Sample
from qsmpipe.numerics.swi import slice_axis

Each = TypeVar("Each", int, float)


def flip(sample: Sample, axis: int) -> Sample:
    """Mirror along a voxel axis; B0 is mirrored alike.

    Of B0 and its opposite, which have one dipole, the one that points up the third axis is
    carried: an axial sample stays axial.
    """
    direction = list(sample.scan.b0_direction)
    direction[axis] *= -1
    scan = sample.scan._replace(b0_direction=_upward(direction))
    return sample.map(lambda image: image.flip(axis), scan=scan)


def swap(sample: Sample, first: int, second: int) -> Sample:
    """Exchange two voxel axes, and with them voxel size and B0: a mirror, too."""

    def exchange(values: tuple[Each, Each, Each]) -> tuple[Each, Each, Each]:
        order = [0, 1, 2]
        order[first], order[second] = second, first
        x, y, z = (values[axis] for axis in order)
        return x, y, z

    scan = sample.scan
    direction = _upward(list(exchange(scan.b0_direction)))
    return sample.map(
        lambda image: image.transpose(first, second),
        scan=scan._replace(zooms=exchange(scan.zooms), b0_direction=direction),
        margin=exchange(sample.margin),
    )


def _upward(direction: list[float]) -> Direction:
    x, y, z = direction if direction[2] >= 0 else [-value for value in direction]
    return x, y, z


def turn(sample: Sample, quarters: int) -> Sample:
    """Rotate by quarter turns about the voxel axis nearest to B0."""
    first, second = (a for a in range(3) if a != slice_axis(sample.scan.b0_direction))
    match quarters % 4:
        case 1:
            return swap(flip(sample, second), first, second)
        case 2:
            return flip(flip(sample, first), second)
        case 3:
            return swap(flip(sample, first), first, second)
    return sample


def scale(sample: Sample, factor: float) -> Sample:
    """Multiply susceptibility and local field; the background has other sources."""
    return replace(sample, chi=factor * sample.chi, field=factor * sample.field)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Rotations about B0, flips, and scaling of a sample that is not measured yet [1]_.

    Parameters
    ----------
    turns : bool
        Rotate by 0 to 3 quarter turns; only by half ones where the edges across B0 differ.
    flips : bool
        Mirror along each axis or not.
    amplitude : range
        Factor of susceptibility and field, uniform.

    References
    ----------
    .. [1] Jochmann, Haueisen, Schweser. How to train a deep convolutional neural network for
       quantitative susceptibility mapping (QSM). ISMRM, abstract
    """

    turns: bool = True
    flips: bool = True
    amplitude: Range = (0.1, 2.0)

    def __call__(self, sample: Sample, draws: Draws) -> Sample:
        """Change a sample as drawn."""
        if self.turns:
            sample = turn(sample, self._quarters(sample, draws))
        for axis in range(3):
            if self.flips and draws.chance(0.5):
                sample = flip(sample, axis)
        return scale(sample, draws.number(self.amplitude))

    @staticmethod
    def _quarters(sample: Sample, draws: Draws) -> int:
        quarters = draws.integer((0, 3))
        across = slice_axis(sample.scan.b0_direction)
        patch = [n - 2 * m for n, m in zip(sample.chi.shape, sample.margin, strict=True)]
        first, second = (n for axis, n in enumerate(patch) if axis != across)
        return quarters if first == second else quarters // 2 * 2
