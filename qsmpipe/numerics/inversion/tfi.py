"""From the total field to susceptibility in one step: total field inversion."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from qsmpipe.numerics.background.pdf import Projection, projection
from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.fused.variation import counted_bits
from qsmpipe.numerics.grids import crop, in_place
from qsmpipe.numerics.harmonics import FarField
from qsmpipe.numerics.inversion.common import Susceptibility, follow_noise
from qsmpipe.numerics.inversion.descent import Problem, minimise
from qsmpipe.numerics.inversion.edges import DEFAULT_EDGES, Edges, smooth_parts
from qsmpipe.numerics.inversion.medi import LAMBDA_PER_NOISE
from qsmpipe.numerics.kernels import AXIAL
from qsmpipe.numerics.noise import LARGEST_WEIGHT, data_weight
from qsmpipe.numerics.parameters import Count, NotNegative, Positive, checked
from qsmpipe.numerics.solvers import conjugate_gradient

EPSILON = 3.0
"""Gradients below this, times lambda, are rounded off (1/mm2): half the noise per mm with the
weight that follows the noise. A third of it gave the same map of a simulated head at 2 mm."""
FIRST_EPSILON = 10.0
"""The same in the first step."""

ORDER = 6
"""Highest order of the solid harmonics, which are free: sources far away."""

FIRST_TOLERANCE, FIRST_ITERATIONS = 1e-2, 50
"""Where the projection onto sources outside stops that the descent starts from."""
MEAN_SQUARED_DIPOLE = 4 / 45
"""Energy of the field of one voxel, of susceptibility 1, in all space."""

DEFAULT_MARGIN = 24.0
"""Width of the space around the mask's box that may hold sources (mm). Sources farther away act
through harmonics of second order. On a simulated head 40 mm gave the same map."""
DEFAULT_PRECONDITIONER = 2.0
"""Scale of sources outside the mask against those inside."""
DEFAULT_TOLERANCE = 3e-2
DEFAULT_MAX_ITERATIONS = 300


@checked
def tfi(
    field: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    b0_direction: Sequence[float] = AXIAL,
    noise: Tensor | None = None,
    magnitude: Tensor | None = None,
    lambda_: Positive | Literal["auto"] = "auto",
    edges: Edges = DEFAULT_EDGES,
    margin: NotNegative = DEFAULT_MARGIN,
    preconditioner: Positive = DEFAULT_PRECONDITIONER,
    tolerance: NotNegative = DEFAULT_TOLERANCE,
    max_iterations: Count = DEFAULT_MAX_ITERATIONS,
) -> Susceptibility:
    r"""Invert the total field: tissue and background at once [1]_.

    .. math:: \min_\chi \tfrac12 \| W (D \chi - f) \|^2 + \lambda \| m_G \nabla \chi \|_1

    over maps of the whole padded grid, by conjugate gradients (:func:`.descent.minimise`).
    Where the background is removed first, what sources at the mask's edge and sources outside
    explain alike goes to those outside, and is lost; here the smoother map decides. The norm
    counts differences within ``mask`` alone: what lies outside is free, as in PDF, and its jump
    at the mask's edge costs nothing.

    Offset, shims and sources far away are solid harmonics up to the order :data:`ORDER`, which
    are free and fitted out of all residuals. The descent starts from sources outside the mask
    alone (PDF, to a tolerance of :data:`FIRST_TOLERANCE`); from there tissue and sources outside
    move together. From 0, the tissue would take up the background first, and part with it slowly.

    Parameters
    ----------
    field : (X, Y, Z) real tensor
        Total field (ppm).
    mask : (X, Y, Z) bool tensor
        Where ``field`` is known, and the tissue.
    zooms : tuple of float
        Voxel size (mm).
    b0_direction : sequence of 3 floats
        Unit vector along B0 in voxel axes.
    noise : (X, Y, Z) real tensor, optional
        Standard deviation of ``field``, in ppm: W is its median inside ``mask`` over itself, at
        most :data:`.noise.LARGEST_WEIGHT`, 0 where it is 0 or not finite. W = 1 without it.
    magnitude : (X, Y, Z) real tensor, optional
        Magnitude, any unit: where its edges are, :math:`m_G` is 0
        (:func:`.edges.smooth_parts`). Without it :math:`m_G` is 1.
    lambda_ : float or "auto"
        Weight of the total variation, :math:`\lambda` (ppm mm), or "auto", which follows the
        noise; the data have 1. "auto" is :data:`.medi.LAMBDA_PER_NOISE` times the median of
        ``noise``, or :data:`.noise.ASSUMED_NOISE` without a noise map.
    edges : float
        Share of the gradient's components that cost nothing, being edges of ``magnitude``.
    margin : float
        Width of the space around the mask's box that may hold sources (mm).
    preconditioner : float
        Scale of the sources outside the mask against tissue, without unit: speed, and hardly the
        map. It is P of [1]_, for those that touch the mask, and grows with the distance.
    tolerance : float
        Stop when :data:`.descent.ROUND` steps change the map by less than this fraction of its
        norm inside the mask.
    max_iterations : int
        Steps at most.

    Returns
    -------
    Susceptibility
        ``change`` is the relative change of the map.

    Notes
    -----
    In [1]_ the norm counts the whole grid. Taken to its end, that makes the strong sources
    outside smaller than they are, and the map inside takes up what they lack: on a phantom with
    a background of 1.7 ppm the error grew from 0.8 to 2.2 while the objective fell. It has to be
    stopped early, as the paper does.

    Sources outside are free here, and taken far beyond ``tolerance`` they fit noise, too. On a
    simulated head at 2 mm ten times the steps lowered the objective by 8 % and doubled the
    error of the outermost voxels (while these had edges); elsewhere the map hardly changed.

    References
    ----------
    .. [1] Liu Z et al. Magn Reson Med 78 (2017) 303, doi:10.1002/mrm.26331
    """
    lambda_, chosen = follow_noise(lambda_, LAMBDA_PER_NOISE, mask, noise)
    if field.ndim != 3:
        msg = f"field {tuple(field.shape)} is not (X, Y, Z): give one field at a time"
        raise ValueError(msg)
    known, inside, box = crop(field, mask)
    weight = data_weight(mask, noise, field, largest=LARGEST_WEIGHT)[box].contiguous()
    squared = weight**2
    far = FarField.on_grid(squared, zooms, order=ORDER)
    known = far.remove(known)
    # In single precision the scales of far sources would be made of rounding.
    exact = projection(inside, weight.double(), zooms, b0_direction, margin=margin)
    project = Projection(exact.shape, exact.transfer.to(field), exact.sources.to(field), weight)
    del exact
    shape = project.shape
    unknowns, _ = conjugate_gradient(
        lambda direction: project.adjoint(far.remove(project.field(direction)).mul_(weight)),
        project.adjoint(known * weight),
        tolerance=FIRST_TOLERANCE,
        max_iterations=FIRST_ITERATIONS,
    )
    start = unknowns.mul_(project.sources)

    smooth = torch.zeros((3, *shape), dtype=torch.bool, device=field.device)
    x, y, z = inside.shape
    for axis, where in zip((-3, -2, -1), smooth, strict=True):
        n = inside.shape[axis] - 1
        both = inside.narrow(axis, 0, n) & inside.narrow(axis, 1, n)
        where[:x, :y, :z].narrow(axis, 0, n).copy_(both)
    if magnitude is not None:
        smooth[:, :x, :y, :z] &= smooth_parts(magnitude, mask, zooms, edges=edges)[(..., *box)]
    energy = MEAN_SQUARED_DIPOLE * squared[inside].mean(dtype=torch.float64).item()
    outside = project.sources * (preconditioner**2 / energy)
    problem = Problem(
        shape=shape,
        zooms=zooms,
        kernel=project.transfer,
        weight=squared,
        slope=lambda predicted, _: (predicted - known).mul_(squared),
        counted=counted_bits(smooth),
        observed=inside,
        lambda_=lambda_,
        epsilon=EPSILON * lambda_,
        remove=far.remove,
        outside=outside,
    )
    image, convergence = minimise(
        problem,
        start=start,
        rounding=FIRST_EPSILON * lambda_,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    chi = torch.where(inside, image[:x, :y, :z], 0)
    return Susceptibility(in_place(chi, box, mask), convergence, chosen)
