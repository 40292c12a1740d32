"""The picture of a training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


class Row(Protocol):
    """What is drawn of a validation."""

    @property
    def step(self) -> int:
        """Steps done."""

    @property
    def loss(self) -> float:
        """Mean of training."""

    @property
    def nrmse(self) -> float:
        """In %."""

    @property
    def slope(self) -> float:
        """Of found on true."""


def draw_training(curve: Sequence[Row], path: Path) -> None:
    """Draw loss, validation error and slope over the steps, the best step marked."""
    figure = Figure(figsize=(9.0, 3.0), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    steps = [row.step for row in curve]
    best = min(curve, key=lambda row: row.nrmse)
    drawn = (
        ("loss of training", [row.loss for row in curve]),
        ("error of validation (%)", [row.nrmse for row in curve]),
        ("slope of found on true", [row.slope for row in curve]),
    )
    for axes, (title, values) in zip(figure.subplots(1, 3), drawn, strict=True):
        axes.plot(steps, values, color="#1f4e79", marker=".", markersize=4, linewidth=1)
        axes.axvline(best.step, color="#b5651d", linewidth=0.8, linestyle="--")
        axes.set(title=title, xlabel="step")
        axes.title.set_fontsize(9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path)
