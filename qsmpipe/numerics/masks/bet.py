"""Brain extraction by a surface that grows until it meets the dark rim of the brain."""

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np
import torch
from annotated_types import Interval
from scipy import ndimage
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.masks.morphology import largest_core
from qsmpipe.numerics.masks.threshold import bias_field
from qsmpipe.numerics.parameters import Count, NotNegative, Positive, checked
from qsmpipe.numerics.smoothing import along_axes

SUBDIVISIONS = 4
"""Of the icosahedron: 2562 vertices, about 4 mm apart on a brain."""

CORNERS = 12
"""Of the icosahedron: the first vertices, which have five neighbours where others have six."""

ADULT = 70.0
"""Radius (mm) of a head that the lengths below are for; a smaller head shortens them."""

STEP, BLUR = 1.0, 0.9
"""Grid on which the magnitude is sampled, and the Gaussian that it is smoothed by before (mm): the
darkest voxel on the way inwards is to be tissue and not noise."""

DEEP, SHALLOW = 7.0, 3.0
"""How far inwards the surface looks for the darkest and for the brightest voxel (mm). Farther than
FSL's 7 mm (the paper's 20), dark ventricles and sulci make the surface collapse."""

EXPONENT = 0.275
"""Of ``fractional_intensity``, as in FSL's program: 0.5 then suits most brains."""

OPENING = 10.0
"""Half the width of the bridges (mm) by which a leak into the neck hangs on the brain."""

TIGHT, WIDE = 3.33, 10.0
"""Radii of curvature (mm): one this tight is smoothed away, one this wide is left."""

CHECK, SETTLED = 25, 0.02
"""The surface rests when its vertices move less than ``SETTLED`` mm in ``CHECK`` iterations."""

ATTEMPTS, FOLDED = 4, 1e-3
"""Runs, each twice as smooth as the one before, until the surface covers no more than this share
of its volume twice or inside out."""


class _Head(NamedTuple):
    """What the image says before a surface is grown."""

    low: float
    high: float
    rough: float
    median: float
    centre: np.ndarray
    radius: float


LEAST_ECHO_TIME = 0.004
"""In s. On a head at 3 T, the echo at 4.6 ms gave a brain of 1510 mL, that at 2.3 ms 1753 mL."""


@checked
def bet(
    magnitude: Tensor,
    zooms: Zooms,
    *,
    echo_times: Sequence[float] | None = None,
    fractional_intensity: Annotated[float, Interval(gt=0, lt=1)] = 0.5,
    smoothness: Positive = 1.0,
    bias_sigma: NotNegative = 30.0,
    iterations: Count = 1000,
) -> Tensor:
    """Extract the brain by a deformable surface [1]_.

    A sphere inside the head grows along its normals as long as the intensities below it are those
    of the brain, and is held smooth by its own curvature. A surface that folds is grown again,
    twice as smooth, and what leaked through the skull's base is cut off. All lengths are in mm
    along the voxel axes, so that neither anisotropy nor obliqueness matters; the head may touch
    the edge of the grid, where the surface stays inside. The bias field is divided out first:
    receive coils of a GRE scan shade it more than the T1-weighted scans that BET was made for.

    Parameters
    ----------
    magnitude : ([E,] X, Y, Z) real tensor
        Magnitude, any unit; one of several echoes is taken.
    zooms : tuple of float
        Voxel size (mm).
    echo_times : sequence of float, optional
        Echo times (s). The first echo at or after :data:`LEAST_ECHO_TIME` is taken (the last one
        where there is none): at shorter times muscle and marrow are as bright as brain, at later
        ones signal is lost near air. Without them, the first echo.
    fractional_intensity : float
        Where between dark and local bright (0 to 1) the brain ends; smaller gives a larger brain.
        It means what it does in FSL's ``bet``.
    smoothness : float
        Multiplies the force that smooths, above 1 for a rounder brain.
    bias_sigma : float
        Smoothness of the bias field (mm); 0 takes the magnitude as it is.
    iterations : int
        Steps at most; the surface mostly rests long before.

    Returns
    -------
    (X, Y, Z) bool tensor

    Raises
    ------
    ValueError
        If the magnitude is constant or ``fractional_intensity`` not between 0 and 1.

    References
    ----------
    .. [1] Smith, Hum Brain Mapp 17 (2002) 143, doi:10.1002/hbm.10062
    """
    if magnitude.ndim not in {3, 4}:
        msg = f"magnitude has shape {tuple(magnitude.shape)}, not ([E,] X, Y, Z)"
        raise ValueError(msg)
    echo = _echo(magnitude, echo_times)
    first = (magnitude if magnitude.ndim == 3 else magnitude[echo]).float().cpu()
    first = torch.nan_to_num(first, posinf=0.0, neginf=0.0)
    if first.max() <= first.min():
        msg = "the magnitude is constant: there is no brain to extract (wrong file or scaling?)"
        raise ValueError(msg)
    if bias_sigma > 0:
        first = first / bias_field(first, zooms, sigma=bias_sigma)
    volume = first.numpy()
    head = _look(volume, zooms)
    scale = min(1.0, head.radius / ADULT)
    sampled = _resample(first, zooms, STEP * scale)
    sphere, faces = icosphere(SUBDIVISIONS)
    rings = _rings(faces)
    for attempt in range(ATTEMPTS):
        surface = _grow(
            head.centre + head.radius / 2 * sphere,
            rings,
            sampled,
            head,
            scale=scale,
            fraction=fractional_intensity**EXPONENT,
            smoothness=smoothness * 2**attempt,
            iterations=iterations,
        )
        winding = winding_number(surface / zooms, faces, volume.shape)
        folded = np.count_nonzero((winding < 0) | (winding > 1))
        if folded <= FOLDED * np.count_nonzero(winding):
            break
    brain = largest_core(torch.from_numpy(winding > 0), zooms, radius=OPENING * scale)
    return brain.to(magnitude.device)


def _echo(magnitude: Tensor, echo_times: Sequence[float] | None) -> int:
    if magnitude.ndim == 3 or echo_times is None:
        return 0
    if len(echo_times) != len(magnitude):
        msg = f"magnitude has {len(magnitude)} echoes and echo_times {len(echo_times)}"
        raise ValueError(msg)
    late = (i for i, time in enumerate(echo_times) if time >= LEAST_ECHO_TIME)
    return next(late, len(magnitude) - 1)


def _look(volume: np.ndarray, zooms: Zooms) -> _Head:
    """Robust intensities, centre of gravity (mm) and radius (mm) of the head."""
    low, high = np.percentile(volume[volume > 0], [2, 98])
    if low >= high:  # a binary image: its zeros are the dark part
        low = 0.0
    rough = low + 0.1 * (high - low)
    bright = volume > rough
    weights = np.where(bright, np.minimum(volume, high) - low, 0).astype(np.float32)
    lines = [weights.sum(axis=others, dtype=np.float64) for others in ((1, 2), (0, 2), (0, 1))]
    places = [zoom * np.arange(n) for zoom, n in zip(zooms, volume.shape, strict=True)]
    centre = np.array([
        line @ place / line.sum() for line, place in zip(lines, places, strict=True)
    ])  # fmt: skip
    radius = (3 / (4 * math.pi) * np.count_nonzero(bright) * math.prod(zooms)) ** (1 / 3)
    x, y, z = ((place - middle) ** 2 for place, middle in zip(places, centre, strict=True))
    near = (x[:, None, None] + y[:, None] + z).astype(np.float32) < radius**2
    local = volume[near & bright]
    median = np.median(local[local < high]) if np.any(local < high) else high
    return _Head(float(low), float(high), float(rough), float(median), centre, float(radius))


def _resample(volume: Tensor, zooms: Zooms, step: float) -> tuple[np.ndarray, float]:
    """Smoothed volume on a grid of ``step`` mm with the same first voxel."""
    matrices = []
    for n, zoom in zip(volume.shape, zooms, strict=True):
        blurred = ndimage.gaussian_filter1d(np.eye(n), BLUR * step / STEP / zoom, mode="nearest")
        place = np.arange(int((n - 1) * zoom / step) + 1) * step / zoom
        below = np.minimum(place.astype(int), max(n - 2, 0))
        share = (place - below)[:, None]
        above = np.minimum(below + 1, n - 1)
        matrix = (1 - share) * blurred.T[below] + share * blurred.T[above]
        matrices.append(torch.from_numpy(matrix).to(volume))
    return along_axes(matrices, volume).contiguous().numpy(), step


def _rings(faces: np.ndarray) -> np.ndarray:
    """Neighbours of each vertex (7, N), counter-clockwise from outside, until the first again.

    The first :data:`CORNERS` vertices have five, and their first one three times.
    """
    following = {
        (int(face[i]), int(face[(i + 1) % 3])): int(face[(i + 2) % 3])
        for face in faces
        for i in range(3)
    }
    ring = dict(following.keys())
    rings = [np.array([ring[vertex] for vertex in range(len(ring))])]
    for _ in range(6):
        rings.append(np.array([following[pair] for pair in enumerate(rings[-1].tolist())]))
    rings[6] = rings[0]
    rings[5][:CORNERS] = rings[0][:CORNERS]
    return np.stack(rings)


def icosphere(subdivisions: int) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (N, 3) on the unit sphere and faces (F, 3), counter-clockwise from outside.

    >>> [len(part) for part in icosphere(4)]
    [2562, 5120]
    """
    golden = (1 + 5**0.5) / 2
    corners = [(0.0, a, b * golden) for a in (-1, 1) for b in (-1, 1)]
    vertices = np.array([np.roll(corner, turn) for turn in range(3) for corner in corners])
    # Faces are the triples of corners at the edge length of 2 from each other.
    near = np.isclose(np.linalg.norm(vertices[:, None] - vertices, axis=-1), 2)
    faces = np.array([
        (i, j, k)
        for i in range(12) for j in range(i) for k in range(j)
        if near[i, j] and near[j, k] and near[i, k]
    ])  # fmt: skip
    inwards = np.linalg.det(vertices[faces]) < 0
    faces[inwards] = faces[inwards][:, ::-1]
    for _ in range(subdivisions):
        sides = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2))
        edges, index = np.unique(sides, axis=0, return_inverse=True)
        ab, bc, ca = (len(vertices) + index.reshape(-1, 3)).T
        a, b, c = faces.T
        faces = np.concatenate([
            np.stack(triple, axis=1)
            for triple in ((a, ab, ca), (b, bc, ab), (c, ca, bc), (ab, bc, ca))
        ])  # fmt: skip
        vertices = np.concatenate([vertices, vertices[edges].mean(axis=1)])
    return vertices / np.linalg.norm(vertices, axis=1, keepdims=True), faces


def _grow(
    surface: np.ndarray,
    rings: np.ndarray,
    sampled: tuple[np.ndarray, float],
    head: _Head,
    *,
    scale: float,
    fraction: float,
    smoothness: float,
    iterations: int,
) -> np.ndarray:
    """Vertices (N, 3) in mm after the paper's forces: spacing, smoothness, intensity."""
    volume, step = sampled
    depths = np.arange(0, DEEP * scale + step / 2, step)
    shallow = np.count_nonzero(depths <= SHALLOW * scale)
    depths = (depths / step).astype(np.float32)
    tight, wide = 1 / (TIGHT * scale), 1 / (WIDE * scale)
    middle, slope = (tight + wide) / 2, 6 / (tight - wide)
    size = np.array(volume.shape, np.float32)[:, None]
    degree = np.full(surface.shape[0], 6, np.float32)
    degree[:CORNERS] = 5
    place = before = np.ascontiguousarray(surface.T / step, np.float32)
    for iteration in range(1, iterations + 1):
        sides = place.take(rings, axis=1, mode="clip") - place[:, None]
        x, y, z = sides
        normal = np.stack(
            [
                np.einsum("kn,kn->n", one[:-1], two[1:]) - np.einsum("kn,kn->n", two[:-1], one[1:])
                for one, two in ((y, z), (z, x), (x, y))
            ]
        )
        normal /= np.maximum(np.sqrt(np.einsum("in,in->n", normal, normal)), 1e-12)
        lengths = np.sqrt(np.einsum("ikn,ikn->kn", sides[:, :6], sides[:, :6]))
        length = (lengths.sum() - lengths[5, :CORNERS].sum()) / degree.sum() * step
        towards = sides[:, :6].sum(axis=1)
        towards[:, :CORNERS] -= sides[:, 5, :CORNERS]
        towards /= degree
        along = np.einsum("in,in->n", towards, normal)

        profile = _profile(volume, place, normal, depths)
        darkest = np.clip(profile.min(axis=0), head.low, head.median)
        brightest = np.clip(profile[:shallow].max(axis=0), head.rough, head.median)
        push = 2 * (darkest - head.low) / (brightest - head.low) - 2 * fraction
        curvature = 2 * np.abs(along) * (step / length**2)
        smoothing = smoothness * (1 + np.tanh(slope * (curvature - middle))) / 2

        # Half of what lies along the surface, and what the two forces ask for across it.
        outwards = (np.minimum(smoothing, 1) - 0.5) * along + 0.05 * (length / step) * push
        place = place + 0.5 * towards + outwards.astype(np.float32) * normal
        place = np.clip(place, np.float32(-0.5), size - np.float32(0.5))
        if iteration % CHECK == 0:
            if np.linalg.norm(place - before, axis=0).mean() * step < SETTLED * scale:
                break
            before = place
    return place.T.astype(float) * step


def _profile(
    volume: np.ndarray, points: np.ndarray, normal: np.ndarray, depths: np.ndarray
) -> np.ndarray:
    """Nearest voxels (D, N) below ``points`` (3, N) at ``depths``, in voxels."""
    index: np.ndarray | int = 0
    for n, point, side in zip(volume.shape, points + np.float32(0.5), normal, strict=True):
        place = point - depths[:, None] * side
        np.clip(place, 0, n - 1, out=place)
        index = index * n + place.astype(np.int32)
    return volume.ravel().take(index, mode="clip")


def winding_number(vertices: np.ndarray, faces: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """How many times a closed surface goes around each voxel's centre.

    Parameters
    ----------
    vertices : (N, 3) array
        In voxel indices.
    faces : (F, 3) array
        Counter-clockwise from outside.
    shape : tuple of int
        Grid.

    Returns
    -------
    (X, Y, Z) int array
        0 outside, 1 inside; anything else where the surface crosses itself.
    """
    a, b, c = (vertices[faces[:, corner]] for corner in range(3))
    area = _turn(a, b, c[:, :2])
    corners = np.stack([a, b, c])[..., :2]
    first = np.maximum(np.ceil(corners.min(axis=0)), 0).astype(int)
    last = np.minimum(np.floor(corners.max(axis=0)), np.array(shape[:2]) - 1).astype(int)
    size = np.maximum(last - first + 1, 0) * (area != 0)[:, None]
    # Every pair of a face and a column of voxels within its bounding box.
    count = size.prod(axis=1)
    face = np.repeat(np.arange(len(faces)), count)
    place = np.arange(face.size) - np.repeat(np.cumsum(count) - count, count)
    column = first[face] + np.stack(np.divmod(place, size[face, 1]), axis=1)
    # The columns stand slightly off their voxels' centres, so that none meets an edge or vertex.
    exact = column + np.array([3.1e-7, 2.3e-7])
    a, b, c = a[face], b[face], c[face]
    weights = np.stack([_turn(b, c, exact), _turn(c, a, exact), _turn(a, b, exact)])
    hit = np.all(weights > 0, axis=0) | np.all(weights < 0, axis=0)
    height = (weights * np.stack([a, b, c])[..., 2]).sum(axis=0)[hit] / area[face][hit]
    below = np.ceil(height).astype(int) - 1
    crossing = np.zeros((*shape[:2], shape[2] + 1), dtype=np.int16)
    x, y = column[hit].T
    # A crossing below the grid counts in the spare last place, which -1 means.
    place = np.clip(below, -1, shape[2] - 1)
    np.add.at(crossing, (x, y, place), np.sign(area[face][hit]).astype(np.int16))
    return crossing[..., :-1][..., ::-1].cumsum(axis=-1, dtype=np.int16)[..., ::-1]


def _turn(a: np.ndarray, b: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Twice the signed area of ``a``, ``b`` and ``point`` in the plane of the first two axes."""
    return (b[:, 0] - a[:, 0]) * (point[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (
        point[:, 0] - a[:, 0]
    )
