"""Speed and memory of every method: one Markdown table per stage.

    python benchmarks/numerics.py                  # 192 x 224 x 160, minutes
    python benchmarks/numerics.py --quick          # 96 x 96 x 96

The methods are the rows of :data:`qsmpipe.methods.METHODS`. Each runs in a process of its own,
with its defaults, on one synthetic head of five echoes: balls in an ellipsoid, a background field,
noise.

Columns: *pairs* counts the Fourier transforms of the call, in pairs of a forward and a backward
real transform of the grid that most of that work is done on; *pairs/iteration* is what one more
iteration takes; *time in pairs* is the call's time over that of one such pair in float32, *over
FFT* the same over the call's own pairs; *volumes* is the peak memory above the inputs, in float32
volumes of the image and, in brackets, of that grid where it is larger, which is what the limit
counts; *us/voxel* is per voxel of the mask, all echoes together; *compile* is the processor time
that the first call in an installation takes above the second.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import inspect
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.fft
import torch
from torch import Tensor

from qsmpipe.methods import METHODS, function_of, parameters_of
from qsmpipe.numerics import fourier
from qsmpipe.numerics.fourier import Zooms, padded_shape
from qsmpipe.numerics.operators import Dipole
from qsmpipe.numerics.solvers import Convergence

DEFAULT_SHAPE = (192, 224, 160)
QUICK_SHAPE = (96, 96, 96)
SMALL_SHAPE = (40, 44, 36)
"""Where a first call compiles, and where transforms of an iteration are counted."""
MEMORY_ITERATIONS = 4
"""Iterations that memory is measured in: later ones take no more."""

ECHO_TIMES = (0.005, 0.010, 0.015, 0.020, 0.025)
FIELD_STRENGTH = 3.0
ZOOMS: Zooms = (1.0, 1.0, 1.0)
TILT = math.radians(20)
B0_DIRECTION = (math.sin(TILT), 0.0, math.cos(TILT))
ORIENTATIONS = ((0.0, 0.0, 1.0), (0.5, 0.0, 0.75**0.5), (0.0, -0.5, 0.75**0.5))
"""Directions of B0 for the methods that take several scans."""
NOISE = 1e-3
"""Of the field (ppm)."""

MEMORY_LIMIT, MEMORY_LIMIT_TGV = 8.0, 20.0
"""Float32 volumes above the inputs, of methods by ADMM: those with a penalty ``rho``."""
COMPILE_LIMIT = 5.0
"""Seconds, over all methods."""
OVER_FFT_LIMIT = 1.5
OVER_FFT = ("resharp", "pdf", "ismv")
"""Methods whose time is held to that of their transforms."""
PAIRS_PER_ITERATION_LIMIT = 2.0
"""Of methods by ADMM."""
PAIRS_LIMITS = {"vsharp": 30.0}
PER_VOXEL_LIMITS = {("unwrap", "romeo"): 1.0, ("field", "nonlinear"): 0.5 * len(ECHO_TIMES)}
"""Microseconds per voxel of the mask, all echoes together."""

FOURIER = {
    torch.fft: ("rfftn", "irfftn", "fftn", "ifftn", "rfft2", "irfft2", "fft2", "ifft2", "rfft",
                "irfft", "fft", "ifft"),
    scipy.fft: ("dctn", "idctn", "dstn", "idstn", "rfftn", "irfftn", "fftn", "ifftn", "dct",
                "idct", "dst", "idst", "rfft", "irfft", "fft", "ifft"),
}  # fmt: skip

# ---------------------------------------------------------------------------------------------
# The head
# ---------------------------------------------------------------------------------------------


def head(shape: Sequence[int], *, device: str = "cpu") -> dict[str, Any]:
    """Everything that a method may ask for, by the name of its argument."""
    generator = torch.Generator().manual_seed(0)
    axes = [torch.linspace(-1, 1, n) for n in shape]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    radius = (x**2 + y**2 + z**2).sqrt() / 0.85
    mask = radius < 1
    chi = torch.zeros(tuple(shape))
    for _ in range(30):
        centre = torch.rand(3, generator=generator) * 1.0 - 0.5
        size, value = 0.05 + 0.15 * torch.rand(2, generator=generator)
        distance = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2).sqrt()
        chi += (value - 0.1) * 2 * (distance < size)
    chi *= mask
    outside = 4.0 * (((x - 0.3) ** 2 + (y + 1) ** 2 + (z + 0.8) ** 2).sqrt() < 0.2) * ~mask
    operator = Dipole.on_grid(chi, ZOOMS, B0_DIRECTION)
    local, background = operator(chi), operator(outside)
    turned = torch.stack([Dipole.on_grid(chi, ZOOMS, b0)(chi) for b0 in ORIENTATIONS])
    background += 0.1 * x - 0.05 * (x**2 - y**2)
    field = local + background
    noise = NOISE * (1 + 0.5 * x).clamp(min=0.1)
    field += noise * torch.randn(tuple(shape), generator=generator)
    decay = 15 + 40 * (chi > 0.05) + 200 * (radius >= 1)
    echoes = torch.tensor(ECHO_TIMES)[:, None, None, None]
    tissue = torch.where(mask, 1000.0, 20.0) * (1 + 0.2 * chi)
    magnitude = tissue * torch.exp(-decay * echoes)
    magnitude += 5 * torch.randn(magnitude.shape, generator=generator).abs()
    offset = 0.5 + 0.8 * x - 0.6 * y * z
    unwrapped = 2 * math.pi * 42.577478518 * FIELD_STRENGTH * echoes * field
    data = {
        "mask": mask,
        "field": field,
        "local": field - background,
        "turned": turned + noise * torch.randn(turned.shape, generator=generator),
        "noise": noise,
        "wrapped": torch.remainder(unwrapped + offset + math.pi, 2 * math.pi) - math.pi,
        "unwrapped": unwrapped,
        "magnitude": magnitude,
        "combined": magnitude.square().sum(0).sqrt(),
        "r2star": decay,
        "quality": torch.where(mask, 0.8, 0.1),
    }
    return {key: value.to(device) for key, value in data.items()}


def arguments(stage: str, name: str, data: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Collect what a method is called with; its parameters stay defaults."""
    row = METHODS[stage][name]
    known = {
        "field": data["local"] if stage == "inversion" else data["field"],
        "phase": data["unwrapped"] if stage in ("field", "swi") else data["wrapped"],
        "magnitude": data["combined" if stage in ("inversion", "mask") else "magnitude"],
        "fields": data["turned"],
        "b0_directions": ORIENTATIONS,
        "zooms": ZOOMS,
        "echo_times": list(ECHO_TIMES),
        "field_strength": FIELD_STRENGTH,
        "b0_direction": B0_DIRECTION,
        **{key: data[key] for key in ("mask", "noise", "r2star", "quality")},
    }
    if stage == "cosmos":
        known["noise"] = data["noise"].expand_as(data["turned"])
    if row.starts_from == "total field":
        known["field"] = data["field"]
    if row.starts_from == "phase" and stage == "inversion":
        known |= {"field": data["wrapped"], "magnitude": data["magnitude"]}
    positional, named = [], {}
    for key, parameter in inspect.signature(function_of(stage, name)).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            positional.append(known[key])
        elif key in known and key not in parameters_of(stage, name):
            named[key] = known[key]
    return positional, named


# ---------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------


class Transforms:
    """Fourier transforms of a call, by the grid that they are of."""

    def __init__(self) -> None:
        self.work: defaultdict[tuple[int, ...], float] = defaultdict(float)

    def note(self, name: str, shape: Sequence[int], axes: Sequence[int]) -> None:
        """Add a transform: 1 for a real one of three axes."""
        real = name.lstrip("i").startswith(("rfft", "dct", "dst"))
        grid = tuple(shape[-3:])
        batch = math.prod(shape) / math.prod(grid)
        self.work[grid] += batch * len(axes) / 3 * (1 if real else 2)

    def __sub__(self, other: "Transforms") -> "Transforms":
        """Leave those beyond another call's."""
        more = Transforms()
        for grid, count in self.work.items():
            if count > other.work[grid]:
                more.work[grid] = count - other.work[grid]
        return more

    @property
    def grid(self) -> tuple[int, ...] | None:
        """Grid on which most of the work is done."""
        return max(self.work, key=lambda grid: self.work[grid] * _cost(grid), default=None)

    @property
    def pairs(self) -> float:
        """Pairs of transforms of that grid."""
        if self.grid is None:
            return 0.0
        total = sum(count * _cost(grid) for grid, count in self.work.items())
        return total / _cost(self.grid) / 2


def _cost(grid: Sequence[int]) -> float:
    """Work of a transform, up to a factor."""
    return math.prod(grid) * math.log2(max(math.prod(grid), 2))


@contextlib.contextmanager
def counted() -> Iterator[Transforms]:
    """Count the transforms that run meanwhile."""
    transforms = Transforms()
    nested = [False]

    def wrapped(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(image: Any, *args: Any, **kwargs: Any) -> Any:
            outer, nested[0] = nested[0], True
            try:
                result = function(image, *args, **kwargs)
            finally:
                nested[0] = outer
            if not outer:
                # the real side has the grid's size
                real = image if name.startswith("rfft") else result
                shape = list(real.shape)
                sizes = kwargs.get("s", args[0] if args and name.endswith("n") else None)
                default = 3 if name.endswith("n") else 2 if name.endswith("2") else 1
                axes = kwargs.get("dim", kwargs.get("axes", kwargs.get("axis")))
                if axes is None:
                    axes = range(-min(default, len(shape)), 0)
                axes = [axes] if isinstance(axes, int) else list(axes)
                for axis, size in zip(axes, sizes or (), strict=False):
                    shape[axis] = size
                transforms.note(name, shape, axes)
            return result

        return call

    def whole(function: Callable[..., Any]) -> Callable[..., Any]:
        """Count as if no line of zeros were left out."""

        @functools.wraps(function)
        def call(image: Tensor, shape: Sequence[int], *args: Any, **kwargs: Any) -> Any:
            outer, nested[0] = nested[0], True
            try:
                result = function(image, shape, *args, **kwargs)
            finally:
                nested[0] = outer
            if not outer:
                transforms.note("rfftn", (*image.shape[:-3], *shape), (-3, -2, -1))
            return result

        return call

    ours = {fourier.rfft, fourier.irfft}
    originals = {
        (module, name): getattr(module, name)
        for module, names in FOURIER.items()
        for name in names
    } | {
        (module, name): getattr(module, name)
        for title, module in list(sys.modules.items())
        for name in ("rfft", "irfft")
        if title.startswith("qsmpipe.") and getattr(module, name, None) in ours
    }
    try:
        for (module, name), function in originals.items():
            setattr(module, name, whole(function) if function in ours else wrapped(function, name))
        yield transforms
    finally:
        for (module, name), function in originals.items():
            setattr(module, name, function)


def memory(key: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process (bytes)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def convergence_of(result: Any) -> Convergence | None:
    """How an iteration ended, if the result says."""
    found = getattr(result, "convergence", None)
    return found if isinstance(found, Convergence) else None


def pair_seconds(grid: tuple[int, int, int], device: str) -> float:
    """Time of a real forward and backward transform in float32: best of three."""
    image = torch.rand(tuple(grid), device=device)
    best = math.inf
    for _ in range(4):
        begin = now(device)
        fourier.irfft(fourier.rfft(image, grid), grid, grid, overwrite=True)
        best = min(best, now(device) - begin)
    return best


def now(device: str) -> float:
    """Clock, after all work on the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def pairs_per_iteration(stage: str, name: str, data: dict[str, Any]) -> float | None:
    """Count what one more iteration takes, by running a few more; None where nothing tells."""
    known = parameters_of(stage, name)
    if "max_iterations" not in known:
        return None
    positional, named = arguments(stage, name, data)
    named |= {"tolerance": 1e-12} if "tolerance" in known else {}
    found = []
    for count in (3, 6):
        with counted() as transforms:
            try:
                result = function_of(stage, name)(*positional, **named, max_iterations=count)
            except ValueError:
                return None
        end = convergence_of(result)
        if end is None:
            return None
        found.append((end.iterations, transforms))
    (few, first), (many, second) = found
    if many <= few or not second.work:
        return None
    return (second - first).pairs / (many - few)


def prepared(
    stage: str, name: str, path: Path, device: str
) -> tuple[list[Any], dict[str, Any], int, int]:
    """Arguments of the whole head, its voxels and those of its mask; the rest is let go."""
    whole = torch.load(path, mmap=True)
    voxels, inside = whole["mask"].numel(), int(whole["mask"].sum())
    positional, named = arguments(stage, name, whole)

    def own(value: Any) -> Any:
        return value.clone().to(device) if isinstance(value, Tensor) else value

    return (
        [own(value) for value in positional],
        {key: own(value) for key, value in named.items()},
        voxels,
        inside,
    )


def peak_memory(stage: str, name: str, path: Path, device: str) -> dict[str, Any]:
    """Bytes that a method takes above its inputs, in a few iterations.

    In a process that gives every large array back at once (see :func:`in_own_process`): what the
    allocator holds on to is no need of the method.
    """
    call = function_of(stage, name)
    known = parameters_of(stage, name)
    few = {"max_iterations": MEMORY_ITERATIONS} if "max_iterations" in known else {}
    positional, named = arguments(stage, name, head(SMALL_SHAPE, device=device))
    call(*positional, **named, **few)
    positional, named, voxels, _ = prepared(stage, name, path, device)
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = memory("VmRSS")
    call(*positional, **named, **few)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else memory("VmHWM")
    return {"bytes": peak - before, "voxels": voxels}


def measure(stage: str, name: str, path: Path, device: str) -> dict[str, Any]:
    """Time of one method, and its transforms."""
    call = function_of(stage, name)
    small = head(SMALL_SHAPE, device=device)
    positional, named = arguments(stage, name, small)
    first = []
    for _ in range(2):
        begin = time.process_time()
        call(*positional, **named)
        first.append(time.process_time() - begin)
    per_iteration = pairs_per_iteration(stage, name, small)
    del small

    positional, named, _, inside = prepared(stage, name, path, device)
    with counted() as transforms:
        begin = now(device)
        result = call(*positional, **named)
        seconds = now(device) - begin
    end = convergence_of(result)
    grid = transforms.grid
    return {
        "seconds": seconds,
        "iterations": end.iterations if end else None,
        "converged": end.converged if end else None,
        "pairs": transforms.pairs,
        "per_iteration": per_iteration,
        "grid": grid,
        "pair_seconds": pair_seconds(grid, device) if grid else None,
        "compile": max(first[0] - first[1], 0.0),
        "per_voxel": seconds / inside * 1e6,
    }


# ---------------------------------------------------------------------------------------------
# Limits and tables
# ---------------------------------------------------------------------------------------------


class Limit(NamedTuple):
    """What the project promises of a method."""

    what: str
    bound: float
    value: float

    @property
    def met(self) -> bool:
        """Whether the promise is kept."""
        return self.value <= self.bound * (1 + 1e-6)


def limits(stage: str, name: str, found: dict[str, Any]) -> Iterator[Limit]:
    """All limits that hold for a method, with what was found."""
    if stage == "inversion" and "rho" in parameters_of(stage, name):
        bound = MEMORY_LIMIT_TGV if "tgv" in name else MEMORY_LIMIT
        yield Limit("volumes", bound, found["grid_volumes"])
        if found["per_iteration"] is not None:
            yield Limit("pairs/iteration", PAIRS_PER_ITERATION_LIMIT, found["per_iteration"])
    if name in PAIRS_LIMITS:
        yield Limit("pairs", PAIRS_LIMITS[name], found["pairs"])
    if name in OVER_FFT and found["pairs"]:
        ratio = found["seconds"] / found["pair_seconds"] / found["pairs"]
        yield Limit("over FFT", OVER_FFT_LIMIT, ratio)
    if (stage, name) in PER_VOXEL_LIMITS:
        yield Limit("us/voxel", PER_VOXEL_LIMITS[stage, name], found["per_voxel"])


HEAD = ("method", "s", "iterations", "s/iteration", "grid", "pairs", "pairs/iteration",
        "time in pairs", "over FFT", "volumes", "us/voxel", "compile (s)", "limits",
        "met")  # fmt: skip


def cells(stage: str, name: str, found: dict[str, Any]) -> list[str]:
    """One row."""

    def text(value: float | None, digits: int = 3) -> str:
        return "" if value is None else f"{value:#.{digits}g}".rstrip(".")

    seconds, steps, pairs = found["seconds"], found["iterations"], found["pairs"]
    in_pairs = seconds / found["pair_seconds"] if pairs else None
    promised = list(limits(stage, name, found))
    return [
        f"`{name}`",
        text(seconds),
        "" if steps is None else f"{steps}{'' if found['converged'] else ' (not converged)'}",
        text(seconds / steps) if steps else "",
        "x".join(map(str, found["grid"])) if pairs else "",
        text(pairs) if pairs else "",
        text(found["per_iteration"], 2),
        text(in_pairs),
        text(in_pairs / pairs) if in_pairs is not None else "",
        f"{text(found['volumes'])} ({text(found['grid_volumes'])})",
        text(found["per_voxel"]),
        text(found["compile"], 2),
        ", ".join(f"{limit.what} {limit.bound:g}" for limit in promised),
        ("no: " + ", ".join(f"{m.what} {m.value:.3g}" for m in promised if not m.met))
        if any(not limit.met for limit in promised)
        else "yes" if promised else "",
    ]  # fmt: skip


def line(words: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(words)} |"


def backends(shape: Sequence[int], threads: int) -> Iterator[list[str]]:
    """Seconds of a real pair of transforms in float32 with what is installed.

    On the grid itself, and padded by a quarter.
    """
    wide = padded_shape([5 * n // 4 for n in shape], ZOOMS, margin=0.0)
    grids = (padded_shape(shape, ZOOMS, margin=0.0), wide)
    inner = tuple(map(slice, shape))

    def padded(array: np.ndarray, grid: Sequence[int]) -> np.ndarray:
        whole = np.zeros(tuple(grid), np.float32)
        whole[inner] = array
        return whole

    def with_torch(array: np.ndarray, grid: tuple[int, int, int]) -> Any:
        half = torch.fft.rfftn(torch.from_numpy(array), s=grid)
        return torch.fft.irfftn(half, s=grid)[inner]

    def with_scipy(array: np.ndarray, grid: tuple[int, int, int]) -> Any:
        half = scipy.fft.rfftn(array, s=grid, workers=threads)
        return scipy.fft.irfftn(half, s=grid, workers=threads)[inner]

    def with_ours(array: np.ndarray, grid: tuple[int, int, int]) -> Any:
        half = fourier.rfft(torch.from_numpy(array), grid)
        return fourier.irfft(half, grid, array.shape, overwrite=True)

    candidates: dict[str, Callable[[np.ndarray, tuple[int, int, int]], Any]] = {
        "torch": with_torch, "scipy": with_scipy, "scipy, no lines of zeros (in use)": with_ours,
    }  # fmt: skip
    with contextlib.suppress(ImportError):
        import pyfftw  # type: ignore[import-not-found]

        pyfftw.interfaces.cache.enable()
        module = pyfftw.interfaces.numpy_fft

        def with_fftw(array: np.ndarray, grid: tuple[int, int, int]) -> Any:
            half = module.rfftn(padded(array, grid), threads=threads)
            return module.irfftn(half, s=grid, threads=threads)[inner]

        candidates["pyFFTW"] = with_fftw
    with contextlib.suppress(ImportError):
        import ducc0  # type: ignore[import-not-found]

        def with_ducc(array: np.ndarray, grid: tuple[int, int, int]) -> Any:
            half = ducc0.fft.r2c(padded(array, grid), nthreads=threads)
            return ducc0.fft.c2r(half, lastsize=grid[2], inorm=2, nthreads=threads)[inner]

        candidates["ducc0"] = with_ducc
    array = np.random.default_rng(0).random(tuple(shape), np.float32)
    for name, run in candidates.items():
        cells = [name]
        for grid in grids:
            assert np.allclose(np.asarray(run(array, grid)), array, atol=1e-4), name
            best = math.inf
            for _ in range(5):
                begin = time.perf_counter()
                run(array, grid)
                best = min(best, time.perf_counter() - begin)
            cells.append(f"{best:.3f}")
        yield cells


def in_own_process(
    stage: str, name: str, path: Path, cache: Path, given: argparse.Namespace
) -> dict[str, Any] | str:
    """Measure one method, or say in a line why that failed."""
    count = str(given.threads)
    environment = os.environ | {
        "OMP_NUM_THREADS": count, "NUMBA_NUM_THREADS": count, "NUMBA_CACHE_DIR": str(cache),
    }  # fmt: skip
    found: dict[str, Any] = {}
    for what, more in (("time", {}), ("memory", {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)})):
        words = [sys.executable, __file__, "--worker", f"{what}:{stage}:{name}", "--data",
                 str(path), "--threads", count, "--device", given.device]  # fmt: skip
        try:
            done = subprocess.run(
                words, env=environment | more, capture_output=True, text=True,
                timeout=given.timeout,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"took more than {given.timeout:g} s"
        if done.returncode:
            return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        found |= json.loads(done.stdout.splitlines()[-1])
    voxels = found["voxels"]
    found["volumes"] = found["bytes"] / (4 * voxels)
    found["grid_volumes"] = found["bytes"] / (4 * max(voxels, math.prod(found["grid"] or (1,))))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, help="grid; 192 224 160 by default")
    parser.add_argument("--quick", action="store_true", help="96 96 96, and less patience")
    parser.add_argument("--methods", nargs="+", help="only these, as stage:method, or stages")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--timeout", type=float, help="seconds that a method may take")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.worker:
        what, stage, name = given.worker.split(":")
        run = measure if what == "time" else peak_memory
        try:
            found = run(stage, name, given.data, given.device)
        except Exception:
            traceback.print_exc()
            sys.exit(1)
        print(json.dumps(found))
        return

    shape = given.shape or (QUICK_SHAPE if given.quick else DEFAULT_SHAPE)
    given.timeout = given.timeout or (120 if given.quick else 1200)
    size = " x ".join(map(str, shape))
    print(f"{size} voxels, {given.threads} thread(s), {given.device}, torch {torch.__version__}\n")
    print("Fourier transforms: a real pair in float32, seconds\n")
    print(line(("library", "same grid", "padded by a quarter")))
    print("|---|---|---|")
    for row in backends(shape, given.threads):
        print(line(row), flush=True)
    compiling, missed, voxelwise = 0.0, [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head.pt"
        torch.save(head(shape), path)
        for stage, rows in METHODS.items():
            names = [
                name
                for name in rows
                if not given.methods or {stage, f"{stage}:{name}"} & set(given.methods)
            ]
            if names:
                print(f"\n{stage}\n")
                print(line(HEAD))
                print("|---" * len(HEAD) + "|")
            for name in names:
                outcome = in_own_process(stage, name, path, Path(folder) / "numba", given)
                if isinstance(outcome, str):
                    words = [f"`{name}`", outcome.replace("|", "\\|"), *[""] * (len(HEAD) - 2)]
                    print(line(words), flush=True)
                    continue
                found = outcome
                print(line(cells(stage, name, found)), flush=True)
                compiling += found["compile"]
                for limit in limits(stage, name, found):
                    if not limit.met:
                        missed.append(
                            f"{stage} {name}: {limit.what} {limit.value:.3g} > {limit.bound:g}"
                        )
                if (stage, name) in PER_VOXEL_LIMITS:
                    value, count = found["per_voxel"], len(ECHO_TIMES)
                    bound = PER_VOXEL_LIMITS[stage, name]
                    voxelwise.append(
                        (f"{stage} `{name}`", f"{value:.3g}", f"{value / count:.3g}",
                         f"{bound:g} ({bound / count:g})", "yes" if value <= bound else "no")
                    )  # fmt: skip
    if voxelwise:
        print(f"\nMicroseconds per voxel of the mask, {len(ECHO_TIMES)} echoes\n")
        print(line(("method", "us/voxel", "us/voxel/echo", "limit (per echo)", "met")))
        print("|---|---|---|---|---|")
        for entry in voxelwise:
            print(line(entry))
    kept = "met" if compiling <= COMPILE_LIMIT else "not met"
    print(f"\nCompiled for the first time: {compiling:.1f} s (limit {COMPILE_LIMIT:g} s: {kept}).")
    print("\nLimits not met:\n" if missed else "\nAll limits met.")
    for text in missed:
        print(f"- {text}")


if __name__ == "__main__":
    main()
