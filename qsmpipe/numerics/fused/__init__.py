"""The memory-bound steps of the iterations, each in one pass over the grid.

Every step has two bodies: loops compiled by numba for the CPU, and torch operations for CUDA,
which are also the oracle of the loops' test. The steps write to their arguments: here alone, and
each says to which.

The loops run in blocks of a fixed size whatever the number of threads, and add up what the blocks
found in their order, with strict IEEE arithmetic: results depend on neither the number of threads
nor their timing. Threads are those of :func:`numba.set_num_threads`. Compiled code is cached on
disk where numba finds a folder that it may write to (``NUMBA_CACHE_DIR`` names one); elsewhere
every process compiles it again.
"""
