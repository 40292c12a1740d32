"""Background removal: keep the part of the field whose sources lie inside the mask."""

from qsmpipe.numerics.background.common import LocalField
from qsmpipe.numerics.background.laplace import harperella, lbv
from qsmpipe.numerics.background.pdf import pdf
from qsmpipe.numerics.background.sharp import ismv, resharp, sharp, vsharp

__all__ = ["LocalField", "harperella", "ismv", "lbv", "pdf", "resharp", "sharp", "vsharp"]
