"""What a run leaves behind for its report: one record per acquisition and one for the run.

``logs/acquisitions/<name>.json`` holds ``name``, ``subject``, ``status`` ("done", "failed",
"refused" or "planned"), ``acquisition`` (label to value), ``findings`` (level, check, message),
``steps`` (stage, method, parameters, convergence, warnings), ``numbers`` (label, value, unit),
``figures`` (file, title, caption, section), ``nodes`` (name, wall_seconds, peak_memory_mb,
status) and ``errors`` (node, message, crash_file). ``logs/run.json`` holds ``command``,
``versions``, ``settings``, ``started`` and ``finished``. All but the name may be missing.
"""

import json
from pathlib import Path
from typing import Any, TypeAlias

Record: TypeAlias = dict[str, Any]

BRAIN_VOLUME = "Brain mask"
QSM_VOLUME = "QSM mask"
LOST = "Brain mask lost by erosion"
ECHOES = "Echoes"
CHI_SD = "Susceptibility, SD"
CHI_MEAN = "Susceptibility, mean"
REFERENCE = "Reference value subtracted"
EDGE = "Local field, size at the edge over centre"
LEFT = "Background left in the local field"
JUMPS = "Phase jumps left in the total field"
EXTREME = "Voxels beyond 1 ppm"
R2STAR = "R2*, median"

HEADLINES = (ECHOES, BRAIN_VOLUME, LOST, CHI_SD, REFERENCE, LEFT, JUMPS, R2STAR)
"""Labels of the numbers that head a report."""

INDEXED = (BRAIN_VOLUME, LOST, CHI_SD, LEFT, JUMPS)
"""Labels of the numbers that the index compares."""

COMPARED = ("Total field", "Local field")
"""Titles of pictures of the same slices, to be looked at in turn."""

_FIELDS: dict[str, type] = {
    "acquisition": dict,
    "findings": list,
    "steps": list,
    "numbers": list,
    "figures": list,
    "nodes": list,
    "errors": list,
}


def read_records(out_dir: str | Path, subject: str | None = None) -> list[Record]:
    """Read the records of a run's acquisitions, by name; of one subject, or of all.

    A record that cannot be read (a run was killed while it wrote) counts as a failed
    acquisition that says so.

    Parameters
    ----------
    out_dir : path
        Where the run wrote its results.
    subject : str, optional
        Label, with or without ``sub-``.
    """
    files = sorted((Path(out_dir) / "logs/acquisitions").glob("*.json"))
    records = [_read(path) for path in files]
    wanted = None if subject is None else subject.removeprefix("sub-")
    return [record for record in records if wanted in (None, record["subject"])]


def read_run(out_dir: str | Path) -> Record:
    """Read the run's own record; empty if there is none."""
    path = Path(out_dir) / "logs/run.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return run if isinstance(run, dict) else {}


def _read(path: Path) -> Record:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            msg = "not a JSON object"
            raise ValueError(msg)
    except (OSError, ValueError) as error:
        message = f"{path.name} is not a readable record ({error}): run this acquisition again"
        record = {"status": "failed", "errors": [{"node": "", "message": message}]}
    record = {name: kind() for name, kind in _FIELDS.items()} | {
        key: value for key, value in record.items() if value is not None
    }
    record.setdefault("name", path.stem)
    record.setdefault("status", "planned")
    subject = str(record.get("subject") or path.stem.split("_")[0])
    record["subject"] = subject.removeprefix("sub-")
    return record
