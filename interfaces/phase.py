"""Nipype interface that reads the scanner's images: the functions of :mod:`.numerics.phase`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from nipype.interfaces.base import File, InputMultiObject, InputMultiPath, isdefined, traits
from torch import Tensor

from qsmpipe import images
from qsmpipe.interfaces.base import Stage, StageInputSpec, StageOutputSpec, direction, positive
from qsmpipe.numerics.grids import along
from qsmpipe.numerics.phase import (
    DEFAULT_SIGMA,
    combine_echoes,
    complex_to_polar,
    mcpc3ds_coils,
    to_radians,
    wrap,
)
from qsmpipe.numerics.planes import plane_offsets


def per_echo(default: float, desc: str) -> InputMultiObject:
    """Numbers for the echoes: one for all, or one for each."""
    return InputMultiObject(traits.Float(), value=[default], usedefault=True, desc=desc)


def axes(what: str) -> traits.List:
    """Voxel axes of a peculiarity of the phase."""
    return traits.List(
        traits.Range(0, 2), usedefault=True, desc=f"voxel axes (0, 1, 2) along which {what}"
    )


class _PrepareInputSpec(StageInputSpec):
    magnitude = InputMultiPath(File(exists=True), desc="magnitude, one file per echo")
    phase = InputMultiPath(
        File(exists=True),
        desc="phase in the scanner's unit, one file per echo on the grid of `magnitude`",
    )
    real = InputMultiPath(
        File(exists=True),
        desc="real part, one file per echo, read with `imag` where there is no `phase`",
    )
    imag = InputMultiPath(File(exists=True), desc="imaginary part, one file per echo")
    phase_slope = per_echo(1.0, "rad per unit of `phase`, one number or one per echo")
    phase_intercept = per_echo(0.0, "phase where `phase` is 0 (rad), one number or one per echo")
    phase_sign = traits.Enum(
        1, -1, usedefault=True, desc="-1 where a paramagnetic field lowers the phase (GE)"
    )
    alternating = axes("every second plane is shifted by pi (2 in 3D data of GE)")
    slice_axes = axes("each plane has a phase offset of its own, alike in all echoes (2D)")
    echo_times = traits.List(traits.Float, desc="echo times (s), needed for `slice_axes`")
    b0_direction = direction("phase")


class _PrepareOutputSpec(StageOutputSpec):
    magnitude = File(exists=True, desc="magnitude, echoes last")
    combined = File(exists=True, desc="magnitude, root of the sum of squares over the echoes")
    phase = File(exists=True, desc="phase (rad) in (-pi, pi], echoes last")
    b0_direction = traits.List(
        traits.Float, minlen=3, maxlen=3, desc="unit vector along B0 in voxel axes"
    )


MOST_RADIANS = 1000.0
"""Beyond this, numbers are the scanner's units and not radians, unwrapped or not."""


def _check_radians(stored: Tensor, slope: Sequence[float], path: str) -> None:
    """Refuse phase (E, X, Y, Z) that ``slope`` does not make radians of."""
    largest = stored.abs().nan_to_num(posinf=0.0).flatten(1).amax(1)
    if (most := (largest * largest.new_tensor(slope).abs()).max().item()) > MOST_RADIANS:
        msg = (
            f"{path}: phase runs to {most:g} rad, so it is not in radians: give phase_slope (rad "
            "per unit), for example pi / 4096 for Siemens or 0.001 for milliradians"
        )
        raise ValueError(msg)


class Prepare(Stage):
    """Bring the scanner's images into one magnitude and one phase in radians.

    Calls :func:`qsmpipe.numerics.phase.to_radians` or, where the scanner gave real and imaginary
    parts, :func:`qsmpipe.numerics.phase.complex_to_polar`; then subtracts the offsets of single
    slices (:func:`qsmpipe.numerics.planes.plane_offsets`). Voxels that are NaN or infinite lose
    phase and magnitude; magnitudes below 0, which interpolation and denoising leave, become 0.
    """

    input_spec = _PrepareInputSpec
    output_spec = _PrepareOutputSpec
    stage = "phase"
    volumes = 40
    method = "prepare"

    def _compute(self, cwd: Path, device: torch.device) -> None:
        inputs = self.inputs
        choices: dict[str, Any] = {}
        if isdefined(inputs.phase):
            like = inputs.phase[0]
            stored = self._load("phase", like, device)
            magnitude = self._magnitude(stored, like, device)
            broken = ~(stored.isfinite() & magnitude.isfinite())
            choices = {"slope": inputs.phase_slope, "intercept": inputs.phase_intercept}
            phase = to_radians(stored, **choices, **self._how())
            _check_radians(stored, inputs.phase_slope, like)
        elif isdefined(inputs.real):
            like = inputs.real[0]
            real, imag = self._load("real", like, device), self._load("imag", like, device)
            broken = ~(real.isfinite() & imag.isfinite())
            magnitude, phase = complex_to_polar(real, imag, **self._how())
        else:
            msg = "there is no phase: give `phase`, or `real` and `imag`"
            raise ValueError(msg)
        magnitude, phase = self._without(broken, magnitude, phase)
        phase = self._without_slice_offsets(phase, magnitude)
        self._step["parameters"] = {
            **choices, **self._how(), "slice_axes": inputs.slice_axes,
        }  # fmt: skip
        b0_direction = inputs.b0_direction
        if not isdefined(b0_direction):
            b0_direction = images.b0_direction_of(like)
            self._step["warnings"] += images.header(like).place.remarks
        self._results |= {
            "magnitude": images.save(magnitude, cwd / "magnitude.nii", like=like),
            "combined": images.save(combine_echoes(magnitude), cwd / "combined.nii", like=like),
            "phase": images.save(phase, cwd / "phase.nii", like=like),
            "b0_direction": list(b0_direction),
        }

    def _without(self, broken: Tensor, magnitude: Tensor, phase: Tensor) -> tuple[Tensor, Tensor]:
        """Magnitude and phase without ``broken`` voxels, and no magnitude below 0."""
        if bad := int(broken.count_nonzero()):
            self._step["warnings"].append(
                f"{bad} voxels (all echoes together) were NaN or infinite and were set to 0"
            )
            magnitude, phase = magnitude.masked_fill(broken, 0), phase.masked_fill(broken, 0)
        return magnitude.clamp(min=0), phase

    def _without_slice_offsets(self, phase: Tensor, magnitude: Tensor) -> Tensor:
        if self.inputs.slice_axes and not isdefined(self.inputs.echo_times):
            msg = "the offsets of slices are told by echo times: give `echo_times` (s)"
            raise ValueError(msg)
        for axis in self.inputs.slice_axes:
            offsets = plane_offsets(phase, magnitude, echo_times=self.inputs.echo_times, axis=axis)
            phase = wrap(phase - along(offsets, axis))
        return phase

    def _how(self) -> dict[str, Any]:
        return {"sign": self.inputs.phase_sign, "alternating": self.inputs.alternating}

    def _load(self, part: str, like: str, device: torch.device) -> Tensor:
        """One image per echo, or all echoes of one, as (E, X, Y, Z)."""
        paths = getattr(self.inputs, part)
        if not isdefined(paths):
            msg = f"there is no `{part}` image"
            raise ValueError(msg)
        echoes = (images.load(path, like=like, device=device) for path in paths)
        return torch.cat([echo if echo.ndim == 4 else echo[None] for echo in echoes])

    def _magnitude(self, stored: Tensor, like: str, device: torch.device) -> Tensor:
        if not isdefined(self.inputs.magnitude):
            self._step["warnings"].append(
                "there is no magnitude: it was taken as 1, so that noise weighs like signal"
            )
            return torch.ones_like(stored)
        magnitude = self._load("magnitude", like, device)
        if magnitude.shape != stored.shape:
            msg = (
                f"{len(magnitude)} magnitude and {len(stored)} phase echoes were given "
                f"({like}): give one of each per echo"
            )
            raise ValueError(msg)
        return magnitude


class _CombineCoilsInputSpec(StageInputSpec):
    magnitude = InputMultiPath(
        File(exists=True), mandatory=True, desc="magnitude, one file per coil, echoes last"
    )
    phase = InputMultiPath(
        File(exists=True),
        mandatory=True,
        desc="phase in the scanner's unit, one file per coil on the grid of `magnitude`",
    )
    echo_times = traits.List(traits.Float, mandatory=True, desc="echo times (s)")
    phase_slope = per_echo(1.0, "rad per unit of `phase`, one number or one per echo")
    phase_intercept = per_echo(0.0, "phase where `phase` is 0 (rad), one number or one per echo")
    phase_sign = traits.Enum(
        1, -1, usedefault=True, desc="-1 where a paramagnetic field lowers the phase (GE)"
    )
    alternating = axes("every second plane is shifted by pi (2 in 3D data of GE)")
    sigma = positive(DEFAULT_SIGMA, "standard deviation of the smoothing (mm)")


class _CombineCoilsOutputSpec(StageOutputSpec):
    magnitude = File(exists=True, desc="magnitude of all coils, echoes last")
    phase = File(exists=True, desc="phase without the coils' offsets (rad), echoes last")


class CombineCoils(Stage):
    """Combine the images of coils (:func:`qsmpipe.numerics.phase.mcpc3ds_coils`).

    BIDS has no name for the images of single coils, so that no dataset leads here: give its
    outputs, one file with all echoes each, to :class:`Prepare` or to a workflow's ``magnitude``
    and ``phase``. One coil is in memory at a time.
    """

    input_spec, output_spec = _CombineCoilsInputSpec, _CombineCoilsOutputSpec
    stage, method = "phase", "mcpc3ds_coils"
    volumes = 40
    function = staticmethod(mcpc3ds_coils)

    def _compute(self, cwd: Path, device: torch.device) -> None:
        inputs, like = self.inputs, self.inputs.phase[0]

        def load(path: str) -> Tensor:
            return images.load(path, like=like, device=device)

        def radians(path: str) -> Tensor:
            stored = load(path)
            phase = to_radians(
                stored,
                slope=inputs.phase_slope,
                intercept=inputs.phase_intercept,
                sign=inputs.phase_sign,
                alternating=inputs.alternating,
            )
            _check_radians(stored, inputs.phase_slope, path)
            return phase

        result = self._call(
            _Loaded(inputs.phase, radians),
            _Loaded(inputs.magnitude, load),
            images.zooms_of(like),
            echo_times=inputs.echo_times,
        )
        for name, image in result._asdict().items():
            self._results[name] = images.save(image, cwd / f"{name}.nii", like=like)


class _Loaded(Sequence[Tensor]):
    """Images that are read when they are asked for, and not kept."""

    def __init__(self, paths: Sequence[str], load: Callable[[str], Tensor]) -> None:
        self.paths, self.load = paths, load

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return _Loaded(self.paths[index], self.load)
        return self.load(self.paths[index])
