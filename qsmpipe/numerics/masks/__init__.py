"""Masks: where there is signal, where the phase is coherent, where the brain is."""

from qsmpipe.numerics.masks.bet import bet
from qsmpipe.numerics.masks.morphology import (
    combine,
    dilate,
    erode,
    fill_holes,
    largest_component,
)
from qsmpipe.numerics.masks.passes import merge, reliable
from qsmpipe.numerics.masks.quality import quality
from qsmpipe.numerics.masks.residual import exclude_residual
from qsmpipe.numerics.masks.threshold import bias_field, threshold
from qsmpipe.numerics.masks.ventricles import ventricles

__all__ = [
    "bet",
    "bias_field",
    "combine",
    "dilate",
    "erode",
    "exclude_residual",
    "fill_holes",
    "largest_component",
    "merge",
    "quality",
    "reliable",
    "threshold",
    "ventricles",
]
