"""The choice of a regularisation's weight: by the L-curve and by the discrepancy."""

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from phantoms import Phantom, error, phantom
from test_inversion import run, write

from qsmpipe.interfaces.inversion import L2, TV
from qsmpipe.numerics.inversion import Susceptibility, l2, tikhonov, tv
from qsmpipe.numerics.inversion.choice import (
    Trial,
    choose,
    corner,
    crossing,
    curvature,
    expected_residual,
    geometric,
)
from qsmpipe.numerics.operators import Dipole
from qsmpipe.settings import combine, parse_assignments
from qsmpipe.workflows.inversion import init_inversion_wf

NOISE = 0.002
METHODS = {"l2": l2, "tikhonov": tikhonov, "tv": tv}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


HEAD = phantom((26, 26, 26), (1.5, 1.5, 1.5), noise=NOISE)
KNOWN = torch.full_like(HEAD.field, NOISE)


@pytest.fixture
def head() -> Phantom:
    return HEAD


@pytest.fixture
def noise() -> torch.Tensor:
    return KNOWN


@cache
def ruled(method: Callable[..., Susceptibility], rule: str) -> Susceptibility:
    return HEAD.invert(method, noise=KNOWN, lambda_=rule)


# The rules, on curves that are known


def hyperbola(at: float, sharpness: float = 1.0) -> Callable[[float], Trial]:
    """Trials on an L of two straight arms with a round corner at the weight ``at``."""

    def solve(weight: float) -> Trial:
        t = sharpness * math.log(weight / at)
        return Trial(0.01 * math.exp(math.log1p(math.exp(t))), 5 * (1 + math.exp(-t)))

    return solve


@pytest.mark.parametrize("at", [2e-4, 1e-3, 7e-3])
@pytest.mark.parametrize("sharpness", [0.7, 1.5])
def test_the_corner_of_an_l_is_found(at: float, sharpness: float) -> None:
    curve = choose(hyperbola(at, sharpness), geometric(1e-5, 0.1, 9), "l-curve", fallback=1.0)
    assert curve.found
    assert curve.lambda_ == pytest.approx(at, rel=0.25)  # candidates are a factor of 3.2 apart
    assert curve.lambda_ == curve.lambdas[curve.chosen]


def test_a_little_noise_on_the_curve_moves_the_corner_little() -> None:
    random, exact = np.random.default_rng(0), hyperbola(1e-3, 1.2)
    for _ in range(5):

        def solve(weight: float) -> Trial:
            return Trial(
                *(value * (1 + 0.01 * random.standard_normal()) for value in exact(weight))
            )

        found = choose(solve, geometric(1e-5, 0.1, 9), "l-curve", fallback=1.0).lambda_
        assert 1 / 1.6 < found / 1e-3 < 1.6


def test_the_curvature_of_a_circle_is_one_over_its_radius() -> None:
    """The lower left quarter of a circle turns as an L does; mirrored it does not."""
    angle = np.linspace(0.1, np.pi / 2 - 0.1, 15)
    fine, bend = curvature(angle, -3 * np.cos(angle), -3 * np.sin(angle))
    inner = (fine > 0.3) & (fine < 1.2)
    np.testing.assert_allclose(bend[inner], 1 / 3, rtol=0.05)
    _, bend = curvature(angle, 3 * np.sin(angle), 3 * np.cos(angle))
    np.testing.assert_allclose(bend[inner], -1 / 3, rtol=0.05)


def test_a_curve_without_a_corner_tells_nothing() -> None:
    weights = np.linspace(0, 5, 9)
    assert corner(weights, weights, -weights) is None
    assert corner(weights, 3 * np.sin(weights / 4), 3 * np.cos(weights / 4)) is None
    curve = choose(lambda w: Trial(w, 1 / w), geometric(1e-3, 1, 7), "l-curve", fallback=0.02)
    assert not curve.found
    assert curve.lambda_ == 0.02


def test_the_discrepancy_is_met_where_the_residual_is_known() -> None:
    candidates = geometric(1e-4, 1, 8)
    curve = choose(
        lambda weight: Trial(weight**0.5, 1 / weight), candidates, "discrepancy", expected=0.2,
        fallback=9.0,
    )  # fmt: skip
    assert curve.found
    assert curve.lambda_ == pytest.approx(0.04)
    assert curve.residuals[curve.chosen] == pytest.approx(0.2)


@pytest.mark.parametrize("expected", [0.001, 7.0])
def test_a_discrepancy_that_no_candidate_meets_is_none(expected: float) -> None:
    logs = np.log(geometric(1e-4, 1, 8))
    assert crossing(logs, logs / 2, expected) is None
    curve = choose(
        lambda weight: Trial(weight**0.5, 1 / weight), geometric(1e-4, 1, 8), "discrepancy",
        expected=expected, fallback=9.0,
    )  # fmt: skip
    assert not curve.found
    assert curve.lambda_ == 9.0


def test_candidates_are_tried_from_the_largest_down_and_the_chosen_one_last() -> None:
    asked: list[float] = []
    exact = hyperbola(1e-3)

    def solve(weight: float) -> Trial:
        asked.append(weight)
        return exact(weight)

    candidates = geometric(1e-5, 0.1, 7)
    curve = choose(solve, candidates, "l-curve", fallback=1.0)
    assert asked == [*reversed(candidates), curve.lambda_]
    assert list(curve.lambdas) == sorted(asked)
    assert list(curve.residuals) == [exact(weight).residual for weight in curve.lambdas]
    assert list(curve.penalties) == [exact(weight).penalty for weight in curve.lambdas]


def test_expected_is_the_noise_of_the_voxels_that_have_one() -> None:
    mask = torch.zeros(5, 5, 5, dtype=torch.bool)
    mask[1:4, 1:4, 1:4] = True
    noise = torch.full((5, 5, 5), 0.5)
    noise[1, 1, 1] = 0.0
    assert expected_residual(mask, noise) == pytest.approx(0.5 * 26**0.5)
    assert expected_residual(mask, None) is None


# The methods


@every_method
@pytest.mark.parametrize("rule", ["l-curve", "discrepancy"])
def test_the_chosen_number_gives_the_same_map(
    method: Callable[..., Susceptibility], rule: str, head: Phantom, noise: torch.Tensor
) -> None:
    result = ruled(method, rule)
    curve = result.curve
    assert curve.rule == rule
    assert result.chosen == {"lambda_": curve.lambda_}
    again = head.invert(method, noise=noise, lambda_=curve.lambda_)
    assert torch.equal(result.chi, again.chi)
    assert again.curve is None


@every_method
def test_more_weight_fits_less_and_penalises_more(method: Callable[..., Susceptibility]) -> None:
    curve = ruled(method, "l-curve").curve
    assert list(curve.residuals) == sorted(curve.residuals)
    assert list(curve.penalties) == sorted(curve.penalties, reverse=True)


def test_the_discrepancy_leaves_the_noise_in_the_data(head: Phantom, noise: torch.Tensor) -> None:
    """The field of the map, by another operator, misses the data by what is known of the noise."""
    for prior in ("gradient", "laplacian"):
        result = head.invert(tikhonov, noise=noise, prior=prior, lambda_="discrepancy")
        assert result.curve.found
        predicted = Dipole.on_grid(result.chi, head.zooms, head.b0_direction)(result.chi)
        left = (predicted - head.field)[head.mask]
        assert left.square().mean().sqrt().item() == pytest.approx(NOISE, rel=0.03)


@every_method
def test_the_discrepancy_is_met_by_every_method(method: Callable[..., Susceptibility]) -> None:
    curve = ruled(method, "discrepancy").curve
    assert curve.found
    expected = NOISE * math.sqrt(int(HEAD.mask.sum()))
    assert curve.residuals[curve.chosen] == pytest.approx(expected, rel=0.08)


def test_both_rules_find_a_good_weight_for_tv(head: Phantom, noise: torch.Tensor) -> None:
    def wrong(result: Susceptibility) -> float:
        return error(result.chi, head.chi, head.mask)

    auto = wrong(head.invert(tv, noise=noise))
    assert wrong(ruled(tv, "l-curve")) < 1.2 * auto
    assert wrong(ruled(tv, "discrepancy")) < 1.2 * auto


@every_method
def test_a_rule_does_not_care_for_the_unit(
    method: Callable[..., Susceptibility], head: Phantom, noise: torch.Tensor
) -> None:
    unit = 16.0
    stop = {"max_iterations": 1} if method is tv else {}
    scaled = stop | ({"rho": 100 / unit} if method is tv else {})
    curve = head.invert(method, noise=noise, lambda_="l-curve", **stop).curve
    other = head._replace(field=unit * head.field)
    found = other.invert(method, noise=unit * noise, lambda_="l-curve", **scaled).curve
    factor = unit if method is tv else 1.0
    np.testing.assert_allclose(found.lambdas, np.array(curve.lambdas) * factor, rtol=0.02)
    np.testing.assert_allclose(found.residuals, np.array(curve.residuals) * unit, rtol=0.02)


@every_method
def test_no_field_gives_no_curve_to_choose_from(
    method: Callable[..., Susceptibility], head: Phantom
) -> None:
    empty = head._replace(field=torch.zeros_like(head.field))
    result = empty.invert(method, lambda_="l-curve")
    assert not result.chi.any()
    assert not result.curve.found


@every_method
def test_the_discrepancy_needs_noise(method: Callable[..., Susceptibility], head: Phantom) -> None:
    with pytest.raises(ValueError, match="no noise map: give one, choose 'l-curve'"):
        head.invert(method, lambda_="discrepancy")


@every_method
def test_rules_that_do_not_exist_are_refused(
    method: Callable[..., Susceptibility], head: Phantom
) -> None:
    message = r"^lambda_ is 'gcv': give a number above 0, .*'l-curve', or 'discrepancy'$"
    with pytest.raises(ValueError, match=message):
        head.invert(method, lambda_="gcv")


# Files and the command line


def test_the_curve_is_on_record(head: Phantom, noise: torch.Tensor, tmp_path: Path) -> None:
    workflow = init_inversion_wf(
        method="tikhonov", parameters={"lambda_": "l-curve", "prior": "laplacian"}
    )
    step = run(workflow, tmp_path, write(head, tmp_path, noise=noise)).step
    expected = head.invert(tikhonov, noise=noise, prior="laplacian", lambda_="l-curve").curve
    curve = json.loads(json.dumps(step["curve"], allow_nan=False))
    assert set(curve) == set(expected._fields)
    assert curve["rule"] == "l-curve"
    assert curve["chosen"] == expected.chosen
    np.testing.assert_allclose(curve["residuals"], expected.residuals, rtol=1e-3)
    assert step["parameters"]["lambda_"] == curve["lambdas"][curve["chosen"]]
    assert not step["warnings"]


def test_a_rule_that_finds_none_is_a_warning(
    head: Phantom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = write(head._replace(field=torch.zeros_like(head.field)), tmp_path)
    step = L2(**paths, lambda_="l-curve").run().outputs.step
    assert "the rule l-curve found no lambda" in step["warnings"][0]
    assert "curve" not in TV(**paths, max_iterations=1).run().outputs.step


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", ["l-curve", "discrepancy"])
def test_the_command_line_takes_a_rule(method: str, rule: str) -> None:
    settings = combine({
        "inversion": method, "parameters": parse_assignments([f"inversion.lambda={rule}"])
    })  # fmt: skip
    settings.check()
    assert settings.parameters_for("inversion")[method] == {"lambda_": rule}


@pytest.mark.parametrize("method", METHODS)
def test_the_command_line_refuses_what_is_no_rule(method: str) -> None:
    settings = combine({
        "inversion": method, "parameters": parse_assignments(["inversion.lambda=gcv"])
    })  # fmt: skip
    with pytest.raises(ValueError, match=r"lambda is .gcv.: give .* or 'discrepancy'$"):
        settings.parameters_for("inversion")
