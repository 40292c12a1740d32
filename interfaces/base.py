"""What the interfaces of all stages share: device, threads, and the record of what was done."""

import hashlib
import inspect
import keyword
import logging
import re
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import new_class
from typing import Any, ClassVar, TypeVar

import torch
from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    SimpleInterface,
    TraitedSpec,
    Undefined,
    isdefined,
    traits,
)
from nipype.interfaces.base.support import Bunch

import qsmpipe
from qsmpipe import images
from qsmpipe.interfaces.lease import lease
from qsmpipe.methods import (
    METHODS,
    SUPPLIED,
    Method,
    Parameter,
    function_of,
    method,
    parameters,
    summary,
)
from qsmpipe.numerics.parameters import Kind, NotNegative, Positive
from qsmpipe.numerics.solvers import Convergence

logger = logging.getLogger("nipype.interface")


def positive(value: float, desc: str) -> traits.Range:
    """Make an input that must be above 0."""
    return trait_of(Parameter(Kind.of(Positive), value, desc))


def not_negative(value: float, desc: str) -> traits.Range:
    """Make an input that must be 0 or above."""
    return trait_of(Parameter(Kind.of(NotNegative), value, desc))


def trait_of(parameter: Parameter) -> traits.TraitType:
    """Make the input that a parameter of a method is."""
    kind, value = parameter.kind, parameter.default
    told = {"usedefault": True, "desc": parameter.description}
    if kind.base is None:
        return traits.Enum(value, *(word for word in kind.words if word != value), **told)
    if kind.many:
        return traits.List(_trait(replace(kind, many=False)), value=list(value), **told)
    if kind.words:
        first = float(kind.low or 0) + 1  # a value of its own, which no one sees
        return traits.Union(
            _trait(kind, value=first), traits.Enum(*kind.words), default_value=value, **told
        )
    return _trait(kind, value=value, **told)


def _trait(kind: Kind, **told: Any) -> traits.TraitType:
    if kind.low is None and kind.high is None:
        plain = {bool: traits.Bool, int: traits.Int, float: traits.Float, str: traits.Str}
        default = [told.pop("value")] if "value" in told else []
        return plain[kind.base or str](*default, **told)
    to = kind.base or float
    return traits.Range(
        low=None if kind.low is None else to(kind.low),
        high=None if kind.high is None else to(kind.high),
        exclude_low=kind.without_low,
        exclude_high=kind.without_high,
        **told,
    )


def direction(image: str) -> traits.List:
    """Make the direction of B0; where it is not given, the affine of the input ``image`` tells."""
    return traits.List(
        traits.Float,
        minlen=3,
        maxlen=3,
        desc=f"unit vector along B0 in voxel axes; from the affine of `{image}` when not given",
    )


COMPUTES = ("images.py", "interfaces", "methods.py", "nets", "numerics", "registration.py")
"""Parts of the package that decide on what a node gives."""


@cache
def code_digest() -> str:
    """Hash the sources of :data:`COMPUTES`.

    All of them: which functions a node will call, its class does not tell.
    """
    package = Path(qsmpipe.__file__).parent
    digest = hashlib.sha256()
    for part in COMPUTES:
        root = package / part
        for source in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            digest.update(str(source.relative_to(package)).encode() + b"\0")
            digest.update(source.read_bytes() + b"\0")
    return digest.hexdigest()


class StageInputSpec(BaseInterfaceInputSpec):
    """Inputs of every stage."""

    code = traits.Str(
        code_digest(),
        usedefault=True,
        desc="hash of the package's sources: what other code computed is not taken from a cache",
    )

    num_threads = traits.Int(1, usedefault=True, nohash=True, desc="CPU threads")
    use_gpu = traits.Bool(
        False, usedefault=True, nohash=True, desc="compute on CUDA, on a device of its own"
    )

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        for word in filter(keyword.iskeyword, self.__prefix_traits__):
            # traits takes `lambda_` for the prefix of a family of names; it is one once assigned.
            setattr(self, f"{word}_", getattr(self, f"{word}_"))


Spec = TypeVar("Spec", bound=StageInputSpec)


class StageOutputSpec(TraitedSpec):
    """Outputs of every stage."""

    step = traits.Dict(desc="what was done: stage, method, parameters, convergence, warnings")


class Stage(SimpleInterface):
    """One call of a function of :mod:`qsmpipe.numerics`, from files to files.

    A subclass names its ``stage``, its ``method`` (the key in
    :data:`qsmpipe.methods.METHODS`) and its ``function``, and writes :meth:`_compute`. Inputs
    named like keyword-only arguments of ``function`` are its parameters.
    """

    input_spec = StageInputSpec
    output_spec = StageOutputSpec
    stage: ClassVar[str]
    method: ClassVar[str]
    function: ClassVar[Callable[..., Any]]
    serial: ClassVar[bool] = False
    """Whether it works on one thread, however many there are."""
    volumes: ClassVar[int] = 6
    """Memory in float32 volumes of the grid, beyond 4 for each echo."""
    features_gb: ClassVar[float] = 0.0
    """Memory (GB) of what does not grow with the grid."""

    @classmethod
    def memory_gb(cls, voxels: int, echoes: int) -> float:
        """Estimate the memory of a node (GB): interpreter, volumes, echoes."""
        return 0.4 + cls.features_gb + 4 * voxels / 2**30 * (cls.volumes + 4 * echoes)

    def _compute(self, cwd: Path, device: torch.device) -> None:
        raise NotImplementedError

    def _supplied(
        self, *functions: Callable[..., Any], like: str, device: torch.device
    ) -> dict[str, Any]:
        """Collect the inputs named in :data:`SUPPLIED` that are given and ``functions`` take.

        By default that is the interface's own function. Images are loaded, on the grid of
        ``like``; B0 lies along the third axis of the world unless a direction is given.
        """
        taken = {
            name
            for function in functions or (self.function,)
            for name in inspect.signature(function).parameters
        }
        supplied: dict[str, Any] = {}
        for name in sorted(SUPPLIED & taken):
            value = getattr(self.inputs, name, Undefined)
            if isinstance(self.inputs.trait(name).trait_type, File) and isdefined(value):
                supplied[name] = images.load(value, like=like, device=device)
            elif isdefined(value):
                supplied[name] = value
            elif name == "b0_direction":
                supplied[name] = images.b0_direction_of(like)
        return supplied

    def _call(self, *data: Any, **choices: Any) -> Any:
        """Call ``function`` with its own parameters and those ``choices`` that it knows."""
        known = [
            name
            for name, parameter in inspect.signature(self.function).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        ]
        parameters = {
            name: value
            for name in known
            if name not in choices and isdefined(value := getattr(self.inputs, name, Undefined))
        }
        self._step["parameters"] |= parameters
        choices = {name: value for name, value in choices.items() if name in known}
        return self.function(*data, **parameters, **choices)

    def _call_and_note(self, *data: Any, **choices: Any) -> Any:
        """Do :meth:`_call`; what ``function`` warns of becomes a warning of this step."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            result = self._call(*data, **choices)
        self._step["warnings"] += [
            str(warning.message) for warning in caught if warning.category is RuntimeWarning
        ]
        return result

    def _record(self, convergence: Convergence | None) -> None:
        """Note how an iteration ended; one that ran out of steps is a warning."""
        if convergence is None:
            return
        self._step["convergence"] = convergence._asdict()
        if not convergence.converged:
            self._step["warnings"].append(
                f"{self.stage} ({self.method}) stopped after {convergence.iterations} iterations "
                f"at a change of {convergence.change:.2g}, above its tolerance "
                f"{convergence.tolerance:.2g}: raise max_iterations or the tolerance"
            )

    def _device(self) -> torch.device:
        if self.inputs.use_gpu and torch.cuda.is_available():
            return torch.device("cuda")
        if self.inputs.use_gpu:
            logger.warning("%s: no CUDA device is visible; running on the CPU", self.method)
        return torch.device("cpu")

    def _run_interface(self, runtime: Bunch) -> Bunch:
        set_threads(self.inputs.num_threads)
        self._step: dict[str, Any] = {
            "stage": self.stage,
            "method": self.method,
            "parameters": {},
            "warnings": [],
        }
        with lease() if self.inputs.use_gpu else nullcontext():
            begin = time.monotonic()
            device = self._device()
            if self.inputs.use_gpu:
                self._step["device"] = _named(device)
            with _memory_of(device, self.method):
                self._compute(Path(runtime.cwd), device)
            runtime.wall_seconds = time.monotonic() - begin
        runtime.peak_memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self._results["step"] = self._step
        return runtime


def takes(function: Callable[..., Any]) -> Callable[[type[Spec]], type[Spec]]:
    """Add the parameters of a function to the input spec that is decorated."""

    def extended(spec: type[Spec]) -> type[Spec]:
        return _with_parameters(spec, function, spec.__name__, spec.__qualname__)

    return extended


def _with_parameters(
    spec: type[Spec], function: Callable[..., Any], name: str, qualname: str
) -> type[Spec]:
    members = {key: trait_of(one) for key, one in parameters(function).items()}
    place = {"__module__": spec.__module__, "__qualname__": qualname, "__doc__": spec.__doc__}
    return new_class(name, (spec,), exec_body=lambda body: body.update(members | place))


def interfaces_of(
    stage: str, base: Callable[[Method], type[Stage]]
) -> Callable[[str], type[Stage]]:
    """Make the ``__getattr__`` of a module with the interfaces of a stage's methods.

    Each is made of its row in :data:`qsmpipe.methods.METHODS` when it is first asked for: ``base``
    of the row says how to load, call and save, the function of the row which parameters there are.
    """
    names = {row.interface: name for name, row in METHODS[stage].items()}

    @cache
    def interface(name: str) -> type[Stage]:
        if name not in names:
            raise AttributeError(f"module 'qsmpipe.interfaces.{stage}' has no attribute {name!r}")
        row, function = method(stage, names[name]), function_of(stage, names[name])
        parent = base(row)
        told = f"{summary(function)}.\n\nSee :func:`{function.__module__}.{function.__name__}`."
        spec = _with_parameters(
            parent.input_spec, function, f"_{name}InputSpec", f"{name}.input_spec"
        )
        members = {
            "__module__": parent.__module__,
            "__doc__": told,
            "input_spec": spec,
            "method": names[name],
            "function": staticmethod(function),
            "volumes": row.volumes or parent.volumes,
        }
        return new_class(name, (parent,), exec_body=lambda body: body.update(members))

    return interface


def _named(device: torch.device) -> str:
    """Name the kind of a device, the same for one like it: which was free is no result."""
    if device.type == "cpu":
        return "cpu"
    return f"cuda:{torch.cuda.get_device_properties(device).name}"


@contextmanager
def _memory_of(device: torch.device, method: str) -> Iterator[None]:
    """Say in one line that a GPU's memory is too small; leave none of it taken."""
    if device.type == "cpu":
        yield
        return
    try:
        yield
    except RuntimeError as error:
        if not re.search("out of memory|ALLOC_FAILED", str(error)):  # torch's own, or a library's
            raise
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        msg = (
            f"{method} needs more memory than this GPU ({_named(device)}) has free of its "
            f"{memory:.1f} GiB: take smaller patches, where the method has them, or --device cpu"
        )
        raise RuntimeError(msg) from error
    finally:
        torch.cuda.empty_cache()  # a process that lives on keeps it from the device's next holder


def set_threads(count: int) -> None:
    """Hold numba and torch to ``count`` threads."""
    import numba

    available = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(min(count, available))
    # Only now: numba's OpenMP, as it starts with its first call, sets torch's threads to all.
    torch.set_num_threads(count)
