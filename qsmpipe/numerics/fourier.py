"""Fourier transforms over the three space axes, zero-padded so that nothing wraps around."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import scipy.fft
import torch
from torch import Tensor

Shape: TypeAlias = tuple[int, int, int]
Zooms: TypeAlias = tuple[float, float, float]
"""Voxel size along each axis (mm)."""

SPACE = (-3, -2, -1)


def padded_shape(shape: Sequence[int], zooms: Zooms, margin: float) -> Shape:
    """Grid size, fast to transform, that leaves ``margin`` mm of zeros beyond ``shape``.

    >>> padded_shape((20, 20, 11), (1.0, 1.0, 2.0), margin=5.0)
    (25, 25, 15)
    """
    i, j, k = (
        scipy.fft.next_fast_len(n + math.ceil(margin / zoom), real=True)
        for n, zoom in zip(shape, zooms, strict=True)
    )
    return i, j, k


PLANES = 16
"""Planes of the first axis that are transformed along the other two at a time."""


def rfft(image: Tensor, shape: Shape) -> Tensor:
    """Half spectrum of ``image`` (..., X, Y, Z), zero-padded to ``shape``.

    By scipy on the CPU: on padded grids twice as fast as torch, as lines of zeros are left out,
    and in hardly more memory than the spectrum's. By torch on CUDA, where derivatives are wanted,
    and where nothing is padded and torch has MKL, which takes two thirds of scipy's time then.
    """
    whole = image.shape[-3:] == shape and torch.backends.mkl.is_available()
    if image.is_cuda or image.requires_grad or whole:
        return torch.fft.rfftn(image, s=shape, dim=SPACE)
    x, y, z = SPACE
    size = image.shape[x]
    spectrum = torch.empty(
        (*image.shape[:x], *shape[:2], shape[2] // 2 + 1), dtype=image.dtype.to_complex()
    )
    spectrum[..., size:, :, :] = 0
    values, known = spectrum.numpy(), image.numpy()
    with scipy.fft.set_workers(torch.get_num_threads()):
        for planes in _some_planes(size):
            part = scipy.fft.rfft(known[planes], shape[z], z)
            values[planes] = scipy.fft.fft(part, shape[y], y, overwrite_x=True)
        return torch.from_numpy(scipy.fft.fft(values, axis=x, overwrite_x=True))


def irfft(
    spectrum: Tensor, shape: Shape, crop: Sequence[int], *, overwrite: bool = False
) -> Tensor:
    """Invert :func:`rfft` and keep the corner of size ``crop``.

    With ``overwrite`` the spectrum may be used as memory on the way.
    """
    i, j, k = crop
    if spectrum.is_cuda or spectrum.requires_grad:
        return torch.fft.irfftn(spectrum, s=shape, dim=SPACE)[..., :i, :j, :k]
    x, y, z = SPACE
    image = torch.empty((*spectrum.shape[:x], i, j, k), dtype=spectrum.real.dtype)
    values = image.numpy()
    with scipy.fft.set_workers(torch.get_num_threads()):
        half = scipy.fft.ifft(spectrum.numpy(), axis=x, overwrite_x=overwrite)
        for planes in _some_planes(i):
            part = scipy.fft.ifft(half[planes], axis=y, overwrite_x=True)
            values[planes] = scipy.fft.irfft(part[..., :j, :], shape[z], z)[..., :k]
    return image


def _some_planes(size: int) -> Iterator[tuple[Any, ...]]:
    """Cut the first axis of space into pieces."""
    for start in range(0, size, PLANES):
        yield ..., slice(start, min(start + PLANES, size)), slice(None), slice(None)


def convolve(image: Tensor, transfer: Tensor, shape: Shape) -> Tensor:
    """Filter ``image`` (..., X, Y, Z) by ``transfer``, a half spectrum of grid ``shape``."""
    spectrum = rfft(image, shape) * transfer
    return irfft(spectrum, shape, image.shape[-3:], overwrite=True)


def copies(shape: Shape, *, like: Tensor) -> Tensor:
    """How many frequencies of the whole spectrum each of the half spectrum stands for, (Z,).

    Sums over the half spectrum with these weights are sums over the whole one.
    """
    depth = shape[2]
    count = like.new_full((depth // 2 + 1,), 2.0)
    count[0] = 1.0
    if depth % 2 == 0:
        count[-1] = 1.0
    return count
