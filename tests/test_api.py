"""The public API: what ``__all__`` names is there, documented, and all that users need."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nipype.pipeline.engine import Workflow
from numpydoc.validate import validate

import qsmpipe
import qsmpipe.interfaces
import qsmpipe.numerics
import qsmpipe.workflows
from qsmpipe.methods import METHODS, function_of, interface_of

# numpydoc knows no Inputs and Outputs, the fields of a workflow's nodes.
pytestmark = pytest.mark.filterwarnings("ignore:Unknown section")

ROOT = Path(__file__).parents[1]

PACKAGES = [
    f"{package.__name__}.{name}"
    for package in (qsmpipe.numerics, qsmpipe.interfaces)
    for name in package.__all__
]
"""Modules that are public as a whole."""

APART = {
    "qsmpipe": {"__version__"},
    "qsmpipe.chain": {"Chain"},
    "qsmpipe.cli.plugin": {"ProcessPerNode"},
    "qsmpipe.interfaces.lease": {"visible_devices"},
    "qsmpipe.methods": {"METHODS"},
}
"""Public names in modules that are not public as a whole: docs/api.md lists them."""

OWED = {"GL08", "SS01", "SS03", "PR01", "PR02", "PR03", "PR04", "PR07", "PR10", "RT01", "YD01"}
"""What numpydoc must not find in a function: parameters and results that are not documented, or
no longer exist. See ``numpydoc.validate.ERROR_MSGS``."""

FACTORY = OWED - {"PR03", "RT01"}
"""Factories are keyword-only, and all return a workflow; they document their nodes' fields."""


def names(*modules: str) -> Iterator[tuple[str, str]]:
    for module in modules:
        for name in importlib.import_module(module).__all__:
            yield module, name


NUMERICS = [*names(*(m for m in PACKAGES if m.startswith("qsmpipe.numerics.")))]
FUNCTIONS = [
    pair for pair in NUMERICS if inspect.isfunction(getattr(sys.modules[pair[0]], pair[1]))
]
CLASSES = [pair for pair in NUMERICS if inspect.isclass(getattr(sys.modules[pair[0]], pair[1]))]


@pytest.mark.parametrize(
    "module",
    ["qsmpipe", "qsmpipe.numerics", "qsmpipe.interfaces", "qsmpipe.workflows", *PACKAGES],
)
def test_what_a_module_names_is_there(module: str) -> None:
    namespace: dict[str, Any] = {}
    exec(f"from {module} import *", namespace)
    for name in getattr(sys.modules[module], "__all__", ()):
        assert name in namespace


@pytest.mark.parametrize(("stage", "name"), [(s, m) for s, rows in METHODS.items() for m in rows])
def test_every_method_is_public(stage: str, name: str) -> None:
    function, interface = function_of(stage, name), interface_of(stage, name)
    if function.__module__.startswith("qsmpipe.numerics."):  # networks are reached by their files
        module = ".".join(function.__module__.split(".")[:3])
        assert (module, function.__name__) in NUMERICS
    assert interface.__module__ in PACKAGES
    assert not interface.__name__.startswith("_")


def test_every_factory_for_embedding_is_public() -> None:
    sources = Path(qsmpipe.workflows.__file__).parent.glob("*.py")
    text = "".join(path.read_text() for path in sources)
    made = set(re.findall(r"^def (init_\w+)", text, re.MULTILINE))
    assert made - set(qsmpipe.workflows.__all__) == {"init_run_wf", "init_acquisition_wf"}


@pytest.mark.parametrize(("module", "name"), FUNCTIONS)
def test_a_public_function_documents_what_it_takes_and_gives(module: str, name: str) -> None:
    found = validate(f"{module}.{name}")["errors"]
    assert not [f"{code}: {said}" for code, said in found if code in OWED]


@pytest.mark.parametrize(("module", "name"), CLASSES)
def test_a_public_class_documents_its_fields(module: str, name: str) -> None:
    kind = getattr(sys.modules[module], name)
    assert inspect.getdoc(kind)
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    for field, after in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert documented, f"{ast.unparse(field.target)} has no docstring"


@pytest.mark.parametrize("name", qsmpipe.workflows.__all__)
def test_a_factory_documents_its_parameters_and_the_fields_of_its_nodes(name: str) -> None:
    factory: Callable[..., Workflow] = getattr(qsmpipe.workflows, name)
    found = validate(f"qsmpipe.workflows.{name}")["errors"]
    assert not [f"{code}: {said}" for code, said in found if code in FACTORY]
    required = {
        key: 3
        for key, p in inspect.signature(factory).parameters.items()
        if p.default is inspect.Parameter.empty
    }
    workflow = factory(**required)
    for section, node in (("Inputs", "inputnode"), ("Outputs", "outputnode")):
        fields = set(workflow.get_node(node).interface._fields)
        assert fields <= set(documented_in(section, inspect.getdoc(factory) or "")), section


def documented_in(section: str, doc: str) -> list[str]:
    """Names that stand at the margin of a section of a docstring."""
    (text,) = re.findall(
        rf"^{section}\n-+\n(.*?)(?=\n\n\w+\n-+\n|\Z)", doc, re.DOTALL | re.MULTILINE
    )
    rows = re.findall(r"^\w[^:\n]*", text, re.MULTILINE)
    return [name for row in rows for name in re.split(r",\s*", row.strip())]


def test_the_documentation_uses_public_names_alone() -> None:
    public = {f"{module}.{name}" for module, name in NUMERICS}
    public |= {f"qsmpipe.workflows.{name}" for name in qsmpipe.workflows.__all__}
    public |= {f"{module}.{name}" for module, some in APART.items() for name in some}
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
    used = {
        f"{module}.{name.split(' as ')[0].strip()}"
        for page in pages
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        for module, imported in re.findall(
            r"^from (qsmpipe[\w.]*) import (.+)$", block, re.MULTILINE
        )
        for name in imported.split(",")
    }
    assert used, "no page imports anything"
    interfaces = {n for n in used if n.rpartition(".")[0] in PACKAGES}
    unsettled = {n for n in used if n.startswith("qsmpipe.nets.")}
    assert not used - public - interfaces - unsettled


def test_the_api_pages_show_all_that_is_public() -> None:
    text = "".join(path.read_text() for path in (ROOT / "docs/api").glob("*.rst"))
    shown = set(re.findall(r"^\.\. auto(?:module|function|class):: (\S+)$", text, re.MULTILINE))
    apart = {f"{module}.{name}" for module, some in APART.items() for name in some}
    factories = {f"qsmpipe.workflows.{name}" for name in qsmpipe.workflows.__all__}
    assert {*PACKAGES, *factories} <= shown
    assert apart - shown == {"qsmpipe.__version__", "qsmpipe.methods.METHODS"}  # no docstrings
    table = (ROOT / "docs/api.md").read_text()
    for module, some in APART.items():
        assert all(f"`{word}`" in table for word in (module, *some))


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, qsmpipe; print(*{m.split('.')[0] for m in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "nipype", "nibabel", "scipy"} & set(run.stdout.split())
