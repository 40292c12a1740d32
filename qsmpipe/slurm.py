"""What jobs of Slurm ask for, and the script that each of them runs."""

import difflib
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

AUTO = "auto"
"""Every job asks for what its steps need, and for nothing else."""

NAME = r"[\w.@:/+-]+"
LIST = r"[\w.@:/+*&|()\[\],!-]+"
FORMS: Mapping[str, tuple[str, str]] = {
    "partition": (LIST, "names, as in short,long"),
    "account": (NAME, "a name"),
    "qos": (NAME, "a name"),
    "reservation": (LIST, "names, as in night,day"),
    "constraint": (LIST, "features, as in avx512&ib"),
    "nodelist": (LIST, "machines, as in node[1-4]"),
    "exclude": (LIST, "machines, as in node[1-4]"),
    "time": (r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", "minutes, 4:00:00, or 1-12 (days and hours)"),
    "mem": (r"[1-9]\d*[KMGT]", "an amount with its unit, as in 16G"),
    "cpus-per-task": (r"[1-9]\d*", "a number above 0"),
    "gres": (LIST, "what Slurm knows, as in gpu:1 or gpu:a100:1"),
    "throttle": (r"[1-9]\d*", "a number above 0, of jobs that may run at a time"),
}
"""Keys of ``--slurm``: form of the value, and how it is said. All but ``throttle`` are long
options of ``sbatch``."""

GIGABYTES = {"K": 2.0**-20, "M": 2.0**-10, "G": 1.0, "T": 2.0**10}

PROCESSORS = 4
"""Of a job, where the user says nothing."""

OVERHEAD_GB = 1.0
"""Memory that the app takes beside the processes of its nodes."""

NOTICE = 60
"""Time before a job's limit (s) in which it ends its steps and writes its records."""

LARGEST_ARRAY = 1000
"""Most tasks of an array: Slurm's own limit, where the site has not changed it."""

HALF_HOUR = 1800


@dataclass(frozen=True)
class Resources:
    """What the steps of a job need."""

    processors: int
    memory_gb: float
    """Of the app and its nodes together."""
    seconds: float
    use_gpu: bool = False

    def request(self, own: Mapping[str, str]) -> dict[str, str]:
        """List options of ``sbatch`` with their values; the user's ``own`` ones come first.

        Memory is rounded up to whole GB, and time to half hours: most jobs of a dataset then ask
        for the same, and make one array.
        """
        halves = math.ceil(self.seconds / HALF_HOUR)
        needed = {
            "cpus-per-task": str(self.processors),
            "mem": f"{math.ceil(self.memory_gb)}G",
            "time": f"{halves // 2}:{halves % 2 * 30:02}:00",
        }
        gres = [own["gres"]] if "gres" in own else []
        if self.use_gpu and not any("gpu" in each for each in gres):
            gres.append("gpu:1")
        options = {key: value for key, value in own.items() if key not in ("gres", "throttle")}
        return needed | options | ({"gres": ",".join(gres)} if gres else {})


def parse(text: str) -> dict[str, str]:
    """Take ``key=value,key=value`` apart.

    A comma ends a value only where another key follows.

    >>> parse("partition=short,long,time=2:00:00")
    {'partition': 'short,long', 'time': '2:00:00'}
    >>> parse("auto")
    {}

    Raises
    ------
    ValueError
        It names the key and the value, and what it may be.
    """
    if text in ("", AUTO):
        return {}
    options: dict[str, str] = {}
    for part in re.split(r",(?=[^,=]*=)", text):
        key, equals, value = part.partition("=")
        if not equals:
            msg = (
                f"slurm {text!r}: write {AUTO}, or key=value,key=value as in mem=16G,time=4:00:00"
            )
            raise ValueError(msg)
        if key not in FORMS:
            close = difflib.get_close_matches(key, FORMS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"slurm: there is no key {key!r}: one of {', '.join(FORMS)}{hint}")
        form, said = FORMS[key]
        if not re.fullmatch(form, value):
            raise ValueError(f"slurm: {key}={value!r}: give {said}")
        if key in options:
            raise ValueError(f"slurm: {key} is given twice: {options[key]} and {value}")
        options[key] = value
    if "time" in options and seconds_of(options["time"]) <= 0:
        raise ValueError(f"slurm: time={options['time']}: give a time above 0")
    return options


def seconds_of(time: str) -> int:
    """Convert a time as Slurm writes it: minutes, ``M:S``, ``H:M:S``, ``D-H:M:S`` or less of it.

    >>> [seconds_of(time) for time in ("90", "4:00:00", "1-12")]
    [5400, 14400, 129600]
    """
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = parts if len(parts) == 3 else [0, *parts, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def gigabytes_of(memory: str) -> float:
    """Convert an amount of memory as Slurm writes it.

    >>> gigabytes_of("1536M")
    1.5
    """
    return float(memory[:-1]) * GIGABYTES[memory[-1]]


def script(
    command: Sequence[str],
    subjects: Sequence[str],
    request: Mapping[str, str],
    *,
    folder: str,
    throttle: str = "",
    python_path: str = "",
) -> str:
    """Write the script of an array of jobs, one for each of ``subjects``.

    Each task leaves ``sub-<label>.ended`` in ``folder``, with the exit code of its app, and
    before that ``sub-<label>.late`` if its time was nearly up. What the app says goes to
    ``sub-<label>.out``, what Slurm says to ``slurm-<job>_<task>.out``, where the script is
    submitted.

    Parameters
    ----------
    command
        Words of the app, to which each task adds its subject.
    subjects
        Labels.
    request
        Options of ``sbatch`` by name.
    folder
        Where it leaves its files.
    throttle
        How many tasks may run at a time; empty for any number.
    python_path
        Folder to look for modules in; empty for none.
    """
    tasks = f"1-{len(subjects)}{f'%{throttle}' if throttle else ''}"
    notice = min(NOTICE, seconds_of(request["time"]) // 6)
    asked = "".join(f"#SBATCH --{key}={value}\n" for key, value in request.items())
    app = f'{shlex.join(command)} --participant-label "$SUBJECT"'
    path = f"export PYTHONPATH={shlex.quote(python_path)}${{PYTHONPATH:+:$PYTHONPATH}}\n"
    return f"""#!/bin/bash
# Jobs of qsmpipe, one subject each.
#SBATCH --job-name=qsmpipe
#SBATCH --array={tasks}
{asked}#SBATCH --output=slurm-%A_%a.out
# The app hears of the end of its time, and writes its records:
#SBATCH --signal=B:USR1@{notice}
SUBJECTS=({shlex.join(subjects)})
SUBJECT=${{SUBJECTS[SLURM_ARRAY_TASK_ID - 1]}}
FILE={shlex.quote(folder)}/sub-$SUBJECT
rm -f "$FILE.ended" "$FILE.late"
{path if python_path else ""}{app} > "$FILE.out" 2>&1 &
APP=$!
trap 'touch "$FILE.late"; kill -TERM "$APP"' USR1
trap 'kill -TERM "$APP"' TERM
wait "$APP"
while kill -0 "$APP" 2> /dev/null; do # a signal ends `wait`, not the app
    wait "$APP"
done
wait "$APP" # its exit code, which the shell keeps
CODE=$?
echo "$CODE" > "$FILE.new" && mv "$FILE.new" "$FILE.ended"
exit "$CODE"
"""
