"""The command line: words to settings, settings to a run, a run to an exit code."""

import sys
from collections.abc import Sequence
from dataclasses import replace

from qsmpipe import __version__
from qsmpipe.cli.errors import Exit, RunError
from qsmpipe.cli.folders import absolute, check_folders
from qsmpipe.cli.parser import Request, parse
from qsmpipe.cli.resources import check_job, check_slurm, has_gpu, read_plugin
from qsmpipe.cli.server import start_server
from qsmpipe.cli.signals import Stopped

SUBCOMMANDS = {
    "simulate": "qsmpipe.cli.simulate",
    "dicom": "qsmpipe.cli.dicom",
    "train": "qsmpipe.cli.train",
}
"""First words that are not a dataset; a folder of such a name is given as ``./simulate``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``qsmpipe`` and give its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words and words[0] in SUBCOMMANDS:
            from importlib import import_module

            return int(import_module(SUBCOMMANDS[words[0]]).main(words[1:]))
        request = prepared(parse(words))
        from qsmpipe.cli.run import run  # loads torch: for some seconds

        return int(run(request))
    except RunError as failure:
        print(f"qsmpipe: {failure}", file=sys.stderr)
        return int(failure.code)
    except Stopped as stop:
        print(f"qsmpipe: {stop}; run the same command again to resume", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print("qsmpipe: interrupted; run the same command again to resume", file=sys.stderr)
        return int(Exit.INTERRUPTED)


def prepared(request: Request) -> Request:
    """Check folders, settings and resources; then let a run's server import beside the run.

    Raises
    ------
    RunError
        If a folder or a resource is missing, or a setting cannot be.
    """
    settings = absolute(request.settings)
    check_folders(settings)
    try:
        settings.check()
    except ValueError as error:
        raise RunError(Exit.USAGE, str(error)) from error
    if request.reports_only or request.boilerplate_only:
        return replace(request, settings=settings)
    plugin = read_plugin(settings.use_plugin)
    if settings.device == "cuda":  # only then may it refuse, and it imports torch to know
        has_gpu(settings.device, plugin, settings.slurm)
    if settings.slurm:
        check_slurm(settings)
    if request.job_of:
        check_job(settings, request.job_of)
    if not request.dry_run:
        print(f"qsmpipe {__version__} reads {settings.bids_dir}", file=sys.stderr, flush=True)
        if not (settings.use_plugin or settings.slurm):
            start_server()
    return replace(request, settings=settings)
