"""NaN and infinity in every method: no effect outside the mask, inside an error that counts."""

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qsmpipe.methods import METHODS, function_of
from qsmpipe.numerics.phase import mcpc3ds_coils
from qsmpipe.numerics.planes import plane_offsets

SHAPE, ZOOMS, TIMES = (14, 13, 12), (3.0, 3.0, 3.0), (0.004, 0.008, 0.012)
X, Y, Z = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
MASK = X**2 + Y**2 + Z**2 < 0.8
INSIDE, OUTSIDE = (7, 6, 6), (0, 0, 0)
STAGES = ("unwrap", "field", "relaxation", "background", "inversion")
CASES = [
    (stage, name)
    for stage in STAGES
    for name, method in METHODS[stage].items()
    if not method.trained
]

FEW = {"max_iterations": 2, "outer_iterations": 1, "max_outer": 1}
"""Iterative methods need not get far to show what they do with a hole."""


def data() -> dict[str, Tensor]:
    field = 0.02 * (X + Y**2 - Z * X)
    phase = torch.stack([2 * math.pi * 127.7 * t * field + 0.1 for t in TIMES])
    magnitude = torch.stack([100 * math.exp(-20 * t) * MASK + 0.1 for t in TIMES])
    return {"phase": phase, "magnitude": magnitude, "field": field}


def call(stage: str, name: str, images: dict[str, Tensor]) -> list[Tensor]:
    """Results of a method that are tensors."""
    function = function_of(stage, name)
    known: dict[str, Any] = {
        **images, "mask": MASK, "zooms": ZOOMS, "echo_times": TIMES, "field_strength": 3.0,
        "b0_direction": (0.0, 0.0, 1.0), **FEW,
    }  # fmt: skip
    parameters = inspect.signature(function).parameters
    given = {key: value for key, value in known.items() if key in parameters}
    if stage == "inversion" and "phase" not in parameters:
        given.pop("magnitude", None)
    positional = [
        given.pop(key)
        for key, each in parameters.items()
        if each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    result = function(*positional, **given)
    results = [result] if isinstance(result, Tensor) else list(result)
    return [each for each in results if isinstance(each, Tensor)]


def broken(name: str, voxel: tuple[int, int, int], value: float) -> dict[str, Tensor]:
    images = {key: image.clone() for key, image in data().items()}
    images[name][(..., *voxel)] = value
    return images


def takes(stage: str, name: str) -> list[str]:
    parameters = inspect.signature(function_of(stage, name)).parameters
    images = [key for key in ("phase", "field") if key in parameters]
    return images + ["magnitude"] * ("magnitude" in parameters and stage != "inversion")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("stage", "name"), CASES, ids=["-".join(case) for case in CASES])
def test_outside_the_mask_it_has_no_effect_and_inside_it_is_an_error(
    stage: str, name: str
) -> None:
    whole = call(stage, name, data())
    for image in takes(stage, name):
        for value in (math.nan, math.inf):
            for one, other in zip(
                call(stage, name, broken(image, OUTSIDE, value)), whole, strict=True
            ):
                assert one.isfinite().all()
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
            with pytest.raises(ValueError, match=r"not finite in 1 of the mask's \d+ voxels"):
                call(stage, name, broken(image, INSIDE, value))


def offset(phase: Tensor, magnitude: Tensor, name: str) -> Tensor:
    function = function_of("offset", name)
    return function(phase, magnitude, ZOOMS, echo_times=TIMES).phase


@pytest.mark.parametrize("name", METHODS["offset"])
def test_the_offset_takes_a_magnitude_of_0_for_outside(name: str) -> None:
    dark = data() | {"magnitude": data()["magnitude"] * MASK}
    whole = offset(dark["phase"], dark["magnitude"], name)
    for value in (math.nan, math.inf):
        phase, magnitude = dark["phase"].clone(), dark["magnitude"].clone()
        phase[(1, *OUTSIDE)] = value
        result = offset(phase, magnitude, name)
        assert result.isfinite().all()
        torch.testing.assert_close(result[:, MASK], whole[:, MASK])
        magnitude[(2, *INSIDE)] = value
        with pytest.raises(ValueError, match="not finite in 1 voxels with signal: set both to 0"):
            offset(phase, magnitude, name)
        with pytest.raises(ValueError, match="not finite in 1 voxels with signal"):
            mcpc3ds_coils(phase[None], magnitude[None], ZOOMS, echo_times=TIMES)
        magnitude[(0, *INSIDE)] = value
        with pytest.raises(ValueError, match="not finite in 1 voxels with signal"):
            plane_offsets(phase, magnitude, echo_times=TIMES)


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("slices", [3, 4])
def test_three_and_four_slices_have_an_offset(slices: int, axis: int) -> None:
    shape = [24, 24, 24]
    shape[axis] = slices
    x, y, z = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in shape), indexing="ij")
    evolution = torch.stack([60 * t * (x + 2 * y**2 - z) for t in TIMES])
    result = function_of("offset", "mcpc3ds")(
        evolution + 0.5, torch.ones_like(evolution), ZOOMS, echo_times=TIMES
    )
    left = torch.angle(torch.exp(1j * (result.phase - evolution)))
    assert left.square().mean().sqrt() < 0.1
