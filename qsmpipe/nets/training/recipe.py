"""What a training consists of, read from TOML: network, data, loss, steps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import torch
from annotated_types import Ge, Gt, Le, Lt

from qsmpipe.nets.architectures import Blueprint
from qsmpipe.nets.contract import Contract
from qsmpipe.nets.recipes import RECIPES, recipe_names
from qsmpipe.nets.training.analytic import Analytic
from qsmpipe.nets.training.augment import Augmentation
from qsmpipe.nets.training.brains import Brains
from qsmpipe.nets.training.dataset import Samples, Source
from qsmpipe.nets.training.heads import LabelMap
from qsmpipe.nets.training.losses import LOSSES
from qsmpipe.nets.training.measure import Measurement
from qsmpipe.nets.training.sample import Scans
from qsmpipe.nets.training.shapes import Shapes
from qsmpipe.tables import Options, check_keywords, from_table, merged, read_table

Precision: TypeAlias = Literal["auto", "float32", "bfloat16"]
Optimizer: TypeAlias = Literal["adam", "rmsprop", "muon"]
Share: TypeAlias = Annotated[float, Ge(0), Lt(1)]

SOURCES: dict[str, Callable[..., Source]] = {
    "shapes": Shapes, "analytic": Analytic, "brains": Brains,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which samples."""

    source: str
    """A key of :data:`SOURCES`."""
    options: Options = field(default_factory=dict)
    """Of its class."""
    scans: Scans | None = None
    """The source's own by default."""
    augmentation: Augmentation | None = None
    measurement: Measurement | None = None
    pool: Annotated[int, Gt(0)] | None = None
    """So many different sources, drawn once; see :class:`.dataset.Samples`."""

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"source is {self.source!r}: give one of {', '.join(SOURCES)}")
        check_keywords(SOURCES[self.source], self.options, "options", but=("scans", "heads"))

    def samples(
        self, *, seed: int, device: str | torch.device, heads: Sequence[LabelMap] = ()
    ) -> Samples:
        """Make them, of ``heads`` on the device if they are brains."""
        more: dict[str, Any] = {} if self.scans is None else {"scans": self.scans}
        if self.source == "brains":
            more["heads"] = heads
        source = SOURCES[self.source](**self.options, **more)
        return Samples(
            source=source,
            augmentation=self.augmentation,
            measurement=self.measurement,
            pool=self.pool,
            seed=seed,
            device=device,
        )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the network follows the loss."""

    loss: str
    """A key of :data:`.losses.LOSSES`."""
    steps: Annotated[int, Gt(0)]
    batch: Annotated[int, Gt(0)]
    """Samples of a step."""
    learning_rate: Annotated[float, Gt(0)]
    optimizer: Optimizer = "adam"
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Of Adam, which :class:`.muon.Muon` has in it."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Weight of half the squared parameters in the loss."""
    decay: Annotated[float, Gt(0)] = 1.0
    """Factor of the learning rate every ``decay_steps`` steps, smoothly in between."""
    decay_steps: Annotated[int, Gt(0)] = 1000
    warmup: Annotated[int, Ge(0)] = 0
    """First steps, over which the learning rate rises from 0."""
    cooldown: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of the steps, the last ones, over which the learning rate falls to 0."""
    frozen_after: Annotated[int, Ge(0)] | None = None
    """Steps after which batch normalisation keeps its running statistics. Normalised by itself, a
    small batch does not tell how strong its fields are, which a map must."""
    clip: Annotated[float, Gt(0)] | None = None
    """Longest gradient that is followed as it is; longer ones are shortened to this."""
    seed: int = 0
    """Of the parameters and of the samples; those of validation have the next one."""
    precision: Precision = "auto"
    """Of the network's features; "auto" is bfloat16 where the processor has instructions for it.
    Without them it is much slower than float32."""
    validate_every: Annotated[int, Gt(0)] = 500
    """Steps."""
    validation_samples: Annotated[int, Gt(0)] = 16

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss is {self.loss!r}: give one of {', '.join(LOSSES)}")

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        rate = self.learning_rate * self.decay ** (step / self.decay_steps)
        if step < self.warmup:
            rate *= (step + 1) / self.warmup
        last = self.cooldown * self.steps
        return rate * min(1.0, (self.steps - step) / last) if last else rate


@dataclass(frozen=True, kw_only=True)
class Adversary:
    """The critic of QSMGAN and its part in the loss; the network is trained before, or goes on.

    First the critic alone learns for ``alone`` steps; then each step updates it ``updates`` times
    and the network once.
    """

    alone: Annotated[int, Ge(0)] = 20_000
    updates: Annotated[int, Gt(0)] = 5
    penalty: Annotated[float, Ge(0)] = 100.0
    """Weight of the gradient penalty."""
    content: Annotated[float, Ge(0)] = 1.0
    """Weight of the schedule's loss."""
    adversarial: Annotated[float, Ge(0)] = 0.01
    """Weight of the critic's score."""
    width: Annotated[int, Gt(0)] = 32
    """Kernels in the critic's first layer."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All of a training."""

    network: Blueprint
    contract: Contract
    data: Data
    training: Schedule
    validation: Data | None = None
    """Samples that are not trained on; ``data`` under another seed, and other heads, if None."""
    adversary: Adversary | None = None
    about: Mapping[str, str] = field(default_factory=dict)
    """Paper and what else a reader should know."""

    @property
    def needs_heads(self) -> bool:
        """Whether label maps are needed."""
        return "brains" in (self.data.source, (self.validation or self.data).source)


def read_recipe(
    name: str, config: Path | None = None, changes: Mapping[str, Any] | None = None
) -> Recipe:
    """Read a recipe of the package, and change in it what a TOML file says.

    Parameters
    ----------
    name : str
        One of :func:`qsmpipe.nets.recipes.recipe_names`.
    config : Path, optional
        Its tables and keys take the place of the recipe's; all others stay. The options of a
        network or of a source stay only where it is the same one.
    changes : mapping, optional
        The same, after the file's.

    Raises
    ------
    ValueError
        Naming the file, the table and the key that is wrong.
    """
    if name not in recipe_names():
        raise ValueError(f"no recipe is called {name}: give one of {', '.join(recipe_names())}")
    table = read_table(str(RECIPES / f"{name}.toml"))
    if config is not None:
        table = merged(table, read_table(config))
    return from_table(Recipe, merged(table, changes or {}), str(config or name))
