"""Dipole inversion with the edges of the magnitude: MEDI."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from qsmpipe.numerics.fourier import Shape, Zooms, convolve
from qsmpipe.numerics.fused.variation import counted_bits
from qsmpipe.numerics.inversion.common import (
    Susceptibility,
    Window,
    auto_lambda,
    phase_scale,
)
from qsmpipe.numerics.inversion.descent import Problem, minimise
from qsmpipe.numerics.inversion.edges import DEFAULT_EDGES, Edges, smooth_parts
from qsmpipe.numerics.kernels import AXIAL, ball_mean, dipole
from qsmpipe.numerics.masks.morphology import erode
from qsmpipe.numerics.masks.ventricles import ventricles
from qsmpipe.numerics.noise import LARGEST_WEIGHT, data_weight
from qsmpipe.numerics.parameters import Count, NotNegative, Positive, checked

PADDING = 0.25
"""Zeros beyond the mask's box and :data:`REACH`, as a fraction of both."""
REACH = 8.0
"""By how much (mm) the box is wider than the mask."""

LAMBDA_PER_NOISE = 0.15
"""Weight of the total variation over the noise of the field (mm). On phantoms with noise of 0.001
to 0.005 ppm and on a simulated head at 2 mm, with edges and without, 0.15 to 0.2 was the best of
four weights from 0.02 to 0.2."""
EPSILON = 1e-3
"""Gradients below this are rounded off (rad/mm)."""
FIRST_EPSILON = 0.1
"""The same in the first step (rad/mm)."""
LINEAR_STEPS = 1
"""Steps that take the data term for linear."""
OUTLIER = 6.0
"""In standard deviations of the residual: voxels beyond are weighted down."""

DEFAULT_RADIUS = 0.0
"""Radius of the ball whose mean is taken off field and kernel (mm); 0: none."""
DEFAULT_CSF_WEIGHT = 0.0
"""Weight of the variance of the ventricles' susceptibility (1/(rad mm)); 0: none."""
DEFAULT_TOLERANCE = 1e-2
DEFAULT_MAX_ITERATIONS = 300


@checked
def medi(
    field: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    b0_direction: Sequence[float] = AXIAL,
    noise: Tensor | None = None,
    magnitude: Tensor | None = None,
    r2star: Tensor | None = None,
    echo_times: Sequence[float] | None = None,
    field_strength: float | None = None,
    lambda_: Positive | Literal["auto"] = "auto",
    edges: Edges = DEFAULT_EDGES,
    radius: NotNegative = DEFAULT_RADIUS,
    merit: bool = False,
    csf_weight: NotNegative = DEFAULT_CSF_WEIGHT,
    tolerance: NotNegative = DEFAULT_TOLERANCE,
    max_iterations: Count = DEFAULT_MAX_ITERATIONS,
) -> Susceptibility:
    r"""Invert the dipole with the total variation off the magnitude's edges [1]_ [2]_.

    .. math:: \min_\chi \lambda \| W (e^{i D \chi} - e^{i f}) \|^2 + \| m_G \nabla \chi \|_1 +
       \lambda_{csf} \| m_{csf} (\chi - \bar\chi_{csf}) \|^2

    in radians, by conjugate gradients (:func:`.descent.minimise`). The norm sums over the three
    components, each of them rounded off below :data:`EPSILON`; it falls to that from
    :data:`FIRST_EPSILON`. In the first step the data term is the linear one, :math:`\lambda \| W
    (D \chi - f) \|^2`: from 0, phase beyond pi would pull the wrong way. More linear steps would
    explain wraps that are left. The map is free on the whole padded grid, and masked at the end.

    Parameters
    ----------
    field : (X, Y, Z) real tensor
        Field of the sources inside ``mask`` (ppm).
    mask : (X, Y, Z) bool tensor
        Where ``field`` is known.
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
    r2star : (X, Y, Z) real tensor, optional
        R2* (1/s), which shows the ventricles; ``csf_weight`` needs it.
    echo_times, field_strength : sequence of float, float, optional
        s and T: the field in ppm times :func:`.common.phase_scale` is f.
    lambda_ : float or "auto"
        Weight of the data, :math:`\lambda` (1/(rad mm)), or "auto", which follows the noise; the
        total variation has 1. "auto" is the weight that stands for :data:`LAMBDA_PER_NOISE` times
        the median of ``noise``, or :data:`.noise.ASSUMED_NOISE` without, before the total
        variation in ppm mm: :math:`1 / (2 s \lambda_{TV})` with s the phase of 1 ppm.
    edges : float
        Share of the gradient's components that cost nothing, being edges of ``magnitude``.
    radius : float
        Radius of a ball (mm) whose mean is taken off field and kernel; 0: none. That is a last
        removal of background [1]_. Where it does not fit into ``mask`` the field is not used.
    merit : bool
        Weight down after each round the voxels whose residual is beyond :data:`OUTLIER` standard
        deviations, by its square [2]_.
    csf_weight : float
        Weight of the variance in the ventricles, :math:`\lambda_{csf}` (1/(rad mm)), which needs
        ``r2star``; 0: none. It keeps their susceptibility even [3]_.
    tolerance : float
        Stop when :data:`.descent.ROUND` steps change the map by less than this fraction of its
        norm inside the mask.
    max_iterations : int
        Steps at most.

    Returns
    -------
    Susceptibility
        ``change`` is the relative change of the map.

    Raises
    ------
    ValueError
        If ``csf_weight`` is given without ``r2star``, the ball fits nowhere into the mask, grids
        differ or a parameter is out of range.

    References
    ----------
    .. [1] Liu J et al. NeuroImage 59 (2012) 2560, doi:10.1016/j.neuroimage.2011.08.082
    .. [2] Liu T et al. Magn Reson Med 69 (2013) 467, doi:10.1002/mrm.24272
    .. [3] Liu Z et al. Magn Reson Med 79 (2018) 2795, doi:10.1002/mrm.26946
    """
    scale, chosen = phase_scale(field_strength, echo_times), {}
    if lambda_ == "auto":
        lambda_ = 1 / (2 * scale * auto_lambda(LAMBDA_PER_NOISE, mask, noise))
        chosen["lambda_"] = lambda_
    window = Window.around(field, mask, zooms, padding=PADDING, reach=REACH)
    shape = window.shape
    weight = window.place(data_weight(mask, noise, field, largest=LARGEST_WEIGHT))
    phase = window.field * scale
    kernel = dipole(shape, zooms, b0_direction, like=field)
    if radius > 0:
        ball = _ball(shape, zooms, radius, like=field)
        trusted = erode(window.mask, zooms, radius=radius)
        if not trusted.any():
            msg = f"radius is {radius:g} mm: no such ball fits into the mask; give a smaller one"
            raise ValueError(msg)
        phase = (phase - convolve(phase, ball, shape)) * trusted
        weight = weight * trusted
        kernel = kernel * (1 - ball)
    smooth = torch.ones((3, *shape), dtype=torch.bool, device=field.device)
    if magnitude is not None:
        x, y, z = window.mask.shape
        parts = smooth_parts(magnitude, mask, zooms, edges=edges)
        smooth[:, :x, :y, :z] = window.place(parts, fill=True)
    quadratic = None
    if csf_weight > 0:
        if r2star is None:
            msg = (
                f"csf_weight is {csf_weight:g}, but there is no R2* to find the ventricles in: "
                "give r2star (several echoes), or set csf_weight to 0"
            )
            raise ValueError(msg)
        fluid = ventricles(r2star, mask, zooms, magnitude=magnitude)
        # Half the gradient, as the data term's: the whole objective is divided by 2 lambda.
        quadratic = _evenness(window, fluid, csf_weight / lambda_)

    squared = weight**2

    def slope(predicted: Tensor, steps: int) -> Tensor:
        misfit = predicted - phase
        return (misfit if steps < LINEAR_STEPS else misfit.sin_()).mul_(squared)

    problem = Problem(
        shape=shape,
        zooms=zooms,
        kernel=kernel,
        weight=squared,
        slope=slope,
        counted=counted_bits(smooth),
        observed=window.mask,
        lambda_=0.5 / lambda_,
        epsilon=EPSILON,
        quadratic=quadratic,
    )

    def distrust(predicted: Tensor) -> None:
        misfit = ((predicted - phase) / 2).sin_().abs_().mul_(weight)
        excess = misfit / (OUTLIER * misfit[window.mask].std()).clamp(min=1e-30)
        weight.div_(excess.clamp_(min=1.0).square_())
        torch.square(weight, out=squared)

    image, convergence = minimise(
        problem,
        rounding=FIRST_EPSILON,
        after_round=distrust if merit else lambda predicted: None,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    return Susceptibility(window.back(image / scale), convergence, chosen)


def _ball(shape: Shape, zooms: Zooms, radius: float, *, like: Tensor) -> Tensor:
    """Transfer function of the mean over a ball; balanced where it can be."""
    return ball_mean(shape, zooms, radius, balanced=radius >= max(zooms), like=like)


def _evenness(window: Window, fluid: Tensor, weight: float) -> Callable[[Tensor], Tensor]:
    """Gradient of half ``weight`` times the variance, summed over the voxels of ``fluid``."""
    x, y, z = window.mask.shape
    where = torch.zeros(window.shape, dtype=torch.bool, device=fluid.device)
    where[:x, :y, :z] = window.place(fluid)

    def apply(image: Tensor) -> Tensor:
        values = image[where]
        result = torch.zeros_like(image)
        result[where] = weight * (values - values.mean())
        return result

    return apply
