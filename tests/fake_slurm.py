"""A Slurm that runs the tasks of an array as processes of this machine.

As ``sbatch``, ``squeue`` and ``scancel`` it keeps its state in the folder ``FAKE_SLURM``. A task
named in ``fates.json`` there never runs: it has that state from the beginning, ``refused`` being a
word of ``sbatch`` and any lower-case word the reason why it is pending.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(os.environ["FAKE_SLURM"])


def fates() -> dict[str, str]:
    file = HERE / "fates.json"
    return json.loads(file.read_text()) if file.exists() else {}


def sbatch(*words: str) -> int:
    script, array = Path(words[-1]).absolute(), len([*HERE.glob("*.array")]) + 1
    if refused := fates().get("refused"):
        print(f"sbatch: error: {refused}\nsbatch: error: try again", file=sys.stderr)
        return 1
    count = int(re.findall(r"^#SBATCH --array=1-(\d+)", script.read_text(), re.M)[0])
    (HERE / f"{array}.array").write_text(str(count))
    for task in range(1, count + 1):
        name = f"{array}_{task}"
        if str(task) in fates():
            continue
        own = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": f"{array}{task}"}
        with Path(f"slurm-{name}.out").open("w") as said:
            process = subprocess.Popen(
                ["bash", "-c", 'bash "$0"; echo $? > "$1"', script, HERE / f"{name}.code"],
                env=os.environ | own,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        (HERE / f"{name}.pid").write_text(str(process.pid))
    print(f"{array};cluster")
    return 0


def state(array: str, task: int) -> tuple[str, int, str]:
    name, fate = f"{array}_{task}", fates().get(str(task))
    if (HERE / f"{name}.cancelled").exists():
        return "CANCELLED", 0, "None"
    if fate:
        return (fate, 0, "None") if fate.isupper() else ("PENDING", 0, fate)
    if (HERE / f"{name}.code").exists():
        code = int((HERE / f"{name}.code").read_text())
        return "FAILED" if code else "COMPLETED", code << 8, "None"
    alive = Path("/proc", (HERE / f"{name}.pid").read_text(), "cwd").exists()
    return ("RUNNING", 0, "None") if alive else ("FAILED", signal.SIGKILL, "None")


def squeue(*words: str) -> int:
    (wanted,) = (word.partition("=")[2] for word in words if word.startswith("--jobs="))
    known = [array for array in wanted.split(",") if (HERE / f"{array}.array").exists()]
    if not known:
        print("slurm_load_jobs error: Invalid job id specified", file=sys.stderr)
        return 1
    for array in known:
        for task in range(1, int((HERE / f"{array}.array").read_text()) + 1):
            print(array, task, *state(array, task))
    return 0


def scancel(*arrays: str) -> int:
    for array in arrays:
        for task in range(1, int((HERE / f"{array}.array").read_text()) + 1):
            if state(array, task)[0] in ("RUNNING", "PENDING"):
                (HERE / f"{array}_{task}.cancelled").touch()
                with contextlib.suppress(OSError):
                    os.killpg(int((HERE / f"{array}_{task}.pid").read_text()), signal.SIGTERM)
    return 0


if __name__ == "__main__":
    sys.exit(globals()[Path(sys.argv[0]).name](*sys.argv[1:]))
