"""Nipype interface that writes an acquisition's BIDS derivatives."""

import json
import shutil
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
from qsmpipe.maps import OUTPUTS
from qsmpipe.methods import needs_background
from qsmpipe.numerics.units import hz_per_ppm


class _WriteDerivativesInputSpec(BaseInterfaceInputSpec):
    examination = traits.Any(mandatory=True, desc="the acquisition and how its phase was read")
    output_dir = traits.Directory(mandatory=True, desc="root of the derivative dataset")
    intermediates = traits.Bool(False, usedefault=True, desc="write intermediate maps as well")
    reference = traits.Str("brain", usedefault=True, desc="what susceptibility is relative to")
    software = traits.Dict(desc="package to version")
    chi = File(exists=True, desc="susceptibility (ppm), referenced")
    unreferenced = File(exists=True, desc="susceptibility (ppm) before referencing")
    qsm_mask = File(exists=True, desc="where susceptibility is trusted")
    reference_region = File(exists=True, desc="region that was found for the reference")
    mask = File(exists=True, desc="brain mask")
    quality = File(exists=True, desc="phase quality, 0 to 1")
    combined = File(exists=True, desc="magnitude of all echoes combined")
    offset = File(exists=True, desc="phase offset of all echoes (rad)")
    unwrapped = File(exists=True, desc="unwrapped phase of all echoes (rad)")
    field = File(exists=True, desc="total field (ppm)")
    noise = File(exists=True, desc="standard deviation of the total field (ppm)")
    local_field = File(exists=True, desc="local field (ppm)")
    r2star = File(exists=True, desc="R2* (1/s)")
    t2star = File(exists=True, desc="T2* (s)")
    s0 = File(exists=True, desc="signal at echo time 0")
    swi = File(exists=True, desc="susceptibility-weighted image")
    minip = File(exists=True, desc="minimum of `swi` over a slab of slices")
    cosmos = File(exists=True, desc="susceptibility (ppm) by several orientations, referenced")
    cosmos_mask = File(exists=True, desc="where it is known")
    b0_direction = traits.List(traits.Float, desc="unit vector along B0 in voxel axes")
    inversions = traits.List(traits.Str, desc="the inversions, the one of `chi` first")
    compared = traits.List(
        File(exists=True), desc="with several inversions: susceptibility (ppm) by each of them"
    )
    median = File(exists=True, desc="median of `compared` (ppm)")
    deviation = File(exists=True, desc="standard deviation of `chi` (ppm)")
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
        inputs, written = self.inputs, []
        inversions = inputs.inversions or []
        for key, output in OUTPUTS.items():
            source = getattr(inputs, output.source)
            if not isdefined(source) or (output.intermediate and not inputs.intermediates):
                continue
            if key == "chi_by_method":
                for method, path in zip(inversions[1:], source[1:], strict=True):
                    steps = _led_to(key, [method], inputs.steps)
                    written.append(self._write(key, path, steps, method))
                continue
            behind = inversions if key == "median" else inversions[:1]
            written.append(self._write(key, source, _led_to(key, behind, inputs.steps)))
        self._results["files"] = [str(path) for path in written]
        self._results["record"] = {
            "steps": inputs.steps,
            "numbers": inputs.numbers,
            "figures": self._copy_figures(Path(inputs.output_dir), inputs.examination.acquisition),
        }
        return runtime

    def _write(self, key: str, source: str, steps: list[dict[str, Any]], method: str = "") -> Path:
        """Write one map with its sidecar; ``steps`` are those that led to it."""
        examination, output = self.inputs.examination, OUTPUTS[key]
        target = Path(self.inputs.output_dir) / examination.acquisition.output(key, method=method)
        sidecar = derivatives.sidecar(
            examination,
            key,
            steps=steps,
            reference=self.inputs.reference,
            software=self.inputs.software if isdefined(self.inputs.software) else None,
        )
        text = json.dumps(sidecar, indent=2) + "\n"
        beside = target.with_name(target.name.replace(".nii.gz", ".json"))
        # A disk that fills up shall not leave a new map with the sidecar of an old one.
        with files.replacing(target) as image, files.replacing(beside) as words:
            if output.units == "Hz":
                scale = hz_per_ppm(examination.field_strength)
                images.save(images.load(source) * scale, image, like=source)
            else:
                shutil.copyfile(source, image)
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
