"""Files that are whole or not there: written beside their place, then moved into it."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a path to write to; what was written there becomes ``path`` at the end.

    A reader of ``path`` sees the old content or the new one, never a part, and so does another
    process that writes it. Whatever goes wrong, the old content stays and no other file does.

    Parameters
    ----------
    path : path
        The file to write. Its folder is made where it is missing.

    Yields
    ------
    temporary : Path
        In the same folder, with the same ending, which tells how an image is stored. Its name
        starts with a point: validators and listings pass over it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex[:12]}-{path.name[-200:]}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            named = [error.filename, error.filename2]
            # A full disk names no file, or both of a copy.
            if str(temporary) in map(str, named) or named == [None, None]:
                error.filename, error.filename2 = str(path), None
        raise


def look_anew(folder: str | Path) -> None:
    """Let a folder on NFS be read from its server next, not from this machine's memory of it."""
    with suppress(OSError):
        os.utime(folder)


def write(path: str | Path, text: str) -> Path:
    """Write ``text`` (UTF-8) to ``path``, whole and on the disk, or raise ``OSError``."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # some file systems tell only now that a disk or quota is full
    return Path(path)


def copy(source: str | Path, path: str | Path) -> Path:
    """Copy the content of ``source`` to ``path``, whole, or raise ``OSError``."""
    with replacing(path) as temporary:
        shutil.copyfile(source, temporary)
    return Path(path)
