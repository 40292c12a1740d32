"""What the user sees while the graph runs: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from nipype.pipeline.engine import Node
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from qsmpipe.workflows.plan import is_plumbing, label, spoken


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
            name: self._progress.add_task(spoken(name), total=total, stage="waiting", start=False)
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
            print(f"{stamp} {spoken(acquisition)}: {stage} {done}{took}", file=sys.stderr)
