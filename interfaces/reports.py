"""Nipype interface that draws and measures an acquisition's maps for its report."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    SimpleInterface,
    TraitedSpec,
    isdefined,
    traits,
)
from nipype.interfaces.base.support import Bunch

from qsmpipe.interfaces.maps import takes
from qsmpipe.maps import reported


@takes(reported())
class _ReportletsInputSpec(BaseInterfaceInputSpec):
    about = traits.List(
        traits.Enum(*reported()),
        desc="maps to draw and to measure, where the others are there for their sake (all)",
    )
    inversions = traits.List(
        traits.Str, desc="names of the inversions, in the order of `compared`"
    )
    field_strength = traits.Float(desc="B0 (T); without it there are no Hz")
    reference_value = traits.Float(desc="what was subtracted from susceptibility (ppm)")
    echo_times = traits.List(traits.Float, desc="one per echo (s)")
    steps = traits.List(traits.Dict, desc="what was done, step by step")


class _ReportletsOutputSpec(TraitedSpec):
    figures = traits.List(File(exists=True), desc="pictures (PNG)")
    captions = traits.List(
        traits.Dict, desc="file (its name), title, caption and section of each picture"
    )
    numbers = traits.List(traits.Dict, desc="key numbers: label, value, unit")


class Reportlets(SimpleInterface):
    """Draw the pictures and take the key numbers of a report, of whichever maps there are.

    See :func:`qsmpipe.reports.figures.draw` and :func:`qsmpipe.reports.numbers.summarise`.
    """

    input_spec = _ReportletsInputSpec
    output_spec = _ReportletsOutputSpec

    def _run_interface(self, runtime: Bunch) -> Bunch:
        from qsmpipe.reports.figures import draw
        from qsmpipe.reports.maps import Maps
        from qsmpipe.reports.numbers import summarise

        steps = self.inputs.steps if isdefined(self.inputs.steps) else []
        beside = {
            name: value
            for name in ("field_strength", "reference_value", "echo_times")
            if isdefined(value := getattr(self.inputs, name))
        }
        curves = {step["method"]: step["curve"] for step in steps if "curve" in step}
        maps = Maps(curves=curves, **beside, **self._load())
        about = self.inputs.about if isdefined(self.inputs.about) else list(reported())
        pictures = draw(maps, Path(runtime.cwd), about)
        self._results["figures"] = [str(picture.file) for picture in pictures]
        self._results["captions"] = [
            {
                "file": picture.file.name,
                "title": picture.title,
                "caption": picture.caption,
                "section": picture.section,
            }
            for picture in pictures
        ]
        self._results["numbers"] = [asdict(number) for number in summarise(maps, about)]
        return runtime

    def _load(self) -> dict[str, Any]:
        """Load all maps that are given onto the grid of the first one; and its ``affine``."""
        from qsmpipe import images

        given = {
            key: value
            for key in reported()
            if isdefined(value := getattr(self.inputs, key)) and value
        }
        files = [value for value in given.values() if isinstance(value, str)]
        if not files:
            msg = "a report needs at least one map: connect one of " + ", ".join(reported())
            raise ValueError(msg)
        names = self.inputs.inversions or []
        loaded: dict[str, Any] = {"affine": images.affine_of(files[0])}
        for key, value in given.items():
            loaded[key] = (
                images.load(value, like=files[0])
                if isinstance(value, str)
                else {
                    name: images.load(path, like=files[0])
                    for name, path in zip(names, value, strict=False)
                }
            )
        return loaded
