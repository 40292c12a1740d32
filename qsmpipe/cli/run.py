"""One run: find, examine, say or do, report."""

import re
import tomllib
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qsmpipe import checks, derivatives, files, records
from qsmpipe.checks import Examination, head_name
from qsmpipe.cli.errors import DISK, Exit, RunError, remedy
from qsmpipe.cli.inputs import examine, find, validate, with_given
from qsmpipe.cli.logs import announce, announce_heads, line, log_to
from qsmpipe.cli.parser import Request
from qsmpipe.cli.queue import attempt_folder
from qsmpipe.cli.rehearsal import dry_run
from qsmpipe.cli.reporting import report, report_anew, write_methods_text
from qsmpipe.cli.signals import Stopped, Watch, stoppable
from qsmpipe.records import Logbook, Record, Run
from qsmpipe.settings import Settings, versions

if TYPE_CHECKING:
    from qsmpipe.cli.execute import Graph


def run(request: Request) -> int:
    """Do what the user asks for, and give the exit code.

    Raises
    ------
    RunError
        If the run cannot start, or if the disk gives out.
    Stopped
        If a signal ends it before there is anything to report.
    """
    settings, output = request.settings, Path(request.settings.output_dir)
    with stoppable() as watch:
        if request.reports_only:
            return report_anew(output)
        validate(settings)
        found = find(settings)
        examinations, given = with_given(examine(found, settings), settings)
        heads = checks.heads(examinations) if settings.methods("cosmos") else []
        if request.dry_run:
            return dry_run(examinations, heads, settings, given)
        try:
            return _process(request, settings, examinations, heads, given, watch)
        except OSError as error:
            if error.errno not in DISK:
                raise
            where = Path(error.filename or output)
            raise RunError(Exit.IO_ERROR, remedy(error.errno, where, settings.work_dir)) from error


def _process(
    request: Request,
    settings: Settings,
    examinations: list[Examination],
    heads: list[Examination],
    given: dict[str, dict[str, Path]],
    watch: Watch,
) -> int:
    """Run what passed the input check, and leave records and reports of everything.

    A job of another run leaves that run the records of its acquisitions, and no report.
    """
    output, is_job = Path(settings.output_dir), bool(request.job_of)
    this, log_file = _begin(request, settings)
    examined = {e.acquisition.name: e for e in examinations} | {head_name(e): e for e in heads}
    found = {name: _record(name, examination, this) for name, examination in examined.items()}
    if request.boilerplate_only:
        return write_methods_text(output, found, this, settings)

    announce(examinations)
    announce_heads(heads)
    before = records.read(output)
    old = {
        name: derivatives.state(output, e.acquisition, joined=e in heads)
        for name, e in examined.items()
    }
    ready = [e for e in examinations if not e.errors]
    collect: Callable[[], dict[str, Record]] = dict
    stopped = None
    if ready:
        from qsmpipe.cli.execute import prepare

        graph = prepare(ready, settings, given, log_file=log_file, verbose=request.verbose)
        found |= {n: replace(found[n], plan=plan) for n, plan in graph.plans.items()}
        if not is_job:
            records.write_run(output, this)
        _write_records(output, found)
        collect, stopped = _run_nodes(graph, request, settings, found, watch, log_file)
    with watch.held():
        ended = found | collect()
        if settings.slurm:  # a job itself tells which maps it has replaced
            old = {name: maps for name, maps in old.items() if ended[name].status != "done"}
        ended = _with_earlier(output, ended, old, before)
        _write_records(output, ended)
        if not is_job:
            reason = stopped.name if stopped else ""
            records.write_run(output, replace(this, finished=records.now(), stopped_by=reason))
    subjects = {e.acquisition.subject for e in examinations}
    unreported = [] if is_job else report(output, this, subjects)
    code = _conclude(ended, output, log_file, settings)
    if stopped:
        line(f"{stopped}: the same command goes on from where this run ended")
        return stopped.code
    return code or (Exit.FAILURE if unreported else Exit.OK)


def _begin(request: Request, settings: Settings) -> tuple[Run, Path]:
    """Make the folder of the run, or of this job of a run, and log there."""
    output, started = Path(settings.output_dir), records.now()
    this = Run(
        id=request.job_of or f"{started:%Y%m%d-%H%M%S}_{uuid.uuid4()}",
        command=request.command,
        started=started,
        versions=versions(),
        settings=tomllib.loads(settings.as_toml()),
    )
    if request.job_of:
        return this, _prepare_output(output, settings, attempt_folder(settings, this.id))
    return this, _prepare_output(output, settings, records.log_folder(output, this.id))


def _run_nodes(
    graph: "Graph",
    request: Request,
    settings: Settings,
    found: Mapping[str, Record],
    watch: Watch,
    log_file: Path,
) -> tuple[Callable[[], dict[str, Record]], Stopped | None]:
    """Run the graph here, or in jobs of Slurm; give what collects the records, and a signal."""
    if settings.slurm:
        from qsmpipe.cli.slurm import run_jobs

        by_jobs, stopped = run_jobs(graph, settings, found, watch, verbose=request.verbose)
        return lambda: by_jobs, stopped
    from qsmpipe.cli.execute import complete, execute

    keep = partial(records.write_record, Path(settings.output_dir))
    ending = execute(graph, settings, found, log_file=log_file, keep=keep)
    return partial(complete, graph, ending, found, settings, log_file=log_file), ending.stopped


def _with_earlier(
    output: Path,
    ended: Mapping[str, Record],
    old: Mapping[str, derivatives.State],
    before: Logbook,
) -> dict[str, Record]:
    """Name the maps that earlier runs left, where ``old`` tells what there was."""
    final = dict(ended)
    for name, maps in old.items():
        left = derivatives.unchanged(output, maps)
        final[name] = replace(ended[name], earlier=records.earlier(before, name, left))
    return final


def _conclude(
    ended: Mapping[str, Record], output: Path, log_file: Path, settings: Settings
) -> Exit:
    """Say what failed and where to look, and find the exit code."""
    for record in ended.values():
        for failure in record.failures:
            crash = f" (crash file {failure.crash_file})" if failure.crash_file else ""
            line(f"{record.name}: failed in {failure.node}: {failure.message}{crash}")
        if record.status == "interrupted":
            line(f"{record.name}: the run was stopped before this acquisition was done")
        for earlier in record.earlier:
            line(f"{record.name}: {records.said_of(earlier, record)}")
    states = [record.status for record in ended.values()]
    done = states.count("done")
    line(f"{done} of {len(states)} acquisitions done; reports: {output / 'index.html'}")
    if done == len(states):
        return Exit.OK
    line(f"log: {log_file}")
    failures = [failure for record in ended.values() for failure in record.failures]
    written = "\n".join(f.message for f in failures if f.node == derivatives.WRITER)
    full = re.search(r"\[Errno (\d+)\] .*", written)
    if full and int(full[1]) in DISK:
        line(remedy(int(full[1]), output, settings.work_dir))
        return Exit.IO_ERROR
    return Exit.BAD_DATA if states.count("refused") == len(states) else Exit.FAILURE


def _prepare_output(output: Path, settings: Settings, own: Path) -> Path:
    """Make the output folder a derivative dataset; write settings and log into ``own``."""
    try:
        files.write(own / "config.toml", settings.as_toml())
        derivatives.write_description(output, Path(settings.bids_dir))
        Path(settings.work_dir).mkdir(parents=True, exist_ok=True)
        log_file = own / "qsmpipe.log"
        log_to(log_file, ["qsmpipe"])
    except ValueError as error:
        raise RunError(Exit.USAGE, str(error)) from error
    except OSError as error:
        raise RunError(
            Exit.CANNOT_CREATE,
            f"cannot write to {error.filename}: {error.strerror}; choose another output or "
            "--work-dir",
        ) from error
    return log_file


def _record(name: str, examination: Examination, this: Run) -> Record:
    return Record(
        name,
        subject=examination.acquisition.subject,
        run=this.id,
        status="refused" if examination.errors else "started",
        acquisition=examination.summary(),
        findings=examination.findings,
    )


def _write_records(output: Path, ended: Mapping[str, Record]) -> None:
    for record in ended.values():
        records.write_record(output, record)
