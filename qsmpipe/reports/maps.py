"""The maps of one acquisition, as arrays: what figures and numbers are made from."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Maps:
    """Maps on one grid; all but ``affine`` may be missing.

    Arrays or tensors are taken, arrays are kept. The ``magnitude`` and ``phase`` of one echo may
    come as (X, Y, Z).
    """

    affine: np.ndarray
    """Voxel to scanner coordinates (mm), (4, 4)."""
    magnitude: np.ndarray | None = None
    """(E, X, Y, Z), any unit."""
    phase: np.ndarray | None = None
    """(E, X, Y, Z), wrapped (rad)."""
    quality: np.ndarray | None = None
    """(X, Y, Z), 0 to 1."""
    brain_mask: np.ndarray | None = None
    """(X, Y, Z) bool."""
    field: np.ndarray | None = None
    """Total field (ppm)."""
    noise: np.ndarray | None = None
    """Standard deviation of the total field (ppm)."""
    local_field: np.ndarray | None = None
    """Field of the sources inside ``qsm_mask`` (ppm)."""
    qsm_mask: np.ndarray | None = None
    """(X, Y, Z) bool, where ``chi`` is trusted."""
    chi: np.ndarray | None = None
    """Susceptibility (ppm)."""
    compared: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Susceptibility (ppm) by each of several inversions, by name."""
    deviation: np.ndarray | None = None
    """Standard deviation of the susceptibility (ppm)."""
    median: np.ndarray | None = None
    """Median of them (ppm)."""
    r2star: np.ndarray | None = None
    """(1/s)."""
    swi: np.ndarray | None = None
    """Susceptibility-weighted image, any unit."""
    minip: np.ndarray | None = None
    """Its minimum over a slab of slices."""
    cosmos: np.ndarray | None = None
    """Susceptibility (ppm) by several orientations."""
    field_strength: float | None = None
    """(T)."""
    echo_times: Sequence[float] = ()
    """(s)."""
    reference_value: float | None = None
    """What was subtracted from the susceptibility (ppm)."""
    curves: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Inversion to what its lambda was chosen from: the items of
    :class:`qsmpipe.numerics.inversion.common.Curve`."""

    def __post_init__(self) -> None:
        for name in ("magnitude", "phase"):
            object.__setattr__(self, name, _echoes(getattr(self, name)))
        for name in ("brain_mask", "qsm_mask"):
            object.__setattr__(self, name, _mask(getattr(self, name)))
        for name in (
            "quality", "field", "noise", "local_field", "chi", "median", "deviation", "r2star",
            "swi", "minip", "cosmos",
        ):  # fmt: skip
            object.__setattr__(self, name, _array(getattr(self, name)))
        compared = {name: np.asarray(_array(chi)) for name, chi in self.compared.items()}
        object.__setattr__(self, "compared", compared)
        shapes = {name: chi.shape for name, chi in compared.items()} | {
            item.name: value.shape[-3:]
            for item in dataclasses.fields(self)
            if item.name != "affine" and isinstance(value := getattr(self, item.name), np.ndarray)
        }
        if len(set(shapes.values())) > 1:
            msg = f"the maps of a report must share one grid: {shapes}"
            raise ValueError(msg)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Grid size."""
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name != "affine" and isinstance(value, np.ndarray):
                x, y, z = value.shape[-3:]
                return x, y, z
        msg = "there is no map to report on"
        raise ValueError(msg)

    @property
    def zooms(self) -> np.ndarray:
        """Voxel size along each voxel axis (mm)."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def mask(self) -> np.ndarray:
        """The narrowest mask there is: of the susceptibility, of the brain, or everything."""
        for mask in (self.qsm_mask, self.brain_mask):
            if mask is not None and mask.any():
                return mask
        return np.ones(self.shape, bool)

    @property
    def eroded(self) -> np.ndarray | None:
        """Part of the brain mask that has no susceptibility."""
        if self.brain_mask is None or self.qsm_mask is None:
            return None
        return self.brain_mask & ~self.qsm_mask


def _array(values: Any) -> np.ndarray | None:
    if values is None:
        return None
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    values = np.asarray(values)
    return values if values.dtype.kind == "f" else values.astype(np.float32)


def _echoes(values: Any) -> np.ndarray | None:
    array = _array(values)
    return array[None] if array is not None and array.ndim == 3 else array


def _mask(values: Any) -> np.ndarray | None:
    array = _array(values)
    return None if array is None else array > 0.5
