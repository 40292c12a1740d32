"""Background removal: keep the part of the field whose sources lie inside the mask."""

from qsmpipe.numerics.background.common import LocalField
from qsmpipe.numerics.background.pdf import pdf
from qsmpipe.numerics.background.sharp import resharp, vsharp

__all__ = ["LocalField", "pdf", "resharp", "vsharp"]
