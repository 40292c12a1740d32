"""The bibliography of the methods, ``data/references.bib``, read by bibtexparser."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Reference:
    """An entry of the bibliography."""

    key: str
    kind: str
    """``article``, ``book`` and the like."""
    fields: Mapping[str, str]
    """By name, without the braces that keep capitals; ``author`` is not among them."""
    authors: tuple[str, ...]
    """As in ``Liu T``; ``et al.`` for others that are not named."""
    source: str
    """The entry as it stands in the file."""

    @property
    def doi(self) -> str:
        """Bare, as in ``10.1002/mrm.23000``; empty where there is none."""
        return re.sub(r"^https?://(dx\.)?doi\.org/", "", self.fields.get("doi", ""))

    @property
    def link(self) -> str:
        """Address of the DOI, or another one."""
        return f"https://doi.org/{self.doi}" if self.doi else self.fields.get("url", "")

    @property
    def text(self) -> str:
        """Authors, title, place and year, as a reader wants them."""
        names = ", ".join(self.authors).replace(", et al.", " et al.")
        get = self.fields.get
        place = get("journal") or get("booktitle") or get("howpublished", "")
        parts = [
            names if names.endswith(".") else f"{names}.",
            f"{get('title', '')}.",
            place,
            get("year", ""),
        ]
        pages = f":{get('pages', '').replace('--', '-')}" if get("pages") else ""
        where = get("volume", "") + pages
        text = " ".join(part for part in parts if part) + (f";{where}" if where else "")
        return re.sub(r"\?\.", "?", text if text.endswith(".") else f"{text}.")


@cache
def references() -> Mapping[str, Reference]:
    """Read the bibliography: key to entry.

    Raises
    ------
    ValueError
        If an entry cannot be read, or two have one key.
    """
    import bibtexparser
    from bibtexparser.middlewares import NameParts, SeparateCoAuthors, SplitNameParts

    def shown(name: NameParts) -> str:
        if name.last == ["others"]:
            return "et al."
        words = re.split(r"[\s.-]+", " ".join(name.first))
        initials = "".join(word[0] for word in words if word)
        return _plain(" ".join(filter(None, (*name.von, *name.last, *name.jr, initials))))

    text = files("qsmpipe.data").joinpath("references.bib").read_text(encoding="utf-8")
    library = bibtexparser.parse_string(
        text, append_middleware=[SeparateCoAuthors(), SplitNameParts()]
    )
    if library.failed_blocks:
        lines = ", ".join(str((block.start_line or 0) + 1) for block in library.failed_blocks)
        raise ValueError(f"references.bib: what begins in line {lines} cannot be read")
    found = {}
    for entry in library.entries:
        fields = {field.key.lower(): field.value for field in entry.fields}
        authors = tuple(shown(name) for name in fields.pop("author", ()))
        plain = {key: _plain(value) for key, value in fields.items()}
        found[entry.key] = Reference(entry.key, entry.entry_type, plain, authors, entry.raw or "")
    return found


def bibliography(keys: Iterable[str]) -> str:
    """Collect the BibTeX entries of some keys, each as it stands, in the order of the alphabet."""
    known = references()
    return "\n\n".join(known[key].source for key in sorted({*keys} & {*known})) + "\n"


def _plain(text: str) -> str:
    return text.replace("{", "").replace("}", "")
