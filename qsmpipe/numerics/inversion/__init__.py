"""Dipole inversion: from the local field to susceptibility."""

from qsmpipe.numerics.inversion.common import Susceptibility
from qsmpipe.numerics.inversion.direct import l2, tkd
from qsmpipe.numerics.inversion.rts import rts
from qsmpipe.numerics.inversion.tv import tv

__all__ = ["Susceptibility", "l2", "rts", "tkd", "tv"]
