"""One self-contained HTML page per subject, and an index; made from the runs' records alone."""

import base64
import math
import re
import unicodedata
from collections.abc import Sequence
from datetime import datetime
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from qsmpipe import files
from qsmpipe.methods import METHODS
from qsmpipe.records import Figure, Logbook, NodeRun, Number, Record, Run, Step, said_of
from qsmpipe.references import references
from qsmpipe.reports.boilerplate import (
    STAGES,
    checklist,
    cited,
    methods_text,
    settings_text,
    value_text,
)
from qsmpipe.reports.flow import draw, sentence
from qsmpipe.reports.labels import COMPARED, HEADLINES, INDEXED

SECTIONS = (
    "Susceptibility", "Susceptibility weighting", "Magnitude and masks", "Field", "Phase",
    "Relaxation",
)  # fmt: skip
"""Order of the pictures' sections; others follow."""

LEVELS = ("error", "warning", "note")

VERDICTS = {
    "ok": "Done",
    "warning": "Done, with warnings",
    "error": "Failed",
    "refused": "Refused by the input check",
    "interrupted": "Stopped before it was done",
    "started": "Not finished",
}
"""What heads an acquisition."""


def build_subject(out_dir: str | Path, subject: str, book: Logbook) -> Path:
    """Write ``<out_dir>/sub-<subject>.html``.

    Parameters
    ----------
    out_dir : path
        Where the runs wrote their results.
    subject : str
        Label, with or without ``sub-``.
    book : Logbook
        The records of all runs (:func:`qsmpipe.records.read`).

    Returns
    -------
    page : Path
        The page; it needs no other file and no network.
    """
    out_dir, subject = Path(out_dir), subject.removeprefix("sub-")
    records = book.shown(subject)
    text = methods_text(records, book.runs)
    keys = cited(text)
    runs = book.runs_of(records)
    html = _environment().get_template("report.html.jinja").render(
        title=f"sub-{subject}",
        made=_made(runs),
        subject=subject,
        acquisitions=[
            _acquisition(record, book, out_dir, place) for place, record in enumerate(records, 1)
        ],
        runs=[_run(run, records) for run in runs],
        methods=_paragraphs(text, keys),
        bibliography=[references()[key] for key in keys if key in references()],
    )  # fmt: skip
    return files.write(out_dir / f"sub-{subject}.html", html)


def build_index(out_dir: str | Path, book: Logbook) -> Path:
    """Write ``<out_dir>/index.html``, which links the subjects' pages.

    Parameters
    ----------
    out_dir : path
        Where the runs wrote their results and pages.
    book : Logbook
        The records of all runs (:func:`qsmpipe.records.read`).

    Returns
    -------
    page : Path
    """
    out_dir = Path(out_dir)
    rows: list[dict[str, Any]] = []
    for record in book.current:
        own = f"sub-{record.subject}.html"
        messages = _messages(record)
        rows.append(
            {
                "name": record.name,
                "subject": record.subject,
                "page": own if (out_dir / own).is_file() else "",
                "anchor": _anchor(record.name),
                "verdict": _verdict(record),
                "warnings": sum(m["level"] == "warning" for m in messages),
                "errors": sum(m["level"] == "error" for m in messages),
                "numbers": {number["label"]: number["text"] for number in _numbers(record)},
                "seconds": sum(_finite(node.wall_seconds) for node in record.nodes),
            }
        )
    labels = [label for label in INDEXED if any(label in row["numbers"] for row in rows)]
    verdicts = [row["verdict"] for row in rows]
    shown = book.shown()
    runs = book.runs_of(shown)
    html = _environment().get_template("index.html.jinja").render(
        title="All subjects",
        made=_made(runs),
        rows=rows,
        labels=labels,
        counts=[(key, VERDICTS[key], verdicts.count(key)) for key in VERDICTS if key in verdicts],
        subjects=len({row["subject"] for row in rows}),
        runs=[_run(run, shown) for run in runs],
    )  # fmt: skip
    return files.write(out_dir / "index.html", html)


def _environment() -> Environment:
    loader = FileSystemLoader(str(package_files("qsmpipe.data")))
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "duration": _duration,
        "memory": _memory,
        "moment": _moment,
        "value": value_text,
        "setting": settings_text,
    }
    environment.globals |= {"verdicts": VERDICTS, "levels": LEVELS}
    return environment


def _acquisition(record: Record, book: Logbook, out_dir: Path, place: int) -> dict[str, Any]:
    run = book.runs[record.run]
    messages = _messages(record)
    longest = max([_finite(node.wall_seconds) for node in record.nodes], default=0) or 1
    numbers = _numbers(record)
    is_current = record in book.current
    return {
        "name": record.name,
        "id": f"a{place}",
        "anchor": _anchor(record.name) + ("" if is_current else "-earlier"),
        "is_current": is_current,
        "run": run,
        "verdict": _verdict(record),
        "messages": {level: [m for m in messages if m["level"] == level] for level in LEVELS},
        "facts": record.acquisition,
        "findings": record.findings,
        "headlines": [n for label in HEADLINES for n in numbers if n["label"] == label],
        "numbers": numbers,
        "sections": _sections([_picture(figure, out_dir) for figure in record.figures]),
        "flow": draw(record.plan, {n.name: n.status for n in record.nodes}, f"a{place}-flow"),
        "plan": [sentence(step) for step in record.plan],
        "steps": [_step(step) for step in record.steps],
        "nodes": [_node(node, longest) for node in record.nodes],
        "seconds": sum(_finite(node.wall_seconds) for node in record.nodes),
        "peak": max([_finite(node.peak_memory_mb) for node in record.nodes], default=0),
        "checklist": checklist(record, run),
    }


def _node(node: NodeRun, longest: float) -> dict[str, Any]:
    return {
        "name": node.name,
        "status": node.status,
        "seconds": node.wall_seconds,
        "share": round(100 * _finite(node.wall_seconds) / longest),
        "memory": node.peak_memory_mb,
    }


def _numbers(record: Record) -> list[dict[str, str]]:
    """Key numbers as text; a number in two units is one row."""
    rows: dict[str, list[str]] = {}
    for number in record.numbers:
        rows.setdefault(number.label, []).append(_quantity(number))
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
        {"level": "error", "where": f.node, "text": f.message, "crash_file": f.crash_file}
        for f in record.failures
    ]
    messages += [{"level": f.level, "where": f.check, "text": f.message} for f in record.findings]
    messages += [
        {"level": "warning", "where": "earlier run", "text": said_of(earlier, record)}
        for earlier in record.earlier
    ]
    for step in record.steps:
        warnings = list(step.warnings)
        if step.convergence and not step.convergence.converged and not warnings:
            count = step.convergence.iterations
            warnings = [f"stopped after {count} iterations, not converged"]
        where = f"{step.stage} ({step.method})"
        messages += [{"level": "warning", "where": where, "text": text} for text in warnings]
    return sorted(messages, key=lambda message: LEVELS.index(message["level"]))


def _verdict(record: Record) -> str:
    if record.status == "done":
        levels = {message["level"] for message in _messages(record)}
        return "warning" if levels & {"error", "warning"} else "ok"
    return "error" if record.status == "failed" else record.status


def _picture(figure: Figure, out_dir: Path) -> dict[str, Any]:
    path = out_dir / figure.file
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    width, height = _png_size(data)
    return {
        "title": figure.title or path.stem,
        "caption": figure.caption,
        "section": figure.section or "Pictures",
        "file": figure.file,
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


def _step(step: Step) -> dict[str, Any]:
    row = METHODS.get(step.stage, {}).get(step.method)
    convergence = step.convergence
    words = ""
    if convergence:
        words = f"{convergence.iterations} iterations"
        if convergence.change is not None:
            words += f", change {convergence.change:.2g}"
            if convergence.tolerance is not None:
                words += f" (stops below {convergence.tolerance:.2g})"
    return {
        "stage": STAGES.get(step.stage, step.stage),
        "method": step.method,
        "summary": row.summary if row else "",
        "parameters": {
            name.removesuffix("_"): value_text(value) for name, value in step.parameters.items()
        },
        "converged": convergence.converged if convergence else None,
        "convergence": words,
    }


def _run(run: Run, records: Sequence[Record]) -> dict[str, Any]:
    """Tell of a run, and which of ``records`` are its."""
    own = [record.name for record in records if record.run == run.id]
    shown = {name: x for name, x in run.settings.items() if x not in ("", [], {}, None)}
    return {
        "run": run,
        "names": own if len(own) < len(records) else [],
        "count": len(own),
        "settings": shown,
    }


def _made(runs: Sequence[Run]) -> dict[str, str]:
    """Say by which version and when a page's results were made."""
    versions = dict.fromkeys(v for run in runs if (v := run.versions.get("qsmpipe")))
    moments = [moment for run in runs if (moment := run.finished or run.started)]
    return {
        "versions": ", ".join(versions),
        "moment": _moment(max(moments)) if moments else "",
    }


def _moment(moment: datetime | None) -> str:
    return moment.strftime("%Y-%m-%d %H:%M:%S") if moment else ""


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


def _quantity(number: Number) -> str:
    values = number.value if isinstance(number.value, tuple) else (number.value,)
    return f"{' to '.join(map(_figure, values))} {number.unit}".strip()


def _figure(value: float | None) -> str:
    """Write a number with four figures, thousands apart, minus as a minus."""
    if value is None or not math.isfinite(value):
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


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


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
