"""What a training consists of, read from TOML: network, data, loss, steps."""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch

from qsmpipe.nets.architectures import Blueprint
from qsmpipe.nets.contract import Contract
from qsmpipe.nets.recipes import RECIPES, recipe_names
from qsmpipe.nets.tables import from_table, merged
from qsmpipe.nets.training.analytic import Analytic
from qsmpipe.nets.training.augment import Augmentation
from qsmpipe.nets.training.brains import Brains
from qsmpipe.nets.training.dataset import Samples, Source
from qsmpipe.nets.training.heads import LabelMap
from qsmpipe.nets.training.losses import LOSSES
from qsmpipe.nets.training.measure import Measurement
from qsmpipe.nets.training.sample import Scans
from qsmpipe.nets.training.shapes import Shapes

Precision: TypeAlias = Literal["auto", "float32", "bfloat16"]
Optimizer: TypeAlias = Literal["adam", "rmsprop", "muon"]

SOURCES: dict[str, Callable[..., Source]] = {
    "shapes": Shapes, "analytic": Analytic, "brains": Brains,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which samples."""

    source: str
    """A key of :data:`SOURCES`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of its class."""
    scans: Scans | None = None
    """The source's own by default."""
    augmentation: Augmentation | None = None
    measurement: Measurement | None = None
    pool: int | None = None
    """So many different sources, drawn once; see :class:`.dataset.Samples`."""

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
    steps: int
    batch: int
    """Samples of a step."""
    learning_rate: float
    optimizer: Optimizer = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    """Of Adam, which :class:`.muon.Muon` has in it."""
    weight_decay: float = 0.0
    """Weight of half the squared parameters in the loss."""
    decay: float = 1.0
    """Factor of the learning rate every ``decay_steps`` steps, smoothly in between."""
    decay_steps: int = 1000
    warmup: int = 0
    """First steps, over which the learning rate rises from 0."""
    cooldown: float = 0.0
    """Share of the steps, the last ones, over which the learning rate falls to 0."""
    frozen_after: int | None = None
    """Steps after which batch normalisation keeps its running statistics. Normalised by itself, a
    small batch does not tell how strong its fields are, which a map must."""
    clip: float | None = None
    """Longest gradient that is followed as it is; longer ones are shortened to this."""
    seed: int = 0
    """Of the parameters and of the samples; those of validation have the next one."""
    precision: Precision = "auto"
    """Of the network's features; "auto" is bfloat16 where the processor has instructions for it.
    Without them it is much slower than float32."""
    validate_every: int = 500
    """Steps."""
    validation_samples: int = 16

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss is {self.loss!r}: give one of {', '.join(LOSSES)}")
        for name, known in (
            ("optimizer", get_args(Optimizer)),
            ("precision", get_args(Precision)),
        ):
            if getattr(self, name) not in known:
                given = getattr(self, name)
                raise ValueError(f"{name} is {given!r}: give one of {', '.join(known)}")
        if self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup}: give steps, 0 or more")
        if not 0 <= self.cooldown <= 1:
            raise ValueError(f"cooldown is {self.cooldown}: give a share of the steps, 0 to 1")
        for name in ("steps", "batch", "learning_rate", "decay", "decay_steps", "validate_every",
                     "validation_samples"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0")

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

    alone: int = 20_000
    updates: int = 5
    penalty: float = 100.0
    """Weight of the gradient penalty."""
    content: float = 1.0
    """Weight of the schedule's loss."""
    adversarial: float = 0.01
    """Weight of the critic's score."""
    width: int = 32
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

    def __post_init__(self) -> None:
        for data in (self.data, self.validation):
            if data is not None and data.source not in SOURCES:
                raise ValueError(f"source is {data.source!r}: give one of {', '.join(SOURCES)}")

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
    table = tomllib.loads((RECIPES / f"{name}.toml").read_text())
    where = name if config is None else str(config)
    try:
        if config is not None:
            table = merged(table, tomllib.loads(config.read_text()))
        return from_table(Recipe, merged(table, changes or {}), "the recipe")
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
