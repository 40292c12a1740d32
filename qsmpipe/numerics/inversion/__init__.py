"""Dipole inversion: from the local field to susceptibility."""

from qsmpipe.numerics.inversion.common import Susceptibility
from qsmpipe.numerics.inversion.cosmos import cosmos
from qsmpipe.numerics.inversion.direct import l2, tkd, tsvd
from qsmpipe.numerics.inversion.hd import hdqsm
from qsmpipe.numerics.inversion.ilsqr import ilsqr
from qsmpipe.numerics.inversion.l1 import l1qsm
from qsmpipe.numerics.inversion.medi import medi
from qsmpipe.numerics.inversion.ndi import ndi
from qsmpipe.numerics.inversion.nonlinear import nltv
from qsmpipe.numerics.inversion.rts import rts
from qsmpipe.numerics.inversion.single_step import sstv
from qsmpipe.numerics.inversion.tfi import tfi
from qsmpipe.numerics.inversion.tgv import nltgv, tgv
from qsmpipe.numerics.inversion.tgv_phase import tgvqsm
from qsmpipe.numerics.inversion.tikhonov import tikhonov
from qsmpipe.numerics.inversion.tv import tv
from qsmpipe.numerics.inversion.two_level import two_level
from qsmpipe.numerics.inversion.weak_harmonic import whqsm

__all__ = [
    "Susceptibility",
    "cosmos",
    "hdqsm",
    "ilsqr",
    "l1qsm",
    "l2",
    "medi",
    "ndi",
    "nltgv",
    "nltv",
    "rts",
    "sstv",
    "tfi",
    "tgv",
    "tgvqsm",
    "tikhonov",
    "tkd",
    "tsvd",
    "tv",
    "two_level",
    "whqsm",
]
