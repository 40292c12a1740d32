"""What a label is made of, and the maps that follow from a label map."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from qsmpipe.numerics.fourier import SPACE, Zooms
from qsmpipe.numerics.kernels import gaussian

NOMINAL_FIELD = 3.0
"""Field strength (T) at which the tables give R2*."""


class Tissue(NamedTuple):
    """One row of a table; the numbers are typical of the literature, not measurements."""

    name: str
    """What it is called in tables and messages."""
    chi: float
    """Susceptibility relative to water (ppm)."""
    r2star: float
    """Relaxation rate at 3 T (1/s)."""
    s0: float
    """Signal at echo time 0, relative: proton density times T1 weighting of a spoiled GRE."""
    brain: bool = False
    """Whether it belongs to the brain; CSF of the ventricles does."""


class TissueMaps(NamedTuple):
    """Maps (X, Y, Z) that a head is simulated from."""

    chi: Tensor
    """ppm, relative to water."""
    r2star: Tensor
    """1/s."""
    s0: Tensor
    """Relative."""


def maps_of(
    labels: Tensor,
    tissues: Mapping[int, Tissue],
    zooms: Zooms,
    *,
    field_strength: float = NOMINAL_FIELD,
    texture: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> TissueMaps:
    """Look every label up, and let brain tissue vary smoothly about its value.

    R2* grows with the field strength: 30 % of its value at 3 T stays, the rest is proportional.

    Parameters
    ----------
    labels : (X, Y, Z) integer tensor
        Label map.
    tissues : mapping
        Label to tissue.
    zooms : tuple of float
        Voxel size (mm).
    field_strength : float
        In T.
    texture : float
        Standard deviation (ppm) of what is added to the susceptibility of brain tissue; R2*
        follows by 100 /s per ppm, signal varies by 4 % at the most.
    seed : int
        Of the texture.
    dtype : torch.dtype
        Of the maps.

    Returns
    -------
    TissueMaps
        Susceptibility, R2* and signal on the grid of ``labels``.

    Raises
    ------
    ValueError
        If a label has no tissue.
    """
    unknown = sorted(set(labels.unique().tolist()) - set(tissues))
    if unknown:
        msg = f"no tissue for label {', '.join(map(str, unknown))}: add it to the table"
        raise ValueError(msg)
    scale = 0.3 + 0.7 * field_strength / NOMINAL_FIELD
    table = torch.zeros((4, max(tissues) + 1), dtype=dtype, device=labels.device)
    for label, tissue in tissues.items():
        varies = float(tissue.brain and tissue.chi != 0)
        table[:, label] = torch.tensor([tissue.chi, tissue.r2star * scale, tissue.s0, varies])
    index = labels.long()
    chi, r2star, s0, varies = (row[index] for row in table)
    if texture:
        grain = noise_texture(labels, zooms, seed=seed, dtype=dtype) * varies
        chi += texture * grain
        r2star = (r2star + 100 * texture * scale * grain).clamp(min=0)
        grain = noise_texture(labels, zooms, seed=seed + 1, dtype=dtype) * varies
        s0 = s0 * (1 + 0.02 * grain.clamp(-2, 2))
    return TissueMaps(chi, r2star, s0)


def noise_texture(
    like: Tensor, zooms: Zooms, *, sigma: float = 2.5, seed: int, dtype: torch.dtype
) -> Tensor:
    """Gaussian noise, smoothed by ``sigma`` mm, of mean 0 and standard deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(like.shape, generator=generator, dtype=dtype).to(like.device)
    x, y, z = white.shape
    spectrum = torch.fft.rfftn(white, dim=SPACE)
    smooth = torch.fft.irfftn(
        spectrum * gaussian((x, y, z), zooms, sigma, like=white), s=(x, y, z), dim=SPACE
    )
    return (smooth - smooth.mean()) / smooth.std()


def brain_of(labels: Tensor, tissues: Mapping[int, Tissue]) -> Tensor:
    """Where a label map shows brain.

    Parameters
    ----------
    labels : (X, Y, Z) integer tensor
        Label map.
    tissues : mapping
        Label to tissue.

    Returns
    -------
    (X, Y, Z) bool tensor
        True where the label's tissue belongs to the brain.
    """
    table = torch.zeros(max(tissues) + 1, dtype=torch.bool, device=labels.device)
    for label, tissue in tissues.items():
        table[label] = tissue.brain
    return table[labels.long()]
