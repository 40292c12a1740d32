"""Each subject as a job of Slurm: what its steps need, until all jobs have ended."""

import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from heapq import nlargest

from nipype.pipeline.engine import Node

from qsmpipe import files, records
from qsmpipe.cli.execute import ENDED_EARLY, Graph, computing_nodes
from qsmpipe.cli.logs import line
from qsmpipe.cli.queue import Job, State, cancel, jobs_folder, mark, states, submit
from qsmpipe.cli.signals import Stopped, Watch
from qsmpipe.records import Failure, Record
from qsmpipe.settings import Settings
from qsmpipe.slurm import LARGEST_ARRAY, OVERHEAD_GB, Resources, gigabytes_of, parse

POLL = 2.0
"""Time between two looks at what jobs have left in their folder (s)."""

SLOWEST = 30.0
"""Longest time between two questions to Slurm (s); while a run is young it is :data:`POLL`."""

LAG = 30.0
"""Time until a machine sees what another has written to a disk of both (s)."""

GRACE = 6.0
"""Time that cancelled jobs have to write their records (s)."""

QUIET = frozenset({"None", "Priority", "Resources", "BeginTime", "JobArrayTaskLimit"})
"""Reasons to wait that are no news."""

START_S, NODE_S, GIGABYTE_S = 900, 60, 600
"""Time that a job is given: to start and compile; for each node; for each GB of a node."""

MARGIN = 1.2
"""Memory that a job is given over what its nodes are expected to take."""


def needs(nodes: Sequence[Node], settings: Settings) -> Resources:
    """Tell what the nodes of a subject need together.

    Time is what they take one after the other, with plenty to spare: a job that asks for much
    waits a little longer, one that asks for too little is lost.
    """
    threads = max(node.n_procs for node in nodes)
    own = parse(settings.slurm)
    processors = int(own.get("cpus-per-task", settings.nprocs or threads))
    at_once = nlargest(max(1, processors // threads), (node.mem_gb for node in nodes))
    draws = [getattr(node.inputs, "realisations", 1) for node in nodes]
    seconds = (
        n * (NODE_S + GIGABYTE_S * node.mem_gb) for n, node in zip(draws, nodes, strict=True)
    )
    return Resources(
        processors=processors,
        memory_gb=OVERHEAD_GB + MARGIN * sum(at_once),
        seconds=START_S + sum(seconds),
        use_gpu=any(node.is_gpu_node() for node in nodes),
    )


def arrays(
    graph: Graph, started: Mapping[str, Record], settings: Settings
) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Put subjects together that ask Slurm for the same.

    Yields
    ------
    request : dict
        Options of ``sbatch`` by name.
    subjects : list of str
        Their labels, no more than an array may have.
    """
    nodes = computing_nodes(graph.workflow)
    by_subject: dict[str, list[Node]] = defaultdict(list)
    for name, workflow in graph.workflow_names.items():
        by_subject[started[name].subject] += nodes.get(workflow, [])
    alike: dict[tuple[tuple[str, str], ...], list[str]] = defaultdict(list)
    for subject, own in by_subject.items():
        if own:
            request = needs(own, settings).request(parse(settings.slurm))
            alike[tuple(request.items())].append(subject)
    for items, subjects in alike.items():
        for n in range(0, len(subjects), LARGEST_ARRAY):
            yield dict(items), subjects[n : n + LARGEST_ARRAY]


def told(request: Mapping[str, str]) -> str:
    """Say what a job asks for.

    >>> told({"cpus-per-task": "4", "mem": "6G"})
    'cpus-per-task=4, mem=6G'
    """
    return ", ".join(f"{key}={value}" for key, value in request.items())


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
    take = partial(_records_of, settings.output_dir, run, started)
    ended = {
        name: replace(started[name], status="failed", failures=(Failure("graph", reason),))
        for name, reason in graph.unbuilt.items()
    }
    jobs: dict[str, Job] = {}
    own = files.write(mark(settings, run), "")
    try:
        with watch.held():  # an array whose number nobody knows could not be cancelled
            for request, subjects in arrays(graph, started, settings):
                try:
                    jobs |= _submitted(subjects, request, settings, run, graph, verbose)
                except ValueError as error:
                    for subject in subjects:
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
        for _ in finished(dict(jobs), settings, run, patience=GRACE):
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
    jobs: dict[str, Job], settings: Settings, run: str, *, patience: float = float("inf")
) -> Iterator[tuple[Job, State]]:
    """Wait for jobs, and take each out of ``jobs`` when it has ended.

    A job that went well has said so itself. Of others Slurm is asked for the reason.

    Parameters
    ----------
    jobs : dict
        By their names for Slurm.
    settings, run
        Whose jobs they are.
    patience : float
        Longest time to wait (s).
    """
    folder = jobs_folder(settings, run)
    begin = asked = time.monotonic()
    known: Mapping[str, State] | None = None
    over: dict[str, float] = {}
    said: dict[str, str] = {}
    while jobs and time.monotonic() - begin < patience:
        time.sleep(POLL)
        os.utime(folder)  # a folder on NFS is then read anew
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
            if code == 0 or (state.is_final and code is not None) or waited > LAG:
                yield jobs.pop(id_), state


def _say(job: Job, state: State, said: dict[str, str]) -> None:
    """Say what is new about a job that waits or runs."""
    waits = state.name == "PENDING" and state.reason not in QUIET | {""}
    news = f"waits: {state.reason}" if waits else "runs" if state.name == "RUNNING" else ""
    if news and said.get(job.id) != news:
        said[job.id] = news
        line(f"sub-{job.subject}: job {job.id} {news}")


def _records_of(
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
