"""``qsmpipe train``: train a network, or go on with a training."""

import argparse
import contextlib
import csv
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qsmpipe.cli.errors import Exit, RunError
from qsmpipe.cli.words import Parser
from qsmpipe.nets.recipes import recipe_names

if TYPE_CHECKING:
    from qsmpipe.nets.training.dataset import Samples
    from qsmpipe.nets.training.heads import Purpose
    from qsmpipe.nets.training.recipe import Data, Recipe
    from qsmpipe.nets.training.trainer import Record, Trainer

CURVE, PICTURE, EVENTS, RECIPE = "curve.csv", "curve.png", "tensorboard", "recipe.txt"
"""What a training's folder holds beside its checkpoints."""

PLAIN_SECONDS = 30.0
"""How often progress is told where there is no terminal."""


def main(words: Sequence[str]) -> Exit:
    """Train, and say where the best network is."""
    given = _parser().parse(words)
    if find_spec("tensorboardX") is None:
        raise RunError(
            Exit.UNAVAILABLE,
            "training writes its curves by tensorboardX, which is not installed: "
            "pip install 'qsmpipe[train]'",
        )
    from qsmpipe.nets.training.recipe import read_recipe

    try:
        recipe = read_recipe(given.network, given.config)
        trainer = _prepare(recipe, given)
    except ValueError as error:
        raise RunError(Exit.USAGE, str(error)) from error
    except OSError as error:
        raise RunError(Exit.NO_INPUT, str(error)) from error
    folder = given.output_dir
    with _stopped_by_signals(trainer), TrainingProgress(trainer) as progress:
        done = trainer.run(max_hours=given.max_hours, after_step=progress)
    if not done:
        print(f"time is up at step {trainer.step}; the same command goes on from there")
    if trainer.curve:
        from qsmpipe.nets.training.export import EXPORTED, export

        best = min(trainer.curve, key=lambda row: row.nrmse)
        export(recipe, folder, threads=_threads(trainer))
        print(
            f"best at step {best.step}: error of validation {best.nrmse:.1f} %, slope "
            f"{best.slope:.3f}; {EXPORTED} with its card, checkpoints, {CURVE} and {PICTURE} in "
            f"{folder}. To map with it: --inversion {recipe.network.architecture} --weights "
            f"{folder / EXPORTED}"
        )
    return Exit.OK


def _threads(trainer: "Trainer") -> int:
    """CPU threads of a training; 0 on a GPU."""
    import torch

    return torch.get_num_threads() if trainer.device.type == "cpu" else 0


@contextlib.contextmanager
def _stopped_by_signals(trainer: "Trainer") -> Iterator[None]:
    """Let Ctrl-C, and what a scheduler sends first, end the step in progress; a second one not."""

    def stop(number: int, frame: FrameType | None) -> None:
        trainer.stopping = True
        signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        trainer.save_if_whole()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _prepare(recipe: "Recipe", given: argparse.Namespace) -> "Trainer":
    """Make samples and trainer, and take up what there is."""
    from qsmpipe import images
    from qsmpipe.nets.training.heads import load_heads
    from qsmpipe.nets.training.trainer import LAST, Trainer

    device = _device(given.device)
    if recipe.needs_heads and given.heads is None:
        raise ValueError(
            "this recipe makes brains of label maps: give their folder by --heads, or another "
            "source of samples by --config"
        )
    seed = recipe.training.seed

    def samples(data: "Data", purpose: "Purpose", seed: int) -> "Samples":
        heads = []
        if data.source == "brains":
            print(f"reading the heads for {purpose}", file=sys.stderr)
            heads = [
                head.to(device) for head in load_heads(given.heads, purpose, read=images.read)
            ]
        return data.samples(seed=seed, device=device, heads=heads)

    folder = given.output_dir
    trainer = Trainer(
        recipe,
        samples(recipe.data, "training", seed),
        samples(recipe.validation or recipe.data, "validation", seed + 1),
        folder,
    )
    folder.mkdir(parents=True, exist_ok=True)
    described, kept = repr(recipe), folder / RECIPE
    if (folder / LAST).exists():
        if kept.read_text() != described:
            raise ValueError(
                f"{folder} holds a training by another recipe ({kept}): give another folder, or "
                "the same options as then"
            )
        trainer.resume(folder / LAST)
        print(f"going on from step {trainer.step} in {folder}", file=sys.stderr)
    elif given.start is not None:
        trainer.start_from(given.start)
    kept.write_text(described)
    return trainer


class TrainingProgress:
    """Tells how far a training is: a bar with the time left on a terminal, lines elsewhere."""

    def __init__(self, trainer: "Trainer") -> None:
        """Begin where the trainer stands."""
        self._console = Console(file=sys.stderr)
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
            console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        steps = trainer.recipe.training.steps
        self._task = self._bar.add_task("training", total=steps, note="", completed=trainer.step)
        self._begin, self._from = time.monotonic(), trainer.step
        self._told = self._begin
        self._folder = trainer.folder
        self._rows = len(trainer.curve)

    def __enter__(self) -> Self:
        from tensorboardX import SummaryWriter

        # Rows of a run that was killed after its last checkpoint are not shown.
        events = self._folder / EVENTS
        self._events = SummaryWriter(str(events), purge_step=self._from + 1)
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()
        self._events.close()

    def __call__(self, trainer: "Trainer") -> None:
        """After a step; new rows of the curve are written."""
        if len(trainer.curve) > self._rows:
            self._rows = len(trainer.curve)
            write_curve(trainer.curve, trainer.folder)
            row = trainer.curve[-1]
            for name in ("learning_rate", "loss", "nrmse", "slope"):
                self._events.add_scalar(name, getattr(row, name), row.step)
            note = f"loss {row.loss:.4g}, validation {row.nrmse:.1f} %"
            self._bar.update(self._task, note=note)
            self._say(trainer, note)
        elif time.monotonic() - self._told > PLAIN_SECONDS:
            self._say(trainer, f"loss {trainer.losses[-1]:.4g}")
        self._bar.update(self._task, completed=trainer.step)

    def _say(self, trainer: "Trainer", note: str) -> None:
        self._told = time.monotonic()
        if self._console.is_terminal:
            return
        steps = trainer.recipe.training.steps
        per_step = (self._told - self._begin) / max(trainer.step - self._from, 1)
        left = time.strftime("%H:%M:%S", time.gmtime(per_step * (steps - trainer.step)))
        print(f"step {trainer.step} of {steps}: {note}; {left} left", file=sys.stderr)


def write_curve(curve: Sequence["Record"], folder: Path) -> None:
    """Write the curve as CSV and as a picture."""
    with (folder / CURVE).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(curve[0]._fields)
        writer.writerows(curve)
    from qsmpipe.reports.curves import draw_training

    draw_training(curve, folder / PICTURE)


def _hours(word: str) -> float:
    hours = float(word)
    if not 0 < hours < math.inf:
        raise argparse.ArgumentTypeError(f"{word!r} are no hours: give a number above 0")
    return hours


def _device(name: str | None) -> str:
    """Choose the device; CUDA where there is one.

    Raises
    ------
    ValueError
        If there is no such device.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: {reason}; give cpu, cuda or cuda:1") from error
    return name


def _parser() -> Parser:
    parser = Parser(
        prog="qsmpipe train",
        description="Train a network on simulated data, or go on with a training.",
    )
    parser.add_argument("network", help=f"a recipe: {', '.join(recipe_names())}")
    parser.add_argument("output_dir", type=Path, help="checkpoints and curve; resumed if it has")
    parser.add_argument("--config", type=Path, help="TOML file: what is other than in the recipe")
    parser.add_argument("--heads", type=Path, help="folder of label maps, for brains")
    parser.add_argument(
        "--start", type=Path, help="checkpoint or weights to take the first parameters from"
    )
    parser.add_argument("--max-hours", type=_hours, help="stop then, the checkpoint kept")
    parser.add_argument("--device", help="cpu, cuda or cuda:1; CUDA by default where there is one")
    return parser
