"""The documentation says what the code does: defaults, parameters, constants, sources, checks."""

import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest

from qsmpipe.cli.parser import build_parser, parse
from qsmpipe.methods import METHODS, parameters_of
from qsmpipe.settings import combine

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *(
        DOCS / f"{name}.md"
        for name in (
            "index",
            "usage",
            "running",
            "reports",
            "input_checks",
            "outputs",
            "parameters",
        )
    ),
    *sorted((DOCS / "methods").glob("*.md")),
]
ROWS = [(stage, name) for stage, rows in METHODS.items() for name in rows]

COMMANDS = [
    words
    for page in sorted(DOCS.glob("*.md"))
    for words in re.findall(r"^qsmpipe (.* participant.*)$", page.read_text(), re.MULTILINE)
    if "--weights" not in words  # a file of the reader's
]

NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
FOREIGN = {
    "--array",
    "--constraint",
    "--cpus-per-task",
    "--gres",
    "--mem",
    "--signal",
    "--time",
}
"""Options of sbatch."""


def sections() -> dict[tuple[str, str], str]:
    """Stage and method to its section in docs/methods."""
    found = {}
    for page in (DOCS / "methods").glob("*.md"):
        first, *parts = re.split(r"^## (.*)$", page.read_text(), flags=re.MULTILINE)
        stage = re.findall(r"^# .* \(`(\w+)`\)$", first, re.MULTILINE)
        for title, section in zip(parts[::2], parts[1::2], strict=True):
            if stage and (method := re.fullmatch(r"`([\w-]+)`", title)):
                found[stage[0], method[1]] = section
    return found


def dois(key: str) -> list[str]:
    bibliography = (ROOT / "qsmpipe" / "data" / "references.bib").read_text()
    (entry,) = re.findall(rf"^@\w+{{{key},.*?^}}", bibliography, re.DOTALL | re.MULTILINE)
    return re.findall(r"doi = {(.*)}", entry)


def test_the_committed_table_is_what_the_script_prints() -> None:
    page = runpy.run_path(str(DOCS / "parameters.py"))["page"]()
    committed = (DOCS / "parameters.md").read_text()
    assert committed == page, "run: python docs/parameters.py > docs/parameters.md"


@pytest.mark.parametrize(("stage", "name"), ROWS, ids=map("-".join, ROWS))
def test_a_method_has_its_section_with_parameters_and_sources(stage: str, name: str) -> None:
    section = sections()[stage, name]
    (table,) = re.findall(r"^\| parameter \|.*\n((?:\|.*\n)*)", section, re.MULTILINE) or [""]
    documented = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert documented == {key.removesuffix("_") for key in parameters_of(stage, name)}
    for key in METHODS[stage][name].cite:
        for doi in dois(key):
            assert doi in section, f"{name} does not name {key}"


def test_every_section_is_of_a_method() -> None:
    assert set(sections()) == set(ROWS)


def test_named_constants_have_the_values_that_the_code_has() -> None:
    pages = (page.read_text() for page in (DOCS / "methods").glob("*.md"))
    text = " ".join(" ".join(pages).split())
    named = re.findall(rf"`([a-z_2.]+)\.([A-Z][A-Z_0-9]*)` = ({NUMBER})", text)
    assert len(named) > 20
    for module, constant, value in named:
        actual = getattr(importlib.import_module(f"qsmpipe.numerics.{module}"), constant)
        assert actual == pytest.approx(float(value)), f"{module}.{constant}"


def test_every_input_check_stands_in_the_table() -> None:
    table = (DOCS / "input_checks.md").read_text()
    named = set(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE))
    source = "".join(path.read_text() for path in (ROOT / "qsmpipe" / "checks").glob("*.py"))
    checks = set(re.findall(r'(?:notes\.\w+|level)\(\s*"([\w-]+)"', source))
    assert named == checks | {"region"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_options_that_are_named_exist(page: Path) -> None:
    known = {word for action in build_parser()._actions for word in action.option_strings}
    named = set(re.findall(r"(?<![\w-])--[a-z0-9][a-z0-9-]+", page.read_text()))
    assert named <= known | FOREIGN


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_that_are_shown_are_understood(words: str) -> None:
    parse(shlex.split(words)).settings.check()


def test_the_config_file_that_is_shown_is_valid(tmp_path: Path) -> None:
    (shown,) = re.findall(r"```toml\n(.*?)```", (DOCS / "usage.md").read_text(), re.DOTALL)
    (tmp_path / "config.toml").write_text(shown)
    settings = combine({}, str(tmp_path / "config.toml"))
    settings.check()
    assert settings.parameters_for("mask")["bet"] == {"fractional_intensity": 0.4}
