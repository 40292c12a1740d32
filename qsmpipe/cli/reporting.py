"""Methods texts and pages, from the records of all runs of an output folder."""

import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from qsmpipe import records
from qsmpipe.cli.errors import DISK, Exit, RunError
from qsmpipe.cli.logs import line, logger
from qsmpipe.records import Record, Run
from qsmpipe.settings import Settings


def write_methods_text(
    output: Path, found: Mapping[str, Record], this: Run, settings: Settings
) -> Exit:
    """Write the methods text of what would be run, into the run's own folder."""
    from qsmpipe.reports.boilerplate import write_boilerplate

    steps = records.take(records.Step, settings.resolved())
    planned = [replace(record, steps=steps) for record in found.values()]
    text, _ = write_boilerplate(records.log_folder(output, this.id), planned, {this.id: this})
    print(f"methods text in {text}")
    return Exit.OK


def report_anew(output: Path) -> Exit:
    """Write the pages of earlier runs once more.

    Raises
    ------
    RunError
        If there is no record.
    """
    if not records.read(output).records:
        raise RunError(Exit.NO_FILES, f"{output}: no results of an earlier run to report on")
    failed = report(output)
    print(f"reports: {output / 'index.html'}")
    return Exit.FAILURE if failed else Exit.OK


def report(
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
        line(f"{name}: its report cannot be written: {type(error).__name__}: {error}")
        logger.error("%s", traceback.format_exc())
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
        text = partial(write_boilerplate, output / "logs", book.shown(), book.runs)
        attempt("all runs", text)
        attempt("index", partial(build_index, output, book))
    return failed
