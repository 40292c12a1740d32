"""Uncertainty: the deviation is that of maps from repeated measurements."""

import inspect
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from phantoms import TILT, phantom
from torch import Tensor

from qsmpipe import images
from qsmpipe.cli.parser import build_parser
from qsmpipe.interfaces.uncertainty import Uncertainty
from qsmpipe.methods import METHODS, function_of
from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.inversion import Susceptibility, l2, tkd, tv
from qsmpipe.numerics.uncertainty import (
    DEFAULT_REALISATIONS,
    Chain,
    NotAFilterError,
    deviation,
    filter_deviation,
    pool,
)
from qsmpipe.workflows.uncertainty import init_uncertainty_wf


class Scan(NamedTuple):
    """A phantom with a background field and noise that grows from left to right."""

    field: Tensor
    noise: Tensor
    mask: Tensor
    zooms: Zooms
    b0_direction: tuple[float, float, float]

    def measure(self, seed: int) -> Tensor:
        """Give the field with its noise."""
        generator = torch.Generator().manual_seed(seed)
        return self.field + self.noise * torch.randn(self.field.shape, generator=generator)

    def bound(self, stage: str, name: str, **choices: Any) -> Any:
        """Bind a method to what it takes of the scan."""
        function = function_of(stage, name)
        given = {"noise": self.noise, "b0_direction": self.b0_direction}
        taken = set(inspect.signature(function).parameters)
        return partial(function, **{k: v for k, v in given.items() if k in taken}, **choices)

    def chain(self, names: str, **choices: Any) -> Chain:
        """Put a chain like "vsharp+tv" together."""
        *backgrounds, inversion = names.split("+")
        return Chain(
            self.mask,
            self.zooms,
            self.bound("inversion", inversion, **choices),
            [self.bound("background", name) for name in backgrounds],
            b0_direction=self.b0_direction,
        )


GRIDS = {
    "plain": ((22, 22, 22), (1.5, 1.5, 1.5), 0.0),
    "anisotropic tilted": ((28, 21, 15), (1.15, 1.55, 2.2), TILT),
    "tiny": ((11, 10, 9), (3.0, 3.2, 3.4), TILT),
}


def scan(grid: str) -> Scan:
    shape, zooms, tilt = GRIDS[grid]
    head = phantom(shape, zooms, tilt=tilt)
    x, y, _ = torch.meshgrid(
        *((torch.arange(n) - (n - 1) / 2) * zoom for n, zoom in zip(shape, zooms, strict=True)),
        indexing="ij",
    )
    background = 0.3 + 0.02 * x + 0.0015 * (x**2 - y**2) + 2e-5 * (x**3 - 3 * x * y**2)
    noise = (0.003 * (1 + 0.06 * x)).clamp(min=1e-4)
    return Scan(head.field + background, noise, head.mask, zooms, head.b0_direction)


@pytest.fixture(scope="module")
def plain() -> Scan:
    return scan("plain")


@pytest.fixture(scope="module")
def tiny() -> Scan:
    return scan("tiny")


def exactly(chain: Chain, noise: Tensor) -> Tensor:
    """Deviation of a linear chain, from its whole matrix."""
    columns = []
    for voxel in chain.mask.nonzero().tolist():
        single = torch.zeros_like(noise)
        single[tuple(voxel)] = 1.0
        columns.append(chain(single)[chain.mask])
    matrix = torch.stack(columns, dim=1).double()
    variance = (matrix**2) @ noise[chain.mask].double() ** 2
    return torch.zeros_like(noise).masked_scatter_(chain.mask, variance.sqrt().to(noise))


@pytest.mark.parametrize("name", ["tkd", "l2"])
@pytest.mark.parametrize("reference", ["none", "brain", "region"])
def test_a_filters_deviation_is_that_of_its_whole_matrix(
    name: str, reference: str, tiny: Scan
) -> None:
    region = tiny.mask.clone()
    region[5:] = False
    chain = Chain(
        tiny.mask,
        tiny.zooms,
        tiny.bound("inversion", name),
        region=region if reference == "region" else None,
        referenced=reference != "none",
    )
    found = chain.filter_deviation(tiny.noise)
    expected = exactly(chain, tiny.noise)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-6)
    assert not found[~tiny.mask].any()


@pytest.mark.parametrize("names", ["vsharp+tkd"])
def test_realisations_find_the_deviation_of_a_whole_linear_chain(names: str, tiny: Scan) -> None:
    """Where a voxel's own variance is averaged with none of its neighbours': K tells the error."""
    chain = tiny.chain(names)
    expected = exactly(chain, tiny.noise)
    known = expected > 0
    guide = chain.filter_deviation(tiny.noise)
    few, error = 200, 1 / math.sqrt(2 * 199)
    found = deviation(
        chain, tiny.field, tiny.noise, tiny.mask, realisations=few, guide=guide
    ).deviation
    ratio = (found / expected)[known]
    assert ratio.mean().item() == pytest.approx(1, abs=0.02)
    assert ratio.std().item() < 1.2 * error
    assert not found[~known].any()
    # background removal does change the noise: the filter alone would be wrong
    assert (guide / expected)[known].std() > ratio.std()


COVERAGE = {
    "vsharp+tkd": (2, 0.05, 0.02, 0.015),
    "resharp+l2": (2, 0.05, 0.02, 0.015),
    "vsharp+rts": (2, 0.05, 0.05, 0.02),
    "vsharp+tv": (1, 0.15, 0.09, 0.03),
    "pdf+tv": (1, 0.20, 0.06, 0.05),
}
"""Chain to measurements, to how far the standardised error's deviation may be from 1, and the
share of errors within one and within 1.96 deviations from 68.3 and 95 %. TV's mean over many
measurements is not its map without noise: that bias, 0.4 deviations behind PDF, counts here."""


@pytest.mark.parametrize(
    ("names", "grid"),
    [
        (names, grid)
        for names in COVERAGE
        for grid in ("plain", "anisotropic tilted")
        if (names, grid) != ("pdf+tv", "plain")  # it takes seconds
    ],
)
def test_errors_are_as_large_as_the_deviation_says(names: str, grid: str) -> None:
    """Repeated measurements against the map without noise, with noise that varies over space."""
    case = scan(grid)
    chain = case.chain(names)
    clean = chain(case.field)
    guide = chain.filter_deviation(case.noise) if names.endswith(("tkd", "l2")) else None
    scores = []
    count, spread, one, two = COVERAGE[names]
    for seed in range(count):
        measured = case.measure(seed)
        found = deviation(
            chain, chain.fitted(measured), case.noise, case.mask, seed=seed, guide=guide
        ).deviation
        known = found > 0
        assert torch.equal(known, chain.local(measured)[1])
        scores.append(((chain(measured) - clean) / found)[known])
    score = torch.cat(scores)
    assert score.std().item() == pytest.approx(1, abs=spread)
    assert (score.abs() < 1).float().mean().item() == pytest.approx(0.683, abs=one)
    assert (score.abs() < 1.96).float().mean().item() == pytest.approx(0.95, abs=two)


def test_noise_on_top_of_noise_is_too_much_for_total_variation(plain: Scan) -> None:
    """Why noise is added to the fitted field: the measured one makes the deviation too large."""
    chain = plain.chain("vsharp+tv")
    repeated = torch.stack([chain(plain.measure(seed)) for seed in range(10)])
    true = repeated.var(0)
    measured = plain.measure(99)
    found = {
        name: deviation(chain, field, plain.noise, plain.mask, realisations=8).deviation.square()
        for name, field in {"fitted": chain.fitted(measured), "measured": measured}.items()
    }
    known = true > 0
    ratio = {name: (v[known].mean() / true[known].mean()).item() for name, v in found.items()}
    assert ratio["fitted"] == pytest.approx(1, abs=0.2)
    assert ratio["measured"] > 1.15 * ratio["fitted"]


def roughness(field: Tensor, mask: Tensor) -> float:
    """Norm of the second differences inside: what noise is made of, and what fields are not."""
    inner = mask & mask.roll(1, 0) & mask.roll(-1, 0)
    return (2 * field - field.roll(1, 0) - field.roll(-1, 0))[inner].norm().item()


def test_a_fitted_field_has_less_noise_and_the_same_background(plain: Scan) -> None:
    chain = plain.chain("vsharp+tv")
    measured = plain.measure(3)
    fitted = chain.fitted(measured)
    inside = chain.local(measured)[1]
    before, after = (roughness(field - plain.field, inside) for field in (measured, fitted))
    assert after < 0.5 * before
    assert (fitted - plain.field)[inside].abs().max() < 0.1 * plain.field[inside].std()
    assert not fitted[~plain.mask].any()


def test_a_fit_of_the_total_field_keeps_the_background(plain: Scan) -> None:
    """What an inversion of the total field leaves of it holds all of the background."""
    vsharp = plain.bound("background", "vsharp")

    def from_total(field: Tensor, mask: Tensor, zooms: Zooms) -> Susceptibility:
        local = vsharp(field, mask, zooms)
        return tv(
            local.field, local.mask, zooms, b0_direction=plain.b0_direction, noise=plain.noise
        )

    measured = plain.measure(3)
    chain = Chain(
        plain.mask,
        plain.zooms,
        from_total,
        b0_direction=plain.b0_direction,
        holds_background=True,
    )
    fitted = chain.fitted(measured)
    inside = vsharp(measured, plain.mask, plain.zooms).mask
    before, after = (roughness(field - plain.field, inside) for field in (measured, fitted))
    assert after < 0.5 * before
    assert (fitted - plain.field)[inside].abs().max() < 0.1 * plain.field[inside].std()


def test_only_filters_have_a_filters_deviation(plain: Scan) -> None:
    assert plain.chain("vsharp+tv").filter_deviation(plain.noise) is None

    def uneven(field: Tensor, mask: Tensor) -> Tensor:
        return field * plain.noise * mask

    with pytest.raises(NotAFilterError, match="not one filter"):
        filter_deviation(uneven, plain.noise, plain.mask)


def identity(field: Tensor) -> Tensor:
    return field


def test_a_chain_that_does_nothing_gives_the_noise_back(plain: Scan) -> None:
    found = deviation(identity, plain.field, plain.noise, plain.mask, realisations=64)
    ratio = (found.deviation / plain.noise)[plain.mask]
    assert ratio.mean().item() == pytest.approx(1, abs=0.02)
    assert ratio.std().item() < 0.05
    assert (found.realisations, found.exact) == (64, False)


def test_the_same_seed_gives_the_same_and_another_another(plain: Scan) -> None:
    chain = plain.chain("vsharp+l2")
    field, noise = plain.field.clone(), plain.noise.clone()
    maps = [
        deviation(chain, field, noise, plain.mask, realisations=4, seed=seed).deviation
        for seed in (0, 0, 1)
    ]
    assert torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[0], maps[2])
    assert torch.equal(field, plain.field)
    assert torch.equal(noise, plain.noise)


def test_what_lies_outside_the_mask_changes_nothing(plain: Scan) -> None:
    pad = (3, 0, 5, 11, 1, 2)
    wider = Scan(
        torch.nn.functional.pad(plain.field, pad, value=torch.nan),
        torch.nn.functional.pad(plain.noise, pad, value=torch.nan),
        torch.nn.functional.pad(plain.mask, pad),
        plain.zooms,
        plain.b0_direction,
    )

    def found(case: Scan) -> Tensor:
        chain = Chain(case.mask, case.zooms, tkd, [case.bound("background", "vsharp")])
        guide = chain.filter_deviation(case.noise)
        start = chain.fitted(case.field)
        return deviation(
            chain, start, case.noise, case.mask, realisations=4, guide=guide
        ).deviation

    torch.testing.assert_close(found(wider)[1:-2, 5:-11, 3:], found(plain), rtol=1e-4, atol=1e-7)
    assert not found(wider)[~wider.mask].any()


def test_precision_matters_little(plain: Scan) -> None:
    double = plain._replace(field=plain.field.double(), noise=plain.noise.double())
    maps = []
    for case in (plain, double):
        chain = case.chain("vsharp+tkd")
        guide = chain.filter_deviation(case.noise)
        maps.append(
            deviation(chain, case.field, case.noise, case.mask, realisations=4, guide=guide)
        )
    single, exact = maps[0].deviation, maps[1].deviation
    assert single.dtype is torch.float32
    assert exact.dtype is torch.float64
    assert (single - exact).norm() < 2e-3 * exact.norm()


def test_twice_the_noise_is_twice_the_deviation_of_a_linear_chain(plain: Scan) -> None:
    chain = plain.chain("vsharp+l2")
    once, twice = (
        deviation(chain, plain.field, scale * plain.noise, plain.mask, realisations=3).deviation
        for scale in (1, 2)
    )
    torch.testing.assert_close(twice, 2 * once, rtol=2e-3, atol=1e-6)


def test_more_realisations_are_nearer_to_the_truth(plain: Scan) -> None:
    chain = Chain(plain.mask, plain.zooms, tkd)
    exact = chain.filter_deviation(plain.noise)

    def error(count: int) -> float:
        found = deviation(chain, plain.field, plain.noise, plain.mask, realisations=count)
        return (found.deviation / exact)[plain.mask].std().item()

    assert error(32) < 0.7 * error(4)


def test_pooling_averages_inside_the_mask(plain: Scan) -> None:
    mask = plain.mask
    flat = pool(torch.where(mask, 3.0, torch.nan), mask)
    torch.testing.assert_close(flat, torch.where(mask, 3.0, 0.0))
    generator = torch.Generator().manual_seed(0)
    rough = torch.rand(mask.shape, generator=generator) ** 8 * mask
    smooth = pool(rough, mask)
    assert (smooth >= 0).all()
    assert smooth[mask].std() < 0.4 * rough[mask].std()
    assert smooth[mask].mean().item() == pytest.approx(rough[mask].mean().item(), rel=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": torch.ones(3, 3, 3)}, "different grids"),
        ({"noise": -torch.ones(22, 22, 22)}, "negative or not finite"),
        ({"noise": torch.zeros(22, 22, 22)}, "0 in all"),
        ({"mask": torch.zeros(22, 22, 22, dtype=torch.bool)}, "empty"),
        ({"field": torch.full((22, 22, 22), torch.nan)}, "not finite"),
        ({"realisations": 1}, "2 or more"),
    ],
    ids=["grid", "negative", "no noise", "no mask", "nan", "one"],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], message: str, plain: Scan) -> None:
    given: dict[str, Any] = {"field": plain.field, "noise": plain.noise, "mask": plain.mask}
    with pytest.raises(ValueError, match=message):
        deviation(identity, **(given | change))


# The interface and its graph


@pytest.fixture
def files(tmp_path: Path, plain: Scan) -> dict[str, str]:
    affine = np.diag([*plain.zooms, 1.0])
    region = plain.mask.clone()
    region[11:] = False
    written = {
        "field": plain.measure(0), "noise": plain.noise, "mask": plain.mask, "region": region
    }  # fmt: skip
    for name, image in written.items():
        values = image.numpy()
        values = values.astype(np.uint8 if values.dtype == bool else np.float32)
        images.store(values, tmp_path / f"{name}.nii.gz", affine=affine)
    return {name: str(tmp_path / f"{name}.nii.gz") for name in written}


VSHARP = {"stage": "background", "method": "vsharp", "parameters": {"radii": [6.0, 4.0, 2.0]}}


def test_the_interface_carries_noise_through_the_steps_that_ran(
    files: dict[str, str], plain: Scan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = {"lambda_": 3e-4, "max_iterations": 30, "something_said": 1.0}
    given = {"field": files["field"], "noise": files["noise"], "mask": files["mask"]}
    outputs = (
        Uncertainty(
            **given,
            background=VSHARP,
            inversion={"method": "tv", "parameters": chosen},
            reference="region",
            region=files["region"],
            realisations=3,
            seed=5,
        )
        .run()
        .outputs
    )
    region = plain.mask.clone()
    region[11:] = False
    chain = Chain(
        plain.mask,
        plain.zooms,
        partial(tv, noise=plain.noise, lambda_=3e-4, max_iterations=30),
        [plain.bound("background", "vsharp", radii=[6.0, 4.0, 2.0])],
        region=region,
    )
    expected = deviation(
        chain, chain.fitted(plain.measure(0)), plain.noise, plain.mask, realisations=3, seed=5
    ).deviation
    torch.testing.assert_close(images.load(outputs.deviation), expected, rtol=1e-4, atol=1e-7)
    assert outputs.step["method"] == "realisations"
    assert outputs.step["parameters"] == {"realisations": 3, "seed": 5}


def test_without_background_a_filter_needs_no_realisation(
    files: dict[str, str], plain: Scan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"field": files["field"], "noise": files["noise"], "mask": files["mask"]}
    outputs = Uncertainty(**given, inversion={"method": "l2"}, reference="none").run().outputs
    expected = filter_deviation(
        lambda field, mask: l2(field, mask, plain.zooms).chi, plain.noise, plain.mask
    )
    torch.testing.assert_close(images.load(outputs.deviation), expected)
    assert outputs.step["method"] == "filter"
    assert outputs.step["parameters"] == {"realisations": 0}


def test_the_command_line_has_the_realisations_of_the_library() -> None:
    words = ["bids", "out", "participant", "--uncertainty"]
    assert build_parser().parse_args(words).uncertainty == DEFAULT_REALISATIONS


def test_the_graph_gives_what_the_function_gives(
    files: dict[str, str], plain: Scan, tmp_path: Path
) -> None:
    workflow = init_uncertainty_wf(background="vsharp", inversion="tkd", realisations=3)
    workflow.base_dir = tmp_path / "work"
    workflow.inputs.inputnode.trait_set(
        field=files["field"],
        noise=files["noise"],
        mask=files["mask"],
        background=VSHARP,
        inversion={"method": "tkd", "parameters": {"threshold": 0.2}},
    )
    nodes = {node.name: node for node in workflow.run().nodes()}
    chain = Chain(
        plain.mask,
        plain.zooms,
        partial(tkd, threshold=0.2),
        [plain.bound("background", "vsharp", radii=[6.0, 4.0, 2.0])],
    )
    field = plain.measure(0)
    guide = chain.filter_deviation(plain.noise)
    expected = deviation(
        chain, chain.fitted(field), plain.noise, plain.mask, realisations=3, guide=guide
    ).deviation
    found = images.load(nodes["realisations"].result.outputs.deviation)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


FIELDS = [n for n, row in METHODS["inversion"].items() if row.starts_from == "local field"]


@pytest.mark.parametrize("inversion", FIELDS)
@pytest.mark.parametrize("background", METHODS["background"])
def test_the_graph_of_every_chain_is_built(background: str, inversion: str) -> None:
    workflow = init_uncertainty_wf(background=background, inversion=inversion)
    (wires,) = (
        connected["connect"]
        for source, _, connected in workflow._graph.edges(data=True)
        if source.name == "inputnode"
    )
    names = {out for out, _ in wires}
    assert names >= {"field", "noise", "mask", "background", "inversion", "b0_direction"}
    assert "region" not in names
    assert ("magnitude" in names) == (
        "magnitude" in inspect.signature(function_of("inversion", inversion)).parameters
    )


@pytest.mark.parametrize(
    ("start", "background", "message"),
    [("phase", [], "phase of the echoes"), ("total field", [VSHARP], "takes the total field")],
)
def test_chains_that_make_no_sense_are_refused(
    start: str,
    background: list[dict[str, Any]],
    message: str,
    files: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    row = METHODS["inversion"]["tkd"]
    monkeypatch.setitem(
        METHODS["inversion"], "tkd", type(row)(**{**vars(row), "starts_from": start})
    )
    given = {"field": files["field"], "noise": files["noise"], "mask": files["mask"]}
    with pytest.raises(ValueError, match=message):
        Uncertainty(**given, background=background, inversion={"method": "tkd"}).run()
    if start == "phase":
        with pytest.raises(ValueError, match=message):
            init_uncertainty_wf(background="none", inversion="tkd")


def test_a_region_has_to_be_given(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"field": files["field"], "noise": files["noise"], "mask": files["mask"]}
    with pytest.raises(ValueError, match="no region is given"):
        Uncertainty(**given, inversion={"method": "tkd"}, reference="region").run()
