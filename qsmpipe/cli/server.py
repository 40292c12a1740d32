"""The server from which the processes of nodes are forked, with their imports done."""

import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

PRELOAD = ["qsmpipe.workflows", "qsmpipe.reports.figures", "qsmpipe.reports.numbers"]
"""What the server imports, once."""


def start_server() -> ForkServerContext:
    """Start the server, unless it runs, and do not wait until it has imported everything.

    It takes some seconds, in which the caller has other things to do. Threads of OpenMP that
    wait shall sleep: torch's, numba's and the transforms' take turns, and take a processor from
    each other where they spin.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()
    return context
