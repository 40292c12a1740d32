"""Random numbers of one sample: they follow from a seed and the sample's number alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

Range: TypeAlias = tuple[float, float]
"""Lowest and highest value; both alike where nothing is to be drawn."""

Direction: TypeAlias = tuple[float, float, float]

Item = TypeVar("Item")


@dataclass(frozen=True)
class Draws:
    """Numbers in the order in which they are asked for, the same on every device."""

    generator: torch.Generator

    @classmethod
    def of(cls, seed: int, index: int) -> "Draws":
        """Begin the numbers of sample ``index``, which tell nothing of those of its neighbours."""
        (state,) = np.random.SeedSequence([seed, index]).generate_state(1)
        return cls(torch.Generator().manual_seed(int(state)))

    def uniform(self, within: Range, *size: int) -> Tensor:
        """Float64 numbers within a range."""
        low, high = within
        unit = torch.rand(size, generator=self.generator, dtype=torch.float64)
        return low + (high - low) * unit

    def log_uniform(self, within: Range, *size: int) -> Tensor:
        """Numbers above 0 whose logarithms are uniform: every order of magnitude alike."""
        low, high = within
        return self.uniform((math.log(low), math.log(high)), *size).exp().clamp(low, high)

    def number(self, within: Range) -> float:
        """Give one of :meth:`uniform`."""
        return self.uniform(within).item()

    def integer(self, within: tuple[int, int]) -> int:
        """Give a whole number from the lowest to the highest, either included."""
        low, high = within
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def one_of(self, items: Sequence[Item]) -> Item:
        """Give any of the items."""
        return items[self.integer((0, len(items) - 1))]

    def chance(self, probability: float) -> bool:
        """Whether something of that probability happens."""
        return self.number((0.0, 1.0)) < probability

    def seed(self) -> int:
        """For functions that take a seed."""
        return self.integer((0, 2**31 - 1))

    def directions(self, count: int) -> Tensor:
        """Give unit vectors (count, 3), uniform on the sphere."""
        vectors = torch.randn((count, 3), generator=self.generator, dtype=torch.float64)
        return vectors / vectors.norm(dim=1, keepdim=True)

    def rotations(self, count: int, *, degrees: float = 180.0) -> Tensor:
        """Give rotations (count, 3, 3) about any axis, by up to so many degrees."""
        axes = self.directions(count)
        angles = self.uniform((-math.radians(degrees), math.radians(degrees)), count)
        cross = torch.zeros((count, 3, 3), dtype=torch.float64)
        for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
            cross[:, j, i], cross[:, i, j] = axes[:, k], -axes[:, k]
        return torch.linalg.matrix_exp(cross * angles[:, None, None])

    def tilted(self, degrees: float) -> Direction:
        """Give a direction, uniform within so many degrees of the third axis."""
        z = self.number((math.cos(math.radians(degrees)), 1.0))
        turn, across = self.number((0.0, 2 * math.pi)), math.sqrt(max(1 - z * z, 0.0))
        return across * math.cos(turn), across * math.sin(turn), z
