"""The folders of a run: they are checked before anything heavy is imported."""

import os
from dataclasses import replace
from pathlib import Path

from qsmpipe.cli.errors import Exit, RunError
from qsmpipe.settings import Settings


def absolute(settings: Settings) -> Settings:
    """Write all folders and the filter file from the root."""
    return replace(
        settings,
        bids_dir=str(Path(settings.bids_dir).resolve()),
        output_dir=str(Path(settings.output_dir).resolve()),
        work_dir=str(Path(settings.work_dir).resolve()),
        bids_filter_file=_resolved(settings.bids_filter_file),
        bids_database_dir=_resolved(settings.bids_database_dir),
        derivatives={k: str(Path(v).resolve()) for k, v in settings.derivatives.items()},
    )


def _resolved(path: str) -> str:
    return str(Path(path).resolve()) if path else ""


def check_folders(settings: Settings) -> None:
    """Refuse folders that are not there, or that would mix with the dataset.

    Raises
    ------
    RunError
        It names the folder and what to do.
    """
    source, output = Path(settings.bids_dir), Path(settings.output_dir)
    work = Path(settings.work_dir)
    if not os.path.isdir(source):  # Path.is_dir raises where a folder above may not be searched
        raise RunError(
            Exit.NO_INPUT,
            f"{source}: no such folder, or in one that may not be read; in a container, is the "
            "dataset mounted (-v, -B) there?",
        )
    if not os.access(source, os.R_OK | os.X_OK):
        raise RunError(
            Exit.NO_INPUT,
            f"{source} may not be read by this user: change its permissions; in a container, "
            "run as the dataset's owner (docker run --user)",
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
        if not os.path.isdir(path):
            raise RunError(Exit.NO_INPUT, f"--derivatives {name}={path}: no such folder")
