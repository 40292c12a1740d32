"""The methods section of a run, with its references and the rows of the consensus' tables.

Citations are pandoc's: ``[@key]``, with keys of ``data/references.bib``.
"""

import json
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qsmpipe import files
from qsmpipe.methods import METHODS, needs_background
from qsmpipe.records import Record, Run, Step
from qsmpipe.references import bibliography
from qsmpipe.reports.labels import CHI_MEAN, REFERENCE

CONSENSUS = "qsmconsensus2024"
ALWAYS = (
    "gorgolewski2017", "gorgolewski2016", "gorgolewski2011", "nibabel", "yarkoni2019",
    "paszke2019", "harris2020", "virtanen2020", CONSENSUS,
)  # fmt: skip
"""What every run stands on: apps and format, Nipype, nibabel, pybids, PyTorch, NumPy, SciPy."""

UNSTATED = "not stated"

BESIDE = {
    ("mask", "residual"): (
        "Voxels whose relative residual of the field fit exceeds {threshold} were left out of the "
        "mask.",
        (CONSENSUS,),
    ),
    ("passes", "reliable"): (
        "Susceptibility was mapped in two passes: where phase quality was above a threshold "
        "({threshold}), and in the whole mask, from which the holes of the first map were filled.",
        ("stewart2022",),
    ),
}
"""Steps that are no method to choose: what a paper says of them, and citations."""

STAGES = {
    "offset": "phase offset",
    "phase": "phase",
    "mask": "mask",
    "unwrap": "unwrapping",
    "field": "total field",
    "relaxation": "relaxation",
    "swi": "susceptibility-weighted imaging",
    "background": "background removal",
    "inversion": "dipole inversion",
    "cosmos": "inversion of all orientations",
    "passes": "two passes",
    "reference": "referencing",
    "uncertainty": "uncertainty",
}
"""Stage to its name in a sentence."""


class Item(NamedTuple):
    """A row of the reporting tables (3 to 5) of the consensus."""

    table: str
    name: str
    level: str
    """"mandatory", "essential" or "recommended"."""
    labels: tuple[str, ...] = ()
    """Labels of the acquisition's record that answer it; the first known ones are given."""


CHECKLIST = (
    Item("Hardware", "Field strength", "essential", ("Field strength (T)",)),
    Item("Hardware", "Vendor", "essential", ("Manufacturer",)),
    Item("Hardware", "Model", "recommended", ("Model",)),
    Item("Hardware", "Software", "recommended", ("Scanner software",)),
    Item("Hardware", "Coils", "recommended", ("Receive coil", "Coil combination")),
    Item("Hardware", "Gradients", "recommended", ("Gradients",)),
    Item("Sequence", "Type", "essential", ("Pulse sequence", "Sequence", "Acquisition")),
    Item("Sequence", "Echo times TE1:ΔTE:TEmax", "essential",
         ("TE1:ΔTE:TEmax (ms)", "Echo times (ms)")),
    Item("Sequence", "Voxel size", "essential", ("Voxel size (mm)",)),
    Item("Sequence", "Acceleration", "essential",
         ("Parallel imaging", "In-plane acceleration")),
    Item("Sequence", "Repetition time", "recommended",
         ("Repetition time (s)", "Repetition time of excitation (s)")),
    Item("Sequence", "Flip angle", "recommended", ("Flip angle (degrees)",)),
    Item("Sequence", "Bandwidth", "recommended", ("Bandwidth (Hz per pixel)",)),
    Item("Sequence", "Field of view and matrix", "recommended", ("Matrix",)),
    Item("Sequence", "Monopolar or bipolar readout", "recommended", ("Readout polarity",)),
    Item("Sequence", "Flow compensation", "recommended", ("Flow compensation",)),
    Item("Sequence", "Elliptical shutter", "recommended", ("Elliptical shutter",)),
    Item("Sequence", "Partial Fourier", "recommended", ("Partial Fourier",)),
    Item("Sequence", "Centre frequency", "recommended", ("Imaging frequency (MHz)",)),
)  # fmt: skip
"""Rows of Tables 3 and 4 that an acquisition's record can answer."""


def methods_text(records: Sequence[Record], runs: Mapping[str, Run]) -> str:
    """Write the methods section of one run or of several.

    Parameters
    ----------
    records : sequence of Record
        What became of the acquisitions. Those that were processed alike share a paragraph,
        whatever run they are of; runs of other versions, or with another reference, have
        paragraphs of their own.
    runs : mapping
        Name to run, of all that ``records`` name.

    Returns
    -------
    text : str
        Markdown with pandoc's citations.
    """
    parts = list(_by_software(records, runs))
    if not parts:
        return "No acquisition was processed."
    paragraphs = []
    for run, own in parts:
        if len(parts) > 1:
            paragraphs.append(f"**{', '.join(record.name for record in own)}**")
        paragraphs.append(_opening(own, run))
        groups = _alike(own)
        for sentences, names in groups.items():
            if len(groups) > 1:
                paragraphs.append(f"**{', '.join(names)}.**")
            paragraphs.append(" ".join(sentences))
        paragraphs.append(_closing(own, run))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _by_software(
    records: Sequence[Record], runs: Mapping[str, Run]
) -> Iterator[tuple[Run, list[Record]]]:
    """Group the processed acquisitions of runs that compute, and refer to, the same."""
    groups: dict[tuple[object, ...], tuple[Run, list[Record]]] = {}
    for record in records:
        if record.steps:
            run = runs.get(record.run, Run(record.run))
            key = (*run.versions.items(), run.settings.get("reference"))
            groups.setdefault(key, (run, []))[1].append(record)
    yield from groups.values()


def cited(text: str) -> list[str]:
    """List the keys that a text cites, in order of first appearance."""
    groups = re.findall(r"\[(@[^\]]+)\]", text)
    return list(dict.fromkeys(key for group in groups for key in re.findall(r"@([\w:-]+)", group)))


def checklist(record: Record, run: Run) -> list[dict[str, str]]:
    """Answer every row of the consensus' Tables 3 to 5 for one acquisition.

    Parameters
    ----------
    record : Record
        What became of the acquisition.
    run : Run
        In which run.

    Returns
    -------
    rows : list of dict
        ``table``, ``name``, ``level``, ``value``; a value that nobody knows is "not stated".
    """
    known = record.acquisition
    rows = []
    for item in CHECKLIST:
        values = [_united(known, label) for label in item.labels if known.get(label)]
        if item.name.startswith("Echo times"):
            values = values[:1]
        rows.append(_row(item.table, item.name, item.level, "; ".join(values)))
    rows.append(_row("Pipeline", "Toolbox and version", "mandatory", _toolbox(run.versions)))
    for step in record.steps:
        stage = STAGES.get(step.stage, step.stage)
        rows.append(_row("Pipeline", f"Algorithm: {stage}", "mandatory", _algorithm(step)))
    if not record.steps:
        rows.append(_row("Pipeline", "Algorithms and parameters", "mandatory", ""))
    rows += [
        _row(
            "Pipeline",
            "Resampling, changes to headers",
            "mandatory",
            "local fields resampled to the grid of the first orientation (cubic spline)"
            if any(step.stage == "cosmos" for step in record.steps)
            else "none: processed on the acquired grid with the B0 direction of its affine",
        ),
        _row("Pipeline", "Referencing", "mandatory", _reference_words(record, run)),
        *_region_row(record, run),
        _row("Pipeline", "Inclusion criteria", "recommended", ""),
    ]
    return rows


def write_boilerplate(
    folder: str | Path, records: Sequence[Record], runs: Mapping[str, Run]
) -> tuple[Path, Path]:
    """Write ``CITATION.md`` and ``CITATION.bib`` into ``folder``.

    Parameters
    ----------
    folder : path
        ``logs``, for all runs together, or the folder of one run in it.
    records : sequence of Record
        The acquisitions to tell of.
    runs : mapping
        Name to run, of all that ``records`` name.

    Returns
    -------
    markdown, bibtex : Path
    """
    methods = methods_text(records, runs)
    text = [
        "# Methods",
        "Written by qsmpipe for use in a paper's methods section (CC0). Citations are keys of "
        "`CITATION.bib`.",
        methods,
        "# Parameters",
        _parameters(records),
        "# What the consensus asks to report",
        _tables(records, runs),
        "# References",
    ]
    markdown = "\n\n".join(part for part in text if part) + "\n"
    return (
        files.write(Path(folder) / "CITATION.md", markdown),
        files.write(Path(folder) / "CITATION.bib", bibliography(cited(methods))),
    )


def value_text(value: Any) -> str:
    """Write a parameter's value for a reader: 0.0001, or 12, 11, 10."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == "":
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {value_text(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(value_text(item) for item in value) or "none"
    return str(value)


def sentence(step: Step) -> str:
    """Say what a step did, with its citations.

    A placeholder of the method's text without a parameter takes the words in its brackets along.
    """
    row = METHODS.get(step.stage, {}).get(step.method)
    if (step.stage, step.method) in BESIDE:
        text, keys = BESIDE[step.stage, step.method]
        return _cite(_fill(text, step.parameters), keys)
    if row is None:
        what = STAGES.get(step.stage, step.stage)
        if step.stage == "reference" or not what:
            return ""
        details = f" ({_listing(step.parameters)})" if step.parameters else ""
        return f"{what.capitalize()}: {step.method}{details}."
    return _cite(_fill(row.text, step.parameters), row.cite)


def _cite(text: str, keys: Iterable[str]) -> str:
    keys = tuple(keys)
    if not keys:
        return text
    return f"{text.rstrip('.')} [{'; '.join(f'@{key}' for key in keys)}]."


def _fill(text: str, parameters: Mapping[str, Any]) -> str:
    """Put parameters into a text; drop what is said in brackets about missing ones."""

    def names(part: str) -> set[str]:
        found = {field for _, field, _, _ in string.Formatter().parse(part) if field}
        return {re.split(r"[.\[]", field)[0] for field in found}

    def bracket(match: re.Match[str]) -> str:
        parts = [part for part in match[2].split(", ") if names(part) <= set(parameters)]
        return f"{match[1]}({', '.join(parts)})" if parts else ""

    text = re.sub(r"(\s*)\(([^()]*)\)", bracket, text)
    return re.sub(
        r"\{(\w+)[^{}]*\}",
        lambda m: value_text(parameters[m[1]]) if m[1] in parameters else "of its default value",
        text,
    )


def _alike(records: Sequence[Record]) -> dict[tuple[str, ...], list[str]]:
    """Sentences to the names of the acquisitions that they are about."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for record in records:
        # of two passes, the second does what the first did
        steps = tuple(filter(None, dict.fromkeys(_sentences(record.steps))))
        acquisition = _acquisition(record)
        key = ((acquisition,) if acquisition else ()) + steps
        groups.setdefault(key, []).append(record.name)
    return groups


def _sentences(steps: Sequence[Step]) -> Iterator[str]:
    """Sentence of each step; a removed background that led to no map is said to be for itself."""
    inversions = [step.method for step in steps if step.stage == "inversion"]
    beside = bool(inversions) and not needs_background(inversions)
    for step in steps:
        text = sentence(step)
        if beside and step.stage == "background":
            text = f"For the local field alone, {text[0].lower()}{text[1:]}"
        yield text


def _acquisition(record: Record) -> str:
    known = record.acquisition

    def get(label: str) -> str:
        return str(known.get(label) or "")

    scanner = " ".join(dict.fromkeys(v for v in (get("Manufacturer"), get("Model")) if v))
    strength = f"at {get('Field strength (T)')} T" if get("Field strength (T)") else ""
    times = get("TE1:ΔTE:TEmax (ms)")
    details = [
        f"TE1:ΔTE:TEmax {times} ms" if times else f"TE {get('Echo times (ms)')} ms"
        if get("Echo times (ms)") else "",
        f"TR {get('Repetition time (s)')} s" if get("Repetition time (s)") else "",
        f"flip angle {get('Flip angle (degrees)')}°" if get("Flip angle (degrees)") else "",
        f"voxel size {get('Voxel size (mm)')} mm" if get("Voxel size (mm)") else "",
        f"matrix {get('Matrix')}" if get("Matrix") else "",
    ]  # fmt: skip
    listed = ", ".join(detail for detail in details if detail)
    if not (listed or strength):
        return ""
    kind = get("Acquisition")
    name = f"{kind} gradient-echo images" if kind else "Gradient-echo images"
    words = [name, "were acquired", strength, f"({scanner})" if scanner else ""]
    text = " ".join(word for word in words if word)
    return f"{text}: {listed}." if listed else f"{text}."


def _opening(records: Sequence[Record], run: Run) -> str:
    versions = run.versions

    def numbered(name: str, package: str) -> str:
        return f"{name} {versions[package]}" if versions.get(package) else name

    people = len({record.subject for record in records})
    count = f"{len(records)} acquisition{'s' * (len(records) != 1)} of {people} participant"
    about = f"{count}{'s' * (people != 1)}"
    verb = "was" if len(records) == 1 else "were"
    return (
        f"{about} {verb} processed with {numbered('qsmpipe', 'qsmpipe')}, a BIDS App "
        f"[@gorgolewski2017; @gorgolewski2016] built on {numbered('Nipype', 'nipype')} "
        f"[@gorgolewski2011], with {numbered('nibabel', 'nibabel')} [@nibabel], "
        f"{numbered('PyBIDS', 'pybids')} [@yarkoni2019], {numbered('PyTorch', 'torch')} "
        f"[@paszke2019], {numbered('NumPy', 'numpy')} [@harris2020] and "
        f"{numbered('SciPy', 'scipy')} [@virtanen2020]. Fields and susceptibility are in ppm of "
        "B0; a paramagnetic source is positive. All steps ran on the acquired grid, with the "
        "direction of B0 taken from the image's orientation."
    )


def _closing(records: Sequence[Record], run: Run) -> str:
    words = dict.fromkeys(_reference_words(record, run, value=False) for record in records)
    said = " ".join(f"{word[0].upper()}{word[1:]}." for word in words if word != UNSTATED)
    return (
        f"{said} Processing is reported as recommended by the consensus of the ISMRM "
        f"Electro-Magnetic Tissue Properties study group [@{CONSENSUS}]."
    ).strip()


def _reference_words(record: Record, run: Run, *, value: bool = True) -> str:
    """Say what susceptibility is relative to."""
    steps = [step for step in record.steps if step.stage == "reference"]
    choice = str(run.settings.get("reference") or (steps[-1].method if steps else ""))
    kind, _, label = choice.partition(":")
    if not kind or not record.steps:
        return UNSTATED
    if kind == "none":
        return "susceptibility is in ppm, not referenced to a region"
    parameters = steps[-1].parameters if steps else {}
    limit = parameters.get("threshold") or label
    region = (
        "the mean over the cerebrospinal fluid of the ventricles"
        f"{f' (R2* below {value_text(limit)} /s)' if limit else ''}"
        f"{'' if value else ' [@liu2018]'}" if kind == "csf"
        else f"the mean over the region {label}" if label
        else "the mean over the given region" if kind == "region"
        else "the mean over the whole brain mask in which susceptibility was computed"
    )  # fmt: skip
    text = f"susceptibility is in ppm, relative to {region}"
    found = _value(record, REFERENCE)
    if value and found is not None:
        text += f" ({found:+.4g} ppm was subtracted)"
    return text


def _region_row(record: Record, run: Run) -> list[dict[str, str]]:
    """Relate a reference region to the whole brain, as Table 5 wants it."""
    if not str(run.settings.get("reference", "")).startswith(("region", "csf")):
        return []
    mean = _value(record, CHI_MEAN)
    steps = [step for step in record.steps if step.stage == "reference"]
    spread = steps[-1].parameters.get("deviation") if steps else None
    shown = f"SD {spread:.4g} ppm" if isinstance(spread, float) else "SD not stated"
    words = f"mean {-mean:+.4g} ppm, {shown}" if mean is not None else ""
    return [_row("Pipeline", "Reference region relative to the whole brain", "mandatory", words)]


def _value(record: Record, label: str) -> float | None:
    """Look up a key number."""
    for number in record.numbers:
        if number.label == label and isinstance(number.value, int | float):
            return float(number.value)
    return None


def _united(known: Mapping[str, Any], label: str) -> str:
    """Put the unit in a label's brackets behind its value."""
    unit = re.search(r"\(([^()]*)\)$", label)
    return f"{known[label]} {unit[1]}" if unit else str(known[label])


def _row(table: str, name: str, level: str, value: str) -> dict[str, str]:
    return {"table": table, "name": name, "level": level, "value": value or UNSTATED}


def _toolbox(versions: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {versions[name]}" for name in ("qsmpipe", "nipype", "torch") if name in versions
    )


def _listing(parameters: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name.removesuffix('_')} = {value_text(value)}" for name, value in parameters.items()
    )


def _algorithm(step: Step) -> str:
    listed = _listing(step.parameters)
    return f"{step.method}{': ' + listed if listed else ''}"


def _parameters(records: Sequence[Record]) -> str:
    """List every parameter, defaults included, once for acquisitions that share them."""
    groups: dict[str, list[str]] = {}
    for record in records:
        lines = [f"- {STAGES.get(s.stage, s.stage)}: {_algorithm(s)}" for s in record.steps]
        if lines:
            groups.setdefault("\n".join(lines), []).append(record.name)
    return _headed(groups)


def _tables(records: Sequence[Record], runs: Mapping[str, Run]) -> str:
    """Write Tables 3 to 5, once for acquisitions with the same answers."""
    groups: dict[str, list[str]] = {}
    for record in records:
        if not record.steps:
            continue
        rows = checklist(record, runs.get(record.run, Run(record.run)))
        lines = ["| table | row | level | value |", "|---|---|---|---|"]
        lines += [
            f"| {row['table']} | {row['name']} | {row['level']} | {_cell(row['value'])} |"
            for row in rows
        ]
        groups.setdefault("\n".join(lines), []).append(record.name)
    return _headed(groups)


def _headed(groups: Mapping[str, Sequence[str]]) -> str:
    """Join texts; with several, each behind the acquisitions that it is about."""
    if len(groups) == 1:
        return next(iter(groups))
    return "\n\n".join(f"{', '.join(names)}:\n\n{lines}" for lines, names in groups.items())


def _cell(text: str) -> str:
    return " ".join(text.replace("|", r"\|").split())


def settings_text(value: Any) -> str:
    """Write a setting for a reader; nested ones as JSON."""
    return json.dumps(value) if isinstance(value, Mapping) and value else value_text(value)
