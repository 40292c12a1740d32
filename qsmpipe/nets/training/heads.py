"""Label maps of heads: the one place that finds them, and keeps training and validation apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.grids import bounding_box
from qsmpipe.numerics.simulate.labels import brain_mask, clean

Purpose: TypeAlias = Literal["training", "validation"]

NUMBERS: dict[Purpose, tuple[int, ...]] = {
    "training": tuple(range(1, 13)),
    "validation": tuple(range(13, 17)),
}
"""Which heads serve which purpose; none serves both."""

AROUND = 30.0
"""What is kept around the brain (mm)."""

Reader: TypeAlias = Callable[[Path], tuple[np.ndarray, np.ndarray]]
"""From a file to its values (X, Y, Z) and its affine, as :func:`qsmpipe.images.read`."""


@dataclass(frozen=True, kw_only=True)
class LabelMap:
    """A head, mended for simulation."""

    name: str
    labels: Tensor
    """(X, Y, Z) int16, as in :data:`qsmpipe.numerics.simulate.labels.TISSUES`, in RAS+ order."""
    brain: Tensor
    """(X, Y, Z) bool: the brain with its sulci and ventricles."""
    zooms: Zooms
    """Voxel size (mm)."""
    counts: dict[int, int]
    """Voxels of each label in ``brain``."""

    @classmethod
    def of(cls, labels: Tensor, zooms: Zooms, *, name: str = "head") -> "LabelMap":
        """Mend labels (X, Y, Z), RAS+, and crop them to what is around the brain."""
        labels = clean(labels, zooms).labels
        brain = brain_mask(labels, zooms)
        box = tuple(
            slice(max(side.start - round(AROUND / zoom), 0), side.stop + round(AROUND / zoom))
            for side, zoom in zip(bounding_box(brain), zooms, strict=True)
        )
        labels, brain = labels[box].to(torch.int16).contiguous(), brain[box].contiguous()
        found, counts = labels[brain].unique(return_counts=True)
        table = dict(zip(found.tolist(), counts.tolist(), strict=True))
        return cls(name=name, labels=labels, brain=brain, zooms=zooms, counts=table)

    def to(self, device: str | torch.device) -> "LabelMap":
        """Give the same on another device."""
        return replace(self, labels=self.labels.to(device), brain=self.brain.to(device))


def load_heads(
    folder: Path,
    purpose: Purpose,
    *,
    read: Reader,
    numbers: Sequence[int] | None = None,
) -> list[LabelMap]:
    """Read the heads that a purpose may see.

    Parameters
    ----------
    folder : Path
        Holds ``training_seg_01.nii.gz`` to ``16`` of SynthSeg.
    purpose : {"training", "validation"}
        Training sees heads 1 to 12, validation 13 to 16.
    read : callable
        Opens a file: :func:`qsmpipe.images.read`.
    numbers : sequence of int, optional
        Only these of them.

    Raises
    ------
    ValueError
        If a head serves the other purpose, before anything is read.
    """
    numbers = NUMBERS[purpose] if numbers is None else numbers
    strangers = sorted(set(numbers) - set(NUMBERS[purpose]))
    if strangers:
        first, *_, last = NUMBERS[purpose]
        msg = (
            f"head {', '.join(map(str, strangers))} is not for {purpose}, which sees heads "
            f"{first} to {last} alone"
        )
        raise ValueError(msg)
    heads = []
    for number in numbers:
        values, affine = read(folder / f"training_seg_{number:02d}.nii.gz")
        upright, zooms = _upright(values, affine)
        labels = torch.from_numpy(upright.astype(np.int16))
        heads.append(LabelMap.of(labels, zooms, name=f"head {number}"))
    return heads


def _upright(values: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, Zooms]:
    """Values with axes in RAS+ order, of an image that lies along the scanner's axes."""
    edges = affine[:3, :3]
    order = np.abs(edges).argmax(axis=1)
    values = values.transpose(order)
    steps = [float(edges[row, column]) for row, column in enumerate(order)]
    backward = tuple(axis for axis, step in enumerate(steps) if step < 0)
    x, y, z = map(abs, steps)
    return np.ascontiguousarray(np.flip(values, backward)), (x, y, z)
