"""A Nipype plugin that gives every node a process of its own.

Nipype's own pool waits for ever when a worker is killed, and it forks, which hangs once torch has
used threads. Here each node runs in a fresh process from a server that has the heavy imports done;
one that dies ends in an error of that node alone, and its peak memory is its own. A node and what
it starts are a process group: the group ends with the run, however the run ends.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import select
import signal
import sys
import time
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from nipype.pipeline.engine import Node
from nipype.pipeline.plugins.multiproc import MultiProcPlugin, run_node

from qsmpipe.cli.server import start_server
from qsmpipe.cli.signals import Stopped

UNGUARDED = 86
"""Exit code of a process that would run the workflow again while it imports the script."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's ``mallopt`` (malloc.h)."""

PR_SET_PDEATHSIG = 1
"""Option of Linux' ``prctl`` (sys/prctl.h)."""

GRACE = 2.0
"""Time that nodes have to end by themselves when the run is stopped (s): Docker waits for 10 s
until it kills, Slurm for 30 s, and the records are not written yet."""


def keep_freed_memory() -> None:
    """Let the process keep the memory of freed images for the next ones.

    By default glibc gives images of more than 32 MiB back to the system when they are freed, which
    clears every page that it hands out again. Without glibc nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def crash_folder(work_dir: str | Path, log_folder: Path) -> Path:
    """Where crash files go for which a run's log folder has no space."""
    return Path(work_dir) / "crashes" / log_folder.name


def end_with_run(answer: Connection) -> None:
    """Make this node a process group of its own, which ends when the run does, even if killed.

    ``answer`` leads to the run. Elsewhere than on Linux the group may outlive a killed run.
    """
    os.setsid()
    signal.signal(signal.SIGTERM, _stop)
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is None:
        return
    # The server ends when nobody holds its pipe: the run alone shall. This node ends with it.
    os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    poll = select.poll()
    poll.register(answer, 0)
    if poll.poll(0):  # nobody reads: the run ended meanwhile
        os._exit(1)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(number)


def _work(node: Node, updatehash: bool, log_file: str, answer: Connection) -> None:
    end_with_run(answer)
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
        self._context = start_server()
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

    def _report_crash(self, node: Node, result: dict[str, Any] | None = None) -> str:
        """Write a crash file; on a full disk into the work folder, or not at all."""
        logs = Path(self.plugin_args["log_file"]).parent
        for folder in (logs, crash_folder(node.base_dir, logs)):
            node.config["execution"]["crashdump_dir"] = str(folder)
            with contextlib.suppress(OSError):
                return str(super()._report_crash(node, result))
        return ""

    def run(self, graph: Any, config: Any, updatehash: bool = False) -> None:
        """Run the graph; whatever ends it, no process stays behind.

        Raises
        ------
        RuntimeError
            If the script runs its workflow whenever it is imported, as each node's process does.
        """
        self._check_script()
        gc.freeze()  # Nipype collects garbage at every submission, and all of this is none
        try:
            super().run(graph, config, updatehash)
        finally:
            gc.unfreeze()
            self._end_nodes()

    def _send_procs_to_workers(self, updatehash: bool = False, graph: Any = None) -> None:
        """Submit the nodes that are ready, if there are any."""
        if (~self.proc_done & (self.depidx.sum(axis=0) == 0)).any():
            super()._send_procs_to_workers(updatehash, graph)

    def _end_nodes(self) -> None:
        """End the groups of all nodes that still run."""
        processes = [process for process, _ in self._running.values()]
        for process in processes:
            _send(process, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            _send(process, signal.SIGKILL)
        for process in processes:
            process.join()

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


def _send(process: BaseProcess, number: signal.Signals) -> None:
    """Send a signal to the group of a node, or to the node while it has no group yet."""
    if process.pid is None:
        return
    for send in (os.killpg, os.kill) if process.is_alive() else (os.killpg,):
        with contextlib.suppress(ProcessLookupError):
            send(process.pid, number)
            return


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
