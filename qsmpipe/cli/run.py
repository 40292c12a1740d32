"""One run: find, examine, say or do, report."""

import json
import logging
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qsmpipe import bids, checks, derivatives
from qsmpipe.bids import Acquisition
from qsmpipe.checks import Examination, head_name
from qsmpipe.cli.errors import Exit, RunError
from qsmpipe.cli.logs import log_to
from qsmpipe.cli.parser import Request
from qsmpipe.methods import needs_background
from qsmpipe.settings import Settings, versions

Record = dict[str, Any]


def run(request: Request) -> Exit:
    """Do what the user asks for.

    Raises
    ------
    RunError
        If the run cannot start.
    """
    settings = _absolute(request.settings)
    _check_folders(settings)
    try:
        settings.check()
    except ValueError as error:
        raise RunError(Exit.USAGE, str(error)) from error
    output = Path(settings.output_dir)
    if request.reports_only:
        return _write_reports(output)

    _validate(settings)
    acquisitions = _find(settings)
    examinations, given = _with_given(_examine(acquisitions, settings), settings)
    heads = checks.heads(examinations) if settings.methods("cosmos") else []
    if request.dry_run:
        _say(examinations, settings)
        _announce_heads(heads)
        return Exit.OK if any(not e.errors for e in examinations) else Exit.BAD_DATA

    started = time.strftime("%Y%m%d-%H%M%S")
    identity = f"{started}_{uuid.uuid4()}"
    _prepare_output(output, settings, identity)
    log_file = output / "logs" / identity / "qsmpipe.log"
    log_to(log_file, ["qsmpipe"])
    records = {e.acquisition.name: _record(e) for e in examinations}
    records |= {head_name(e): _record(e) | {"name": head_name(e)} for e in heads}
    run_record: Record = {
        "command": request.command,
        "uuid": identity,
        "versions": versions(),
        "settings": json.loads(json.dumps(_plain(settings))),
        "started": started,
    }
    if request.boilerplate_only:
        return _write_methods_text(output, records, run_record, settings)

    _announce(examinations)
    _announce_heads(heads)
    ready = [e for e in examinations if not e.errors]
    if ready:
        from qsmpipe.cli.execute import execute

        execute(ready, settings, given, records, log_file=log_file, verbose=request.verbose)
    run_record["finished"] = time.strftime("%Y%m%d-%H%M%S")
    _write_records(output, records, run_record)
    _write_reports(output, subjects={e.acquisition.subject for e in examinations})
    return _conclude(records, output, log_file)


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


def _conclude(records: Mapping[str, Record], output: Path, log_file: Path) -> Exit:
    """Say what failed and where to look, and find the exit code."""
    for record in records.values():
        for failed in record["errors"]:
            crash = f" (crash file {failed['crash_file']})" if failed["crash_file"] else ""
            _line(f"{record['name']}: failed in {failed['node']}: {failed['message']}{crash}")
    states = [record["status"] for record in records.values()]
    done = states.count("done")
    _line(f"{done} of {len(states)} acquisitions done; reports: {output / 'index.html'}")
    if done == len(states):
        return Exit.OK
    _line(f"log: {log_file}")
    return Exit.BAD_DATA if states.count("refused") == len(states) else Exit.FAILURE


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
    if work == source or (work.is_relative_to(source) and not work.is_relative_to(output)):
        raise RunError(
            Exit.USAGE,
            f"the work folder {work} lies inside the dataset, which is never written to: choose "
            "another with --work-dir",
        )
    for name, path in settings.derivatives.items():
        if not Path(path).is_dir():
            raise RunError(Exit.NO_INPUT, f"--derivatives {name}={path}: no such folder")


def _prepare_output(output: Path, settings: Settings, identity: str) -> None:
    try:
        (output / "logs" / identity).mkdir(parents=True)
        (output / "logs" / identity / "config.toml").write_text(settings.as_toml())
        (output / "logs" / "acquisitions").mkdir(parents=True, exist_ok=True)
        derivatives.write_description(output, Path(settings.bids_dir))
        (output / "logs" / "config.toml").write_text(settings.as_toml())
        Path(settings.work_dir).mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        raise RunError(Exit.USAGE, str(error)) from error
    except OSError as error:
        raise RunError(
            Exit.CANNOT_CREATE,
            f"cannot write to {error.filename}: {error.strerror}; choose another output or "
            "--work-dir",
        ) from error


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


def _find(settings: Settings) -> list[Acquisition]:
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
    if not found:
        raise RunError(
            Exit.NO_FILES,
            f"{settings.bids_dir}: no gradient-echo acquisition (MEGRE, T2starw, or anat files "
            "with part-phase or part-real/imag) matches the selection",
        )
    return found


def _examine(acquisitions: list[Acquisition], settings: Settings) -> list[Examination]:
    return [
        checks.examine(
            acquisition,
            field_strength=settings.b0 or None,
            phase_sign=settings.phase_sign or None,
            b0_direction=settings.b0_direction,
        )
        for acquisition in acquisitions
    ]


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


def _record(examination: Examination) -> Record:
    acquisition = examination.acquisition
    return {
        "name": acquisition.name,
        "subject": acquisition.subject,
        "status": "refused" if examination.errors else "planned",
        "acquisition": examination.summary(),
        "findings": [
            {"level": f.level, "check": f.check, "message": f.message}
            for f in examination.findings
        ],
        "steps": [],
        "numbers": [],
        "figures": [],
        "nodes": [],
        "errors": [],
    }


def _say(examinations: list[Examination], settings: Settings) -> None:
    for examination in examinations:
        print(examination.acquisition.name)
        for label, value in examination.summary().items():
            print(f"  {label}: {value}")
        for finding in examination.findings:
            print(f"  {finding.level}: {finding.message}")
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


def _write_records(output: Path, records: Mapping[str, Record], run_record: Record) -> None:
    for name, record in records.items():
        path = output / "logs" / "acquisitions" / f"{name}.json"
        path.write_text(json.dumps(record, indent=2) + "\n")
    (output / "logs" / "run.json").write_text(json.dumps(run_record, indent=2) + "\n")


def _write_methods_text(
    output: Path, records: Mapping[str, Record], run_record: Record, settings: Settings
) -> Exit:
    """Write the methods text of what would be run."""
    from qsmpipe.reports.boilerplate import write_boilerplate

    steps = json.loads(json.dumps(settings.resolved(), default=list))
    for record in records.values():
        record["steps"] = [step | {"warnings": []} for step in steps]
    write_boilerplate(output, list(records.values()), run_record)
    print(f"methods text in {output / 'logs' / 'CITATION.md'}")
    return Exit.OK


def _write_reports(output: Path, subjects: set[str] | None = None) -> Exit:
    from qsmpipe.reports.boilerplate import write_boilerplate
    from qsmpipe.reports.page import build_index, build_subject
    from qsmpipe.reports.records import read_records, read_run

    records = read_records(output)
    if not records:
        raise RunError(Exit.NO_FILES, f"{output}: no results of an earlier run to report on")
    write_boilerplate(output, records, read_run(output))
    for subject in sorted({record["subject"] for record in records}):
        if subjects is None or subject in subjects:
            build_subject(output, subject)
    index = build_index(output)
    if subjects is None:
        print(f"reports: {index}")
    return Exit.OK
