"""Nipype interfaces to COSMOS: registration, resampling, and the inversion itself."""

from pathlib import Path

import numpy as np
import torch
from nipype.interfaces.base import File, isdefined, traits

from qsmpipe import images
from qsmpipe.interfaces.base import (
    Stage,
    StageInputSpec,
    StageOutputSpec,
    direction,
    takes,
)
from qsmpipe.numerics.inversion.cosmos import conditioning, cosmos
from qsmpipe.numerics.resampling import resample, resample_mask
from qsmpipe.placement import rotation_of
from qsmpipe.registration import Placed, register, turned_by


class _RegisterRigidInputSpec(StageInputSpec):
    fixed = File(exists=True, mandatory=True, desc="magnitude, 3D")
    fixed_mask = File(exists=True, mandatory=True, desc="brain mask, on the grid of `fixed`")
    moving = File(exists=True, mandatory=True, desc="magnitude of the same head, 3D")
    moving_mask = File(exists=True, mandatory=True, desc="brain mask, on the grid of `moving`")


class _RegisterRigidOutputSpec(StageOutputSpec):
    transform = File(
        exists=True,
        desc="text, 4 x 4: world coordinates (mm, RAS+) of `fixed` to those of `moving`",
    )


class RegisterRigid(Stage):
    """Find the motion between two heads (:func:`qsmpipe.registration.register`)."""

    input_spec, output_spec = _RegisterRigidInputSpec, _RegisterRigidOutputSpec
    stage, method = "registration", "rigid"
    function = staticmethod(register)

    def _compute(self, cwd: Path, device: torch.device) -> None:
        inputs = self.inputs
        motion = register(
            _placed(inputs.fixed, inputs.fixed_mask), _placed(inputs.moving, inputs.moving_mask)
        )
        self._step["parameters"] = {"angle": round(turned_by(motion), 3)}
        np.savetxt(cwd / "transform.txt", motion, fmt="%.12f")
        self._results["transform"] = str(cwd / "transform.txt")


def _placed(path: str, mask: str) -> Placed:
    return Placed(
        images.load(path), images.affine_of(path), images.load(mask, like=path, dtype=torch.bool)
    )


class _ResampleToInputSpec(StageInputSpec):
    field = File(exists=True, mandatory=True, desc="field of the sources inside `mask` (ppm)")
    mask = File(exists=True, mandatory=True, desc="where `field` is known, on its grid")
    noise = File(exists=True, desc="standard deviation of `field` (ppm), on its grid")
    reference = File(exists=True, mandatory=True, desc="image whose grid is wanted")
    transform = File(
        exists=True,
        desc="text, 4 x 4: world of `reference` to world of `field`; without it they are one",
    )
    b0_direction = direction("field")


class _ResampleToOutputSpec(StageOutputSpec):
    field = File(exists=True, desc="field (ppm) on the grid of `reference`; 0 outside `mask`")
    mask = File(exists=True, desc="where it is known")
    noise = File(
        exists=True, desc="its standard deviation (ppm), 1 inside `mask` when not given; 0 outside"
    )
    b0_direction = traits.List(
        traits.Float, desc="unit vector along B0 in the voxel axes of `reference`"
    )


class ResampleTo(Stage):
    """Give a field another head's grid (:func:`qsmpipe.numerics.resampling.resample`)."""

    input_spec, output_spec = _ResampleToInputSpec, _ResampleToOutputSpec
    stage, method = "registration", "resample"
    function = staticmethod(resample)

    def _compute(self, cwd: Path, device: torch.device) -> None:
        inputs, like = self.inputs, self.inputs.reference
        affine, to = images.affine_of(inputs.field), images.affine_of(like)
        field = images.load(inputs.field)
        mask = images.load(inputs.mask, like=inputs.field, dtype=torch.bool)
        noise = mask.to(field)
        if isdefined(inputs.noise):
            noise = images.load(inputs.noise, like=inputs.field)
        motion = np.eye(4)
        if isdefined(inputs.transform):
            motion = np.loadtxt(inputs.transform)
        if isdefined(inputs.transform) or not images.same_grid(inputs.field, like):
            shape = images.shape_of(like)[:3]
            field = resample(field, affine, motion, to=to, shape=shape, mask=mask)
            noise = resample(noise, affine, motion, to=to, shape=shape, mask=mask, order=1)
            mask = resample_mask(mask, affine, motion, to=to, shape=shape)
        own = inputs.b0_direction
        if not isdefined(own):
            own = images.b0_direction_of(inputs.field)
        direction = rotation_of(to).T @ motion[:3, :3].T @ rotation_of(affine) @ own
        self._results["b0_direction"] = (direction / np.linalg.norm(direction)).tolist()
        for name, image in (("field", field * mask), ("noise", noise * mask), ("mask", mask)):
            self._results[name] = images.save(image, cwd / f"{name}.nii", like=like)


@takes(cosmos)
class _CosmosInputSpec(StageInputSpec):
    fields = traits.List(
        File(exists=True), mandatory=True, desc="field (ppm) of each orientation, on one grid"
    )
    masks = traits.List(File(exists=True), mandatory=True, desc="where each of them is known")
    noises = traits.List(
        File(exists=True), mandatory=True, desc="standard deviation of each (ppm), up to a scale"
    )
    b0_directions = traits.List(
        traits.List(traits.Float),
        mandatory=True,
        desc="unit vectors along B0 in the voxel axes of that grid",
    )
    transforms = traits.List(
        File(exists=True), desc="motions of the second and later orientations, for the record"
    )


class _CosmosOutputSpec(StageOutputSpec):
    chi = File(exists=True, desc="susceptibility (ppm), not referenced; 0 outside `mask`")
    mask = File(exists=True, desc="where 2 or more orientations know their field")


class Cosmos(Stage):
    """Invert all fields at once (:func:`qsmpipe.numerics.inversion.cosmos.cosmos`)."""

    input_spec, output_spec = _CosmosInputSpec, _CosmosOutputSpec
    stage = method = "cosmos"
    function = staticmethod(cosmos)

    def _compute(self, cwd: Path, device: torch.device) -> None:
        inputs, like = self.inputs, self.inputs.fields[0]
        known = images.stack(inputs.masks, device=device) > 0
        mask = known.sum(0) >= 2
        if not mask.any():
            msg = (
                "no voxel lies in the masks of 2 orientations: do they show the same head, and "
                "did the registration succeed?"
            )
            raise ValueError(msg)
        result = self._call(
            images.stack(inputs.fields, device=device),
            mask,
            images.zooms_of(like),
            b0_directions=inputs.b0_directions,
            noise=images.stack(inputs.noises, device=device) * known,
        )
        self._record(result.convergence)
        smallest, angles = conditioning(inputs.b0_directions)
        motions = [np.eye(4), *map(np.loadtxt, inputs.transforms or [])]
        self._step |= {
            "b0_directions": [list(direction) for direction in inputs.b0_directions],
            "transforms": [motion.tolist() for motion in motions],
            "angles": list(angles),
            "smallest_sum_of_squared_kernels": smallest,
        }
        self._results["chi"] = images.save(result.chi, cwd / "chi.nii", like=like)
        self._results["mask"] = images.save(mask, cwd / "mask.nii", like=like)
