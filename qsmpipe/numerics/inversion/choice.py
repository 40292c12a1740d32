"""The weight of a regularisation, chosen from the data."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qsmpipe.numerics.inversion.common import Curve
from qsmpipe.numerics.noise import noise_level

Rule: TypeAlias = Literal["l-curve", "discrepancy"]

BEND = 0.05
"""Least curvature of a corner: a round one between two straight arms at right angles, of which
each goes over into the other within a factor of e, has 0.35."""

FINE = 1001
"""Weights between the first and the last candidate at which the smoothed curves are read."""


class Trial(NamedTuple):
    """What a weight leads to."""

    residual: float
    """Norm of the weighted residual."""
    penalty: float
    """Norm that the weight stands before, without the weight."""


def choose(
    solve: Callable[[float], Trial],
    candidates: Sequence[float],
    rule: Rule,
    *,
    expected: float | None = None,
    fallback: float,
) -> Curve:
    r"""Choose the weight of a regularisation by one of two rules.

    "l-curve" [1]_: where the logarithm of the penalty over that of the residual, both smoothed by
    a spline along the logarithm of the weight, bends most (:func:`corner`).

    "discrepancy" [2]_: where the residual has the norm that noise alone would have
    (:func:`crossing`). It gives the smooth side of the best map: a good map's residual is smaller
    than the noise, of which it explains a part.

    Parameters
    ----------
    solve : callable
        Solve for one weight. Called with the candidates from the largest to the smallest, so that
        a solution may start from the one before, and at last with the chosen weight.
    candidates : sequence of float
        At least five weights above 0, evenly spaced in their logarithms.
    rule : {"l-curve", "discrepancy"}
        As above.
    expected : float, optional
        Norm of the residual that "discrepancy" wants (:func:`expected_residual`).
    fallback : float
        Taken where the rule finds none between the candidates.

    Returns
    -------
    Curve
        ``lambda_`` is the weight to use.

    Raises
    ------
    ValueError
        If the rule is unknown, or "discrepancy" has nothing to expect.

    References
    ----------
    .. [1] Hansen, O'Leary. SIAM J Sci Comput 14 (1993) 1487, doi:10.1137/0914086
    .. [2] Morozov. Methods for solving incorrectly posed problems (1984),
       doi:10.1007/978-1-4612-5280-1
    """
    check_rule(rule)
    if rule == "discrepancy" and expected is None:
        msg = (
            "lambda 'discrepancy' compares the residual with the noise, and there is no noise "
            "map: give one, choose 'l-curve', or give a number"
        )
        raise ValueError(msg)
    tried = {weight: solve(weight) for weight in sorted(candidates, reverse=True)}
    found = None
    if all(value > 0 and math.isfinite(value) for trial in tried.values() for value in trial):
        logs = np.log([[weight, *trial] for weight, trial in sorted(tried.items())]).T
        found = corner(*logs) if rule == "l-curve" else crossing(logs[0], logs[1], expected or 0.0)
    chosen = fallback if found is None else math.exp(found)
    if chosen not in tried:
        tried[chosen] = solve(chosen)
    weights = sorted(tried)
    return Curve(
        tuple(weights),
        tuple(tried[weight].residual for weight in weights),
        tuple(tried[weight].penalty for weight in weights),
        weights.index(chosen),
        rule,
        found is not None,
    )


def check_rule(rule: str) -> None:
    """Insist on a rule that exists.

    Raises
    ------
    ValueError
        Naming the rules.
    """
    if rule not in get_args(Rule):
        msg = f"lambda is {rule!r}: give a number or one of {', '.join(get_args(Rule))}"
        raise ValueError(msg)


def curvature(weights: NDArray, residuals: NDArray, penalties: NDArray) -> tuple[NDArray, NDArray]:
    r"""Bend of an L-curve, from logarithms of weights, residuals and penalties.

    With x and y the smoothed logarithms of residual and penalty as functions of that of the
    weight, :math:`(x' y'' - x'' y') / (x'^2 + y'^2)^{3/2}`: above 0 where the curve turns as an L
    does.

    Returns
    -------
    weights, curvature : (FINE,) arrays
        Logarithm of the weight, and the curvature there.
    """
    from scipy.interpolate import make_smoothing_spline  # half a second that few runs need

    fine = np.linspace(weights[0], weights[-1], FINE)
    # The smoothness is chosen by generalised cross-validation.
    splines = [make_smoothing_spline(weights, values) for values in (residuals, penalties)]
    (x1, x2), (y1, y2) = (
        (spline.derivative(1)(fine), spline.derivative(2)(fine)) for spline in splines
    )
    return fine, (x1 * y2 - x2 * y1) / (x1**2 + y1**2) ** 1.5


def corner(weights: NDArray, residuals: NDArray, penalties: NDArray) -> float | None:
    """Logarithm of the weight at the sharpest corner, all given as logarithms, ascending.

    A corner is a peak of the curvature above :data:`BEND`, not in the first or the last interval,
    where the spline is bent by its end. None where there is no such peak: without a corner, as
    where noise is most of the field, the curve tells nothing.
    """
    fine, bend = curvature(weights, residuals, penalties)
    inner = (fine >= weights[1]) & (fine <= weights[-2])
    peaks = [
        i
        for i in range(1, FINE - 1)
        if inner[i - 1]
        and inner[i + 1]
        and bend[i] > max(BEND, bend[i - 1])
        and bend[i] >= bend[i + 1]
    ]
    return float(fine[max(peaks, key=lambda i: bend[i])]) if peaks else None


def crossing(weights: NDArray, residuals: NDArray, wanted: float) -> float | None:
    """Logarithm of the largest weight whose residual is ``wanted``.

    Of logarithms of weights, ascending, and of residuals, between which the residual is taken for
    a power of the weight. None where all residuals are above ``wanted``, or the last is below.
    """
    below = np.flatnonzero(np.exp(residuals) <= wanted)
    if not below.size or below[-1] == len(weights) - 1:
        return None
    i = below[-1]
    share = (math.log(wanted) - residuals[i]) / (residuals[i + 1] - residuals[i])
    return float(weights[i] + share * (weights[i + 1] - weights[i]))


def expected_residual(mask: Tensor, noise: Tensor | None) -> float | None:
    """Norm of noise alone, weighted as the data are: median noise times root of their number.

    None without a noise map. The weight is :func:`qsmpipe.numerics.noise.data_weight`.
    """
    if noise is None:
        return None
    usable, level = noise_level(mask, noise)
    return level.item() * math.sqrt(int(usable.sum()))


def geometric(low: float, high: float, count: int) -> tuple[float, ...]:
    """Weights from ``low`` to ``high``, evenly spaced in their logarithms.

    >>> geometric(1e-3, 10.0, 5)
    (0.001, 0.01, 0.1, 1.0, 10.0)
    """
    return tuple(float(f"{value:.12g}") for value in np.geomspace(low, high, count))
