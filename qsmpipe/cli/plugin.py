"""A Nipype plugin that gives every node a process of its own.

Nipype's own pool waits for ever when a worker is killed, and it forks, which hangs once torch has
used threads. Here each node runs in a fresh process from a server that has the heavy imports done;
one that dies ends in an error of that node alone, and its peak memory is its own.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from nipype.pipeline.engine import Node
from nipype.pipeline.plugins.multiproc import MultiProcPlugin, run_node

PRELOAD = ["torch", "numba", "nipype.pipeline.engine", "qsmpipe.interfaces.base"]

UNGUARDED = 86
"""Exit code of a process that would run the workflow again while it imports the script."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's ``mallopt`` (malloc.h)."""


def keep_freed_memory() -> None:
    """Let the process keep the memory of freed images for the next ones.

    By default glibc gives images of more than 32 MiB back to the system when they are freed, which
    clears every page that it hands out again. Without glibc nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _work(node: Node, updatehash: bool, log_file: str, answer: Connection) -> None:
    keep_freed_memory()
    log = os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    result = run_node(node, updatehash, 0)
    with contextlib.suppress(BrokenPipeError):
        answer.send(result)


class ProcessPerNode(MultiProcPlugin):
    """MultiProc's scheduling (processors, memory, GPU slots), one process for each node."""

    def __init__(self, plugin_args: dict[str, Any]) -> None:
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            os._exit(UNGUARDED)  # a node's process, which imports the script: it must not run it
        super().__init__(plugin_args=plugin_args)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self._running: dict[int, tuple[BaseProcess, Connection]] = {}

    def _submit_job(self, node: Node, updatehash: bool = False) -> int:
        self._taskid += 1
        here, there = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_work,
            args=(node, updatehash, self.plugin_args["log_file"], there),
            name=node.fullname,
        )
        process.start()
        there.close()
        self._running[self._taskid] = process, here
        return self._taskid

    def _get_result(self, taskid: int) -> dict[str, Any] | None:
        process, answer = self._running[taskid]
        if not answer.poll():
            return None
        try:
            return answer.recv()
        except EOFError:
            process.join()
            return {"result": None, "traceback": [_death(process)]}

    def _clear_task(self, taskid: int) -> None:
        process, answer = self._running.pop(taskid)
        answer.close()
        process.join()

    def run(self, graph: Any, config: Any, updatehash: bool = False) -> None:
        """Run the graph; whatever ends it, no process stays behind.

        Raises
        ------
        RuntimeError
            If the script runs its workflow whenever it is imported, as each node's process does.
        """
        self._check_script()
        try:
            super().run(graph, config, updatehash)
        finally:
            for process, _ in self._running.values():
                process.terminate()

    def _check_script(self) -> None:
        process = self._context.Process(target=_nothing, name="a node")
        process.start()
        process.join()
        if process.exitcode == UNGUARDED:
            script = getattr(sys.modules["__main__"], "__file__", "the script")
            msg = (
                f'{script} runs its workflow outside `if __name__ == "__main__":`, and each '
                "node's process imports the script: put what runs the workflow under that line"
            )
            raise RuntimeError(msg)
        if process.exitcode:
            raise RuntimeError(_death(process).partition(": ")[2])


def _nothing() -> None:
    """Do nothing, in a process that has imported the script."""


def _death(process: BaseProcess) -> str:
    code = process.exitcode or 0
    if code >= 0:
        return f"RuntimeError: the process of {process.name} ended early with exit code {code}"
    name = signal.Signals(-code).name
    hint = (
        ": most likely the machine ran out of memory; give --mem-gb and fewer --nprocs"
        if name == "SIGKILL"
        else ""
    )
    return f"RuntimeError: the process of {process.name} was killed by {name}{hint}"
