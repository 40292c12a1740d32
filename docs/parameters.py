"""Print docs/parameters.md: every parameter with what it may be, and what the presets choose.

``python docs/parameters.py > docs/parameters.md``; a test compares the two.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from qsmpipe.methods import METHODS, parameters_of
from qsmpipe.settings import STAGES, combine, presets

HEAD = """\
# Parameters

Generated from the code by `python docs/parameters.py > docs/parameters.md`; do not edit.
What the parameters do, at more length: [methods](methods/index.md). A parameter is set by
`--set STAGE.PARAMETER=VALUE`, or `--set STAGE.METHOD.PARAMETER=VALUE` where several methods of a
stage run and share its name: [usage.md](usage.md#parameters)."""

CHOICES = (*STAGES, "mask_erosion", "mask_residual", "reference", "two_pass")
"""What a preset decides on, beside parameters."""


def page() -> str:
    """Give the whole page."""
    parts = [
        HEAD,
        "## Defaults",
        _table(("stage", "method", "parameter", "default", "may be", "meaning"), _defaults()),
        "## Presets",
        _table(("setting", *(f"`{name}`" for name in presets())), _presets()),
    ]
    return "\n\n".join(parts) + "\n"


def _defaults() -> Iterator[tuple[str, ...]]:
    for stage, methods in METHODS.items():
        for method in methods:
            parameters = parameters_of(stage, method)
            for name, parameter in parameters.items():
                yield (
                    stage,
                    method,
                    f"`{name.removesuffix('_')}`",
                    _text(parameter.default),
                    str(parameter.kind),
                    parameter.description,
                )
            if not parameters:
                yield stage, method, "none", "", "", ""


def _presets() -> Iterator[tuple[str, ...]]:
    chosen = [combine({"preset": name}) for name in presets()]
    for key in CHOICES:
        yield key, *(_text(getattr(settings, key)) for settings in chosen)
    groups = sorted({
        (group, name)
        for settings in chosen
        for group, values in settings.parameters.items()
        for name in values
    })  # fmt: skip
    for group, name in groups:
        values = [settings.parameters.get(group, {}).get(name) for settings in chosen]
        texts = ("default" if value is None else _text(value) for value in values)
        yield f"{group}.{name.removesuffix('_')}", *texts


def _text(value: Any) -> str:
    """Spell a value as ``--set`` takes it."""
    if isinstance(value, bool):
        spoken = str(value).lower()
    elif isinstance(value, list | tuple | range):
        spoken = f"[{', '.join(f'{item:.12g}' for item in value)}]"
    else:
        spoken = f"{value:.12g}" if isinstance(value, float) else str(value)
    return "`" + spoken.replace("|", "\\|") + "`"


def _table(head: Sequence[str], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(page(), end="")
