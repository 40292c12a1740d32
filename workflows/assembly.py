"""How a workflow of several stages is put together."""

import inspect
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

from nipype.interfaces.utility import IdentityInterface, Merge
from nipype.pipeline.engine import Node, Workflow

from qsmpipe.maps import Giver, given_by
from qsmpipe.workflows.stage import estimate_needs

Factory = TypeVar("Factory", bound=Callable[..., Workflow])

Wire: TypeAlias = tuple[Any, Any]
"""A node, or a workflow, and one of its outputs: where a quantity comes from."""

Wires: TypeAlias = dict[str, Wire]
"""Quantities by their names."""


class Assembly:
    """A workflow of several parts, while it is put together.

    Parameters
    ----------
    name : str
        Name of the workflow.
    inputs, outputs : sequence of str
        Fields of its ``inputnode`` and its ``outputnode``. The output ``steps`` lists what was
        done by the parts, in the order in which they were added.
    """

    def __init__(self, name: str, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self.workflow = Workflow(name=name)
        self.inputnode = Node(IdentityInterface(fields=list(inputs)), name="inputnode")
        self.outputnode = Node(IdentityInterface(fields=list(outputs)), name="outputnode")
        self.workflow.add_nodes([self.inputnode, self.outputnode])
        self.wires: Wires = {name: (self.inputnode, name) for name in inputs}
        self.done: list[Wire] = []

    def add(
        self,
        part: Node | Workflow,
        wires: Wires,
        outputs: Sequence[str] = (),
        *,
        steps: str = "step",
        **renamed: str,
    ) -> Wires:
        """Connect a part whose output ``steps`` tells what it did, as :meth:`connect` does."""
        self.done.append(_output(part, steps))
        return self.connect(part, wires, outputs, **renamed)

    def connect(
        self,
        part: Node | Workflow,
        wires: Wires,
        outputs: Sequence[str] = (),
        **renamed: str,
    ) -> Wires:
        """Connect quantities to a part's inputs of these names.

        Returns
        -------
        wires : dict
            The part's ``outputs``; ``unwrapped="phase"`` gives its output ``phase`` another name.
        """
        inner = "inputnode." if isinstance(part, Workflow) else ""
        for name, (source, output) in wires.items():
            self.workflow.connect(source, output, part, f"{inner}{name}")
        return {name: _output(part, name) for name in outputs} | {
            name: _output(part, output) for name, output in renamed.items()
        }

    def merge(self, wires: Sequence[Wire], name: str) -> Wire:
        """Make one list of several outputs, in a node of this name."""
        node = Node(Merge(len(wires)), name=name, run_without_submitting=True)
        self.connect(node, {f"in{n}": wire for n, wire in enumerate(wires, 1)})
        return node, "out"

    def finish(self, wires: Wires) -> Workflow:
        """Give these outputs and the steps; the workflow is then complete."""
        self.connect(self.outputnode, wires | {"steps": self.merge(self.done, "steps")})
        estimate_needs(self.workflow)
        return self.workflow


def take(wires: Wires, *names: str, **renamed: str) -> Wires:
    """Select quantities by their names; ``phase="unwrapped"`` takes one under another name."""
    return {name: wires[name] for name in names} | {
        into: wires[name] for into, name in renamed.items()
    }


def lists_maps(*givers: Giver) -> Callable[[Factory], Factory]:
    """Put the maps of these workflows into a factory's docstring, in the place of ``{maps}``."""
    words = textwrap.TextWrapper(95, initial_indent="    ", subsequent_indent="    ")
    rows = "".join(
        f"{name}\n{words.fill(row.summary + '.')}\n" for name, row in given_by(*givers).items()
    )

    def fill(factory: Factory) -> Factory:
        factory.__doc__ = (inspect.getdoc(factory) or "").replace("{maps}\n", rows)
        return factory

    return fill


def _output(part: Node | Workflow, name: str) -> Wire:
    return part, f"outputnode.{name}" if isinstance(part, Workflow) else name
