"""Brain extraction by a surface that grows until it meets the dark rim of the brain."""

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np
import torch
from annotated_types import Interval
from scipy import ndimage, sparse
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.masks.morphology import largest_core
from qsmpipe.numerics.masks.threshold import bias_field
from qsmpipe.numerics.parameters import Count, NotNegative, Positive, checked

SUBDIVISIONS = 4
"""Of the icosahedron: 2562 vertices, about 4 mm apart on a brain."""

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


class _Mesh(NamedTuple):
    """Topology of the surface: it does not change while the surface grows."""

    faces: np.ndarray
    edges: np.ndarray
    neighbours: sparse.csr_array
    incidence: sparse.csr_array


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
    sampled = _resample(volume, zooms, STEP * scale)
    mesh, sphere = _mesh(SUBDIVISIONS)
    for attempt in range(ATTEMPTS):
        surface = _grow(
            head.centre + head.radius / 2 * sphere,
            mesh,
            sampled,
            head,
            scale=scale,
            fraction=fractional_intensity**EXPONENT,
            smoothness=smoothness * 2**attempt,
            iterations=iterations,
        )
        winding = winding_number(surface / zooms, mesh.faces, volume.shape)
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
    inside = np.argwhere(volume > rough)
    weights = np.minimum(volume[volume > rough], high) - low
    centre = weights @ inside / weights.sum() * zooms
    radius = (3 / (4 * math.pi) * len(inside) * math.prod(zooms)) ** (1 / 3)
    near = np.sum((inside * zooms - centre) ** 2, axis=1) < radius**2
    local = volume[tuple(inside[near].T)]
    median = np.median(local[local < high]) if np.any(local < high) else high
    return _Head(float(low), float(high), float(rough), float(median), centre, float(radius))


def _resample(volume: np.ndarray, zooms: Zooms, step: float) -> tuple[np.ndarray, float]:
    """Smoothed volume on a grid of ``step`` mm with the same first voxel."""
    sigma = [BLUR * step / STEP / zoom for zoom in zooms]
    shape = [int((n - 1) * zoom / step) + 1 for n, zoom in zip(volume.shape, zooms, strict=True)]
    return ndimage.affine_transform(
        ndimage.gaussian_filter(volume, sigma, mode="nearest"),
        step / np.asarray(zooms),
        output_shape=tuple(shape),
        order=1,
        mode="nearest",
    ), step


def _mesh(subdivisions: int) -> tuple[_Mesh, np.ndarray]:
    """Icosphere of radius 1: its topology and its vertices (N, 3), faces turned outwards."""
    vertices, faces = icosphere(subdivisions)
    edges = np.unique(np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)), axis=0)
    both = np.concatenate([edges, edges[:, ::-1]])
    count = len(vertices)
    degree = np.bincount(both[:, 0], minlength=count)
    neighbours = sparse.csr_array(
        (1 / degree[both[:, 0]], (both[:, 0], both[:, 1])), shape=(count, count)
    )
    corner = np.repeat(np.arange(len(faces)), 3)
    incidence = sparse.csr_array(
        (np.ones(corner.size), (faces.ravel(), corner)), shape=(count, len(faces))
    )
    return _Mesh(faces, edges, neighbours, incidence), vertices


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
    mesh: _Mesh,
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
    edge = (np.array(volume.shape) - 1) * step
    depths = np.arange(0, DEEP * scale + step / 2, step)
    shallow = np.count_nonzero(depths <= SHALLOW * scale)
    tight, wide = 1 / (TIGHT * scale), 1 / (WIDE * scale)
    middle, slope = (tight + wide) / 2, 6 / (tight - wide)
    before = surface
    for iteration in range(1, iterations + 1):
        a, b, c = (surface[mesh.faces[:, corner]] for corner in range(3))
        normal = mesh.incidence @ np.cross(b - a, c - a)
        normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
        length = np.linalg.norm(np.diff(surface[mesh.edges], axis=1), axis=-1).mean()

        towards = mesh.neighbours @ surface - surface
        along = np.sum(towards * normal, axis=1, keepdims=True)
        tangent = towards - along * normal
        curvature = 2 * np.abs(along) / length**2
        smoothing = (1 + np.tanh(slope * (curvature - middle))) / 2

        profile = _profile(volume, surface / step, normal / step, depths)
        darkest = np.clip(profile.min(axis=1), head.low, head.median)
        brightest = np.clip(profile[:, :shallow].max(axis=1), head.rough, head.median)
        local = head.low + fraction * (brightest - head.low)
        push = 2 * (darkest - local) / (brightest - head.low)

        surface = (
            surface
            + 0.5 * tangent
            + np.minimum(smoothness * smoothing, 1) * along * normal
            + 0.05 * length * push[:, None] * normal
        )
        surface = np.clip(surface, -step / 2, edge + step / 2)
        if iteration % CHECK == 0:
            if np.linalg.norm(surface - before, axis=1).mean() < SETTLED * scale:
                break
            before = surface
    return surface


def _profile(
    volume: np.ndarray, points: np.ndarray, normal: np.ndarray, depths: np.ndarray
) -> np.ndarray:
    """Nearest voxels (N, D) below ``points`` (N, 3) at ``depths``."""
    index = np.zeros((len(points), len(depths)), dtype=np.int32)
    for axis, n in enumerate(volume.shape):
        place = points[:, axis, None] - depths * normal[:, axis, None] + 0.5
        index *= n
        index += np.clip(place, 0, n - 1).astype(np.int32)
    return volume.ravel()[index]


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
