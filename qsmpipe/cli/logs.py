"""The run's log file."""

import logging
from collections.abc import Sequence
from pathlib import Path


def log_to(log_file: Path, names: Sequence[str], *, verbose: int = 0) -> None:
    """Send what the loggers called ``names`` say to ``log_file``, and nothing to the terminal."""
    handler = logging.FileHandler(log_file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
    logging.captureWarnings(True)
    for name in names:
        logger = logging.getLogger(name)
        for old in logger.handlers:
            old.close()
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(logging.DEBUG if verbose else logging.INFO)
