"""What acquisitions tell together that none of them tells alone."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qsmpipe.checks.examination import Examination, Finding

COUNTERS = ("run", "acquisition", "reconstruction", "echo")
"""Entities that stand in the place of ``echo`` where names were given by hand."""


def with_siblings(examinations: Sequence[Examination]) -> list[Examination]:
    """Warn of single echoes that are named like repetitions of one acquisition.

    Parameters
    ----------
    examinations
        All acquisitions of a run.

    Returns
    -------
    list of Examination
        In the same order, with what was found.
    """
    groups: dict[tuple[Any, ...], list[Examination]] = defaultdict(list)
    for examination in examinations:
        acquisition = examination.acquisition
        if len(examination.echo_times) == 1 and len(acquisition.signal) == 1:
            kept = {k: v for k, v in acquisition.entities.items() if k not in COUNTERS}
            key = (acquisition.signal[0].parent, acquisition.suffix, *sorted(kept.items()))
            groups[key, examination.shape].append(examination)
    told: dict[str, Finding] = {}
    for group in groups.values():
        times = {examination.echo_times[0] for examination in group}
        if 1 < len(group) == len(times):
            told |= dict.fromkeys((e.acquisition.name for e in group), _echoes(group))
    return [
        replace(each, findings=(*each.findings, told[each.acquisition.name]))
        if each.acquisition.name in told
        else each
        for each in examinations
    ]


def _echoes(group: Sequence[Examination]) -> Finding:
    first, last = group[0].acquisition, group[-1].acquisition
    times = ", ".join(f"{1000 * examination.echo_times[0]:.4g}" for examination in group)
    return Finding(
        "warning",
        "echoes",
        f"{first.name} to {last.name}: {len(group)} acquisitions of one echo each that differ in "
        f"echo time alone ({times} ms), so that {len(group)} maps are made of one echo each: if "
        "they are the echoes of one acquisition, name them echo-1, echo-2, ... and nothing else",
    )
