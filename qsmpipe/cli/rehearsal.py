"""A dry run: what would be done, and in which order."""

from collections.abc import Mapping
from pathlib import Path

from qsmpipe.checks import Examination, head_name
from qsmpipe.cli.errors import Exit
from qsmpipe.cli.logs import announce_heads
from qsmpipe.methods import needs_background
from qsmpipe.records import Planned
from qsmpipe.settings import Settings


def dry_run(
    examinations: list[Examination],
    heads: list[Examination],
    settings: Settings,
    given: dict[str, dict[str, Path]],
) -> Exit:
    """Say what would be done: the graph is built, and neither run nor written."""
    unbuilt: Mapping[str, str] = {}
    plans: Mapping[str, tuple[Planned, ...]] = {}
    ready = [e for e in examinations if not e.errors]
    if ready:
        from qsmpipe.cli.execute import rehearse

        graph = rehearse(ready, settings, given)
        unbuilt, plans = graph.unbuilt, graph.plans
    _say(examinations, settings, unbuilt)
    announce_heads(heads)
    _say_plans(plans)
    if ready and settings.slurm:
        from qsmpipe.cli.needs import arrays, told

        subjects = {e.acquisition.name: e.acquisition.subject for e in ready}
        subjects |= {head_name(head): head.acquisition.subject for head in heads}
        for asked, labels in arrays(graph, subjects, settings):
            print(f"jobs of Slurm with {told(asked)}: {', '.join(f'sub-{x}' for x in labels)}")
    return Exit.OK if ready else Exit.BAD_DATA


def _say_plans(plans: Mapping[str, tuple[Planned, ...]]) -> None:
    """Print the steps of each acquisition, once for those that have the same."""
    same: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for name, plan in plans.items():
        lines = tuple((step.name, step.told) for step in plan)
        same.setdefault(lines, []).append(name)
    for lines, names in same.items():
        if lines:
            print(f"plan of {', '.join(names)}")
        for place, (step, taken) in enumerate(lines, 1):
            print(f"  {place}. {step}{f': {taken}' if taken else ''}")


def _say(examinations: list[Examination], settings: Settings, unbuilt: Mapping[str, str]) -> None:
    for examination in examinations:
        name = examination.acquisition.name
        print(name)
        for label, value in examination.summary().items():
            print(f"  {label}: {value}")
        for finding in examination.findings:
            print(f"  {finding.level}: {finding.message}")
        if name in unbuilt:
            print(f"  -> would fail: {unbuilt[name]}")
        else:
            print("  -> refused" if examination.errors else "  -> would be processed")
    print(f"preset {settings.preset}")
    for step in settings.resolved():
        print(f"  {step['stage']}: {step['method']}")
        for key, value in step["parameters"].items():
            print(f"    {step['stage']}.{key.removesuffix('_')} = {value}")
    print(f"  mask expression: {settings.mask}, erosion {settings.mask_erosion:g} mm")
    if settings.mask_residual:
        print(f"  mask residual: {settings.mask_residual:g} at most")
    if settings.methods("background") and not needs_background(settings.methods("inversion")):
        print(f"  {settings.inversion} takes the total field: background removal gives the local "
              "field alone, and --background has no influence on the map")  # fmt: skip
    if settings.uncertainty:
        print(f"  uncertainty: from {settings.uncertainty} noisy fields")
    if settings.two_pass:
        print("  two passes: reliable phase, then the whole mask")
    print(f"  reference: {settings.reference}")
