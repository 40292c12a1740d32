"""Records and files that are whole or not there, whoever writes at the same time."""

import errno
import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from qsmpipe import files, records
from qsmpipe.bids import Acquisition
from qsmpipe.derivatives import state, unchanged, write_description
from qsmpipe.records import (
    Convergence,
    Earlier,
    Failure,
    Figure,
    Finding,
    NodeRun,
    Number,
    Record,
    Run,
    Step,
)

MOMENT = datetime(2025, 11, 20, 10, 11, 12, tzinfo=UTC)

FULL = Record(
    "sub-01_MEGRE",
    "01",
    "one",
    status="done",
    acquisition={"Echoes": "5", "TE1:ΔTE:TEmax (ms)": "4:4:12"},
    findings=(Finding("warning", "phase scale", "odd"),),
    steps=(
        Step("inversion", "tv", {"lambda_": 1e-4, "radii": [3, 2.5], "weights": None, "on": True},
             Convergence(True, 7, 1e-3, 2e-3), ("slow",), "cuda:H200", "tv", {"chosen": 1}),
    ),
    numbers=(Number("Echoes", 5), Number("Range", (-0.1, 0.1), "ppm"), Number("Lost", None, "%")),
    figures=(Figure("sub-01/figures/a.png", "A", "An a.", "Phase"),),
    nodes=(NodeRun("tv", "done", 7.5, 200.25), NodeRun("romeo", "not run")),
    failures=(Failure("romeo", "no seed", "/out/crash.txt"),),
    earlier=(Earlier(("sub-01/anat/sub-01_Chimap.nii.gz",), MOMENT, "zero"),),
)  # fmt: skip

RUN = Run("one", "qsmpipe in out participant", MOMENT, MOMENT, "SIGTERM", {"torch": "2.13"},
          {"reference": "brain", "parameters": {"inversion.tv": {"lambda": 1e-4}}})  # fmt: skip


def path_of(out: Path, record: Record) -> Path:
    return out / "logs" / record.run / "acquisitions" / f"{record.name}.json"


def test_what_was_written_is_read(tmp_path: Path) -> None:
    records.write_run(tmp_path, RUN)
    records.write_record(tmp_path, FULL)
    book = records.read(tmp_path)
    assert book.runs == {"one": RUN}
    (found,) = book.records
    assert found.written is not None
    assert replace(found, written=None) == FULL
    json.loads(path_of(tmp_path, FULL).read_text(), parse_constant=pytest.fail)
    with pytest.raises(FrozenInstanceError):
        found.status = "failed"  # type: ignore[misc]


def test_what_is_not_finite_is_unknown(tmp_path: Path) -> None:
    step = Step("inversion", "tv", {}, Convergence(False, 3, float("nan"), 1e-3))
    records.write_record(tmp_path, replace(FULL, steps=(step,)))
    (found,) = records.read(tmp_path).records
    assert found.steps[0].convergence == Convergence(False, 3, None, 1e-3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"name": "sub-0', "is not a readable record"),
        ("[]", "it has no format"),
        ("{}", "it has no format"),
        ('{"format": 1}', "subject: Field required"),
        ('{"format": 1, "subject": "01", "status": "fine"}', "status: Input should be"),
        (
            '{"format": 99, "subject": "01"}',
            "has format 99, and qsmpipe 0.1.0 reads format 1: use the qsmpipe that wrote it",
        ),
    ],
)
def test_a_record_that_cannot_be_read_says_so(text: str, said: str, tmp_path: Path) -> None:
    path = path_of(tmp_path, FULL)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    records.write_record(tmp_path, replace(FULL, name="sub-02", subject="02"))
    broken, whole = records.read(tmp_path).records
    assert (broken.name, broken.subject, broken.status) == ("sub-01_MEGRE", "01", "failed")
    assert said in broken.failures[0].message
    assert str(path) in broken.failures[0].message
    assert whole.status == "done"


def test_a_run_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    records.write_record(tmp_path, FULL)
    assert "run.json is missing" in records.read(tmp_path).runs["one"].problem
    (tmp_path / "logs/one/run.json").write_text('{"format": 2}')
    assert "has format 2" in records.read(tmp_path).runs["one"].problem


def test_the_last_record_of_an_acquisition_counts(tmp_path: Path) -> None:
    """And behind one that is not done, the one whose maps are still there."""
    for run, status in (("one", "done"), ("two", "done"), ("three", "failed")):
        earlier = FULL.earlier if status == "done" else (Earlier(("x",), MOMENT, "two"),)
        records.write_record(tmp_path, replace(FULL, run=run, status=status, earlier=earlier))
    records.write_record(tmp_path, replace(FULL, run="one", name="sub-02", subject="02"))
    book = records.read(tmp_path)
    assert [(r.name, r.run) for r in book.current] == [
        ("sub-01_MEGRE", "three"),
        ("sub-02", "one"),
    ]
    assert [r.run for r in book.shown("01")] == ["three", "two"]
    assert [r.run for r in book.shown("02")] == ["one"]


def test_tables_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"1\.stage: Field required"):
        records.take(Step, [{"stage": "a", "method": "b"}, {"method": "c"}])


def test_a_map_is_of_the_run_whose_record_came_next(tmp_path: Path) -> None:
    times = [MOMENT + timedelta(minutes=minutes) for minutes in (0, 10, 20)]
    done = [replace(FULL, run=run, written=t) for run, t in zip(("a", "b"), times, strict=False)]
    book = records.Logbook({}, tuple(done))
    left = {"old": MOMENT - timedelta(minutes=1), "new": times[0] + timedelta(minutes=1),
            "by hand": times[2]}  # fmt: skip
    found = {e.run: e.files for e in records.earlier(book, FULL.name, left)}
    assert found == {"a": ("old",), "b": ("new",), "": ("by hand",)}
    text = records.said_of(Earlier(("by hand",), times[2]), FULL)
    assert text == (
        "1 map of an earlier run stays beside those of this run: by hand, written 2025-11-20 "
        "10:31:12 by a run that left no record; delete or move it unless wanted"
    )


def test_maps_that_nobody_wrote_again_are_found(tmp_path: Path) -> None:
    acquisition = Acquisition(Path("/data"), {"subject": "01"}, "MEGRE")
    for name in ("Chimap", "desc-rts_Chimap", "desc-cosmos_Chimap", "run-2_Chimap"):
        files.write(tmp_path / "sub-01" / "anat" / f"sub-01_{name}.nii.gz", "map")
    before = state(tmp_path, acquisition)
    chi, rts = "sub-01/anat/sub-01_Chimap.nii.gz", "sub-01/anat/sub-01_desc-rts_Chimap.nii.gz"
    assert set(before) == {chi, rts}
    assert set(unchanged(tmp_path, before)) == {chi, rts}
    files.write(tmp_path / chi, "map")  # the same bytes, written all the same
    assert set(unchanged(tmp_path, before)) == {rts}
    joined = state(tmp_path, acquisition, joined=True)
    assert set(joined) == {"sub-01/anat/sub-01_desc-cosmos_Chimap.nii.gz"}


@contextmanager
def no_larger_than(size: int) -> Iterator[None]:
    """Let files grow to ``size`` bytes: a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def _written(path: Path, source: Path) -> None:
    files.write(path, "x" * 10_000)


def _copied(path: Path, source: Path) -> None:
    files.copy(source, path)


@pytest.mark.parametrize("make", [_written, _copied])
def test_what_does_not_fit_leaves_the_old_file_and_no_other(
    make: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * 10_000)
    path = tmp_path / "maps" / "sub-01_Chimap.nii.gz"
    files.write(path, "old")
    with no_larger_than(4096), pytest.raises(OSError, match="Chimap") as raised:
        make(path, source)
    assert raised.value.errno == errno.EFBIG
    assert raised.value.filename == str(path)
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == [path.name]
    make(path, source)
    assert path.stat().st_size == 10_000


def _keep_writing(path: Path, letter: str, count: int) -> None:
    for _ in range(count):
        files.write(path, letter * 100_000)


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    """Two processes write one file, a third reads it."""
    path = tmp_path / "deep" / "folder" / "file"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_keep_writing, args=(path, x, 5)) for x in "ab"]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            text = path.read_text()
            assert len(text) == 100_000
            assert len(set(text)) == 1
            seen.add(text[0])
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen <= {"a", "b"}
    assert os.listdir(path.parent) == ["file"]


def describe(out: Path) -> dict[str, object]:
    return dict(json.loads((out / "dataset_description.json").read_text()))


def test_the_description_keeps_what_earlier_runs_put_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    files.write(raw / "dataset_description.json", '{"Name": "balls", "BIDSVersion": "1.11.1"}')
    write_description(out, raw)
    files.write(out / ".bidsignore", "mine\n")
    first = (out / "dataset_description.json").read_bytes()
    write_description(out, raw)
    assert (out / "dataset_description.json").read_bytes() == first
    lines = (out / ".bidsignore").read_text().splitlines()
    assert lines[0] == "mine"
    assert "figures" in lines
    monkeypatch.setattr("qsmpipe.derivatives.__version__", "0.2.0")
    write_description(out, raw)
    made = describe(out)["GeneratedBy"]
    assert isinstance(made, list)
    assert [each["Version"] for each in made] == ["0.1.0", "0.2.0"]


def test_maps_of_two_datasets_do_not_share_a_folder(tmp_path: Path) -> None:
    """``bids:raw:`` in the sidecars would point into the wrong one."""
    for name in ("raw", "other"):
        files.write(tmp_path / name / "dataset_description.json", '{"Name": "balls"}')
    out = tmp_path / "out"
    write_description(out, tmp_path / "raw")
    with pytest.raises(ValueError, match=f"maps of another dataset, {tmp_path / 'raw'}"):
        write_description(out, tmp_path / "other")
    (tmp_path / "raw").rename(tmp_path / "moved")
    write_description(out, tmp_path / "moved")
    assert describe(out)["DatasetLinks"] == {"raw": "../moved"}
