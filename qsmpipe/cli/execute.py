"""Run the graph of the acquisitions that passed the check, and read what became of each."""

import logging
import multiprocessing
import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("NO_ET", "1")
os.environ.setdefault("NIPYPE_NO_ET", "1")

import nipype
from nipype.pipeline.engine import Node, Workflow
from nipype.utils.filemanip import loadpkl

from qsmpipe import records, slurm
from qsmpipe.checks import Examination, head_name, heads
from qsmpipe.cli.errors import Exit, RunError
from qsmpipe.cli.logs import log_to
from qsmpipe.cli.plugin import ProcessPerNode, crash_folder
from qsmpipe.cli.progress import RunProgress
from qsmpipe.cli.resources import (
    ON_THIS_HOST,
    Plugin,
    crash_proof,
    has_gpu,
    processors,
    read_plugin,
)
from qsmpipe.cli.signals import Stopped
from qsmpipe.derivatives import WRITER
from qsmpipe.interfaces.lease import visible_devices
from qsmpipe.records import Failure, NodeRun, Planned, Record
from qsmpipe.settings import Settings
from qsmpipe.workflows.base import head_workflow, init_acquisition_wf, init_run_wf
from qsmpipe.workflows.plan import is_plumbing, label, plans
from qsmpipe.workflows.stage import take_gpus

ENDED_EARLY = (
    "the run ended before this acquisition was done: the same command goes on from where it ended"
)

MISSES = "an acquisition that it needs was not done"

MOST_THREADS = 8
"""Threads of a node, unless the user wants more."""

logger = logging.getLogger("qsmpipe")


@dataclass(frozen=True)
class Ending:
    """How a graph's run came to its end."""

    ended: Collection[str]
    """Full names of the nodes that are done, computed or cached."""
    stopped: Stopped | None = None
    """What ended the run before its time."""
    error: Exception | None = None
    """What Nipype raised."""


@dataclass(frozen=True)
class _Crash:
    node: str
    """Full name."""
    message: str
    file: str
    stopped: bool
    """Whether the node was told to end, by a signal."""


@dataclass(frozen=True)
class Graph:
    """A graph that can be run."""

    workflow: Workflow
    workflow_names: Mapping[str, str]
    """Name of each acquisition, and of each head, to the name of its workflow."""
    unbuilt: Mapping[str, str]
    """Name of each acquisition that is not in the graph to the reason."""
    plans: Mapping[str, tuple[Planned, ...]]
    """Name of each acquisition, and of each head, to its steps."""
    use_gpu: bool
    plugin: tuple[str, dict[str, Any]] | None
    """Name and arguments of the plugin that the user chose."""


def prepare(
    examinations: Sequence[Examination],
    settings: Settings,
    given: Mapping[str, Mapping[str, Path]],
    *,
    log_file: Path,
    verbose: int = 0,
) -> Graph:
    """Build the graph of the acquisitions that passed the input check.

    Parameters
    ----------
    examinations
        Acquisitions that passed the input check.
    settings
        The run's choices.
    given
        Acquisition name to ``mask`` and ``region`` files of the user.
    log_file
        What Nipype and the nodes say goes there, crash files beside it.
    verbose
        Above 0: say more.

    Raises
    ------
    RunError
        If no acquisition's graph can be built, or the plugin or device is wrong.
    """
    threads = _threads(settings, len(examinations))
    plugin = read_plugin(settings.use_plugin)
    elsewhere = plugin is not None and plugin[0] not in ON_THIS_HOST
    _configure(log_file, settings, elsewhere=elsewhere, verbose=verbose)
    use_gpu = has_gpu(settings.device, plugin, settings.slurm)
    return _graph(examinations, settings, given, threads, use_gpu, plugin)


def rehearse(
    examinations: Sequence[Examination],
    settings: Settings,
    given: Mapping[str, Mapping[str, Path]],
) -> Graph:
    """Build the graph as :func:`prepare` does, for its plan and its needs, without a log.

    Raises
    ------
    RunError
        If no acquisition's graph can be built.
    """
    threads = _threads(settings, len(examinations))
    use_gpu = bool(settings.slurm) and has_gpu(settings.device, None, settings.slurm)
    return _graph(examinations, settings, given, threads, use_gpu, None)


def _graph(
    examinations: Sequence[Examination],
    settings: Settings,
    given: Mapping[str, Mapping[str, Path]],
    threads: int,
    use_gpu: bool,
    plugin: Plugin | None,
) -> Graph:
    workflow, unbuilt = build(examinations, settings, given, threads=threads, use_gpu=use_gpu)
    if workflow is None:
        raise RunError(Exit.USAGE, "; ".join(dict.fromkeys(unbuilt.values())))
    names = _workflow_names(examinations, settings)
    planned = plans(workflow)
    own = {name: planned.get(workflow_name, ()) for name, workflow_name in names.items()}
    return Graph(workflow, names, unbuilt, own, use_gpu, plugin)


def execute(
    graph: Graph,
    settings: Settings,
    started: Mapping[str, Record],
    *,
    log_file: Path,
    keep: Callable[[Record], object],
) -> Ending:
    """Run the graph.

    Parameters
    ----------
    graph
        As :func:`prepare` gives it.
    settings
        The run's choices.
    started
        Acquisition name to its record so far.
    log_file
        As for :func:`prepare`.
    keep
        Takes the record of each acquisition as soon as that is done: a run that is killed
        later leaves it.
    """
    nodes = computing_nodes(graph.workflow)
    names = {workflow: name for name, workflow in graph.workflow_names.items()}
    with RunProgress({name: len(own) for name, own in nodes.items()}) as progress:

        def follow(node: Node, status: str, *rest: Any) -> None:
            progress(node, status, *rest)
            if status != "end" or node.name != WRITER:
                return
            workflow = node.fullname.split(".")[2]
            record, so_far = started[names[workflow]], Ending(progress.ended)
            try:
                crashes = _crashes_in(workflow, _crashes(settings, log_file))
                record = _completed(record, nodes[workflow], crashes, so_far, ENDED_EARLY)
                if record.status == "done":
                    keep(record)
            except Exception:  # it is tried once more at the end
                logger.exception("%s: its record cannot be written yet", record.name)

        runner = _runner(graph, settings, log_file, follow)
        try:
            graph.workflow.run(**runner)
        except Stopped as stop:
            logging.getLogger("concurrent.futures").disabled = True  # a pool that ends complains
            for child in multiprocessing.active_children():  # of Nipype's own pools
                child.kill()
            return Ending(progress.ended, stopped=stop)
        except Exception as error:
            # Nipype raises the first node's error at the end; each one stands in its crash file.
            logging.getLogger("nipype.workflow").error("%s", error)
            return Ending(progress.ended, error=error)
    return Ending(progress.ended)


def complete(
    graph: Graph,
    ending: Ending,
    started: Mapping[str, Record],
    settings: Settings,
    *,
    log_file: Path,
) -> dict[str, Record]:
    """Complete the record of each acquisition that should run.

    Parameters
    ----------
    graph
        As :func:`prepare` gives it.
    ending
        As :func:`execute` gives it.
    started
        Acquisition name to its record so far.
    settings
        The run's choices.
    log_file
        As for :func:`prepare`.
    """
    nodes = computing_nodes(graph.workflow)
    crashes = _crashes(settings, log_file)
    ended = {
        name: replace(started[name], status="failed", failures=(Failure("graph", reason),))
        for name, reason in graph.unbuilt.items()
    }
    for name, workflow_name in graph.workflow_names.items():
        if name in graph.unbuilt:
            continue
        own = _crashes_in(workflow_name, crashes)
        why = MISSES if name.endswith("_desc-cosmos") else ENDED_EARLY
        if ending.error and not crashes:
            why = f"{ENDED_EARLY} ({ending.error})"
        try:
            ended[name] = _completed(started[name], nodes[workflow_name], own, ending, why)
        except Exception as error:  # of one acquisition: the others shall have their records
            logger.exception("%s: its results cannot be read", name)
            failure = Failure("record", f"its results cannot be read: {error!r}")
            ended[name] = replace(started[name], status="failed", failures=(failure,))
    return ended


def build(
    examinations: Sequence[Examination],
    settings: Settings,
    given: Mapping[str, Mapping[str, Path]],
    *,
    threads: int = 1,
    use_gpu: bool = False,
) -> tuple[Workflow | None, dict[str, str]]:
    """Build the graph of all acquisitions whose graph can be built.

    Returns
    -------
    workflow : Workflow or None
        None if there is no acquisition left.
    unbuilt : dict
        Name of each other acquisition to the reason.
    """
    chosen: dict[str, Any] = {"threads": threads, "use_gpu": use_gpu}
    unbuilt: dict[str, str] = {}
    try:
        workflow = init_run_wf(examinations, settings, given, **chosen)
    except Exception as error:
        for examination in examinations:
            name = examination.acquisition.name
            try:
                init_acquisition_wf(examination, settings, given.get(name, {}), **chosen)
            except Exception as own:
                unbuilt[name] = _told(own)
        rest = [e for e in examinations if e.acquisition.name not in unbuilt]
        if not unbuilt or not rest:
            return None, unbuilt or {e.acquisition.name: _told(error) for e in examinations}
        workflow, more = build(rest, settings, given, **chosen)
        return workflow, unbuilt | more
    take_gpus(workflow)  # not all factories make their nodes by stage_wf
    return workflow, unbuilt


def _told(error: Exception) -> str:
    """Say what was raised; a ``ValueError`` is written for the user, others are a fault here."""
    if isinstance(error, ValueError):
        return str(error)
    logger.exception("a graph cannot be built")
    return f"{type(error).__name__}: {error} (traceback in the log)"


def _workflow_names(examinations: Sequence[Examination], settings: Settings) -> dict[str, str]:
    """Name of each acquisition, and of each head, to the name of its workflow."""
    names = {e.acquisition.name: f"{e.acquisition.node_name}_wf" for e in examinations}
    joined = heads(examinations) if settings.methods("cosmos") else []
    return names | {head_name(e): head_workflow(e) for e in joined if not e.errors}


def _configure(log_file: Path, settings: Settings, *, elsewhere: bool, verbose: int) -> None:
    """Send what Nipype and the nodes say to the log file, and tell Nipype how to run.

    Of nodes that run ``elsewhere`` Nipype asks by a program, for each of them at every poll.
    """
    log_to(log_file, ["nipype", "py.warnings"], verbose=verbose)
    for name in ("nipype.workflow", "nipype.interface", "nipype.utils"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).setLevel(logging.NOTSET)
    nipype.config.update_config(
        {
            "execution": {
                "crashdump_dir": str(log_file.parent),
                "crashfile_format": "txt",
                "poll_sleep_duration": 5 if elsewhere else 0.05,
                "job_finished_timeout": 30,
                "remove_unnecessary_outputs": False,
                "stop_on_first_crash": settings.stop_on_first_crash,
                "check_version": False,
            }
        }
    )


def _threads(settings: Settings, acquisitions: int) -> int:
    """Count the threads of a node."""
    if settings.omp_nthreads:
        return settings.omp_nthreads
    if settings.slurm:  # each subject has processors of its own
        own = slurm.parse(settings.slurm).get("cpus-per-task")
        return min(int(own or settings.nprocs or slurm.PROCESSORS), MOST_THREADS)
    # Acquisitions side by side use processors better than threads of one node do.
    return max(1, min(processors(settings) // acquisitions, MOST_THREADS))


def _runner(
    graph: Graph, settings: Settings, log_file: Path, follow: Callable[..., None]
) -> dict[str, Any]:
    """Keyword arguments of ``Workflow.run``."""
    arguments: dict[str, Any] = {
        "n_procs": processors(settings),
        "raise_insufficient": False,
        "status_callback": follow,
        "log_file": str(log_file),
    }
    if settings.mem_gb:
        arguments["memory_gb"] = settings.mem_gb
    if graph.use_gpu:
        # Nipype would count what this run may not use as well, and 0 sets no bound at all.
        arguments["n_gpu_procs"] = max(1, len(visible_devices()))
    if graph.plugin is None:
        return {"plugin": ProcessPerNode(arguments)}
    plugin, own = graph.plugin
    del arguments["log_file"]
    return {"plugin": crash_proof(plugin, arguments | own)}


def computing_nodes(workflow: Workflow) -> dict[str, list[Node]]:
    """Nodes that compute something, by the name of their acquisition's workflow."""
    nodes: dict[str, list[Node]] = defaultdict(list)
    for node in workflow._create_flat_graph().nodes():
        if not is_plumbing(node):
            node.base_dir = workflow.base_dir
            nodes[node.fullname.split(".")[2]].append(node)
    return nodes


def _crashes_in(workflow: str, crashes: Sequence[_Crash]) -> list[_Crash]:
    return [crash for crash in crashes if workflow in crash.node.split(".")]


def _crashes(settings: Settings, log_file: Path) -> list[_Crash]:
    """Read which nodes crashed, and the last line of their tracebacks."""
    folders = (log_file.parent, crash_folder(settings.work_dir, log_file.parent))
    crashes = []
    for path in (path for folder in folders for path in sorted(folder.glob("crash-*.txt"))):
        text = path.read_text(errors="replace")
        if name := re.search(r"^Node: (\S+)", text, re.MULTILINE):
            stopped = "stopped by SIG" in text or "killed by SIGTERM" in text
            crashes.append(_Crash(name[1], _cause(text), str(path), stopped))
    return crashes


def _cause(text: str) -> str:
    """Give the exception that a traceback ends in, on one line."""
    raised = re.findall(r"^\s*(?:\w+\.)*(\w*(?:Error|Exception|Interrupt))\b:? ?(.*)$", text, re.M)
    own = [pair for pair in raised if pair[0] != "NodeExecutionError"]
    kind, message = (own or raised or [("Error", text.strip().splitlines()[-1])])[-1]
    return message if kind in ("ValueError", "RuntimeError") and message else f"{kind}: {message}"


def _completed(
    record: Record, nodes: Sequence[Node], crashes: Sequence[_Crash], ending: Ending, why: str
) -> Record:
    """Add to ``record`` what the nodes left behind; ``why`` it is not done if nothing crashed.

    A result on disk counts only if its node ended in this run: an earlier run's may be stale.
    Where a node crashed the last one does not count: some of Nipype's plugins say of nodes that
    they did not run that they ended.
    """
    if ending.stopped:  # a node that was told to end with the run did not fail
        crashes = [crash for crash in crashes if not crash.stopped]
    failed = {crash.node for crash in crashes}
    ran: list[NodeRun] = []
    for node in nodes:
        name = label(node.fullname.split(".")[3:])
        result = Path(node.output_dir()) / f"result_{node.name}.pklz"
        if node.fullname in failed or node.fullname not in ending.ended or not result.exists():
            ran.append(NodeRun(name, "failed" if node.fullname in failed else "not run"))
            continue
        loaded = loadpkl(result)
        runtime, outputs = loaded.runtime, loaded.outputs
        seconds = getattr(runtime, "wall_seconds", runtime.duration)
        ran.append(NodeRun(name, "done", seconds, getattr(runtime, "peak_memory_mb", None)))
        if node.name == WRITER and not crashes:
            record = replace(
                record,
                status="done",
                steps=records.take(records.Step, outputs.record["steps"]),
                numbers=records.take(records.Number, outputs.record["numbers"]),
                figures=records.take(records.Figure, outputs.record["figures"]),
            )
    failures = tuple(
        Failure(label(crash.node.split(".")[3:]), crash.message, crash.file) for crash in crashes
    )
    record = replace(record, nodes=tuple(ran), failures=failures)
    if record.status == "done":
        return record
    if ending.stopped and not failures:
        return replace(record, status="interrupted")
    return replace(record, status="failed", failures=failures or (Failure("run", why),))
