"""From a training's best checkpoint to weights with a card, which an inversion takes."""

import math
import platform
import subprocess
from dataclasses import fields
from pathlib import Path
from statistics import fmean, median_high
from typing import Any

import torch

from qsmpipe import __version__
from qsmpipe.nets.architectures import build
from qsmpipe.nets.cards import Card, Domain, save
from qsmpipe.nets.common import Network, load_parameters
from qsmpipe.nets.training.recipe import SOURCES, Recipe
from qsmpipe.nets.training.sample import Scans
from qsmpipe.nets.training.trainer import BEST, Record
from qsmpipe.numerics.units import radians_per_ppm
from qsmpipe.tables import to_table

EXPORTED = "weights.safetensors"
"""In the folder of a training; the card lies beside it."""

PATCH = 96
"""Edge of what a patch gives (voxels): large ones read less than small ones, and map no worse."""

HALO = 16
"""Neighbours (voxels) that patches read, or a little more, where the network itself crops none."""


def export(recipe: Recipe, folder: Path, *, threads: int = 0) -> Card:
    """Write the best network of a training as weights, with their card.

    Parameters
    ----------
    recipe : Recipe
        That of the training. ``about`` goes into the card, with the ``licence`` apart.
    folder : Path
        Holds ``best.pt``; gets :data:`EXPORTED` and its card.
    threads : int
        CPU threads that it was trained on; 0: on a GPU.

    Raises
    ------
    ValueError
        If the checkpoint is of another network.
    """
    state = torch.load(folder / BEST, map_location="cpu", weights_only=True)
    network = build(recipe.network.architecture, recipe.network.options)
    load_parameters(network, state["network"], folder / BEST)
    curve = [Record(*row) for row in state["curve"]]
    about = dict(recipe.about)
    patch, halo = _cut(network, recipe)
    card = Card(
        network=recipe.network,
        contract=recipe.contract,
        domain=_domain(recipe),
        patch=patch,
        halo=halo,
        licence=about.pop("licence", ""),
        about=about,
        training=_training(recipe, curve, threads),
        recipe={
            name: value
            for name, value in to_table(recipe).items()
            if name not in ("about", "network", "contract")
        },
    )
    return save(network, card, folder / EXPORTED)


def _cut(network: Network, recipe: Recipe) -> tuple[int, int]:
    """Give patch and halo: what it was trained on, if it crops by itself; else larger patches."""
    shape = recipe.data.options.get("shape") or _default(recipe.data.source, "shape")
    patch = max(shape) - 2 * network.crop
    if not network.crop:
        patch = max(PATCH // network.stride, 1) * network.stride
    step = max(network.stride // 2, 1)
    return patch, math.ceil((network.crop or HALO) / step) * step


def _domain(recipe: Recipe) -> Domain:
    scans: Scans = recipe.data.scans or _default(recipe.data.source, "scans")
    x, y, z = (scans.zooms[0] if axis < scans.alike else scans.zooms[axis] for axis in range(3))
    takes_phase = "filtered phase" in recipe.contract.channels
    strength, time = median_high(scans.field_strengths), fmean(scans.echo_time)
    return Domain(
        zooms=(x, y, z),
        alike=scans.alike,
        tilt=scans.tilt,
        radians_per_ppm=radians_per_ppm(strength, time) if takes_phase else 0.0,
    )


def _default(source: str, name: str) -> Any:
    return next(one.default for one in fields(SOURCES[source]) if one.name == name)  # type: ignore[arg-type]


def _training(recipe: Recipe, curve: list[Record], threads: int) -> dict[str, Any]:
    """Tell steps, hours, machine and figures, as far as the best checkpoint."""
    best = curve[-1]
    return {
        "steps": best.step,
        "seed": recipe.training.seed,
        "hours": round(best.seconds / 3600, 2),
        "hardware": _hardware(threads),
        "software": f"qsmpipe {__version__}, torch {torch.__version__}",
        "commit": _commit(),
        "validation": {"nrmse_percent": round(best.nrmse, 2), "slope": round(best.slope, 4)},
    }


def _hardware(threads: int) -> str:
    if threads:
        return f"{threads} threads of a CPU ({platform.machine()})"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def _commit() -> str:
    """Revision of the checkout that this file lies in, if it is one."""
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()
