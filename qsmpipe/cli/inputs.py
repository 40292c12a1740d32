"""What a run starts from: the dataset's acquisitions, their input check, own masks."""

import json
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from qsmpipe import bids, checks
from qsmpipe.bids import Acquisition, Found
from qsmpipe.checks import Examination, Finding
from qsmpipe.cli.errors import Exit, RunError
from qsmpipe.cli.logs import line
from qsmpipe.cli.resources import processors
from qsmpipe.settings import Settings

MOST_AT_ONCE = 8
"""Acquisitions that are examined side by side: each holds two images."""


def validate(settings: Settings) -> None:
    """Refuse a dataset whose common files are not valid BIDS, where the validator is installed.

    Errors in one subject's files never stop the others: they are said; the input check decides.

    Raises
    ------
    RunError
        It lists the first errors.
    """
    if settings.skip_bids_validation:
        return
    try:
        errors = bids.validate(Path(settings.bids_dir))
    except ValueError as error:
        raise RunError(Exit.INVALID_BIDS, str(error)) from error
    if errors is None:
        line(
            "bids-validator-deno is not installed (pip install bids-validator-deno): the "
            "dataset's BIDS names are not validated"
        )
        return
    common = [error for error in errors if not error.of_subject]
    if common:
        raise RunError(
            Exit.INVALID_BIDS,
            f"{settings.bids_dir} is not valid BIDS:{_listed(common)}\nmend it, or try with "
            "--skip-bids-validation",
        )
    if errors:
        line(
            f"bids-validator finds these errors, in files of single subjects:{_listed(errors)}\n"
            "the input check decides on each acquisition"
        )


def _listed(errors: Sequence[bids.Invalid]) -> str:
    shown = "".join(f"\n  {error}" for error in errors[:10])
    return f"{shown}\n  and {len(errors) - 10} more" if len(errors) > 10 else shown


def find(settings: Settings) -> Found:
    """Find the acquisitions that the user selects.

    Raises
    ------
    RunError
        If there is none, or the filter cannot be read.
    """
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
        line(note)
    if not found and not found.refusals:
        raise RunError(
            Exit.NO_FILES,
            f"{settings.bids_dir}: no gradient-echo acquisition (MEGRE, T2starw, or anat files "
            "with part-phase or part-real/imag) matches the selection",
        )
    return found


def examine(found: Found, settings: Settings) -> list[Examination]:
    """Examine what was found; what cannot be an acquisition for its names' sake is refused."""
    # Threads of torch would wait for each other: the images looked at are small.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(min(processors(settings), MOST_AT_ONCE))
    try:
        examined = list(pool.map(partial(_examined, settings=settings), found))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
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


def with_given(
    examinations: list[Examination], settings: Settings
) -> tuple[list[Examination], dict[str, dict[str, Path]]]:
    """Add the user's own masks, where the settings ask for them.

    Raises
    ------
    RunError
        If no dataset of masks is named.
    """
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
