"""The command line: words in any order, values that are checked, hints that help."""

import itertools
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qsmpipe.cli import dicom, main, train
from qsmpipe.cli.errors import Exit, RunError
from qsmpipe.cli.parser import build_parser, parse
from qsmpipe.settings import Settings

PLACES = ["in", "out", "participant"]
OPTIONS: list[tuple[list[str], dict[str, Any]]] = [
    (["--nprocs", "2"], {"nprocs": 2}),
    (["--participant-label", "01", "02"], {"participant_label": ("01", "02")}),
    (["--two-pass"], {"two_pass": True}),
    (["--uncertainty"], {"uncertainty": 16}),
    (["--b0-direction", "0", "-1e-3", "-.5"], {}),
    (["-w", "scratch"], {"work_dir": "scratch"}),
]


def settings_of(words: list[str] | str) -> Settings:
    return parse(shlex.split(words) if isinstance(words, str) else words).settings


@pytest.mark.parametrize("order", [*itertools.permutations(range(4))])
@pytest.mark.parametrize("option", range(len(OPTIONS)))
def test_folders_stand_before_behind_or_between_options(
    option: int, order: tuple[int, ...]
) -> None:
    """Wherever the option stands: the folders keep their own order, and nobody loses a word."""
    words, expected = OPTIONS[option]
    place = order.index(3)
    line = [*PLACES[:place], *words, *PLACES[place:]]
    settings = settings_of(line)
    assert (settings.bids_dir, settings.output_dir) == ("in", "out")
    for name, value in expected.items():
        assert getattr(settings, name) == value


@pytest.mark.parametrize(
    "line",
    [
        "--participant-label 01 02 -- in out participant",
        "--participant-label 01 02 in out participant --nprocs 2",
        "--nprocs 2 --participant-label 01 02 in out participant",
        "in --participant-label 01 02 out participant",
        "in out --participant-label 01 02 participant",
        "in out participant --participant-label 01 --participant-label 02",
        "--participant_label=01 in out participant --participant-label sub-02",
        "--set inversion.lambda=1e-4 --participant-label 01 02 in out participant",
    ],
)
def test_labels_and_folders_are_told_apart(line: str) -> None:
    settings = settings_of(line)
    assert (settings.bids_dir, settings.output_dir) == ("in", "out")
    assert settings.participant_label == ("01", "02")


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("--participant-label", "participant_label"),
        ("--session-label", "session_label"),
        ("--run-label", "run_label"),
        ("--acquisition-label", "acquisition_label"),
    ],
)
def test_a_list_that_is_given_twice_is_collected(option: str, name: str) -> None:
    settings = settings_of(["in", "out", "participant", option, "1", option, "2", "3"])
    assert getattr(settings, name) == ("1", "2", "3")


def test_derivatives_and_parameters_that_are_given_twice_are_collected() -> None:
    settings = settings_of(
        "in out participant -d a=/x -d b=/y --set inversion.edges=0.1 --set inversion.margin=9"
    )
    assert settings.derivatives == {"a": "/x", "b": "/y"}
    assert settings.parameters == {"inversion.tfi": {"edges": 0.1, "margin": 9}}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("m=/data/run=2/x", {"m": "/data/run=2/x"}),
        ("/data/a=b", {"derivatives": "/data/a=b"}),
        ("./a=b", {"derivatives": "./a=b"}),
        ("/x /y m=/z", {"m": "/z", "derivatives": "/x", "derivatives1": "/y"}),
        ("derivatives=/x /y", {"derivatives": "/x", "derivatives1": "/y"}),
    ],
)
def test_folders_of_derivatives_keep_their_equals_signs(
    words: str, expected: dict[str, str]
) -> None:
    assert settings_of(f"in out participant -d {words}").derivatives == expected


REFUSED = [
    ("-d m=/x m=/y", "/x and /y are both called 'm'"),
    ("-d m=/x -d m=/y", "/x and /y are both called 'm'"),
    ("-d =/x", "write NAME=DIR"),
    ("-d m=", "write NAME=DIR"),
    ("--mask-erosion -1", "--mask-erosion is -1.0: give a number of 0 or more"),
    ("--mask-erosion nan", "--mask-erosion is nan: give a finite number of 0 or more"),
    ("--mask-erosion -inf", "--mask-erosion -inf: give a finite number"),
    ("--mask-residual -1e-3", "--mask-residual is -0.001: give a number of 0 or more"),
    ("--nprocs -1", "--nprocs is -1: give a whole number above 0"),
    ("--nprocs 0", "--nprocs is 0: give a whole number above 0"),
    ("--nprocs 2.5", "invalid int value: '2.5'"),
    ("--omp-nthreads 0", "--omp-nthreads is 0: give a whole number above 0"),
    ("--mem-gb 0", "--mem-gb is 0.0: give a number above 0"),
    ("--mem 1.2.3G", "is no amount of memory"),
    ("--b0 -3", "--b0 is -3.0: give a number above 0"),
    ("--b0 inf", "--b0 is inf: give a finite number above 0"),
    ("--b0-direction 0 0 0", "b0_direction 0 0 0: give three finite numbers"),
    ("--b0-direction 0 nan 1", "entry 2 of --b0-direction is nan: give a finite number"),
    ("--b0-direction 0 1", "expected 3 arguments"),
    ("--uncertainty 1", "uncertainty 1: give 2 noisy fields or more"),
    ("--uncertainty -4", "--uncertainty is -4: give a whole number of 0 or more"),
    ("--work-dir ''", '--work-dir is "": give a text, not empty'),
    ("--set inversion.lambda=inf", "--set inversion.lambda is inf: give a finite number"),
    ("--inverison tv", "there is no option --inverison; did you mean --inversion?"),
    ("--participant 01", "there is no option --participant; did you mean --participant-label?"),
    ("--mask-e 1", "did you mean --mask-erosion?"),
    ("-x", "there is no option -x"),
    ("\u2013\u2013nprocs 2", "begins with a dash that is no hyphen"),
    ("--inversion tv,rtss", "inversion has no method 'rtss'"),
    ("--inversion tv,,rts", "inversion cannot be '' in 'tv,,rts'"),
    ("--background vsharp+none", "background cannot be 'none' in 'vsharp+none'"),
    ("--mask 'bet & '", "a method is missing"),
    ("stray", "'stray' belongs to no option, and bids_dir, output_dir, analysis_level are given"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=[words for words, _ in REFUSED])
def test_what_cannot_be_is_refused_before_anything_is_read(words: str, message: str) -> None:
    for mode in ("", " --dry-run"):
        with pytest.raises(RunError) as failure:
            parse(shlex.split(f"/nowhere out participant {words}{mode}"))
        assert failure.value.code is Exit.USAGE
        assert message in str(failure.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--participant-label 01 02", "of bids_dir, output_dir, analysis_level 3 cannot be found"),
        ("--participant-label 01 in out", "all words behind --participant-label are taken for"),
        (
            "--session-label 1 in out participant --participant-label 01 a b participant",
            "all words behind --session-label and --participant-label are taken for values",
        ),
        ("in out", "the following arguments are required: analysis_level"),
        ("", "the following arguments are required: bids_dir, output_dir, analysis_level"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(line: str, message: str) -> None:
    with pytest.raises(RunError, match=message) as failure:
        parse(shlex.split(line))
    assert failure.value.code is Exit.USAGE


def test_another_level_is_named_wherever_it_stands() -> None:
    for line in ("in out group", "--participant-label 01 in out group"):
        with pytest.raises(RunError, match="'group' is unknown") as failure:
            parse(line.split())
        assert failure.value.code is Exit.UNKNOWN_LEVEL


def test_a_folder_may_begin_with_a_hyphen() -> None:
    settings = settings_of("--nprocs 2 -- -in out participant")
    assert (settings.bids_dir, settings.output_dir) == ("./-in", "out")


def test_the_command_can_be_run_again() -> None:
    words = ["in", "out dir", "participant", "--mask", "bet & quality"]
    command = parse(words).command
    assert shlex.split(command) == ["qsmpipe", *words]


def test_series_numbers_and_folders_are_told_apart() -> None:
    parser = dicom._parser()
    given = parser.parse(["--series", "3", "4", "scans", "bids", "--participant-label", "01"])
    assert given.series == [3, 4]
    assert (str(given.dicom_dir), str(given.bids_dir)) == ("scans", "bids")
    for hours in ("-1", "0", "nan", "inf"):
        with pytest.raises(RunError, match="are no hours: give a number above 0"):
            train._parser().parse(["unet", "out", "--max-hours", hours])
    with pytest.raises(RunError, match="did you mean --max-hours"):
        train._parser().parse(["unet", "out", "--max-hour", "1"])


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x"])
def test_a_training_on_a_device_that_is_not_there_is_refused(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "si-qsm", str(tmp_path / "out"), "--device", device]) == Exit.USAGE
    assert f"qsmpipe: --device {device}: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_option_is_a_setting_and_every_list_collects() -> None:
    modes = {"help", "version", "verbose", "dry_run", "reports_only", "boilerplate_only",
             "config_file", "analysis_level", "set", "weights", "accept_licence",
             "job_of"}  # fmt: skip
    for action in build_parser()._actions:
        assert action.dest in modes or hasattr(Settings(), action.dest), action.dest
        if action.nargs == "+":
            assert type(action).__name__ == "_ExtendAction", action.dest


def test_reading_the_command_line_is_quick_and_imports_neither_torch_nor_nipype() -> None:
    probe = (
        "import sys\n"
        "from qsmpipe.cli.parser import parse\n"
        "parse('in out participant --preset small-animal --nprocs 2 --inversion tv,rts'.split())\n"
        "assert not {'torch', 'nipype', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", probe], check=True)


def test_all_that_may_refuse_a_run_comes_before_torch(tmp_path: Path) -> None:
    (tmp_path / "bids").mkdir()
    words = [str(tmp_path / "bids"), str(tmp_path / "out"), "participant", "--dry-run"]
    probe = (
        "import sys\n"
        "from qsmpipe.cli import parse, prepared\n"
        f"prepared(parse({words!r}))\n"
        "assert not {'torch', 'nipype', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", probe], check=True)
