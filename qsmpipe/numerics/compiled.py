"""Loops compiled by numba, with strict IEEE arithmetic, cached on disk where that is possible."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
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


def in_pieces(kernel: Callable[..., None], count: int, *arguments: Any) -> None:
    """Call ``kernel(start, stop, *arguments)`` for pieces of ``count``, on numba's threads.

    What ``parallel=True`` does in seconds of compilation, for a kernel that gives up the GIL and
    whose pieces know nothing of each other.
    """
    threads = numba.get_num_threads()
    if threads == 1 or count < threads:
        kernel(0, count, *arguments)
        return
    edges = [count * number // threads for number in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        for piece in [
            pool.submit(kernel, start, stop, *arguments) for start, stop in pairwise(edges)
        ]:
            piece.result()
