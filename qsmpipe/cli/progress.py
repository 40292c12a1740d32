"""What the user sees while the graph runs: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from nipype.interfaces.utility import IdentityInterface, Merge
from nipype.pipeline.engine import Node
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class RunProgress:
    """Follows the nodes of every acquisition through Nipype's status callback."""

    def __init__(self, totals: Mapping[str, int]) -> None:
        """Expect ``totals`` nodes per acquisition (by the name of its workflow)."""
        self._console = Console(file=sys.stderr)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[stage]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {
            name: self._progress.add_task(_spoken(name), total=total, stage="waiting", start=False)
            for name, total in totals.items()
        }
        self._began: dict[str, float] = {}
        self.ended: set[str] = set()
        """Full names of the nodes that are done, computed or cached."""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def __call__(self, node: Node, status: str, *_: Any) -> None:
        """Take a node's ``start``, ``end`` or ``exception``; plumbing is not shown."""
        acquisition = next(
            (part for part in node.fullname.split(".") if part in self._tasks), None
        )
        if status == "end":
            self.ended.add(node.fullname)
        if acquisition is None or is_plumbing(node):
            return
        task = self._tasks[acquisition]
        parts = node.fullname.split(".")
        stage = label(parts[parts.index(acquisition) + 1 :])
        if status == "start":
            self._began[node.fullname] = time.monotonic()
            self._progress.start_task(task)
            self._progress.update(task, stage=stage)
            return
        began = self._began.pop(node.fullname, None)
        done = "FAILED" if status == "exception" else "cached" if began is None else "done"
        self._progress.update(task, advance=1, stage=f"{stage} {done}")
        if not self._console.is_terminal:
            took = "" if began is None else f" in {time.monotonic() - began:.1f} s"
            stamp = time.strftime("%H:%M:%S")
            print(f"{stamp} {_spoken(acquisition)}: {stage} {done}{took}", file=sys.stderr)


def label(parts: Sequence[str]) -> str:
    """Name a node by its path within the acquisition.

    >>> label(["qsm_wf", "susceptibility_wf", "background_vsharp_wf", "vsharp"])
    'background vsharp'
    """
    shown = [
        part.removesuffix("_wf") for part in parts if part not in ("qsm_wf", "susceptibility_wf")
    ]
    return " ".join([part.removesuffix(f"_{shown[-1]}") for part in shown[:-1]] + shown[-1:])


def is_plumbing(node: Node) -> bool:
    """Whether a node computes nothing."""
    return isinstance(node.interface, IdentityInterface | Merge)


def _spoken(workflow: str) -> str:
    return workflow.removesuffix("_wf").replace("_", "-")
