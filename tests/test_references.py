"""The bibliography: every entry complete, as it stands in the file, and as a reader wants it."""

import re
from importlib.resources import files

import pytest

from qsmpipe.methods import METHODS
from qsmpipe.references import bibliography, references
from qsmpipe.reports import boilerplate

FILE = files("qsmpipe.data").joinpath("references.bib").read_text(encoding="utf-8")


def test_references_are_complete_and_unique() -> None:
    keys = re.findall(r"^@\w+\{([^,]+),", FILE, re.M)
    assert sorted(keys) == keys, "sorted by key"
    assert list(references()) == keys
    assert set(boilerplate.ALWAYS) <= set(keys)
    dois = [entry.doi for entry in references().values() if entry.doi]
    assert len(dois) == len(set(dois))
    for entry in references().values():
        assert entry.authors, entry.key
        assert entry.fields["title"], entry.key
        assert re.fullmatch(r"https://(doi\.org/10\.\d{4,5}/\S+|arxiv\.org/abs/\S+)", entry.link)
        assert not {"{", "}", "\\"} & {*entry.text}, "LaTeX in the file: write it as UTF-8"


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("wu2012", "Wu B, Li W, Guidon A, Liu C. Whole brain susceptibility mapping using "
         "compressed sensing. Magnetic Resonance in Medicine 2012;67:137-147."),
        ("derochefort2010", "de Rochefort L, Liu T, Kressler B et al. Quantitative susceptibility "
         "map reconstruction from MR phase data using Bayesian regularization: validation and "
         "application to brain imaging. Magnetic Resonance in Medicine 2010;63:194-206."),
        ("schweser2011", "Schweser F, Deistung A, Lehr BW, Reichenbach JR. Quantitative imaging "
         "of intrinsic magnetic tissue properties using MRI signal phase: an approach to in vivo "
         "brain iron metabolism? NeuroImage 2011;54:2789-2807."),
    ],
)  # fmt: skip
def test_a_reference_reads_as_in_a_paper(key: str, text: str) -> None:
    assert references()[key].text == text


def test_a_group_of_authors_keeps_its_name() -> None:
    assert references()["qsmconsensus2024"].authors[0] == "QSM Consensus Organization Committee"


def test_names_in_two_words_and_first_names_with_hyphens() -> None:
    assert "van der Walt S" in references()["vanderwalt2014"].authors[0]
    assert "Cheng YCN" in references()["haacke2004"].authors


def test_entries_are_copied_as_they_stand() -> None:
    cited = sorted({key for rows in METHODS.values() for row in rows.values() for key in row.cite})
    text = bibliography([*reversed(cited), "nobody1900"])
    for entry in text.strip().split("\n\n"):
        assert entry in FILE
    assert re.findall(r"^@\w+\{([^,]+),", text, re.M) == cited
