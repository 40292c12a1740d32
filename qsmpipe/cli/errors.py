"""Exit codes of BIDS Apps (BEP027) and the exception that carries one."""

import errno
import os
from enum import IntEnum
from pathlib import Path

DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE,
                  errno.EACCES, errno.EPERM})  # fmt: skip
"""What the system answers when a disk is full or can no longer be written to."""


class Exit(IntEnum):
    """Exit codes."""

    OK = 0
    FAILURE = 1
    """At least one acquisition failed or was refused; the others are done."""
    INVALID_BIDS = 16
    UNKNOWN_LEVEL = 17
    NO_FILES = 18
    USAGE = 64
    BAD_DATA = 65
    """No acquisition passed the input check."""
    NO_INPUT = 66
    UNAVAILABLE = 69
    """What the command needs is not installed."""
    CANNOT_CREATE = 73
    IO_ERROR = 74
    """The disk filled up, or could no longer be written to, while the run went on."""
    HUNG_UP = 129
    INTERRUPTED = 130
    TERMINATED = 143


class RunError(Exception):
    """What ends the run before it starts: one message for the user and an exit code."""

    def __init__(self, code: Exit, message: str) -> None:
        super().__init__(message)
        self.code = code


def remedy(number: int, path: Path, work_dir: str) -> str:
    """Say what to do about a disk that cannot be written to."""
    return (
        f"cannot write to {path}: {os.strerror(number)}; free space or mend the disk, or choose "
        f"another output folder: what was computed is kept in {work_dir}, and the same "
        "command goes on from there"
    )
