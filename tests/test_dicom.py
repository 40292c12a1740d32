"""DICOM to BIDS: real scanners' files where they are at hand, made ones for all else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nb
import numpy as np
import pydicom
import pytest
from datasets import SHARED
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.misc import is_dicom
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from qsmpipe.cli import main
from qsmpipe.dicom import Scan, read, write

NAME = "Doe^Jane"
TIMES = (4.0, 9.5, 15.0)
SHAPE = (10, 8, 5)
"""Columns, rows, slices."""
SPACING = (2.0, 1.5, 3.0)
TURN = 0.3


def shared(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"shared test data not found: {name}")
    return SHARED / name


def axes() -> np.ndarray:
    """Directions (rows of the result) of columns, rows and slices in DICOM's frame."""
    c, s = np.cos(TURN), np.sin(TURN)
    return np.array([[1, 0, 0], [0, c, s], [0, -s, c]])


def values(echo: int, part: str) -> np.ndarray:
    """Stored numbers (columns, rows, slices): no two voxels, echoes or parts alike."""
    x, y, z = np.indices(SHAPE)
    return (x + 10 * y + 100 * z + 1000 * echo + 500 * (part == "phase")).astype(np.uint16)


def series(
    folder: Path,
    *,
    times: tuple[float, ...] = TIMES,
    parts: tuple[str, ...] = ("mag", "phase"),
    change: Callable[[Dataset, int, int], Dataset | None] = lambda image, echo, k: image,
    prefix: str = "",
) -> Path:
    """Write single-frame files of one acquisition, a series per part, slices from above."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = {"mag": "M", "phase": "P", "real": "R", "imag": "I"}
    for number, part in enumerate(parts, 2):
        for echo, time in enumerate(times):
            for k in range(SHAPE[2]):
                image = Dataset()
                image.file_meta = FileMetaDataset()
                image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
                image.SOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
                image.SOPInstanceUID = generate_uid()
                image.PatientName, image.PatientID, image.PatientBirthDate = NAME, NAME, "19700101"
                image.Modality, image.Manufacturer = "MR", "SIEMENS"
                image.ManufacturerModelName, image.SoftwareVersions = "Test", ["a", "b"]
                image.MRAcquisitionType, image.ScanningSequence = "3D", "GR"
                image.SequenceName, image.ProtocolName = "*fl3d3", NAME
                image.ImageType = ["ORIGINAL", "PRIMARY", letters[part], "ND"]
                image.SeriesNumber, image.InstanceNumber = number, SHAPE[2] - k
                image.EchoTime, image.RepetitionTime, image.FlipAngle = time, 30, 15
                image.MagneticFieldStrength, image.ImagingFrequency = 3, 123.25
                image.Columns, image.Rows = SHAPE[:2]
                image.PixelSpacing = [SPACING[1], SPACING[0]]
                image.SliceThickness = SPACING[2]
                image.ImageOrientationPatient = [*axes()[0], *axes()[1]]
                place = np.array([-30.0, 20, 5]) + axes()[2] * SPACING[2] * k
                image.ImagePositionPatient = [*place.round(6)]
                image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
                image.BitsAllocated, image.BitsStored, image.HighBit = 16, 12, 11
                image.PixelRepresentation = 0
                if part == "phase":
                    image.RescaleSlope, image.RescaleIntercept = 2, -4096
                image.PixelData = np.ascontiguousarray(values(echo, part)[:, :, k].T).tobytes()
                changed = change(image, echo, k)
                if changed is not None:
                    name = f"{prefix}{part}_{echo}_{SHAPE[2] - k}"
                    changed.save_as(folder / name, enforce_file_format=True)
    return folder


def of(scan: Scan, part: str, echo: int) -> np.ndarray:
    (volume,) = [v for v in scan.volumes if (v.part, v.echo) == (part, echo)]
    return volume.slope * volume.stored + volume.intercept


# ---------------------------------------------------------------------------------------------
# Real files
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def philips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    source = shared("philips-head")
    roots = {}
    for kind in ("classic", "enhanced"):
        roots[kind] = tmp_path_factory.mktemp(kind) / "bids"
        words = [str(source / kind), str(roots[kind]), "--participant_label", "01"]
        assert main(["dicom", *words]) == 0
    return roots


def names(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.*") if path.is_file())


def test_philips_classic_and_enhanced_are_the_same(philips: dict[str, Path]) -> None:
    classic, enhanced = philips["classic"], philips["enhanced"]
    images = [name for name in names(classic) if name.endswith(".nii.gz")]
    assert len(images) == 4
    assert names(enhanced) == names(classic)
    for name in images:
        one, other = nb.load(classic / name), nb.load(enhanced / name)
        assert np.array_equal(one.get_fdata(), other.get_fdata())
        np.testing.assert_allclose(one.affine, other.affine, atol=1e-5)
        sidecars = [
            json.loads((root / f"{name[:-7]}.json").read_text()) for root in philips.values()
        ]
        for key in ("EchoTime", "Units", "ImagingFrequency", "FlipAngle", "SequenceVariant"):
            assert sidecars[0].get(key) == sidecars[1].get(key)


@pytest.mark.parametrize("echo", [1, 2])
@pytest.mark.parametrize(("part", "ending"), [("mag", ""), ("phase", "_ph")])
def test_philips_is_what_dcm2niix_makes_of_it(
    part: str, ending: str, echo: int, philips: dict[str, Path]
) -> None:
    stem = f"2001_WIP_fcMRI_Field_Mapping_cl_e{echo}{ending}"
    source = shared("philips-head") / "reference" / stem
    # Which way an axis is stored is free: the same voxel at the same place is what counts.
    reference = nb.as_closest_canonical(nb.load(f"{source}.nii.gz"))
    target = philips["classic"] / "sub-01" / "anat" / f"sub-01_echo-{echo}_part-{part}_MEGRE"
    image = nb.as_closest_canonical(nb.load(f"{target}.nii.gz"))
    np.testing.assert_allclose(image.affine, reference.affine, atol=1e-3)
    # DICOM rounds pi to 3142 mrad, and steps by 1.5 mrad; dcm2niix takes a private exact scale.
    tolerance = 5e-4 if part == "phase" else 0
    np.testing.assert_allclose(image.get_fdata(), reference.get_fdata(), rtol=1e-5, atol=tolerance)
    sidecar = json.loads(Path(f"{target}.json").read_text())
    expected = json.loads(Path(f"{source}.json").read_text())
    for key in ("EchoTime", "ImagingFrequency", "MagneticFieldStrength", "FlipAngle"):
        assert sidecar[key] == pytest.approx(expected[key]), key
    for key in ("Manufacturer", "ManufacturersModelName", "MRAcquisitionType", "SoftwareVersions"):
        assert sidecar[key] == expected[key], key
    assert sidecar.get("Units") == ("rad" if part == "phase" else None)


def test_equal_instance_numbers_of_two_echoes_lose_nothing() -> None:
    folder = shared("siemens-fieldmap")
    scan = read(folder / "2_gre_field_magph")
    assert scan.echo_times == (0.00519, 0.00765)
    reference = nb.load(next((folder / "reference").glob("Si_2*e2.nii.gz")))
    assert np.array_equal(of(scan, "mag", 2), reference.get_fdata())
    np.testing.assert_allclose(scan.affine, reference.affine, atol=1e-3)


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("siemens-qsm-phantom", "incomplete volume: 1 slice"),
        ("siemens-fieldmap/2_gre_field_magph", "QSM needs the phase"),
        ("siemens-fieldmap/3_gre_field_magph", "phase difference"),
        ("ge-fieldmap/6_CV_Neuro", "field map in Hz"),
    ],
)
def test_what_is_no_whole_gradient_echo_is_refused(
    folder: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shared(folder.split("/")[0]) / "/".join(folder.split("/")[1:])
    assert main(["dicom", str(source), str(tmp_path / "bids"), "--participant-label", "01"]) == 65
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "bids").exists()
    file = next(path for path in sorted(source.rglob("*")) if path.is_file() and is_dicom(path))
    header = pydicom.dcmread(file, stop_before_pixels=True)
    for word in (header.PatientName, header.PatientID, header.PatientBirthDate):
        assert not str(word) or str(word) not in said.replace(str(source), "")


# ---------------------------------------------------------------------------------------------
# Made files
# ---------------------------------------------------------------------------------------------


def test_slices_are_sorted_by_position_and_placed(tmp_path: Path) -> None:
    scan = read(series(tmp_path))
    assert scan.echo_times == (0.004, 0.0095, 0.015)
    for echo in (1, 2, 3):
        stored = values(echo - 1, "mag")
        assert np.array_equal(of(scan, "mag", echo), stored[:, ::-1])
        phase = (2.0 * values(echo - 1, "phase") - 4096) * np.pi / 4096
        np.testing.assert_allclose(of(scan, "phase", echo), phase[:, ::-1])
    # The voxel that DICOM stores first lies at its ImagePositionPatient, LPS turned to RAS.
    np.testing.assert_allclose(scan.affine @ [0, SHAPE[1] - 1, 0, 1], [30, -20, 5, 1], atol=1e-5)
    last = np.array([-30.0, 20, 5]) + (np.array(SHAPE) - 1) * SPACING @ axes()
    np.testing.assert_allclose(
        scan.affine @ [SHAPE[0] - 1, 0, SHAPE[2] - 1, 1],
        [-last[0], -last[1], last[2], 1],
        atol=1e-4,
    )


def test_nothing_that_names_the_patient_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = series(tmp_path / "dicom")
    (source / "notes.txt").write_text("no DICOM")
    root = tmp_path / "bids"
    words = [str(source), str(root), "--participant-label", "sub-07", "--session-label", "a"]
    assert main(["dicom", *words, "--acquisition-label", "qsm"]) == 0
    expected = {
        f"sub-07/ses-a/anat/sub-07_ses-a_acq-qsm_echo-{echo}_part-{part}_MEGRE{ending}"
        for echo in (1, 2, 3)
        for part in ("mag", "phase")
        for ending in (".nii.gz", ".json")
    }
    assert set(names(root)) == expected | {"dataset_description.json"}
    said = capsys.readouterr()
    text = said.out + said.err + "".join(p.read_text() for p in root.rglob("*.json"))
    assert "Doe" not in text
    assert "1970" not in text
    assert main(["dicom", *words, "--acquisition-label", "qsm"]) == 65
    assert "is there already" in capsys.readouterr().err
    assert main(["dicom", str(source), str(root), "--participant-label", "7_x"]) == 65
    assert main(["dicom", str(source), str(root)]) == 64
    assert main(["dicom", str(tmp_path / "nowhere"), str(root), "--participant-label", "1"]) == 66


def test_real_and_imaginary_parts_of_ge(tmp_path: Path) -> None:
    def ge(image: Dataset, echo: int, k: int) -> Dataset:
        image.Manufacturer, image.ImageType = (
            "GE MEDICAL SYSTEMS",
            ["ORIGINAL", "PRIMARY", "OTHER"],
        )
        block = image.private_block(0x0043, "GEMS_PARM_01", create=True)
        block.add_new(0x2F, "SS", image.SeriesNumber)  # 2 real, 3 imaginary
        image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 15, 1
        return image

    scan = read(series(tmp_path / "dicom", times=(8.0,), parts=("real", "imag"), change=ge))
    assert scan.parts == ("real", "imag")
    paths = write(scan, tmp_path / "bids", subject="1")
    assert [path.name for path in paths] == [
        "sub-1_part-imag_T2starw.nii.gz", "sub-1_part-real_T2starw.nii.gz"
    ]  # fmt: skip


def test_phase_in_milliradians_is_told_by_its_range(tmp_path: Path) -> None:
    def ge(image: Dataset, echo: int, k: int) -> Dataset:
        image.Manufacturer = "GE MEDICAL SYSTEMS"
        if image.SeriesNumber == 3:
            del image.RescaleSlope, image.RescaleIntercept
            image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 15, 1
            phase = np.linspace(-3141, 3141, SHAPE[0] * SHAPE[1]).round().astype(np.int16)
            image.PixelData = phase.tobytes()
        return image

    scan = read(series(tmp_path, change=ge))
    phase = of(scan, "phase", 2)
    assert (phase.min(), phase.max()) == (pytest.approx(-3.141), pytest.approx(3.141))
    assert {volume.units for volume in scan.volumes if volume.part == "phase"} == {"rad"}


def test_slopes_that_differ_by_slice_are_applied(tmp_path: Path) -> None:
    def rescale(image: Dataset, echo: int, k: int) -> Dataset:
        if image.SeriesNumber == 2:
            image.RescaleSlope, image.RescaleIntercept = k + 1, 7
        return image

    scan = read(series(tmp_path, change=rescale))
    expected = values(1, "mag")[:, ::-1] * (np.arange(SHAPE[2]) + 1.0) + 7
    np.testing.assert_allclose(of(scan, "mag", 2), expected)


def lose(lost: Callable[[Dataset, int, int], bool]) -> Callable[..., Dataset | None]:
    return lambda image, echo, k: None if lost(image, echo, k) else image


def put(**attributes: Any) -> Callable[..., Dataset]:
    def change(image: Dataset, echo: int, k: int) -> Dataset:
        for key, value in attributes.items():
            setattr(image, key, value(image, echo, k) if callable(value) else value)
        return image

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose(lambda image, echo, k: k == 2), "slices are missing"),
        (lose(lambda image, echo, k: (image.SeriesNumber, echo, k) == (3, 1, 4)), "4 of 5 slices"),
        (lose(lambda image, echo, k: (image.SeriesNumber, echo) == (3, 0)), "no phase image at"),
        (lose(lambda image, echo, k: True), "no MR images"),
        (put(SOPClassUID="1.2.840.10008.5.1.4.1.1.66"), "no MR images"),
        (put(EchoTime=5), "several images at the same place: repeats"),
        (put(PixelSpacing=lambda image, echo, k: [1.5, 0.5 * image.SeriesNumber]),
         "different grids"),
        (put(ImageType=["DERIVED", "PRIMARY", "P", "PHASE DIFFERENCE"]), "phase difference"),
        (put(SequenceName="*fm2d2r"), "phase difference"),
        (put(ImageType=["ORIGINAL", "PRIMARY", "B0 MAP", "B0"]), "field map in Hz"),
        (put(RescaleType="Hz"), "field map in Hz"),
        (put(ScanningSequence=["SE", "EP"]), "spin echo"),
        (put(ImageType=["DERIVED", "PRIMARY", "MNIP"]), "no image of an echo"),
        (put(ImageType=["DERIVED", "SECONDARY"]), "neither magnitude nor phase"),
        (put(EchoTime=None), "no EchoTime"),
        (put(PixelData=b"1234"), "pixels cannot be read"),
        (put(ImagePositionPatient=lambda i, e, k: [k, 0, 3 * k]), "sheared"),
    ],
)  # fmt: skip
def test_broken_acquisitions_say_what_is_wrong(
    change: Callable[..., Dataset | None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(series(tmp_path, change=change))
    assert "Doe" not in str(caught.value)


def test_uncombined_coils_and_repeated_series_are_told_apart(tmp_path: Path) -> None:
    folder = series(tmp_path / "coils", change=put(ReceiveCoilName="H1"))
    series(folder, change=put(ReceiveCoilName="H2"), prefix="2")
    with pytest.raises(ValueError, match=r"one per coil \(2 coils\)"):
        read(folder)
    later = put(SeriesNumber=lambda image, echo, k: image.SeriesNumber + 10)
    folder = series(tmp_path / "repeats")
    series(folder, change=later, prefix="2")
    with pytest.raises(ValueError, match="series 2, 12 hold the same"):
        read(folder)
    assert len(read(folder, series=(12, 13)).volumes) == 6
    with pytest.raises(ValueError, match="no MR images of series 4"):
        read(folder, series=(4,))
