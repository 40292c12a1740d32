"""The maps of one acquisition, as arrays: what figures and numbers are made from."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qsmpipe.maps import MAPS, Map


class Maps:
    """Maps on one grid, by their keys in :data:`qsmpipe.maps.MAPS`; None where there is none.

    Arrays are float, masks bool; ``magnitude`` and ``phase`` have their echoes first. A map of
    several methods (``compared``) is a dict, empty where there is none.

    Parameters
    ----------
    affine : (4, 4) array
        Voxel to scanner coordinates (mm).
    field_strength : float, optional
        B0 (T).
    echo_times : sequence of float
        One for each echo (s).
    reference_value : float, optional
        What was subtracted from the susceptibility (ppm).
    curves : mapping, optional
        Inversion to what its lambda was chosen from: the items of
        :class:`qsmpipe.numerics.inversion.common.Curve`.
    **maps : array or tensor, or a mapping of these by method
        (X, Y, Z), or (E, X, Y, Z) with all echoes; one echo may come as (X, Y, Z).

    Raises
    ------
    ValueError
        If the maps have different grids.
    TypeError
        If there is no map of that name.
    """

    def __init__(
        self,
        affine: np.ndarray,
        *,
        field_strength: float | None = None,
        echo_times: Sequence[float] = (),
        reference_value: float | None = None,
        curves: Mapping[str, Mapping[str, Any]] | None = None,
        **maps: Any,
    ) -> None:
        self.affine = affine
        self.field_strength = field_strength
        self.echo_times = echo_times
        self.reference_value = reference_value
        self.curves = curves or {}
        if unknown := set(maps) - set(MAPS):
            msg = f"there is no map {', '.join(sorted(unknown))}: see qsmpipe.maps.MAPS"
            raise TypeError(msg)
        self._maps = {
            key: {name: _array(value, row) for name, value in maps[key].items()}
            if row.by_method
            else _array(maps[key], row)
            for key, row in MAPS.items()
            if maps.get(key) is not None
        }
        shapes = {name: values.shape[-3:] for name, values in self._arrays().items()}
        if len(set(shapes.values())) > 1:
            msg = f"the maps of a report must share one grid: {shapes}"
            raise ValueError(msg)

    def __getattr__(self, key: str) -> Any:
        """Map of this key."""
        if key not in MAPS:
            msg = f"there is no map {key}"
            raise AttributeError(msg)
        return self._maps.get(key, {} if MAPS[key].by_method else None)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Grid size."""
        for values in self._arrays().values():
            x, y, z = values.shape[-3:]
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
    def head_mask(self) -> np.ndarray:
        """The brain mask, or the narrowest mask where there is none."""
        return self.mask if self.brain_mask is None else self.brain_mask

    @property
    def eroded(self) -> np.ndarray | None:
        """Part of the brain mask that has no susceptibility."""
        if self.brain_mask is None or self.qsm_mask is None:
            return None
        return self.brain_mask & ~self.qsm_mask

    def _arrays(self) -> dict[str, np.ndarray]:
        """All arrays, those of several methods by the method."""
        found: dict[str, np.ndarray] = {}
        for key, values in self._maps.items():
            found |= values if isinstance(values, dict) else {key: values}
        return found


def _array(values: Any, row: Map) -> np.ndarray:
    """``values`` as an array of the kind that a map has."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    values = np.asarray(values)
    if row.is_mask:
        return values > 0.5
    if row.echoes and values.ndim == 3:
        values = values[None]
    return values if values.dtype.kind == "f" else values.astype(np.float32)
