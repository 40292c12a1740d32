"""What computes the nodes: this machine, a plugin of Nipype's or jobs of Slurm; a GPU or none."""

import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsmpipe import files
from qsmpipe.cli.errors import Exit, RunError
from qsmpipe.cli.queue import marks, states
from qsmpipe.settings import Settings
from qsmpipe.slurm import parse

ON_THIS_HOST = ("Linear", "MultiProc", "LegacyMultiProc")
"""Nipype's plugins that hand no node to another host."""

PROGRAMS = ("sbatch", "squeue", "scancel")
"""What ``--slurm`` calls."""

Plugin = tuple[str, dict[str, Any]]
"""Name and arguments."""


def processors(settings: Settings) -> int:
    """Count the processors that a run may use."""
    return settings.nprocs or len(os.sched_getaffinity(0))


def read_plugin(path: str) -> Plugin | None:
    """Read the plugin that the user chose; None where ``path`` is empty.

    Raises
    ------
    RunError
        If the file cannot be read, or names no plugin that can be used.
    """
    if not path:
        return None
    import yaml

    wrong = f"--use-plugin {path}: "
    try:
        chosen = yaml.safe_load(Path(path).read_bytes())
    except (OSError, yaml.YAMLError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise RunError(Exit.USAGE, f"{wrong}{reason}") from error
    plugin = chosen.get("plugin") if isinstance(chosen, dict) else None
    own = chosen.get("plugin_args", {}) if isinstance(chosen, dict) else None
    if not (isinstance(plugin, str) and isinstance(own, dict)):
        said = "it holds 'plugin: NAME', and may hold 'plugin_args: {NAME: VALUE}'"
        raise RunError(Exit.USAGE, wrong + said)
    if plugin.endswith("Graph"):
        raise RunError(
            Exit.USAGE,
            f"{wrong}{plugin} hands the graph over and never tells what became of it; use "
            f"{plugin.removesuffix('Graph')}",
        )
    from nipype.pipeline import plugins

    known = [
        name.removesuffix("Plugin")
        for name in vars(plugins)
        if name.endswith("Plugin") and not name.endswith("GraphPlugin")
    ]
    if plugin not in known:
        raise RunError(
            Exit.USAGE, f"{wrong}Nipype has no plugin {plugin!r}: choose from {', '.join(known)}"
        )
    return plugin, own


def crash_proof(name: str, arguments: Mapping[str, Any]) -> Any:
    """Make a plugin of Nipype's for which a job that is killed is an error of its node alone.

    Nipype keeps text of such a job, and fails itself when it wants to add to it as to a list.
    """
    from nipype.pipeline import plugins

    kind = getattr(plugins, f"{name}Plugin")

    def report_crash(self: Any, node: Any, result: Mapping[str, Any] | None = None) -> Any:
        if result and isinstance(result["traceback"], str):
            result = {**result, "traceback": result["traceback"].splitlines(keepends=True)}
        return kind._report_crash(self, node, result)

    return type(kind.__name__, (kind,), {"_report_crash": report_crash})(plugin_args=arguments)


def has_gpu(device: str, plugin: Plugin | None, slurm: str = "") -> bool:
    """Whether nodes shall compute on a GPU.

    Parameters
    ----------
    device : str
        What the user chose: ``auto``, ``cpu`` or ``cuda``.
    plugin
        The user's own plugin.
    slurm : str
        What jobs of Slurm ask for; with ``auto``, a GPU or none. Empty where there are no jobs.

    Raises
    ------
    RunError
        If one is asked for, and there is none where the nodes will run.
    """
    if device == "cpu":
        return False
    if slurm:
        return device == "cuda" or "gpu" in parse(slurm).get("gres", "")
    if device == "cuda" and plugin is not None and plugin[0] not in ON_THIS_HOST:
        return True  # the host that submits jobs need not have what they ask for
    import torch

    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise RunError(
            Exit.USAGE, "--device cuda: no CUDA device is visible; use --device auto or cpu"
        )
    return found


def check_slurm(settings: Settings) -> None:
    """Refuse a machine that cannot submit jobs, and a work folder that other jobs use.

    Raises
    ------
    RunError
        It says what is lacking, or which jobs they are.
    """
    if os.environ.get("QSMPIPE_CONTAINER"):
        raise RunError(
            Exit.UNAVAILABLE,
            "--slurm: jobs would start outside of this container: install qsmpipe without it, or "
            "submit containers/slurm.sh, whose jobs start the container",
        )
    if missing := [program for program in PROGRAMS if not shutil.which(program)]:
        raise RunError(
            Exit.UNAVAILABLE,
            f"--slurm: there is no {missing[0]} on the PATH: run where jobs are submitted",
        )
    left = sorted(marks(settings).glob("*"))
    arrays = " ".join(path.read_text() for path in left).split()
    known = states(arrays) if arrays else {}
    alive = [id_ for id_, state in (known or {}).items() if not state.is_final]
    if alive or known is None:
        named = sorted({id_.partition("_")[0] for id_ in alive}) or arrays
        raise RunError(
            Exit.USAGE,
            f"--slurm: jobs of an earlier run may still use {settings.work_dir}: wait for them, "
            f"or end them (scancel {' '.join(named)})",
        )
    for path in left:
        if path.read_text():  # otherwise its jobs are being submitted
            path.unlink()


def check_job(settings: Settings, run: str) -> None:
    """Refuse a job whose work folder is not that of the run that submitted it.

    Raises
    ------
    RunError
        It names folder and machine.
    """
    folder = marks(settings)
    for each in (folder.parent, folder):
        files.look_anew(each)
    if not folder.is_dir() or run not in os.listdir(folder):
        raise RunError(
            Exit.CANNOT_CREATE,
            f"the work folder {settings.work_dir} is not the same on {socket.gethostname()} as "
            "where the jobs were submitted: choose a --work-dir that all machines see",
        )
