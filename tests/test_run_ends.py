"""How a run ends before its time: signals, kills, full disks; and two runs at once."""

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import datasets
import nibabel as nb
import numpy as np
import pytest
from nipype.interfaces.utility import Function
from nipype.pipeline.engine import Node, Workflow

from qsmpipe import checks, files, records
from qsmpipe.bids import Acquisition
from qsmpipe.cli import main, signals
from qsmpipe.cli.execute import Graph, complete, execute
from qsmpipe.cli.signals import Stopped, Watch
from qsmpipe.records import Record, Run, Step
from qsmpipe.reports import page
from qsmpipe.settings import Settings

QUICK = ["--mask", "threshold", "--offset", "none", "--relaxation", "none", "--background", "none",
         "--inversion", "tfi", "--skip-bids-validation", "--nprocs", "1",
         "--set", "inversion.lambda=1e-3", "inversion.margin=0.0"]  # fmt: skip
FEW = ["--set", "inversion.max_iterations=2"]
FOR_EVER = ["--set", "inversion.max_iterations=100000000", "inversion.tolerance=0.0"]

PATIENCE = 180.0
"""How long a start may take on a busy machine (s)."""


class Family:
    """A process whose descendants are known by their environment."""

    def __init__(self, words: list[str], **environment: str) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, *words],
            env=os.environ | environment | {"FAMILY": self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def members(self) -> list[int]:
        """List the processes that live, the first one and zombies left out."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if self.mark.encode() in (folder / "environ").read_bytes() and state != "Z":
                    found.append(int(folder.name))
            except OSError:
                continue
        return [pid for pid in found if pid != self.process.pid]

    def wait_for(self, told: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not told():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def end(self, number: int) -> tuple[int, str]:
        """Send a signal; give the exit code and what was said."""
        self.process.send_signal(number)
        said, _ = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, said

    def is_gone(self, seconds: float = 20.0) -> bool:
        deadline = time.monotonic() + seconds
        while self.members():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True


@pytest.fixture
def start() -> Iterator[Callable[..., Family]]:
    families: list[Family] = []

    def begin(words: list[str], **environment: str) -> Family:
        families.append(Family(words, **environment))
        return families[-1]

    yield begin
    for family in families:
        for pid in family.members():
            os.kill(pid, signal.SIGKILL)
        family.process.kill()
        family.process.wait()


SCRIPT = """
    import subprocess, sys, time
    from pathlib import Path

    def linger(folder, stubborn):
        import signal
        import subprocess
        import time
        from pathlib import Path
        from qsmpipe.interfaces.lease import lease
        if stubborn:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with lease() as device:
            subprocess.Popen(["sleep", "600"])
            Path(folder, "lingers").write_text(str(device))
            time.sleep(600)
        return 0

    if __name__ == "__main__":
        from nipype.interfaces.utility import Function
        from nipype.pipeline.engine import Node, Workflow
        from qsmpipe.cli.plugin import ProcessPerNode
        from qsmpipe.cli.signals import Stopped, stoppable
        folder, stubborn = sys.argv[1], sys.argv[2] == "stubborn"
        workflow = Workflow(name="long", base_dir=folder)
        node = Node(Function(["folder", "stubborn"], ["out"], linger), name="linger")
        node.inputs.folder, node.inputs.stubborn = folder, stubborn
        workflow.add_nodes([node])
        plugin = ProcessPerNode({"n_procs": 1, "log_file": folder + "/log"})
        with stoppable():
            try:
                workflow.run(plugin=plugin)
            except Stopped as stop:
                sys.exit(stop.code)
"""


def lock_of(tmp_path: Path) -> Path:
    (lock,) = (tmp_path / "qsmpipe-gpu").glob("*.lock")
    return lock


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [
        (signal.SIGTERM, "gentle", 143),
        (signal.SIGTERM, "stubborn", 143),
        (signal.SIGKILL, "stubborn", -signal.SIGKILL),
    ],
    ids=["terminated", "terminated, the node ignores it", "killed"],
)
def test_nodes_end_with_their_run(
    number: int, kind: str, code: int, tmp_path: Path, start: Callable[..., Family]
) -> None:
    """And what the nodes have started; their GPUs are free again."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    fake = {"CUDA_VISIBLE_DEVICES": "GPU-0123", "TMPDIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    family = start([str(script), str(tmp_path), kind], **fake)
    family.wait_for((tmp_path / "lingers").exists)
    with lock_of(tmp_path).open() as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        begin = time.monotonic()
        found, said = family.end(number)
        assert found == code, said
        assert time.monotonic() - begin < 20, "docker waits for 10 s, on a machine that is idle"
        if number == signal.SIGKILL:  # the kernel ends the node; what it started is on its own
            survivors = [p for p in family.members() if b"sleep" not in cmdline(p)]
            deadline = time.monotonic() + 20
            while survivors and time.monotonic() < deadline:
                time.sleep(0.1)
                survivors = [p for p in family.members() if b"sleep" not in cmdline(p)]
            assert survivors == []
        else:
            assert family.is_gone()
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def cmdline(pid: int) -> bytes:
    try:
        return Path("/proc", str(pid), "cmdline").read_bytes()
    except OSError:
        return b""


def test_signals_of_one_moment_are_one_wish_and_a_later_one_ends_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    now = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    watch = Watch()
    with pytest.raises(Stopped, match="SIGTERM") as stop:
        watch(signal.SIGTERM, None)
    assert stop.value.code == 143
    now += 0.5
    watch(signal.SIGTERM, None)  # passed on by a wrapper
    watch(signal.SIGHUP, None)
    assert ended == []
    now += 1.0
    watch(signal.SIGINT, None)
    assert ended == [130]


def test_what_must_not_be_left_half_done_comes_to_its_end() -> None:
    watch = Watch()
    steps = []

    def hold() -> None:
        with watch.held():
            watch(signal.SIGINT, None)
            steps.append("done")

    with pytest.raises(Stopped, match="SIGINT"):
        hold()
    assert steps == ["done"]


def app(data: Path, folder: Path, *words: str) -> list[str]:
    return ["-m", "qsmpipe", str(data), str(folder / "out"), "participant", "-w",
            str(folder / "work"), *QUICK, *words]  # fmt: skip


def record_of(out: Path, name: str) -> Record:
    (found,) = (r for r in records.read(out).current if r.name == name)
    return found


def executed(out: Path, run: int) -> set[str]:
    log = sorted(out.glob("logs/*/qsmpipe.log"))[run]
    return set(re.findall(r'\[Node\] Executing "(\w+)"', log.read_text()))


def inverts(out: Path, run: int) -> bool:
    return len(list(out.glob("logs/*/qsmpipe.log"))) > run and "tfi" in executed(out, run)


def test_a_stopped_run_reports_and_the_next_one_resumes(
    tmp_path: Path, start: Callable[..., Family]
) -> None:
    data, out = datasets.write(tmp_path / "bids"), tmp_path / "out"
    stops = ((signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "SIGINT"))
    for run, (number, code, name) in enumerate(stops):
        family = start(app(data, tmp_path, *FOR_EVER))
        family.wait_for(partial(inverts, out, run))
        found, said = family.end(number)
        assert found == code, said
        assert "Traceback" not in said
        assert f"stopped by {name}: the same command goes on from where this run ended" in said
        assert family.is_gone()
        record = record_of(out, "sub-01")
        assert record.status == "interrupted"
        assert record.failures == ()
        assert records.read(out).runs[record.run].stopped_by == name
        html = (out / "sub-01.html").read_text()
        assert f"The run was stopped by {name} before this acquisition was done" in html
        assert "Stopped before it was done" in (out / "index.html").read_text()
    assert executed(out, 0) >= {"prepare", "romeo", "tfi"}
    assert executed(out, 1) == {"tfi"}, "all that was done stands"


def test_two_runs_at_once_lose_nothing_and_a_third_changes_no_page_of_theirs(
    tmp_path: Path, start: Callable[..., Family]
) -> None:
    data, out = tmp_path / "bids", tmp_path / "out"
    for subject in ("sub-01", "sub-02"):
        datasets.write(data, prefix=subject)
    plugin = tmp_path / "linear.yml"
    plugin.write_text("plugin: Linear\n")  # all nodes in the run's own process: fast
    families = [
        start(["-m", "qsmpipe", str(data), str(out), "participant", "-w", str(tmp_path / label),
               *QUICK, *FEW, "--participant-label", label, "--use-plugin", str(plugin)])
        for label in ("01", "02")
    ]  # fmt: skip
    for family in families:
        said, _ = family.process.communicate(timeout=3 * PATIENCE)
        assert family.process.returncode == 0, said
    book = records.read(out)
    assert [(r.name, r.status) for r in book.current] == [("sub-01", "done"), ("sub-02", "done")]
    assert len({r.run for r in book.current}) == 2
    index = (out / "index.html").read_text()
    methods = (out / "logs" / "CITATION.md").read_text()
    assert "2 subjects, 2 acquisitions" in index
    assert "2 acquisitions of 2 participants were processed" in methods
    for record in book.current:
        run = book.runs[record.run]
        label = record.subject
        assert f" --participant-label {label} " in run.command
        assert run.finished is not None
        assert f"sub-{label}.html#sub-{label}" in index
        html = (out / f"sub-{label}.html").read_text()
        assert html.rstrip().endswith("</html>")
        assert f"--participant-label {label}" in html
        assert f"--participant-label {'0201'.replace(label, '')}" not in html
        own = (out / "logs" / run.id / "CITATION.md").read_text()
        assert "1 acquisition of 1 participant was processed" in own
        assert (out / f"sub-{label}/anat/sub-{label}_Chimap.nii.gz").is_file()
    description = json.loads((out / "dataset_description.json").read_text())
    assert len(description["GeneratedBy"]) == 1
    assert "figures" in (out / ".bidsignore").read_text().splitlines()
    assert [path for path in out.rglob(".*") if path.name != ".bidsignore"] == []

    first, chi = (out / "sub-01.html").read_bytes(), out / "sub-02/anat/sub-02_Chimap.nii.gz"
    before = datasets.state(out / "sub-02")
    for sidecar in data.glob("sub-02/anat/*.json"):
        sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"EchoTime": 5}))
    family = start(app(data, tmp_path, *FEW, "--participant-label", "02"))
    said, _ = family.process.communicate(timeout=PATIENCE)
    assert family.process.returncode == 65, said
    maker = book.current[1].run
    told = f"{len(list(out.glob('sub-02/*/*.nii.gz')))} maps of an earlier run stay, though this"
    assert told in said
    assert f"by run {maker}; delete or move them unless wanted" in said
    assert datasets.state(out / "sub-02") == before
    (earlier,) = record_of(out, "sub-02").earlier
    assert earlier.run == maker
    assert chi.relative_to(out).as_posix() in earlier.files
    html = (out / "sub-02.html").read_text()
    assert told in html
    assert "The maps in this folder are of this run" in html
    assert (out / "sub-01.html").read_bytes() == first
    code = main([*app(data, tmp_path)[2:], "--reports-only"])
    assert code == 0
    assert (out / "sub-01.html").read_bytes() == first


def test_an_index_misses_no_record_that_comes_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run ends between reading the records and writing the index."""
    out = tmp_path / "out"
    records.write_run(out, Run("one"))
    records.write_record(out, Record("sub-01", "01", "one", status="refused"))
    built = page.build_index

    def slow(output: Path, book: records.Logbook) -> Path:
        if "two" not in book.runs:
            records.write_run(out, Run("two"))
            records.write_record(out, Record("sub-02", "02", "two", status="refused"))
        return built(output, book)

    monkeypatch.setattr(page, "build_index", slow)
    assert main([str(datasets.write(tmp_path / "bids")), str(out), "participant",
                 "--reports-only"]) == 0  # fmt: skip
    assert "2 subjects, 2 acquisitions" in (out / "index.html").read_text()


def test_a_fault_in_the_report_of_one_subject_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    records.write_run(out, Run("one"))
    for label in ("01", "02", "03"):
        records.write_record(out, Record(f"sub-{label}", label, "one", status="refused"))
    built = page.build_subject

    def faulty(output: Path, subject: str, book: records.Logbook) -> Path:
        if subject == "02":
            raise KeyError(subject)
        return built(output, subject, book)

    monkeypatch.setattr(page, "build_subject", faulty)
    assert main([str(datasets.write(tmp_path / "bids")), str(out), "participant",
                 "--reports-only"]) == 1  # fmt: skip
    said = capsys.readouterr().err
    assert "sub-02: its report cannot be written: KeyError: '02'" in said
    assert "Traceback" not in said
    assert {path.name for path in out.glob("*.html")} == {
        "sub-01.html",
        "sub-03.html",
        "index.html",
    }
    assert "3 subjects, 3 acquisitions" in (out / "index.html").read_text()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_gives_out_is_one_line_and_an_exit_code(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """While the records are written; all acquisitions are refused, so that it is quick."""
    data, out = datasets.write(tmp_path / "bids", EchoTime=5), tmp_path / "out"
    whole = files.write

    def full(path: Path, text: str) -> Path:
        if "acquisitions" in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return whole(path, text)

    monkeypatch.setattr(files, "write", full)
    assert main(app(data, tmp_path)[2:]) == 74
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"qsmpipe: cannot write to {out}/logs/")
    assert f"{os.strerror(number)}; free space or mend the disk, or choose another output" in last
    assert f"what was computed is kept in {tmp_path / 'work'}" in last


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that takes 150 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", folder]).returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_output_disk_leaves_whole_maps_and_the_rerun_the_rest(
    small_disk: Path, tmp_path: Path, start: Callable[..., Family]
) -> None:
    data, out = datasets.write(tmp_path / "bids"), small_disk / "out"
    words = app(data, tmp_path, *FEW)
    words[3] = str(out)
    family = start(words)
    said, _ = family.process.communicate(timeout=3 * PATIENCE)
    assert family.process.returncode == 74, said
    assert "Traceback" not in said
    assert f"cannot write to {out}" in said
    assert "No space left on device; free space or mend the disk" in said
    assert [path for path in out.rglob(".*") if path.name != ".bidsignore"] == []
    maps = list(out.glob("sub-01/*/*.nii.gz"))
    for path in maps:
        assert np.isfinite(nb.load(path).get_fdata()).all()
        assert json.loads(path.with_name(path.name[:-7] + ".json").read_text())["Sources"]
    for path in out.rglob("*.json"):
        json.loads(path.read_text())
    subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)
    assert main(words[2:]) == 0
    assert len(list(out.glob("sub-01/*/*.nii.gz"))) > len(maps)
    assert executed(out, 1) == {"derivatives"}, "all that was computed stands"


APPTAINER = """#!/bin/bash
trap 'sleep 1; exit 143' TERM
touch "$FOLDER/runs"
[ -z "$QUICK" ] || exit "$QUICK"
while :; do sleep 0.1; done
"""


@pytest.mark.parametrize(("quick", "code"), [("0", 0), ("1", 1), ("", 143)])
def test_a_slurm_job_passes_the_signal_on_and_keeps_its_work_until_it_is_done(
    quick: str, code: int, tmp_path: Path
) -> None:
    program = tmp_path / "bin" / "apptainer"
    files.write(program, APPTAINER)
    program.chmod(0o755)
    subjects = files.write(tmp_path / "subjects.txt", "01\n02\n")
    script = Path(__file__).parents[1] / "containers" / "slurm.sh"
    job = subprocess.Popen(
        ["bash", script, "/data", tmp_path / "out", subjects],
        env={"PATH": f"{program.parent}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "2", "USER": "me",
             "SLURM_CPUS_PER_TASK": "4", "SCRATCH": str(tmp_path), "QUICK": quick,
             "FOLDER": str(tmp_path)},
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not (tmp_path / "runs").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    if not quick:
        job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=30) == code
    assert (tmp_path / "qsmpipe-me" / "02").exists() == (code != 0)


def _write(name: str) -> tuple[list[str], dict[str, object]]:
    steps = [{"stage": "inversion", "method": name}]
    return [], {"steps": steps, "numbers": [], "figures": []}


def _fail() -> None:
    msg = "no such luck"
    raise ValueError(msg)


def test_an_acquisition_that_is_done_is_on_record_at_once(tmp_path: Path) -> None:
    """While the others still run, whatever becomes of them."""
    out = tmp_path / "out"
    log_file = files.write(out / "logs" / "one" / "qsmpipe.log", "")
    workflow = Workflow("run_wf", base_dir=str(tmp_path / "work"))
    crashes = {"crashdump_dir": str(log_file.parent), "crashfile_format": "txt"}
    workflow.config["execution"] = crashes
    acquisitions = []
    for name in ("sub_01", "sub_02"):
        acquisition = Workflow(f"{name}_wf")
        derivatives = Node(Function(["name"], ["files", "record"], _write), "derivatives")
        derivatives.inputs.name = "tv"
        acquisition.add_nodes([derivatives])
        acquisitions.append(acquisition)
    failing = Node(Function([], [], _fail), "tv")
    acquisitions[1].connect(failing, "out", acquisitions[1].get_node("derivatives"), "name")
    subject = Workflow("subject_wf")
    subject.add_nodes(acquisitions)
    workflow.add_nodes([subject])
    names = {"sub-01": "sub_01_wf", "sub-02": "sub_02_wf"}
    graph = Graph(workflow, names, {}, {}, use_gpu=False, plugin=("Linear", {}))
    started = {name: Record(name, name[-2:], "one") for name in names}
    settings = Settings(work_dir=str(tmp_path / "work"), nprocs=1)
    kept: list[Record] = []
    ending = execute(graph, settings, started, log_file=log_file, keep=kept.append)
    assert [(record.name, record.status) for record in kept] == [("sub-01", "done")]
    assert kept[0].steps == (Step("inversion", "tv"),)
    ended = complete(graph, ending, started, settings, log_file=log_file)
    assert ended["sub-01"] == kept[0]
    assert ended["sub-02"].status == "failed"
    assert [(f.node, f.message) for f in ended["sub-02"].failures] == [("tv", "no such luck")]


def test_a_fault_of_the_input_check_refuses_one_acquisition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "bids"
    for subject in ("sub-01", "sub-02"):
        datasets.write(data, prefix=subject)
    examine = checks.examine

    def faulty(acquisition: Acquisition, **choices: object) -> checks.Examination:
        if acquisition.subject == "01":
            raise IndexError(7)
        return examine(acquisition, **choices)  # type: ignore[arg-type]

    monkeypatch.setattr(checks, "examine", faulty)
    assert main([*app(data, tmp_path)[2:], "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "the input check itself failed (IndexError: 7, in " in said
    assert said.count("-> refused") == 1
    assert said.count("-> would be processed") == 1
