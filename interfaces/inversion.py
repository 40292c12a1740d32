"""Nipype interfaces to :mod:`qsmpipe.numerics.inversion` and :mod:`qsmpipe.nets.inversion`.

There is one for each method of the stage, by the name in its row of
:data:`qsmpipe.methods.METHODS`, as in ``from qsmpipe.interfaces.inversion import TV``.
"""

from pathlib import Path
from typing import ClassVar

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
from qsmpipe.methods import METHODS, Method
from qsmpipe.numerics.inversion.common import Curve

__all__ = [row.interface for row in METHODS["inversion"].values()]


PATCHES = 3.5
"""Memory of the feature maps of a network's patches (GB)."""


class _InversionInputSpec(StageInputSpec):
    field = File(
        exists=True,
        mandatory=True,
        desc="field (ppm) of the sources inside `mask`; for some methods the total field",
    )
    mask = File(exists=True, mandatory=True, desc="where `field` is known, on its grid")
    noise = File(
        exists=True,
        desc="standard deviation of `field`, on its grid; for the methods that weight the data",
    )
    magnitude = File(
        exists=True,
        desc="magnitude of all echoes combined, 3D; for the methods that use its edges",
    )
    r2star = File(exists=True, desc="R2* (1/s), 3D; for the methods that find the ventricles")
    echo_times = traits.List(
        traits.Float, desc="echo times (s); for the methods that work with phase"
    )
    field_strength = traits.Float(desc="B0 (T); for the methods that work with phase")
    b0_direction = direction("field")


class _InversionOutputSpec(StageOutputSpec):
    chi = File(exists=True, desc="susceptibility (ppm), not referenced; 0 outside `mask`")


class _Inversion(Stage):
    input_spec, output_spec = _InversionInputSpec, _InversionOutputSpec
    stage = "inversion"
    volumes = 42
    data: ClassVar[str] = "field"

    def _compute(self, cwd: Path, device: torch.device) -> None:
        like = getattr(self.inputs, self.data)
        result = self._call_and_note(
            images.load(like, device=device),
            images.load(self.inputs.mask, like=like, dtype=torch.bool, device=device),
            images.zooms_of(like),
            **self._supplied(like=like, device=device),
        )
        self._record(result.convergence)
        self._step["parameters"] |= result.chosen
        self._note(result.curve)
        self._results["chi"] = images.save(result.chi, cwd / "chi.nii", like=like)

    def _note(self, curve: Curve | None) -> None:
        """Keep what lambda was chosen from; a rule that found none is a warning."""
        if curve is None:
            return
        self._step["curve"] = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in curve._asdict().items()
        }
        if not curve.found:
            self._step["warnings"].append(
                f"{self.stage} ({self.method}): the rule {curve.rule} found no lambda from "
                f"{curve.lambdas[0]:.3g} to {curve.lambdas[-1]:.3g}, and "
                f"{curve.lambda_:.3g} was taken: look at the curve, give a number"
            )


class _PhaseInversionInputSpec(StageInputSpec):
    phase = File(exists=True, mandatory=True, desc="wrapped phase (rad), echoes last")
    mask = File(exists=True, mandatory=True, desc="where `phase` is read, on its grid")
    magnitude = File(exists=True, desc="magnitude, on the grid of `phase`, echoes last")
    echo_times = traits.List(traits.Float, mandatory=True, desc="echo times (s)")
    field_strength = traits.Float(mandatory=True, desc="B0 (T)")
    b0_direction = direction("phase")


class _PhaseInversion(_Inversion):
    """From the wrapped phase of all echoes to susceptibility."""

    input_spec = _PhaseInversionInputSpec
    data = "phase"


def _sha256() -> traits.Str:
    return traits.Str(desc="hash of the weights: others of the same name are other inputs")


class _NetworkInputSpec(_InversionInputSpec):
    sha256 = _sha256()


class _Network(_Inversion):
    input_spec = _NetworkInputSpec
    features_gb = PATCHES


class _PhaseNetworkInputSpec(_PhaseInversionInputSpec):
    sha256 = _sha256()


class _PhaseNetwork(_PhaseInversion):
    input_spec = _PhaseNetworkInputSpec
    features_gb = PATCHES


def _base(row: Method) -> type[Stage]:
    if row.starts_from == "phase":
        return _PhaseNetwork if row.trained else _PhaseInversion
    return _Network if row.trained else _Inversion


__getattr__ = interfaces_of("inversion", _base)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
