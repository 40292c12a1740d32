"""A BIDS dataset to acquisitions."""

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from qsmpipe.bids.acquisition import Acquisition, echo_of
from qsmpipe.bids.entities import ALLOWED, ENTITIES, fold, natural, relative, with_acquisition
from qsmpipe.bids.names import ALWAYS, NAME, PARTS, entities_of, fault_of, right_part
from qsmpipe.bids.sidecars import File, Sidecars, as_number
from qsmpipe.bids.survey import Found, Survey


def find(
    root: str | Path,
    *,
    participants: Sequence[str] = (),
    sessions: Sequence[str] = (),
    runs: Sequence[str] = (),
    acquisitions: Sequence[str] = (),
    filters: Mapping[str, Any] | None = None,
    database: str | Path | None = None,
) -> Found:
    """Gradient-echo acquisitions in a dataset, those without phase included.

    Files of one folder ``anat`` that differ in ``echo`` and ``part`` alone are one acquisition.
    Candidates are all MEGRE and T2starw, and any other suffix with phase, real or imaginary
    parts. A file without ``part`` is magnitude. Images that look like gradient echoes and whose
    names BIDS does not allow are refusals; what ``.bidsignore`` names is passed over. Nothing is
    written into the dataset.

    Parameters
    ----------
    root : path
        The dataset.
    participants, sessions, runs, acquisitions : sequence of str
        Labels to keep, with or without ``sub-``, ``ses-``, ``run-``, ``acq-``; indices compare
        as numbers. Empty: all.
    filters : mapping, optional
        ``{"qsm": {entity: value}}``, by pybids' names or the keys of file names: a label, a list
        of labels, None (entity absent) or ``"*"`` (entity present).
    database : path, optional
        Folder where pybids keeps its index for the next run.

    Returns
    -------
    Found
        The acquisitions, in the order of their names; beside them the refusals.

    Raises
    ------
    ValueError
        If there is no such dataset or participant, or if a filter cannot be understood.
    """
    root = Path(root).absolute()
    if not root.is_dir():
        msg = f"{root}: no such folder; give the root of a BIDS dataset"
        raise ValueError(msg)
    if database is not None and Path(database).absolute().is_relative_to(root):
        msg = f"{database}: the index must not be kept inside the dataset; give another folder"
        raise ValueError(msg)
    survey = Survey(root, participants)
    query = _query(filters)
    chosen = {
        "session": [label.removeprefix("ses-") for label in sessions],
        "run": [str(label).removeprefix("run-") for label in runs],
        "acquisition": [label.removeprefix("acq-") for label in acquisitions],
    }
    selection = {key: labels for key, labels in chosen.items() if labels}

    everything = [f for f in _index(root, survey, database) if not survey.ignores(f.path)]
    sidecars = Sidecars(root, [f for f in everything if f.extension == ".json"])
    groups: dict[tuple[Any, ...], list[File]] = defaultdict(list)
    for item in everything:
        if item.is_image and fault_of(PurePosixPath(relative(item.path, root))) is None:
            groups[item.group].append(item)
    candidates = [group for group in groups.values() if _is_candidate(group)]
    labels = _labels([group[0] for group in candidates])
    used = {item.path for group in candidates for item in group}
    refusals = survey.refusals(used, {item.path for item in everything}, selection | query)
    found: dict[str, Acquisition] = {}
    for group, named in zip(candidates, labels, strict=True):
        if named["anat"]["subject"] not in survey.wanted or not _matches(
            group[0].shared, selection
        ):
            continue
        kept = [item for item in group if _matches(item.query, query)]
        if not kept:
            continue
        if reason := _wrong_parts(kept):
            wrong_first = sorted(kept, key=lambda item: item.part in PARTS)
            refusals.append(survey.refusal(wrong_first, reason))
            continue
        acquisition = _assemble(root, kept, named, sidecars)
        if twin := found.get(acquisition.name):
            reason = (
                f"its maps would be named {acquisition.name}, as those of "
                f"{twin.relative(twin.signal[0])}: rename it"
            )
            refusals.append(survey.refusal(kept, reason))
            continue
        found[acquisition.name] = acquisition
    return Found(
        tuple(sorted(found.values(), key=lambda acquisition: natural(acquisition.name))),
        tuple(sorted(refusals, key=lambda refusal: natural(refusal.where))),
        survey.notes(),
    )


def _index(root: Path, survey: Survey, database: str | Path | None) -> list[File]:
    """Images and sidecars that could belong to an acquisition, by pybids."""
    from bids.layout import BIDSLayout, BIDSLayoutIndexer

    # Matched against paths that begin with a slash at the dataset's root: what is no subject,
    # and within subjects what is neither anat nor a sidecar on the way to it.
    ignore = [
        re.compile(r"^/(?!sub-|[^/]*\.json$)[^/]+$"),
        re.compile(r"^/sub-[^/]+/(ses-[^/]+/)?(?!anat$|ses-|[^/]*\.json$)[^/]+$"),
    ]
    # A folder that may not be listed stops pybids.
    ignore += [re.compile(rf"^/{re.escape(relative(p, root))}$") for p in survey.unreadable]
    # SQLite, which pybids writes into, takes no name whose bytes are no UTF-8.
    ignore.append(re.compile("^.*[\ud800-\udfff]"))
    if database is None:
        labels = "|".join(map(re.escape, survey.wanted)) or "(?!)"
        ignore.append(re.compile(rf"^/sub-(?!(?:{labels})(?:/|$))"))
    layout = BIDSLayout(
        root,
        validate=False,
        database_path=database,
        indexer=BIDSLayoutIndexer(validate=False, ignore=ignore, index_metadata=False),
    )
    found = []
    for text in layout.get_files(scope="self"):
        path = Path(text)
        if name := NAME.fullmatch(path.name):
            found.append(File(path, entities_of(path.name), name["suffix"], name["extension"]))
    return sorted(found, key=lambda item: natural(str(item.path)))


def _query(filters: Mapping[str, Any] | None) -> dict[str, Any]:
    if filters is None:
        return {}
    if not isinstance(filters, Mapping) or not isinstance(filters.get("qsm"), Mapping):
        have = ", ".join(filters) if isinstance(filters, Mapping) else type(filters).__name__
        msg = f'the filter needs the form {{"qsm": {{entity: value}}}}; it has {have or "nothing"}'
        raise ValueError(msg)
    by_key = {key: name for name, key in ENTITIES.items()}
    query = {}
    for entity, value in filters["qsm"].items():
        name = by_key.get(entity, entity)
        if name not in (*ENTITIES, "suffix", "datatype", "extension"):
            known = ", ".join(ENTITIES)
            msg = f"the filter's entity {entity!r} does not exist: one of {known}, suffix"
            raise ValueError(msg)
        query[name] = value
    return query


def _matches(entities: Mapping[str, str], query: Mapping[str, Any]) -> bool:
    """Whether entities have what a query asks for."""

    def one(name: str, wanted: Any) -> bool:
        have = entities.get(name)
        if wanted is None or have is None:
            return wanted is None and have is None
        if isinstance(wanted, list | tuple):
            return any(one(name, item) for item in wanted)
        label = str(wanted).removeprefix(f"{ENTITIES.get(name, name)}-")
        return label in ("*", have) or (
            label.isdecimal() and have.isdecimal() and int(label) == int(have)
            and name in ("run", "echo", "inv", "flip", "chunk")
        )  # fmt: skip

    return all(one(name, wanted) for name, wanted in query.items())


def _is_candidate(group: Sequence[File]) -> bool:
    return group[0].suffix in ALWAYS or any(
        right_part(item.part) in ("phase", "real", "imag") for item in group
    )


def _wrong_parts(group: Sequence[File]) -> str:
    """Say which parts of an acquisition BIDS does not know; "" if all are right."""
    wrong = dict.fromkeys(item.part for item in group if item.part not in PARTS)
    if not wrong:
        return ""
    shown = []
    for part in wrong:
        token = part if "-" in part else f"part-{part}"
        right = right_part(part)
        shown.append(f"write part-{right} for {token}" if right else f"{token} is unknown")
    return (
        f"BIDS has part-mag, part-phase, part-real and part-imag: {', '.join(shown)} in the names "
        "of the images and their sidecars"
    )


def _assemble(
    root: Path,
    group: Sequence[File],
    labels: Mapping[str, Mapping[str, str]],
    sidecars: Sidecars,
) -> Acquisition:
    """Sort the files of one acquisition by part and echo."""
    parts: dict[str, list[File]] = {"mag": [], "phase": [], "real": [], "imag": []}
    for item in sorted(group, key=lambda item: (echo_of(item.path) or 0, str(item.path))):
        parts[item.part].append(item)
    ignored = []
    if explicit := [item for item in parts["mag"] if "part" in item.entities]:
        # A scanner's own combination without "part" may stand beside the magnitude.
        ignored += [item for item in parts["mag"] if "part" not in item.entities]
        parts["mag"] = explicit
    polar = bool(parts["mag"] and parts["phase"])
    if parts["real"] and parts["imag"] and not polar:
        ignored += parts["mag"] + parts["phase"]
        parts |= {"mag": [], "phase": []}
    elif parts["phase"]:
        ignored += parts["real"] + parts["imag"]
        parts |= {"real": [], "imag": []}

    used = [*itertools.chain.from_iterable(parts.values())]
    metadata = {item.path: sidecars.of(item) for item in used}
    problems, remarks = sidecars.told(used)
    files = {part: tuple(item.path for item in items) for part, items in parts.items()}
    signal = files["real"] or files["imag"] or files["phase"] or files["mag"]
    return Acquisition(
        root=root,
        entities=group[0].shared,
        suffix=group[0].suffix,
        magnitude=files["mag"],
        phase=files["phase"],
        real=files["real"],
        imag=files["imag"],
        echo_times=tuple(as_number(metadata[path].get("EchoTime")) for path in signal),
        metadata=metadata[signal[0]],
        sidecars=metadata,
        problems=tuple(problems),
        remarks=tuple(remarks),
        ignored=tuple(item.path for item in ignored),
        labels=labels,
    )


def _labels(groups: Sequence[File]) -> list[dict[str, Mapping[str, str]]]:
    """Entities of the outputs of each acquisition, in ``anat`` and ``fmap``; no two alike.

    Derived maps take fewer entities than raw files: the others move into ``acq``. So does the
    suffix where a MEGRE and a T2starw would get one name. In ``fmap`` no name may be contained
    in another one, or the validator takes a field map to have two magnitudes.
    """
    anat = [fold(item.shared, ALLOWED["anat"]) for item in groups]
    taken = [tuple(sorted(entities.items())) for entities in anat]
    for i, item in enumerate(groups):
        if taken.count(taken[i]) > 1 and item.suffix != "MEGRE":
            anat[i] = with_acquisition(anat[i], anat[i].get("acquisition", "") + item.suffix)

    fmap = [fold(entities, ALLOWED["fmap"]) for entities in anat]
    crowded = [
        any(
            i != j and (mine.items() <= other.items() or other.items() <= mine.items())
            for j, other in enumerate(fmap)
            if other["subject"] == mine["subject"] and other.get("session") == mine.get("session")
        )
        for i, mine in enumerate(fmap)
    ]
    for i in [i for i, is_crowded in enumerate(crowded) if is_crowded]:
        fmap[i] = fold(anat[i], ("subject", "session", "acquisition"))
        if "acquisition" not in fmap[i]:
            fmap[i] = with_acquisition(fmap[i], groups[i].suffix)
    return [{"anat": a, "fmap": f} for a, f in zip(anat, fmap, strict=True)]
