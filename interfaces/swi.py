"""Nipype interfaces to :mod:`qsmpipe.numerics.swi`, one for each method of the stage."""

from pathlib import Path

import torch
from nipype.interfaces.base import File, traits

from qsmpipe import images
from qsmpipe.interfaces.base import (
    Stage,
    StageInputSpec,
    StageOutputSpec,
    direction,
    interfaces_of,
)
from qsmpipe.methods import METHODS

__all__ = [row.interface for row in METHODS["swi"].values()]


class _SWIInputSpec(StageInputSpec):
    phase = File(
        exists=True,
        mandatory=True,
        desc="phase (rad) that grows with the field, wrapped or not, echoes last",
    )
    magnitude = File(exists=True, mandatory=True, desc="magnitude, echoes last, on its grid")
    mask = File(exists=True, mandatory=True, desc="what to image, on the grid of `phase`")
    echo_times = traits.List(traits.Float, desc="echo times (s); for the methods that take them")
    b0_direction = direction("phase")


class _SWIOutputSpec(StageOutputSpec):
    swi = File(exists=True, desc="susceptibility-weighted image; 0 outside `mask`")
    minip = File(exists=True, desc="its minimum over a slab around each slice; 0 outside `mask`")


class _SWI(Stage):
    input_spec, output_spec = _SWIInputSpec, _SWIOutputSpec
    stage = "swi"
    serial = True

    def _compute(self, cwd: Path, device: torch.device) -> None:
        like = self.inputs.phase
        result = self._call_and_note(
            images.load(like, device=device),
            images.load(self.inputs.mask, like=like, dtype=torch.bool, device=device),
            images.zooms_of(like),
            **self._supplied(like=like, device=device),
        )
        for name, image in result._asdict().items():
            self._results[name] = images.save(image, cwd / f"{name}.nii", like=like)


__getattr__ = interfaces_of("swi", lambda row: _SWI)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
