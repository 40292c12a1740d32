"""The command line: words to settings, settings to a run, a run to an exit code."""

import sys
from collections.abc import Sequence

from qsmpipe.cli.errors import Exit, RunError
from qsmpipe.cli.parser import parse
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
        request = parse(words)
        from qsmpipe.cli.run import run

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
