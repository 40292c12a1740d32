"""Jobs on a real Slurm, where slurmctld is installed (Debian: slurm-wlm and munge)."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest
from slurm_controller import controller, lacking, told

from qsmpipe import records

pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())

QUICK = ["--mask", "threshold", "--offset", "none", "--relaxation", "none", "--background", "none",
         "--inversion", "tfi", "--skip-bids-validation",
         "--set", "inversion.lambda=1e-3", "inversion.margin=0.0"]  # fmt: skip
FEW = ["inversion.max_iterations=2"]
FOR_EVER = ["inversion.max_iterations=100000000", "inversion.tolerance=0.0"]

PATIENCE = 300.0
"""How long a step may take on a busy machine (s)."""


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    with controller() as environment:
        yield environment


class Command:
    """The app, as its user starts it."""

    def __init__(self, slurm: dict[str, str], folder: Path, *words: str) -> None:
        self._said = folder / "said"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qsmpipe", folder / "bids", folder / "out", "participant",
             "-w", folder / "work", *QUICK, *words],
            env=slurm, stdout=self._said.open("w"), stderr=subprocess.STDOUT,
        )  # fmt: skip

    @property
    def said(self) -> str:
        return self._said.read_text()

    def wait_for(self, told: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not told():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.2)

    def end(self) -> int:
        return self.process.wait(timeout=3 * PATIENCE)


def log(out: Path, label: str, run: int) -> str:
    """Read what the job of a subject has logged, in one of the runs."""
    folders = sorted(out.glob("logs/*/run.json"))[run : run + 1]
    logs = [path for each in folders for path in each.parent.glob(f"jobs/sub-{label}_*/*.log")]
    return logs[0].read_text() if logs else ""


def inverts(out: Path, label: str) -> bool:
    return 'Executing "tfi"' in log(out, label, 0)


def processor_seconds(pid: int) -> float:
    """Tell what a process has used, with those of its own that have ended."""
    fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def app_of(job: str) -> list[int]:
    """List the processes of a job's app."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            if f"SLURM_ARRAY_TASK_ID={job}".encode() in (folder / "environ").read_bytes():
                found += [int(folder.name)] * (b"qsmpipe" in command and b"--job-of" in command)
        except OSError:
            continue
    return found


def failure(out: Path, name: str) -> str:
    (record,) = (r for r in records.read(out).current if r.name == name)
    assert record.status == "failed", record.failures
    return record.failures[-1].message


def test_each_job_ends_in_its_own_way_and_the_next_run_resumes(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    """One is cancelled, one killed, one out of time; the last one ends with the run."""
    data, out, labels = tmp_path / "bids", tmp_path / "out", ("01", "02", "03", "04")
    for label in labels:
        datasets.write(data, prefix=f"sub-{label}")
    run = Command(slurm, tmp_path, *FOR_EVER, "--slurm", "cpus-per-task=1,mem=2G,time=30")
    run.wait_for(lambda: all(inverts(out, label) for label in labels))

    before, begin = processor_seconds(run.process.pid), time.monotonic()
    time.sleep(20)
    share = (processor_seconds(run.process.pid) - before) / (time.monotonic() - begin)
    assert share < 0.02, "the command that waits costs next to nothing"

    array = told(slurm, "squeue", "-h", "-o", "%F").split()[0]
    told(slurm, "scancel", f"{array}_1")
    (pid,) = app_of("2")
    os.kill(pid, signal.SIGKILL)
    told(slurm, "scontrol", "update", f"JobId={array}_3", "TimeLimit=0:01")
    for n, label in enumerate(labels[:3], 1):
        run.wait_for(lambda n=n, label=label: f"sub-{label}: job {array}_{n} failed" in run.said)
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130, run.said
    assert "Traceback" not in run.said
    assert told(slurm, "squeue", "-h", "-t", "PD,R") == "", "the last job is cancelled"
    again = "the same command goes on from where it ended"
    assert failure(out, "sub-01") == f"job {array}_1 was cancelled; {again}"
    assert failure(out, "sub-02") == f"the app of job {array}_2 was ended by SIGKILL; {again}"
    assert failure(out, "sub-03") == (
        f"job {array}_3 ran out of its time (30): give more by --slurm time=; {again}"
    )
    (last,) = (r for r in records.read(out).current if r.name == "sub-04")
    assert (last.status, last.failures) == ("interrupted", ())

    run = Command(slurm, tmp_path, *FEW, "--slurm", "cpus-per-task=1,mem=2G,time=30")
    assert run.end() == 0, run.said
    assert "4 of 4 acquisitions done" in run.said
    for label in labels:
        assert (out / f"sub-{label}/anat/sub-{label}_Chimap.nii.gz").is_file()
        executed = re.findall(r'\[Node\] Executing "(\w+)"', log(out, label, 1))
        assert "tfi" in executed
        assert "prepare" not in executed, "what was done before stands"


def test_a_gpu_is_asked_for_and_its_lack_is_told(slurm: dict[str, str], tmp_path: Path) -> None:
    """The device file is none: CUDA sees nothing."""
    datasets.write(tmp_path / "bids")
    run = Command(slurm, tmp_path, *FEW, "--slurm", "gres=gpu:1,cpus-per-task=1,mem=2G,time=30")
    assert run.end() == 1, run.said
    assert failure(tmp_path / "out", "sub-01").endswith(
        "_1 ended with exit code 64: qsmpipe: --device cuda: no CUDA device is visible; use "
        "--device auto or cpu"
    )


def test_what_slurm_refuses_is_told_in_its_words(slurm: dict[str, str], tmp_path: Path) -> None:
    datasets.write(tmp_path / "bids")
    run = Command(slurm, tmp_path, *FEW, "--slurm", "partition=nowhere")
    assert run.end() == 1, run.said
    assert "invalid partition specified: nowhere" in failure(tmp_path / "out", "sub-01")
