"""Nipype interface that writes an acquisition's BIDS derivatives."""

import json
from collections.abc import Mapping, Sequence
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

from qsmpipe import derivatives, files, images
from qsmpipe.bids import Acquisition
from qsmpipe.interfaces.maps import takes
from qsmpipe.maps import MAPS, written
from qsmpipe.methods import needs_background
from qsmpipe.numerics.units import hz_per_ppm


@takes(written())
class _WriteDerivativesInputSpec(BaseInterfaceInputSpec):
    examination = traits.Any(mandatory=True, desc="the acquisition and how its phase was read")
    output_dir = traits.Directory(mandatory=True, desc="root of the derivative dataset")
    intermediates = traits.Bool(False, usedefault=True, desc="write intermediate maps as well")
    reference = traits.Str("brain", usedefault=True, desc="what susceptibility is relative to")
    software = traits.Dict(desc="package to version")
    inversions = traits.List(traits.Str, desc="the inversions, the one of `chi` first")
    steps = traits.List(traits.Dict, desc="what was done, step by step")
    figures = traits.List(File(exists=True), desc="pictures for the report")
    captions = traits.List(traits.Dict, desc="file, title, caption and section of each picture")
    numbers = traits.List(traits.Dict, desc="key numbers: label, value, unit")


class _WriteDerivativesOutputSpec(TraitedSpec):
    files = traits.List(File(exists=True), desc="images written")
    record = traits.Dict(desc="steps, numbers and figures for the acquisition's record")


class WriteDerivatives(SimpleInterface):
    """Write maps under BIDS names with their sidecars, fields in Hz as BIDS wants them."""

    input_spec = _WriteDerivativesInputSpec
    output_spec = _WriteDerivativesOutputSpec
    always_run = True
    """The dataset may have been moved or cleared since: the work folder is not the result."""

    def _run_interface(self, runtime: Bunch) -> Bunch:
        inputs, paths = self.inputs, []
        inversions = inputs.inversions or []
        for key, row in written().items():
            source = getattr(inputs, key)
            if not isdefined(source) or (row.file.intermediate and not inputs.intermediates):
                continue
            if row.by_method:  # the first one is `chi`
                for method, path in zip(inversions[1:], source[1:], strict=True):
                    steps = _led_to(key, [method], inputs.steps)
                    paths.append(self._write(key, path, steps, method))
                continue
            behind = inversions if key == "median" else inversions[:1]
            paths.append(self._write(key, source, _led_to(key, behind, inputs.steps)))
        self._results["files"] = [str(path) for path in paths]
        self._results["record"] = {
            "steps": inputs.steps,
            "numbers": inputs.numbers,
            "figures": self._copy_figures(Path(inputs.output_dir), inputs.examination.acquisition),
        }
        return runtime

    def _write(self, key: str, source: str, steps: list[dict[str, Any]], method: str = "") -> Path:
        """Write one map with its sidecar; ``steps`` are those that led to it."""
        examination, root = self.inputs.examination, Path(self.inputs.output_dir)
        target = root / examination.acquisition.output(key, method=method)
        sidecar = derivatives.sidecar(
            examination,
            key,
            steps=steps,
            reference=self.inputs.reference,
            software=self.inputs.software if isdefined(self.inputs.software) else None,
        )
        text = json.dumps(sidecar, indent=2) + "\n"
        beside = root / examination.acquisition.output(key, ".json", method=method)
        # A disk that fills up shall not leave a new map with the sidecar of an old one.
        with files.replacing(target) as image, files.replacing(beside) as words:
            if MAPS[key].file.units == "Hz":
                scale = hz_per_ppm(examination.field_strength)
                images.save(images.load(source) * scale, image, like=source)
            else:
                images.copy(source, image)
            words.write_text(text)
        return target

    def _copy_figures(self, root: Path, acquisition: Acquisition) -> list[dict[str, Any]]:
        captions = {caption["file"]: caption for caption in self.inputs.captions}
        folder = root / f"sub-{acquisition.subject}" / "figures"
        figures = []
        for path in map(Path, self.inputs.figures):
            target = folder / f"{acquisition.name}_desc-{path.stem}_qsm.png"
            files.copy(path, target)
            figures.append(captions[path.name] | {"file": str(target.relative_to(root))})
        return figures


def _led_to(
    key: str, inversions: Sequence[str], steps: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Leave out the steps that had no part in a map.

    They belong to other inversions than ``inversions``; or they removed the background for the
    local field, and none of ``inversions`` starts from that.
    """

    def took_part(step: Mapping[str, Any]) -> bool:
        if step["stage"] == "background":
            return key == "local_field" or not inversions or needs_background(inversions)
        owner = step["method"] if step["stage"] == "inversion" else step.get("inversion")
        return not inversions or owner is None or owner in inversions

    return [step for step in steps if took_part(step)]
