"""Words of the command line to a :class:`Request`."""

import argparse
import itertools
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qsmpipe import __version__
from qsmpipe.cli.errors import Exit, RunError
from qsmpipe.cli.words import Parser
from qsmpipe.methods import METHODS
from qsmpipe.nets.weights import WEIGHTS_SUFFIX
from qsmpipe.settings import Settings, combine, parse_assignments, presets
from qsmpipe.slurm import FORMS

LEVELS = ("participant",)


@dataclass(frozen=True)
class Request:
    """What the user asks for."""

    settings: Settings
    command: str
    dry_run: bool = False
    reports_only: bool = False
    boilerplate_only: bool = False
    verbose: int = 0
    job_of: str = ""
    """The run whose job this is, for one subject (:mod:`qsmpipe.cli.slurm`)."""


def parse(words: Sequence[str]) -> Request:
    """Take settings and mode from the command line.

    Raises
    ------
    RunError
        With the exit code for wrong usage, or for an unknown analysis level.
    """
    given = vars(build_parser().parse(words))
    if given["analysis_level"] not in LEVELS:
        level = given["analysis_level"]
        raise RunError(
            Exit.UNKNOWN_LEVEL,
            f"analysis level {level!r} is unknown: qsmpipe knows {', '.join(LEVELS)}",
        )
    modes = {key: given.pop(key) for key in ("dry_run", "reports_only", "boilerplate_only")}
    verbose, job_of = given.pop("verbose"), given.pop("job_of")
    config_file = given.pop("config_file")
    del given["analysis_level"]
    try:
        given["parameters"] = _parameters(given)
        given["derivatives"] = _named_paths(given["derivatives"])
        settings = combine(given, config_file)
        if job_of:
            settings = replace(settings, slurm="")
    except ValueError as error:
        raise RunError(Exit.USAGE, str(error)) from error
    command = shlex.join(["qsmpipe", *words])
    return Request(settings, command, verbose=verbose, job_of=job_of, **modes)


def _parameters(given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Take the methods' parameters out of the words; files of weights get their whole path."""
    parameters = parse_assignments(given.pop("set") or [])
    for option, name in (("weights", "weights"), ("accept_licence", "licence")):
        value = given.pop(option)
        if value is not None:
            parameters.setdefault("inversion", {})[name] = value
    for values in parameters.values():
        weights = values.get("weights")
        if isinstance(weights, str) and weights.endswith(WEIGHTS_SUFFIX):
            values["weights"] = str(Path(weights).absolute())
    return parameters


def _named_paths(words: Sequence[str] | None) -> dict[str, str] | None:
    """Take ``NAME=PATH`` apart at the first ``=``; a path may have more, or no name.

    >>> _named_paths(["masks=/data/run=2", "/data/a=b", "./c=d"])
    {'masks': '/data/run=2', 'derivatives': '/data/a=b', 'derivatives1': './c=d'}

    Raises
    ------
    ValueError
        If a name or a path is empty, or two have one name.
    """
    if words is None:
        return None
    named: dict[str, str] = {}
    unnamed = []
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or "/" in name or os.sep in name:
            unnamed.append(word)
            continue
        if not (name and path):
            msg = f"--derivatives {word!r}: write NAME=DIR, as in masks=/data/masks, or DIR alone"
            raise ValueError(msg)
        if name in named:
            msg = (
                f"--derivatives: {named[name]} and {path} are both called {name!r}: give each a "
                "name of its own"
            )
            raise ValueError(msg)
        named[name] = path
    free = (name for n in itertools.count() if (name := f"derivatives{n or ''}") not in named)
    return named | dict(zip(free, unnamed, strict=False))


def _memory(word: str) -> float:
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([KMGT]?)B?", word.strip().upper())
    if not match:
        msg = f"{word!r} is no amount of memory: write 16 (GB), 16G or 16000M"
        raise argparse.ArgumentTypeError(msg)
    return float(match[1]) * {"": 1, "K": 1e-6, "M": 1e-3, "G": 1, "T": 1e3}[match[2]]


def _methods(stage: str) -> str:
    return "; ".join(f"{name}: {row.summary}" for name, row in METHODS[stage].items())


def build_parser() -> Parser:
    """Make the parser, importing neither torch nor Nipype."""
    parser = Parser(
        last_words=(*LEVELS, "group"),
        prog="qsmpipe",
        description="Quantitative susceptibility mapping of a BIDS dataset.",
        epilog="Options may be written with hyphens or underscores, and stand anywhere; an option "
        "of several values may be given again, and its values add up. Also: 'qsmpipe simulate "
        "--help' makes example datasets.",
    )
    add = parser.add_argument
    add("bids_dir", help="the BIDS dataset; it is never written to")
    add("output_dir", help="where the derivative dataset is written")
    add("analysis_level", help="participant")
    add("--version", action="version", version=f"qsmpipe {__version__}")
    add("-v", "--verbose", action="count", default=0, help="more in the log file")

    group = parser.add_argument_group("what to process")
    add = group.add_argument
    add("--participant-label", nargs="+", action="extend", metavar="LABEL")
    add("--session-label", nargs="+", action="extend", metavar="LABEL")
    add("--run-label", nargs="+", action="extend", metavar="INDEX")
    add("--acquisition-label", nargs="+", action="extend", metavar="LABEL")
    add("--bids-filter-file", metavar="JSON", help='{"qsm": {entity: value, null or "*"}}')
    add("--bids-database-dir", metavar="DIR", help="keep the dataset's index here")
    add("--skip-bids-validation", action="store_true", default=None)
    add(
        "-d",
        "--derivatives",
        nargs="+",
        action="extend",
        metavar="NAME=DIR",
        help="datasets with masks to use (--mask given, --reference region:LABEL)",
    )

    group = parser.add_argument_group("methods")
    add = group.add_argument
    described = " ".join(f"{name}: {row['description']}" for name, row in presets().items())
    add("--preset", choices=presets(), help=described.replace("%", "%%"))
    for stage, extra in (("offset", ["none"]), ("unwrap", []), ("field", []),
                         ("relaxation", ["none"]), ("swi", ["none"])):  # fmt: skip
        add(f"--{stage}", choices=[*METHODS[stage], *extra], help=_methods(stage))
    add(
        "--background",
        metavar="METHOD[+METHOD...]",
        help=f"a method, or several that follow on one another. {_methods('background')}",
    )
    add(
        "--inversion",
        metavar="METHOD[,METHOD...]",
        help="a method, or several side by side, with their median: the first one gives the "
        f"Chimap without desc. {_methods('inversion')}",
    )
    add(
        "--mask",
        metavar="EXPRESSION",
        help=f"a method, several joined by & (both) or | (either), as in 'bet & quality', or "
        f"'given' (from --derivatives). {_methods('mask')}",
    )
    add(
        "--mask-residual",
        type=float,
        metavar="SHARE",
        help="before the background is removed, leave out voxels in which the field fit leaves "
        "more than this share of the signal over, 0.3 for example (default: none)",
    )
    add(
        "--uncertainty",
        type=int,
        nargs="?",
        const=16,
        metavar="N",
        help="also map the standard deviation of susceptibility, from N noisy fields that go "
        "through background removal and inversion (default: 16, which takes 16 times their time)",
    )
    add(
        "--two-pass",
        action="store_true",
        default=None,
        help="map where the phase is reliable, then once more to fill the holes: for bleeds and "
        "the like; takes twice the time",
    )
    add(
        "--cosmos",
        action="store_const",
        const="cosmos",
        help="also invert all acquisitions of each subject together, as one head at 2 or more "
        "orientations (COSMOS); the labels above choose which",
    )
    add("--mask-erosion", type=float, metavar="MM", help="erode the brain mask by this (mm)")
    add(
        "--reference",
        metavar="WHAT",
        help="what becomes 0: the mean of the brain; csf: of the ventricles, found by R2* below "
        "5 /s, or another limit as in csf:8; region:LABEL (from --derivatives); none",
    )
    add(
        "--set",
        action="extend",
        nargs="+",
        metavar="STAGE.NAME=VALUE",
        help="a method's parameter, as in inversion.lambda=1e-4; --dry-run lists them all",
    )
    add(
        "--weights",
        metavar="FILE",
        help="the network's weights, as 'qsmpipe train' writes them (.safetensors, with the card "
        "beside it), instead of qsmpipe's own; for one of several networks "
        "--set inversion.METHOD.weights=FILE",
    )
    add(
        "--accept-licence",
        metavar="NAME",
        help="accept the licence of these weights, where it is not qsmpipe's own",
    )
    add("--b0", type=float, metavar="TESLA", help="field strength, instead of the sidecar's")
    add(
        "--b0-direction",
        type=float,
        nargs=3,
        metavar=("X", "Y", "Z"),
        help="along B0 in the voxel axes of every image, instead of the header's: for images "
        "whose header has lost the scanner's axes; its length does not matter",
    )
    add("--phase-sign", type=int, choices=(1, -1), help="instead of the manufacturer's")
    add("--intermediates", action="store_true", default=None,
        help="also write offset-free and unwrapped phase, noise and quality")  # fmt: skip

    group = parser.add_argument_group("running")
    add = group.add_argument
    add("-w", "--work-dir", metavar="DIR", help="kept between runs to resume (default: ./work)")
    add("--device", choices=("auto", "cpu", "cuda"))
    add("--nprocs", "--nthreads", "--n-cpus", type=int, metavar="N", dest="nprocs",
        help="processors in all (default: all)")  # fmt: skip
    add("--omp-nthreads", type=int, metavar="N", help="threads of one node")
    add("--mem-gb", "--mem", type=_memory, metavar="GB", dest="mem_gb", help="memory in all")
    add("--use-plugin", metavar="YAML", help="a Nipype plugin and its plugin_args")
    add(
        "--slurm",
        metavar="KEY=VALUE[,...]",
        help="process each subject in a job of Slurm's, and wait for all of them, as in "
        f"partition=short,time=4:00:00; 'auto' for none of your own. Keys: {', '.join(FORMS)}",
    )
    add("--job-of", metavar="RUN", default="", help=argparse.SUPPRESS)
    add("--config-file", metavar="TOML", help="settings, as in logs/RUN/config.toml")
    add("--stop-on-first-crash", action="store_true", default=None)
    add("--dry-run", action="store_true", help="check the input, say what would be done")
    add("--reports-only", action="store_true", help="write the reports of earlier results anew")
    add("--boilerplate-only", action="store_true", help="write the methods text only")
    return parser
