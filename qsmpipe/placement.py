"""Where an image lies in the scanner: which of its header's transforms tells it.

A NIfTI header holds two transforms from voxel to world coordinates, and a code for each that says
which world is meant. B0 lies along the third axis of the scanner's world alone (code 1): an image
that was aligned to a template keeps its voxels, and its sform turns them into another world.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SCANNER = 1
"""Code of the scanner's world."""

WORLDS = {
    0: "unknown",
    SCANNER: "scanner",
    2: "aligned to another image",
    3: "Talairach",
    4: "MNI template",
    5: "another template",
}
"""Codes of NIfTI-1 in words."""

MAX_ANGLE = 1.0
"""Two transforms whose rotations differ by more are not the same (degrees)."""

MAX_SIZE_CHANGE = 0.01
"""Voxel sizes that differ by more than this share are not the same."""

SHEAR = 1e-3
"""Cosine between two voxel axes from which they are not at right angles."""

GIVE_DIRECTION = "give the direction of B0 in voxel axes (--b0-direction X Y Z)"


class Transform(NamedTuple):
    """One way from voxel to world coordinates."""

    name: str
    """qform, sform or, where the header has neither, pixdim."""
    code: int
    affine: np.ndarray
    """4 x 4 (mm)."""

    def __str__(self) -> str:
        return f"{self.name} (code {self.code}, {WORLDS.get(self.code, 'unknown')})"

    @property
    def zooms(self) -> np.ndarray:
        """Voxel size (mm)."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def fault(self) -> str:
        """Why the transform has no rotation and voxel size; "" where it has."""
        if not np.isfinite(self.affine).all():
            return "holds NaN or infinite numbers"
        if not self.zooms.min() > 0:
            return "has an axis without length"
        turn = self.affine[:3, :3] / self.zooms
        if abs(np.linalg.det(turn)) < SHEAR:
            return "has two axes in one line, or three in one plane"
        if not np.allclose(turn.T @ turn, np.eye(3), atol=SHEAR):
            return "has voxel axes that are not orthogonal (shear)"
        return ""


@dataclass(frozen=True)
class Place:
    """The transform that is used, and what speaks against it."""

    transform: Transform
    error: str = ""
    """Why the image has no rotation and voxel size; "" where it has."""
    contradiction: str = ""
    """Why the direction of B0 is uncertain although the scanner's transform is there."""
    remarks: tuple[str, ...] = ()
    """What the user should know of the other transform, or of the lack of one."""

    @property
    def affine(self) -> np.ndarray:
        """Voxel to world coordinates (mm), 4 x 4."""
        return self.transform.affine


def place(transforms: Sequence[Transform], pixdim: Sequence[float]) -> Place:
    """Choose the transform that tells where the scanner's axes lie.

    The transform whose code says scanner wins; of two, the sform. Without one, the lower code
    wins: alignment to another image of the subject turns less than alignment to a template. A
    transform without rotation (sheared, singular, NaN) is used only where there is no other.

    Parameters
    ----------
    transforms
        Those whose code is above 0; where there is none, the one made of the voxel size alone,
        with code 0.
    pixdim
        Voxel size of the header (mm).
    """
    chosen, *others = sorted(
        transforms,
        key=lambda t: (bool(t.fault), t.code != SCANNER, t.code, t.name != "sform"),
    )
    if chosen.fault:
        return Place(
            chosen,
            error=f"its {chosen} {chosen.fault}, so that it has no rotation to take the B0 "
            "direction from: give the image on the grid that it was acquired on, or convert it "
            "again from DICOM",
        )
    error = contradiction = ""
    remarks = []
    if chosen.name == "sform" and _sizes_differ(chosen.zooms, pixdim):
        error = (
            f"its voxels measure {_sizes(pixdim)} mm by pixdim, but {_sizes(chosen.zooms)} mm by "
            f"its {chosen}: registration that scales leaves such an sform; write the right size "
            "into both, or convert the image again from DICOM"
        )
    for other in others:
        if other.fault:
            remarks.append(f"its {other} {other.fault}: its {chosen} is used")
        elif chosen.code == other.code == SCANNER and _b0_angle(chosen, other) > MAX_ANGLE:
            contradiction = (
                f"its qform and its sform both say scanner (code 1), and differ: "
                f"{_compare(chosen, other)}: set the code of the wrong one to 0, or "
                f"{GIVE_DIRECTION}"
            )
        elif (difference := _compare(chosen, other)) and chosen.code == SCANNER:
            remarks.append(
                f"its qform and its sform differ: {difference}: its {chosen} is used; if the "
                f"other is the scanner's, {GIVE_DIRECTION}"
            )
    if chosen.code == 0:
        remarks.append(
            "neither qform nor sform: where the head lay in the scanner is unknown, and B0 is "
            f"assumed along the third axis; convert it again from DICOM, or {GIVE_DIRECTION}"
        )
    elif chosen.code != SCANNER:
        against = "".join(f" ({_compare(chosen, other)})" for other in others if not other.fault)
        remarks.append(
            f"no transform says scanner (code 1): B0 along {_direction(chosen)} comes from its "
            f"{chosen}{against}, and is wrong if the image was turned; {GIVE_DIRECTION}, or "
            "convert it again from DICOM"
        )
    return Place(chosen, error, contradiction, tuple(remarks))


def same_place(one: Sequence[Transform], other: Sequence[Transform]) -> bool:
    """Whether images of one size lie on one grid, by any transform that both have (1e-3 mm).

    Tools that make a mask keep one of the image's transforms, and give it another code.
    """
    return any(np.allclose(a.affine, b.affine, atol=1e-3) for a in one for b in other)


def b0_direction(affine: np.ndarray) -> tuple[float, float, float]:
    """Give the unit vector along B0 (scanner z) in voxel axes, from the affine's rotation.

    The columns are normalised first: with the voxel size left in, an oblique anisotropic grid
    would get a wrong direction.

    Parameters
    ----------
    affine : (4, 4) array
        Voxel to scanner coordinates.

    Raises
    ------
    ValueError
        If the voxel axes are not orthogonal (shear), where no rotation exists.

    Examples
    --------
    >>> b0_direction(np.diag([-1.0, 1.0, 2.0, 1.0]))
    (0.0, 0.0, 1.0)
    """
    x, y, z = (float(value) + 0.0 for value in rotation_of(affine)[2])
    return x, y, z


def rotation_of(affine: np.ndarray) -> np.ndarray:
    """Give the turn from voxel to scanner axes, (3, 3), from an affine.

    Raises
    ------
    ValueError
        If the voxel axes are not orthogonal (shear), where no rotation exists.
    """
    if fault := Transform("affine", 0, affine).fault:
        msg = (
            f"the affine {fault}, so that it has no rotation to take the B0 direction from: give "
            "the image on the grid that it was acquired on"
        )
        raise ValueError(msg)
    return affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)


def _compare(one: Transform, other: Transform) -> str:
    """Say in which way two transforms differ; "" where they agree."""
    turn = rotation_of(one.affine).T @ rotation_of(other.affine)
    said = []
    if np.linalg.det(turn) < 0:
        said.append("one is the mirror image of the other")
    else:
        angle = math.degrees(math.acos(min(1.0, max(-1.0, (np.trace(turn) - 1) / 2))))
        if angle > MAX_ANGLE:
            said.append(f"they are turned by {angle:.1f} degrees")
    if said:
        said.append(
            f"B0 lies along {_direction(one)} by the {one}, along {_direction(other)} by the "
            f"{other}"
        )
    if _sizes_differ(one.zooms, other.zooms):
        said.append(
            f"voxels measure {_sizes(one.zooms)} mm by the {one}, {_sizes(other.zooms)} mm by the "
            f"{other}"
        )
    return ", ".join(said)


def _b0_angle(one: Transform, other: Transform) -> float:
    """Angle between the axes of B0 (degrees); a dipole does not tell the two ends apart."""
    cosine = abs(float(np.dot(b0_direction(one.affine), b0_direction(other.affine))))
    return math.degrees(math.acos(min(1.0, cosine)))


def _sizes_differ(one: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray) -> bool:
    return not np.allclose(one, other, rtol=MAX_SIZE_CHANGE, atol=0)


def _sizes(sizes: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{size:.4g}" for size in sizes)


def _direction(transform: Transform) -> str:
    # 0 is added for the sign of -0.00
    return "(" + ", ".join(f"{round(b, 2) + 0:.2f}" for b in b0_direction(transform.affine)) + ")"
