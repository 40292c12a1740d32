"""Which transform of a header tells where the scanner's axes lie, and what is kept of both."""

import gzip
import math
import re
import struct
from pathlib import Path

import nibabel as nb
import numpy as np
import pytest
import torch
from datasets import write

from qsmpipe import bids, images
from qsmpipe.checks import Examination, examine, examine_mask
from qsmpipe.derivatives import sidecar
from qsmpipe.interfaces.phase import Prepare

Matrix = np.ndarray


def turned(degrees: float, axis: int = 0) -> Matrix:
    angle = math.radians(degrees)
    matrix = np.eye(4)
    one, two = (axis + 1) % 3, (axis + 2) % 3
    matrix[[one, one, two, two], [one, two, one, two]] = (
        math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle),
    )  # fmt: skip
    return matrix


def oblique(*, flip: bool = False) -> Matrix:
    """Slices tilted by 20 degrees, anisotropic, off the centre; left-handed with ``flip``."""
    matrix = turned(20) @ turned(10, 2) @ np.diag([-5.0 if flip else 5.0, 5.2, 6.0, 1.0])
    matrix[:3, 3] = 40, -55, 30
    return matrix


SHEARED = oblique()
SHEARED[:3, 0] += 0.3 * SHEARED[:3, 1]
SINGULAR = oblique()
SINGULAR[:3, 0] = 0
FLAT = oblique()
FLAT[:3, 0] = FLAT[:3, 1]
UNKNOWN = oblique()
UNKNOWN[1, 2] = np.nan


def put(
    path: Path,
    *,
    qform: tuple[Matrix, int] | None = None,
    sform: tuple[Matrix, int] | None = None,
    unit: str = "mm",
    fields: dict[str, object] | None = None,
) -> None:
    """Give an image other transforms; its voxels stay."""
    old = nb.load(path)
    header = nb.Nifti1Header()
    header.set_data_dtype(old.get_data_dtype())
    header.set_xyzt_units(unit, "sec")
    header["pixdim"][1:4] = np.linalg.norm((qform or sform or (np.eye(4), 0))[0][:3, :3], axis=0)
    if qform:
        header.set_qform(qform[0], code=qform[1])
    if sform:
        header.set_sform(sform[0], code=sform[1])
    for name, value in (fields or {}).items():
        header[name] = value
    nb.Nifti1Image(np.asanyarray(old.dataobj).copy(), None, header).to_filename(path)


def look(root: Path, b0_direction: tuple[float, ...] = (), **transforms: object) -> Examination:
    for path in root.rglob("*.nii.gz"):
        put(path, **transforms)
    (acquisition,) = bids.find(root)
    return examine(acquisition, b0_direction=b0_direction)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "raw", suffix="T2starw", echo_times=(0.012,), shape=(23, 20, 17))


def b0_of(matrix: Matrix) -> np.ndarray:
    """How the scanner's z grows per mm along each voxel axis."""
    step = np.linalg.norm(matrix[:3, :3], axis=0)
    return matrix[2, :3] / step


Q, FLIPPED = oblique(), oblique(flip=True)
TEMPLATE = turned(35) @ Q
OFF = math.degrees(math.acos(b0_of(Q) @ [0, 0.6, 0.8]))

CHOSEN: dict[str, tuple[dict, Matrix, str, list[str]]] = {
    "template beside scanner": (
        {"qform": (Q, 1), "sform": (TEMPLATE, 4)}, Q, "qform (code 1, scanner)",
        ["turned by 35.0 degrees", "(0.06, 0.34, 0.94)", "(0.14, 0.81, 0.57)", "MNI template",
         "--b0-direction"],
    ),
    "aligned beside scanner": (
        {"qform": (Q, 1), "sform": (TEMPLATE, 2)}, Q, "qform (code 1, scanner)",
        ["turned by 35.0 degrees", "aligned to another image"],
    ),
    "left-handed, qfac -1": (
        {"qform": (FLIPPED, 1), "sform": (turned(35) @ FLIPPED, 4)}, FLIPPED,
        "qform (code 1, scanner)", ["turned by 35.0 degrees"],
    ),
    "turned about B0": (
        {"qform": (Q, 1), "sform": (turned(35, 2) @ Q, 4)}, Q, "qform (code 1, scanner)",
        ["turned by 35.0 degrees", "(0.06, 0.34, 0.94)"],
    ),
    "mirrored": (
        {"qform": (Q, 1), "sform": (FLIPPED, 4)}, Q, "qform (code 1, scanner)",
        ["mirror image"],
    ),
    "scaled as a template is": (
        {"qform": (Q, 1), "sform": (np.diag([1.2, 1.2, 1.2, 1]) @ Q, 4)}, Q,
        "qform (code 1, scanner)", ["5 x 5.2 x 6 mm", "6 x 6.24 x 7.2 mm"],
    ),
    "scanner's sform": (
        {"qform": (TEMPLATE, 2), "sform": (Q, 1)}, Q, "sform (code 1, scanner)",
        ["turned by 35.0 degrees"],
    ),
    "sheared sform": (
        {"qform": (Q, 1), "sform": (SHEARED, 1)}, Q, "qform (code 1, scanner)",
        ["its sform (code 1, scanner) has voxel axes that are not orthogonal (shear)"],
    ),
    "singular sform": (
        {"qform": (Q, 1), "sform": (SINGULAR, 1)}, Q, "qform (code 1, scanner)",
        ["has an axis without length"],
    ),
    "flat sform": (
        {"qform": (Q, 1), "sform": (FLAT, 1)}, Q, "qform (code 1, scanner)", ["in one plane"],
    ),
    "sform of NaN": (
        {"qform": (Q, 1), "sform": (UNKNOWN, 1)}, Q, "qform (code 1, scanner)", ["NaN"],
    ),
    "only a template's": (
        {"sform": (TEMPLATE, 4)}, TEMPLATE, "sform (code 4, MNI template)",
        ["no transform says scanner", "(0.14, 0.81, 0.57)", "--b0-direction"],
    ),
    "only aligned": (
        {"qform": (Q, 2)}, Q, "qform (code 2, aligned to another image)",
        ["no transform says scanner", "--b0-direction"],
    ),
    "aligned beside a template's": (
        {"qform": (Q, 2), "sform": (TEMPLATE, 4)}, Q, "qform (code 2, aligned to another image)",
        ["no transform says scanner", "turned by 35.0 degrees"],
    ),
    "agreeing": ({"qform": (Q, 1), "sform": (Q, 1)}, Q, "sform (code 1, scanner)", []),
    "agreeing to half a degree": (
        {"qform": (turned(0.5) @ Q, 1), "sform": (Q, 1)}, Q, "sform (code 1, scanner)", [],
    ),
    "agreeing, of two codes": (
        {"qform": (Q, 1), "sform": (Q, 4)}, Q, "qform (code 1, scanner)", [],
    ),
    "qform alone": ({"qform": (FLIPPED, 1)}, FLIPPED, "qform (code 1, scanner)", []),
    "permuted": (
        {"sform": (Q[:, [2, 0, 1, 3]], 1)}, Q[:, [2, 0, 1, 3]], "sform (code 1, scanner)", [],
    ),
    "none": (
        {}, np.eye(4), "pixdim (code 0, unknown)", ["neither qform nor sform", "--b0-direction"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("transforms", "expected", "source", "words"), CHOSEN.values(), ids=CHOSEN
)
def test_the_scanners_transform_tells_b0_and_the_voxel_size(
    transforms: dict, expected: Matrix, source: str, words: list[str], root: Path
) -> None:
    found = look(root, **transforms)
    assert not found.errors
    assert found.b0_direction == pytest.approx(b0_of(expected), abs=1e-5)
    assert found.zooms == pytest.approx(np.linalg.norm(expected[:3, :3], axis=0), rel=1e-5)
    assert found.b0_source == source
    told = [f.message for f in found.warnings if f.check == "geometry"]
    told = [message for message in told if "small-animal" not in message]
    assert bool(told) == bool(words)
    assert all(any(word in message for message in told) for word in words), told
    path = found.acquisition.phase[0]
    assert images.b0_direction_of(path) == pytest.approx(found.b0_direction)
    assert images.zooms_of(path) == pytest.approx(found.zooms)
    content = sidecar(found, "chi")
    assert content["B0DirectionSource"] == found.summary()["B0 direction by"] == source


SIZES = [1, 5, 5.2, 6, 1, 1, 1, 1]
REFUSED: dict[str, tuple[dict, list[str]]] = {
    "two scanners": (
        {"qform": (Q, 1), "sform": (TEMPLATE, 1)},
        ["both say scanner (code 1)", "turned by 35.0 degrees", "(0.14, 0.81, 0.57) by the sform",
         "(0.06, 0.34, 0.94) by the qform", "--b0-direction"],
    ),
    "sheared": ({"sform": (SHEARED, 1)}, ["not orthogonal (shear)", "acquired on"]),
    "NaN": ({"sform": (UNKNOWN, 1)}, ["its sform (code 1, scanner) holds NaN"]),
    "scaled": (
        {"sform": (np.diag([1.2, 1.2, 1.2, 1]) @ Q, 4), "fields": {"pixdim": SIZES}},
        ["5 x 5.2 x 6 mm by pixdim", "6 x 6.24 x 7.2 mm by its sform (code 4"],
    ),
    "micron that are mm": (
        {"qform": (Q, 1), "unit": "micron"}, ["lengths in micron", "0.005 x 0.0052", "xyzt_units"],
    ),
    "metres that are mm": (
        {"qform": (Q, 1), "unit": "meter"}, ["lengths in m)", "5e+03 x", "xyzt_units"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("transforms", "words"), REFUSED.values(), ids=REFUSED)
def test_a_header_without_a_rotation_is_refused(
    transforms: dict, words: list[str], root: Path
) -> None:
    found = look(root, **transforms)
    told = [f.message for f in found.errors]
    assert len(told) == 1
    assert all(word in told[0] for word in words), told
    assert re.match(r"sub-01/anat/sub-01_part-\w+_T2starw.nii.gz(: | and 1 more: )", told[0])


def test_a_voxel_size_of_0_is_not_taken_as_1(root: Path) -> None:
    look(root, qform=(Q, 1))
    for path in root.rglob("*.nii.gz"):
        stored = bytearray(gzip.decompress(path.read_bytes()))
        struct.pack_into("<f", stored, 84, 0.0)  # the second of pixdim's sizes
        path.write_bytes(gzip.compress(stored))
    (acquisition,) = bids.find(root)
    (told,) = (f.message for f in examine(acquisition).errors)
    assert "its qform (code 1, scanner) has an axis without length" in told
    with pytest.raises(ValueError, match="axis without length"):
        images.zooms_of(acquisition.phase[0])


def test_two_scanners_are_refused_in_library_use_too(root: Path) -> None:
    path = next(root.rglob("*phase*.nii.gz"))
    put(path, qform=(Q, 1), sform=(TEMPLATE, 1))
    with pytest.raises(ValueError, match="both say scanner"):
        images.b0_direction_of(path)
    with pytest.raises(ValueError, match="both say scanner"):
        Prepare(phase=[str(path)]).run()


@pytest.mark.parametrize(
    ("transforms", "words"),
    [
        ({"qform": (Q, 1), "sform": (TEMPLATE, 1)}, []),
        ({"sform": (TEMPLATE, 4)}, []),
        ({}, []),
        (
            {"sform": (Q, 1)},
            ["(0.00, 0.60, 0.80), as --b0-direction says", f"{OFF:.1f} degrees off"],
        ),
    ],
    ids=["contradiction", "template", "none", "scanner"],
)
def test_the_users_direction_wins(
    transforms: dict, words: list[str], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = look(root, b0_direction=(0, 0.6, 0.8), **transforms)
    assert not found.errors
    assert (found.b0_direction, found.b0_source) == ((0, 0.6, 0.8), "--b0-direction")
    told = [f.message for f in found.warnings if "--b0-direction" in f.message]
    assert len(told) == bool(words)
    assert all(word in told[0] for word in words)
    monkeypatch.chdir(tmp_path)
    prepare = Prepare(phase=[str(found.acquisition.phase[0])], b0_direction=[0, 0.6, 0.8])
    assert prepare.run().outputs.b0_direction == [0, 0.6, 0.8]


def test_a_step_tells_that_the_direction_is_a_templates(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = next(root.rglob("*phase*.nii.gz"))
    put(path, sform=(TEMPLATE, 4))
    monkeypatch.chdir(tmp_path)
    outputs = Prepare(phase=[str(path)], phase_slope=1.0).run().outputs
    assert outputs.b0_direction == pytest.approx(b0_of(TEMPLATE), abs=1e-5)
    assert any("no transform says scanner" in text for text in outputs.step["warnings"])


# --- what is written -------------------------------------------------------------------------


@pytest.mark.parametrize("transforms", [row[0] for row in CHOSEN.values()], ids=CHOSEN)
def test_a_map_keeps_both_transforms_as_they_came(
    transforms: dict, root: Path, tmp_path: Path
) -> None:
    like = next(root.rglob("*phase*.nii.gz"))
    put(like, unit="micron", **transforms)
    written = images.save(torch.ones(3, 23, 20, 17), tmp_path / "map.nii.gz", like=like)
    again = images.save(torch.ones(23, 20, 17), tmp_path / "again.nii.gz", like=written)
    first, *others = (nb.load(path) for path in (like, written, again))
    for other in others:
        for name in ("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
                     "qoffset_x", "srow_x", "srow_y", "srow_z"):  # fmt: skip
            np.testing.assert_array_equal(first.header[name], other.header[name])
        np.testing.assert_array_equal(first.header["pixdim"][:4], other.header["pixdim"][:4])
        assert other.header.get_xyzt_units() == ("micron", "sec")
        np.testing.assert_array_equal(first.affine, other.affine)
    assert images.same_grid(like, again)


@pytest.mark.parametrize(("unit", "length"), [("micron", 1000.0), ("meter", 0.001)])
def test_lengths_are_read_in_the_headers_unit(unit: str, length: float, root: Path) -> None:
    scaled = np.diag([length, length, length, 1.0]) @ Q
    found = look(root, qform=(scaled, 1), sform=(scaled, 1), unit=unit)
    assert not found.errors
    assert found.zooms == pytest.approx((5, 5.2, 6), rel=1e-5)
    assert found.b0_direction == pytest.approx(b0_of(Q), abs=1e-5)
    path = found.acquisition.phase[0]
    np.testing.assert_allclose(images.affine_of(path), Q, atol=1e-4)
    np.testing.assert_allclose(images.read(path)[1], Q, atol=1e-4)
    (told,) = (f.message for f in found.findings if "lengths" in f.message)
    assert f"lengths in {'m' if unit == 'meter' else unit}: voxels of 5 x 5.2 x 6 mm" in told


# --- other images of the same grid -----------------------------------------------------------

MASKS: dict[str, tuple[dict, bool]] = {
    "as nibabel writes it": ({"sform": (TEMPLATE, 2)}, True),
    "as ITK writes it": ({"qform": (TEMPLATE, 1), "sform": (TEMPLATE, 1)}, True),
    "with the scanner's qform": ({"qform": (Q, 1)}, True),
    "of another place": ({"qform": (turned(1) @ Q, 1)}, False),
}


@pytest.mark.parametrize(("transforms", "fits"), MASKS.values(), ids=MASKS)
def test_a_mask_may_have_one_of_the_images_transforms(
    transforms: dict, fits: bool, root: Path, tmp_path: Path
) -> None:
    found = look(root, qform=(Q, 1), sform=(TEMPLATE, 4))
    mask = tmp_path / "mask.nii.gz"
    nb.Nifti1Image(np.ones((23, 20, 17), np.uint8), np.eye(4)).to_filename(mask)
    put(mask, **transforms)
    told = [finding.message for finding in examine_mask(mask, found.acquisition)]
    assert bool(told) != fits
    assert images.same_grid(mask, found.acquisition.phase[0]) == fits


def test_echoes_are_compared_in_the_scanner(tmp_path: Path) -> None:
    root = write(tmp_path, echo_times=(0.004, 0.009))
    paths = sorted(root.rglob("*.nii.gz"))
    for n, path in enumerate(paths):
        put(path, qform=(Q, 1), sform=(turned(n) @ Q, 2))  # each aligned by itself
    (acquisition,) = bids.find(root)
    assert not [f for f in examine(acquisition).errors if f.check == "grid"]
    put(paths[2], qform=(turned(2) @ Q, 1), sform=(Q, 2))  # aligned to the first: it was turned
    (told,) = (f.message for f in examine(acquisition).errors if f.check == "grid")
    assert told.startswith(
        "sub-01/anat/sub-01_echo-2_part-mag_MEGRE.nii.gz (qform (code 1, scanner))"
    )


def test_the_app_hands_the_direction_to_the_graph(tmp_path: Path) -> None:
    from qsmpipe.settings import Settings
    from qsmpipe.workflows.base import init_acquisition_wf

    root = write(tmp_path)
    (acquisition,) = bids.find(root)
    examination = examine(acquisition, b0_direction=(0, 0.6, 0.8))
    graph = init_acquisition_wf(examination, Settings(work_dir=str(tmp_path)), {})
    assert graph.get_node("qsm_wf.inputnode").inputs.b0_direction == [0, 0.6, 0.8]
