"""The choices of one run: defaults, then a preset, then a file, then the command line."""

import dataclasses
import difflib
import keyword
import math
import os
import platform
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, MinLen

from qsmpipe import __version__, slurm
from qsmpipe.chain import Chain
from qsmpipe.methods import (
    GIVEN,
    METHODS,
    check_choice,
    method,
    names_in,
    parameters_of,
)
from qsmpipe.tables import Options, checked, from_table, read_table, shown

STAGES = ("offset", "mask", "unwrap", "field", "relaxation", "swi", "background", "inversion",
          "cosmos")  # fmt: skip
"""Stages with a method to choose, in the order in which they run."""

SMALL = "small-animal"
"""The preset for heads of another size."""

LABELS = {
    "participant_label": "sub-", "session_label": "ses-", "run_label": "run-",
    "acquisition_label": "acq-",
}  # fmt: skip
"""Lists of labels, and the prefix that each label may have."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run does; written beside its results as TOML."""

    bids_dir: str = ""
    output_dir: str = ""
    work_dir: Annotated[str, MinLen(1)] = "work"

    participant_label: tuple[str, ...] = ()
    session_label: tuple[str, ...] = ()
    run_label: tuple[str, ...] = ()
    acquisition_label: tuple[str, ...] = ()
    bids_filter_file: str = ""
    bids_database_dir: str = ""
    derivatives: Mapping[str, str] = dataclasses.field(default_factory=dict)
    skip_bids_validation: bool = False

    preset: str = "default"
    offset: str = Chain.offset
    mask: str = Chain.mask
    mask_erosion: Annotated[float, Ge(0)] = Chain.mask_erosion
    """Radius (mm) of the ball that erodes the mask."""
    mask_residual: Annotated[float, Ge(0)] = Chain.mask_residual
    """Largest relative residual of the field fit that is kept in the mask; 0: any."""
    unwrap: str = Chain.unwrap
    field: str = Chain.field
    relaxation: str = Chain.relaxation
    swi: str = Chain.swi
    background: str = Chain.background
    inversion: str = Chain.inversion
    cosmos: str = "none"
    """``cosmos``: invert all acquisitions of a subject together as well."""
    reference: str = Chain.reference
    two_pass: bool = Chain.two_pass
    """Whether susceptibility is mapped where the phase is reliable first."""
    uncertainty: Annotated[int, Ge(0)] = Chain.uncertainty
    """Noisy fields that give the standard deviation of the map; 0: none is estimated."""
    parameters: Mapping[str, Options] = dataclasses.field(default_factory=dict)
    """Stage (or ``stage.method``) to parameter to value, as given by the user."""
    b0: Annotated[float, Gt(0)] | None = None
    """Field strength (T); None: from the sidecar."""
    b0_direction: tuple[float, ...] = ()
    """Unit vector along B0 in voxel axes, of every image; empty: from each image's header."""
    phase_sign: Literal[1, -1] | None = None
    """None: by the manufacturer."""

    intermediates: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    nprocs: Annotated[int, Gt(0)] | None = None
    """Processors in all; None: all that there are."""
    omp_nthreads: Annotated[int, Gt(0)] | None = None
    """Threads of one node; None: by the number of acquisitions."""
    mem_gb: Annotated[float, Gt(0)] | None = None
    use_plugin: str = ""
    slurm: str = ""
    """What the job of each subject asks of Slurm; empty: the run computes by itself."""
    stop_on_first_crash: bool = False

    def __post_init__(self) -> None:
        length = math.hypot(*self.b0_direction)
        if 0 < length < math.inf:
            unit = tuple(component / length for component in self.b0_direction)
            object.__setattr__(self, "b0_direction", unit)
        for name, prefix in LABELS.items():
            bare = tuple(label.removeprefix(prefix) for label in getattr(self, name))
            object.__setattr__(self, name, bare)

    @property
    def mask_is_given(self) -> bool:
        """Whether the mask expression asks for the user's own mask."""
        return GIVEN in re.split(r"[\s&|()]+", self.mask)

    def methods(self, stage: str) -> tuple[str, ...]:
        """Names of the methods that ``stage`` runs; empty for ``none`` and ``given``."""
        return names_in(stage, getattr(self, stage))

    def parameters_for(self, stage: str) -> dict[str, dict[str, Any]]:
        """Collect what the user set for each method of ``stage``, checked by its signature.

        Raises
        ------
        ValueError
            If no method of the stage takes a parameter of that name, if several do, or if the
            value's type does not fit.
        """
        chosen: dict[str, dict[str, Any]] = {name: {} for name in self.methods(stage)}
        for group, values in self.parameters.items():
            head, _, only = group.partition(".")
            if head != stage:
                continue
            for key, value in values.items():
                name = _named(key)
                among = [only] if only else list(chosen)
                if only and only not in chosen:
                    method(stage, only)
                    msg = (
                        f"{stage}.{only}.{key} is set, but {only} is not run: choose it as well, "
                        f"or set a parameter of {' or '.join(chosen) or 'a method that is run'}"
                    )
                    raise ValueError(msg)
                owners = [m for m in among if name in parameters_of(stage, m)]
                if len(owners) != 1:
                    raise ValueError(_no_owner(stage, among, key, owners))
                chosen[owners[0]][name] = _fitting(stage, owners[0], name, value)
        return chosen

    def reference_parameters(self) -> dict[str, float]:
        """Read the limit of R2* (1/s) out of ``"csf:8"``; empty for any other reference."""
        reference, _, label = self.reference.partition(":")
        return {"threshold": float(label)} if reference == "csf" and label else {}

    def chain(self) -> Chain:
        """Methods of all stages with the parameters that the user set for them, checked."""
        parameters = {stage: self.parameters_for(stage) for stage in STAGES}
        parameters["reference"] = {"csf": self.reference_parameters()}
        return Chain(**self._choices(), parameters=parameters)

    def _choices(self) -> dict[str, Any]:
        """All of the chain but the parameters."""
        names = {item.name for item in dataclasses.fields(Chain)} - {"parameters"}
        choices = {name: getattr(self, name) for name in names}
        return choices | {"reference": self.reference.partition(":")[0]}

    def check(self) -> None:
        """Check every value, and whether the values go together, before anything is read.

        Raises
        ------
        ValueError
            Naming the setting, its value and what it may be.
        """
        _check_values(self.as_table(), "")
        self._check_together()
        for stage in STAGES:
            for name, chosen in self.parameters_for(stage).items():
                if method(stage, name).trained:
                    _check_weights(stage, name, chosen)

    def _check_together(self) -> None:
        Chain(**self._choices()).check()
        if self.slurm and self.use_plugin:
            raise ValueError("slurm and use_plugin both say where steps run: leave one out")
        if self.methods("cosmos") and not self.methods("background"):
            msg = (
                "cosmos works on local fields, and with --background none there are none: choose "
                f"one of {', '.join(METHODS['background'])}"
            )
            raise ValueError(msg)
        if self.preset == SMALL and (human := [*self._for_human_heads()]):
            msg = f"{human[0]} is for human heads alone, by its fixed lengths: leave it out"
            raise ValueError(f"preset {SMALL}: {msg}")
        if self.reference.partition(":")[0] == "csf" and self.relaxation == "none":
            msg = "reference csf finds the ventricles by their R2*: choose a relaxation method"
            raise ValueError(msg)

    def _for_human_heads(self) -> Iterator[str]:
        """Choices whose lengths (mm) nobody can set."""
        if self.two_pass:
            yield "two_pass"
        if self.reference.partition(":")[0] == "csf":
            yield "reference csf"
        if "ilsqr" in self.methods("inversion"):
            yield "inversion ilsqr"

    def resolved(self) -> list[dict[str, Any]]:
        """Every stage with its method and all its parameters, defaults included."""
        steps = [
            {
                "stage": stage,
                "method": name,
                "parameters": {
                    key: given.get(key, parameter.default)
                    for key, parameter in parameters_of(stage, name).items()
                },
            }
            for stage in STAGES
            for name, given in self.parameters_for(stage).items()
        ]
        place = next(n for n, s in enumerate(steps) if s["stage"] in ("background", "inversion"))
        if self.two_pass:
            steps.insert(place, _step("passes", "reliable", threshold="otsu"))
        if self.mask_residual:
            steps.insert(place, _step("mask", "residual", threshold=self.mask_residual))
        return steps

    def as_table(self) -> dict[str, Any]:
        """Values by name as TOML has them: lists for tuples, and no key for ``None``."""
        return {k: v for k, v in _plain(dataclasses.asdict(self)).items() if v is not None}

    def as_toml(self) -> str:
        """Write these settings as text that :func:`read` takes."""
        import tomli_w

        return tomli_w.dumps(self.as_table())


def _check_values(
    values: Mapping[str, Any], where: str, *, spelled: Callable[[str], str] = str
) -> None:
    """Check each setting by itself; ``where`` (a file) leads the message.

    Raises
    ------
    ValueError
        Naming the setting, its value and what it may be.
    """
    from_table(Settings, values, where, spelled=spelled)
    try:
        for name, value in values.items():
            if name in STAGES:
                check_choice(name, value)
            elif name in CHECKS:
                CHECKS[name](value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def _check_preset(name: str) -> None:
    known = presets()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"there is no preset {name!r}: choose from {', '.join(known)}{hint}")


def _check_direction(direction: Sequence[float]) -> None:
    length = math.hypot(*direction)
    if direction and not (len(direction) == 3 and 0 < length < math.inf):
        msg = (
            f"b0_direction {' '.join(f'{x:g}' for x in direction)}: give three finite numbers "
            "that are not all 0, along the voxel axes, as in 0 0 1"
        )
        raise ValueError(msg)


def _check_uncertainty(number: int) -> None:
    if number == 1:
        raise ValueError("uncertainty 1: give 2 noisy fields or more, or 0 for none")


def _check_reference(value: str) -> None:
    reference, _, label = value.partition(":")
    needs_label = {"brain": False, "none": False, "region": True, "csf": bool(label)}
    if needs_label.get(reference) != bool(label):
        msg = (
            f"reference {value!r}: choose brain, csf (or csf:R2STAR, the limit in 1/s), none, or "
            "region:LABEL, where LABEL is the label or desc of a mask in --derivatives"
        )
        raise ValueError(msg)
    if reference == "csf" and label:
        try:
            limit = float(label)
        except ValueError:
            limit = 0.0
        if not 0 < limit < math.inf:
            msg = f"reference {value!r}: {label!r} is no R2* in 1/s; write csf:8"
            raise ValueError(msg)


def _check_groups(parameters: Mapping[str, Any]) -> None:
    for group in parameters:
        stage, _, name = group.partition(".")
        if stage not in STAGES:
            close = difflib.get_close_matches(stage, STAGES, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            msg = f"parameters: there is no stage {stage!r}: one of {', '.join(STAGES)}{hint}"
            raise ValueError(msg)
        if name:
            method(stage, name)


CHECKS: Mapping[str, Callable[[Any], object]] = {
    "preset": _check_preset,
    "b0_direction": _check_direction,
    "uncertainty": _check_uncertainty,
    "reference": _check_reference,
    "slurm": slurm.parse,
    "parameters": _check_groups,
}
"""Settings whose values are more than a type and bounds."""


def _check_weights(stage: str, name: str, chosen: Mapping[str, Any]) -> None:
    """Refuse weights that a network cannot take, before hours have gone into all else."""
    from qsmpipe.nets.cards import load
    from qsmpipe.nets.contract import Channel

    defaults = parameters_of(stage, name)
    weights, licence = (chosen.get(key, defaults[key].default) for key in ("weights", "licence"))
    from_phase = method(stage, name).starts_from == "phase"
    field: Channel = "filtered phase" if from_phase else "field"
    load(weights, architecture=name, licence=licence, given=(field, "mask"))


def _step(stage: str, name: str, **parameters: Any) -> dict[str, Any]:
    return {"stage": stage, "method": name, "parameters": parameters}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def presets() -> dict[str, dict[str, Any]]:
    """Presets by name, each with a ``description`` and some settings."""
    return tomllib.loads(files("qsmpipe.data").joinpath("presets.toml").read_text())


def read(path: str | Path) -> dict[str, Any]:
    """Read the settings in a TOML file, and check each of them.

    Raises
    ------
    ValueError
        If the file is not TOML, names a setting that does not exist, or a value does not fit; it
        names the file, the key, and what was expected.
    """
    values = read_table(path)
    _check_values(values, str(path))
    return values


def combine(command_line: Mapping[str, Any], config_file: str | None = None) -> Settings:
    """Join the defaults, the preset, the file and the command line, the last one winning.

    Parameters of methods (``parameters``) add up, one by one. Each belongs to a method that its
    own layer runs: ``inversion.lambda`` in a file with ``inversion = "tv"`` is a parameter of TV.
    A later layer that runs other methods drops the parameters of those that it runs no more, and
    of them alone: ``tv,rts`` after ``tv`` keeps the parameters of TV. A preset may hold parameters
    of methods that it does not run; they serve whoever chooses such a method.

    Raises
    ------
    ValueError
        If the file cannot be read, or a value does not fit.
    """
    from_file = read(config_file) if config_file else {}
    said = {key: item for key, item in command_line.items() if item is not None}
    _check_values(said, "", spelled=_as_option)
    own = from_file.get("preset", "default")
    name = said.get("preset", own)
    values = presets()[name] | from_file | said
    del values["description"]
    methods = _methods_of(values)
    parameters = {
        group: dict(items)
        for group, items in presets()[name].get("parameters", {}).items()
        if _is_run(group, methods)
    }

    def joined(layer: Mapping[str, Any], seen: Mapping[str, tuple[str, ...]]) -> Settings:
        """Add the parameters of a layer to those before; ``seen`` are the methods that it runs."""
        for group, items in layer.get("parameters", {}).items():
            for key, item in items.items():
                owner = _owner(group, key, seen)
                if _is_run(owner, methods) or not _is_run(owner, seen):
                    parameters.setdefault(owner, {})[_spoken(key)] = item
        return from_table(Settings, values | {"preset": name, "parameters": parameters}, "")

    if from_file.get("parameters"):
        try:
            so_far = joined(from_file, _methods_of(presets()[own] | from_file))
            for stage in STAGES:
                so_far.parameters_for(stage)
        except ValueError as error:
            raise ValueError(f"{config_file}: {error}") from error
    return joined(said, methods)


def _as_option(name: str) -> str:
    """Name of a setting on the command line."""
    words = {"bids_dir": "bids_dir", "output_dir": "output_dir", "parameters": "--set"}
    return words.get(name, f"--{name.replace('_', '-')}")


def _methods_of(values: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Methods that each stage runs, the defaults where nothing is chosen."""
    return {
        stage: names_in(stage, values.get(stage, getattr(Settings, stage))) for stage in STAGES
    }


def _is_run(group: str, methods: Mapping[str, tuple[str, ...]]) -> bool:
    stage, _, name = group.partition(".")
    return name in methods.get(stage, ())


def _owner(group: str, key: str, methods: Mapping[str, tuple[str, ...]]) -> str:
    """``stage.method`` of a parameter; ``group`` itself where that cannot be told."""
    among = methods.get(group, ())
    if len(among) > 1:  # signatures are read, which imports torch: seldom
        among = tuple(name for name in among if _named(key) in parameters_of(group, name))
    return f"{group}.{among[0]}" if len(among) == 1 else group


def parse_assignments(assignments: Iterable[str]) -> dict[str, dict[str, Any]]:
    """``stage.parameter=value`` or ``stage.method.parameter=value``, values as in TOML.

    >>> parse_assignments(["inversion.lambda=1e-4", "mask.bet.smoothness=2"])
    {'inversion': {'lambda': 0.0001}, 'mask.bet': {'smoothness': 2}}

    Raises
    ------
    ValueError
        If an assignment has another form.
    """
    parameters: dict[str, dict[str, Any]] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        stage, _, parameter = name.strip().rpartition(".")
        if not (equals and stage and parameter):
            msg = f"--set {assignment!r}: write stage.parameter=value, as in inversion.lambda=1e-4"
            raise ValueError(msg)
        try:
            value = tomllib.loads(f"value = {text.strip()}")["value"]
        except (ValueError, RecursionError):  # no TOML: a bare word
            value = text.strip()
        try:
            checked(Any, value, "")
        except ValueError as error:
            raise ValueError(f"--set {name}{error}") from error
        parameters.setdefault(stage, {})[parameter] = value
    return parameters


def _named(key: str) -> str:
    """Name of a parameter in Python: ``lambda_`` for ``lambda``."""
    return f"{key}_" if keyword.iskeyword(key) else key


def _spoken(name: str) -> str:
    """Name of a parameter in a file: ``lambda`` for ``lambda_``."""
    bare = name.removesuffix("_")
    return bare if keyword.iskeyword(bare) else name


def _no_owner(stage: str, methods: list[str], key: str, owners: list[str]) -> str:
    if owners:
        options = " or ".join(f"{stage}.{name}.{key}" for name in owners)
        return f"{stage}.{key} could be meant for several methods: write {options}"
    takes = {name: [_spoken(p) for p in parameters_of(stage, name)] for name in methods}
    close = difflib.get_close_matches(
        key, [name for names in takes.values() for name in names], n=1
    )
    hint = f"; did you mean {close[0]!r}?" if close else ""
    what = "; ".join(
        f"{name} takes {', '.join(p) or 'no parameters'}" for name, p in takes.items()
    )
    return f"{stage} has no parameter {key!r}: {what or f'no method of {stage} is run'}{hint}"


def _fitting(stage: str, name: str, key: str, value: Any) -> Any:
    """``value`` as the parameter has it; what does not fit is refused."""
    kind = parameters_of(stage, name)[key].kind
    if not kind.takes(value):
        msg = f"{stage}.{name}.{_spoken(key)} is {shown(value)}: give {kind}"
        raise ValueError(msg)
    return kind.fit(value)


VERSIONED = (
    "nipype", "nibabel", "numpy", "scipy", "torch", "numba", "scikit-image", "SimpleITK", "pybids",
)  # fmt: skip
"""Packages whose versions decide on the maps."""


def versions() -> dict[str, str]:
    """List what computes the maps."""
    found = {"qsmpipe": __version__, "python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if container := os.environ.get("QSMPIPE_CONTAINER"):
        found["container"] = container
    return found
