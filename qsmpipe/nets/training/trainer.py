"""Training: steps, validation, checkpoints. A training that was killed goes on to the same curve.

Sample ``i`` follows from the seed and ``i`` alone, the learning rate from the step alone; all else
is in the checkpoint.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qsmpipe.nets.architectures import build
from qsmpipe.nets.cards import read_parameters
from qsmpipe.nets.common import Network, load_parameters
from qsmpipe.nets.qsmgan import Critic
from qsmpipe.nets.training.dataset import Samples
from qsmpipe.nets.training.losses import LOSSES, gradient_penalty
from qsmpipe.nets.training.muon import Muon
from qsmpipe.nets.training.recipe import Recipe
from qsmpipe.nets.training.sample import Batch
from qsmpipe.nets.weights import WEIGHTS_SUFFIX

LAST, BEST = "last.pt", "best.pt"
"""Checkpoints, in the folder of the training."""


class Record(NamedTuple):
    """A row of the curve."""

    step: int
    """Steps done."""
    seconds: float
    """Of training so far, over all its runs."""
    learning_rate: float
    loss: float
    """Mean over the steps since the last row."""
    nrmse: float
    """Of validation: norm of the error over that of the truth, in the masks (%)."""
    slope: float
    """Of validation: of the line through 0 of found on true susceptibility; 1 is best."""


class StepBatch(NamedTuple):
    """A batch as the network sees it."""

    images: Tensor
    target: Tensor
    mask: Tensor
    condition: tuple[Tensor, ...]


@dataclass
class Trainer:
    """A network, and what leads it from its first step to its last.

    Parameters
    ----------
    recipe : Recipe
    samples, validation : Samples
        On the device that is trained on.
    folder : Path
        Where checkpoints are kept.

    Raises
    ------
    ValueError
        If recipe, samples and network do not fit together.
    """

    recipe: Recipe
    samples: Samples
    validation: Samples
    folder: Path
    step: int = 0
    seconds: float = 0.0
    curve: list[Record] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Of the steps since the last row of the curve."""
    stopping: bool = False
    """Set by whoever wants the run to end after the step in progress, as by Ctrl-C."""
    whole: bool = True
    """Whether no step is half done, so that a checkpoint may be written."""

    def __post_init__(self) -> None:
        schedule = self.recipe.training
        self.device = torch.device(self.samples.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(schedule.seed)
            blueprint = self.recipe.network
            self.network: Network = build(blueprint.architecture, blueprint.options)
            self.critic = self._critic()
        self.network.to(self.device)
        self.network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.optimizer = self._optimizer(self.network)
        self.critic_optimizer = None if self.critic is None else self._optimizer(self.critic)
        self.loss = LOSSES[schedule.loss]
        self._checked: list[Batch] | None = None
        # What does not fit together is found now, not after hours in a queue.
        self.network.check(self._batch(0).images)

    def _critic(self) -> Critic | None:
        adversary = self.recipe.adversary
        if adversary is None:
            return None
        shape = {n - 2 * self.network.crop for n in self.samples[0].chi.shape}
        if len(shape) != 1:
            raise ValueError(f"the critic takes cubes, but samples give edges of {sorted(shape)}")
        return Critic(width=adversary.width, patch=shape.pop()).to(self.device)

    def _optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        schedule = self.recipe.training
        common: dict[str, Any] = {
            "lr": schedule.learning_rate, "weight_decay": schedule.weight_decay,
        }  # fmt: skip
        if schedule.optimizer == "rmsprop":
            return torch.optim.RMSprop(network.parameters(), **common)
        kind = Muon if schedule.optimizer == "muon" else torch.optim.Adam
        return kind(network.parameters(), betas=schedule.betas, **common)

    # -----------------------------------------------------------------------------------------
    # Steps
    # -----------------------------------------------------------------------------------------

    def run(
        self,
        *,
        max_hours: float | None = None,
        after_step: Callable[["Trainer"], None] = lambda trainer: None,
    ) -> bool:
        """Train to the last step, or until the time is up; the checkpoint is kept.

        Parameters
        ----------
        max_hours : float, optional
            Of this run.
        after_step : callable
            Is told after every step.

        Returns
        -------
        bool
            Whether the last step was reached.

        Raises
        ------
        KeyboardInterrupt
            If it was told to stop.
        """
        schedule, begin, before = self.recipe.training, time.monotonic(), self.seconds
        while self.step < schedule.steps:
            if self.stopping:
                raise KeyboardInterrupt
            if max_hours is not None and time.monotonic() - begin > 3600 * max_hours:
                self.save(LAST)
                return False
            self.losses.append(self._one_step())
            self.step += 1
            self.whole = True
            self.seconds = before + time.monotonic() - begin
            if self.step % schedule.validate_every == 0 or self.step == schedule.steps:
                self._note()
            after_step(self)
        return True

    def _one_step(self) -> float:
        rate = self.recipe.training.rate(self.step)
        for optimizer in (self.optimizer, self.critic_optimizer):
            for group in optimizer.param_groups if optimizer is not None else ():
                group["lr"] = rate
        if self.recipe.adversary is None:
            return self._follow(self.recipe.training.batch * self.step)
        return self._with_critic()

    def _follow(self, first: int) -> float:
        """Update the network by the samples from number ``first``."""
        self.whole = False
        self._training_mode()
        batch = self._batch(first)
        with self._precision():
            output = self.network(batch.images, *batch.condition)
        loss = self.loss(output.float(), batch.target, batch.mask)
        adversary = self.recipe.adversary
        if adversary is not None and self.critic is not None:
            score = self.critic(output.float()).mean()
            loss = adversary.content * loss - adversary.adversarial * score
        _update(self.optimizer, loss, clip=self.recipe.training.clip)
        return loss.item()

    def _training_mode(self) -> None:
        """Batch normalisation by the batch, until it is frozen."""
        self.network.train()
        frozen_after = self.recipe.training.frozen_after
        if frozen_after is not None and self.step >= frozen_after:
            for layer in self.network.modules():
                if isinstance(layer, nn.BatchNorm3d):
                    layer.eval()

    def _with_critic(self) -> float:
        adversary = self.recipe.adversary
        assert adversary is not None
        size = self.recipe.training.batch
        alone = self.step < adversary.alone
        each = adversary.updates + 1
        # The critic alone sees one batch a step, and then each step has batches of its own.
        first = self.step if alone else adversary.alone + (self.step - adversary.alone) * each
        for n in range(1 if alone else adversary.updates):
            score = self._criticise(size * (first + n))
        return score if alone else self._follow(size * (first + adversary.updates))

    def _criticise(self, first: int) -> float:
        """Update the critic; its loss."""
        assert self.critic is not None
        assert self.critic_optimizer is not None
        assert self.recipe.adversary is not None
        self.whole = False
        self._training_mode()
        batch = self._batch(first)
        with torch.no_grad(), self._precision():
            made = self.network(batch.images, *batch.condition).float()
        share = torch.rand(len(made), generator=torch.Generator().manual_seed(first))
        penalty = gradient_penalty(self.critic, batch.target, made, share.to(made))
        distance = self.critic(made).mean() - self.critic(batch.target).mean()
        loss = distance + self.recipe.adversary.penalty * penalty
        _update(self.critic_optimizer, loss)
        return loss.item()

    def _precision(self) -> torch.autocast:
        wanted = self.recipe.training.precision
        enabled = wanted == "bfloat16" or (wanted == "auto" and has_bfloat16(self.device))
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _batch(self, first: int) -> StepBatch:
        return self._seen(self.samples.batch(range(first, first + self.recipe.training.batch)))

    def _seen(self, batch: Batch) -> StepBatch:
        """Show the network what its contract says; target and mask lack what it crops."""
        contract, crop = self.recipe.contract, self.network.crop
        images = contract.images(field=batch.field, mask=batch.mask, filtered=batch.filtered)
        x, y, z = (slice(crop, n - crop) for n in images.shape[-3:])
        return StepBatch(
            images.contiguous(memory_format=torch.channels_last_3d),
            contract.target(batch.chi)[..., x, y, z],
            batch.mask[..., x, y, z],
            self.network.condition(batch.zooms),
        )

    # -----------------------------------------------------------------------------------------
    # Validation
    # -----------------------------------------------------------------------------------------

    def _note(self) -> None:
        nrmse, slope = self.validate()
        rate = self.recipe.training.rate(self.step)
        loss = sum(self.losses) / max(len(self.losses), 1)
        best = min((row.nrmse for row in self.curve), default=float("inf"))
        self.curve.append(Record(self.step, self.seconds, rate, loss, nrmse, slope))
        self.losses = []
        self.save(LAST)
        if nrmse < best:
            self.save(BEST)

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """Norm of the error over that of the truth (%), and slope of found on true."""
        self.network.eval()
        error = truth = product = 0.0
        for batch in self._validation_batches():
            found, seen = self.map(batch)
            found = found[seen.mask].double()
            true = self.recipe.contract.susceptibility(seen.target)[seen.mask].double()
            error += (found - true).square().sum().item()
            truth += true.square().sum().item()
            product += (found * true).sum().item()
        if truth == 0:
            raise ValueError("the validation samples hold no susceptibility: take other ones")
        return 100 * (error / truth) ** 0.5, product / truth

    def map(self, batch: Batch) -> tuple[Tensor, StepBatch]:
        """Susceptibility (ppm) that the network finds in a batch, and what it was shown of it."""
        seen = self._seen(batch)
        with self._precision():
            output = self.network(seen.images, *seen.condition)
        return self.recipe.contract.susceptibility(output.float()), seen

    def _validation_batches(self) -> Iterator[Batch]:
        """Give the same samples each time; they are made once."""
        if self._checked is None:
            schedule = self.recipe.training
            numbers = range(schedule.validation_samples)
            self._checked = [
                self.validation.batch(numbers[first : first + schedule.batch])
                for first in range(0, len(numbers), schedule.batch)
            ]
        return iter(self._checked)

    # -----------------------------------------------------------------------------------------
    # Checkpoints
    # -----------------------------------------------------------------------------------------

    def save(self, name: str) -> None:
        """Write a checkpoint; the one before it stays until it is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "curve": [tuple(row) for row in self.curve],
            "losses": self.losses,
        }
        if self.critic is not None and self.critic_optimizer is not None:
            state |= {
                "critic": self.critic.state_dict(),
                "critic_optimizer": self.critic_optimizer.state_dict(),
            }
        part = self.folder / f".{name}.part"
        torch.save(state, part)
        os.replace(part, self.folder / name)

    def save_if_whole(self) -> None:
        """Write the last checkpoint, unless an interrupt has left half of a step in the network.

        That step would be done twice, and the curve be another one.
        """
        if self.whole:
            self.save(LAST)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of the same recipe.

        Raises
        ------
        ValueError
            If it is of another network.
        """
        state = torch.load(path, map_location=self.device, weights_only=True)
        load_parameters(self.network, state["network"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.critic is not None and self.critic_optimizer is not None:
            load_parameters(self.critic, state.get("critic", {}), path)
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.curve = [Record(*row) for row in state["curve"]]
        self.losses = list(state["losses"])

    def start_from(self, path: Path) -> None:
        """Take over the parameters of a checkpoint or of weights, and begin at the first step.

        Raises
        ------
        ValueError
            If they are of another network.
        """
        if path.suffix == WEIGHTS_SUFFIX:
            state = read_parameters(path)
        else:
            state = torch.load(path, map_location=self.device, weights_only=True)["network"]
        self.network.begin_from(state, path)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 by instructions of its own."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = (getattr(torch.cpu, name, None) for name in (
        "_is_avx512_bf16_supported", "_is_amx_tile_supported"))  # fmt: skip
    return any(ask() for ask in known if ask is not None)


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, *, clip: float | None = None) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if clip is not None:
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
