"""Small BIDS datasets of gradient echoes, and the means to break them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nb
import numpy as np

SHAPE = (24, 20, 18)
AFFINE = np.diag([6.0, 6.0, 6.0, 1.0])

SHARED = Path(__file__).parents[2] / "shared" / "data"
"""Real data, where they are."""

STORED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rad": lambda phase: phase.astype(np.float32),
    "siemens": lambda phase: (2 * np.round(phase / np.pi * 2047)).astype(np.int16),
    "unscaled": lambda phase: np.round(2048 + phase / np.pi * 2047).astype(np.int16),
    "milliradians": lambda phase: np.round(1000 * phase).astype(np.int16),
    "odd": lambda phase: (phase * 77 + 5).astype(np.float32),
}
"""How scanners store phase (rad)."""


def signal(
    echo_time: float, *, shape: tuple[int, ...] = SHAPE, seed: int = 0, hertz: float = 60.0
) -> np.ndarray:
    """Complex signal of a ball in noise: a field of some 60 Hz, an offset, R2* = 20/s."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    field = hertz * (x + y**2 - 0.6 * z * x)
    inside = x**2 + y**2 + z**2 < 0.7
    phase = 2 * np.pi * field * echo_time + 0.5 * y + 0.3
    random = np.random.default_rng(seed)
    noise = random.normal(size=shape) + 1j * random.normal(size=shape)
    return np.where(inside, 1000 * np.exp(-20 * echo_time + 1j * phase), 0) + 5 * noise


def save(values: np.ndarray, path: Path, affine: np.ndarray = AFFINE) -> Path:
    """Write an image in the type that its values have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nb.Nifti1Image(values, affine)
    image.set_sform(affine, code=1)
    image.header.set_xyzt_units("mm", "sec")
    image.to_filename(path)
    return path


def write(
    root: Path,
    *,
    prefix: str = "sub-01",
    suffix: str = "MEGRE",
    echo_times: tuple[float, ...] = (0.004, 0.009, 0.014),
    parts: tuple[str, ...] = ("mag", "phase"),
    stored: str = "rad",
    extension: str = ".nii.gz",
    echo_format: str = "echo-{}",
    shape: tuple[int, ...] = SHAPE,
    affine: np.ndarray = AFFINE,
    hertz: float = 60.0,
    change: Callable[[np.ndarray, int], np.ndarray] = lambda s, echo: s,
    **metadata: Any,
) -> Path:
    """Write one acquisition below ``root`` and give ``root`` back.

    ``change`` alters the complex signal of each echo (index from 0); ``metadata`` goes into every
    sidecar, None leaving a field out.
    """
    root.mkdir(parents=True, exist_ok=True)
    description = {"Name": "balls", "BIDSVersion": "1.11.1", "DatasetType": "raw"}
    (root / "dataset_description.json").write_text(json.dumps(description))
    (root / "README").write_text("Balls in noise, made for tests.\n" * 5)
    labels = dict(entity.split("-") for entity in prefix.split("_"))
    folder = root / f"sub-{labels['sub']}"
    folder = folder / f"ses-{labels['ses']}" / "anat" if "ses" in labels else folder / "anat"
    for i, echo_time in enumerate(echo_times):
        values = change(signal(echo_time, shape=shape, seed=i, hertz=hertz), i)
        images = {
            "mag": np.abs(values).astype(np.float32),
            "phase": STORED[stored](np.angle(values)),
            "real": np.round(values.real).astype(np.int16),
            "imag": np.round(values.imag).astype(np.int16),
        }
        for part in parts:
            echo = echo_format.format(i + 1) if len(echo_times) > 1 else ""
            name = "_".join(filter(None, [prefix, echo, f"part-{part}", suffix]))
            content = {
                "EchoTime": echo_time,
                "MagneticFieldStrength": 3,
                "Manufacturer": "Siemens",
                **(
                    {"Units": "rad" if stored == "rad" else "arbitrary"} if part == "phase" else {}
                ),
                **metadata,
            }
            save(images[part], folder / (name + extension), affine)
            kept = {key: value for key, value in content.items() if value is not None}
            (folder / f"{name}.json").write_text(json.dumps(kept))
    return root


def image(root: Path, echo: int = 2, part: str = "phase") -> Path:
    """Path of one image of the acquisition that :func:`write` makes by default."""
    return root / "sub-01" / "anat" / f"sub-01_echo-{echo}_part-{part}_MEGRE.nii.gz"


def edit(path: Path, **metadata: Any) -> None:
    """Change an image's sidecar; None removes a field."""
    sidecar = path.with_name(path.name.split(".")[0] + ".json")
    content = json.loads(sidecar.read_text()) | metadata
    sidecar.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def alter(path: Path, function: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replace an image's voxels."""
    old = nb.load(path)
    save(function(np.asanyarray(old.dataobj)).copy(), path, old.affine)


def state(root: Path) -> dict[str, str]:
    """Every file below ``root`` with its content's hash and time of change."""
    return {
        str(path.relative_to(root)): f"{hashlib.sha256(path.read_bytes()).hexdigest()} "
        f"{path.stat().st_mtime_ns}"
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
