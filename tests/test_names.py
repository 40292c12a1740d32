"""Names that BIDS does not allow: nothing is left out without a line that names it."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import bids
import pytest
from datasets import SHARED, image, state, write

from qsmpipe import checks
from qsmpipe.bids import Acquisition, Found, Invalid, find
from qsmpipe.cli import main

TINY = {"shape": (6, 5, 4), "echo_times": (0.004, 0.009)}

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two subjects, the second with a session."""
    root = tmp_path_factory.mktemp("names") / "raw"
    write(root, **TINY)
    return write(root, prefix="sub-02_ses-a", **TINY)


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "raw")


def rename(root: Path, old: str, new: str) -> None:
    """Replace a word in the names of all files and folders below ``root``."""
    for path in sorted(root.rglob("*"), key=lambda path: -len(path.parts)):
        if old in path.name:
            path.rename(path.with_name(path.name.replace(old, new)))


def move(root: Path, old: str, new: str) -> None:
    (root / new).parent.mkdir(parents=True, exist_ok=True)
    (root / old).rename(root / new)


WRONG: dict[str, tuple[Change, str, list[str]]] = {
    "hyphen": (
        lambda r: rename(r, "sub-01", "sub-01-02"), "sub-01-02", ["'01-02'", "'-'", "sub-0102"],
    ),
    "point": (lambda r: rename(r, "sub-01", "sub-0.1"), "sub-0.1", ["'.'", "sub-01"]),
    "underscore": (lambda r: rename(r, "sub-01", "sub-A_1"), "sub-A_1", ["'_'", "sub-A1"]),
    "accent": (lambda r: rename(r, "sub-01", "sub-Zoë"), "sub-Zoë", ["'ë'", "sub-Zoe"]),
    "another alphabet": (
        lambda r: rename(r, "sub-01", "sub-患者"), "sub-患者", ["'患'", "sub-01"],
    ),
    "space": (
        lambda r: rename(r, "sub-01", "sub-01 copy"), "sub-01 copy", ["a space", "sub-01copy"],
    ),
    "empty label": (lambda r: rename(r, "sub-01", "sub-"), "sub-", ["no label"]),
    "capital": (lambda r: rename(r, "sub-01", "Sub-01"), "Sub-01", ["lower case"]),
    "capitals": (lambda r: rename(r, "sub-01", "SUB-01"), "SUB-01", ["lower case"]),
    "no hyphen": (lambda r: rename(r, "sub-01", "sub01"), "sub01", ["sub-<label>"]),
    "date as session": (
        lambda r: rename(r, "ses-a", "ses-2020-01-31"), "sub-02/ses-2020-01-31", ["ses-20200131"],
    ),
    "capital session": (lambda r: rename(r, "ses-a", "Ses-a"), "sub-02/Ses-a", ["lower case"]),
    "bytes that are no text": (
        lambda r: os.rename(os.fsencode(r / "sub-01"), os.fsencode(r) + b"/sub-\xe4"),
        "sub-\N{REPLACEMENT CHARACTER}", ["sub-01"],
    ),
    "another subject's files": (
        lambda r: move(r, "sub-01", "sub-03"), "sub-03/anat/sub-01_echo-1_part-mag_MEGRE.nii.gz",
        ["and 3 more", "file says sub-01, its folder sub-03"],
    ),
    "another session's files": (
        lambda r: move(r, "sub-02/ses-a", "sub-02/ses-b"),
        "sub-02/ses-b/anat/sub-02_ses-a_echo-1_part-mag_MEGRE.nii.gz",
        ["file says ses-a, its folder ses-b"],
    ),
    "session without folder": (
        lambda r: move(r, "sub-02/ses-a/anat", "sub-02/anat"),
        "sub-02/anat/sub-02_ses-a_echo-1_part-mag_MEGRE.nii.gz",
        ["file says ses-a, its folder no ses-"],
    ),
    "folder without session": (
        lambda r: rename(r, "sub-02_ses-a_", "sub-02_"),
        "sub-02/ses-a/anat/sub-02_echo-1_part-mag_MEGRE.nii.gz",
        ["file says no ses-, its folder ses-a"],
    ),
    "no folder anat": (
        lambda r: [move(r, f"sub-01/anat/{p.name}", f"sub-01/{p.name}")
                   for p in (r / "sub-01/anat").iterdir()],
        "sub-01", ["gradient echoes in sub-01/anat alone", "4 images"],
    ),
    "in func": (lambda r: move(r, "sub-01/anat", "sub-01/func"), "sub-01/func", ["sub-01/anat"]),
    "in fmap": (
        lambda r: move(r, "sub-02/ses-a/anat", "sub-02/ses-a/fmap"), "sub-02/ses-a/fmap",
        ["in sub-02/ses-a/anat alone"],
    ),
    "in swi": (lambda r: move(r, "sub-01/anat", "sub-01/swi"), "sub-01/swi", ["sub-01/anat"]),
    "capital folder": (
        lambda r: move(r, "sub-01/anat", "sub-01/Anat"), "sub-01/Anat", ["sub-01/anat"],
    ),
    "a level too many": (
        lambda r: move(r, "sub-01/anat", "sub-01/anat2/x"), "sub-01/anat2/x", ["sub-01/anat"],
    ),
    "label of acq": (
        lambda r: rename(r / "sub-01", "sub-01_", "sub-01_acq-high_res_"),
        "sub-01/anat/sub-01_acq-high_res_echo-1_part-mag_MEGRE.nii.gz",
        ["and 3 more", "'res' in its name is no key-label pair"],
    ),
    "hyphen in acq": (
        lambda r: rename(r / "sub-01", "sub-01_", "sub-01_acq-high-res_"),
        "sub-01/anat/sub-01_acq-high-res_echo-1_part-mag_MEGRE.nii.gz",
        ["'high-res' of acq-", "acq-highres"],
    ),
    "accent in acq": (
        lambda r: rename(r / "sub-01", "sub-01_", "sub-01_acq-schräg_"),
        "sub-01/anat/sub-01_acq-schräg_echo-1_part-mag_MEGRE.nii.gz", ["'ä'", "acq-schrag"],
    ),
    "run of letters": (
        lambda r: rename(r / "sub-01", "sub-01_", "sub-01_run-a_"),
        "sub-01/anat/sub-01_run-a_echo-1_part-mag_MEGRE.nii.gz",
        ["and 3 more: the label of run- is a number"],
    ),
    "echo of letters": (
        lambda r: rename(r / "sub-01", "echo-", "echo-e"),
        "sub-01/anat/sub-01_echo-e1_part-mag_MEGRE.nii.gz",
        ["and 3 more: the label of echo- is a number"],
    ),
    "capital key": (
        lambda r: rename(r / "sub-01", "echo-", "Echo-"),
        "sub-01/anat/sub-01_Echo-1_part-mag_MEGRE.nii.gz", ["Echo- is written echo-"],
    ),
    "suffix not last": (
        lambda r: [rename(r / "sub-01", "_MEGRE", ""), rename(r / "sub-01", "01_", "01_MEGRE_")],
        "sub-01/anat/sub-01_MEGRE_echo-1_part-mag.nii.gz", ["must end in a suffix"],
    ),
    "capital ending": (
        lambda r: rename(r / "sub-01", ".nii.gz", ".NII.GZ"),
        "sub-01/anat/sub-01_echo-1_part-mag_MEGRE.NII.GZ", ["must end"],
    ),
    "another format": (
        lambda r: rename(r / "sub-01", ".nii.gz", ".mgz"),
        "sub-01/anat/sub-01_echo-1_part-mag_MEGRE.mgz", ["convert"],
    ),
    "phase as suffix": (
        lambda r: [rename(r / "sub-01", "_part-mag_MEGRE", "_magnitude"),
                   rename(r / "sub-01", "_part-phase_MEGRE", "_phase")],
        "sub-01/anat/sub-01_echo-1_phase.nii.gz", ["and 1 more", "call it ..._part-phase_MEGRE"],
    ),
    "link to nowhere": (
        lambda r: [shutil.rmtree(r / "sub-01"), (r / "sub-01").symlink_to("gone")],
        "sub-01", ["not here"],
    ),
    "part in capitals": (
        lambda r: rename(r / "sub-01", "part-phase", "part-Phase"),
        "sub-01/anat/sub-01_echo-1_part-Phase_MEGRE.nii.gz",
        ["write part-phase for part-Phase", "and 3 more"],
    ),
    "part abbreviated": (
        lambda r: rename(r / "sub-01", "part-phase", "part-ph"),
        "sub-01/anat/sub-01_echo-1_part-ph_MEGRE.nii.gz", ["write part-phase for part-ph"],
    ),
    "part in full": (
        lambda r: rename(r / "sub-01", "part-mag", "part-magnitude"),
        "sub-01/anat/sub-01_echo-1_part-magnitude_MEGRE.nii.gz", ["write part-mag for part-magn"],
    ),
    "part unknown": (
        lambda r: rename(r / "sub-01", "part-phase", "part-x"),
        "sub-01/anat/sub-01_echo-1_part-x_MEGRE.nii.gz", ["part-x is unknown"],
    ),
    "rec, as of old": (
        lambda r: [rename(r / "sub-01", "echo-", "part-mag_echo-"),
                   rename(r / "sub-01", "part-mag_MEGRE", "MEGRE"),
                   rename(r / "sub-01", "part-mag_echo-1_part-phase", "rec-phase_echo-1"),
                   rename(r / "sub-01", "part-mag_echo-2_part-phase", "rec-phase_echo-2"),
                   rename(r / "sub-01", "part-mag_echo-", "rec-magnitude_echo-")],
        "sub-01/anat/sub-01_rec-magnitude_echo-1_MEGRE.nii.gz",
        ["write part-mag for rec-magnitude, write part-phase for rec-phase"],
    ),
    "acq for part": (
        lambda r: rename(r / "sub-01", "sub-01_echo-1_part-phase", "sub-01_acq-phase_echo-1"),
        "sub-01/anat/sub-01_acq-phase_echo-1_MEGRE.nii.gz", ["write part-phase for acq-phase"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "where", "words"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_named_is_refused_and_the_others_stay(
    change: Change, where: str, words: list[str], root: Path
) -> None:
    change(root)
    before = state(root) if where != "sub-\N{REPLACEMENT CHARACTER}" else None
    found = find(root)
    assert before is None or state(root) == before
    (refusal,) = found.refusals
    assert refusal.where == where
    assert refusal.message.startswith(where)
    assert all(word in refusal.message for word in words), refusal.message
    other = "sub-01" if where.startswith("sub-02") else "sub-02_ses-a"
    assert [acquisition.name for acquisition in found] == [other]
    examination = checks.refused(refusal)
    assert examination.errors[0].message == refusal.message
    assert (
        examination.acquisition.name not in (other, "sub-01", "sub-02_ses-a") or where == "sub-01"
    )
    assert "Files left out" in examination.summary()
    refusal.message.encode()


def test_one_good_dataset_leaves_nothing_out(root: Path) -> None:
    found = find(root)
    assert isinstance(found, Found)
    assert (found.refusals, found.notes) == ((), ())
    assert found[:1] == (found[0],)


def test_refusals_follow_the_selection(root: Path) -> None:
    rename(root / "sub-01", "sub-01_", "sub-01_acq-x.y_")
    rename(root, "ses-a", "ses-1-2")
    assert {r.subject for r in find(root).refusals} == {"01", "02"}
    assert [r.subject for r in find(root, participants=["01"]).refusals] == ["01"]
    assert [r.subject for r in find(root, acquisitions=["x.y"]).refusals] == ["01", "02"]
    assert [r.subject for r in find(root, acquisitions=["z"]).refusals] == ["02"]
    assert [r.subject for r in find(root, sessions=["b"]).refusals] == ["01"]
    rename(root, "sub-01", "sub-01-02")
    (only,) = find(root, participants=["01-02"]).refusals
    assert only.where == "sub-01-02"


def test_links_to_subjects_are_followed(root: Path, tmp_path: Path) -> None:
    move(root, "sub-01", "../elsewhere")
    (root / "sub-01").symlink_to(tmp_path / "elsewhere")
    found = find(root)
    assert [acquisition.name for acquisition in found] == ["sub-01", "sub-02_ses-a"]
    assert not found.refusals


@pytest.mark.parametrize("folder", ["sub-01", "sub-02/ses-a/anat"])
def test_a_folder_that_may_not_be_read_stops_no_other(folder: str, pristine: Path) -> None:
    """In a process without root's rights, which may read everything."""
    others = 0o5
    above = [parent.stat().st_mode for parent in Path(bids.__file__).parents]
    if os.getuid() == 0 and not all(mode & others == others for mode in above):
        pytest.skip("root's packages lie in a folder that nobody else may read")
    program = (
        "import os, sys\n"
        "from qsmpipe.bids import find\n"
        "find(sys.argv[1])  # what it imports may not be readable to others\n"
        "os.chmod(sys.argv[2], 0)\n"
        "if os.getuid() == 0: os.setgroups([]), os.setgid(65534), os.setuid(65534)\n"
        "found = find(sys.argv[1])\n"
        "print(*(a.name for a in found), *(r.message for r in found.refusals), sep='\\n')\n"
    )
    with tempfile.TemporaryDirectory() as open_to_all:
        Path(open_to_all).chmod(0o755)
        root = shutil.copytree(pristine, Path(open_to_all, "raw"))
        command = [sys.executable, "-c", program, str(root), str(root / folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        (root / folder).chmod(0o755)
    other = "sub-02_ses-a" if folder == "sub-01" else "sub-01"
    said = f"{folder}: may not be read: look at its permissions"
    assert done.stdout.splitlines() == [other, said], done.stderr


def test_an_index_that_is_too_old_is_told(root: Path, tmp_path: Path) -> None:
    find(root, database=tmp_path / "index")
    write(root, prefix="sub-01_run-2", **TINY)
    (refusal,) = find(root, database=tmp_path / "index").refusals
    assert refusal.where == "sub-01/anat/sub-01_run-2_echo-1_part-mag_MEGRE.nii.gz"
    assert "delete the folder of --bids-database-dir" in refusal.message


def test_both_compressed_and_not_is_an_error_of_the_acquisition(root: Path) -> None:
    shutil.copy(image(root), str(image(root)).removesuffix(".gz"))
    (told,) = (f.message for f in checks.examine(find(root)[0]).errors if f.check == "echoes")
    assert "2 images of echo 2: keep one" in told


def test_what_is_no_gradient_echo_is_not_refused(root: Path) -> None:
    for name in (
        "sub-01/func/sub-01_task-rest_part-phase_bold.nii.gz",
        "sub-01/fmap/sub-01_phase1.nii.gz",
        "sub-01/fmap/sub-01_phasediff.nii.gz",
        "sub-01/dwi/sub-01_part-phase_dwi.nii.gz",
        "sub-01/anat/sub-01_acq-a.b_T1w.nii.gz",
        "sub-03-x/anat/sub-03-x_T1w.nii.gz",
        "sub-04",
        "derivatives/other/sub-01-2/anat/sub-01-2_part-phase_MEGRE.nii.gz",
        "own/dataset_description.json",
        "own/sub-1_2/anat/sub-1_2_part-phase_MEGRE.nii.gz",
        ".git/annex/objects/sub-01_part-phase_MEGRE.nii.gz",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    found = find(root)
    assert (found.refusals, found.notes) == ((), ())
    assert len(found) == 2


def test_what_lies_outside_of_subjects_is_named(root: Path) -> None:
    move(root, "sub-01/anat", "incoming/anat")
    (root / "sub-01" / "anat").mkdir()
    (root / "sub-05").mkdir()
    said = find(root).notes
    assert said[0].startswith("incoming/anat/sub-01_echo-1_part-mag_MEGRE.nii.gz and 3 more:")
    assert said[1] == "sub-05: an empty folder; a DataLad subdataset needs datalad get"
    assert len(said) == 2


@pytest.mark.parametrize(
    ("lines", "names", "said"),
    [
        ("sub-01/\n", ["sub-02_ses-a"], "4 images that look like gradient echoes (sub-01/"),
        ("# nothing\n\n**/*_echo-1_*\n!sub-02/**\n", ["sub-01", "sub-02_ses-a"], "out 2 im"),
        ("*_part-phase_*\n", ["sub-01", "sub-02_ses-a"], "leaves out 4 images"),
        ("!\nsub-01/\n\\\n", ["sub-02_ses-a"], "leaves out 4 images"),
        ("extra\n", ["sub-01", "sub-02_ses-a"], ""),
    ],
    ids=["folder", "pattern", "part", "lines that are no pattern", "other"],
)  # fmt: skip
def test_bidsignore_is_heeded_and_told(
    lines: str, names: list[str], said: str, root: Path
) -> None:
    (root / ".bidsignore").write_text(lines)
    found = find(root)
    assert [acquisition.name for acquisition in found] == names
    assert bool(found.notes) == bool(said)
    assert not said or said in found.notes[0]
    assert not found.refusals


def test_bidsignore_quiets_a_refusal(root: Path) -> None:
    rename(root, "sub-01", "sub-01-02")
    (root / ".bidsignore").write_text("sub-01-02\n")
    found = find(root)
    assert not found.refusals
    assert "leaves out 4 images" in found.notes[0]


def test_two_that_would_be_named_alike_are_told(root: Path) -> None:
    write(root, prefix="sub-01_acq-xInv2", **TINY)
    write(root, prefix="sub-01_acq-x_inv-2", **TINY)
    found = find(root)
    (refusal,) = found.refusals
    assert len({acquisition.name for acquisition in found}) == len(found) == 3
    assert "its maps would be named sub-01_acq-xInv2, as those of sub-01/anat/" in refusal.message


def test_names_of_nodes_tell_acquisitions_apart() -> None:
    labels = ("a", "b", "a+b", "a++b", "run", "1", "plus", "apb")
    names = {
        Acquisition(Path("/raw"), {"subject": s, "acquisition": a, "run": "1"}, "MEGRE").node_name
        for s in labels for a in labels
    } | {
        Acquisition(Path("/raw"), {"subject": s, "run": "1"}, "MEGRE").node_name for s in labels
    }  # fmt: skip
    assert len(names) == len(labels) ** 2 + len(labels)
    assert all(name.replace("_", "").isalnum() for name in names)


# --- the app ---------------------------------------------------------------------------------


def run(root: Path, *options: str) -> int:
    return main([
        str(root), str(root.parent / "out"), "participant", "-w", str(root.parent / "work"),
        "--skip-bids-validation", *options,
    ])  # fmt: skip


def test_dry_run_and_run_refuse_alike(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rename(root, "sub-01", "sub-0é1")
    rename(root, "ses-a", "ses-2020-01-31")
    assert run(root, "--dry-run") == 65
    said = capsys.readouterr().out
    assert said.count("-> refused") == 2
    assert "sub-02/ses-2020-01-31: the label '2020-01-31' of ses- holds '-'" in said
    assert run(root) == 65
    said = capsys.readouterr().err
    assert "refused: sub-0é1: the label '0é1' of sub- holds 'é'" in said
    assert "0 of 2 acquisitions done" in said
    assert "Traceback" not in said
    pages = {path.name for path in (root.parent / "out").glob("*.html")}
    assert pages == {"index.html", "sub-0é1.html", "sub-02.html"}
    assert "for example to ses-20200131" in (root.parent / "out" / "sub-02.html").read_text()


def test_only_unreadable_names_are_no_empty_dataset(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(root / "sub-02")
    rename(root, "sub-01", "Sub-01")
    assert run(root, "--dry-run") == 65
    assert "Sub-01: a subject's folder is called sub-<label>" in capsys.readouterr().out


def test_the_validator_stops_no_subject_for_the_sake_of_another(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rename(root, "sub-01", "sub-0é1")
    words = [str(root), str(root.parent / "out"), "participant", "--dry-run"]
    wrong = Invalid("NOT_INCLUDED", "sub-0é1/anat/sub-0é1_part-mag_GRE.nii.gz", "no such name")
    monkeypatch.setattr("qsmpipe.bids.validate", lambda folder: [wrong] * 12)
    assert main(words) == 0
    told = capsys.readouterr()
    assert f"  {wrong}\n  and 2 more" in told.err
    assert told.out.count("-> would be processed") == told.out.count("-> refused") == 1
    top = replace(wrong, location="dataset_description.json")
    monkeypatch.setattr("qsmpipe.bids.validate", lambda folder: [wrong, top])
    assert main(words) == 16
    said = capsys.readouterr().err
    assert "not valid BIDS" in said
    assert str(top) in said
    assert "0é1" not in said


def test_a_dataset_that_may_not_be_read_is_told(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != root)
    assert run(root, "--dry-run") == 66
    assert f"{root} may not be read by this user" in capsys.readouterr().err


def test_real_examples_leave_nothing_out() -> None:
    if not (SHARED / "bids-examples").is_dir():
        pytest.skip("shared test data not found: bids-examples")
    for name in ("qmri_qsm", "qmri_megre"):
        found = find(SHARED / "bids-examples" / name)
        assert len(found) == 1
        assert (found.refusals, found.notes) == ((), ())
