"""What a run says: on the terminal, and in its log file."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from qsmpipe.checks import Examination, head_name

logger = logging.getLogger("qsmpipe")


class _LogFile(logging.FileHandler):
    """A log file that does without its lines, quietly, when the disk is full."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's)
        """Drop ``record`` if it cannot be written."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def log_to(log_file: Path, names: Sequence[str], *, verbose: int = 0) -> None:
    """Send what the loggers called ``names`` say to ``log_file``, and nothing to the terminal."""
    handler = _LogFile(log_file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
    logging.captureWarnings(True)
    for name in names:
        logger = logging.getLogger(name)
        for old in logger.handlers:
            old.close()
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(logging.DEBUG if verbose else logging.INFO)


def line(text: str) -> None:
    """Say a line on the terminal and in the log."""
    logger.info(text)
    print(text, file=sys.stderr, flush=True)


def announce(examinations: list[Examination]) -> None:
    """Say what is refused and what is unusual."""
    for examination in examinations:
        name = examination.acquisition.name
        for finding in examination.errors:
            line(f"{name}: refused: {finding.message}")
        for finding in examination.warnings:
            line(f"{name}: warning: {finding.message}")


def announce_heads(heads: list[Examination]) -> None:
    """Say which subjects have too few orientations."""
    for head in heads:
        for finding in head.errors:
            line(f"{head_name(head)}: refused: {finding.message}")
