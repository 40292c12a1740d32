"""The fluid of the ventricles: found by R2* in drawn and real heads, or refused."""

from pathlib import Path
from typing import NamedTuple

import nibabel as nb
import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from qsmpipe.numerics.masks.morphology import dilate
from qsmpipe.numerics.masks.ventricles import ventricles
from qsmpipe.numerics.relaxation import loglinear
from qsmpipe.numerics.simulate import add_noise, block_mean, maps_of
from qsmpipe.numerics.simulate.labels import TISSUES, brain_mask, clean

HEADS = Path(__file__).parents[2] / "shared/data/heads"
ECHO_TIMES = (0.005, 0.010, 0.015, 0.020, 0.025)
VENTRICLES = [label for label, tissue in TISSUES.items() if "ventricle" in tissue.name]
VENTRICLES += [label for label, tissue in TISSUES.items() if "plexus" in tissue.name]


class Drawing(NamedTuple):
    r2star: torch.Tensor
    mask: torch.Tensor
    fluid: torch.Tensor
    void: torch.Tensor
    zooms: tuple[float, float, float]


def drawing(zooms: tuple[float, float, float] = (2.0, 2.0, 2.0), *, seed: int = 0) -> Drawing:
    """Brain of 130 mm in fluid, two ventricles that meet, a cistern that leads there, a void."""
    shape = [int(140 / zoom) | 1 for zoom in zooms]
    x, y, z = torch.meshgrid(
        *((torch.arange(n) - n // 2) * zoom for n, zoom in zip(shape, zooms, strict=True)),
        indexing="ij",
    )
    mask = x**2 + y**2 + z**2 < 65**2
    sides = (((x.abs() - 8) / 7) ** 2 + (y / 22) ** 2 + ((z - 6) / 9) ** 2 < 1) | (
        (x.abs() < 8) & ((y / 8) ** 2 + ((z - 6) / 5) ** 2 < 1)
    )
    void = (x - 25) ** 2 + y**2 + (z - 6) ** 2 < 10**2
    stalk = (x**2 + z**2 < 2.5**2) & (y < -15)
    cistern = (x / 12) ** 2 + ((y + 34) / 9) ** 2 + ((z + 4) / 8) ** 2 < 1
    rim = x**2 + y**2 + z**2 > 58**2
    r2star = torch.full(shape, 18.0)
    r2star[sides | stalk | cistern | rim] = 2.0
    r2star[void] = 0.0
    generator = torch.Generator().manual_seed(seed)
    noisy = (r2star + 1.5 * torch.randn(shape, generator=generator)).clamp(min=0)
    return Drawing(torch.where(mask, noisy, 0), mask, sides, void & ~sides, zooms)


def precision(found: torch.Tensor, truth: torch.Tensor) -> float:
    return truth[found].double().mean().item()


@pytest.mark.parametrize("zooms", [(2.0, 2.0, 2.0), (1.5, 2.3, 3.1)], ids=str)
def test_the_ventricles_are_found_and_little_else(zooms: tuple[float, float, float]) -> None:
    r2star, mask, fluid, void, _ = drawing(zooms)
    found = ventricles(r2star, mask, zooms, magnitude=(~void).float())
    assert found.dtype is torch.bool
    assert precision(found, fluid) > 0.95
    assert (found & fluid).sum() > 0.8 * fluid.sum()
    assert not (found & void).any()


def test_a_void_without_magnitude_looks_like_fluid() -> None:
    r2star, mask, _, void, zooms = drawing()
    assert (ventricles(r2star, mask, zooms) & void).any()


def test_every_parameter_does_something() -> None:
    r2star, mask, _, void, zooms = drawing()
    magnitude = (~void).float()
    usual = ventricles(r2star, mask, zooms, magnitude=magnitude)
    for choice in ({"threshold": 3.0}, {"radius": 15.0}, {"depth": 50.0}, {"smoothing": 0.0}):
        other = ventricles(r2star, mask, zooms, magnitude=magnitude, **choice)
        assert not torch.equal(other, usual), choice
    with pytest.raises(ValueError, match="400 mL at least"):
        ventricles(r2star, mask, zooms, magnitude=magnitude, min_volume=400.0)


def test_neither_unit_nor_echoes_nor_what_is_outside_matter() -> None:
    r2star, mask, _, void, zooms = drawing()
    magnitude = (~void).float()
    usual = ventricles(r2star, mask, zooms, magnitude=magnitude)
    other = torch.where(mask, r2star, torch.nan).double()
    kept = other.clone()
    echoes = torch.stack([magnitude, 0.5 * magnitude]) * 1e-7
    echoes[:, ~mask] = torch.nan
    assert torch.equal(ventricles(other, mask, zooms, magnitude=echoes), usual)
    assert torch.equal(torch.nan_to_num(other), torch.nan_to_num(kept))


def test_what_cannot_be_a_ventricle_is_refused() -> None:
    r2star, mask, _, _, zooms = drawing()
    with pytest.raises(ValueError, match=r"no ventricle was found: 0 mL.*another reference"):
        ventricles(r2star + 10, mask, zooms)
    with pytest.raises(ValueError, match=r"100% of the middle.*unit of R2\* 1/s"):
        ventricles(r2star / 1000, mask, zooms)
    with pytest.raises(ValueError, match="is empty"):
        ventricles(r2star, torch.zeros_like(mask), zooms)
    with pytest.raises(ValueError, match=r"r2star \(71, 71, 71\) and mask \(71, 71, 70\)"):
        ventricles(r2star, mask[..., 1:], zooms)
    with pytest.raises(ValueError, match="give bool"):
        ventricles(r2star, mask.float(), zooms)


@pytest.mark.skipif(not HEADS.is_dir(), reason="shared test data not found: heads")
@pytest.mark.parametrize("number", [6, 10])
def test_they_lie_within_those_of_a_real_head(number: int) -> None:
    """Scanned at 2 mm with noise; in a loose mask, which holds fluid around the brain."""
    image = nb.as_closest_canonical(nb.load(HEADS / f"training_seg_{number:02d}.nii.gz"))
    labels = clean(torch.from_numpy(np.asarray(image.dataobj).astype(np.int16)), (1, 1, 1)).labels
    labels = labels[tuple(slice(n % 2, n) for n in labels.shape)]
    labels = pad(labels[..., labels.shape[2] // 3 // 2 * 2 :], [8] * 4 + [0, 8])
    fine = maps_of(labels, TISSUES, (1.0, 1.0, 1.0), texture=0.006, seed=number)
    signal = torch.stack([
        block_mean(fine.s0 * torch.exp(-fine.r2star * time), 2) for time in ECHO_TIMES
    ])  # fmt: skip
    zooms = (2.0, 2.0, 2.0)
    brain = block_mean(brain_mask(labels, (1.0, 1.0, 1.0)).float(), 2) >= 0.5
    magnitude = add_noise(signal.to(torch.complex64), brain, snr=60.0, seed=number).abs()
    mask = dilate(brain, zooms, radius=4.0)
    r2star = loglinear(magnitude, mask, echo_times=ECHO_TIMES).r2star
    found = ventricles(r2star, mask, zooms, magnitude=magnitude)
    truth = block_mean(torch.isin(labels, torch.tensor(VENTRICLES)).float(), 2) >= 0.5
    assert precision(found, truth) > 0.95
    assert found.sum().item() * 8 / 1000 > 4
