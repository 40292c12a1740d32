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
    drawn first: they stay the same whatever is done to them later.

    Parameters
    ----------
    source : Source
        Of true samples.
    augmentation : Augmentation, or None
        Comes next.
    measurement : Measurement, or None
        Comes last; None leaves the true field.
    seed : int
        0 or above.
    device : str or torch.device
        Where samples are made.
    """

    source: Source
    augmentation: Augmentation | None = field(default_factory=Augmentation)
    measurement: Measurement | None = field(default_factory=Measurement)
    seed: int = 0
    device: str | torch.device = "cpu"

    def __getitem__(self, index: int) -> Sample:
        """Make a sample."""
        draws = Draws.of(self.seed, index)
        sample = self.source.draw(draws, torch.device(self.device))
        if self.augmentation is not None:
            sample = self.augmentation(sample, draws)
        if self.measurement is not None:
            sample = self.measurement(sample, draws)
        return sample.cut()

    def batch(self, indices: Iterable[int]) -> Batch:
        """Make samples and stack them."""
        return stack([self[index] for index in indices])
