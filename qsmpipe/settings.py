"""The choices of one run: defaults, then a preset, then a file, then the command line."""

import dataclasses
import difflib
import inspect
import keyword
import math
import os
import platform
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from qsmpipe import __version__
from qsmpipe.chain import Chain
from qsmpipe.methods import (
    GIVEN,
    METHODS,
    function_of,
    mask_steps,
    method,
    names_in,
    needs_background,
    parameters_of,
)

STAGES = ("offset", "mask", "unwrap", "field", "relaxation", "swi", "background", "inversion",
          "cosmos")  # fmt: skip
"""Stages with a method to choose, in the order in which they run."""

Parameters = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run does; written beside its results as TOML."""

    bids_dir: str = ""
    output_dir: str = ""
    work_dir: str = "work"

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
    mask_erosion: float = Chain.mask_erosion
    mask_residual: float = Chain.mask_residual
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
    uncertainty: int = Chain.uncertainty
    """Noisy fields that give the standard deviation of the map; 0: none is estimated."""
    """Whether susceptibility is mapped where the phase is reliable first."""
    parameters: Parameters = dataclasses.field(default_factory=dict)
    """Stage (or ``stage.method``) to parameter to value, as given by the user."""
    b0: float = 0.0
    """Field strength (T); 0: from the sidecar."""
    b0_direction: tuple[float, ...] = ()
    """Unit vector along B0 in voxel axes, of every image; empty: from each image's header."""
    phase_sign: int = 0
    """+1 or -1; 0: by the manufacturer."""

    intermediates: bool = False
    device: str = "auto"
    nprocs: int = 0
    omp_nthreads: int = 0
    mem_gb: float = 0.0
    use_plugin: str = ""
    stop_on_first_crash: bool = False

    def __post_init__(self) -> None:
        length = math.hypot(*self.b0_direction)
        if 0 < length < math.inf:
            unit = tuple(component / length for component in self.b0_direction)
            object.__setattr__(self, "b0_direction", unit)

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
        """Read the limit of R2* (1/s) out of ``"csf:8"``; empty for any other reference.

        Raises
        ------
        ValueError
            If it is no number above 0.
        """
        reference, _, label = self.reference.partition(":")
        if reference != "csf" or not label:
            return {}
        try:
            limit = float(label)
        except ValueError:
            limit = 0.0
        if not 0 < limit < math.inf:
            msg = f"reference {self.reference!r}: {label!r} is no R2* in 1/s; write csf:8"
            raise ValueError(msg)
        return {"threshold": limit}

    def chain(self) -> Chain:
        """Methods of all stages with the parameters that the user set for them, checked."""
        chosen = {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(Chain)
            if item.name not in ("reference", "parameters")
        }
        parameters = {stage: self.parameters_for(stage) for stage in STAGES}
        parameters["reference"] = {"csf": self.reference_parameters()}
        reference = self.reference.partition(":")[0]
        return Chain(**chosen, reference=reference, parameters=parameters)

    def check(self) -> None:
        """Check methods and parameters before anything is read.

        Raises
        ------
        ValueError
            Naming the setting, its value and what it may be.
        """
        for stage in STAGES:
            names = self.methods(stage)
            for name in names:
                method(stage, name)
            if twice := [name for name in set(names) if names.count(name) > 1]:
                msg = f"{stage} {getattr(self, stage)!r}: {twice[0]} is there twice; name it once"
                raise ValueError(msg)
        if self.b0_direction and not (
            len(self.b0_direction) == 3 and 0 < math.hypot(*self.b0_direction) < math.inf
        ):
            msg = (
                f"b0_direction {' '.join(f'{x:g}' for x in self.b0_direction)}: give three finite "
                "numbers that are not all 0, along the voxel axes, as in 0 0 1"
            )
            raise ValueError(msg)
        if self.uncertainty < 0 or self.uncertainty == 1:
            msg = f"uncertainty {self.uncertainty}: give 2 noisy fields or more, or 0 for none"
            raise ValueError(msg)
        if self.uncertainty and self.two_pass:
            msg = "the uncertainty of a map from two passes is not known: leave one of them out"
            raise ValueError(msg)
        main = self.methods("inversion")[:1]
        if self.uncertainty and main and method("inversion", *main).starts_from == "phase":
            msg = (
                f"the uncertainty of {main[0]} is not known, as it takes the phase and the noise "
                "is that of a field: choose another inversion, or leave the uncertainty out"
            )
            raise ValueError(msg)
        if self.mask == "none":
            msg = "mask cannot be 'none': choose a method, an expression of methods, or 'given'"
            raise ValueError(msg)
        mask_steps(self.mask)
        needed = needs_background(self.methods("inversion"))
        for stage in ("inversion", *(["background"] if needed else []), "unwrap", "field"):
            if not self.methods(stage):
                msg = f"{stage} cannot be {getattr(self, stage)!r}: {_choices(stage)}"
                raise ValueError(msg)
        if self.methods("cosmos") and not self.methods("background"):
            msg = (
                "cosmos works on local fields, and with --background none there are none: choose "
                f"one of {', '.join(METHODS['background'])}"
            )
            raise ValueError(msg)
        reference, _, label = self.reference.partition(":")
        needs_label = {"brain": False, "none": False, "region": True, "csf": bool(label)}
        if needs_label.get(reference) != bool(label):
            msg = (
                f"reference {self.reference!r}: choose brain, csf (or csf:R2STAR, the limit in "
                "1/s), none, or region:LABEL, where LABEL is the label or desc of a mask in "
                "--derivatives"
            )
            raise ValueError(msg)
        self.reference_parameters()
        if self.mask_residual < 0:
            msg = f"mask_residual {self.mask_residual:g} is below 0: give 0.3, or 0 to keep all"
            raise ValueError(msg)
        if reference == "csf" and self.relaxation == "none":
            msg = "reference csf finds the ventricles by their R2*: choose a relaxation method"
            raise ValueError(msg)
        for group in self.parameters:
            if group.partition(".")[0] not in STAGES:
                close = difflib.get_close_matches(group, STAGES, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                msg = f"there is no stage {group!r}: one of {', '.join(STAGES)}{hint}"
                raise ValueError(msg)
        for stage in STAGES:
            for name, chosen in self.parameters_for(stage).items():
                if method(stage, name).trained:
                    _check_weights(stage, name, chosen)

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

    def as_toml(self) -> str:
        """Write these settings as text that :func:`read` takes."""
        import tomli_w

        return tomli_w.dumps(_plain(dataclasses.asdict(self)))


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
    """Read the settings in a TOML file.

    Raises
    ------
    ValueError
        If the file is not TOML or names a setting that does not exist.
    """
    try:
        values = tomllib.loads(Path(path).read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        msg = f"{path}: not a readable TOML file ({error})"
        raise ValueError(msg) from error
    known = [item.name for item in dataclasses.fields(Settings)]
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f": one of {', '.join(known)}"
            msg = f"{path}: there is no setting {name!r}{hint}"
            raise ValueError(msg)
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
        If the file cannot be read, or there is no such preset.
    """
    from_file = read(config_file) if config_file else {}
    own = from_file.get("preset") or "default"
    name = command_line.get("preset") or own
    known = presets()
    for chosen in (own, name):
        if chosen not in known:
            msg = f"there is no preset {chosen!r}: choose from {', '.join(known)}"
            raise ValueError(msg)
    said = {key: item for key, item in command_line.items() if item is not None}
    values = known[name] | from_file | said
    methods = _methods_of(values)
    parameters = {
        group: dict(items)
        for group, items in known[name].get("parameters", {}).items()
        if _is_run(group, methods)
    }
    for layer, at_that_time in ((from_file, _methods_of(known[own] | from_file)), (said, methods)):
        for group, items in layer.get("parameters", {}).items():
            for key, item in items.items():
                owner = _owner(group, key, at_that_time)
                if _is_run(owner, methods) or not _is_run(owner, at_that_time):
                    parameters.setdefault(owner, {})[_spoken(key)] = item
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    values |= {"preset": name, "parameters": parameters}
    del values["description"]
    return Settings(**values)


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
        except tomllib.TOMLDecodeError:
            value = text.strip()
        parameters.setdefault(stage, {})[parameter] = value
    return parameters


def _choices(stage: str) -> str:
    return f"choose from {', '.join(METHODS[stage])}"


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
    """``value`` in the type of the parameter's default; a mismatch is refused."""
    default = parameters_of(stage, name)[key].default
    annotation = str(inspect.signature(function_of(stage, name)).parameters[key].annotation)
    if isinstance(default, bool):
        fits = isinstance(value, bool)
    elif isinstance(default, int) and "float" not in annotation:
        fits = isinstance(value, int) and not isinstance(value, bool)
    elif isinstance(default, float):
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        fits = fits or (
            isinstance(value, str) and ("str" in annotation or repr(value) in annotation)
        )
        value = float(value) if fits and not isinstance(value, str) else value
    elif isinstance(default, str):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = (number and "float" in annotation) or (
            isinstance(value, str) and ("Literal" not in annotation or repr(value) in annotation)
        )
        value = float(value) if fits and number else value
    elif isinstance(default, tuple | list | range):
        fits = isinstance(value, list)
        value = tuple(value) if fits else value
    else:
        fits = True
    if not fits:
        msg = (
            f"{stage}.{_spoken(key)} = {value!r} does not fit {name}: its default is "
            f"{default!r} ({annotation})"
        )
        raise ValueError(msg)
    return value


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
