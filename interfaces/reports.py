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

MAPS = (
    "chi", "magnitude", "phase", "quality", "brain_mask", "field", "noise", "local_field",
    "qsm_mask", "r2star", "median", "deviation", "swi", "minip", "cosmos",
)  # fmt: skip


class _ReportletsInputSpec(BaseInterfaceInputSpec):
    magnitude = File(exists=True, desc="magnitude, echoes last, any unit")
    phase = File(exists=True, desc="wrapped phase (rad), echoes last")
    quality = File(exists=True, desc="phase quality, 0 to 1")
    brain_mask = File(exists=True, desc="brain mask")
    field = File(exists=True, desc="total field (ppm)")
    noise = File(exists=True, desc="standard deviation of the total field (ppm)")
    local_field = File(exists=True, desc="local field (ppm)")
    qsm_mask = File(exists=True, desc="where `chi` is trusted")
    chi = File(exists=True, desc="susceptibility (ppm)")
    r2star = File(exists=True, desc="R2* (1/s)")
    inversions = traits.List(
        traits.Str, desc="names of the inversions, in the order of `compared`"
    )
    compared = traits.List(
        File(exists=True), desc="susceptibility (ppm) by each of several inversions"
    )
    deviation = File(exists=True, desc="standard deviation of `chi` (ppm)")
    median = File(exists=True, desc="median of `compared` (ppm)")
    swi = File(exists=True, desc="susceptibility-weighted image")
    minip = File(exists=True, desc="minimum of `swi` over a slab of slices")
    cosmos = File(exists=True, desc="susceptibility (ppm) by several orientations")
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
        from qsmpipe import images
        from qsmpipe.reports.figures import draw
        from qsmpipe.reports.maps import Maps
        from qsmpipe.reports.numbers import summarise

        given: dict[str, Any] = {
            name: value
            for name in self.inputs.copyable_trait_names()
            if isdefined(value := getattr(self.inputs, name))
        }
        files = [given[name] for name in MAPS if name in given]
        if not files:
            msg = "a report needs at least one map: connect one of " + ", ".join(MAPS)
            raise ValueError(msg)
        grid = files[0]
        for name in MAPS:
            if name in given:
                given[name] = images.load(given[name], like=grid)
        if names := given.pop("inversions", []):
            files = given.pop("compared", [])
            given["compared"] = {
                name: images.load(path, like=grid)
                for name, path in zip(names, files, strict=False)
            }
        given["curves"] = {
            step["method"]: step["curve"] for step in given.pop("steps", []) if "curve" in step
        }
        maps = Maps(affine=images.affine_of(grid), **given)
        pictures = draw(maps, Path(runtime.cwd))
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
        self._results["numbers"] = [asdict(number) for number in summarise(maps)]
        return runtime
