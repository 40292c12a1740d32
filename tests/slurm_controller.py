"""A Slurm of one node, with a controller of its own in a temporary folder."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scancel", "scontrol", "runuser")

CONFIGURATION = """
ClusterName=qsmpipe
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/munge.sock
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
InactiveLimit=0
KillWait=5
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=32000 Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def lacking() -> str:
    """Say what keeps a Slurm from being started here; empty if nothing does."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    missing = [program for program in PROGRAMS if not shutil.which(program, path=path)]
    if missing:
        return f"NOT TESTED with a real Slurm: {missing[0]} is not installed here"
    return "" if os.geteuid() == 0 else "NOT TESTED with a real Slurm: only root can start one"


def free_ports() -> list[int]:
    with socket.socket() as one, socket.socket() as two:
        for each in (one, two):
            each.bind(("127.0.0.1", 0))
        return [one.getsockname()[1], two.getsockname()[1]]


@contextmanager
def controller() -> Iterator[dict[str, str]]:
    """Run a Slurm, and give the environment that leads to it."""
    folder, host = Path(tempfile.mkdtemp(prefix="slurm-")), socket.gethostname().split(".")[0]
    folder.chmod(0o755)  # munged runs as another user
    environment = os.environ | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{os.environ['PATH']}:/usr/sbin",
    }
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> None:
        log = (folder / f"{Path(words[0]).name}.out").open("w")
        started.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log))

    for name in ("state", "spool", "munge"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(host=host, folder=folder, ports=free_ports())
    )
    (folder / "gres.conf").write_text(f"NodeName={host} Name=gpu File=/dev/null\n")
    munge = folder / "munge"
    (munge / "munge.key").write_bytes(os.urandom(128))
    (munge / "munge.key").chmod(0o400)
    for path in (munge, munge / "munge.key"):
        shutil.chown(path, "munge", "munge")
    try:
        start("runuser", "-u", "munge", "--", "munged", "--foreground",
              f"--socket={munge}/munge.sock", f"--key-file={munge}/munge.key",
              f"--pid-file={munge}/munged.pid", f"--seed-file={munge}/munge.seed",
              f"--log-file={munge}/munged.log")  # fmt: skip
        start("slurmctld", "-D", "-c")
        start("slurmd", "-D", "-c", "-N", host)
        deadline = time.monotonic() + 60
        while told(environment, "sinfo", "-h", "-o", "%T") != "idle":
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()
            time.sleep(0.2)
        yield environment
    finally:
        told(environment, "scancel", "--user=root")
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


def told(environment: dict[str, str], *words: str) -> str:
    """Ask a program of Slurm's."""
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    return done.stdout.strip()
