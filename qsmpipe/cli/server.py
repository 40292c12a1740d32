"""The server from which the processes of nodes are forked, with their imports done."""

import multiprocessing
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

PRELOAD = ["qsmpipe.workflows", "qsmpipe.reports.figures", "qsmpipe.reports.numbers"]
"""What the server imports, once."""


def start_server() -> ForkServerContext:
    """Start the server, unless it runs, and do not wait until it has imported everything.

    It takes some seconds, in which the caller has other things to do.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()
    return context
