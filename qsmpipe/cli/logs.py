"""The run's log file."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path


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
