"""From a head's maps to the complex multi-echo signal of a scan, and to its truth."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.kernels import AXIAL
from qsmpipe.numerics.simulate.field import BLOCK, block_mean, fields, shim, upsample
from qsmpipe.numerics.simulate.tissues import TissueMaps
from qsmpipe.numerics.units import radians_per_ppm

Window = tuple[slice, slice, slice]
"""Part of the grid that is acquired, in acquired voxels."""

WHOLE: Window = (slice(None), slice(None), slice(None))


@dataclass(frozen=True)
class Scan:
    """How a head is scanned."""

    field_strength: float
    """In T."""
    echo_times: tuple[float, ...]
    """In s."""
    b0_direction: tuple[float, float, float] = AXIAL
    """Unit vector along B0 in voxel axes."""
    factor: int = 2
    """How many voxels of the maps make an acquired one, along each axis."""
    shimmed: bool = True
    """Whether a second-order shim is fitted in the brain."""
    coil_phase: float = 1.5
    """Phase that all echoes share: about its size at the edge of the grid (rad)."""
    coil_shading: float = 0.3
    """Drop of the receive sensitivity from the edge of the grid to its middle."""
    coil_seed: int = 0
    """Of the coil's shape."""


class Simulation(NamedTuple):
    """A scan without noise, and its truth, all on the acquired grid."""

    signal: Tensor
    """(E, X, Y, Z) complex."""
    mask: Tensor
    """(X, Y, Z) bool: voxels that are brain by half or more."""
    chi: Tensor
    """ppm relative to water, mean over the voxel, as are the maps below."""
    total: Tensor
    """Field that the phase shows (ppm), shim included, everywhere."""
    local: Tensor
    """Field of the sources inside ``mask``, relative to their mean (ppm), everywhere."""
    r2star: Tensor
    """1/s; the signal also decays by dephasing within a voxel."""
    s0: Tensor
    """Signal at echo time 0, coil included."""

    @property
    def background(self) -> Tensor:
        """Field of all sources outside the mask and of the shim (ppm)."""
        return self.total - self.local


def simulate(
    maps: TissueMaps, brain: Tensor, zooms: Zooms, scan: Scan, *, window: Window = WHOLE
) -> Simulation:
    """Scan a head.

    The field is computed on the fine grid of ``maps``; the complex signal of its voxels is
    averaged over each acquired one, so that steep fields dephase it.

    Parameters
    ----------
    maps : TissueMaps
        The whole head, (factor * X, factor * Y, factor * Z); beyond it is air.
    brain : bool tensor
        On the grid of ``maps``.
    zooms : tuple of float
        Voxel size (mm) of the **acquired** grid.
    scan : Scan
        Field, echoes, coil, shim.
    window : tuple of 3 slices
        What part of the acquired grid to keep: the head goes on beyond the field of view.

    Returns
    -------
    Simulation
        Without noise (see :func:`add_noise`).

    Raises
    ------
    ValueError
        If the grids differ or do not divide by ``scan.factor``.
    """
    factor = scan.factor
    fine_x, fine_y, fine_z = (zoom / factor for zoom in zooms)
    whole = block_mean(brain.to(maps.chi), factor) >= 0.5
    inside = torch.zeros_like(whole)
    inside[window] = whole[window]
    total, local, _ = fields(
        maps.chi, upsample(inside, factor), (fine_x, fine_y, fine_z),
        b0_direction=scan.b0_direction,
    )  # fmt: skip
    local = block_mean(local, factor)[window]
    if scan.shimmed:
        total += shim(block_mean(total, factor), inside, zooms, like=total, factor=factor)
    fine = tuple(
        slice(*(factor * i for i in part.indices(n)[:2]))
        for part, n in zip(window, inside.shape, strict=True)
    )
    chi, r2star, s0, total = (image[fine] for image in (*maps, total))
    mask = inside[window]
    coil = coil_sensitivity(mask, scan, dtype=chi.dtype)
    signal = voxel_signal(
        total, r2star, s0,
        echo_times=scan.echo_times, field_strength=scan.field_strength, factor=factor,
    )  # fmt: skip
    chi, total, r2star, s0 = (block_mean(image, factor) for image in (chi, total, r2star, s0))
    return Simulation(signal * coil, mask, chi, total, local, r2star, s0 * coil.abs())


def voxel_signal(
    field: Tensor,
    r2star: Tensor,
    s0: Tensor,
    *,
    echo_times: Sequence[float],
    field_strength: float,
    factor: int = 1,
) -> Tensor:
    r"""Signal of every voxel, :math:`S_0 e^{-R_2^* TE} e^{2 \pi i \gamma B_0 \delta TE}`.

    Parameters
    ----------
    field, r2star, s0 : (factor * X, factor * Y, factor * Z) tensors
        Field (ppm of B0), relaxation rate (1/s) and signal at echo time 0.
    echo_times : sequence of float
        In s.
    field_strength : float
        In T.
    factor : int
        Complex mean over cubes of so many voxels a side.

    Returns
    -------
    (E, X, Y, Z) complex tensor
    """
    nx, ny, nz = (n // factor for n in field.shape)
    signal = torch.empty(
        (len(echo_times), nx, ny, nz), dtype=field.dtype.to_complex(), device=field.device
    )
    step = max(1, BLOCK // (factor**3 * ny * nz))
    for i in range(0, nx, step):
        slab = slice(factor * i, factor * (i + step))
        for echo, time in enumerate(echo_times):
            phase = field[slab] * radians_per_ppm(field_strength, time)
            magnitude = s0[slab] * torch.exp(-r2star[slab] * time)
            signal[echo, i : i + step] = block_mean(torch.polar(magnitude, phase), factor)
    return signal


def coil_sensitivity(like: Tensor, scan: Scan, *, dtype: torch.dtype) -> Tensor:
    """Receive sensitivity, one polynomial of second order each for its size and its phase."""
    x, y, z = (torch.linspace(-1, 1, n, dtype=dtype, device=like.device) for n in like.shape)
    x, y = x[:, None, None], y[:, None]
    generator = torch.Generator().manual_seed(scan.coil_seed)
    weights = (2 * torch.rand(9, generator=generator, dtype=torch.float64) - 1).tolist()
    phase = torch.zeros(like.shape, dtype=dtype, device=like.device)
    terms = (x, y, z, x * y, x * z, y * z, x**2, y**2, z**2)
    for weight, term in zip(weights, terms, strict=True):
        phase += scan.coil_phase * 0.5 * weight * term
    size = 1 - scan.coil_shading * (1 - (x**2 + y**2 + z**2) / 3) + 0.1 * scan.coil_shading * x
    return torch.polar(size, phase + scan.coil_phase * 0.5)


def add_noise(signal: Tensor, mask: Tensor, *, snr: float, seed: int) -> Tensor:
    """Add complex Gaussian noise: the magnitude becomes Rician.

    Parameters
    ----------
    signal : (E, X, Y, Z) complex tensor
        Signal without noise.
    mask : (X, Y, Z) bool tensor
        Where the signal is measured: the brain.
    snr : float
        Mean magnitude of the first echo in ``mask`` over the standard deviation of the noise in
        the real part, which is also that in the imaginary part.
    seed : int
        The same seed gives the same noise, on any device.

    Returns
    -------
    (E, X, Y, Z) complex tensor
    """
    sigma = signal[0][mask].abs().mean() / snr
    generator = torch.Generator().manual_seed(seed)
    real, imaginary = torch.randn(
        (2, *signal.shape), generator=generator, dtype=signal.real.dtype
    ).to(signal.device)
    return signal + sigma * torch.complex(real, imaginary)
