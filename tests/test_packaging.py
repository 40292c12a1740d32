"""Metadata, lock, constraints and container recipes agree with one another and with the code."""

import configparser
import re
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from packaging.pylock import Pylock
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import qsmpipe

ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def requirements(text: str) -> list[Requirement]:
    return [Requirement(line) for line in text.split("\n") if line.strip()]


INSTALLED = requirements(SETUP["options"]["install_requires"])
PINNED = {
    canonicalize_name(pin.name): pin.specifier
    for pin in requirements((ROOT / "constraints.txt").read_text().split("\n", 1)[1])
}
LOCK = Pylock.from_dict(tomllib.loads((ROOT / "pylock.toml").read_text()))
VERSIONS = [
    line.rpartition(" ")[2]
    for line in SETUP["metadata"]["classifiers"].split("\n")
    if re.search(r"Python :: 3\.\d+$", line)
]


@pytest.mark.parametrize("wanted", INSTALLED, ids=lambda wanted: wanted.name)
def test_the_lock_holds_every_requirement(wanted: Requirement) -> None:
    """``make lock`` renews it."""
    found = [p for p in LOCK.packages if p.name == canonicalize_name(wanted.name)]
    assert found, f"{wanted.name} is not in pylock.toml: make lock"
    for package in found:
        assert package.version in wanted.specifier, f"{wanted}: make lock"


def test_the_lock_and_the_constraints_name_the_same_versions() -> None:
    for package in LOCK.packages:
        pin = PINNED.get(package.name)
        assert pin is None or package.version in pin, f"{package.name}: make lock"


def test_the_lock_holds_for_every_python_of_the_package() -> None:
    assert LOCK.requires_python == SETUP["options"]["python_requires"]


def test_the_lock_gives_hashes_and_takes_all_from_pypi() -> None:
    for package in LOCK.packages:
        files = [*(package.wheels or ()), *filter(None, [package.sdist])]
        assert files, package.name
        assert package.index is None
        for file in files:
            assert file.path is None
            assert urlsplit(file.url).netloc == "files.pythonhosted.org"
            assert file.hashes["sha256"]


def test_the_pythons_of_the_classifiers_are_those_that_are_tested() -> None:
    environments = [f"py{version.replace('.', '')}" for version in VERSIONS]
    assert environments == SETUP["tox:tox"]["env_list"].split(", ")
    assert SETUP["options"]["python_requires"] == f">={VERSIONS[0]}"


def test_the_version_is_the_same_everywhere() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^version: {re.escape(qsmpipe.__version__)}$", citation, re.MULTILINE)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] == qsmpipe.__version__


@pytest.mark.parametrize("recipe", ["Dockerfile", "qsmpipe.def"])
def test_a_container_copies_what_the_build_needs(recipe: str) -> None:
    text = (ROOT / "containers" / recipe).read_text()
    needed = {
        "setup.cfg", "pyproject.toml", "constraints.txt", "qsmpipe", "interfaces", "workflows",
        SETUP["metadata"]["license_files"],
        SETUP["metadata"]["long_description"].removeprefix("file: "),
    }  # fmt: skip
    copied = {word for line in text.split("\n") if "/src" in line for word in line.split()}
    assert needed <= copied


NEURODESK = yaml.safe_load((ROOT / "containers/neurodesk/build.yaml").read_text())


def in_neurodesk(kind: str) -> dict[str, Any]:
    """What the recipe's steps of one kind hold, taken together."""
    found: dict[str, Any] = {}
    for step in NEURODESK["build"]["directives"]:
        found |= step.get(kind, {})
    return found


def test_the_recipe_for_neurodesk_is_of_this_version() -> None:
    assert (NEURODESK["name"], NEURODESK["version"]) == ("qsmpipe", qsmpipe.__version__)
    (copyright,) = NEURODESK["copyright"]
    assert copyright["license"] == SETUP["metadata"]["license"]
    scripts = SETUP["options.entry_points"]["console_scripts"].strip()
    assert in_neurodesk("deploy")["bins"] == re.findall(r"^(\w+) =", scripts, re.MULTILINE)


def test_the_containers_set_the_same_environment() -> None:
    docker = set(re.findall(r"\b([A-Z_]+)=", (ROOT / "containers/Dockerfile").read_text()))
    apptainer = (ROOT / "containers/qsmpipe.def").read_text().partition("%environment")[2]
    exported = set(re.findall(r"export ([A-Z_]+)=", apptainer))
    assert exported <= docker
    # Neurodesk mounts the home, where caches go by themselves.
    caches = {"NUMBA_CACHE_DIR", "MPLCONFIGDIR"}
    assert exported - set(in_neurodesk("environment")) <= {*caches, "PYTHONDONTWRITEBYTECODE"}
