"""Nipype interfaces to :mod:`qsmpipe.numerics.background`, one for each method of the stage."""

from pathlib import Path

import torch
from nipype.interfaces.base import File

from qsmpipe import images
from qsmpipe.interfaces.base import (
    Stage,
    StageInputSpec,
    StageOutputSpec,
    direction,
    interfaces_of,
)
from qsmpipe.methods import METHODS

__all__ = [row.interface for row in METHODS["background"].values()]


class _BackgroundInputSpec(StageInputSpec):
    field = File(exists=True, mandatory=True, desc="total field (ppm), 3D or volumes last")
    mask = File(exists=True, mandatory=True, desc="where `field` is known, on its grid")
    noise = File(exists=True, desc="standard deviation of `field` up to a scale, 3D, on its grid")
    b0_direction = direction("field")


class _BackgroundOutputSpec(StageOutputSpec):
    field = File(exists=True, desc="field of the sources inside `mask` (ppm); 0 outside")
    mask = File(exists=True, desc="where the local field is trusted")


class _Background(Stage):
    input_spec, output_spec = _BackgroundInputSpec, _BackgroundOutputSpec
    stage = "background"
    volumes = 20

    def _compute(self, cwd: Path, device: torch.device) -> None:
        like = self.inputs.field
        local = self._call(
            images.load(like, device=device),
            images.load(self.inputs.mask, like=like, dtype=torch.bool, device=device),
            images.zooms_of(like),
            **self._supplied(like=like, device=device),
        )
        self._record(local.convergence)
        self._results["field"] = images.save(local.field, cwd / "local.nii", like=like)
        self._results["mask"] = images.save(local.mask, cwd / "mask.nii", like=like)


__getattr__ = interfaces_of("background", lambda row: _Background)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
