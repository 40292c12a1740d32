"""What a network is given and what it gives: sign, unit and scale are data, not code."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Channel: TypeAlias = Literal["field", "mask", "filtered phase"]

LARGEST = 1 - 1e-6
"""Where the inverse of tanh ends: 7.25."""


@dataclass(frozen=True, kw_only=True)
class Contract:
    """From ppm to a network's images, and from its output to ppm.

    Attributes
    ----------
    channels : tuple of str
        Images that it takes, in their order: local field, mask as 0 and 1, or high-pass filtered
        phase (rad, positive where the field is).
    scale : float
        Factor of field or phase. Below 0 for a network whose dipole has the other sign.
    output_scale : float
        Factor of susceptibility (ppm) in what it gives.
    squashed : bool
        Whether it gives the hyperbolic tangent of that.
    """

    channels: tuple[Channel, ...] = ("field",)
    scale: float = 1.0
    output_scale: float = 1.0
    squashed: bool = False

    def __post_init__(self) -> None:
        strangers = set(self.channels) - set(get_args(Channel))
        if strangers or not self.channels:
            msg = f"channels {self.channels}: give some of {', '.join(get_args(Channel))}"
            raise ValueError(msg)
        if self.scale == 0 or self.output_scale == 0:
            msg = "a scale of 0 leaves nothing of an image: give another number"
            raise ValueError(msg)

    def images(
        self, *, field: Tensor | None, mask: Tensor, filtered: Tensor | None = None
    ) -> Tensor:
        """Stack (..., 1, X, Y, Z) images to (..., channels, X, Y, Z).

        Raises
        ------
        ValueError
            If one that the network takes is missing.
        """
        known = {"field": field, "mask": mask, "filtered phase": filtered}
        chosen = []
        for name in self.channels:
            image = known[name]
            if image is None:
                raise ValueError(f"the network takes the {name}, which is not given")
            chosen.append(image if name == "mask" else self.scale * image)
        like = next((image for image in chosen if image.is_floating_point()), None)
        chosen = [image.to(torch.get_default_dtype() if like is None else like.dtype)
                  for image in chosen]  # fmt: skip
        return torch.cat(chosen, dim=-4)

    def target(self, chi: Tensor) -> Tensor:
        """Scale ``chi`` (ppm) as the network should give it."""
        scaled = self.output_scale * chi
        return scaled.tanh() if self.squashed else scaled

    def susceptibility(self, output: Tensor) -> Tensor:
        """Susceptibility (ppm) that the network's ``output`` stands for."""
        if self.squashed:
            output = output.clamp(-LARGEST, LARGEST).atanh()
        return output / self.output_scale
