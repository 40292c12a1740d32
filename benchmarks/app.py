"""Whole runs, from BIDS files to report: time, processor time, memory, by node and between them.

    python benchmarks/app.py /tmp/heads/head09_3T_tilt0/bids --out /tmp/app \
        --against /tmp/other-checkout --options "--preset fast"

runs this checkout and another one by turns, each into empty folders, and prints medians with
their ranges. ``--command "program {bids} {out} --option"`` takes any other program in the place of
a checkout. The first run of each fills the caches of compiled code and of the disk and does not
count. Linux only; nothing else should run beside it.

*wall* and *processor* are seconds of the whole command with all that it starts; *memory* is the
largest sum over its processes, shared pages counted once. *nodes* is the time in which at least
one node computes, *overhead* the rest of the wall time; a program that is not qsmpipe has neither.
"""

import argparse
import ctypes
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from nipype.interfaces.base import isdefined
from nipype.utils.filemanip import loadpkl

PR_SET_CHILD_SUBREAPER = 36
"""Option of Linux' ``prctl``: what our children leave running becomes our child."""
INTERVAL = 0.25
"""Between two looks at the memory (s)."""
ROOT = Path(__file__).parents[1]


@dataclass
class Cost:
    """What a run took."""

    wall: float
    processor: float
    memory: float
    """GiB."""
    first_message: float = float("nan")
    nodes: dict[str, float] = field(default_factory=dict)
    """Seconds by node."""
    computing: float = float("nan")
    """Seconds in which at least one node computes."""


def run(command: Sequence[str], environment: dict[str, str]) -> Cost:
    """Run a command to its end, and reap whatever it leaves behind."""
    before = os.times()
    begin = time.monotonic()
    process = subprocess.Popen(
        command, env=os.environ | environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    assert process.stderr is not None
    os.set_blocking(process.stderr.fileno(), False)
    peak, first, said = 0.0, float("nan"), b""
    while process.poll() is None:
        said += process.stderr.read() or b""
        if said and first != first:
            first = time.monotonic() - begin
        peak = max(peak, sum(_proportional_mb(pid) for pid in _descendants(os.getpid())))
        time.sleep(INTERVAL if first == first else 0.01)
    wall = time.monotonic() - begin
    if process.returncode:
        said += process.stderr.read() or b""
        raise SystemExit(f"{shlex.join(command)}\n{said.decode()}")
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
    after = os.times()
    used = (after.children_user - before.children_user) + (
        after.children_system - before.children_system
    )
    return Cost(wall, used, peak / 1024, first)


def _descendants(root: int) -> Iterator[int]:
    try:
        children = Path(f"/proc/{root}/task/{root}/children").read_text().split()
    except OSError:
        return
    for child in map(int, children):
        yield child
        yield from _descendants(child)


def _proportional_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))


def look_at_nodes(work: Path, cost: Cost) -> None:
    """Take from the nodes' own results when each ran."""
    spans = []
    for path in work.rglob("result_*.pklz"):
        runtime = loadpkl(path).runtime
        times = [getattr(runtime, name, None) for name in ("startTime", "endTime")]
        if not all(isdefined(at) and at for at in times):
            continue
        start, end = (datetime.fromisoformat(str(at)).timestamp() for at in times)
        name = path.parent.name
        cost.nodes[name] = cost.nodes.get(name, 0.0) + end - start
        spans.append((start, end))
    cost.computing, reached = 0.0, 0.0
    for start, end in sorted(spans):
        cost.computing += max(0.0, end - max(start, reached))
        reached = max(reached, end)


def app(bids: Path, folder: Path, options: Sequence[str], checkout: Path) -> Cost:
    """Run the app of a checkout in an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    work = folder / "work"
    words = [sys.executable, "-P", "-m", "qsmpipe", str(bids), str(folder / "out"), "participant",
             "--work-dir", str(work), "--skip-bids-validation", *options]  # fmt: skip
    cost = run(words, {"PYTHONPATH": str(checkout)})
    look_at_nodes(work, cost)
    return cost


def other(bids: Path, folder: Path, command: str) -> Cost:
    """Run another program in an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return run(shlex.split(command.format(bids=bids, out=folder)), {})


def spread(values: Sequence[float]) -> str:
    """Median, and range where there are several."""
    shown = f"{statistics.median(values):.3g}"
    return shown if len(values) == 1 else f"{shown} ({min(values):.3g} to {max(values):.3g})"


def main() -> None:
    """Run by turns, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bids", type=Path, help="a BIDS dataset")
    parser.add_argument("--out", type=Path, required=True, help="folder for what the runs write")
    parser.add_argument("--against", type=Path, help="root of another checkout")
    parser.add_argument("--command", help="another program, with {bids} and {out}")
    parser.add_argument("--options", default="", help="options of the app")
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    options = shlex.split(given.options)
    runs = {"this": lambda: app(given.bids, given.out / "this", options, ROOT)}
    if given.against:
        runs["that"] = lambda: app(given.bids, given.out / "that", options, given.against)
    if given.command:
        runs["command"] = lambda: other(given.bids, given.out / "command", given.command)
    costs: dict[str, list[Cost]] = {name: [] for name in runs}
    for turn in range(given.pairs + 1):
        for name in sorted(runs, reverse=bool(turn % 2)):
            cost = runs[name]()
            print(json.dumps({"turn": turn, "run": name} | vars(cost)), flush=True)
            if turn:
                costs[name].append(cost)
    print("\n| run | wall (s) | processor (s) | memory (GiB) | first message (s) | nodes (s) "
          "| overhead (s) |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for name, found in costs.items():
        columns = [
            [c.wall for c in found], [c.processor for c in found], [c.memory for c in found],
            [c.first_message for c in found], [c.computing for c in found],
            [c.wall - c.computing for c in found],
        ]  # fmt: skip
        print(f"| {name} | " + " | ".join(map(spread, columns)) + " |")
    nodes = dict.fromkeys(node for found in costs.values() for c in found for node in c.nodes)
    if not nodes:
        return
    print("\n| node (s) | " + " | ".join(costs) + " |\n|---|" + "---|" * len(costs))
    for node in nodes:
        cells = [[c.nodes[node] for c in found if node in c.nodes] for found in costs.values()]
        if max((max(cell) for cell in cells if cell), default=0.0) >= 0.1:
            print(f"| {node} | " + " | ".join(spread(c) if c else "" for c in cells) + " |")


if __name__ == "__main__":
    main()
