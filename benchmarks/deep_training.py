"""Networks trained otherwise than those that come with qsmpipe: the papers' ablations.

    python benchmarks/deep_training.py shapes --out /tmp/t            Jochmann et al. Figure 5
    python benchmarks/deep_training.py resolutions --out /tmp/t       Meta-QSM Tables 2 and 3
    python benchmarks/deep_training.py ablations --out /tmp/t         C-Psi-Net Table 1
    python benchmarks/deep_training.py critic --out /tmp/t            QSMGAN Table 2, its networks

All networks of a table are trained for as many steps, from the same samples where they take the
same, and scored on the same unseen ones; a training that was broken off goes on. Configurations
are those of the weights that come with qsmpipe (benchmarks/training), but for what a row's name
says.
"""

import argparse
from collections.abc import Iterator, Mapping
from functools import cache, reduce
from pathlib import Path
from typing import Any

import torch
from deep import SCORES, Table, scores
from heads import HEADS
from torch import Tensor

from qsmpipe import images
from qsmpipe.cli.train import TrainingProgress
from qsmpipe.nets.training.dataset import Samples
from qsmpipe.nets.training.heads import LabelMap, Purpose, load_heads
from qsmpipe.nets.training.recipe import Data, Recipe, read_recipe
from qsmpipe.nets.training.trainer import BEST, LAST, Trainer
from qsmpipe.tables import from_table, merged

CONFIGURATIONS = Path(__file__).parent / "training"
UNSEEN = 24
"""Samples that networks are scored on."""

Changes = Mapping[str, Any]


@cache
def heads_for(purpose: Purpose) -> list[LabelMap]:
    """Read label maps once."""
    print(f"reading the heads for {purpose}", flush=True)
    return load_heads(HEADS, purpose, read=images.read)


def samples_of(data: Data, purpose: Purpose, *, seed: int) -> Samples:
    """Make samples, of heads if they are brains."""
    heads = heads_for(purpose) if data.source == "brains" else ()
    return data.samples(seed=seed, device="cpu", heads=heads)


def trained(
    recipe: Recipe, folder: Path, *, start: Path | None = None, beside: Trainer | None = None
) -> Trainer:
    """Train to the last step, or go on where a training was broken off; the best network.

    Samples of a training ``beside`` this one are drawn already, and taken if they are the same.
    """
    if beside is not None and beside.recipe.data == recipe.data:
        samples, validation = beside.samples, beside.validation
    else:
        samples = samples_of(recipe.data, "training", seed=0)
        validation = samples_of(recipe.validation or recipe.data, "validation", seed=1)
    trainer = Trainer(recipe, samples, validation, folder)
    if (folder / LAST).exists():
        trainer.resume(folder / LAST)
    elif start is not None:
        trainer.start_from(start)
    print(folder.name, flush=True)
    with TrainingProgress(trainer) as progress:
        trainer.run(after_step=progress)
    trainer.resume(folder / BEST)
    trainer.network.eval()
    return trainer


@torch.no_grad()
def maps(trainer: Trainer, samples: Samples) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Map unseen samples: the network's maps, their truth and masks, without what it crops."""
    crop = trainer.network.crop
    for n in range(UNSEEN):
        batch = samples.batch([n])
        found, seen = trainer.map(batch)
        x, y, z = (slice(crop, size - crop) for size in batch.chi.shape[-3:])
        yield found[0, 0], batch.chi[0, 0, x, y, z], seen.mask[0, 0]


def put_scores(table: Table, name: str, trainer: Trainer, samples: Samples) -> None:
    """Add a network's scores of every unseen sample."""
    for found, truth, mask in maps(trainer, samples):
        table.add(name, scores(found, truth, mask))
    print(name, {key: table.mean(name, key) for key in SCORES}, flush=True)


def schedule(steps: int, **more: Any) -> Changes:
    """So many steps, with the rate's rise and fall; as many checks whatever their number."""
    return {"training": {"steps": steps, "validate_every": max(steps // 4, 1), **more}}


def read(name: str, *changes: Changes, config: str = "") -> Recipe:
    """Read a recipe with the configuration of its name, or another one's, and changes."""
    table = reduce(merged, changes, {})
    return read_recipe(name, CONFIGURATIONS / f"{config or name}.toml", table)


# Meta-QSM, Tables 2 and 3

RESOLUTIONS = ((0.5, 0.5, 2.0), (0.76, 0.76, 3.0))
"""Voxel sizes (mm) for which the paper trains networks of their own."""


def resolutions(given: argparse.Namespace) -> None:
    """Compare networks of any voxel size and Mesa-QSM of one, at that one.

    Meta-QSM begins as Mesa-QSM of any voxel size, as the weights that come with qsmpipe, and so
    has as many steps once more.
    """

    def mesa(name: str, *changes: Changes) -> Trainer:
        recipe = read("meta-qsm", schedule(given.steps), *changes, config="mesa-qsm")
        return trained(recipe, given.out / name)

    any_size = mesa("mesa")
    start = given.out / "mesa" / BEST
    meta = trained(
        read("meta-qsm", schedule(given.steps)), given.out / "meta", start=start, beside=any_size
    )
    meta.samples.forget()
    for zooms in RESOLUTIONS:
        label = " x ".join(f"{zoom:g}" for zoom in zooms)
        one_size = {"data": {"scans": {"zooms": [[zoom, zoom] for zoom in zooms]}}}
        of_this = mesa(f"mesa {label}", one_size)
        samples = samples_of(of_this.recipe.data, "validation", seed=99)
        table = Table(f"{label} mm")
        put_scores(table, "Meta-QSM", meta, samples)
        put_scores(table, "Mesa-QSM of any voxel size", any_size, samples)
        put_scores(table, "Mesa-QSM of this one", of_this, samples)
        of_this.samples.forget()
        table.print()


# C-Psi-Net, Table 1


def ablations(given: argparse.Namespace) -> None:
    """Compare C-Psi-Net, itself without its parts, and a U-Net, all of filtered phase."""
    steps = schedule(given.steps)
    whole = read("cpsi-net", steps)
    options = dict(whole.network.options)
    rows = {
        "C-Psi-Net": whole,
        "without interaction blocks": read(
            "cpsi-net", steps, {"network": {"options": {**options, "interaction": False}}}
        ),
        "without crossed connections": read(
            "cpsi-net", steps, {"network": {"options": {**options, "fusion": False}}}
        ),
        "U-Net": read("cpsi-net", steps, {"network": {
            "architecture": "unet",
            "options": {"width": options["width"], "depth": 3, "batch_norm": False, "slope": 0.2},
        }}),
    }  # fmt: skip
    samples = samples_of(whole.data, "validation", seed=99)
    table = Table("network")
    before = None
    for name, recipe in rows.items():
        before = trained(recipe, given.out / name, beside=before)
        put_scores(table, name, before, samples)
    table.print()


# QSMGAN, the networks of Table 2


def critic(given: argparse.Namespace) -> None:
    """Compare the generator alone, with its critic after that, and alone for as many more."""
    alone = read("qsmgan", schedule(given.steps))
    further = given.steps // 4
    samples = samples_of(alone.data, "validation", seed=99)
    table = Table("training")
    first = trained(alone, given.out / "generator")
    put_scores(table, "generator", first, samples)
    start = given.out / "generator" / BEST
    falling = schedule(further, cooldown=1.0, learning_rate=0.2 * alone.training.learning_rate)
    longer = given.out / "generator, longer"
    put_scores(
        table, longer.name, trained(read("qsmgan", falling), longer, start=start, beside=first),
        samples,
    )  # fmt: skip
    before = further // 4
    adversarial = read("qsmgan-adversarial", {
        "adversary": {"alone": before, "width": 8},
        "training": {**schedule(before + further)["training"], "optimizer": "adam",
                     "learning_rate": 1e-4, "betas": [0.5, 0.999], "warmup": 0, "cooldown": 0.0},
    }, config="qsmgan")  # fmt: skip
    together = trained(adversarial, given.out / "with the critic", start=start, beside=first)
    put_scores(table, "generator with the critic", together, samples)
    table.print()


# Jochmann et al., Figure 5

SHAPES: dict[str, Changes] = {
    "B: as proposed": {},
    "C: without noise": {"measurement": {"snr": (1e6, 1e6)}},
    "D: small shapes alone": {"options": {"small_only": True, "size": None}},
    "E: no rim without sources": {"options": {"rim": None}},
}
"""What is other than in the proposed training."""


def shapes(given: argparse.Namespace) -> None:
    """Compare small U-Nets, each trained on other shapes, on the same unseen ones."""

    def recipe(changes: Changes) -> Recipe:
        options = {"shape": (32, 32, 32), "rim": (2, 4), "count": (20, 40), "size": (1.0, 8.0)}
        options |= changes.get("options", {})
        return from_table(Recipe, {
            "network": {"architecture": "unet", "options": {"width": 8, "depth": 2}},
            "contract": {"scale": 10.0, "output_scale": 10.0},
            "data": {
                "source": "shapes",
                "options": {key: value for key, value in options.items()
                            if value is not None or key == "rim"},
                "augmentation": {},
                "measurement": {"snr": (20.0, 200.0)} | changes.get("measurement", {}),
            },
            "training": {
                "loss": "scale-invariant", "learning_rate": 3e-3, "batch": 4,
                "decay": 0.5, "decay_steps": max(given.steps // 5, 1), "validation_samples": 16,
                **schedule(given.steps)["training"],
            },
        }, "the recipe")  # fmt: skip

    samples = recipe({}).data.samples(seed=99, device="cpu")
    table = Table("training")
    for name, changes in SHAPES.items():
        trainer = trained(recipe(changes), given.out / name)
        row = parts_of_error(trainer, samples)
        table.add(name, row)
        print(name, row, flush=True)
    table.print()


def parts_of_error(trainer: Trainer, samples: Samples) -> dict[str, float]:
    """Where the error lies: all, at the border, off it, and in means over 8^3 voxels (%)."""
    error: dict[str, list[Tensor]] = {}
    truth: dict[str, list[Tensor]] = {}
    for found, chi, mask in maps(trainer, samples):
        wrong = (found - chi) * mask
        border = torch.ones_like(mask)
        border[6:-6, 6:-6, 6:-6] = False
        pooled = [torch.nn.functional.avg_pool3d(one[None], 8) for one in (wrong, chi)]
        for name, (a, b) in {
            "NRMSE": (wrong, chi),
            "border": (wrong[border], chi[border]),
            "middle": (wrong[~border], chi[~border]),
            "large scale": pooled,
        }.items():
            error.setdefault(name, []).append(a.flatten())
            truth.setdefault(name, []).append(b.flatten())
    return {
        f"{name} (%)": 100 * float(torch.cat(error[name]).norm() / torch.cat(truth[name]).norm())
        for name in error
    }


STEPS = {shapes: 800, resolutions: 800, ablations: 600, critic: 400}
"""Of each network."""


def main() -> None:
    """Read the section, and run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sections = parser.add_subparsers(required=True)
    for section, steps in STEPS.items():
        sub = sections.add_parser(section.__name__, help=section.__doc__)
        sub.set_defaults(section=section)
        sub.add_argument("--out", type=Path, required=True, help="where trainings are kept")
        sub.add_argument("--steps", type=int, default=steps, help="of each network")
    given = parser.parse_args()
    given.out /= given.section.__name__
    given.section(given)


if __name__ == "__main__":
    main()
