"""A job of Slurm's for each subject: what it asks for, its script, and how it ends.

Here Slurm is played by scripts (fake_slurm.py); test_slurm_real.py starts a real one.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import pytest
from nipype.interfaces.utility import IdentityInterface
from nipype.pipeline.engine import Node
from nipype.pipeline.plugins import SLURMPlugin

from qsmpipe import files, records, slurm
from qsmpipe.cli import main
from qsmpipe.cli import slurm as jobs
from qsmpipe.cli.execute import ENDED_EARLY
from qsmpipe.cli.folders import absolute
from qsmpipe.cli.needs import needs
from qsmpipe.cli.queue import Job, State, mark
from qsmpipe.cli.resources import crash_proof
from qsmpipe.interfaces.uncertainty import Uncertainty
from qsmpipe.records import Failure, Record
from qsmpipe.settings import Settings
from qsmpipe.slurm import Resources, parse, script, seconds_of

QUICK = ["--mask", "threshold", "--offset", "none", "--relaxation", "none", "--background", "none",
         "--inversion", "tfi", "--skip-bids-validation",
         "--set", "inversion.lambda=1e-3", "inversion.margin=0.0",
         "inversion.max_iterations=2"]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin=a", "slurm: there is no key 'partitoin': one of partition, account"),
        ("partitoin=a", "did you mean 'partition'?"),
        ("mem=16", "slurm: mem='16': give an amount with its unit, as in 16G"),
        ("mem=0G", "slurm: mem='0G': give an amount"),
        ("time=soon", "slurm: time='soon': give minutes, 4:00:00, or 1-12 (days and hours)"),
        ("time=0:00:00", "slurm: time=0:00:00: give a time above 0"),
        ("cpus-per-task=0", "slurm: cpus-per-task='0': give a number above 0"),
        ("account=a b", "slurm: account='a b': give a name"),
        ("account=$(id)", "slurm: account='$(id)': give a name"),
        ("partition=a\n#SBATCH --uid=0", "give names, as in short,long"),
        ("account=", "slurm: account='': give a name"),
        ("mem=1G,mem=2G", "slurm: mem is given twice: 1G and 2G"),
        ("short", "slurm 'short': write auto, or key=value,key=value as in mem=16G,time=4:00:00"),
    ],
)
def test_a_value_that_cannot_be_is_refused_before_anything_is_read(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([str(tmp_path), str(tmp_path / "out"), "participant", "--slurm", text])
    assert code == 64
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_commas_belong_to_values_unless_a_key_follows() -> None:
    text = "partition=a,b,constraint=[x&y,z],gres=gpu:a100:2,lscratch:9,throttle=5"
    assert parse(text) == {
        "partition": "a,b",
        "constraint": "[x&y,z]",
        "gres": "gpu:a100:2,lscratch:9",
        "throttle": "5",
    }


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("2:30", 150), ("1:02:03", 3723), ("2-0", 172800), ("1-1:30", 91800),
     ("0-0:0:7", 7)],
)  # fmt: skip
def test_times_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


def test_a_job_asks_for_what_its_steps_need_and_the_user_has_the_last_word() -> None:
    needed = Resources(processors=4, memory_gb=5.2, seconds=3 * 3600 + 1)
    assert needed.request({}) == {"cpus-per-task": "4", "mem": "6G", "time": "3:30:00"}
    own = {"mem": "20G", "partition": "long", "throttle": "3"}
    assert needed.request(own) == {
        "cpus-per-task": "4", "mem": "20G", "time": "3:30:00", "partition": "long",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("own", "gres"), [({}, "gpu:1"), ({"gres": "gpu:a100:1"}, "gpu:a100:1"),
                      ({"gres": "lscratch:9"}, "lscratch:9,gpu:1")],
)  # fmt: skip
def test_steps_on_a_gpu_ask_for_one(own: dict[str, str], gres: str) -> None:
    assert Resources(1, 1, 1, use_gpu=True).request(own)["gres"] == gres


def node(name: str, memory: float, threads: int) -> Node:
    return Node(IdentityInterface(fields=["x"]), name=name, mem_gb=memory, n_procs=threads)


def test_needs_follow_from_the_nodes() -> None:
    nodes = [node("a", 1.0, 1), node("b", 3.0, 4), node("c", 2.0, 4)]
    own = needs(nodes, Settings(slurm="auto"))
    assert own.processors == 4
    assert own.memory_gb == pytest.approx(slurm.OVERHEAD_GB + 1.2 * 3.0)
    assert own.seconds == 900 + 3 * 60 + 6 * 600
    assert not own.use_gpu
    given = needs(nodes, Settings(slurm="auto", nprocs=2, mem_gb=9.0))
    assert (given.processors, given.memory_gb) == (2, 9.0)
    two = needs(nodes, Settings(slurm="cpus-per-task=8"))
    assert two.processors == 8
    assert two.memory_gb == pytest.approx(slurm.OVERHEAD_GB + 1.2 * 5.0), "two at a time"


def test_noisy_fields_take_their_time_each_and_a_step_on_a_gpu_makes_it_a_job_on_a_gpu() -> None:
    drawn = Node(Uncertainty(realisations=10, use_gpu=True), name="drawn", mem_gb=1.0)
    own = needs([drawn], Settings(slurm="auto"))
    assert own.seconds == 900 + 10 * (60 + 600)
    assert own.use_gpu
    assert own.processors == 2, "short steps on the CPU run side by side"


REQUEST = {"cpus-per-task": "1", "mem": "2G", "time": "2:00:00", "partition": "a,b"}


def run_script(folder: Path, command: list[str], task: int, *signals: int) -> int:
    """Run a task as Slurm would; signals go to its shell alone, once its app runs."""
    text = script(command, ["01", "02"], REQUEST, folder=str(folder), throttle="7")
    file = files.write(folder / "array.sh", text)
    shell = subprocess.Popen(
        ["bash", file.name], cwd=folder, env=os.environ | {"SLURM_ARRAY_TASK_ID": str(task)}
    )
    for number in signals:
        while not (folder / "sub-02.out").exists() or not (folder / "sub-02.out").read_text():
            time.sleep(0.02)
        shell.send_signal(number)
    return shell.wait(timeout=30)


def test_the_script_quotes_what_it_is_given_and_tells_how_the_app_ended(tmp_path: Path) -> None:
    folder = tmp_path / "a b; touch sprung $(touch sprung) 'c"
    folder.mkdir()
    command = ["bash", "-c", 'echo "$@"; exit 3', "app", "$(touch sprung)", "a  b"]
    assert run_script(folder, command, 2) == 3
    assert (folder / "sub-02.out").read_text() == "$(touch sprung) a  b --participant-label 02\n"
    assert (folder / "sub-02.ended").read_text() == "3\n"
    assert not (folder / "sub-02.late").exists()
    assert not [path for path in tmp_path.rglob("*") if path.name == "sprung"]
    asked = re.findall("^#SBATCH (.*)", (folder / "array.sh").read_text(), re.MULTILINE)
    assert asked == [
        "--job-name=qsmpipe", "--array=1-2%7", "--cpus-per-task=1", "--mem=2G", "--time=2:00:00",
        "--partition=a,b", "--output=slurm-%A_%a.out", "--signal=B:USR1@60",
    ]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_the_script_ends_its_app_when_time_is_up_and_waits_for_its_word(
    number: int, tmp_path: Path
) -> None:
    app = "trap 'sleep 0.5; exit 143' TERM; echo runs; while :; do sleep 0.05; done"
    assert run_script(tmp_path, ["bash", "-c", app], 2, number) == 143
    assert (tmp_path / "sub-02.ended").read_text() == "143\n"
    assert (tmp_path / "sub-02.late").exists() == (number == signal.SIGUSR1)


AGAIN = "the same command goes on from where it ended"


@pytest.mark.parametrize(
    ("state", "left", "told"),
    [
        (State("CANCELLED"), {"ended": "143"}, f"job 7_2 was cancelled; {AGAIN}"),
        (State("TIMEOUT"), {}, "job 7_2 ran out of its time (2:00:00): give more by --slurm "),
        (State("FAILED"), {"ended": "143", "late": ""}, "job 7_2 ran out of its time (2:00:00)"),
        (State("OUT_OF_MEMORY", 9), {}, "job 7_2 ran out of its memory (2G): give more by "),
        (State("NODE_FAIL"), {}, f"Slurm ended job 7_2 (NODE_FAIL); {AGAIN}"),
        (State("FAILED", 9), {}, f"job 7_2 was ended by SIGKILL; {AGAIN}"),
        (State("FAILED", 53), {}, f"job 7_2 was ended by signal 53; {AGAIN}"),
        (State(), {"ended": "137"}, f"the app of job 7_2 was ended by SIGKILL; {AGAIN}"),
        (State("FAILED"), {"ended": "73", "out": "a\nqsmpipe: no\n"},
         "job 7_2 ended with exit code 73: qsmpipe: no"),
        (State("FAILED"), {"ended": "1", "out": ""}, "sub-01.out holds nothing"),
        (State(), {}, "and Slurm does not tell why: can all machines write to that folder?"),
    ],
)  # fmt: skip
def test_a_job_that_fails_says_how(
    state: State, left: dict[str, str], told: str, tmp_path: Path
) -> None:
    for kind, text in left.items():
        (tmp_path / f"sub-01.{kind}").write_text(text)
    assert told in Job("7_2", "01", REQUEST, tmp_path).end(state)


def test_a_job_that_slurm_starts_anew_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was ended to make room (exit code 143), waits, and runs again."""
    settings = Settings(output_dir=str(tmp_path))
    folder = tmp_path / "logs" / "one" / "jobs"
    folder.mkdir(parents=True)
    job = Job("1_1", "01", REQUEST, folder)
    job.file("ended").write_text("143")
    told = iter([State("COMPLETING"), State("PENDING"), None, State("RUNNING"), State("FAILED")])

    def states(known: object) -> dict[str, State] | None:
        state = next(told)
        if state == State("RUNNING"):
            job.file("ended").write_text("1")
        return None if state is None else {"1_1": state}

    monkeypatch.setattr(jobs, "states", states)
    monkeypatch.setattr(jobs, "POLL", 0.01)
    waiting = {"1_1": job}
    assert list(jobs.finished(waiting, settings, "one")) == [(job, State("FAILED"))]
    assert waiting == {}
    assert next(told, "all asked") == "all asked"


def test_a_head_at_several_orientations_ends_with_the_job_of_its_subject(tmp_path: Path) -> None:
    names = {
        "sub-01_acq-a": "01",
        "sub-01_acq-b": "01",
        "sub-01_desc-cosmos": "01",
        "sub-02": "02",
    }
    started = {name: Record(name, subject, "one") for name, subject in names.items()}
    started["sub-01_acq-b"] = replace(started["sub-01_acq-b"], status="refused")
    records.write_record(tmp_path, replace(started["sub-01_acq-a"], status="done"))
    found = jobs.records_of(str(tmp_path), "one", started, "01", "no luck")
    assert [(name, record.status) for name, record in found.items()] == [
        ("sub-01_acq-a", "done"), ("sub-01_desc-cosmos", "failed"),
    ]  # fmt: skip
    assert found["sub-01_desc-cosmos"].failures == (Failure("job", "no luck"),)


def test_a_step_that_fails_for_want_of_memory_is_told_with_what_slurm_tells(
    tmp_path: Path,
) -> None:
    killed = Failure("tfi", "was killed by SIGKILL")
    record = Record("sub-01", "01", "one", status="failed", failures=(killed,))
    records.write_record(tmp_path, record)
    started = {"sub-01": Record("sub-01", "01", "one")}
    take = partial(jobs.records_of, str(tmp_path), "one", started, "01", "out of memory")
    assert take()["sub-01"].failures == (killed,)
    assert take(out_of_memory=True)["sub-01"].failures == (
        killed,
        Failure("job", "out of memory"),
    )


def test_paths_mean_the_same_in_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = absolute(Settings(bids_filter_file="filter.json", bids_database_dir="index"))
    assert found.bids_filter_file == str(tmp_path / "filter.json")
    assert found.bids_database_dir == str(tmp_path / "index")
    assert absolute(Settings()).bids_filter_file == ""


def test_a_plugin_of_nipypes_outlives_a_job_that_was_killed(tmp_path: Path) -> None:
    plugin = crash_proof("SLURM", {"max_jobs": 3})
    assert isinstance(plugin, SLURMPlugin)
    assert plugin.max_jobs == 3
    lost = node("lost", 1.0, 1)
    lost.base_dir = str(tmp_path)
    lost.config = {"execution": {"crashdump_dir": str(tmp_path), "crashfile_format": "txt"}}
    text = "OSError: Job id (7) finished or terminated, but results file does not exist"
    file = plugin._report_crash(lost, {"result": None, "traceback": text})
    assert text in Path(file).read_text()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the programs of a Slurm on the path, and give the folder of its state."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    source = Path(__file__).with_name("fake_slurm.py").read_text()
    for name in ("sbatch", "squeue", "scancel"):
        program = files.write(tmp_path / "bin" / name, f"#!{sys.executable}\n{source}")
        program.chmod(0o755)
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name, value in {"POLL": 0.2, "LAG": 1.0, "GRACE": 1.0, "SLOWEST": 1.0}.items():
        monkeypatch.setattr(jobs, name, value)
    return folder


def words(tmp_path: Path, *more: str) -> list[str]:
    return [str(tmp_path / "bids"), str(tmp_path / "out"), "participant", "-w",
            str(tmp_path / "work"), *QUICK, *more]  # fmt: skip


def failure(out: Path, name: str) -> str:
    (record,) = (r for r in records.read(out).current if r.name == name)
    assert record.status == "failed"
    (told,) = record.failures
    assert told.node == "job"
    return told.message


def test_one_job_maps_its_subject_and_others_end_in_their_own_errors(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "bids", tmp_path / "out"
    for label in ("01", "02", "03"):
        datasets.write(data, prefix=f"sub-{label}")
    datasets.write(data, prefix="sub-04", EchoTime=5)
    (fake / "fates.json").write_text(json.dumps({"2": "CANCELLED", "3": "OUT_OF_MEMORY"}))
    code = main(words(tmp_path, "--slurm", "cpus-per-task=1,mem=3G,time=30,throttle=2"))
    said = capsys.readouterr().err
    assert code == 1, said
    asked = "each with cpus-per-task=1, mem=3G, time=30"
    assert f"array 1: 3 jobs submitted, {asked}" in said
    assert "sub-01: job 1_1 done" in said
    assert "1 of 4 acquisitions done" in said
    assert failure(out, "sub-02") == f"job 1_2 was cancelled; {AGAIN}"
    assert failure(out, "sub-03") == (
        f"job 1_3 ran out of its memory (3G): give more by --slurm mem=; {AGAIN}"
    )
    assert (out / "sub-01/anat/sub-01_Chimap.nii.gz").is_file()
    book = records.read(out)
    (run,) = book.runs.values()
    assert run.finished is not None
    assert "--slurm cpus-per-task=1" in run.command
    by_name = {record.name: record for record in book.current}
    assert by_name["sub-04"].status == "refused"
    assert by_name["sub-01"].status == "done"
    assert by_name["sub-01"].plan == by_name["sub-02"].plan != ()
    assert {node.status for node in by_name["sub-01"].nodes} == {"done"}
    assert {path.name for path in out.glob("*.html")} == {
        "index.html", *(f"sub-0{n}.html" for n in range(1, 5)),
    }  # fmt: skip
    assert "job 1_2 was cancelled" in (out / "sub-02.html").read_text()
    own = out / "logs" / run.id / "jobs" / "sub-01_11-0"
    assert "--mem-gb 2 --device cpu" in (own.parent / "array-0.sh").read_text()
    assert "[Node] Executing" in (own / "qsmpipe.log").read_text()
    assert list((tmp_path / "work" / "slurm").iterdir()) == [], "no job is in the queue"


def test_a_stopped_run_cancels_its_jobs(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets.write(tmp_path / "bids")
    (fake / "fates.json").write_text(json.dumps({"1": "PartitionTimeLimit".lower()}))

    def stop() -> None:
        while not list(fake.glob("*.array")):
            time.sleep(0.1)
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    code = main(words(tmp_path, "--slurm", "auto"))
    thread.join()
    said = capsys.readouterr().err
    assert code == 143, said
    assert "sub-01: job 1_1 waits: partitiontimelimit" in said
    assert "stopped by SIGTERM: the same command goes on from where this run ended" in said
    assert (fake / "1_1.cancelled").exists()
    (record,) = records.read(tmp_path / "out").current
    assert (record.status, record.failures) == ("interrupted", ())
    assert "The run was stopped by SIGTERM" in (tmp_path / "out/sub-01.html").read_text()
    assert list((tmp_path / "work" / "slurm").iterdir()) == []


@pytest.mark.parametrize(
    "sudden", [False, True], ids=["the first that fails shall end all", "a fault of the command"]
)
def test_no_job_is_left_behind(
    sudden: bool, fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for label in ("01", "02"):
        datasets.write(tmp_path / "bids", prefix=f"sub-{label}")
    (fake / "fates.json").write_text(json.dumps({"1": "FAILED", "2": "resources"}))
    if sudden:
        monkeypatch.setattr(jobs, "records_of", {}.__getitem__)
        with pytest.raises(TypeError):
            main(words(tmp_path, "--slurm", "auto"))
    else:
        assert main(words(tmp_path, "--slurm", "auto", "--stop-on-first-crash")) == 1
        (record,) = (r for r in records.read(tmp_path / "out").current if r.name == "sub-02")
        assert record.failures == (Failure("job", ENDED_EARLY),)
    assert (fake / "1_2.cancelled").exists()
    assert list((tmp_path / "work" / "slurm").iterdir()) == []


def test_an_array_that_slurm_refuses_fails_with_its_words(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets.write(tmp_path / "bids")
    (fake / "fates.json").write_text(json.dumps({"refused": "Invalid account"}))
    assert main(words(tmp_path, "--slurm", "account=x,cpus-per-task=1,mem=3G,time=30")) == 1
    assert failure(tmp_path / "out", "sub-01") == (
        "Slurm refuses its job (cpus-per-task=1, mem=3G, time=30, account=x): Invalid account "
        "try again"
    )
    assert "Traceback" not in capsys.readouterr().err


def test_a_work_folder_that_jobs_of_another_run_use_is_refused(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That run was killed; its jobs are not."""
    datasets.write(tmp_path / "bids")
    (fake / "1.array").write_text("2")
    (fake / "fates.json").write_text(json.dumps({"1": "COMPLETED", "2": "Resources".lower()}))
    old = files.write(mark(Settings(work_dir=str(tmp_path / "work")), "one"), "1")
    assert main(words(tmp_path, "--slurm", "auto", "--dry-run")) == 64
    assert capsys.readouterr().err == (
        f"qsmpipe: --slurm: jobs of an earlier run may still use {tmp_path / 'work'}: wait for "
        "them, or end them (scancel 1)\n"
    )
    (fake / "1_2.cancelled").touch()
    assert main(words(tmp_path, "--slurm", "auto", "--dry-run")) == 0
    assert not old.exists()


def test_a_job_says_that_it_does_not_see_the_work_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets.write(tmp_path / "bids")
    assert main(words(tmp_path, "--participant-label", "01", "--job-of", "one")) == 73
    assert re.fullmatch(
        rf"qsmpipe: the work folder {tmp_path}/work is not the same on \S+ as where the jobs were "
        r"submitted: choose a --work-dir that all machines see\n",
        capsys.readouterr().err,
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"PATH": "/nowhere"}, "there is no sbatch on the PATH: run where jobs are submitted"),
        ({"QSMPIPE_CONTAINER": "docker"}, "jobs would start outside of this container: install "
         "qsmpipe without it, or submit containers/slurm.sh, whose jobs start the container"),
    ],
    ids=["no Slurm", "container"],
)  # fmt: skip
def test_where_no_job_can_be_submitted_one_line_says_so(
    environment: dict[str, str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    datasets.write(tmp_path / "bids")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(words(tmp_path, "--slurm", "auto")) == 69
    assert capsys.readouterr().err == f"qsmpipe: --slurm: {told}\n"


def test_two_who_say_where_steps_run_are_one_too_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets.write(tmp_path / "bids")
    assert main(words(tmp_path, "--slurm", "auto", "--use-plugin", "plugin.yml")) == 64
    assert (
        "slurm and use_plugin both say where steps run: leave one out" in capsys.readouterr().err
    )
