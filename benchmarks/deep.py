"""Networks against classical inversions: the tables of the five papers, on simulated heads.

    python benchmarks/deep.py heads --data /tmp/heads       QSMGAN Table 2, Meta-QSM Table 1
    python benchmarks/deep.py patches --data /tmp/heads     QSMGAN Table 1
    python benchmarks/deep.py scales                        SI-QSM Table 3.1
    python benchmarks/deep.py lesion --data /tmp/heads      SI-QSM Table 3.2: calcification
    python benchmarks/deep.py filtered --data /tmp/heads    C-Psi-Net Table 1
    python benchmarks/deep.py grids --data /tmp/heads       what resampling costs

Tables that need trainings of their own are in deep_training.py.

The label maps of these heads are none that the weights were trained on. The local field is the
true one with white noise; maps and truth are relative to their means over the brain. Every method
runs in a process of its own, whose largest memory is told, less what it takes before.
"""

import argparse
import math
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from heads import write_head
from torch import Tensor

from qsmpipe.cli.plugin import keep_freed_memory
from qsmpipe.methods import METHODS, function_of
from qsmpipe.nets.cards import read_card
from qsmpipe.nets.reconstruction import Frame
from qsmpipe.nets.training.analytic import sphere
from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.kernels import AXIAL
from qsmpipe.numerics.metrics import (
    calcification,
    detrended_nrmse,
    hfen,
    linearity_error,
    nrmse,
    xsim,
)
from qsmpipe.numerics.operators import Dipole
from qsmpipe.numerics.swi import high_pass
from qsmpipe.numerics.units import radians_per_ppm

NOISE = 0.002
"""Standard deviation of the local field (ppm)."""

CLASSICAL = ("tkd", "ilsqr", "medi", "tv")
FROM_FIELD = tuple(
    name
    for name, row in METHODS["inversion"].items()
    if row.trained and row.starts_from == "local field"
)
CASES: dict[str, tuple[int, Any, float]] = {
    "1 x 1 x 1 mm": (13, 1, 0.0),
    "1 x 1 x 2 mm": (16, (1, 1, 2), 0.0),
    "2 x 2 x 2 mm, B0 tilted by 30 degrees": (14, 2, 30.0),
}
"""Name to head, voxel edges (mm) and tilt (degrees)."""

DEEP_GREY = ((10, 49), (11, 50), (12, 51), (13, 52))
"""Labels of thalamus, caudate, putamen and pallidum, left and right."""

STONE = (-1.0, 3.0)
"""Susceptibility (ppm) and radius (mm) of a calcification."""

ONE_IMAGE = {"grid": "native", "mirror": False}
"""Networks as in the papers: neither resampled nor the mean of mirror images."""

SWI = (3.0, 0.020)
"""Field strength (T) and echo time (s) of the filtered phase."""

STEEP = 1.0
"""Filtered phase (rad) beyond which it is the background that the filter left."""


# Scores


def psnr(found: Tensor, true: Tensor, mask: Tensor) -> float:
    """Range of the truth squared over the mean squared error, in dB, as QSMGAN's text has it."""
    inside = true[mask]
    span = float(inside.max() - inside.min())
    error = float((found - true)[mask].square().mean())
    return 10 * math.log10(span**2 / error) if error else math.inf


def slope(found: Tensor, true: Tensor, mask: Tensor) -> float:
    """Of the line through 0 of found on true; below 1 the map is too faint."""
    return float((found * true)[mask].sum() / true[mask].square().sum())


SCORES: dict[str, Callable[[Tensor, Tensor, Tensor], float]] = {
    "L1 (ppb)": lambda a, b, m: 1000 * float((a - b)[m].abs().mean()),
    "PSNR (dB)": psnr,
    "NRMSE (%)": nrmse,
    "HFEN (%)": hfen,
    "XSIM": xsim,
    "slope": slope,
}


def scores(chi: Tensor, truth: Tensor, mask: Tensor) -> dict[str, float]:
    """All of them, both maps without their mean."""
    found, true = ((one - one[mask].mean()) * mask for one in (chi, truth))
    return {name: float(score(found, true, mask)) for name, score in SCORES.items()}


# Runs


def run(name: str, images: Sequence[Tensor], zooms: Zooms, choices: Mapping[str, Any]) -> Any:
    """Map in another process: the map, seconds without imports, GiB beyond the start."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    numbers = [image.numpy() for image in images]
    process = context.Process(target=_work, args=(there, name, numbers, zooms, dict(choices)))
    process.start()
    chi, seconds, memory = here.recv()
    process.join()
    return torch.from_numpy(chi), seconds, memory


def _work(
    answer: Any, name: str, images: Sequence[np.ndarray], zooms: Zooms, choices: dict[str, Any]
) -> None:
    keep_freed_memory()  # as in the app
    tensors = [torch.from_numpy(image) for image in images]
    function = function_of("inversion", name)
    small = torch.zeros(16, 16, 16)
    small[8, 8, 8] = 1.0
    if name in CLASSICAL:  # compiled once, not for each head
        function(small, torch.ones(16, 16, 16, dtype=torch.bool), zooms)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.monotonic()
    chi = function(*tensors, zooms, **choices).chi
    seconds = time.monotonic() - begin
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer.send((chi.numpy(), seconds, (after - before) / 2**20))


class Table:
    """Rows of scores, means over what was added under one name."""

    def __init__(self, first: str) -> None:
        self.first = first
        self.rows: dict[str, list[dict[str, float]]] = {}

    def add(self, name: str, row: Mapping[str, float]) -> None:
        """Put a row in."""
        self.rows.setdefault(name, []).append(dict(row))

    def mean(self, name: str, column: str) -> float:
        """Mean of a column over what was added under a name."""
        return statistics.fmean(row[column] for row in self.rows[name])

    def print(self) -> None:
        """In Markdown."""
        columns = next(iter(self.rows.values()))[0]
        print(f"\n| {self.first} | {' | '.join(columns)} |")
        print("|---|" + "---|" * len(columns))
        for name, found in self.rows.items():
            cells = [spoken([row.get(column, math.nan) for row in found]) for column in columns]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def spoken(values: Sequence[float]) -> str:
    """Mean, with the standard deviation if there are several."""
    text = f"{statistics.fmean(values):.3g}"
    return f"{text} ({statistics.stdev(values):.2g})" if len(values) > 1 else text


def noisy(image: Tensor, deviation: float) -> Tensor:
    """With white noise, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return image + deviation * torch.randn(image.shape, generator=generator)


def truth_of(data: Path, head: int, voxel: Any, tilt: float) -> tuple[dict[str, Tensor], Zooms]:
    """Truth of a head, made if it is not there, and its voxel size (mm)."""
    folder = write_head(head, data, field_strength=SWI[0], tilt=tilt, voxel=voxel)
    found = np.load(folder / "truth.npz")
    x, y, z = (voxel,) * 3 if isinstance(voxel, int) else voxel
    return {key: torch.from_numpy(found[key]) for key in found.files}, (
        float(x), float(y), float(z),
    )  # fmt: skip


def variants(
    inversions: Sequence[str], zooms: Zooms, b0_direction: tuple[float, float, float]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Inversions, and networks on the scan's own grid besides where they resample it."""
    for name in inversions:
        yield name, {}
        if name in FROM_FIELD:
            _, card = read_card(name)
            if Frame.of(zooms, b0_direction, card.domain, "card").turn is not None:
                yield name, {"grid": "native"}


def heads(given: argparse.Namespace) -> None:
    """Every network and some classical inversions, in and outside the domains."""
    for case in given.cases or CASES:
        head, voxel, tilt = CASES[case]
        truth, zooms = truth_of(given.data, head, voxel, tilt)
        mask, chi = truth["mask"], truth["chi"].float()
        field = noisy(truth["local"].float(), NOISE)
        b0 = tuple(truth["b0_direction"].tolist())
        print(f"\nHead {head}, {case}")
        table = Table("inversion")
        for name, choices in variants(given.inversions, zooms, b0):
            found, seconds, memory = run(
                name, (field, mask), zooms, {"b0_direction": b0, **choices}
            )
            label = f"`{name}`" + (", as it is" if choices else "")
            row = {
                **scores(found, chi, mask),
                "detrended (%)": detrended_nrmse(found, chi, mask),
                "deep grey slope": 1 - linearity_error(found, chi, nuclei(truth)),
                "s": seconds,
                "GiB": memory,
            }
            table.add(label, row)
            print(label, {key: round(value, 3) for key, value in row.items()}, flush=True)
        table.print()


def nuclei(truth: Mapping[str, Tensor]) -> Tensor:
    """Give each deep grey nucleus a number, 0 elsewhere."""
    regions = torch.zeros_like(truth["labels"], dtype=torch.int32)
    for number, labels in enumerate(DEEP_GREY, start=1):
        regions[torch.isin(truth["labels"], torch.tensor(labels)) & truth["mask"]] = number
    return regions


def lesion(given: argparse.Namespace) -> None:
    """Map a calcification in white matter, whose field is known in closed form."""
    truth, zooms = truth_of(given.data, 13, 1, 0.0)
    mask, chi = truth["mask"], truth["chi"].float()
    white = torch.isin(truth["labels"], torch.tensor([2, 41])) & mask
    deep = -torch.nn.functional.max_pool3d((~white)[None].float(), 13, 1, 6)[0] == 0
    place = deep.nonzero()[int(deep.sum()) // 2]
    x, y, z = (
        (torch.arange(n) - int(i)) * zoom
        for n, i, zoom in zip(mask.shape, place, zooms, strict=True)
    )
    value, radius = STONE
    region, ball = sphere((x[:, None, None], y[:, None], z), radius, AXIAL)
    field = noisy(truth["local"].float(), NOISE) + value * ball
    chi = chi + value * region
    table = Table("inversion")
    for name in given.inversions:
        found, _, _ = run(name, (field, mask), zooms, {})
        moment, streak = calcification(found, chi, mask, region)
        row = {"moment (%)": moment, "streak (%)": streak, **scores(found, chi, mask)}
        table.add(f"`{name}`", row)
        print(name, row, flush=True)
    table.print()


def patches(given: argparse.Namespace) -> None:
    """One generator, patches of several sizes."""
    truth, zooms = truth_of(given.data, 13, 1, 0.0)
    x, y, z = (slice((n - 96) // 2, (n + 96) // 2) for n in truth["chi"].shape)
    box = (x, y, z)
    mask, chi = truth["mask"][box], truth["chi"].float()[box]
    field = noisy(truth["local"].float(), NOISE)[box] * mask
    table = Table("input -> output")
    for patch in (16, 32, 48, 96):
        for halo in (8, 16, 24):
            choices = {"patch": patch, "halo": halo, **ONE_IMAGE}
            found, seconds, _ = run("qsmgan", (field, mask), zooms, choices)
            edges = discontinuity(found, chi, mask, patch)
            row = {**scores(found, chi, mask), "edge (%)": edges, "s": seconds}
            table.add(f"{patch + 2 * halo} -> {patch}", row)
            print(patch + 2 * halo, patch, row, flush=True)
    table.print()


def discontinuity(chi: Tensor, truth: Tensor, mask: Tensor, patch: int) -> float:
    """How much more the error jumps between patches than within them (%)."""
    within, between = [], []
    inside = mask.nonzero()
    first = inside.amin(0).tolist()  # patches begin at the mask's box
    error = chi - truth
    for axis in range(3):
        n = mask.shape[axis] - 1
        both = mask.narrow(axis, 0, n) & mask.narrow(axis, 1, n)
        jumps = error.diff(dim=axis).abs()
        for i in range(n):
            values = jumps.select(axis, i)[both.select(axis, i)]
            (between if (i + 1 - first[axis]) % patch == 0 else within).append(values)
    if not between:
        return 0.0
    return 100 * float(torch.cat(between).mean() / torch.cat(within).mean() - 1)


def scales(given: argparse.Namespace) -> None:
    """One object, sampled more and more finely."""
    table = Table("inversion")
    for name in (*FROM_FIELD, "tv"):
        row = {}
        for edge in given.edges:
            field, mask, chi = phantom(edge)
            choices = ONE_IMAGE if name in FROM_FIELD else {}
            found, _, _ = run(name, (field, mask), (1.0, 1.0, 1.0), choices)
            row[f"{edge}^3"] = scores(found, chi, mask)["NRMSE (%)"]
        table.add(f"`{name}`", row)
        print(name, row, flush=True)
    table.print()


def phantom(edge: int) -> tuple[Tensor, Tensor, Tensor]:
    """Balls and rods in a ball, as large as the grid is: field with noise (ppm), mask, truth."""
    axis = (torch.arange(edge) - (edge - 1) / 2) / edge
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    inside = x**2 + y**2 + z**2 < 0.45**2
    chi = torch.zeros_like(x)
    soft = 0.7 / edge
    balls = (
        (0.10, 0.12, -0.15, 0.05, 0.0),
        (-0.05, 0.10, 0.18, -0.10, 0.05),
        (0.15, 0.06, 0.05, 0.20, -0.10),
        (0.06, 0.08, 0.00, -0.25, -0.10),
        (-0.08, 0.05, -0.05, 0.00, 0.27),
    )
    for value, radius, a, b, c in balls:
        r = ((x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2).sqrt()
        chi += value * torch.sigmoid((radius - r) / (soft / 2))
    for value, radius, a, b in ((0.2, 0.02, 0.1, 0.1), (0.12, 0.03, -0.2, -0.2)):
        r = ((y - a) ** 2 + (z - b) ** 2).sqrt()
        chi += value * torch.sigmoid((radius - r) / (soft / 2))
    chi *= inside
    field = Dipole.on_grid(chi, (1.0, 1.0, 1.0))(chi)
    return noisy(field, NOISE) * inside, inside, chi


def filtered(given: argparse.Namespace) -> None:
    """From the high-pass filtered phase of one echo, with and without its steep part."""
    truth, zooms = truth_of(given.data, 13, 1, 0.0)
    mask, chi = truth["mask"], truth["chi"].float()
    scale = radians_per_ppm(*SWI)
    total = noisy(truth["total"].float(), NOISE)
    local = noisy(truth["local"].float(), NOISE)
    b0 = {"b0_direction": tuple(truth["b0_direction"].tolist())}
    phase = (scale * total).remainder(2 * math.pi) * mask
    high = high_pass(phase, mask, zooms, magnitude=torch.ones_like(phase), **b0)
    steep = high.abs() > STEEP
    near = torch.nn.functional.max_pool3d(steep[None].float(), 5, 1, 2)[0] > 0
    calm = mask & ~near
    shares = [
        float(of[inside].sum() / of.sum())
        for of, inside in ((mask.float(), steep), (high.square(), steep), (mask.float(), calm))
    ]
    print("steep: {:.1%} of the brain, {:.0%} of the energy; calm: {:.0%}".format(*shares))
    echo = {"echo_times": SWI[1:], "field_strength": SWI[0], **b0}
    table = Table("method")
    for label, name, image, where, choices in (
        ("`cpsi-net` of the filtered phase", "cpsi-net", phase[None], mask, echo),
        ("`cpsi-net` of that, as it is", "cpsi-net", phase[None], mask,
         {**echo, "grid": "native"}),
        ("`two-level` of the filtered phase", "two-level", high / scale, mask, b0),
        ("`tv` of the filtered phase", "tv", high / scale, mask, b0),
        ("`two-level` of its calm part", "two-level", high / scale * calm, calm, b0),
        ("`tv` of its calm part", "tv", high / scale * calm, calm, b0),
        ("`tv` of the true local field", "tv", local, mask, b0),
    ):  # fmt: skip
        found, seconds, _ = run(name, (image, where), zooms, choices)
        within = {f"{key}, calm": value for key, value in scores(found, chi, calm).items()
                  if key in ("NRMSE (%)", "XSIM")}  # fmt: skip
        row = {**scores(found, chi, mask), **within, "s": seconds}
        table.add(label, row)
        print(label, row, flush=True)
    table.print()


def grids(given: argparse.Namespace) -> None:
    """Bring the true map to a network's grid and back, without a network."""
    from qsmpipe.nets.architectures import Blueprint
    from qsmpipe.nets.cards import Card, Domain, Model
    from qsmpipe.nets.common import Network
    from qsmpipe.nets.contract import Contract
    from qsmpipe.nets.reconstruction import reconstruct

    class Copy(Network):
        def forward(self, images: Tensor) -> Tensor:
            return images

    def carried(chi: Tensor, mask: Tensor, zooms: Zooms, to: float, tilt: float) -> Tensor:
        card = Card(
            network=Blueprint(architecture="unet"), contract=Contract(), patch=1024, halo=0,
            domain=Domain(zooms=((to, to),) * 3),
        )  # fmt: skip
        model = Model("copy", Copy(channels=1, stride=1), card)
        b0 = (0.0, math.sin(math.radians(tilt)), math.cos(math.radians(tilt)))
        return reconstruct(model, mask, zooms, field=chi, b0_direction=b0).chi

    table = Table("scan to network")
    for voxel, to, tilt in ((1, 1.0, 10.0), (1, 1.0, 30.0), (1, 1.5, 0.0), (2, 1.0, 0.0),
                            (2, 1.0, 30.0)):  # fmt: skip
        head, *_, made_at = (13, 0.0) if voxel == 1 else (14, 30.0)
        truth, zooms = truth_of(given.data, head, voxel, made_at)
        mask, chi = truth["mask"], truth["chi"].float() * truth["mask"]
        found = carried(chi, mask, zooms, to, tilt)
        row = scores(found, chi, mask)
        table.add(
            f"{voxel} mm to {to:g} mm, B0 tilted by {tilt:g} degrees",
            {key: row[key] for key in ("NRMSE (%)", "HFEN (%)", "XSIM", "slope")},
        )
    table.print()


def main() -> None:
    """Read the section, and run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sections = parser.add_subparsers(required=True)
    for section in (heads, lesion, patches, scales, filtered, grids):
        sub = sections.add_parser(section.__name__, help=section.__doc__)
        sub.set_defaults(section=section)
        if section is not scales:
            sub.add_argument("--data", type=Path, required=True, help="where heads are kept")
        if section is heads:
            sub.add_argument("--cases", nargs="+", choices=CASES)
        if section in (heads, lesion):
            every = (*CLASSICAL, *FROM_FIELD)
            sub.add_argument("--inversions", nargs="+", choices=every, default=every)
        if section is scales:
            sub.add_argument("--edges", type=int, nargs="+", default=(64, 96, 128, 256))
    given = parser.parse_args()
    given.section(given)


if __name__ == "__main__":
    main()
