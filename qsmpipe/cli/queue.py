"""What Slurm is told and asked: arrays of jobs, their states, their end."""

import os
import re
import signal
import site
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import qsmpipe
from qsmpipe import files, records
from qsmpipe.settings import Settings
from qsmpipe.slurm import script

FINAL = frozenset({"", "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL",
                   "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"})  # fmt: skip
"""What Slurm calls jobs that have ended; empty where it knows the job no more."""

COLUMNS = "ArrayJobID:32,ArrayTaskID:32,State:32,exit_code:32,Reason:64"

AGAIN = "the same command goes on from where it ended"


class State(NamedTuple):
    """What Slurm tells of a job."""

    name: str = ""
    status: int = 0
    """As a process leaves it."""
    reason: str = ""
    """Why it waits."""

    @property
    def is_final(self) -> bool:
        """Whether the job has ended."""
        return self.name in FINAL


@dataclass(frozen=True)
class Job:
    """A task of an array: a subject."""

    id: str
    """As Slurm writes it: ``12_3``."""
    subject: str
    request: Mapping[str, str]
    """Options of ``sbatch`` by name."""
    folder: Path

    def file(self, kind: str) -> Path:
        """Path of what its script leaves (:func:`qsmpipe.slurm.script`)."""
        return self.folder / f"sub-{self.subject}.{kind}"

    @property
    def code(self) -> int | None:
        """Exit code of its app; None while there is none."""
        try:
            return int(self.file("ended").read_text())
        except (OSError, ValueError):
            return None

    def end(self, state: State) -> str:
        """Say how it ended, as far as it and Slurm tell."""
        code, name, number = self.code, f"job {self.id}", state.status & 127
        if self.file("late").exists() or state.name == "TIMEOUT":
            limit = self.request["time"]
            return f"{name} ran out of its time ({limit}): give more by --slurm time=; {AGAIN}"
        if state.name == "OUT_OF_MEMORY":
            memory = self.request["mem"]
            return f"{name} ran out of its memory ({memory}): give more by --slurm mem=; {AGAIN}"
        if state.name == "CANCELLED":
            return f"{name} was cancelled; {AGAIN}"
        if state.name in FINAL - {"", "COMPLETED", "FAILED"}:
            return f"Slurm ended {name} ({state.name}); {AGAIN}"
        if code is not None and code > 128:
            return f"the app of {name} was ended by {_signal(code - 128)}; {AGAIN}"
        if code is not None:
            return f"{name} ended with exit code {code}: {self._last_words()}"
        if number:
            return f"{name} was ended by {_signal(number)}; {AGAIN}"
        return (
            f"{name} ended and left nothing in {self.folder}, and Slurm does not tell why: can "
            "all machines write to that folder?"
        )

    def _last_words(self) -> str:
        try:
            return self.file("out").read_text(errors="replace").strip().splitlines()[-1]
        except (OSError, IndexError):
            return f"{self.file('out')} holds nothing"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def jobs_folder(settings: Settings, run: str) -> Path:
    """Folder of the scripts of a run's jobs, and of what they leave."""
    return records.log_folder(settings.output_dir, run) / "jobs"


def attempt_folder(settings: Settings, run: str) -> Path:
    """Folder of a job's log and crash files: Slurm may start a job anew."""
    subject = "-".join(settings.participant_label)
    job, attempt = (os.environ.get(f"SLURM_{v}", "0") for v in ("JOB_ID", "RESTART_COUNT"))
    return jobs_folder(settings, run) / f"sub-{subject}_{job}-{attempt}"


def mark(settings: Settings, run: str) -> Path:
    """File in the work folder that names the arrays of a run while they are in the queue."""
    return marks(settings) / run


def marks(settings: Settings) -> Path:
    """Folder of those files."""
    return Path(settings.work_dir) / "slurm"


def submit(
    subjects: Sequence[str],
    request: Mapping[str, str],
    options: Sequence[str],
    settings: Settings,
    run: str,
    *,
    throttle: str = "",
) -> list[Job]:
    """Hand an array of jobs to Slurm, one for each of ``subjects``.

    Parameters
    ----------
    subjects
        Labels.
    request
        Options of ``sbatch`` by name.
    options
        Words that each app is given beside the run's own settings.
    settings
        Those settings.
    run
        Whose jobs they are.
    throttle
        How many may run at a time; empty for any number.

    Raises
    ------
    ValueError
        If Slurm refuses them; it says why.
    """
    folder = jobs_folder(settings, run)
    folder.mkdir(exist_ok=True)
    text = script(
        [sys.executable, "-m", "qsmpipe", settings.bids_dir, settings.output_dir, "participant",
         "--config-file", str(folder.with_name("config.toml")), "--skip-bids-validation",
         "--job-of", run, *options],
        subjects, request, folder=str(folder), throttle=throttle, python_path=_python_path(),
    )  # fmt: skip
    file = files.write(folder / f"array-{len(list(folder.glob('array-*')))}.sh", text)
    done = _ask("sbatch", "--parsable", file.name, cwd=folder)
    if done.returncode:
        raise ValueError(" ".join(done.stderr.replace("sbatch: error: ", "").split()))
    number = re.search(r"^(\d+)(;|\s*$)", done.stdout, re.MULTILINE)
    if not number:
        raise ValueError(f"sbatch told no job's number, but {done.stdout.strip() or 'nothing'}")
    array = number[1]
    return [Job(f"{array}_{n}", subject, request, folder) for n, subject in enumerate(subjects, 1)]


def _python_path() -> str:
    """Where this package lies, unless jobs find it without being told."""
    folder = str(Path(qsmpipe.__file__).parents[1])
    found = {*site.getsitepackages(), site.getusersitepackages()}
    return "" if folder in found else folder


def states(jobs: Iterable[str]) -> dict[str, State] | None:
    """Ask for the states of all jobs of the arrays that ``jobs`` belong to.

    Returns
    -------
    states : dict or None
        By job; of those alone that Slurm still knows. None if it does not answer.
    """
    arrays = sorted({job.partition("_")[0] for job in jobs})
    words = ("--noheader", "--array", "--states=all", f"--Format={COLUMNS}")
    done = _ask("squeue", *words, f"--jobs={','.join(arrays)}")
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    known = {}
    for row in done.stdout.splitlines():
        array, task, name, status, reason = [*row.split(maxsplit=4), "", "", "", "", ""][:5]
        known[f"{array}_{task}"] = State(name, _status(status), reason.strip())
    return known


def _status(text: str) -> int:
    """Read how a process ended: as a number, or as ``code:signal``."""
    code, colon, number = text.partition(":")
    try:
        return int(code) << 8 | int(number) if colon else int(code)
    except ValueError:
        return 0


def cancel(jobs: Iterable[str]) -> None:
    """End all jobs of the arrays that ``jobs`` belong to."""
    if arrays := sorted({job.partition("_")[0] for job in jobs}):
        _ask("scancel", *arrays)


def _ask(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program of Slurm's; Ctrl-C is not for it."""
    try:
        return subprocess.run(
            words, cwd=cwd, capture_output=True, text=True, start_new_session=True, timeout=300
        )
    except subprocess.TimeoutExpired as error:
        return subprocess.CompletedProcess(words, 1, "", f"{words[0]} does not answer: {error}")
