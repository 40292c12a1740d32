"""A dataset to acquisitions, an acquisition to names that bids-validator accepts."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import AFFINE, SHAPE, SHARED, edit, image, save, state, write

from qsmpipe import bids, derivatives
from qsmpipe.bids import Acquisition, find, find_mask
from qsmpipe.checks import examine
from qsmpipe.derivatives import sidecar, uri
from qsmpipe.maps import MAPS, given_by, written

TINY = {"shape": (6, 5, 4), "echo_times": (0.004, 0.009)}


def names(root: Path, **selection: object) -> list[str]:
    return [acquisition.name for acquisition in find(root, **selection)]


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two subjects, sessions, runs and acquisitions, and much that is no gradient echo."""
    root = tmp_path_factory.mktemp("acq-above_run-9") / "raw"
    for prefix in (
        "sub-01_ses-a_acq-hi_run-01",
        "sub-01_ses-a_acq-hi_run-02",
        "sub-01_ses-a_acq-hi_run-10",
        "sub-01_ses-b_acq-lo",
        "sub-02_ses-a_acq-lo_rec-x",
    ):
        write(root, prefix=prefix, **TINY)
    write(root, prefix="sub-02_ses-b", parts=("mag",), **TINY)
    write(root, prefix="sub-02_ses-b", suffix="T1w", parts=("mag",), shape=(6, 5, 4),
          echo_times=(0.003,))  # fmt: skip
    fmap = root / "sub-02" / "ses-a" / "fmap"
    save(np.ones((6, 5, 4), "f4"), fmap / "sub-02_ses-a_part-phase_T2starw.nii.gz")
    for folder in ("derivatives/x/sub-01/anat", "sourcedata/sub-01/anat"):
        save(np.ones((6, 5, 4), "f4"), root / folder / "sub-01_part-phase_T2starw.nii.gz")
    return root


ALL = [
    "sub-01_ses-a_acq-hi_run-01",
    "sub-01_ses-a_acq-hi_run-02",
    "sub-01_ses-a_acq-hi_run-10",
    "sub-01_ses-b_acq-lo",
    "sub-02_ses-a_acq-lo_rec-x",
    "sub-02_ses-b",
]


def test_gradient_echoes_are_found_and_nothing_else(crowd: Path) -> None:
    before = state(crowd)
    assert names(crowd) == ALL
    assert state(crowd) == before


SELECTIONS = {
    "participant": ({"participants": ["02"]}, ALL[4:]),
    "participant with prefix": ({"participants": ["sub-01"]}, ALL[:4]),
    "session": ({"sessions": ["ses-b"]}, [ALL[3], ALL[5]]),
    "run as number": ({"runs": ["1", "run-10"]}, [ALL[0], ALL[2]]),
    "acquisition": ({"acquisitions": ["lo"]}, ALL[3:5]),
    "several": ({"participants": ["01"], "sessions": ["b"]}, [ALL[3]]),
    "none": ({"acquisitions": ["other"]}, []),
    "filter": ({"filters": {"qsm": {"acquisition": "hi", "run": 2}}}, [ALL[1]]),
    "filter by key": ({"filters": {"qsm": {"acq": "hi", "ses": "ses-a"}}}, ALL[:3]),
    "filter for absence": ({"filters": {"qsm": {"run": None, "acquisition": "lo"}}}, ALL[3:5]),
    "filter for presence": ({"filters": {"qsm": {"reconstruction": "*"}}}, [ALL[4]]),
    "filter with a list": ({"filters": {"qsm": {"run": [1, 2]}}}, ALL[:2]),
    "filter beside others": ({"filters": {"t1w": {}, "qsm": {"suffix": "MEGRE"}}}, ALL),
}


@pytest.mark.parametrize(("selection", "expected"), SELECTIONS.values(), ids=SELECTIONS)
def test_a_selection_keeps_what_it_names(
    selection: dict, expected: list[str], crowd: Path
) -> None:
    assert names(crowd, **selection) == expected


def test_a_filter_can_leave_echoes_out(tmp_path: Path) -> None:
    (found,) = find(write(tmp_path), filters={"qsm": {"echo": [1, "3"]}})
    assert found.echo_times == (0.004, 0.014)
    assert len(found.magnitude) == len(found.phase) == 2


WRONG = {
    "participant": ({"participants": ["07"]}, "no participant 07; there are 01, 02"),
    "entity": ({"filters": {"qsm": {"colour": "red"}}}, "'colour' does not exist"),
    "no query": ({"filters": {"bold": {}}}, "it has bold"),
    "form": ({"filters": ["qsm"]}, "it has list"),
}


@pytest.mark.parametrize(("selection", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_selection_is_told(selection: dict, message: str, crowd: Path) -> None:
    with pytest.raises(ValueError, match=message):
        find(crowd, **selection)


def test_a_folder_that_is_no_dataset_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        find(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no folder sub-"):
        find(tmp_path)


def test_the_index_is_kept_outside_of_the_dataset(crowd: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not be kept inside"):
        find(crowd, database=crowd / "index")
    first = names(crowd, database=tmp_path / "index", participants=["01"])
    assert (tmp_path / "index").exists()
    assert first == ALL[:4]
    assert names(crowd, database=tmp_path / "index") == ALL


def test_entities_come_from_the_dataset_and_not_from_the_folders_above(crowd: Path) -> None:
    assert find(crowd)[5].entities == {"subject": "02", "session": "b"}


def test_echoes_sort_as_numbers(tmp_path: Path) -> None:
    times = tuple(0.002 * (i + 1) for i in range(11))
    (found,) = find(write(tmp_path, echo_times=times, shape=(6, 5, 4)))
    assert found.echo_times == pytest.approx(times)
    assert [bids.echo_of(path) for path in found.phase] == [*range(1, 12)]


def test_a_missing_part_is_magnitude(tmp_path: Path) -> None:
    root = write(tmp_path, **TINY)
    for path in sorted(root.rglob("*part-mag*")):
        path.rename(path.with_name(path.name.replace("_part-mag", "")))
    (found,) = find(root)
    assert [path.name for path in found.magnitude] == [
        "sub-01_echo-1_MEGRE.nii.gz",
        "sub-01_echo-2_MEGRE.nii.gz",
    ]
    assert len(found.phase) == 2


def test_metadata_is_inherited_as_pybids_does_it(tmp_path: Path) -> None:
    from bids.layout import BIDSLayout

    root = write(tmp_path, prefix="sub-01_ses-a", Manufacturer=None, MagneticFieldStrength=None)
    inherited = {
        "MEGRE.json": {"Manufacturer": "Philips", "MagneticFieldStrength": 3, "Gap": None},
        "part-phase_MEGRE.json": {"Units": "arbitrary", "FlipAngle": 11},
        "sub-01/sub-01_MEGRE.json": {"MagneticFieldStrength": 7},
        "sub-01/ses-a/sub-01_ses-a_echo-2_MEGRE.json": {"FlipAngle": 12},
        "sub-01/ses-a/sub-01_ses-a_echo-3_part-mag_MEGRE.json": {"FlipAngle": 13},
        "T1w.json": {"FlipAngle": 14},
    }
    for name, content in inherited.items():
        (root / name).write_text(json.dumps(content))
    (found,) = find(root)
    oracle = BIDSLayout(root, validate=False)
    for path in found.sources:
        assert dict(found.sidecars[path]) == dict(oracle.get_metadata(str(path)))
    assert found.metadata["MagneticFieldStrength"] == 7
    assert found.metadata["Units"] == "rad"


def test_one_broken_sidecar_does_not_hide_the_other_acquisitions(
    crowd: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(crowd, tmp_path / "raw")
    path = root / "sub-01/ses-b/anat/sub-01_ses-b_acq-lo_echo-1_part-mag_MEGRE.json"
    path.write_text("{")
    problems = {found.name: found.problems for found in find(root)}
    assert [name for name, told in problems.items() if told] == ["sub-01_ses-b_acq-lo"]
    assert "part-mag_MEGRE.json: not readable as JSON" in problems["sub-01_ses-b_acq-lo"][0]


def test_real_data_examples_are_found() -> None:
    if not (SHARED / "bids-examples").is_dir():
        pytest.skip("shared test data not found: bids-examples")
    (qsm,) = find(SHARED / "bids-examples" / "qmri_qsm")
    assert (qsm.suffix, qsm.name, qsm.echo_times) == ("T1w", "sub-01", (0.0081,))
    (megre,) = find(SHARED / "bids-examples" / "qmri_megre")
    assert megre.echo_times == pytest.approx([0.02 * (i + 1) for i in range(8)])
    assert megre.metadata["Manufacturer"] == "Siemens"
    assert not megre.phase


# --- names -----------------------------------------------------------------------------------


def test_names_of_outputs(tmp_path: Path) -> None:
    (found,) = find(write(tmp_path, prefix="sub-01_ses-a_acq-q_run-01_chunk-2", **TINY))
    expected = {
        "chi": "anat/sub-01_ses-a_acq-q_run-01_chunk-2_Chimap.nii.gz",
        "unreferenced": "anat/sub-01_ses-a_acq-q_run-01_chunk-2_desc-unreferenced_Chimap.nii.gz",
        "combined":
            "anat/sub-01_ses-a_acq-q_run-01_part-mag_chunk-2_desc-combined_T2starw.nii.gz",
        "field": "fmap/sub-01_ses-a_acq-q_run-01_chunk-2_desc-total_fieldmap.nii.gz",
        "field_magnitude": "fmap/sub-01_ses-a_acq-q_run-01_chunk-2_magnitude.nii.gz",
    }  # fmt: skip
    for key, path in expected.items():
        assert found.output(key) == Path("sub-01/ses-a") / path
    assert found.output("chi", ".json").suffix == ".json"
    assert found.node_name == "sub_01_ses_a_acq_q_run_01_chunk_2"


def test_what_a_map_may_not_be_named_by_moves_into_acq() -> None:
    entities = {"subject": "01", "acquisition": "x", "ceagent": "gd", "run": "1", "inv": "2"}
    found = Acquisition(Path("/raw"), entities, "MP2RAGE")
    assert found.name == "sub-01_acq-xInv2_ce-gd_run-1"
    assert found.output("chi").name == "sub-01_acq-xInv2_ce-gd_run-1_Chimap.nii.gz"
    assert found.output("field_magnitude").name == "sub-01_acq-xCegdInv2_run-1_magnitude.nii.gz"


def many(root: Path) -> Path:
    """Acquisitions of one subject whose maps would share names if nothing were done."""
    for prefix, suffix in (
        ("sub-01", "MEGRE"),
        ("sub-01", "T2starw"),
        ("sub-01_acq-hi", "MEGRE"),
        ("sub-01_acq-hi_run-1", "MEGRE"),
        ("sub-01_acq-hi_ce-gd_rec-x_run-1_chunk-1", "MEGRE"),
        ("sub-01_task-rest_acq-hi_run-1", "MEGRE"),
    ):
        write(root, prefix=prefix, suffix=suffix, **TINY)
    return root


def test_no_two_acquisitions_share_a_name(tmp_path: Path) -> None:
    found = find(many(tmp_path))
    for key in written():
        assert len({acquisition.output(key) for acquisition in found}) == len(found) == 6
    assert {a.suffix: a.name for a in found if "acq-hi" not in a.name} == {
        "MEGRE": "sub-01",
        "T2starw": "sub-01_acq-T2starw",
    }


def test_a_name_does_not_depend_on_the_selection(tmp_path: Path) -> None:
    root = many(tmp_path)
    (alone,) = find(root, filters={"qsm": {"suffix": "T2starw"}})
    assert alone.name == "sub-01_acq-T2starw"


def test_every_row_has_a_unit_a_description_and_a_source() -> None:
    for row in MAPS.values():
        assert row.description
        assert bool(row.units) != row.is_mask
    fields = {*given_by("qsm", "susceptibility")}
    assert {row.source or key for key, row in MAPS.items() if row.given_by != "head"} == fields


# --- sidecars and the derivative dataset -------------------------------------------------------

STEPS = [
    {"stage": "offset", "method": "mcpc3ds", "parameters": {"sigma": 7.0}, "warnings": []},
    {"stage": "unwrap", "method": "romeo", "parameters": {}, "warnings": []},
    {"stage": "field", "method": "nonlinear", "parameters": {}, "warnings": []},
    {"stage": "background", "method": "vsharp", "parameters": {"radii": (5.0, 3.0)}},
    {"stage": "inversion", "method": "tkd", "parameters": {"threshold": np.float64(0.19)}},
    {"stage": "reference", "method": "brain", "parameters": {"value": 0.012}},
]


def test_a_sidecar_tells_everything(tmp_path: Path) -> None:
    root = write(tmp_path / "raw", ImagingFrequency=123.25, PatientName="Nobody")
    found = examine(find(root)[0])
    content = json.loads(json.dumps(sidecar(found, "chi", steps=STEPS, reference="brain")))
    assert content["Sources"][0] == "bids:raw:sub-01/anat/sub-01_echo-1_part-mag_MEGRE.nii.gz"
    assert len(content["Sources"]) == 6
    assert content["Units"] == "ppm"
    assert content["SkullStripped"] is True
    assert content["SpatialReference"] == "orig"
    assert content["EchoTime"] == [0.004, 0.009, 0.014]
    assert content["MagneticFieldStrength"] == pytest.approx(123.25 / 42.577478518, abs=1e-6)
    assert content["Manufacturer"] == "Siemens"
    assert content["EstimationAlgorithm"] == "thresholded k-space division"
    assert content["B0Direction"] == [0.0, 0.0, 1.0]
    assert content["ReferenceValue"] == 0.012
    assert content["ReferenceRegion"].startswith("whole brain")
    assert content["ProcessingSteps"][3]["parameters"] == {"radii": [5.0, 3.0]}
    assert content["ProcessingSteps"][4]["parameters"] == {"threshold": 0.19}
    assert "PatientName" not in content

    field = sidecar(found, "field", steps=STEPS)
    assert field["Units"] == "Hz"
    assert "ROMEO" in field["EstimationAlgorithm"]
    assert "nonlinear" in field["EstimationAlgorithm"]
    mask = sidecar(found, "qsm_mask", steps=STEPS)
    assert mask["Type"] == "ROI"
    assert "Units" not in mask
    plain = sidecar(found, "unreferenced", steps=STEPS)
    assert plain["ReferenceRegion"] == "none"
    assert "ReferenceValue" not in plain
    region = sidecar(found, "chi", steps=STEPS, reference="region:csf")
    assert (region["ReferenceRegion"], region["ReferenceValue"]) == ("csf", 0.012)
    median = sidecar(found, "median", steps=[*STEPS, *STEPS])
    assert "ReferenceValue" not in median, "each map has its own"


def test_a_uri_is_relative_to_its_dataset() -> None:
    assert uri("/data/sub-01/anat/a.nii", "/data") == "bids:raw:sub-01/anat/a.nii"
    assert uri("/out/sub-01/anat/a.nii", "/out", "") == "bids::sub-01/anat/a.nii"


def test_the_description_names_sources_version_and_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write(tmp_path / "raw data", **TINY)
    description = root / "dataset_description.json"
    description.write_text(json.dumps(
        {"Name": "balls", "BIDSVersion": "1.11.1", "DatasetDOI": "doi:10.1/x"}
    ))  # fmt: skip
    monkeypatch.setenv("QSMPIPE_CONTAINER", "qsmpipe:0.1.0")
    out = tmp_path / "out"
    derivatives.write_description(out, root)
    content = json.loads((out / "dataset_description.json").read_text())
    assert content["DatasetType"] == "derivative"
    assert content["GeneratedBy"][0]["Name"] == "qsmpipe"
    assert content["GeneratedBy"][0]["Container"] == {"Type": "docker", "Tag": "qsmpipe:0.1.0"}
    assert content["SourceDatasets"] == [{"URL": "../raw%20data", "DOI": "doi:10.1/x"}]
    assert content["DatasetLinks"] == {"raw": "../raw%20data"}
    before = state(out)
    derivatives.write_description(out, root)
    assert state(out) == before


def test_the_output_of_something_else_is_not_written_over(tmp_path: Path) -> None:
    root = write(tmp_path / "raw", **TINY)
    with pytest.raises(ValueError, match="choose another output folder"):
        derivatives.write_description(root, root)
    other = tmp_path / "out" / "dataset_description.json"
    other.parent.mkdir()
    other.write_text(json.dumps({"GeneratedBy": [{"Name": "fMRIPrep"}]}))
    with pytest.raises(ValueError, match="made by fMRIPrep"):
        derivatives.write_description(other.parent, root)


@pytest.mark.parametrize("make", [many, write], ids=["many", "one"])
def test_the_validator_accepts_every_output(make: Callable[[Path], Path], tmp_path: Path) -> None:
    root = make(tmp_path / "raw")
    if bids.validate(root) is None:
        pytest.skip("bids-validator-deno not found")
    out = tmp_path / "out"
    derivatives.write_description(out, root)
    (out / "logs").mkdir()
    (out / "logs" / "run.json").write_text("{}")
    (out / "index.html").write_text("<html></html>")
    for acquisition in find(root):
        examination = examine(acquisition)
        figures = out / "sub-01" / "figures"
        figures.mkdir(parents=True, exist_ok=True)
        (figures / f"{acquisition.name}_desc-chi_qsm.png").write_bytes(b"x")
        for key, row in written().items():
            shape = (*SHAPE, 3) if key == "unwrapped" else SHAPE
            values = np.ones(shape, np.uint8 if row.is_mask else np.float32)
            save(values, out / acquisition.output(key, method="tv"))
            content = sidecar(examination, key, steps=STEPS)
            path = out / acquisition.output(key, ".json", method="tv")
            path.write_text(json.dumps(content))
    assert bids.validate(out) == []


def test_the_validator_tells_what_is_wrong(tmp_path: Path) -> None:
    root = write(tmp_path, **TINY)
    errors = bids.validate(root)
    if errors is None:
        pytest.skip("bids-validator-deno not found")
    assert errors == []
    edit(image(root), Units="a.u.")
    image(root).with_name("sub-01_GRE.nii.gz").write_bytes(image(root).read_bytes())
    errors = bids.validate(root)
    said = [str(error) for error in errors]
    assert any("PHASE_UNITS" in error and "part-phase" in error for error in said)
    assert any("sub-01_GRE.nii.gz" in error for error in said)
    assert all(error.of_subject for error in errors)
    (root / "dataset_description.json").write_text("{}")
    assert any(not error.of_subject for error in bids.validate(root))


def test_without_a_validator_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)
    assert bids.validate(tmp_path) is None


def test_a_validator_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bids-validator-deno"
    program.write_text("#!/bin/sh\necho out of memory >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(ValueError, match="ended with 3: out of memory"):
        bids.validate(tmp_path)


# --- masks of the user -------------------------------------------------------------------------


def mask(root: Path, name: str, shape: tuple[int, ...] = (6, 5, 4)) -> Path:
    return save(np.ones(shape, np.uint8), root / f"sub-01/anat/{name}_mask.nii.gz", AFFINE)


def test_the_users_mask_is_found(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", prefix="sub-01_acq-q_run-1", **TINY)
    (found,) = find(raw)
    deriv, other = tmp_path / "deriv", tmp_path / "other"
    assert find_mask(deriv, found) is None
    mask(deriv, "sub-01_acq-q_run-2_desc-brain")
    mask(deriv, "sub-01_acq-q_run-1_label-lesion")
    mask(deriv, "sub-01_acq-q_run-1_desc-qsm")
    assert find_mask(deriv, found) is None
    general = mask(deriv, "sub-01_desc-brain")
    assert find_mask(deriv, found) == general
    plain = mask(other, "sub-01_acq-q_run-1")
    assert find_mask([deriv, other], found) == plain
    brain = mask(deriv, "sub-01_acq-q_run-1_desc-brain")
    assert find_mask([other, deriv], found) == brain
    assert find_mask([other], found) == plain
    assert find_mask([deriv, other], found, label="lesion").name.endswith(
        "label-lesion_mask.nii.gz"
    )
    assert find_mask([deriv, other], found, label="csf") is None


def test_a_mask_of_another_grid_is_told(tmp_path: Path) -> None:
    (found,) = find(write(tmp_path / "raw", **TINY))
    wrong = mask(tmp_path / "deriv", "sub-01_desc-brain", shape=(6, 5, 5))
    with pytest.raises(ValueError, match=r"\(6, 5, 5\) is not on the grid of .* resample"):
        find_mask(tmp_path / "deriv", found)
    right = mask(tmp_path / "deriv", "sub-01_space-orig_desc-brain")
    assert find_mask(tmp_path / "deriv", found) == right
    assert wrong.exists()
