"""The app as a user runs it: a dataset in, derivatives, report and exit code out."""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nb
import numpy as np
import pytest
from nipype.interfaces.utility import Function
from nipype.pipeline.engine import Node, Workflow
from nipype.pipeline.engine.utils import load_resultfile

from qsmpipe import __version__, examples
from qsmpipe.cli import main
from qsmpipe.cli.errors import RunError
from qsmpipe.cli.plugin import ProcessPerNode
from qsmpipe.cli.resources import read_plugin
from qsmpipe.nets.cards import read_card

EXAMPLES = Path(__file__).parents[1] / "bids_examples"
QUICK = ["--mask", "bet & quality", "--background", "vsharp", "--inversion", "tkd",
         "--skip-bids-validation"]  # fmt: skip
PROCESSES = ["--nprocs", "2"]
"""A process for each node, as users have it; tests of what comes out take one for all."""


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def listing(folder: Path) -> list[str]:
    found = [*folder.glob("sub-*.html"), *folder.glob("sub-*/**/*")]
    return sorted(str(path.relative_to(folder)) for path in found if path.is_file())


def executed(out: Path, run: int = -1) -> set[str]:
    """Names of the nodes that were computed, not cached, in a run of the app."""
    log = sorted(out.glob("logs/*/qsmpipe.log"))[run]
    return set(re.findall(r'\[Node\] Executing "(\w+)"', log.read_text()))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for all nodes in this process, by one thread: fast beside other tests."""
    plugin = tmp_path_factory.mktemp("plugin") / "linear.yml"
    plugin.write_text("plugin: Linear\nplugin_args: {}\n")
    return ["--use-plugin", str(plugin), "--omp-nthreads", "1"]


@pytest.fixture(scope="module")
def app(
    one_process: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[int, Path]]:
    def run(
        dataset: str | Path, *options: str, folder: Path | None = None, out: str = "out"
    ) -> tuple[int, Path]:
        folder = folder or tmp_path_factory.mktemp("app")
        source = EXAMPLES / dataset if isinstance(dataset, str) else dataset
        words = [str(source), str(folder / out), "participant", "-w", str(folder / "work")]
        where = () if {"--nprocs", "--use-plugin"} & set(options) else one_process
        return main([*words, *QUICK, *where, *options]), folder / out

    return run


@pytest.fixture(scope="module")
def first(app: Callable[..., tuple[int, Path]]) -> Path:
    before = tree(EXAMPLES / "gre3t")
    code, out = app("gre3t", *PROCESSES)
    assert code == 0
    assert tree(EXAMPLES / "gre3t") == before, "the input was written to"
    return out


@pytest.mark.parametrize("example", ["gre3t", "gre7t", "mixed"])
def test_every_example_yields_its_files(
    example: str, app: Callable[..., tuple[int, Path]], first: Path
) -> None:
    out = first if example == "gre3t" else app(example)[1]
    assert listing(out) == (EXAMPLES / f"{example}.txt").read_text().split()
    validated(out)


def validated(out: Path) -> None:
    """Insist on no error of bids-validator, where it is installed."""
    validator = shutil.which("bids-validator-deno", path=Path(sys.executable).parent)
    if not validator:
        pytest.skip("bids-validator-deno is not installed (extra 'test')")
    found = subprocess.run([validator, out, "--format", "json"], capture_output=True, check=False)
    issues = json.loads(found.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []


def test_a_region_of_ones_own_and_all_that_lies_between(
    app: Callable[..., tuple[int, Path]], tmp_path: Path
) -> None:
    truth = EXAMPLES / "gre3t" / "derivatives" / "truth" / "sub-01" / "anat"
    tissue = nb.load(truth / "sub-01_dseg.nii.gz")
    names = dict(
        reversed(row.split("\t"))
        for row in (truth / "sub-01_dseg.tsv").read_text().splitlines()[1:]
    )
    masks = tmp_path / "masks" / "sub-01" / "anat"
    masks.mkdir(parents=True)
    shutil.copy(truth / "sub-01_desc-brain_mask.nii.gz", masks)
    region = np.asarray(tissue.dataobj) == int(names["ventricle"])
    ventricle = nb.Nifti1Image(region.astype(np.uint8), tissue.affine)
    ventricle.to_filename(masks / "sub-01_label-ventricle_mask.nii.gz")
    code, out = app(
        "gre3t", "--mask", "given & quality", "--reference", "region:ventricle",
        "-d", f"mine={tmp_path / 'masks'}", "--intermediates", folder=tmp_path,
    )  # fmt: skip
    assert code == 0
    anat, fmap = out / "sub-01" / "anat", out / "sub-01" / "fmap"
    trusted = nb.load(anat / "sub-01_desc-qsm_mask.nii.gz").get_fdata() > 0
    chi = nb.load(anat / "sub-01_Chimap.nii.gz").get_fdata()
    before = nb.load(anat / "sub-01_desc-unreferenced_Chimap.nii.gz").get_fdata()
    sidecar = json.loads((anat / "sub-01_Chimap.json").read_text())
    assert abs(chi[trusted & region].mean()) < 1e-6
    np.testing.assert_allclose(
        (before - chi)[trusted], sidecar["ReferenceValue"], rtol=0, atol=1e-6
    )
    assert sidecar["ReferenceRegion"] == "ventricle"
    for name in ("desc-quality_T2starw", "part-phase_desc-offset_T2starw",
                 "part-phase_desc-unwrapped_T2starw"):  # fmt: skip
        assert (anat / f"sub-01_{name}.nii.gz").exists()
    assert (fmap / "sub-01_desc-noise_fieldmap.nii.gz").exists()
    validated(out)


def test_the_maps_are_near_the_truth_and_say_how_they_came(first: Path) -> None:
    path = first / "sub-01" / "anat" / "sub-01_Chimap.nii.gz"
    chi = nb.load(path).get_fdata()
    mask = nb.load(next(first.glob("sub-*/anat/*_desc-qsm_mask.nii.gz"))).get_fdata() > 0
    truth_root = EXAMPLES / "gre3t" / "derivatives" / "truth"
    truth = nb.load(next(truth_root.glob("sub-*/anat/*Chimap.nii.gz"))).get_fdata()
    assert np.corrcoef(chi[mask], truth[mask])[0, 1] > 0.6
    assert abs(chi[mask].mean()) < 1e-4, "referenced to the brain"
    sidecar = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())
    assert sidecar["Units"] == "ppm"
    assert sidecar["SkullStripped"] is True
    assert all(source.startswith("bids:raw:sub-") for source in sidecar["Sources"])
    text = json.dumps(sidecar)
    for expected in ("vsharp", "radii", "tkd", "threshold", "0.15", __version__, "torch"):
        assert expected in text, expected


def test_images_aligned_to_a_template_give_the_same_map(
    app: Callable[..., tuple[int, Path]], first: Path, tmp_path: Path
) -> None:
    """An sform of code 4, turned by 35 degrees, stands beside the scanner's qform."""
    dataset = tmp_path / "bids"
    shutil.copytree(EXAMPLES / "gre3t", dataset, ignore=shutil.ignore_patterns("derivatives"))
    turn = np.eye(4)
    turn[1:3, 1:3] = np.array([[0.8191520, -0.5735764], [0.5735764, 0.8191520]])
    for path in dataset.rglob("*.nii.gz"):
        old = nb.load(path)
        image = nb.Nifti1Image(old.dataobj.get_unscaled(), None, old.header)
        image.header.set_slope_inter(old.dataobj.slope, old.dataobj.inter)
        image.set_qform(old.affine, code=1)
        image.set_sform(turn @ old.affine, code=4)
        image.to_filename(path)
    code, out = app(dataset, folder=tmp_path)
    assert code == 0
    chi = "sub-01/anat/sub-01_Chimap"
    mine, other = nb.load(out / f"{chi}.nii.gz"), nb.load(first / f"{chi}.nii.gz")
    np.testing.assert_allclose(mine.get_fdata(), other.get_fdata(), atol=1e-5)
    source = nb.load(next(dataset.rglob("*echo-1_part-phase*.nii.gz")))
    for name in ("qform", "sform"):
        kept, came = (getattr(x, f"get_{name}")(coded=True) for x in (mine, source))
        np.testing.assert_array_equal(kept[0], came[0])
        assert kept[1] == came[1]
    sidecar = json.loads((out / f"{chi}.json").read_text())
    assert sidecar["B0Direction"] == [0, 0, 1]
    assert sidecar["B0DirectionSource"] == "qform (code 1, scanner)"
    assert "turned by 35.0 degrees" in sidecar["InputWarnings"][0]


def test_two_runs_give_the_same_bytes_by_whatever_plugin(
    app: Callable[..., tuple[int, Path]], first: Path, tmp_path: Path
) -> None:
    """The second has one thread, and one process for all nodes."""
    code, second = app("gre3t")
    assert code == 0
    mine, other = tree(first), tree(second)
    images = [name for name in mine if name.endswith((".nii.gz", "map.json", "mask.json"))]
    assert len(images) == 20
    assert [name for name in images if mine[name] != other[name]] == []
    plugin = tmp_path / "plugin.yml"
    plugin.write_text("plugin: SLURMGraph\n")
    assert app("gre3t", "--use-plugin", str(plugin), folder=tmp_path)[0] == 64


def test_a_second_run_computes_nothing_and_a_new_option_only_what_follows(
    app: Callable[..., tuple[int, Path]], first: Path
) -> None:
    everything = executed(first)
    assert {"prepare", "mcpc3ds", "bet", "romeo", "vsharp", "tkd"} <= everything
    again = {"folder": first.parent, "out": "again"}  # with the first run's work folder
    _, out = app("gre3t", **again)
    assert executed(out) <= {"derivatives"}
    app("gre3t", "--set", "inversion.threshold=0.2", **again)
    gathered = {"steps", "figures", "captions", "numbers"}
    after_inversion = {"tkd", "brain", "reportlets_chi", "derivatives"} | gathered
    assert {"tkd", "derivatives"} <= executed(out) <= after_inversion
    app("gre3t", "--background", "resharp", **again)
    after_background = after_inversion | {"resharp", "reportlets"}
    assert {"resharp", "tkd", "derivatives"} <= executed(out) <= after_background


def test_a_failed_acquisition_does_not_stop_the_others(
    app: Callable[..., tuple[int, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, masks = tmp_path / "bids", tmp_path / "masks"
    shutil.copytree(EXAMPLES / "gre3t", dataset, ignore=shutil.ignore_patterns("derivatives"))
    (subject,) = dataset.glob("sub-*")
    other = dataset / "sub-other"
    for path in subject.rglob("*"):
        if path.is_file():
            target = other / path.relative_to(subject)
            target = target.with_name(target.name.replace(subject.name, other.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    magnitude = nb.load(next(subject.rglob("*echo-*1_part-mag*.nii.gz")))
    brain = (magnitude.get_fdata() > np.median(magnitude.get_fdata())).astype(np.uint8)
    speck = np.zeros_like(brain)
    speck[20:22, 20:22, 20:22] = 1
    for name, mask in ((subject.name, brain), (other.name, speck)):
        target = masks / name / "anat" / f"{name}_desc-brain_mask.nii.gz"
        target.parent.mkdir(parents=True)
        nb.Nifti1Image(mask, magnitude.affine).to_filename(target)
    options = ["--mask", "given", "--mask-erosion", "6", "--derivatives", f"masks={masks}"]
    code, out = app(dataset, *options, *PROCESSES, folder=tmp_path)
    assert code == 1
    assert list(out.glob(f"{subject.name}/anat/*_Chimap.nii.gz"))
    assert not list(out.glob("sub-other/anat/*_Chimap.nii.gz"))
    said = capsys.readouterr().err
    (line,) = [text for text in said.splitlines() if "failed in" in text]
    assert "eroding by 6 mm emptied the mask" in line
    crash = re.search(r"crash file (\S+?)\)", line)
    assert crash
    assert Path(crash[1]).exists()
    assert "eroding by 6 mm emptied the mask" in (out / "sub-other.html").read_text()
    record = json.loads(next(out.glob("logs/*/acquisitions/sub-other*")).read_text())
    assert record["status"] == "failed"


def test_a_dry_run_writes_nothing_and_names_every_parameter(
    app: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = app("gre7t", "--dry-run", "--set", "inversion.threshold=0.3")
    said = capsys.readouterr().out
    assert code == 0
    assert not out.exists()
    assert "inversion.threshold = 0.3" in said
    assert "background.radii" in said
    assert "would be processed" in said


def test_reports_can_be_written_anew(first: Path, app: Callable[..., tuple[int, Path]]) -> None:
    before = next(first.glob("sub-*.html")).read_bytes()
    for page in first.glob("*.html"):
        page.unlink()
    code, _ = app("gre3t", "--reports-only", folder=first.parent)
    assert code == 0
    assert next(first.glob("sub-*.html")).read_bytes() == before
    assert (first / "index.html").exists()


def test_the_methods_text_comes_without_a_run(
    app: Callable[..., tuple[int, Path]],
) -> None:
    code, out = app("gre3t", "--boilerplate-only", "--inversion", "rts")
    assert code == 0
    assert "rapid two-step" in next(out.glob("logs/*/CITATION.md")).read_text()
    assert "kames" in next(out.glob("logs/*/CITATION.bib")).read_text().lower()
    assert not (out / "logs" / "CITATION.md").exists(), "it tells of what was not done"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["{data}", "{out}", "group"], 17, "group"),
        (["{data}", "{out}"], 64, "analysis_level"),
        (["{data}", "{out}", "participant", "--inverison", "tv"], 64, "--inverison"),
        (["{data}", "{out}", "participant", "--set", "inversion.lamda=1"], 64, "did you mean"),
        (["{data}", "{data}", "participant"], 64, "dataset itself"),
        (["{data}", "{data}/sub-01/anat", "participant"], 64, "among the dataset's own files"),
        (["{data}", "{data}/sub-new/qsm", "participant"], 64, "among the dataset's own files"),
        (["{data}", "{out}", "participant", "-w", "{data}/work"], 64, "inside the dataset"),
        (["{data}", "{out}", "participant", "--use-plugin", "{out}.yml"], 64, "No such file"),
        (["/nowhere", "{out}", "participant"], 66, "no such folder"),
        (["{data}", "/proc/out", "participant", "--skip-bids-validation"], 73, "cannot write"),
        (["{data}", "{out}", "participant", "--participant-label", "99"], 18, ""),
        (["{data}", "{out}", "participant", "--device", "cuda"], 64, "no CUDA device"),
        (["{data}", "{out}", "participant", "--mask", "given"], 64, "--derivatives"),
        (
            ["{data}", "{out}", "participant", "--config_file", "/nowhere"],
            64,
            "/nowhere: No such file",
        ),
        (
            ["{data}", "{out}", "participant", "--set", "inversion.tfi.edges=1.5"],
            64,
            "inversion.tfi.edges is 1.5: give a number of 0 or more and below 1",
        ),
        (
            ["{data}", "{out}", "participant", "--set", "inversion.tfi.lambda=-1"],
            64,
            "inversion.tfi.lambda is",
        ),
        (
            ["{data}", "{out}", "participant", "--set", "mask.bet.fractional_intensity=3"],
            64,
            "mask.bet.fractional_intensity is 3: give a number above 0 and below 1",
        ),
    ],
)
def test_what_cannot_start_says_why(
    words: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if "--device" in words and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    places = {"data": EXAMPLES / "gre3t", "out": tmp_path / "out"}
    words = [word.format(**places) for word in words]
    if "-w" not in words and len(words) > 2:
        words += ["--work-dir", str(tmp_path / "work"), "--skip_bids_validation"]
    # A dry run writes nothing, so that it does not know where it may not write.
    for mode in ([], ["--dry-run"] if code != 73 else []):
        assert main([*words, *mode]) == code
        said = capsys.readouterr().err
        assert message in said
        assert "Traceback" not in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "it holds 'plugin: NAME'"),
        ("plugin: 3", "it holds 'plugin: NAME'"),
        ("plugin: Linear\nplugin_args: [1]", "may hold 'plugin_args"),
        (
            "plugin: SLURMGraph",
            "never tells what became of it; use SLURM",
        ),
        ("plugin: Slurm", "Nipype has no plugin 'Slurm': choose from Debug, Linear"),
        ("plugin: [", "while parsing"),
        ("plugin: \xff", "use-plugin"),
    ],
)
def test_a_plugin_that_cannot_be_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "plugin.yml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=message) as failure:
        read_plugin(str(file))
    assert str(failure.value).startswith(f"--use-plugin {file}: ")
    assert "\n" not in str(failure.value)


def test_refused_data_end_in_65_and_a_page(
    app: Callable[..., tuple[int, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = tmp_path / "bids"
    shutil.copytree(EXAMPLES / "gre3t", dataset, ignore=shutil.ignore_patterns("derivatives"))
    for sidecar in dataset.rglob("*MEGRE.json"):
        fields = json.loads(sidecar.read_text())
        if "EchoTime" in fields:
            fields["EchoTime"] *= 1000
            sidecar.write_text(json.dumps(fields))
    code, out = app(dataset, folder=tmp_path)
    assert code == 65
    assert "refused" in capsys.readouterr().err
    assert "refused" in next(out.glob("logs/*/qsmpipe.log")).read_text()
    assert "refused" in next(out.glob("sub-*.html")).read_text().lower()
    assert not list(out.glob("sub-*/anat/*"))


def test_help_is_quick_and_needs_neither_torch_nor_nipype() -> None:
    probe = (
        "import sys, time; t = time.perf_counter(); from qsmpipe.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'nipype', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True)


def _die() -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def _live() -> int:
    return 3


def test_a_killed_node_ends_in_an_error_and_the_rest_goes_on(tmp_path: Path) -> None:
    workflow = Workflow(name="killed", base_dir=str(tmp_path))
    workflow.config["execution"] = {"crashdump_dir": str(tmp_path), "poll_sleep_duration": 0.05}
    dies = Node(Function([], ["out"], _die), name="dies")
    lives = Node(Function([], ["out"], _live), name="lives")
    workflow.add_nodes([dies, lives])
    plugin = ProcessPerNode({"n_procs": 1, "log_file": os.fspath(tmp_path / "log")})
    with pytest.raises(RuntimeError, match="SIGKILL"):
        workflow.run(plugin=plugin)
    assert (tmp_path / "killed" / "lives" / "result_lives.pklz").exists()


def _faults() -> float:
    """Pages that images made and freed in turn fetch from the system, as a share of theirs."""
    import resource

    import torch

    image = torch.ones(2**24)
    before, rounds = 0, 10
    for n in range(rounds + 1):
        if n == 1:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        more = image + 1
        twice = more * 2
        del more, twice
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return faults * resource.getpagesize() / (2 * rounds * image.nbytes)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is kept with glibc alone")
def test_a_node_keeps_the_memory_of_freed_images(tmp_path: Path) -> None:
    workflow = Workflow(name="memory", base_dir=str(tmp_path))
    workflow.config["execution"] = {"poll_sleep_duration": 0.05}
    workflow.add_nodes([Node(Function([], ["out"], _faults), name="faults")])
    workflow.run(plugin=ProcessPerNode({"n_procs": 1, "log_file": os.fspath(tmp_path / "log")}))
    result = load_resultfile(tmp_path / "memory" / "faults" / "result_faults.pklz")
    assert result.outputs.out < 0.5


def test_the_demo_recipe_exists() -> None:
    assert "demo" in examples.RECIPES


def test_several_inversions_share_what_comes_before_them(
    app: Callable[..., tuple[int, Path]],
) -> None:
    """A classical one and a network, which takes the voxels of 4 mm as they are."""
    as_is = ["--set", "inversion.unet.grid=native", "--set", "inversion.unet.mirror=false"]
    code, out = app("gre3t", "--background", "vsharp+pdf", "--inversion", "tkd, unet", *as_is)
    assert code == 0
    anat = out / "sub-01" / "anat"
    names = ["", "_desc-unet", "_desc-median"]
    maps = [nb.load(anat / f"sub-01{name}_Chimap.nii.gz").get_fdata() for name in names]
    sidecars = [json.loads((anat / f"sub-01{name}_Chimap.json").read_text()) for name in names]
    known = nb.load(anat / "sub-01_desc-qsm_mask.nii.gz").get_fdata() > 0
    np.testing.assert_allclose(maps[2][known], (maps[0] + maps[1])[known] / 2, atol=1e-6)
    assert np.abs(maps[0] - maps[1])[known].max() > 0.01
    for sidecar, method in zip(sidecars, ("tkd", "unet"), strict=False):
        steps = [(s["stage"], s["method"]) for s in sidecar["ProcessingSteps"]]
        assert [m for stage, m in steps if stage == "background"] == ["vsharp", "pdf"]
        assert [m for stage, m in steps if stage == "inversion"] == [method]
    (step,) = (s for s in sidecars[1]["ProcessingSteps"] if s["stage"] == "inversion")
    assert step["parameters"]["weights"] == "unet"
    assert step["parameters"]["sha256"] == read_card("unet")[1].sha256
    assert "3D U-Net (weights unet)" in (out / "logs" / "CITATION.md").read_text()
    assert sidecars[0]["ReferenceValue"] != sidecars[1]["ReferenceValue"]
    assert "k-space division; network: 3D U-Net" in sidecars[2]["EstimationAlgorithm"]
    assert executed(out) >= {"vsharp", "pdf", "tkd", "unet", "median"}
    page = (out / "sub-01.html").read_text()
    assert "Inversions side by side" in page
    validated(out)


def test_a_head_of_a_tenth_of_the_size_gives_the_same_map(
    one_process: list[str], tmp_path: Path
) -> None:
    """The dipole has no size: with the preset for small animals no length of the chain has one."""
    large, small = EXAMPLES / "gre3t", tmp_path / "small"
    shutil.copytree(large, small, ignore=shutil.ignore_patterns("derivatives"))
    for path in small.rglob("*.nii.gz"):
        image = nb.load(path)
        stored = np.asarray(image.dataobj.get_unscaled())
        shrunk = nb.Nifti1Image(stored, np.diag([0.1, 0.1, 0.1, 1.0]) @ image.affine, image.header)
        shrunk.header["scl_slope"], shrunk.header["scl_inter"] = (
            image.dataobj.slope, image.dataobj.inter,
        )  # fmt: skip
        shrunk.to_filename(path)
    common = ["--relaxation", "none", "--skip-bids-validation", *one_process]
    chain = ["--mask", "threshold & quality", "--background", "vsharp", "--inversion", "rts"]
    maps = []
    for dataset, options in ((large, chain), (small, ["--preset", "small-animal"])):
        out, work = tmp_path / f"out-{dataset.name}", tmp_path / f"work-{dataset.name}"
        words = [str(dataset), str(out), "participant", "-w", str(work)]
        assert main([*words, *common, *options]) == 0
        maps.append(nb.load(out / "sub-01" / "anat" / "sub-01_Chimap.nii.gz"))
    assert maps[1].header.get_zooms() == pytest.approx((0.42, 0.42, 0.42))
    chi = [np.asarray(each.dataobj) for each in maps]
    assert np.count_nonzero(chi[0]) > 10_000
    np.testing.assert_allclose(chi[1], chi[0], rtol=0, atol=1e-5)


def test_the_standard_deviation_of_susceptibility(app: Callable[..., tuple[int, Path]]) -> None:
    code, out = app("gre3t", "--uncertainty", "3")
    assert code == 0
    anat = out / "sub-01" / "anat"
    deviation = nb.load(anat / "sub-01_desc-std_Chimap.nii.gz").get_fdata()
    known = nb.load(anat / "sub-01_desc-qsm_mask.nii.gz").get_fdata() > 0
    assert (deviation[known] > 0).all()
    assert not deviation[~known].any()
    sidecar = json.loads((anat / "sub-01_desc-std_Chimap.json").read_text())
    assert sidecar["Units"] == "ppm"
    assert "ReferenceValue" not in sidecar
    assert sidecar["ProcessingSteps"][-1]["parameters"]["realisations"] == 3
    assert "Uncertainty of susceptibility" in (out / "sub-01.html").read_text()
    validated(out)
