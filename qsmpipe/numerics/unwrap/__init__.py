"""Phase unwrapping: the Laplacian for a smooth answer, ROMEO for an exact one."""
