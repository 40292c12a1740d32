"""Background removal."""
from qsmpipe.numerics.background.common import LocalField
from qsmpipe.numerics.background.sharp import resharp, vsharp

__all__ = ["LocalField", "resharp", "vsharp"]
