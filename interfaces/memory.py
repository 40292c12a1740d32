"""How much memory a node takes, told to Nipype's scheduler once its images are there."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nipype.interfaces.base import TraitedSpec
from nipype.utils.ram_estimator import RamEstimator

from qsmpipe import images

if TYPE_CHECKING:
    from qsmpipe.interfaces.base import Stage


class MemoryByGrid(RamEstimator):
    """Estimate by the largest of the images that a stage is given, of their headers.

    Parameters
    ----------
    stage : Stage
        Whose :meth:`qsmpipe.interfaces.base.Stage.memory_gb` it is.
    echoes : int
        Volumes of the data at least: where they are known to the caller, though not to this stage.
    """

    def __init__(self, stage: "Stage", *, echoes: int = 1) -> None:
        super().__init__()
        self.stage = type(stage)
        self.echoes = echoes

    def __call__(self, inputs: TraitedSpec) -> tuple[float, str]:
        """Estimate the memory (GB), and say from what."""
        sizes = [_size(value) for value in inputs.get().values()]
        voxels, volumes = max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))
        echoes = max(volumes, self.echoes)
        gb = self.stage.memory_gb(voxels, echoes)
        return gb, f"{voxels} voxels, {echoes} volumes: {gb:.2f} GB"


def _size(value: object) -> tuple[int, int]:
    """Voxels of a volume, and volumes, of what may be an image or a list of images."""
    shapes = list(_shapes(value))
    volumes = sum(math.prod(shape[3:]) for shape in shapes)
    return max((math.prod(shape[:3]) for shape in shapes), default=0), volumes


def _shapes(value: object) -> Iterator[tuple[int, ...]]:
    if isinstance(value, list):
        for one in value:
            yield from _shapes(one)
    elif isinstance(value, str) and value.endswith((".nii", ".nii.gz")):
        try:
            yield images.shape_of(value)
        except (OSError, ValueError):
            return  # the node itself will say what is wrong with it
