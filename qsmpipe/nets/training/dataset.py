"""Samples by number: what a training loop asks for."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from qsmpipe.nets.training.augment import Augmentation
from qsmpipe.nets.training.draws import Draws
from qsmpipe.nets.training.measure import Measurement
from qsmpipe.nets.training.sample import Batch, Sample, stack


class Source(Protocol):
    """What draws true samples: ``Shapes``, ``Analytic``, ``Brains``."""

    def draw(self, draws: Draws, device: torch.device) -> Sample:
        """Draw a sample, without noise."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Endless samples: number ``i`` follows from the seed and ``i`` alone.

    A training that goes on after a break, or on several workers, sees the same data. Sources are
    drawn first: they stay the same whatever is done to them later. Where drawing them takes longer
    than a step of the network, a pool of them is drawn once; each time one comes back it is
    augmented and measured anew.

    Parameters
    ----------
    source : Source
        Of true samples.
    augmentation : Augmentation, or None
        Comes next.
    measurement : Measurement, or None
        Comes last; None leaves the true field.
    pool : int, or None
        So many different sources, kept in memory; None draws one for each sample.
    seed : int
        0 or above.
    device : str or torch.device
        Where samples are made.
    """

    source: Source
    augmentation: Augmentation | None = field(default_factory=Augmentation)
    measurement: Measurement | None = field(default_factory=Measurement)
    pool: int | None = None
    seed: int = 0
    device: str | torch.device = "cpu"
    _pooled: dict[int, Sample] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.pool is not None and self.pool < 1:
            raise ValueError(f"pool is {self.pool}: give the sources to keep, 1 or more")

    def __getitem__(self, index: int) -> Sample:
        """Make a sample."""
        sample, draws = self._source(index)
        if self.augmentation is not None:
            sample = self.augmentation(sample, draws)
        if self.measurement is not None:
            sample = self.measurement(sample, draws)
        return sample.cut()

    def _source(self, index: int) -> tuple[Sample, Draws]:
        """Give what a sample is made of, and the draws for all else."""
        device = torch.device(self.device)
        if self.pool is None:
            draws = Draws.of(self.seed, index)
            return self.source.draw(draws, device), draws
        number = index % self.pool
        if number not in self._pooled:
            self._pooled[number] = self.source.draw(Draws.of(self.seed, number), device)
        # Draws below the pool's size are those of sources.
        return self._pooled[number], Draws.of(self.seed, self.pool + index)

    def forget(self) -> None:
        """Free the pool's memory; drawn again, its sources are the same."""
        self._pooled.clear()

    def batch(self, indices: Iterable[int]) -> Batch:
        """Make samples and stack them."""
        return stack([self[index] for index in indices])
