"""Masks of the user in derivative datasets."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from qsmpipe import images
from qsmpipe.bids.acquisition import Acquisition
from qsmpipe.bids.entities import ENTITIES


def find_mask(
    derivatives: str | Path | Sequence[str | Path],
    acquisition: Acquisition,
    *,
    label: str | None = None,
) -> Path | None:
    """Mask of an acquisition in derivative datasets; None if there is none.

    Its name has the acquisition's entities, or some of them where it lies on the acquisition's
    grid. Of several the one with most entities wins, then the earlier folder.

    Parameters
    ----------
    derivatives : path or sequence of paths
        Roots of derivative datasets.
    acquisition
        What the mask is for.
    label : str, optional
        ``desc`` or ``label`` of the mask. Without it the brain mask is meant: ``brain``, or
        neither ``desc`` nor ``label``.

    Raises
    ------
    ValueError
        If the only masks of the right name are on another grid.
    """
    folders = [derivatives] if isinstance(derivatives, str | Path) else derivatives
    own = [dict(acquisition.entities), *map(dict, acquisition.labels.values())]
    ranked: list[tuple[tuple[int, ...], Path]] = []
    for position, folder in enumerate(folders):
        for path in sorted((Path(folder) / f"sub-{acquisition.subject}").rglob("*_mask.nii*")):
            have = _entities_of(path.name)
            kind = {have.pop("desc", None), have.pop("label", None)} - {None}
            for key in ("space", "part", "echo", "res", "den"):
                have.pop(key, None)
            if kind != {label or "brain"} and (label or kind):
                continue
            if not any(have.items() <= _by_key(entities).items() for entities in own):
                continue
            named = any(have == _by_key(entities) for entities in own)
            compressed = path.name.endswith(".gz")
            rank = (not named, -len(have), not kind, position, not compressed)
            ranked.append((tuple(map(int, rank)), path))
    ranked.sort()
    for _, path in ranked:
        if images.same_grid(path, acquisition.signal[0]):
            return path
    exact = [path for rank, path in ranked if not rank[0]]
    if exact:
        msg = (
            f"{exact[0]} {images.shape_of(exact[0])} is not on the grid of "
            f"{acquisition.relative(acquisition.signal[0])} "
            f"{images.shape_of(acquisition.signal[0])}: resample the mask onto it"
        )
        raise ValueError(msg)
    return None


def _entities_of(name: str) -> dict[str, str]:
    """Keys and labels in a file name, whatever the keys."""
    return dict(re.findall(r"(?:^|_)([a-z]+)-([a-zA-Z0-9+]+)(?=_)", name))


def _by_key(entities: Mapping[str, str]) -> dict[str, str]:
    return {ENTITIES[name]: label for name, label in entities.items()}
