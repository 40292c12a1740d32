"""Nipype interface to :mod:`qsmpipe.numerics.uncertainty`."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nipype.interfaces.base import File, InputMultiObject, isdefined, traits

from qsmpipe import images
from qsmpipe.interfaces.base import Stage, StageInputSpec, StageOutputSpec, direction
from qsmpipe.methods import function_of, method, parameters_of
from qsmpipe.numerics.uncertainty import DEFAULT_REALISATIONS, Chain, Deviation, deviation


class _UncertaintyInputSpec(StageInputSpec):
    field = File(exists=True, mandatory=True, desc="total field (ppm), 3D")
    noise = File(
        exists=True, mandatory=True, desc="standard deviation of `field` (ppm), on its grid"
    )
    mask = File(exists=True, mandatory=True, desc="where `field` is known, on its grid")
    background = InputMultiObject(
        traits.Dict(),
        desc="steps of background removal, one after the other: method and parameters",
    )
    inversion = traits.Dict(
        mandatory=True,
        desc="step of the inversion: method and parameters, with those that it chose",
    )
    reference = traits.Enum(
        "brain", "region", "none", usedefault=True, desc="what susceptibility is relative to"
    )
    region = File(exists=True, desc="mask of the reference region, on the grid of `field`")
    realisations = traits.Range(
        low=2,
        value=DEFAULT_REALISATIONS,
        usedefault=True,
        desc="noisy fields that go through the chain",
    )
    seed = traits.Int(0, usedefault=True, desc="of the noise")
    magnitude = File(exists=True, desc="magnitude of all echoes combined, 3D")
    r2star = File(exists=True, desc="R2* (1/s), 3D")
    echo_times = traits.List(traits.Float, desc="echo times (s)")
    field_strength = traits.Float(desc="B0 (T)")
    b0_direction = direction("field")


class _UncertaintyOutputSpec(StageOutputSpec):
    deviation = File(
        exists=True, desc="standard deviation of susceptibility (ppm); 0 where there is none"
    )


class Uncertainty(Stage):
    """Carry noise to susceptibility (:func:`qsmpipe.numerics.uncertainty.deviation`).

    What the chain did comes from the ``step`` of its stages, so that a weight that a method chose
    by the data is the same for every noisy field.
    """

    input_spec, output_spec = _UncertaintyInputSpec, _UncertaintyOutputSpec
    stage, method = "uncertainty", "realisations"
    volumes = 50
    function = staticmethod(deviation)

    def _compute(self, cwd: Path, device: torch.device) -> None:
        inputs, like = self.inputs, self.inputs.field
        field = images.load(like, device=device)
        noise = images.load(inputs.noise, like=like, device=device)
        chain, is_filter = self._chain(device)
        guide = chain.filter_deviation(noise) if is_filter else None
        if guide is not None and not chain.backgrounds:
            found = Deviation(guide, 0, exact=True)
        else:
            found = self._call(chain, chain.fitted(field), noise, chain.mask, guide=guide)
        self._step["parameters"] |= {"realisations": found.realisations}
        if found.exact:
            self._step |= {"method": "filter"}
        path = cwd / "deviation.nii"
        self._results["deviation"] = images.save(found.deviation, path, like=like)

    def _chain(self, device: torch.device) -> tuple[Chain, bool]:
        """Put the chain together; and say whether its inversion is a filter."""
        inputs, like = self.inputs, self.inputs.field
        name = inputs.inversion["method"]
        start = method("inversion", name).starts_from
        if start == "phase":
            msg = (
                f"uncertainty: {name} starts from the phase of the echoes, and the noise that is "
                "carried through is that of a field: choose another inversion, or leave the "
                "uncertainty out"
            )
            raise ValueError(msg)
        before = inputs.background if isdefined(inputs.background) else []
        if before and start == "total field":
            msg = (
                f"uncertainty: {name} takes the total field, but a background removal "
                f"({before[0]['method']}) is given as well: give one of the two"
            )
            raise ValueError(msg)
        if inputs.reference == "region" and not isdefined(inputs.region):
            msg = "uncertainty: the reference is a region, but no region is given: name its file"
            raise ValueError(msg)

        steps = [("background", step) for step in before] + [("inversion", inputs.inversion)]
        functions = [function_of(stage, step["method"]) for stage, step in steps]
        supplied = self._supplied(Chain, *functions, like=like, device=device)
        *backgrounds, invert = (
            _bound(function, stage, step, supplied)
            for function, (stage, step) in zip(functions, steps, strict=True)
        )
        region = None
        if inputs.reference == "region":
            region = images.load(inputs.region, like=like, dtype=torch.bool, device=device)
        chain = Chain(
            images.load(inputs.mask, like=like, dtype=torch.bool, device=device),
            images.zooms_of(like),
            invert,
            backgrounds,
            b0_direction=supplied["b0_direction"],
            region=region,
            referenced=inputs.reference != "none",
            holds_background=start == "total field",
        )
        iterates = "max_iterations" in parameters_of("inversion", name)
        return chain, not (iterates or method("inversion", name).trained)


def _bound(
    function: Callable[..., Any],
    stage: str,
    step: Mapping[str, Any],
    supplied: Mapping[str, Any],
) -> Callable[..., Any]:
    """Bind a function to the parameters of a step and to what it takes of the data."""
    names = parameters_of(stage, step["method"])
    chosen = {key: value for key, value in step.get("parameters", {}).items() if key in names}
    taken = set(inspect.signature(function).parameters)
    return partial(function, **chosen, **{k: v for k, v in supplied.items() if k in taken})
