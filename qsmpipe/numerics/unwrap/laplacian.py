"""Laplacian phase unwrapping: smooth, and not exact to multiples of 2 pi."""

import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import scipy.fft
import torch
from scipy.ndimage import label
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms, convolve, padded_shape
from qsmpipe.numerics.kernels import laplacian as eigenvalues
from qsmpipe.numerics.solvers import conjugate_gradient
from qsmpipe.numerics.unwrap.common import TWO_PI, check

TOLERANCE = 1e-4
MAX_ITERATIONS = 100
"""Where the system of equations is solved; a mask without thin bridges takes about 10 steps."""


def laplacian(
    phase: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    echo_times: Sequence[float] | None = None,
    boundary: Literal["mask", "neumann", "periodic"] = "mask",
) -> Tensor:
    r"""Unwrap phase by its Laplacian [1]_, which wraps do not touch.

    The Laplacian is the divergence of the wrapped differences :math:`d` between neighbours; what
    has it is the unwrapped phase. Differences that leave ``mask`` do not count, so that noise
    outside stays there and no phase is assumed at the edge:
    :math:`\nabla^T M \nabla \phi = \nabla^T M d`, weighted least squares [2]_. The Fourier
    inverse of the Laplacian on the whole grid (zero-padded) preconditions conjugate gradients.
    Background fields are kept.

    The other boundaries solve :math:`\nabla^T \nabla \phi = \nabla^T M d` at once, by a transform,
    on the box around ``mask``: no gradient at its faces (``"neumann"``, cosine transform [2]_), or
    its far sides joined with one voxel of padding between them (``"periodic"``, Fourier transform
    [1]_). Both are faster. Inside the mask the Laplacian is still that of the true phase, so that
    what they lose is harmonic: a good part of the background field. ``"mask"`` and ``"neumann"``
    agree where the mask fills its box.

    Where the true phase changes by more than pi from voxel to voxel, the result errs around that
    place, by less than 2 pi a voxel; phase over echo time is then no field. The constant that the
    Laplacian does not know comes from the wrapped phase: the circular mean of the difference
    within each connected region of ``mask``.

    Parameters
    ----------
    phase : (X, Y, Z) or (E, X, Y, Z) real tensor
        Wrapped phase (rad).
    mask : (X, Y, Z) bool tensor
        Where to unwrap; all must be finite there.
    zooms : tuple of float
        Voxel size (mm).
    echo_times : sequence of float, optional
        In s. The first echo is shifted by a multiple of 2 pi so that its median is within pi of
        0; each later one so that it fits the echo before. Without echo times each echo is
        shifted like the first.
    boundary : str
        Where the equations end: at the edge of the ``"mask"``, or of its box, ``"neumann"`` or
        ``"periodic"``.

    Returns
    -------
    tensor like ``phase``
        Unwrapped phase (rad); 0 outside ``mask``.

    Raises
    ------
    ValueError
        If grids or echoes differ, there is no such boundary, or the phase is not finite inside
        the mask.

    Warns
    -----
    RuntimeWarning
        If the system of equations was not solved to its tolerance.

    References
    ----------
    .. [1] Schofield & Zhu. Opt Lett 28 (2003) 1194, doi:10.1364/OL.28.001194
    .. [2] Ghiglia & Romero. J Opt Soc Am A 11 (1994) 107, doi:10.1364/JOSAA.11.000107
    """
    check(phase, mask, echo_times=echo_times)
    if boundary not in ("mask", "neumann", "periodic"):
        msg = f"boundary {boundary!r} is none of mask, neumann, periodic"
        raise ValueError(msg)
    wrapped = phase.reshape(-1, *mask.shape)
    inside = mask
    unwrapped = torch.zeros_like(wrapped)
    if not inside.any():
        return unwrapped.reshape(phase.shape)
    box = tuple(
        slice(int(found.min()), int(found.max()) + 1) for found in inside.nonzero(as_tuple=True)
    )
    known = inside[box]
    regions, _ = label(known.cpu().numpy())
    system = _LeastSquares(known, zooms, boundary, like=wrapped)
    for echo, image in enumerate(wrapped):
        values = torch.where(known, image[box], 0.0)
        smooth = system.solve(values)
        smooth += _constants(values - smooth, regions)
        expected = torch.zeros_like(smooth)
        if echo > 0 and echo_times is not None:
            ratio = echo_times[echo] / echo_times[echo - 1]
            expected = unwrapped[echo - 1][box] * ratio
        turns = ((expected - smooth)[known].median() / TWO_PI).round()
        unwrapped[echo][box] = torch.where(known, smooth + TWO_PI * turns, 0.0)
    return unwrapped.reshape(phase.shape)


class _LeastSquares:
    """Find the image whose differences within ``mask`` are nearest to the wrapped ones."""

    def __init__(self, mask: Tensor, zooms: Zooms, boundary: str, *, like: Tensor) -> None:
        self.zooms, self.boundary = zooms, boundary
        self.weights = []
        for axis, zoom in enumerate(zooms):
            edges = mask.shape[axis] - 1
            both = mask.narrow(axis, 0, edges) & mask.narrow(axis, 1, edges)
            self.weights.append(both.to(like.dtype) / zoom**2)
        self.padded = padded_shape(mask.shape, zooms, margin=max(zooms))
        transfer = eigenvalues(self.padded, zooms, like=like)
        transfer[0, 0, 0] = torch.inf
        self.inverse = 1 / transfer

    def _adjoint(self, differences: list[Tensor]) -> Tensor:
        x, y, z = (
            torch.nn.functional.pad(d, (0, 0) * (2 - axis) + (1, 1)).diff(dim=axis).neg_()
            for axis, d in enumerate(differences)
        )
        return x + y + z

    def _apply(self, image: Tensor) -> Tensor:
        return self._adjoint([
            image.diff(dim=axis) * weight for axis, weight in enumerate(self.weights)
        ])  # fmt: skip

    def _solve_periodic(self, right: Tensor) -> Tensor:
        return convolve(right, self.inverse, self.padded)

    def solve(self, wrapped: Tensor) -> Tensor:
        """Least-squares image of one echo (X, Y, Z)."""
        differences = [
            _wrap(wrapped.diff(dim=axis)) * weight for axis, weight in enumerate(self.weights)
        ]
        right = self._adjoint(differences)
        if self.boundary == "neumann":
            return _solve_neumann(right, self.zooms)
        if self.boundary == "periodic":
            return self._solve_periodic(right)
        image, convergence = conjugate_gradient(
            self._apply,
            right,
            precondition=self._solve_periodic,
            tolerance=TOLERANCE,
            max_iterations=MAX_ITERATIONS,
        )
        if not convergence.converged:
            msg = (
                f"Laplacian unwrapping stopped after {convergence.iterations} iterations at a "
                f"relative residual of {convergence.change:.2g}, above its tolerance "
                f"{convergence.tolerance:.2g}: the mask may hang together by thin bridges"
            )
            warnings.warn(msg, RuntimeWarning, stacklevel=3)
        return image


def _solve_neumann(right: Tensor, zooms: Zooms) -> Tensor:
    """Image whose negative Laplacian, without gradient at the faces, is ``right`` (X, Y, Z)."""
    spectrum = scipy.fft.dctn(right.cpu().numpy())
    divisor = np.zeros_like(spectrum)
    for axis, (n, zoom) in enumerate(zip(right.shape, zooms, strict=True)):
        values = (2 - 2 * np.cos(np.pi * np.arange(n) / n)) / zoom**2
        divisor += values.reshape([-1 if a == axis else 1 for a in range(3)])
    divisor[0, 0, 0] = np.inf
    return torch.from_numpy(scipy.fft.idctn(spectrum / divisor)).to(right)


def _wrap(angle: Tensor) -> Tensor:
    return angle - TWO_PI * (angle / TWO_PI).round()


def _constants(difference: Tensor, regions: np.ndarray) -> Tensor:
    """Circular mean (rad) of ``difference`` over each region, within pi of the mean over all.

    Summed on the CPU in double precision and a fixed order; region 0 is outside.
    """
    angle = difference.double().cpu().numpy().ravel()
    number = regions.ravel()
    sums = np.bincount(number, np.cos(angle)) + 1j * np.bincount(number, np.sin(angle))
    sums[0] = 0
    total = np.angle(sums.sum())
    means = total + np.angle(sums * np.exp(-1j * total))
    return torch.from_numpy(means[regions]).to(difference)
