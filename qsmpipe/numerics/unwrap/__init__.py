"""Phase unwrapping: the Laplacian for a smooth answer, ROMEO for an exact one."""

from qsmpipe.numerics.unwrap.bestpath import bestpath
from qsmpipe.numerics.unwrap.laplacian import laplacian
from qsmpipe.numerics.unwrap.romeo import quality_map, romeo

__all__ = ["bestpath", "laplacian", "quality_map", "romeo"]
