"""One self-contained HTML page per subject, and an index; made from a run's records alone."""

import base64
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from qsmpipe.methods import METHODS
from qsmpipe.reports.boilerplate import (
    STAGES,
    checklist,
    cited,
    methods_text,
    references,
    settings_text,
    value_text,
)
from qsmpipe.reports.records import (
    COMPARED,
    HEADLINES,
    INDEXED,
    Record,
    read_records,
    read_run,
)

SECTIONS = (
    "Susceptibility", "Susceptibility weighting", "Magnitude and masks", "Field", "Phase",
    "Relaxation",
)  # fmt: skip
"""Order of the pictures' sections; others follow."""

LEVELS = ("error", "warning", "note")

STATUS = {
    "done": "Done",
    "failed": "Failed",
    "refused": "Refused",
    "planned": "Not run",
}

VERDICTS = {
    "ok": "Done",
    "warning": "Done, with warnings",
    "error": "Failed",
    "refused": "Refused by the input check",
    "planned": "Not run",
}
"""What heads an acquisition."""


def build_subject(out_dir: str | Path, subject: str) -> Path:
    """Write ``<out_dir>/sub-<subject>.html``.

    Parameters
    ----------
    out_dir : path
        Where the run wrote its results and records.
    subject : str
        Label, with or without ``sub-``.

    Returns
    -------
    page : Path
        The page; it needs no other file and no network.
    """
    out_dir, subject = Path(out_dir), subject.removeprefix("sub-")
    run = read_run(out_dir)
    records = read_records(out_dir, subject)
    text = methods_text(records, run)
    keys = cited(text)
    page = out_dir / f"sub-{subject}.html"
    html = _environment().get_template("report.html.jinja").render(
        title=f"sub-{subject}",
        subject=subject,
        acquisitions=[_acquisition(r, run, out_dir, place) for place, r in enumerate(records, 1)],
        run=_run(run),
        methods=_paragraphs(text, keys),
        bibliography=[references()[key] for key in keys if key in references()],
    )  # fmt: skip
    page.write_text(html, encoding="utf-8")
    return page


def build_index(out_dir: str | Path) -> Path:
    """Write ``<out_dir>/index.html``, which links the subjects' pages.

    Parameters
    ----------
    out_dir : path
        Where the run wrote its results, records and pages.

    Returns
    -------
    page : Path
    """
    out_dir = Path(out_dir)
    run = read_run(out_dir)
    rows = []
    for record in read_records(out_dir):
        own = f"sub-{record['subject']}.html"
        rows.append(
            {
                "name": record["name"],
                "subject": record["subject"],
                "page": own if (out_dir / own).is_file() else "",
                "anchor": _anchor(record["name"]),
                "verdict": _verdict(record),
                "warnings": sum(m["level"] == "warning" for m in _messages(record)),
                "errors": sum(m["level"] == "error" for m in _messages(record)),
                "numbers": {number["label"]: number["text"] for number in _numbers(record)},
                "seconds": sum(_finite(node.get("wall_seconds")) for node in record["nodes"]),
            }
        )
    labels = [label for label in INDEXED if any(label in row["numbers"] for row in rows)]
    verdicts = [row["verdict"] for row in rows]
    page = out_dir / "index.html"
    html = _environment().get_template("index.html.jinja").render(
        title="All subjects",
        rows=rows,
        labels=labels,
        counts=[(key, VERDICTS[key], verdicts.count(key)) for key in VERDICTS if key in verdicts],
        subjects=len({row["subject"] for row in rows}),
        run=_run(run),
    )  # fmt: skip
    page.write_text(html, encoding="utf-8")
    return page


def _environment() -> Environment:
    loader = FileSystemLoader(str(files("qsmpipe.data")))
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "duration": _duration,
        "memory": _memory,
        "value": value_text,
        "setting": settings_text,
    }
    environment.globals |= {"verdicts": VERDICTS, "levels": LEVELS}
    return environment


def _acquisition(record: Record, run: Record, out_dir: Path, place: int) -> dict[str, Any]:
    messages = _messages(record)
    pictures = [_picture(figure, out_dir) for figure in record["figures"]]
    nodes = [node | {"seconds": _finite(node.get("wall_seconds"))} for node in record["nodes"]]
    longest = max([node["seconds"] for node in nodes], default=0) or 1
    numbers = _numbers(record)
    return {
        "name": record["name"],
        "id": f"a{place}",
        "anchor": _anchor(record["name"]),
        "verdict": _verdict(record),
        "messages": {level: [m for m in messages if m["level"] == level] for level in LEVELS},
        "facts": record["acquisition"],
        "findings": record["findings"],
        "headlines": [n for label in HEADLINES for n in numbers if n["label"] == label],
        "numbers": numbers,
        "sections": _sections(pictures),
        "steps": [_step(step) for step in record["steps"]],
        "nodes": [node | {"share": round(100 * node["seconds"] / longest)} for node in nodes],
        "seconds": sum(node["seconds"] for node in nodes),
        "peak": max([_finite(node.get("peak_memory_mb")) for node in nodes], default=0),
        "errors": record["errors"],
        "checklist": checklist(record, run),
    }


def _numbers(record: Record) -> list[dict[str, str]]:
    """Key numbers as text; a number in two units is one row."""
    rows: dict[str, list[str]] = {}
    for number in record["numbers"]:
        rows.setdefault(str(number.get("label", "")), []).append(_quantity(number))
    return [
        {
            "label": label,
            "text": first + (f" ({', '.join(rest)})" if rest else ""),
            "value": first.partition(" ")[0] if " to " not in first else first,
            "unit": first.partition(" ")[2] if " to " not in first else "",
        }
        for label, (first, *rest) in rows.items()
    ]


def _messages(record: Record) -> list[dict[str, str]]:
    """Everything that a reader must know, errors first."""
    messages = [
        {
            "level": "error",
            "where": str(error.get("node") or "run"),
            "text": str(error.get("message", "")),
            "crash_file": str(error.get("crash_file") or ""),
        }
        for error in record["errors"]
    ]
    messages += [
        {
            "level": str(finding.get("level", "note")),
            "where": str(finding.get("check", "")),
            "text": str(finding.get("message", "")),
        }
        for finding in record["findings"]
    ]
    for step in record["steps"]:
        warnings = [str(warning) for warning in step.get("warnings") or []]
        convergence = step.get("convergence")
        if convergence and not convergence.get("converged") and not warnings:
            warnings = [f"stopped after {convergence.get('iterations')} iterations, not converged"]
        messages += [
            {"level": "warning", "where": f"{step.get('stage')} ({step.get('method')})", "text": w}
            for w in warnings
        ]
    order = {level: place for place, level in enumerate(LEVELS)}
    return sorted(messages, key=lambda message: order.get(message["level"], len(order)))


def _verdict(record: Record) -> str:
    levels = {message["level"] for message in _messages(record)}
    if record["status"] == "done":
        return "warning" if levels & {"error", "warning"} else "ok"
    return {"refused": "refused", "planned": "planned"}.get(record["status"], "error")


def _picture(figure: Mapping[str, Any], out_dir: Path) -> dict[str, Any]:
    path = out_dir / str(figure.get("file", ""))
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    width, height = _png_size(data)
    title = str(figure.get("title") or path.stem)
    return {
        "title": title,
        "caption": str(figure.get("caption", "")),
        "section": str(figure.get("section") or "Pictures"),
        "file": str(figure.get("file", "")),
        "source": Markup(f"data:image/png;base64,{base64.b64encode(data).decode()}")
        if width
        else "",
        "width": width,
        "height": height,
    }


def _png_size(data: bytes) -> tuple[int, int]:
    """Width and height of a PNG; 0 of anything else."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or len(data) < 24:
        return 0, 0
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def _sections(pictures: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Group pictures by section; pictures of the same slices are to be flicked through."""
    names = dict.fromkeys(picture["section"] for picture in pictures)
    order = [name for name in SECTIONS if name in names]
    sections = []
    for name in [*order, *(name for name in names if name not in order)]:
        own = [picture for picture in pictures if picture["section"] == name]
        compared = [p for p in own if p["title"] in COMPARED and p["source"]]
        if len(compared) < 2:
            compared = []
        sections.append(
            {
                "name": name,
                "id": _anchor(name),
                "compared": compared,
                "pictures": [picture for picture in own if picture not in compared],
            }
        )
    return sections


def _step(step: Mapping[str, Any]) -> dict[str, Any]:
    stage, method = str(step.get("stage", "")), str(step.get("method", ""))
    row = METHODS.get(stage, {}).get(method)
    convergence = step.get("convergence") or None
    words = ""
    if convergence:
        words = f"{convergence.get('iterations')} iterations"
        if convergence.get("change") is not None:
            change, tolerance = convergence["change"], convergence.get("tolerance")
            words += f", change {change:.2g}"
            words += f" (stops below {tolerance:.2g})" if tolerance is not None else ""
    return {
        "stage": STAGES.get(stage, stage),
        "method": method,
        "summary": row.summary if row else "",
        "parameters": {
            name.removesuffix("_"): value_text(value)
            for name, value in (step.get("parameters") or {}).items()
        },
        "converged": convergence.get("converged") if convergence else None,
        "convergence": words,
        "warnings": step.get("warnings") or [],
    }


def _run(run: Record) -> dict[str, Any]:
    settings = run.get("settings") or {}
    command = run.get("command") or ""
    return {
        "command": " ".join(map(str, command)) if isinstance(command, list) else str(command),
        "versions": run.get("versions") or {},
        "settings": {
            name: value for name, value in settings.items() if value not in ("", [], {}, None)
        },
        "started": _moment(run.get("started")),
        "finished": _moment(run.get("finished")),
    }


def _moment(stamp: Any) -> str:
    """Date and time for a reader, of ``YYYYmmdd-HHMMSS``; anything else as it is."""
    try:
        return datetime.strptime(str(stamp), "%Y%m%d-%H%M%S").strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        return str(stamp or "")


def _paragraphs(text: str, keys: Sequence[str]) -> list[Markup]:
    """Turn the methods' Markdown into HTML: citations to numbered links, names to bold."""
    known = [key for key in keys if key in references()]

    def link(match: re.Match[str]) -> str:
        numbers = sorted(
            known.index(key) + 1 for key in re.findall(r"@([\w:-]+)", match[0]) if key in known
        )
        inner = ", ".join(f'<a href="#ref-{n}">{n}</a>' for n in numbers)
        return f"[{inner}]" if inner else ""

    paragraphs = []
    for paragraph in text.split("\n\n"):
        html = str(escape(paragraph))
        html = re.sub(r"\[@[^\]]+\]", link, html)
        html = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html)
        paragraphs.append(Markup(html))
    return paragraphs


def _quantity(number: Mapping[str, Any]) -> str:
    value = number.get("value")
    values = value if isinstance(value, list | tuple) else [value]
    text = " to ".join(_figure(v) for v in values)
    unit = str(number.get("unit") or "")
    return f"{text} {unit}".strip()


def _figure(value: Any) -> str:
    """Write a number with four figures, thousands apart, minus as a minus."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "unknown" if value is None else str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "unknown"
    if isinstance(value, int) or (value == round(value) and abs(value) < 1e6):
        text = f"{value:,.0f}"
    elif abs(value) < 1e6:
        digits = 3 - math.floor(math.log10(abs(value)))
        text = f"{value:,.{min(max(digits, 0), 6)}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
        text = "0" if text == "-0" else text
    else:
        text = f"{value:.3e}"
    return text.replace(",", "\N{NARROW NO-BREAK SPACE}").replace("-", "\N{MINUS SIGN}")


def _finite(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def _duration(seconds: float | None) -> str:
    seconds = _finite(seconds)
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _memory(megabytes: float | None) -> str:
    megabytes = _finite(megabytes)
    if not megabytes:
        return ""
    return f"{megabytes / 1024:.2f} GB" if megabytes >= 1024 else f"{megabytes:.0f} MB"


def _anchor(name: str) -> str:
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_-]+", "-", plain).strip("-") or "acquisition"
