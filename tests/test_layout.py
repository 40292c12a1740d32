"""Images lie in memory as their reader left them: nibabel's with the first axis innermost."""

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qsmpipe.methods import METHODS, function_of
from qsmpipe.numerics.masks.quality import quality as quality_mask
from qsmpipe.numerics.phase import complex_to_polar, mcpc3ds, to_radians, wrap
from qsmpipe.numerics.unwrap.romeo import quality_map

ECHO_TIMES = (0.004, 0.009, 0.014)
ZOOMS = (1.0, 1.2, 1.5)
SHAPE = (24, 21, 19)


def turned(image: Tensor) -> Tensor:
    """Same numbers, space axes in memory in the reverse order."""
    axes = list(range(image.ndim))
    reverse = axes[:-3] + axes[:-4:-1]
    return image.permute(reverse).contiguous().permute(reverse)


@pytest.fixture(scope="module")
def scan() -> dict[str, Tensor]:
    axes = [torch.arange(n) - n / 2 for n in SHAPE]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    mask = (x / 11) ** 2 + (y / 9) ** 2 + (z / 8) ** 2 < 1
    times = torch.tensor(ECHO_TIMES)[:, None, None, None]
    noise = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(3))
    signal = mask * torch.exp(-20 * times) * (100 + 2 * x)
    phase = 0.4 + 0.02 * y + 2 * math.pi * times * (3 * x + 40 * torch.exp(-(z**2) / 20))
    image = torch.polar(signal, phase) + torch.complex(*noise)
    return {"magnitude": image.abs(), "phase": image.angle(), "mask": mask}


def field_inputs(scan: dict[str, Tensor], name: str) -> dict[str, Any]:
    return {
        "unwrap": {"phase": scan["phase"], "mask": scan["mask"], "zooms": ZOOMS,
                   "magnitude": scan["magnitude"]},
        "field": {"phase": scan["phase"], "mask": scan["mask"], "magnitude": scan["magnitude"],
                  "field_strength": 3.0},
        "relaxation": {"magnitude": scan["magnitude"], "mask": scan["mask"]},
    }[name]  # fmt: skip


ROWS = [(stage, name) for stage in ("unwrap", "field", "relaxation") for name in METHODS[stage]]


@pytest.mark.parametrize(("stage", "name"), ROWS, ids=[f"{s}-{n}" for s, n in ROWS])
def test_methods_over_echoes_do_not_care(stage: str, name: str, scan: dict[str, Tensor]) -> None:
    given = field_inputs(scan, stage) | {"echo_times": ECHO_TIMES}
    function = function_of(stage, name)
    taken = {k: v for k, v in given.items() if k in inspect.signature(function).parameters}
    other = {k: turned(v) if isinstance(v, Tensor) else v for k, v in taken.items()}
    same(function(**taken), function(**other))


def same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    elif isinstance(one, tuple):
        for left, right in zip(one, other, strict=True):
            same(left, right)


@pytest.mark.parametrize("times", [(0.004, 0.009, 0.015), (0.004, 0.008, 0.012)])
@pytest.mark.parametrize("bipolar", [False, True])
def test_the_offset_does_not_care(
    bipolar: bool, times: tuple[float, ...], scan: dict[str, Tensor]
) -> None:
    phase, magnitude = scan["phase"], scan["magnitude"]
    chosen = {"echo_times": times, "bipolar": bipolar}
    same(
        mcpc3ds(phase, magnitude, ZOOMS, **chosen),
        mcpc3ds(turned(phase), turned(magnitude), ZOOMS, **chosen),
    )


@pytest.mark.parametrize("alternating", [[], [0], [1, 2]])
def test_reading_does_not_care(alternating: list[int], scan: dict[str, Tensor]) -> None:
    phase, magnitude = scan["phase"], scan["magnitude"]
    how = {"sign": -1, "alternating": alternating}
    same(
        to_radians(phase, slope=[1.0], intercept=[0.0], **how),
        to_radians(turned(phase), slope=[1.0], intercept=[0.0], **how),
    )
    parts = magnitude * phase.cos(), magnitude * phase.sin()
    same(complex_to_polar(*parts, **how), complex_to_polar(*map(turned, parts), **how))
    same(wrap(3 * phase), wrap(3 * turned(phase)))


def test_masks_and_quality_do_not_care(scan: dict[str, Tensor]) -> None:
    phase, magnitude = scan["phase"], scan["magnitude"]
    map_ = quality_map(phase, magnitude=magnitude, echo_times=ECHO_TIMES)
    other = quality_map(turned(phase), magnitude=turned(magnitude), echo_times=ECHO_TIMES)
    same(map_, other)
    assert torch.equal(quality_mask(map_, ZOOMS), quality_mask(turned(map_), ZOOMS))
    for name in ("threshold", "bet"):
        function = function_of("mask", name)
        assert torch.equal(function(magnitude, ZOOMS), function(turned(magnitude), ZOOMS))
