"""Files whose content is kept elsewhere: git-annex, DataLad, Git LFS."""

from pathlib import Path

LONGEST = 1024
"""Bytes of a pointer at most; Git LFS promises as much."""

POINTERS = {
    b"/annex/objects/": "datalad get, or git annex get",
    b"version https://git-lfs": "git lfs pull",
}
"""How a file begins that stands for another one, and what fetches that."""


def not_fetched(path: str | Path) -> str:
    """Say that a file's content is not here, and how to get it; "" where the content is here.

    A locked annexed file is a link into ``.git/annex``; an unlocked one, and one of Git LFS, is a
    short text in the place of the content.
    """
    path = Path(path)
    if path.is_symlink() and not path.exists():
        target = path.readlink().as_posix()
        if ".git/annex/" in target:
            return f"its content is not here: {POINTERS[b'/annex/objects/']}"
        return f"a link to {target}, which is not here: mount or copy it"
    if not path.is_file() or path.stat().st_size > LONGEST:
        return ""
    start = path.read_bytes()
    return next(
        (
            f"its content is not here, but a pointer to it: {remedy}"
            for begin, remedy in POINTERS.items()
            if start.startswith(begin)
        ),
        "",
    )
