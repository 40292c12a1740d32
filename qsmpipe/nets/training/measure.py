"""What a measurement makes of a field: noise, remnants of the background, a smaller mask."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qsmpipe.nets.training.analytic import offsets_from, sphere
from qsmpipe.nets.training.draws import Draws, Range
from qsmpipe.nets.training.sample import Sample
from qsmpipe.numerics.background import vsharp
from qsmpipe.numerics.masks.morphology import erode
from qsmpipe.numerics.simulate.field import AIR
from qsmpipe.numerics.simulate.signal import add_noise
from qsmpipe.numerics.swi import DEFAULT_RESOLUTION, high_pass

FAST_RADII = (12.0, 7.0, 4.0, 2.0)
"""Ball radii (mm) of a V-SHARP that is quick; those below the largest voxel edge are left out."""


def phase_noise(magnitude: Tensor, mask: Tensor, *, snr: float, seed: int) -> Tensor:
    """Noise of the phase (rad) where complex noise makes the magnitude Rician [1]_.

    The noise is the same in all directions of the complex plane: what it adds to any phase is
    the angle of a real signal in noise. Its standard deviation is that of the noise over the
    magnitude while that is large, and uniform where there is no signal.

    Parameters
    ----------
    magnitude : (X, Y, Z) tensor
        Signal without noise, in any unit.
    mask : (X, Y, Z) bool tensor
        Where ``snr`` holds.
    snr : float
        Mean magnitude in ``mask`` over the noise's standard deviation in the real part.
    seed : int
        Of the noise, the same on any device.

    References
    ----------
    .. [1] Gudbjartsson, Patz. Magn Reson Med 34 (1995) 910, doi:10.1002/mrm.1910340618
    """
    signal = torch.complex(magnitude, torch.zeros_like(magnitude))
    return add_noise(signal[None], mask, snr=snr, seed=seed)[0].angle()


def surroundings(sample: Sample, draws: Draws, *, count: tuple[int, int] = (1, 6)) -> Tensor:
    """Field (X, Y, Z) of balls of air beyond the grid, ppm: harmonic all over it.

    Their radii are 5 to 25 mm; they come as near to a face as 2 mm.
    """
    scan, shape = sample.scan, sample.chi.shape
    extent = [(n - 1) * zoom for n, zoom in zip(shape, scan.zooms, strict=True)]
    total = torch.zeros_like(sample.chi)
    for _ in range(draws.integer(count)):
        radius = draws.number((5.0, 25.0))
        centre = [draws.number((0.0, length)) for length in extent]
        axis, beyond = draws.integer((0, 2)), radius + draws.number((2.0, 20.0))
        centre[axis] = draws.one_of((-beyond, extent[axis] + beyond))
        offsets = offsets_from(centre, (shape[0], shape[1], shape[2]), scan, total)
        total.add_(sphere(offsets, radius, scan.b0_direction)[1], alpha=AIR)
    return total


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """From the true field of a sample to what a network is given.

    Where a background is removed, what a real V-SHARP leaves of it is in the field. The
    background is the sample's own, or that of :func:`surroundings`. V-SHARP takes from the local
    field as well, and in a patch far more than in a head: that is not imitated, as a network that
    made up for it finds too much susceptibility in true local fields.

    Parameters
    ----------
    snr : range, or None
        Of the magnitude, log-uniform; the phase's noise follows from both and is converted to
        ppm at the sample's field strength and echo time [1]_. Shapes without a magnitude count as
        uniform signal. The text has no numbers.
    gaussian : range, or None
        Standard deviation (ppm) of white noise of the field, log-uniform. SI-QSM [2]_: 1e-5 to
        1e-3, in place of ``snr``.
    background : float
        Probability that a background is there and removed.
    radii : sequence of float
        Of V-SHARP (mm).
    erosion : range
        Radius of the ball that erodes the mask (mm), uniform.
    filtered : bool
        Whether to simulate the high-pass filtered phase of SWI as well [3]_, from the total field
        and with the same noise. It needs a mask with a margin or a whole brain.
    resolution : range
        Of the high-pass filter (mm), see :func:`qsmpipe.numerics.swi.homodyne`.

    References
    ----------
    .. [1] Jochmann, Haueisen, Schweser. How to train a deep convolutional neural network for
       quantitative susceptibility mapping (QSM). ISMRM, abstract
    .. [2] Larrain. Scale-invariant deep learning approach for QSM reconstruction: SI-QSM. Thesis,
       Pontificia Universidad Catolica de Chile (2022)
    .. [3] Lu et al. Reconstruction of quantitative susceptibility maps from phase of
       susceptibility weighted imaging with cross-connected Psi-Net. ISBI (2021)
    """

    snr: Range | None = (20.0, 200.0)
    gaussian: Range | None = None
    background: float = 0.0
    radii: tuple[float, ...] = FAST_RADII
    erosion: Range = (0.0, 0.0)
    filtered: bool = False
    resolution: Range = (DEFAULT_RESOLUTION, DEFAULT_RESOLUTION)

    def __call__(self, sample: Sample, draws: Draws) -> Sample:
        """Measure a sample as drawn."""
        field = sample.field + self._noise(sample, draws)
        removed = draws.chance(self.background)
        around = sample.background
        if around is None and removed:
            around = surroundings(sample, draws)
        filtered = None
        if self.filtered:
            filtered = self._filtered(sample, field if around is None else field + around, draws)
        mask = erode(sample.mask, sample.scan.zooms, radius=draws.number(self.erosion))
        if removed and around is not None:
            left, mask, _ = vsharp(around, mask, sample.scan.zooms, radii=self.radii)
            field = field + left
        measured = replace(sample, field=field, mask=mask, filtered=filtered, background=around)
        return measured.masked()

    def _noise(self, sample: Sample, draws: Draws) -> Tensor:
        noise = torch.zeros_like(sample.field)
        if self.snr is not None:
            signal = sample.magnitude
            signal = torch.ones_like(noise) if signal is None else signal
            snr = draws.log_uniform(self.snr).item()
            angle = phase_noise(signal, sample.mask, snr=snr, seed=draws.seed())
            noise += angle / sample.scan.radians_per_ppm
        if self.gaussian is not None:
            sigma = draws.log_uniform(self.gaussian).item()
            white = torch.randn(noise.shape, generator=draws.generator, dtype=noise.dtype)
            noise += sigma * white.to(noise.device)
        return noise

    def _filtered(self, sample: Sample, total: Tensor, draws: Draws) -> Tensor:
        scan, signal = sample.scan, sample.magnitude
        return high_pass(
            total * scan.radians_per_ppm,
            sample.mask,
            scan.zooms,
            magnitude=torch.ones_like(total) if signal is None else signal,
            b0_direction=scan.b0_direction,
            resolution=draws.number(self.resolution),
        )
