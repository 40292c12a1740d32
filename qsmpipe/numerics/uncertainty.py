"""How far the field's noise moves susceptibility: one standard deviation per voxel.

What is carried through is the noise of the field, independent between voxels and with the standard
deviation that the field fit gives: the scatter of repeated measurements. Bias (also that which
noise gives to a regularised inversion), background left over, wrong masks and unwrapping errors
are no part of it.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qsmpipe.numerics.background.common import LocalField
from qsmpipe.numerics.background.sharp import vsharp
from qsmpipe.numerics.fourier import Shape, Zooms, convolve, padded_shape, rfft
from qsmpipe.numerics.grids import bounding_box, crop, in_place
from qsmpipe.numerics.inversion.common import Susceptibility
from qsmpipe.numerics.kernels import AXIAL
from qsmpipe.numerics.operators import Dipole
from qsmpipe.numerics.reference import reference

__all__ = ["Chain", "Deviation", "NotAFilterError", "deviation", "filter_deviation"]

DEFAULT_REALISATIONS = 16
"""Noisy fields that are inverted. Alone, a standard deviation from so few is good to 18 %."""

POOLING = 0.75
"""Width (voxels) of the Gaussian that variances are averaged with: some 19 voxels. On phantoms
with noise that varies over the head, 16 realisations were within 15 % (RTS) and 45 % (TV) of the
truth with it, 25 % and 53 % without; 1.5 voxels blurred TV's to 52 %."""

TAPS = 4
"""Reach of that Gaussian (voxels)."""

STATIONARY = 1e-3
"""Largest relative deviation of a filter from the method that it was read from."""


class Deviation(NamedTuple):
    """Standard deviation of susceptibility."""

    deviation: Tensor
    """ppm, (X, Y, Z); 0 where the chain gives no susceptibility."""
    realisations: int
    """Noisy fields that it was estimated from; 0 if none was needed."""
    exact: bool
    """Whether it is the variance's own formula rather than an estimate."""


@dataclass(frozen=True)
class Chain:
    """From the total field to susceptibility relative to its reference, all choices made.

    Calling it with a field (ppm, (X, Y, Z)) gives susceptibility (ppm), 0 where it is not known.
    """

    mask: Tensor
    """Where the total field is known, (X, Y, Z) bool."""
    zooms: Zooms
    """Voxel size (mm)."""
    invert: Callable[[Tensor, Tensor, Zooms], Susceptibility]
    """Inversion, its parameters bound: also those that it would choose by the data."""
    backgrounds: Sequence[Callable[[Tensor, Tensor, Zooms], LocalField]] = ()
    """Background removals, one after the other, their parameters bound."""
    b0_direction: Sequence[float] = AXIAL
    """Unit vector along B0 in voxel axes."""
    region: Tensor | None = None
    """Reference region, (X, Y, Z) bool; the mask that background removal leaves if None."""
    referenced: bool = True
    """Whether the mean over the reference region is subtracted."""
    holds_background: bool = False
    """Whether the inversion takes the total field, and leaves the background in what it fits."""

    def local(self, field: Tensor) -> tuple[Tensor, Tensor]:
        """Remove the background: field (ppm) for the inversion, and where it is known."""
        mask = self.mask
        for remove in self.backgrounds:
            local = remove(field, mask, self.zooms)
            field, mask = local.field, local.mask
        return field, mask

    def refer(self, chi: Tensor, mask: Tensor) -> Tensor:
        """Make ``chi`` relative to the reference."""
        return reference(chi, mask, region=self.region).chi if self.referenced else chi

    def __call__(self, field: Tensor) -> Tensor:
        """Susceptibility of a total field."""
        local, mask = self.local(field)
        return self.refer(self.invert(local, mask, self.zooms).chi, mask)

    def fitted(self, field: Tensor) -> Tensor:
        """Total field without what the map leaves unexplained of it, most of which is noise.

        Noise added to the measured field meets noise that is in it already. Where a method is not
        linear the two do not just add up: total variation lets most of a field's noise through
        once its weight is too small for it. Noise is added to this field instead, as in a
        parametric bootstrap.
        """
        local, mask = self.local(field)
        chi = self.invert(local, mask, self.zooms).chi
        box = bounding_box(mask)
        part = chi[box]
        explained = in_place(
            Dipole.on_grid(part, self.zooms, self.b0_direction)(part), box, like=mask
        )
        rest = torch.where(mask, local - explained, 0.0)
        if self.holds_background:
            rest = vsharp(rest, mask, self.zooms).field
        return torch.where(self.mask, field - rest, 0.0)

    def filter_deviation(self, noise: Tensor) -> Tensor | None:
        """Exact deviation (ppm) for independent noise of the inversion's field, where it has one.

        That is for inversions that are one filter; None for the others. Background removal is
        taken to leave the noise as it is.
        """
        _, mask = self.local(torch.where(self.mask, noise, 0.0))
        region = mask if self.region is None else mask & self.region
        try:
            return filter_deviation(
                lambda field, where: self.invert(field, where, self.zooms).chi,
                noise,
                mask,
                region=region if self.referenced else None,
            )
        except NotAFilterError:
            return None


class NotAFilterError(ValueError):
    """A method is not one filter, the same everywhere."""


def deviation(
    chain: Callable[[Tensor], Tensor],
    field: Tensor,
    noise: Tensor,
    mask: Tensor,
    *,
    realisations: int = DEFAULT_REALISATIONS,
    seed: int = 0,
    guide: Tensor | None = None,
) -> Deviation:
    r"""Carry the noise of a field through any chain, by noisy fields that go through it [1]_.

    .. math:: \hat V = g^2 \, P\Bigl[ \frac{1}{g^2 (K - 1)} \sum_k (\chi_k - \bar\chi)^2 \Bigr],
        \qquad \chi_k = \mathrm{chain}(f + e_k)

    with :math:`e_k` independent between voxels. Without the local average P the variance is
    unbiased whatever the chain is, and the relative error of its root is :math:`1 / \sqrt{2 (K -
    1)}`; the average (a Gaussian of :data:`POOLING` voxels inside the mask) makes it smaller,
    where the variance changes slowly from voxel to voxel relative to ``guide``.

    Parameters
    ----------
    chain : callable
        From a field (X, Y, Z) to susceptibility (ppm), 0 where it is not known; with the
        referencing in it, since subtracting a noisy mean moves all voxels.
    field : (X, Y, Z) real tensor
        Field (ppm) that the noise is added to: best :meth:`Chain.fitted`. For a linear chain it
        does not matter.
    noise : (X, Y, Z) real tensor
        Standard deviation of the measured field (ppm).
    mask : (X, Y, Z) bool tensor
        Where ``field`` is known.
    realisations : int
        K, 2 or more.
    seed : int
        Of the noise: the same seed gives the same map.
    guide : (X, Y, Z) real tensor, optional
        g, a deviation that has the fine structure of the one that is sought, in any unit: what
        is averaged is the ratio. 1 by default. :meth:`Chain.filter_deviation` gives it for
        methods that are filters.

    Returns
    -------
    Deviation

    Raises
    ------
    ValueError
        If the grids differ, the mask is empty or not bool, the field is not finite inside,
        ``noise`` is negative or not finite in a voxel inside or nowhere positive, or
        ``realisations`` is below 2.

    References
    ----------
    .. [1] Efron, Tibshirani. Statist Sci 1 (1986) 54, doi:10.1214/ss/1177013815
    """
    if realisations < 2:
        msg = f"realisations is {realisations}: a deviation needs 2 or more"
        raise ValueError(msg)
    known, inside, box = crop(field, mask)
    spread = _check_noise(noise, mask)
    whole = in_place(known, box, mask)
    generator = torch.Generator().manual_seed(seed)
    mean = torch.zeros_like(whole)
    squares = torch.zeros_like(whole)
    for k in range(realisations):
        drawn = torch.randn(int(inside.sum()), generator=generator).to(whole)
        noisy = whole.clone()
        noisy[mask] += drawn * spread
        chi = chain(noisy)
        change = chi - mean
        mean += change / (k + 1)
        squares.addcmul_(change, chi - mean)
    variance = squares / (realisations - 1)
    trusted = mask & (variance > 0)
    if guide is None:
        pooled = pool(variance, trusted)
    else:
        scale = torch.where(trusted, guide, 0).square()
        trusted = trusted & (scale > 0)
        ratio = variance / torch.where(trusted, scale, torch.inf)
        pooled = torch.where(trusted, scale * pool(ratio, trusted), variance)
    return Deviation(pooled.clamp_(min=0).sqrt_(), realisations, exact=False)


def filter_deviation(
    invert: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    mask: Tensor,
    *,
    region: Tensor | None = None,
) -> Tensor:
    r"""Exact deviation of a method that is one filter h of the masked field (TKD, L2, ...).

    .. math:: \mathrm{Var}\, \chi = |h|^2 * (M \sigma)^2

    for noise that is independent between voxels. Relative to the mean over ``region``, with
    :math:`g = h * 1_R / |R|`,

    .. math:: \mathrm{Var}\, \chi = |h|^2 * (M \sigma)^2 - 2 h * (g (M \sigma)^2)
        + \textstyle\sum g^2 (M \sigma)^2.

    h is read from the method's own response to single voxels at corners of the mask's box, for
    every distance inside it; a noisy field then tells whether the method is that filter.

    Parameters
    ----------
    invert : callable
        From a field and a mask, both (X, Y, Z), to susceptibility (X, Y, Z).
    noise : (X, Y, Z) real tensor
        Standard deviation of the field (ppm).
    mask : (X, Y, Z) bool tensor
        Where the field is known.
    region : (X, Y, Z) bool tensor, optional
        Part of ``mask`` whose mean is subtracted; nothing is by default.

    Returns
    -------
    (X, Y, Z) tensor
        Standard deviation of susceptibility (ppm); 0 outside ``mask``.

    Raises
    ------
    NotAFilterError
        If ``invert`` is not linear, or not the same filter everywhere.
    ValueError
        As for :func:`deviation`.
    """
    spread = _check_noise(noise, mask)
    box = bounding_box(mask)
    inside = mask[box]
    shape = padded_shape([2 * n - 1 for n in inside.shape], (1.0, 1.0, 1.0), margin=0.0)
    response = _response(invert, noise, mask, shape)
    transfer = rfft(response, shape)

    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(inside.shape, generator=generator).to(noise) * inside
    expected = convolve(probe, transfer, shape)
    actual = invert(in_place(probe, box, mask), mask)[box]
    if not (actual - expected)[inside].norm() <= STATIONARY * actual.norm():
        msg = "the method is not one filter: estimate its deviation from realisations"
        raise NotAFilterError(msg)

    squared = torch.zeros_like(probe)
    squared[inside] = spread.square()
    variance = convolve(squared, rfft(response.square_(), shape), shape)
    if region is not None:
        chosen = region[box].to(probe)
        share = convolve(chosen / chosen.sum(), transfer, shape)
        variance -= 2 * convolve(share * squared, transfer, shape)
        variance += (share.square() * squared).sum()
    return in_place(torch.where(inside, variance, 0).clamp_(min=0).sqrt_(), box, mask)


def _response(
    invert: Callable[[Tensor, Tensor], Tensor], like: Tensor, mask: Tensor, shape: Shape
) -> Tensor:
    """Response of a filter at every distance inside the mask's box, periodic on ``shape``.

    The dipole and all penalties are even in space: half of the box's corners are enough.
    """
    box = bounding_box(mask)
    full = torch.zeros_like(mask)
    full[box] = True
    response = like.new_zeros(shape)
    for corner in itertools.product((0, -1), (0, -1), (0,)):
        single = torch.zeros_like(like[box])
        single[corner] = 1.0
        found = invert(in_place(single, box, mask), full)[box]
        for sign in (1, -1):
            x, y, z = (
                sign * (torch.arange(n, device=like.device) - start % n) % wide
                for n, start, wide in zip(found.shape, corner, shape, strict=True)
            )
            response[x[:, None, None], y[:, None], z] = found
    return response


def pool(variance: Tensor, mask: Tensor) -> Tensor:
    """Average (X, Y, Z) inside ``mask`` over a Gaussian of :data:`POOLING` voxels; 0 outside."""
    total = _blur(torch.where(mask, variance, 0))
    return torch.where(mask, total / _blur(mask.to(variance)), 0)


def _blur(image: Tensor) -> Tensor:
    """Gaussian in image space: in k-space so narrow a one rings, and variances are not below 0."""
    steps = torch.arange(-TAPS, TAPS + 1)
    weights = torch.exp(-0.5 * (steps / POOLING) ** 2)
    for axis in range(3):
        after = torch.zeros_like(image)
        length = image.shape[axis]
        for step, weight in zip(steps.tolist(), weights.tolist(), strict=True):
            count = length - abs(step)
            if count > 0:
                after.narrow(axis, max(step, 0), count).add_(
                    image.narrow(axis, max(-step, 0), count), alpha=weight
                )
        image = after
    return image


def _check_noise(noise: Tensor, mask: Tensor) -> Tensor:
    """Noise in the voxels of the mask."""
    if noise.shape != mask.shape:
        msg = (
            f"noise {tuple(noise.shape)} and mask {tuple(mask.shape)} are on different grids: "
            "give the noise map of the same field"
        )
        raise ValueError(msg)
    spread = noise[mask]
    wrong = ~(spread.isfinite() & (spread >= 0))
    if wrong.any():
        msg = (
            f"noise is negative or not finite in {int(wrong.sum())} of the mask's "
            f"{spread.numel()} voxels: take them out of the mask, or give their noise (ppm)"
        )
        raise ValueError(msg)
    if not spread.any():
        msg = (
            f"noise is 0 in all of the mask's {spread.numel()} voxels: give the standard "
            "deviation of the field (ppm)"
        )
        raise ValueError(msg)
    return spread
