"""Entities of BIDS names: their keys, their order, and which of them a derived map may have."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

ENTITIES = {
    "subject": "sub", "session": "ses", "sample": "sample", "task": "task",
    "acquisition": "acq", "nucleus": "nuc", "volume": "voi", "ceagent": "ce", "tracer": "trc",
    "staining": "stain", "reconstruction": "rec", "direction": "dir", "run": "run",
    "modality": "mod", "echo": "echo", "flip": "flip", "inv": "inv", "mt": "mt", "part": "part",
    "proc": "proc", "space": "space", "recording": "recording", "chunk": "chunk",
}  # fmt: skip

ALLOWED = {
    "anat": ("subject", "session", "task", "acquisition", "ceagent", "reconstruction", "run",
             "chunk"),
    "fmap": ("subject", "session", "acquisition", "run", "chunk"),
}  # fmt: skip
"""Entities that the validator accepts in the names of derived maps, by folder."""


def fold(entities: Mapping[str, str], allowed: Sequence[str]) -> dict[str, str]:
    """Move entities that are not allowed into the label of ``acq``.

    >>> fold({"subject": "1", "acquisition": "x", "inv": "2"}, ("subject", "acquisition"))
    {'subject': '1', 'acquisition': 'xInv2'}
    """
    kept = {key: label for key, label in entities.items() if key in allowed}
    moved = [
        ENTITIES[key].capitalize() + entities[key]
        for key in ENTITIES
        if key in entities and key not in allowed
    ]
    if not moved:
        return kept
    label = entities.get("acquisition", "") + "".join(moved)
    return with_acquisition(kept, label[0].lower() + label[1:])


def with_acquisition(entities: Mapping[str, str], label: str) -> dict[str, str]:
    """Give entities another label of ``acq``, in the order of file names."""
    changed = {**entities, "acquisition": label}
    return {key: changed[key] for key in ENTITIES if key in changed}


def join(entities: Mapping[str, str]) -> str:
    """Write entities as file names begin."""
    return "_".join(f"{k}-{entities[name]}" for name, k in ENTITIES.items() if name in entities)


def relative(path: Path, root: Path) -> str:
    """Path within the dataset, or the whole path of what lies elsewhere."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def natural(text: str) -> list[tuple[int, str]]:
    """Key to sort names by, numbers in them by their size."""
    return [(int(t), t) if t.isdecimal() else (-1, t) for t in re.split(r"(\d+)", text)]
