"""Nipype interface that writes an acquisition's BIDS derivatives."""

import json
import shutil
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

from qsmpipe import bids, images
from qsmpipe.numerics.units import hz_per_ppm


class _WriteDerivativesInputSpec(BaseInterfaceInputSpec):
    examination = traits.Any(mandatory=True, desc="the acquisition and how its phase was read")
    output_dir = traits.Directory(mandatory=True, desc="root of the derivative dataset")
    intermediates = traits.Bool(False, usedefault=True, desc="write intermediate maps as well")
    reference = traits.Str("brain", usedefault=True, desc="what susceptibility is relative to")
    software = traits.Dict(desc="package to version")
    chi = File(exists=True, desc="susceptibility (ppm), referenced")
    unreferenced = File(exists=True, desc="susceptibility (ppm) before referencing")
    reference_value = traits.Float(desc="what was subtracted (ppm)")
    qsm_mask = File(exists=True, desc="where susceptibility is trusted")
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
    b0_direction = traits.List(traits.Float, desc="unit vector along B0 in voxel axes")
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
        inputs = self.inputs
        examination = inputs.examination
        acquisition, root = examination.acquisition, Path(inputs.output_dir)
        written = []
        for key, output in bids.OUTPUTS.items():
            source = getattr(inputs, output.source)
            if not isdefined(source) or (output.intermediate and not inputs.intermediates):
                continue
            target = root / acquisition.output(key, ".nii.gz")
            target.parent.mkdir(parents=True, exist_ok=True)
            if output.units == "Hz":
                scale = hz_per_ppm(examination.field_strength)
                images.save(images.load(source) * scale, target, like=source)
            else:
                shutil.copyfile(source, target)
            sidecar = bids.sidecar(
                examination,
                key,
                steps=inputs.steps,
                reference=inputs.reference,
                reference_value=inputs.reference_value,
                software=inputs.software if isdefined(inputs.software) else None,
            )
            text = json.dumps(sidecar, indent=2) + "\n"
            target.with_name(target.name.replace(".nii.gz", ".json")).write_text(text)
            written.append(str(target))
        self._results["files"] = written
        self._results["record"] = {
            "steps": inputs.steps,
            "numbers": inputs.numbers,
            "figures": self._copy_figures(root, acquisition),
        }
        return runtime

    def _copy_figures(self, root: Path, acquisition: bids.Acquisition) -> list[dict[str, Any]]:
        captions = {caption["file"]: caption for caption in self.inputs.captions}
        folder = root / f"sub-{acquisition.subject}" / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        figures = []
        for path in map(Path, self.inputs.figures):
            target = folder / f"{acquisition.name}_desc-{path.stem}_qsm.png"
            shutil.copyfile(path, target)
            figures.append(captions[path.name] | {"file": str(target.relative_to(root))})
        return figures
