"""No two nodes on one GPU: what a lease owes other processes, and nodes that run side by side."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from traceback import format_exception
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nipype.interfaces.base import traits
from nipype.interfaces.base.support import Bunch
from nipype.pipeline.engine import Node, Workflow
from nipype.pipeline.plugins.slurm import SLURMPlugin

from qsmpipe.chain import Chain
from qsmpipe.cli.errors import RunError
from qsmpipe.cli.execute import Graph, _cause, _runner
from qsmpipe.cli.plugin import ProcessPerNode
from qsmpipe.cli.progress import RunProgress
from qsmpipe.cli.resources import has_gpu, read_plugin
from qsmpipe.interfaces import lease as leases
from qsmpipe.interfaces.base import Stage, StageInputSpec
from qsmpipe.interfaces.lease import VISIBLE, lease, visible_devices
from qsmpipe.numerics.inversion import tkd
from qsmpipe.settings import Settings
from qsmpipe.workflows.inversion import init_inversion_wf
from qsmpipe.workflows.qsm import init_qsm_wf
from qsmpipe.workflows.stage import take_gpus

UUIDS = ["GPU-11111111-aaaa-bbbb-cccc-000000000000", "GPU-22222222-aaaa-bbbb-cccc-000000000000"]

CUDA_STARTED = leases._cuda_started

HOLDER = """
import sys, time
from qsmpipe.interfaces.lease import lease
assert "torch" not in sys.modules
with lease() as device:
    print(device, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Put a host without CUDA in place, whose nvidia-smi lists the devices it is given."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, value in (("PATH", str(programs)), ("TMPDIR", str(tmp_path))):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name in (VISIBLE, "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(leases, "POLL", 0.01)
    monkeypatch.setattr(leases, "_cuda_started", lambda: False)

    def install(uuids: list[str]) -> None:
        lines = "\n".join(f"{index}, {uuid}" for index, uuid in enumerate(uuids))
        script = programs / "nvidia-smi"
        script.write_text(f"#!/bin/sh\necho '{lines}'\n")
        script.chmod(0o755)

    return install


@contextmanager
def other_process() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Let a process hold a lease until its standard input closes; give it and the device."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        stdin=-1,
        stdout=-1,
        text=True,
        cwd=Path(__file__).parents[1],
    ) as process:
        yield process, process.stdout.readline().strip()


@pytest.mark.parametrize(
    ("variable", "uuids", "expected"),
    [
        (None, [], []),
        (None, UUIDS, UUIDS),
        ("", UUIDS, []),
        ("-1", UUIDS, []),
        ("NoDevFiles", [], []),
        ("0,1", [], ["0", "1"]),
        ("1, 0", UUIDS, ["1", "0"]),
        ("0,-1,1", UUIDS, ["0"]),
        ("0,2,1", UUIDS, ["0"]),  # there is no third
        ("0,0", UUIDS, []),
        ("GPU-2222", UUIDS, ["GPU-2222"]),
        ("MIG-33333333-aaaa", UUIDS, ["MIG-33333333-aaaa"]),
    ],
)
def test_devices_are_those_that_cuda_would_see(
    variable: str | None,
    uuids: list[str],
    expected: list[str],
    host: Callable[[list[str]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if uuids:
        host(uuids)
    if variable is not None:
        monkeypatch.setenv(VISIBLE, variable)
    assert visible_devices() == expected


@pytest.mark.parametrize(("one", "other"), [("1", UUIDS[1]), ("GPU-2222", "1"), (None, UUIDS[0])])
def test_a_device_has_one_lock_whatever_it_is_called(
    one: str | None,
    other: str,
    host: Callable[[list[str]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host(UUIDS)
    if one is not None:
        monkeypatch.setenv(VISIBLE, one)
    name = next(iter(leases._locks().values()))
    monkeypatch.setenv(VISIBLE, other)
    assert [*leases._locks().values()] == [name]


def test_device_0_of_two_slurm_jobs_is_not_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "0")
    names = set()
    for job in ("7", "8"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        names |= {*leases._locks().values()}
    assert len(names) == 2
    monkeypatch.setenv(VISIBLE, UUIDS[0])
    assert [*leases._locks().values()] == UUIDS[:1]


def test_without_a_device_there_is_none_to_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    with lease() as device:
        assert device is None
        assert VISIBLE not in os.environ
    monkeypatch.setenv(VISIBLE, "-1")
    with lease() as device:
        assert device is None
        assert os.environ[VISIBLE] == "-1"


@pytest.mark.parametrize("variable", [None, "1,0"])
def test_cuda_sees_the_device_held_alone(
    variable: str | None, host: Callable[[list[str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    host(UUIDS)
    if variable is not None:
        monkeypatch.setenv(VISIBLE, variable)
    with lease() as device:
        assert os.environ[VISIBLE] == device == (UUIDS[0] if variable is None else "1")
    assert os.environ.get(VISIBLE) == variable


def test_all_users_of_the_host_may_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "0")
    before = os.umask(0o077)
    try:
        with lease():
            pass
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(before)
    folder = tmp_path / "qsmpipe-gpu"
    assert folder.stat().st_mode & 0o7777 == 0o1777
    assert [path.stat().st_mode & 0o7777 for path in folder.iterdir()] == [0o666]


def test_another_process_gets_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "0,1")
    with other_process() as (_, theirs), lease() as own:
        assert (theirs, own) == ("0", "1")


def test_a_lease_waits_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VISIBLE, "0")
    said = []
    monkeypatch.setattr(leases.logger, "info", lambda text, *words: said.append(text % words))
    with other_process() as (process, _):
        looks = iter(range(3))
        sleep = time.sleep

        def look(seconds: float) -> None:
            if next(looks, None) is None and process.poll() is None:
                process.communicate("\n")
            sleep(seconds)

        monkeypatch.setattr(leases.time, "sleep", look)
        with lease() as device:
            assert process.poll() == 0
            assert device == "0"
    assert said == ["waiting for a GPU: other nodes or runs hold 0"]


def _link_to_folder(folder: Path, victim: Path) -> None:
    folder.symlink_to(victim, target_is_directory=True)


def _dangling_link(folder: Path, victim: Path) -> None:
    folder.symlink_to(victim / "nowhere")


def _file(folder: Path, victim: Path) -> None:
    folder.write_text("")


def _open_to_all(folder: Path, victim: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def _linked_lock(folder: Path, victim: Path) -> None:
    folder.mkdir(0o755)
    (folder / "0.lock").symlink_to(victim / "file")


def _hard_linked_lock(folder: Path, victim: Path) -> None:
    folder.mkdir(0o755)
    (folder / "0.lock").hardlink_to(victim / "file")


def _pipe(folder: Path, victim: Path) -> None:
    folder.mkdir(0o755)
    os.mkfifo(folder / "0.lock")


PLANTED = {
    _link_to_folder: "qsmpipe-gpu (of user {user}) cannot be used: it is a link",
    _dangling_link: "qsmpipe-gpu (of user {user}) cannot be used: it is a link",
    _file: "qsmpipe-gpu (of user {user}) cannot be used: Not a directory",
    _open_to_all: "qsmpipe-gpu (of user {user}) cannot be used: all may remove each other's files",
    _linked_lock: "0.lock (of user {user}) cannot be used: it is a link",
    _hard_linked_lock: "0.lock (of user {user}) cannot be used: no file of its own",
    _pipe: "0.lock (of user {user}) cannot be used: no file of its own",
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_what_somebody_planted_in_place_of_the_locks_is_refused(
    plant: Callable[[Path, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VISIBLE, "0")
    victim = tmp_path / "home"
    victim.mkdir()
    (victim / "file").write_text("precious")
    os.utime(victim / "file", ns=(0, 0))
    plant(tmp_path / "qsmpipe-gpu", victim)
    with pytest.raises(RuntimeError) as raised, lease():
        pass
    assert PLANTED[plant].format(user=os.getuid()) in str(raised.value)
    assert "set TMPDIR to another folder" in str(raised.value)
    assert [path.name for path in victim.iterdir()] == ["file"]
    assert (victim / "file").stat().st_mtime_ns == 0


def test_the_kernel_frees_what_a_killed_process_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "0")
    with other_process() as (process, theirs):
        assert theirs == "0"
        process.kill()
        with lease() as device:
            assert device == "0"


def test_cuda_that_has_started_keeps_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that serves several nodes: the second waits for its own, though one is free."""
    monkeypatch.setenv(VISIBLE, "0,1")
    with other_process() as (process, _):
        with lease() as device:
            assert device == "1"
            monkeypatch.setattr(leases, "_cuda_started", lambda: True)
        process.communicate("\n")
    assert os.environ[VISIBLE] == "1"
    with lease() as device:
        assert device == "1"
    assert visible_devices() == ["1"]


def test_cuda_that_started_before_any_lease_computes_on_its_first_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VISIBLE, "1,0")
    monkeypatch.setattr(leases, "_cuda_started", lambda: True)
    for _ in range(2):
        with lease() as device:
            assert device == "1"
        assert os.environ[VISIBLE] == "1,0"


@pytest.mark.parametrize(("code", "started"), [(3, False), (0, True)])  # 3: not initialised
def test_the_driver_tells_whether_cuda_has_started(
    code: int, started: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    driver = SimpleNamespace(cuDeviceGetCount=lambda _: code)
    monkeypatch.setattr(leases.ctypes, "CDLL", lambda *_, **__: driver)
    assert CUDA_STARTED() == started
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert CUDA_STARTED()


def wait_until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < end, "what this waits for does not happen"
        time.sleep(0.02)


class _NapInputSpec(StageInputSpec):
    folder = traits.Str(desc="where it leaves what it did")
    together = traits.Int(desc="nodes that must have begun before one ends")
    after = traits.Str("", usedefault=True, desc="file that must exist before it asks for a GPU")
    dies = traits.Bool(False, usedefault=True, desc="kill the process amid its lease")


class Nap(Stage):
    """Note when, and on which device."""

    input_spec = _NapInputSpec
    stage = method = "nap"
    function = staticmethod(tkd)

    def _run_interface(self, runtime: Bunch) -> Bunch:
        wait_until(lambda: not self.inputs.after or Path(self.inputs.after).exists())
        return super()._run_interface(runtime)

    def _compute(self, cwd: Path, device: torch.device) -> None:
        folder, own = Path(self.inputs.folder), os.environ[VISIBLE]
        begin = time.monotonic()
        (folder / f"{cwd.name}.begin").write_text(own)
        if self.inputs.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        wait_until(lambda: len([*folder.glob("nap*.begin")]) >= self.inputs.together)
        time.sleep(0.6)  # on a busy machine, processes start that long after one another
        note = {"begin": begin, "end": time.monotonic(), "device": own}
        (folder / f"{cwd.name}.json").write_text(json.dumps(note))


def run_naps(name: str, naps: int, slots: int, *, dying: bool = False) -> None:
    """Run nodes on GPUs in the folder ``name``."""
    folder = Path(name).absolute()
    folder.mkdir()
    workflow = Workflow(name="wf", base_dir=str(folder))
    workflow.config["execution"] = {"crashdump_dir": str(folder), "poll_sleep_duration": 0.02,
                                    "crashfile_format": "txt"}  # fmt: skip
    inputs = {"folder": str(folder), "together": min(naps, 2), "use_gpu": True}
    after = str(folder / "dies.begin") if dying else ""
    nodes = [Node(Nap(**inputs, after=after), name=f"nap{n}") for n in range(naps)]
    if dying:
        nodes.append(Node(Nap(**inputs, dies=True), name="dies"))
    workflow.add_nodes(nodes)
    take_gpus(workflow)
    arguments = {"n_procs": 8, "n_gpu_procs": slots, "log_file": str(folder / "log")}
    try:
        workflow.run(plugin=ProcessPerNode(arguments))
    except RuntimeError as error:
        (folder / "error").write_text(str(error))


@pytest.fixture(scope="module")
def naps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run graphs on a host with two devices, from a process that was told so at its start."""
    folder = tmp_path_factory.mktemp("naps")
    script = """
from qsmpipe.cli.server import PRELOAD
from test_lease import run_naps
PRELOAD.append("test_lease")  # once, not in each node's process
run_naps("pair", 2, 2)
run_naps("crowd", 4, 4)
run_naps("killed", 2, 3, dying=True)
"""
    environment = os.environ | {
        VISIBLE: "0,1",
        "TMPDIR": str(folder),
        "PATH": "",
        "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}",
    }
    subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, check=True)
    return folder


def intervals(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in folder.glob("nap*.json")]
    return sorted(found, key=lambda one: one["begin"])


def overlap(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one["begin"] < other["end"] and other["begin"] < one["end"]


@pytest.mark.parametrize(("graph", "count"), [("pair", 2), ("crowd", 4), ("killed", 2)])
def test_nodes_run_side_by_side_and_never_on_one_device(
    naps: Path, graph: str, count: int
) -> None:
    """With as many slots as nodes: Nipype starts them all, and the lease alone keeps order."""
    ran = intervals(naps / graph)
    assert len(ran) == count
    assert {one["device"] for one in ran} == {"0", "1"}
    side_by_side = [pair for pair in combinations(ran, 2) if overlap(*pair)]
    assert side_by_side
    for one, other in side_by_side:
        assert one["device"] != other["device"]
    waited = "waiting for a GPU" in (naps / graph / "log").read_text()
    assert waited or graph != "crowd"


def test_a_node_killed_on_its_device_ends_in_an_error_and_frees_it(naps: Path) -> None:
    """The two others ask later, and need both devices: side by side, as shown above."""
    folder = naps / "killed"
    assert (folder / "dies.begin").read_text() in ("0", "1")
    assert "dies was killed by SIGKILL" in (folder / "error").read_text()


def test_a_step_names_its_device_on_a_gpu_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VISIBLE, "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    warned = []
    monkeypatch.setattr(
        "qsmpipe.interfaces.base.logger.warning", lambda text, *words: warned.append(text % words)
    )
    inputs = {"folder": str(tmp_path), "together": 0}
    step = Nap(**inputs, use_gpu=True).run(cwd=str(tmp_path)).outputs.step
    assert step["device"] == "cpu"
    assert warned == ["nap: no CUDA device is visible; running on the CPU"]
    assert "device" not in Nap(**inputs).run(cwd=str(tmp_path)).outputs.step


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried", "cuFFT error: CUFFT_ALLOC_FAILED"])
def test_too_little_memory_ends_in_one_line(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(name="NVIDIA Small", total_memory=8 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(Stage, "_device", lambda _: torch.device("cuda"))

    def fails(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError(f"{said}\nto allocate")

    monkeypatch.setattr(Nap, "_compute", fails)
    nap = Nap(use_gpu=True)
    line = r"nap .*NVIDIA Small.* 8\.0 GiB: .*--device cpu"
    with pytest.raises(RuntimeError, match=f"^{line}$") as raised:
        nap.run(cwd=str(tmp_path))
    assert re.fullmatch(line, _cause("".join(format_exception(raised.value))))
    assert nap._step["device"] == "cuda:NVIDIA Small"


@pytest.mark.parametrize("use_gpu", [True, False])
def test_nodes_on_a_gpu_and_no_others_ask_for_one(use_gpu: bool) -> None:
    workflow = init_qsm_wf(
        echoes=3,
        chain=Chain(background="vsharp", inversion="tv", uncertainty=3),
        omp_nthreads=4,
        use_gpu=use_gpu,
    )
    take_gpus(workflow)
    nodes = [workflow.get_node(name) for name in workflow.list_node_names()]
    asking = {node.name for node in nodes if node.plugin_args}
    assert asking == {node.name for node in nodes if getattr(node.inputs, "use_gpu", False)}
    on_gpu = {"prepare", "vsharp", "tv", "realisations", "weighted"}
    assert asking >= on_gpu if use_gpu else not asking
    assert {node.n_procs for node in nodes if node.name in on_gpu} == {1 if use_gpu else 4}


def test_slurm_hears_the_users_arguments_and_then_the_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/heard\necho Submitted batch job 7\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("LOGNAME", "me")
    workflow = init_inversion_wf(method="tkd", use_gpu=True)
    workflow.base_dir = str(tmp_path)
    plugin = SLURMPlugin(plugin_args={"sbatch_args": "-p long --mem=9G"})
    script = str(tmp_path / "job.sh")
    assert plugin._submit_batchtask(script, workflow.get_node("tkd")) == 7
    assert (tmp_path / "heard").read_text().startswith("-p long --mem=9G --gres=gpu:1 -o ")


def test_a_run_has_as_many_gpu_slots_as_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slots(settings: Settings, *, use_gpu: bool) -> dict[str, Any]:
        graph = Graph(Workflow("slots"), {}, {}, {}, use_gpu, read_plugin(settings.use_plugin))
        runner = _runner(graph, settings, tmp_path / "log", RunProgress({}))
        plugin = runner["plugin"]
        if not settings.use_plugin:
            assert plugin.n_gpu_procs == plugin.plugin_args["n_gpu_procs"]
        return plugin.plugin_args

    monkeypatch.setenv(VISIBLE, "0,1")
    assert slots(Settings(), use_gpu=True)["n_gpu_procs"] == 2
    own = tmp_path / "plugin.yml"
    own.write_text("plugin: MultiProc\nplugin_args: {}\n")
    chosen = replace(Settings(), use_plugin=str(own))
    assert slots(chosen, use_gpu=True)["n_gpu_procs"] == 2
    assert "n_gpu_procs" not in slots(chosen, use_gpu=False)
    own.write_text("plugin: MultiProc\nplugin_args: {n_gpu_procs: 1}\n")
    assert slots(chosen, use_gpu=True)["n_gpu_procs"] == 1
    monkeypatch.delenv(VISIBLE)  # CUDA sees a device, and nvidia-smi is missing
    assert slots(Settings(), use_gpu=True)["n_gpu_procs"] == 1


def test_a_host_that_submits_jobs_needs_no_gpu_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert has_gpu("cuda", ("SLURM", {}))
    assert not has_gpu("auto", ("SLURM", {}))
    with pytest.raises(RunError, match="no CUDA device"):
        has_gpu("cuda", None)


def test_nodes_one_after_another_in_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the node asks Slurm for is nothing to the plugin that runs it here."""
    monkeypatch.setenv(VISIBLE, "0,1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    workflow = Workflow(name="wf", base_dir=str(tmp_path))
    inputs = {"folder": str(tmp_path), "together": 0, "use_gpu": True}
    workflow.add_nodes([Node(Nap(**inputs), name=f"nap{n}") for n in range(2)])
    take_gpus(workflow)
    workflow.run(plugin="Linear")
    assert [one["device"] for one in intervals(tmp_path)] == ["0", "0"]
    assert os.environ[VISIBLE] == "0,1"
