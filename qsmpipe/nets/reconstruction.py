"""From the images of a scan to a map by a network, on the network's own grid where it must be."""

import itertools
import math
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from qsmpipe.nets.cards import Domain, Model
from qsmpipe.nets.common import Network
from qsmpipe.nets.contract import Contract
from qsmpipe.nets.patches import Tiling, at_once, check_tiling, fitting, in_patches, seam_error
from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.grids import bounding_box, check_mask, in_place, known_field
from qsmpipe.numerics.kernels import AXIAL, check_direction
from qsmpipe.numerics.resampling import extended, resample, resample_mask
from qsmpipe.numerics.swi import slice_axis

Grid: TypeAlias = Literal["card", "native"]
"""Whether images are brought to what the network was trained on, or taken as they are."""

NEAR = 0.05
"""Voxel sizes that differ by this share from those of the domain are taken as they are."""

STEEP = 5.0
"""So are directions of B0 that are so many degrees beyond the domain's tilt."""

CPU_MEMORY = 4 * 2**30
"""Bytes that patches may take on a CPU: with what happens to be free, maps would differ."""

FAINT = 0.9
"""Slope of found on true susceptibility, by the card, below which a map comes with a warning."""

MIRRORS = tuple(axes for count in range(4) for axes in itertools.combinations((-3, -2, -1), count))
"""Axes along which images may be reversed: a network has not learned quite the same of each."""

FULL_WIDTH = 2 * math.sqrt(2 * math.log(2))
"""Of a Gaussian at half its height, in standard deviations."""


class Frame(NamedTuple):
    """The grid on which a network sees a scan."""

    order: tuple[int, int, int]
    """Voxel axes of the scan, the one nearest to B0 last."""
    zooms: Zooms
    """Voxel size of the network's grid (mm)."""
    turn: np.ndarray | None
    """From the network's axes to those of ``order``, (3, 3); None where nothing is resampled."""

    @classmethod
    def of(
        cls, zooms: Zooms, b0_direction: Sequence[float], domain: Domain, grid: Grid
    ) -> "Frame":
        """Choose it: as the scan is, if the domain holds that, or if it must be."""
        check_direction(b0_direction)
        up = slice_axis(b0_direction)
        x, y, z = order = (*(axis for axis in range(3) if axis != up), up)
        own = zooms[x], zooms[y], zooms[z]
        tilt = math.degrees(math.acos(min(abs(b0_direction[up]), 1.0)))
        wanted = domain.nearest(own)
        near = all(abs(a / b - 1) <= NEAR for a, b in zip(own, wanted, strict=True))
        if grid == "native" or (near and tilt <= domain.tilt + STEEP):
            return cls((x, y, z), own, None)
        return cls((x, y, z), wanted, _upright([b0_direction[axis] for axis in order]))


def _upright(b0_direction: Sequence[float]) -> np.ndarray:
    """Smallest rotation that takes the third axis to B0 or to its opposite, (3, 3)."""
    b = np.array(b0_direction) * math.copysign(1.0, b0_direction[2])
    b /= np.linalg.norm(b)
    cross = np.cross([0, 0, 1], b)
    skew = np.array([[0, -cross[2], cross[1]], [cross[2], 0, -cross[0]], [-cross[1], cross[0], 0]])
    return np.eye(3) + skew + skew @ skew / (1 + b[2])


class Placed(NamedTuple):
    """The network's grid in the space of a scan (mm)."""

    affine: np.ndarray
    shape: tuple[int, int, int]

    @classmethod
    def around(cls, shape: Sequence[int], zooms: Zooms, frame: Frame) -> "Placed":
        """Lay it around all of a grid of ``shape`` and ``zooms``, on the same centre."""
        assert frame.turn is not None
        half = (np.array(shape) - 1) * zooms / 2
        reach = np.abs(frame.turn.T) @ half  # of the corners, along the network's axes
        counts = 2 * np.ceil(reach / frame.zooms).astype(int) + 1
        affine = np.eye(4)
        affine[:3, :3] = frame.turn * frame.zooms
        affine[:3, 3] = half - affine[:3, :3] @ ((counts - 1) / 2)
        i, j, k = counts.tolist()
        return cls(affine, (i, j, k))


class Reconstruction(NamedTuple):
    """A map, and how it was made."""

    chi: Tensor
    """Susceptibility (ppm), (X, Y, Z); 0 outside the mask."""
    made: dict[str, Any]
    """Weights and their hash, the grid (mm), patches, seam error, and of the mirror images' maps
    the root mean square deviation from their mean, as a share of its norm."""


@torch.no_grad()
def reconstruct(
    model: Model,
    mask: Tensor,
    zooms: Zooms,
    *,
    field: Tensor | None = None,
    filtered: Tensor | None = None,
    b0_direction: Sequence[float] = AXIAL,
    grid: Grid = "card",
    patch: int = 0,
    halo: int = 0,
    mirror: bool = True,
) -> Reconstruction:
    """Map a scan.

    Where the scan's voxel size or the direction of B0 is not in the domain of the card, the images
    are resampled to the nearest voxel size that is, with the third axis along B0, and the map
    back: cubic splines, images beyond the mask going on with the value at its edge; where voxels
    become larger, after a Gaussian that takes them there. Axes are exchanged where B0 is nearest
    to another one than the third.

    Parameters
    ----------
    model : Model
        Network and card; moved to the device of the images.
    mask : (X, Y, Z) bool tensor
        Where the images are known.
    zooms : tuple of float
        Voxel size (mm).
    field, filtered : (X, Y, Z) tensors
        Local field (ppm), high-pass filtered phase (rad): what the network takes.
    b0_direction : sequence of 3 floats
        Unit vector along B0 in voxel axes.
    grid : {"card", "native"}
        "native" never resamples, whatever the network makes of that.
    patch, halo : int
        Of the cutting (voxels of the network's grid); 0 for the card's. Patches as large as the
        image or larger are no patches.
    mirror : bool
        Whether the map is the mean of those of the images and of their seven mirror images, in
        which the dipole is the same.

    Raises
    ------
    ValueError
        If an image is missing or on another grid, or a number does not fit the network.
    """
    card = model.card
    images = {"field": field, "filtered": filtered}
    given = {name: image for name, image in images.items() if image is not None}
    frame = Frame.of(zooms, b0_direction, card.domain, grid)
    like = next(iter(given.values()), mask.float())
    check_mask(like, mask)
    box = bounding_box(mask)
    part = mask[box].permute(frame.order)
    x, y, z = (zooms[axis] for axis in frame.order)
    known = {
        name: known_field(image[box], mask[box]).permute(frame.order).float()
        for name, image in given.items()
    }
    place = None
    seen, inside = known, part
    if frame.turn is not None:
        place = Placed.around(part.shape, (x, y, z), frame)
        seen, inside = _to(known, part, (x, y, z), frame, place)
        _tell_grid(frame, (x, y, z))
    _tell_faint(model)
    stacked = card.contract.images(
        field=_channel(seen.get("field")),
        mask=inside[None],
        filtered=_channel(seen.get("filtered")),
    )
    # A network that knows voxel sizes has seen none but those of its domain.
    network = model.network.to(stacked.device).at(card.domain.same_shape(frame.zooms))
    chi, cut = _mapped(
        network, card.contract, stacked,
        patch=patch or card.patch, halo=halo or card.halo, mirror=mirror,
    )  # fmt: skip
    chi = chi * inside
    if place is not None:
        chi = resample(
            chi, place.affine, np.eye(4), to=np.diag((x, y, z, 1)), shape=part.shape, mask=inside
        )
    chi = (chi * part).permute([frame.order.index(axis) for axis in range(3)]).contiguous()
    made = {"weights": model.name, "sha256": card.sha256, **cut}
    if place is not None:
        made["resampled_to"] = [round(zoom, 4) for zoom in frame.zooms]
    return Reconstruction(in_place(chi, box, mask).to(like.dtype), made)


def _channel(image: Tensor | None) -> Tensor | None:
    return None if image is None else image[None]


def _to(
    images: dict[str, Tensor], mask: Tensor, zooms: Zooms, frame: Frame, place: Placed
) -> tuple[dict[str, Tensor], Tensor]:
    """Bring images and their mask to the network's grid."""
    own = np.diag((*zooms, 1.0))
    inside = resample_mask(mask, own, np.eye(4), to=place.affine, shape=place.shape)
    sigmas = [
        math.sqrt(max(wide**2 - zoom**2, 0.0)) / zoom / FULL_WIDTH
        for wide, zoom in zip(frame.zooms, zooms, strict=True)
    ]
    found = {}
    for name, image in images.items():
        smooth = gaussian_filter(extended(image, mask, zooms).cpu().numpy(), sigmas)
        moved = resample(
            torch.from_numpy(smooth).to(image), own, np.eye(4), to=place.affine, shape=place.shape
        )
        found[name] = moved * inside
    return found, inside


def _tell_faint(model: Model) -> None:
    slope = model.card.training.get("validation", {}).get("slope", 1.0)
    if slope < FAINT:
        warnings.warn(
            f"the weights {model.name} find {slope:.0%} of the susceptibility on the samples that "
            "they were validated on: the map shows where it is, not how much",
            RuntimeWarning,
            stacklevel=3,
        )


def _tell_grid(frame: Frame, zooms: Zooms) -> None:
    assert frame.turn is not None
    own, to = (" x ".join(f"{zoom:.3g}" for zoom in one) for one in (zooms, frame.zooms))
    tilt = round(math.degrees(math.acos(min(frame.turn[2, 2], 1.0))))
    oblique = f", {tilt} degrees oblique to B0" if tilt else ""
    warnings.warn(
        f"the weights are not meant for voxels of {own} mm{oblique}: resampled to {to} mm along "
        "B0 and back, which costs fine detail",
        RuntimeWarning,
        stacklevel=3,
    )


def _mapped(
    network: Network, contract: Contract, images: Tensor, *, patch: int, halo: int, mirror: bool
) -> tuple[Tensor, dict[str, float]]:
    """Susceptibility, the mean over mirror images, and how it was made."""
    check_tiling(network, Tiling(patch, halo))
    shape = images.shape[-3:]
    if patch >= max(shape):
        cut: dict[str, float] = {"patch": patch, "halo": halo}
        through = partial(at_once, network, halo=halo)
    else:
        tiling = fitting(network, shape, halo=halo, free=_free(images.device), largest=patch)
        seam = seam_error(network, images, tiling=tiling)
        cut = {"patch": tiling.patch, "halo": halo, "seam_error": round(seam, 4)}
        through = partial(in_patches, network, tiling=tiling)
    if not mirror:
        return contract.susceptibility(through(images)), cut
    mean, squares = images.new_zeros(shape), 0.0
    for axes in MIRRORS:
        chi = contract.susceptibility(through(images.flip(axes))).flip(axes)
        mean += chi / len(MIRRORS)
        squares += chi.square().sum(dtype=torch.float64).item() / len(MIRRORS)
    norm = mean.square().sum(dtype=torch.float64).item()
    spread = math.sqrt(max(squares / norm - 1, 0.0)) if norm > 0 else 0.0
    return mean, {**cut, "mirror_spread": round(spread, 4)}


def _free(device: torch.device) -> int:
    """Bytes that may be taken."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return CPU_MEMORY
