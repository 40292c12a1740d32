"""Run the graph of the acquisitions that passed the check, and read what became of each."""

import logging
import os
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("NO_ET", "1")
os.environ.setdefault("NIPYPE_NO_ET", "1")

import nipype
from nipype.pipeline.engine import Node, Workflow
from nipype.utils.filemanip import loadpkl

from qsmpipe.checks import Examination, head_name, heads
from qsmpipe.cli.errors import Exit, RunError
from qsmpipe.cli.logs import log_to
from qsmpipe.cli.plugin import ProcessPerNode
from qsmpipe.cli.progress import RunProgress, is_plumbing, label
from qsmpipe.interfaces.lease import visible_devices
from qsmpipe.settings import Settings
from qsmpipe.workflows.base import head_workflow, init_run_wf
from qsmpipe.workflows.stage import take_gpus

Record = dict[str, Any]

ON_THIS_HOST = ("Linear", "MultiProc", "LegacyMultiProc")
"""Nipype's plugins that hand no node to another host."""


def execute(
    examinations: Sequence[Examination],
    settings: Settings,
    given: Mapping[str, Mapping[str, Path]],
    records: Mapping[str, Record],
    *,
    log_file: Path,
    verbose: int = 0,
) -> None:
    """Build the graph and run it; complete each acquisition's record."""
    log_to(log_file, ["nipype", "py.warnings"], verbose=verbose)
    for name in ("nipype.workflow", "nipype.interface", "nipype.utils"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).setLevel(logging.NOTSET)
    nipype.config.update_config(
        {
            "execution": {
                "crashdump_dir": str(log_file.parent),
                "crashfile_format": "txt",
                "poll_sleep_duration": 0.05,
                "remove_unnecessary_outputs": False,
                "stop_on_first_crash": settings.stop_on_first_crash,
                "check_version": False,
            }
        }
    )
    processors = settings.nprocs or len(os.sched_getaffinity(0))
    # Acquisitions side by side use processors better than threads of one node do.
    threads = settings.omp_nthreads or max(1, min(processors // len(examinations), 8))
    plugin = _plugin(settings)
    use_gpu = _use_gpu(settings.device, here=plugin is None or plugin[0] in ON_THIS_HOST)
    try:
        workflow = init_run_wf(examinations, settings, given, threads=threads, use_gpu=use_gpu)
    except ValueError as error:
        raise RunError(Exit.USAGE, str(error)) from error
    take_gpus(workflow)  # not all factories make their nodes by stage_wf
    nodes = _nodes(workflow)
    with RunProgress({name: len(own) for name, own in nodes.items()}) as progress:
        runner = _runner(settings, processors, log_file, progress, use_gpu=use_gpu)
        try:
            workflow.run(**runner)
        except Exception as error:
            # Nipype raises the first node's error at the end; each one stands in its crash file.
            logging.getLogger("nipype.workflow").error("%s", error)
    crashes = _crashes(log_file.parent)
    for examination in examinations:
        acquisition = examination.acquisition
        name = f"{acquisition.node_name}_wf"
        own = {node: crash for node, crash in crashes.items() if name in node.split(".")}
        _complete(records[acquisition.name], nodes[name], own, ended=progress.ended)
    for head in heads(examinations) if settings.methods("cosmos") else []:
        if not head.errors:
            name = head_workflow(head)
            own = {node: crash for node, crash in crashes.items() if name in node.split(".")}
            record = records[head_name(head)]
            _complete(record, nodes[name], own, ended=progress.ended)
            if record["status"] == "failed" and not own:
                record["errors"][0]["message"] = "an acquisition that it needs was not done"


def _use_gpu(device: str, *, here: bool = True) -> bool:
    if device == "cpu":
        return False
    if device == "cuda" and not here:
        return True  # the host that submits jobs need not have what they ask for
    import torch

    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise RunError(
            Exit.USAGE, "--device cuda: no CUDA device is visible; use --device auto or cpu"
        )
    return found


def _runner(
    settings: Settings,
    processors: int,
    log_file: Path,
    progress: RunProgress,
    *,
    use_gpu: bool = False,
) -> dict[str, Any]:
    """Keyword arguments of ``Workflow.run``."""
    arguments: dict[str, Any] = {
        "n_procs": processors,
        "raise_insufficient": False,
        "status_callback": progress,
        "log_file": str(log_file),
    }
    if settings.mem_gb:
        arguments["memory_gb"] = settings.mem_gb
    if use_gpu:
        # Nipype would count what this run may not use as well, and 0 sets no bound at all.
        arguments["n_gpu_procs"] = max(1, len(visible_devices()))
    chosen = _plugin(settings)
    if chosen is None:
        return {"plugin": ProcessPerNode(arguments)}
    plugin, own = chosen
    del arguments["log_file"]
    return {"plugin": plugin, "plugin_args": arguments | own}


def _plugin(settings: Settings) -> tuple[str, dict[str, Any]] | None:
    """Read the name and the arguments of the plugin that the user chose."""
    if not settings.use_plugin:
        return None
    import yaml

    try:
        chosen = yaml.safe_load(Path(settings.use_plugin).read_text())
        plugin, own = chosen["plugin"], chosen.get("plugin_args", {})
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            Exit.USAGE,
            f"--use-plugin {settings.use_plugin}: {error}; it holds 'plugin: NAME' and "
            "'plugin_args: {{...}}'",
        ) from error
    if plugin.endswith("Graph"):
        raise RunError(
            Exit.USAGE,
            f"--use-plugin {settings.use_plugin}: {plugin} hands the graph over and never tells "
            f"what became of it; use {plugin.removesuffix('Graph')}",
        )
    return plugin, own


def _nodes(workflow: Workflow) -> dict[str, list[Node]]:
    """Nodes that compute something, by the name of their acquisition's workflow."""
    nodes: dict[str, list[Node]] = defaultdict(list)
    for node in workflow._create_flat_graph().nodes():
        if not is_plumbing(node):
            node.base_dir = workflow.base_dir
            nodes[node.fullname.split(".")[2]].append(node)
    return nodes


def _crashes(folder: Path) -> dict[str, tuple[str, str]]:
    """Node to the last line of its traceback and its crash file."""
    crashes = {}
    for path in sorted(folder.glob("crash-*.txt")):
        text = path.read_text(errors="replace")
        if name := re.search(r"^Node: (\S+)", text, re.MULTILINE):
            crashes[name[1]] = _cause(text), str(path)
    return crashes


def _cause(text: str) -> str:
    """Give the exception that a traceback ends in, on one line."""
    raised = re.findall(r"^\s*(?:\w+\.)*(\w*(?:Error|Exception|Interrupt))\b:? ?(.*)$", text, re.M)
    own = [pair for pair in raised if pair[0] != "NodeExecutionError"]
    kind, message = (own or raised or [("Error", text.strip().splitlines()[-1])])[-1]
    return message if kind in ("ValueError", "RuntimeError") and message else f"{kind}: {message}"


def _complete(
    record: Record,
    nodes: Sequence[Node],
    crashes: Mapping[str, tuple[str, str]],
    *,
    ended: Collection[str],
) -> None:
    """Write into ``record`` what the nodes left behind.

    A result on disk counts only if its node ``ended`` in this run: an earlier run's may be stale.
    """
    for fullname, (message, crash_file) in crashes.items():
        name = label(fullname.split(".")[3:])
        record["errors"].append({"node": name, "message": message, "crash_file": crash_file})
    for node in nodes:
        name = label(node.fullname.split(".")[3:])
        result = Path(node.output_dir()) / f"result_{node.name}.pklz"
        if node.fullname in crashes or node.fullname not in ended or not result.exists():
            record["nodes"].append(
                {
                    "name": name,
                    "wall_seconds": None,
                    "peak_memory_mb": None,
                    "status": "failed" if node.fullname in crashes else "not run",
                }
            )
            continue
        loaded = loadpkl(result)
        runtime, outputs = loaded.runtime, loaded.outputs
        record["nodes"].append(
            {
                "name": name,
                "wall_seconds": getattr(runtime, "wall_seconds", runtime.duration),
                "peak_memory_mb": getattr(runtime, "peak_memory_mb", None),
                "status": "done",
            }
        )
        if node.name == "derivatives":
            record |= {"status": "done", **outputs.record}
    if record["status"] != "done":
        record["status"] = "failed"
        if not record["errors"]:
            record["errors"].append(
                {
                    "node": "run",
                    "message": "the run ended before this acquisition was done; run it again",
                    "crash_file": "",
                }
            )
