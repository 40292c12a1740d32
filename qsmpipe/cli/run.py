"""One run: find, examine, say or do, report."""

import errno
import json
import logging
import os
import re
import sys
import traceback
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from qsmpipe import bids, checks, derivatives, files, records
from qsmpipe.bids import Acquisition, Found
from qsmpipe.checks import Examination, Finding, head_name
from qsmpipe.cli.errors import Exit, RunError
from qsmpipe.cli.logs import log_to
from qsmpipe.cli.parser import Request
from qsmpipe.cli.resources import has_gpu, read_plugin
from qsmpipe.cli.signals import Stopped, Watch, stoppable
from qsmpipe.methods import needs_background
from qsmpipe.records import Logbook, Planned, Record, Run
from qsmpipe.settings import Settings, versions

DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE,
                  errno.EACCES, errno.EPERM})  # fmt: skip
"""What the system answers when a disk is full or can no longer be written to."""

WRITER = "derivatives"
"""The node that writes into the output folder."""


def run(request: Request) -> int:
    """Do what the user asks for, and give the exit code.

    Raises
    ------
    RunError
        If the run cannot start, or if the disk gives out.
    Stopped
        If a signal ends it before there is anything to report.
    """
    settings = _absolute(request.settings)
    _check_folders(settings)
    try:
        settings.check()
    except ValueError as error:
        raise RunError(Exit.USAGE, str(error)) from error
    output = Path(settings.output_dir)
    with stoppable() as watch:
        if request.reports_only:
            return _report_anew(output)
        if not request.boilerplate_only:
            has_gpu(settings.device, read_plugin(settings.use_plugin))
        _validate(settings)
        found = _find(settings)
        examinations, given = _with_given(_examine(found, settings), settings)
        heads = checks.heads(examinations) if settings.methods("cosmos") else []
        if request.dry_run:
            return _rehearse(examinations, heads, settings, given)
        try:
            return _process(request, settings, examinations, heads, given, watch)
        except OSError as error:
            if error.errno not in DISK:
                raise
            where = Path(error.filename or output)
            raise RunError(Exit.IO_ERROR, _remedy(error.errno, where, settings)) from error


def _process(
    request: Request,
    settings: Settings,
    examinations: list[Examination],
    heads: list[Examination],
    given: dict[str, dict[str, Path]],
    watch: Watch,
) -> int:
    """Run what passed the input check, and leave records and reports of everything."""
    output = Path(settings.output_dir)
    started = records.now()
    this = Run(
        id=f"{started:%Y%m%d-%H%M%S}_{uuid.uuid4()}",
        command=request.command,
        started=started,
        versions=versions(),
        settings=_plain(settings),
    )
    log_file = _prepare_output(output, settings, this)
    examined = {e.acquisition.name: e for e in examinations} | {head_name(e): e for e in heads}
    found = {name: _record(name, examination, this) for name, examination in examined.items()}
    if request.boilerplate_only:
        return _write_methods_text(output, found, this, settings)

    _announce(examinations)
    _announce_heads(heads)
    before = records.read(output)
    old = {
        name: derivatives.state(output, e.acquisition, joined=e in heads)
        for name, e in examined.items()
    }
    ready = [e for e in examinations if not e.errors]
    ended, stopped = found, None
    if ready:
        from qsmpipe.cli.execute import complete, execute, prepare

        graph = prepare(ready, settings, given, log_file=log_file, verbose=request.verbose)
        found |= {n: replace(found[n], plan=plan) for n, plan in graph.plans.items()}
        _write_records(output, this, found)
        ending = execute(graph, settings, log_file=log_file)
        stopped = ending.stopped
        with watch.held():
            ended = found | complete(graph, ending, found, settings, log_file=log_file)
            ended = _finish(output, this, ended, old, before, stopped)
    else:
        ended = _finish(output, this, ended, old, before, stopped)
    unreported = _report(output, this, {e.acquisition.subject for e in examinations})
    code = _conclude(ended, output, log_file, settings)
    if stopped:
        _line(f"{stopped}: the same command goes on from where this run ended")
        return stopped.code
    return code or (Exit.FAILURE if unreported else Exit.OK)


def _finish(
    output: Path,
    this: Run,
    ended: Mapping[str, Record],
    old: Mapping[str, derivatives.State],
    before: Logbook,
    stopped: Stopped | None,
) -> dict[str, Record]:
    """Write the records, in which the maps that earlier runs left are named."""
    final = {}
    for name, record in ended.items():
        left = derivatives.unchanged(output, old[name])
        final[name] = replace(record, earlier=records.earlier(before, name, left))
    reason = stopped.name if stopped else ""
    _write_records(output, replace(this, finished=records.now(), stopped_by=reason), final)
    return final


def _announce(examinations: list[Examination]) -> None:
    """Say what is refused and what is unusual."""
    for examination in examinations:
        name = examination.acquisition.name
        for finding in examination.errors:
            _line(f"{name}: refused: {finding.message}")
        for finding in examination.warnings:
            _line(f"{name}: warning: {finding.message}")


def _announce_heads(heads: list[Examination]) -> None:
    """Say which subjects have too few orientations."""
    for head in heads:
        for finding in head.errors:
            _line(f"{head_name(head)}: refused: {finding.message}")


def _conclude(
    ended: Mapping[str, Record], output: Path, log_file: Path, settings: Settings
) -> Exit:
    """Say what failed and where to look, and find the exit code."""
    for record in ended.values():
        for failure in record.failures:
            crash = f" (crash file {failure.crash_file})" if failure.crash_file else ""
            _line(f"{record.name}: failed in {failure.node}: {failure.message}{crash}")
        if record.status == "interrupted":
            _line(f"{record.name}: the run was stopped before this acquisition was done")
        for earlier in record.earlier:
            _line(f"{record.name}: {records.said_of(earlier, record)}")
    states = [record.status for record in ended.values()]
    done = states.count("done")
    _line(f"{done} of {len(states)} acquisitions done; reports: {output / 'index.html'}")
    if done == len(states):
        return Exit.OK
    _line(f"log: {log_file}")
    full = re.search(
        r"\[Errno (\d+)\] .*",
        "\n".join(f.message for r in ended.values() for f in r.failures if f.node == WRITER),
    )
    if full and int(full[1]) in DISK:
        _line(_remedy(int(full[1]), output, settings))
        return Exit.IO_ERROR
    return Exit.BAD_DATA if states.count("refused") == len(states) else Exit.FAILURE


def _remedy(number: int, path: Path, settings: Settings) -> str:
    """Say what to do about a disk that cannot be written to."""
    return (
        f"cannot write to {path}: {os.strerror(number)}; free space or mend the disk, or choose "
        f"another output folder: what was computed is kept in {settings.work_dir}, and the same "
        "command goes on from there"
    )


def _line(text: str) -> None:
    logging.getLogger("qsmpipe").info(text)
    print(text, file=sys.stderr, flush=True)


def _plain(settings: Settings) -> dict[str, Any]:
    import tomllib

    return tomllib.loads(settings.as_toml())


def _absolute(settings: Settings) -> Settings:
    return replace(
        settings,
        bids_dir=str(Path(settings.bids_dir).resolve()),
        output_dir=str(Path(settings.output_dir).resolve()),
        work_dir=str(Path(settings.work_dir).resolve()),
        derivatives={k: str(Path(v).resolve()) for k, v in settings.derivatives.items()},
    )


def _check_folders(settings: Settings) -> None:
    source, output = Path(settings.bids_dir), Path(settings.output_dir)
    work = Path(settings.work_dir)
    if not source.is_dir():
        raise RunError(
            Exit.NO_INPUT,
            f"{source}: no such folder; in a container, is the dataset mounted (-v, -B) there?",
        )
    if output == source:
        raise RunError(
            Exit.USAGE,
            f"the output folder is the dataset itself: choose another, for example "
            f"{source / 'derivatives' / 'qsmpipe'}",
        )
    inside = output.relative_to(source).parts[0] if output.is_relative_to(source) else ""
    if inside.startswith("sub-"):
        raise RunError(
            Exit.USAGE,
            f"the output folder {output} lies among the dataset's own files, in {inside}: choose "
            f"another, for example {source / 'derivatives' / 'qsmpipe'}",
        )
    if work == source or (work.is_relative_to(source) and not work.is_relative_to(output)):
        raise RunError(
            Exit.USAGE,
            f"the work folder {work} lies inside the dataset, which is never written to: choose "
            "another with --work-dir",
        )
    for name, path in settings.derivatives.items():
        if not Path(path).is_dir():
            raise RunError(Exit.NO_INPUT, f"--derivatives {name}={path}: no such folder")


def _prepare_output(output: Path, settings: Settings, this: Run) -> Path:
    """Make the output folder a derivative dataset, and the run's own folder in it; log there."""
    own = records.log_folder(output, this.id)
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


def _validate(settings: Settings) -> None:
    if settings.skip_bids_validation:
        return
    try:
        errors = bids.validate(Path(settings.bids_dir))
    except ValueError as error:
        raise RunError(Exit.INVALID_BIDS, str(error)) from error
    if errors is None:
        _line("bids-validator-deno is not installed: the dataset's BIDS names are not validated")
    elif errors:
        shown = "\n  ".join(errors[:10])
        more = f"\n  and {len(errors) - 10} more" if len(errors) > 10 else ""
        raise RunError(
            Exit.INVALID_BIDS,
            f"{settings.bids_dir} is not valid BIDS:\n  {shown}{more}\nmend it, or try with "
            "--skip-bids-validation",
        )


def _find(settings: Settings) -> Found:
    filters = None
    if settings.bids_filter_file:
        try:
            filters = json.loads(Path(settings.bids_filter_file).read_text())
        except (OSError, ValueError) as error:
            raise RunError(
                Exit.USAGE, f"--bids-filter-file {settings.bids_filter_file}: {error}"
            ) from error
    try:
        found = bids.find(
            Path(settings.bids_dir),
            participants=settings.participant_label,
            sessions=settings.session_label,
            runs=settings.run_label,
            acquisitions=settings.acquisition_label,
            filters=filters,
            database=settings.bids_database_dir or None,
        )
    except ValueError as error:
        raise RunError(Exit.NO_FILES, str(error)) from error
    for note in found.notes:
        _line(note)
    if not found and not found.refusals:
        raise RunError(
            Exit.NO_FILES,
            f"{settings.bids_dir}: no gradient-echo acquisition (MEGRE, T2starw, or anat files "
            "with part-phase or part-real/imag) matches the selection",
        )
    return found


def _examine(found: Found, settings: Settings) -> list[Examination]:
    examined = [_examined(acquisition, settings) for acquisition in found]
    refused = [checks.refused(refusal) for refusal in found.refusals]
    return checks.with_siblings(examined) + refused


def _examined(acquisition: Acquisition, settings: Settings) -> Examination:
    """Examine an acquisition; a fault of the check itself refuses this one alone."""
    try:
        return checks.examine(
            acquisition,
            field_strength=settings.b0 or None,
            phase_sign=settings.phase_sign or None,
            b0_direction=settings.b0_direction,
            for_human_heads=settings.preset != "small-animal",
        )
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        message = (
            f"the input check itself failed ({type(error).__name__}: {error}, in {last.filename}, "
            f"line {last.lineno}): this is a fault of qsmpipe, please report it"
        )
        return Examination(acquisition, (Finding("error", "input check", message),))


def _with_given(
    examinations: list[Examination], settings: Settings
) -> tuple[list[Examination], dict[str, dict[str, Path]]]:
    """Add the user's own masks, where the settings ask for them."""
    region = settings.reference.startswith("region:")
    wanted = ["mask"] * settings.mask_is_given + ["region"] * region
    if wanted and not settings.derivatives:
        raise RunError(
            Exit.USAGE,
            f"{' and '.join(wanted)} shall come from masks of yours: name their datasets with "
            "--derivatives NAME=DIR",
        )
    return checks.with_given(
        examinations,
        mask=settings.mask_is_given,
        reference=settings.reference,
        folders=[Path(path) for path in settings.derivatives.values()],
    )


def _record(name: str, examination: Examination, this: Run) -> Record:
    return Record(
        name,
        subject=examination.acquisition.subject,
        run=this.id,
        status="refused" if examination.errors else "started",
        acquisition=examination.summary(),
        findings=examination.findings,
    )


def _rehearse(
    examinations: list[Examination],
    heads: list[Examination],
    settings: Settings,
    given: dict[str, dict[str, Path]],
) -> Exit:
    """Say what would be done: the graph is built, and neither run nor written."""
    unbuilt: Mapping[str, str] = {}
    plans: Mapping[str, tuple[Planned, ...]] = {}
    ready = [e for e in examinations if not e.errors]
    if ready:
        from qsmpipe.cli.execute import rehearse

        graph = rehearse(ready, settings, given)
        unbuilt, plans = graph.unbuilt, graph.plans
    _say(examinations, settings, unbuilt)
    _announce_heads(heads)
    _say_plans(plans)
    return Exit.OK if ready else Exit.BAD_DATA


def _say_plans(plans: Mapping[str, tuple[Planned, ...]]) -> None:
    """Print the steps of each acquisition, once for those that have the same."""
    same: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for name, plan in plans.items():
        lines = tuple((step.name, _taken(step)) for step in plan)
        same.setdefault(lines, []).append(name)
    for lines, names in same.items():
        if lines:
            print(f"plan of {', '.join(names)}")
        for place, (step, taken) in enumerate(lines, 1):
            print(f"  {place}. {step}{taken}")


def _taken(step: Planned) -> str:
    by_source: dict[tuple[str, ...], list[str]] = {}
    for what, sources in step.takes.items():
        by_source.setdefault(sources, []).append(what)
    parts = [f"{', '.join(what)} of {', '.join(s)}" for s, what in by_source.items()]
    return f": {'; '.join(parts)}" if parts else ""


def _say(examinations: list[Examination], settings: Settings, unbuilt: Mapping[str, str]) -> None:
    for examination in examinations:
        name = examination.acquisition.name
        print(name)
        for label, value in examination.summary().items():
            print(f"  {label}: {value}")
        for finding in examination.findings:
            print(f"  {finding.level}: {finding.message}")
        if name in unbuilt:
            print(f"  -> would fail: {unbuilt[name]}")
        else:
            print("  -> refused" if examination.errors else "  -> would be processed")
    print(f"preset {settings.preset}")
    for step in settings.resolved():
        print(f"  {step['stage']}: {step['method']}")
        for key, value in step["parameters"].items():
            print(f"    {step['stage']}.{key.removesuffix('_')} = {value}")
    print(f"  mask expression: {settings.mask}, erosion {settings.mask_erosion:g} mm")
    if settings.mask_residual:
        print(f"  mask residual: {settings.mask_residual:g} at most")
    if settings.methods("background") and not needs_background(settings.methods("inversion")):
        print(f"  {settings.inversion} takes the total field: background removal gives the local "
              "field alone, and --background has no influence on the map")  # fmt: skip
    if settings.uncertainty:
        print(f"  uncertainty: from {settings.uncertainty} noisy fields")
    if settings.two_pass:
        print("  two passes: reliable phase, then the whole mask")
    print(f"  reference: {settings.reference}")


def _write_records(output: Path, this: Run, ended: Mapping[str, Record]) -> None:
    records.write_run(output, this)
    for record in ended.values():
        records.write_record(output, record)


def _write_methods_text(
    output: Path, found: Mapping[str, Record], this: Run, settings: Settings
) -> Exit:
    """Write the methods text of what would be run, into the run's own folder."""
    from qsmpipe.reports.boilerplate import write_boilerplate

    steps = records.take(records.Step, settings.resolved())
    planned = [replace(record, steps=steps) for record in found.values()]
    text, _ = write_boilerplate(records.log_folder(output, this.id), planned, {this.id: this})
    print(f"methods text in {text}")
    return Exit.OK


def _report_anew(output: Path) -> Exit:
    if not records.read(output).records:
        raise RunError(Exit.NO_FILES, f"{output}: no results of an earlier run to report on")
    failed = _report(output)
    print(f"reports: {output / 'index.html'}")
    return Exit.FAILURE if failed else Exit.OK


def _report(
    output: Path, this: Run | None = None, subjects: Collection[str] | None = None
) -> list[str]:
    """Write the methods text of ``this`` run and the pages of ``subjects``, and all runs' index.

    Without ``this`` and ``subjects`` it is those of all.

    Another run may add its records at the same time: all is written once more until no record
    has changed since it was read. Whoever writes last has then read everything.

    Returns
    -------
    failed : list of str
        Names of what could not be written.
    """
    from qsmpipe.reports.boilerplate import write_boilerplate
    from qsmpipe.reports.page import build_index, build_subject

    failed: list[str] = []

    def attempt(name: str, build: Callable[[], object]) -> None:
        try:
            build()
        except OSError as error:
            if error.errno in DISK:
                raise
            complain(name, error)
        except Exception as error:  # of one page: the others shall be written
            complain(name, error)

    def complain(name: str, error: Exception) -> None:
        _line(f"{name}: its report cannot be written: {type(error).__name__}: {error}")
        logging.getLogger("qsmpipe").error("%s", traceback.format_exc())
        failed.append(name)

    before = None
    while before != (now := records.stamp(output)):
        before, book = now, records.read(output)
        failed.clear()
        for run in book.runs_of(book.records) if this is None else [this]:
            own = [record for record in book.records if record.run == run.id]
            folder = records.log_folder(output, run.id)
            attempt(run.id, partial(write_boilerplate, folder, own, book.runs))
        for subject in sorted({record.subject for record in book.current}):
            if subjects is None or subject in subjects:
                attempt(f"sub-{subject}", partial(build_subject, output, subject, book))
        text = partial(write_boilerplate, output / "logs", book.current, book.runs)
        attempt("all runs", text)
        attempt("index", partial(build_index, output, book))
    return failed
