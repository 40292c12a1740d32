"""Each subject as a job of Slurm: submit the jobs, wait for them, take their records."""

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from qsmpipe import files, records
from qsmpipe.cli.execute import ENDED_EARLY, Graph
from qsmpipe.cli.logs import line
from qsmpipe.cli.needs import arrays, told
from qsmpipe.cli.queue import Job, State, cancel, jobs_folder, mark, states, submit
from qsmpipe.cli.signals import Stopped, Watch
from qsmpipe.records import Failure, Record
from qsmpipe.settings import Settings
from qsmpipe.slurm import OVERHEAD_GB, gigabytes_of, parse

POLL = 2.0
"""Time between two looks at what jobs have left in their folder (s)."""

SLOWEST = 30.0
"""Longest time between two questions to Slurm (s); while a run is young it is :data:`POLL`."""

LAG = 30.0
"""Time until a machine sees what another has written to a disk of both (s)."""

GRACE = 10.0
"""Time that cancelled jobs have to write their records (s)."""

QUIET = frozenset({"None", "Priority", "Resources", "BeginTime", "JobArrayTaskLimit"})
"""Reasons to wait that are no news."""


def run_jobs(
    graph: Graph,
    settings: Settings,
    started: Mapping[str, Record],
    watch: Watch,
    *,
    verbose: int = 0,
) -> tuple[dict[str, Record], Stopped | None]:
    """Process each subject in a job of its own, and wait for all jobs.

    Parameters
    ----------
    graph
        As :func:`qsmpipe.cli.execute.prepare` gives it.
    settings
        The run's choices.
    started
        Acquisition name to its record so far.
    watch
        What asks the run to end.
    verbose
        Above 0: more in the log files of the jobs.

    Returns
    -------
    ended : dict
        Record of each acquisition that passed the input check.
    stopped : Stopped or None
        What ended the run before its time; its jobs are cancelled then.
    """
    (run,) = {record.run for record in started.values()}
    take = partial(records_of, settings.output_dir, run, started)
    ended = {
        name: replace(started[name], status="failed", failures=(Failure("graph", reason),))
        for name, reason in graph.unbuilt.items()
    }
    jobs: dict[str, Job] = {}
    own = files.write(mark(settings, run), "")
    try:
        with watch.held():  # an array whose number nobody knows could not be cancelled
            owners = {name: record.subject for name, record in started.items()}
            for request, labels in arrays(graph, owners, settings):
                try:
                    jobs |= _submitted(labels, request, settings, run, graph, verbose)
                except ValueError as error:
                    for subject in labels:
                        ended |= take(subject, f"Slurm refuses its job ({told(request)}): {error}")
                files.write(own, " ".join(sorted({id_.partition("_")[0] for id_ in jobs})))
        for job, state in finished(jobs, settings, run):
            found = take(job.subject, job.end(state), out_of_memory=state.name == "OUT_OF_MEMORY")
            ended |= found
            failed = [name for name, record in found.items() if record.status == "failed"]
            line(f"sub-{job.subject}: job {job.id} {'failed' if failed else 'done'}")
            if failed and settings.stop_on_first_crash:
                break
        cancel(jobs)
        for job in jobs.values():
            ended |= take(job.subject, ENDED_EARLY)
    except Stopped as stop:
        cancel(jobs)
        for _ in finished(dict(jobs), settings, run, lag=0.0, patience=GRACE):
            continue
        for subject in {record.subject for record in started.values()}:
            ended = take(subject, "", stopped=True) | ended
        return ended, stop
    except BaseException:
        cancel(jobs)
        raise
    finally:
        own.unlink(missing_ok=True)
    return ended, None


def _submitted(
    subjects: Sequence[str],
    request: Mapping[str, str],
    settings: Settings,
    run: str,
    graph: Graph,
    verbose: int,
) -> dict[str, Job]:
    memory = max(gigabytes_of(request["mem"]) - OVERHEAD_GB, 0.5)
    options = ["--nprocs", request["cpus-per-task"], "--mem-gb", f"{memory:g}",
               "--device", "cuda" if graph.use_gpu else "cpu", *["-v"] * verbose]  # fmt: skip
    throttle = parse(settings.slurm).get("throttle", "")
    new = submit(subjects, request, options, settings, run, throttle=throttle)
    array, count = new[0].id.partition("_")[0], len(new)
    line(f"array {array}: {count} job{'s' * (count != 1)} submitted, each with {told(request)}")
    return {job.id: job for job in new}


def finished(
    jobs: dict[str, Job],
    settings: Settings,
    run: str,
    *,
    lag: float | None = None,
    patience: float = math.inf,
) -> Iterator[tuple[Job, State]]:
    """Wait for jobs, and take each out of ``jobs`` when it has ended.

    A job that went well has said so itself. Of others Slurm is asked for the reason.

    Parameters
    ----------
    jobs : dict
        By their names for Slurm.
    settings, run
        Whose jobs they are.
    lag : float, optional
        How long what a job has left may take to be seen after Slurm says that it has ended (s);
        :data:`LAG` when not given.
    patience : float
        Longest time to wait (s).
    """
    lag = LAG if lag is None else lag
    folder = jobs_folder(settings, run)
    begin = asked = time.monotonic()
    known: Mapping[str, State] | None = None
    over: dict[str, float] = {}
    said: dict[str, str] = {}
    while jobs and time.monotonic() - begin < patience:
        time.sleep(POLL)
        files.look_anew(folder)
        left = set(os.listdir(folder))
        codes = {id_: job.code for id_, job in jobs.items() if job.file("ended").name in left}
        now = time.monotonic()
        if any(codes.values()) or now - asked >= min(SLOWEST, (now - begin) / 20):
            asked, answer = now, states(jobs)
            known = known if answer is None else answer
        for id_, job in list(jobs.items()):
            code = codes.get(id_)
            state = State("PENDING") if known is None else known.get(id_, State())
            _say(job, state, said)
            if state.is_final or (state.name == "COMPLETING" and code is not None):
                over.setdefault(id_, now)
            else:
                over.pop(id_, None)
            waited = now - over.get(id_, now)
            if code == 0 or (state.is_final and (code is not None or not lag)) or waited > lag:
                yield jobs.pop(id_), state


def _say(job: Job, state: State, said: dict[str, str]) -> None:
    """Say what is new about a job that waits or runs."""
    waits = state.name == "PENDING" and state.reason not in QUIET | {""}
    news = f"waits: {state.reason}" if waits else "runs" if state.name == "RUNNING" else ""
    if news and said.get(job.id) != news:
        said[job.id] = news
        line(f"sub-{job.subject}: job {job.id} {news}")


def records_of(
    output_dir: str,
    run: str,
    started: Mapping[str, Record],
    subject: str,
    failure: str,
    *,
    out_of_memory: bool = False,
    stopped: bool = False,
) -> dict[str, Record]:
    """Take the records that a job has left; where one is not final, ``failure`` tells why."""
    found = {}
    for name, so_far in started.items():
        if so_far.subject != subject or so_far.status == "refused":
            continue
        record = records.read_record(output_dir, run, name) or so_far
        if record.status in ("started", "interrupted"):
            record = (
                replace(record, status="interrupted")
                if stopped
                else replace(record, status="failed", failures=(Failure("job", failure),))
            )
        elif record.status == "failed" and out_of_memory:
            record = replace(record, failures=(*record.failures, Failure("job", failure)))
        found[name] = record
    return found
