"""Paths within a dataset: what they say, and what BIDS does not allow in them."""

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import NamedTuple

from qsmpipe.bids.entities import ENTITIES

ALWAYS = ("MEGRE", "T2starw")
"""Suffixes that are gradient echoes even where phase is missing; others need their phase."""

PARTS = ("mag", "phase", "real", "imag")

SPELLINGS = {
    "mag": ("mag", "magn", "magnitude", "m"),
    "phase": ("phase", "pha", "phs", "ph", "p"),
    "real": ("real", "re", "r"),
    "imag": ("imag", "imaginary", "im", "i"),
}
"""Parts as they are written in names, in lower case."""

MEANS_PART = re.compile(
    r"^(?:rec|acq|part)-(?:magn?|magnitude|phase|pha|phs|ph|real|imag|imaginary)$", re.IGNORECASE
)
"""Tokens of a name that tell the part, the right one (part-phase) among them."""

GRADIENT_ECHO = re.compile(r"^(?:megre|t2starw)", re.IGNORECASE)

OTHER_DATA = {
    "func", "dwi", "fmap", "perf", "eeg", "ieeg", "meg", "beh", "pet", "micr", "nirs", "motion",
    "mrs", "emg",
}  # fmt: skip
"""Folders whose images may have phase without being gradient echoes of the kind that QSM needs."""

FORMATS = (
    ".nii.gz", ".nii", ".img", ".hdr", ".mgz", ".mgh", ".nrrd", ".nhdr", ".mha", ".mhd", ".mnc",
    ".rec", ".par", ".dcm", ".nii.zip", ".nii.bz2", ".nii.xz", ".nii.zst",
)  # fmt: skip
"""Endings of images, in lower case."""

INDICES = {"run", "echo", "flip", "inv", "chunk"}
"""Keys whose labels are numbers."""

LABEL = re.compile(r"[0-9a-zA-Z+]+")

NAME = re.compile(
    r"(?:(?P<tokens>.+)_)?(?P<suffix>[a-zA-Z0-9+]+)(?P<extension>\.nii|\.nii\.gz|\.json)"
)


class Fault(NamedTuple):
    """Why images cannot belong to an acquisition."""

    where: str
    """Folder or file within the dataset that has to change."""
    reason: str
    """What is wrong with it, and what to do."""


def entities_of(name: str) -> dict[str, str]:
    """Entities in a file name, in their order; keys that BIDS does not know are passed over.

    >>> entities_of("sub-01_coil-3_echo-02_MEGRE.nii.gz")
    {'subject': '01', 'echo': '02'}
    """
    pairs = (token.partition("-") for token in name.split("_")[:-1])
    keyed = {key: label for key, dash, label in pairs if dash}
    return {long: keyed[key] for long, key in ENTITIES.items() if key in keyed}


def looks_like_gradient_echo(path: PurePosixPath) -> bool:
    """Whether a file's name speaks of a gradient echo, right or wrong.

    >>> looks_like_gradient_echo(PurePosixPath("sub-01/anat/sub-01_part-Phase_GRE.nii.gz"))
    True
    >>> looks_like_gradient_echo(PurePosixPath("sub-01/func/sub-01_part-phase_bold.nii.gz"))
    False
    """
    name = path.name.lower()
    if not name.endswith(FORMATS):
        return False
    tokens = re.split(r"[_.]", name)
    if any(map(GRADIENT_ECHO.match, tokens)):
        return True
    if OTHER_DATA & {folder.lower() for folder in path.parts[:-1]}:
        return False
    return any(
        token in ("phase", "ph") or ((found := MEANS_PART.match(token)) and "mag" not in found[0])
        for token in tokens
    )


def part_of(entities: Mapping[str, str]) -> str:
    """Part that a name gives, right or wrong: "mag" where it gives none.

    >>> part_of({"part": "Phase"}), part_of({"reconstruction": "phase"}), part_of({"echo": "1"})
    ('Phase', 'rec-phase', 'mag')
    """
    if "part" in entities:
        return entities["part"]
    for name in ("reconstruction", "acquisition"):
        token = f"{ENTITIES[name]}-{entities.get(name, '')}"
        if MEANS_PART.match(token):
            return token
    return "mag"


def right_part(part: str) -> str:
    """Name the part that a wrong one stands for; "" where that cannot be told."""
    word = part.rpartition("-")[2].lower()
    return next((right for right, words in SPELLINGS.items() if word in words), "")


def fault_of(path: PurePosixPath) -> Fault | None:
    """Find what BIDS does not allow in the path of an anatomical image; None where all is right.

    >>> fault_of(PurePosixPath("sub-01/anat/sub-02_MEGRE.nii.gz")).reason
    'the file says sub-02, its folder sub-01: rename the one that is wrong'
    """
    folders = path.parts[:-1]
    top, *inner = folders or ("",)
    if not top.startswith("sub-"):
        return Fault(
            top,
            "a subject's folder is called sub-<label>, in lower case and with a hyphen: rename it",
        )
    if fault := _wrong_label(top):
        return Fault(top, fault)
    known = {"sub": top.removeprefix("sub-")}
    if inner and inner[0].lower().startswith("ses"):
        session = f"{top}/{inner[0]}"
        if not inner[0].startswith("ses-"):
            return Fault(
                session, "a session's folder is called ses-<label>, in lower case: rename it"
            )
        if fault := _wrong_label(inner[0]):
            return Fault(session, fault)
        known["ses"] = inner.pop(0).removeprefix("ses-")
    if inner != ["anat"]:
        right = "/".join([*(f"{key}-{label}" for key, label in known.items()), "anat"])
        return Fault(
            "/".join(folders),
            f"BIDS has gradient echoes in {right} alone: move them there, or name them in "
            ".bidsignore if they are something else",
        )
    return _wrong_name(path, known)


def _wrong_name(path: PurePosixPath, known: Mapping[str, str]) -> Fault | None:
    """Find what is wrong with a file's name, in a folder of the subject and session ``known``."""
    where = path.as_posix()
    match = NAME.fullmatch(path.name)
    if match is None or match["extension"] == ".json":
        if path.name.lower().endswith((".nii", ".nii.gz")):
            return Fault(
                where,
                "its name must end in a suffix, as in _echo-1_part-mag_MEGRE.nii.gz: rename it",
            )
        return Fault(where, "images are .nii or .nii.gz in BIDS: convert it")
    tokens = (match["tokens"] or "").split("_")
    keys = [token.partition("-")[0] for token in tokens]
    for token in tokens:
        key, dash, label = token.partition("-")
        if not dash or not label:
            return Fault(where, f"{token!r} in its name is no key-label pair: rename it")
        if key not in ENTITIES.values() and key.lower() in ENTITIES.values():
            return Fault(where, f"{key}- is written {key.lower()}- in BIDS: rename it")
        if fault := _wrong_label(token):
            return Fault(where, fault)
        if key in INDICES and not label.isdecimal():
            return Fault(where, f"the label of {key}- is a number in BIDS: rename it")
    if twice := [key for key, count in Counter(keys).items() if count > 1]:
        return Fault(where, f"{twice[0]}- stands twice in its name: rename it")
    said = dict(token.split("-") for token in tokens)
    for key in ("sub", "ses"):
        if said.get(key) != known.get(key):
            mine, its = (
                f"{key}-{table[key]}" if key in table else f"no {key}-" for table in (said, known)
            )
            return Fault(
                where,
                f"the file says {mine}, its folder {its}: rename the one that is wrong",
            )
    return None


def _wrong_label(token: str) -> str:
    """Say what BIDS does not allow in the label of ``key-label``; "" if nothing."""
    key, _, label = token.partition("-")
    if LABEL.fullmatch(label):
        return ""
    if not label:
        return f"{key}- has no label: rename it, as in {key}-01"
    strange = "".join(dict.fromkeys(LABEL.sub("", label)))
    shown = " and ".join("a space" if sign == " " else repr(sign) for sign in strange)
    plain = unicodedata.normalize("NFKD", label)
    better = "".join(LABEL.findall(plain)) or "01"
    return (
        f"the label {label!r} of {key}- holds {shown}, and BIDS allows letters without accents, "
        f"digits and +: rename folders and files, for example to {key}-{better}"
    )
