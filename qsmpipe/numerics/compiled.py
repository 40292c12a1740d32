"""Loops compiled by numba, with strict IEEE arithmetic, cached on disk where that is possible."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile by numba, cached on disk where that is possible."""

    def compile_(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            kernel = numba.njit(cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's can be written to
            return numba.njit(**options)(function)
        # A user without a home gets a cache relative to whatever folder is current by then.
        if Path(kernel.stats.cache_path).is_absolute():
            return kernel
        return numba.njit(**options)(function)

    return compile_
