"""What is imported is declared, what is declared is imported, and all of it is pinned."""

import ast
import configparser
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
CONFIG = configparser.ConfigParser()
CONFIG.read(ROOT / "setup.cfg")


def declared(lines: str) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lines.split("\n") if line}


def extra(name: str) -> set[str]:
    return declared(CONFIG["options.extras_require"][name])


DISTRIBUTIONS = packages_distributions()
"""Importable name to the distributions that hold it."""

INSTALLED = declared(CONFIG["options"]["install_requires"])


def imports(paths: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Files with the third-party packages that they import, wherever in the file."""
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                top = name.partition(".")[0]
                if top not in sys.stdlib_module_names:
                    yield path, top


def distribution(package: str) -> str:
    """Name in a requirement of what holds a package: ``pyyaml`` of ``yaml``."""
    return canonicalize_name(DISTRIBUTIONS[package][0])


def modules() -> list[Path]:
    folders = (ROOT / name for name in ("qsmpipe", "interfaces", "workflows"))
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


FOUND = [(path, top) for path, top in imports(modules()) if top != "qsmpipe"]


def test_what_the_package_imports_is_declared() -> None:
    training = {ROOT / "qsmpipe" / "cli" / "train.py", *(ROOT / "qsmpipe/nets/training").iterdir()}
    for path, package in FOUND:
        known = INSTALLED | (extra("train") if path in training else set())
        assert distribution(package) in known, f"{path} imports {package}"


def test_what_is_declared_is_imported() -> None:
    imported = {distribution(package) for _, package in FOUND}
    assert imported >= INSTALLED | extra("train")


def test_what_the_tests_import_is_declared() -> None:
    here = {path.stem for path in (ROOT / "tests").glob("*.py")}
    for path, package in imports((ROOT / "tests").glob("*.py")):
        if package not in here | {"qsmpipe", "tests"}:
            assert distribution(package) in INSTALLED | extra("test"), f"{path} imports {package}"


def test_what_the_documentation_imports_is_declared() -> None:
    known = INSTALLED | extra("docs") | extra("test")
    for path, package in imports((ROOT / "docs").glob("*.py")):
        if package != "qsmpipe":
            # The gate's tests run without the tools of the site.
            names = DISTRIBUTIONS.get(package, [package])
            assert known & {canonicalize_name(name) for name in names}, f"{path} imports {package}"


@pytest.mark.parametrize("name", CONFIG["options.extras_require"])
def test_every_requirement_is_pinned(name: str) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {
        canonicalize_name(Requirement(line).name) for line in lines if not line.startswith("#")
    }
    assert INSTALLED | extra(name) <= pinned
