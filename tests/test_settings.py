"""Settings: layers, assignments, and messages that help."""

import inspect
import math
import re
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from phantoms import TILT, phantom

from qsmpipe.methods import function_of, parameters_of
from qsmpipe.settings import Settings, combine, parse_assignments, presets, read
from qsmpipe.workflows.stage import interface_with


def test_the_command_line_beats_the_file_which_beats_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('preset = "fast"\ninversion = "rts"\nunwrap = "laplacian"\n')
    settings = combine({"unwrap": "romeo"}, str(file))
    assert settings.field == presets()["fast"]["field"]
    assert settings.inversion == "rts"
    assert settings.unwrap == "romeo"
    assert settings.preset == "fast"


def test_parameters_of_a_method_that_was_replaced_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('inversion = "tkd"\n[parameters.inversion]\nthreshold = 0.2\n')
    assert combine({}, str(file)).parameters_for("inversion") == {"tkd": {"threshold": 0.2}}
    assert combine({"inversion": "tv"}, str(file)).parameters_for("inversion") == {"tv": {}}


@pytest.mark.parametrize(
    ("file", "command_line", "expected"),
    [
        # What was meant for TV stays with TV, whatever runs beside it.
        ('inversion = "tv"\nparameters.inversion.mu = 0.5', {"inversion": "tv,rts"},
         {"tv": {"mu": 0.5}, "rts": {}}),
        ('inversion = "tv,rts"\nparameters.inversion.delta = 0.2', {"inversion": "rts"},
         {"rts": {"delta": 0.2}}),
        ('inversion = "tv,rts"\nparameters.inversion.delta = 0.2', {"inversion": "tv"},
         {"tv": {}}),
        ('inversion = "tv"\n[parameters."inversion.tv"]\nmu = 0.5', {"inversion": "rts"},
         {"rts": {}}),
        ('inversion = "tv"\n[parameters."inversion.tv"]\nmu = 0.5',
         {"parameters": {"inversion": {"mu": 2.0}}}, {"tv": {"mu": 2.0}}),
        ('inversion = "tv"\nparameters.inversion.mu = 0.5',
         {"parameters": {"inversion.tv": {"mu": 2.0}}}, {"tv": {"mu": 2.0}}),
        ('inversion = "tv"\nparameters.inversion.lambda = 1e-4',
         {"parameters": {"inversion": {"lambda_": 2e-4}}}, {"tv": {"lambda_": 2e-4}}),
        # Made ready for a method that is chosen later.
        ('[parameters."inversion.tv"]\nmu = 0.5', {"inversion": "tv"}, {"tv": {"mu": 0.5}}),
        # Meant for TFI, which the file's own preset runs.
        ("parameters.inversion.lambda = 1e-4", {"preset": "fast"}, {"l2": {}}),
        ('preset = "fast"\nparameters.inversion.lambda = 1e-4', {}, {"l2": {"lambda_": 1e-4}}),
    ],
)  # fmt: skip
def test_a_parameter_stays_with_its_method(
    file: str, command_line: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(file)
    assert combine(command_line, str(path)).parameters_for("inversion") == expected


def test_masks_keep_the_parameters_of_those_that_stay(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[parameters.mask]\nfractional_intensity = 0.4\nopening = 3.0\n")
    assert combine({"mask": "bet"}, str(path)).parameters_for("mask") == {
        "bet": {"fractional_intensity": 0.4}
    }
    assert combine({"mask": "given & quality"}, str(path)).parameters_for("mask") == {
        "quality": {"opening": 3.0}
    }


def test_a_parameter_of_a_method_that_nobody_ran_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('inversion = "tv"\n[parameters."inversion.tkd"]\nthreshold = 0.2\n')
    with pytest.raises(ValueError, match="tkd is not run"):
        combine({}, str(path)).check()
    assert combine({"inversion": "tkd"}, str(path)).parameters_for("inversion") == {
        "tkd": {"threshold": 0.2}
    }


@pytest.mark.parametrize("given", [(0.0, 0.0, 0.0), (0.0, 1.0), (math.nan, 0.0, 1.0),
                                   (0.0, math.inf, 1.0)])  # fmt: skip
def test_a_direction_that_is_none_is_refused(given: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"b0_direction .*: give (three|a) finite number"):
        Settings(b0_direction=given).check()


def test_a_direction_has_length_one(tmp_path: Path) -> None:
    settings = combine({"b0_direction": [0.0, -3.0, 4.0]})
    assert settings.b0_direction == pytest.approx((0.0, -0.6, 0.8), abs=1e-15)
    (tmp_path / "config.toml").write_text(settings.as_toml())
    assert combine({}, str(tmp_path / "config.toml")) == settings


SMALL = presets()["small-animal"]["parameters"]
POWERS = {
    "alpha0": 2, "alpha1": 1, "beta": 4, "bias_sigma": 1, "l1_lambda": 1, "lambda_": 1,
    "margin": 1, "max_hole": 3, "mu": -1, "nu": 4, "opening": 1, "radii": 1, "radius": 1,
    "ratio": 1, "resolution": 1, "rho": 1, "sigma": 1, "smoothing": 1, "thickness": 1,
}  # fmt: skip
"""Power of mm in a parameter's unit, by name."""
OTHER_POWERS = {("inversion.l2", "lambda_"): 2, ("inversion.tikhonov", "lambda_"): 2}


@pytest.mark.parametrize("group", SMALL)
def test_lengths_for_small_animals_are_a_tenth(group: str) -> None:
    """A parameter of unit mm^k is 10^k times smaller; one that follows the noise is a number."""
    stage, name = group.split(".")
    defaults = parameters_of(stage, name)
    for key, value in (
        combine({stage: name, "preset": "small-animal"}).parameters_for(stage)[name].items()
    ):
        default = defaults[key].default
        if default == "auto":
            assert value > 0
            continue
        factor = 10.0 ** OTHER_POWERS.get((group, key), POWERS[key])
        scaled = [factor * x for x in value] if isinstance(value, tuple) else factor * value
        assert scaled == pytest.approx(list(default) if isinstance(value, tuple) else default)


@pytest.mark.parametrize(
    "group", ["background.vsharp", "background.pdf", "background.resharp", "inversion.l2",
              "inversion.tikhonov", "inversion.rts"],
)  # fmt: skip
def test_a_head_of_a_tenth_of_the_size_gives_the_same_map(group: str) -> None:
    """The dipole has no size: what is left of the scale would be a length that was forgotten."""
    stage, name = group.split(".")
    head = phantom((25, 27, 21), (1.5, 1.5, 1.8), tilt=TILT, noise=1e-3, dtype=torch.float64)
    small = tuple(zoom / 10 for zoom in head.zooms)
    function = function_of(stage, name)
    takes = inspect.signature(function).parameters
    given = {"b0_direction": head.b0_direction} if "b0_direction" in takes else {}
    chosen = combine({stage: name, "preset": "small-animal"}).parameters_for(stage)[name]
    large_map = function(head.field, head.mask, head.zooms, **given)[0]
    small_map = function(head.field, head.mask, small, **given, **chosen)[0]
    torch.testing.assert_close(small_map, large_map, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("group", SMALL)
def test_an_interface_takes_what_a_preset_gives(group: str) -> None:
    stage, name = group.split(".")
    chosen = combine({stage: name, "preset": "small-animal"}).parameters_for(stage)[name]
    inputs = interface_with(stage, name, chosen).inputs
    for key, value in chosen.items():
        given = getattr(inputs, key)
        assert (tuple(given) if isinstance(value, tuple) else given) == value


def test_a_preset_names_the_method_of_each_parameter() -> None:
    for preset in presets().values():
        assert all("." in group for group in preset.get("parameters", {}))


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    settings = combine({
        "bids_dir": "/data",
        "participant_label": ["01", "02"],
        "derivatives": {"masks": "/masks"},
        "background": "vsharp",
        "parameters": parse_assignments(["inversion.lambda=2e-4", "background.radii=[8, 4, 2]"]),
    })  # fmt: skip
    file = tmp_path / "config.toml"
    file.write_text(settings.as_toml())
    assert combine({}, str(file)) == settings
    assert settings.parameters_for("background") == {"vsharp": {"radii": (8, 4, 2)}}


@pytest.mark.parametrize("preset", presets())
def test_every_preset_is_complete_and_valid(preset: str) -> None:
    settings = combine({"preset": preset})
    settings.check()
    stages = {step["stage"] for step in settings.resolved()}
    assert {"mask", "unwrap", "field", "background", "inversion"} <= stages


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("inversion.lamda=1", "did you mean 'lambda'"),
        (
            "inversion.lambda=big",
            r"\.tfi\.lambda is .big.: give a number above 0, or 'auto'",
        ),
        ("inversion.lambda=nan", r"--set inversion\.lambda is nan: give a finite number"),
        ("background.margin=[8]", r"background\.pdf\.margin is \[8\]: give a number"),
        ("inversion.max_iterations=1.5", r"tfi\.max_iterations is 1\.5: give a whole number"),
        ("invertion.lambda=1", "did you mean 'inversion'"),
        ("background.tkd.radii=[1]", "background has no method 'tkd'"),
        ("inversion.b0_direction=[1,0,0]", "has no parameter 'b0_direction'"),
        ("inversion.tkd.threshold=0.2", "tkd is not run"),
        ("lambda=1", "stage.parameter=value"),
        ("inversion.lambda", "stage.parameter=value"),
        ("relaxation.threshold=1", "takes no parameters"),
    ],
)
def test_a_wrong_parameter_is_refused_with_what_would_fit(assignment: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine({"parameters": parse_assignments([assignment])}).check()


def test_a_parameter_of_two_mask_methods_wants_the_method_named() -> None:
    two = {"mask": "threshold & quality"}
    with pytest.raises(ValueError, match=r"mask\.threshold\.max_hole or mask\.quality\.max_hole"):
        combine(two | {"parameters": {"mask": {"max_hole": 0.1}}}).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask": "bat"}, "did you mean 'bet'"),
        ({"mask": "none"}, "mask cannot be 'none'"),
        ({"unwrap": "none"}, "unwrap cannot be"),
        ({"reference": "region"}, "region:LABEL"),
        ({"reference": "cfs"}, "choose brain"),
        ({"reference": "csf:low"}, "'low' is no R2"),
        ({"reference": "csf:-1"}, "write csf:8"),
        ({"reference": "csf", "relaxation": "none"}, "choose a relaxation method"),
        ({"preset": "small-animal", "two_pass": True}, "two_pass is for human heads alone"),
        ({"preset": "small-animal", "reference": "csf:8"}, "reference csf is for human heads"),
        ({"preset": "small-animal", "inversion": "rts,ilsqr"}, "inversion ilsqr is for human"),
    ],
)
def test_a_wrong_method_is_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine(settings).check()


WRONG_FILES = [
    ('inverson = "tv"', "there is no 'inverson'; did you mean 'inversion'?"),
    ("zzz = 1", "there is no 'zzz'; it may hold bids_dir, output_dir"),
    ("inversion = 5", "inversion is 5: give a text"),
    ('inversion = ["tv", "rts"]', 'inversion is ["tv", "rts"]: give a text'),
    ('inversion = "tvv"', "inversion has no method 'tvv'"),
    ('inversion = "none"', "inversion cannot be 'none': choose from tkd"),
    ('offset = "given"', "offset has no method 'given'"),
    ('unwrap = "none"', "unwrap cannot be 'none'"),
    ('mask = "bet quality"', "missing between 'bet' and 'quality' (at character 5)"),
    ('background = "vsharp+vsharp"', "vsharp is there twice"),
    ('participant_label = "01"', 'participant_label is "01": give a list, each a text'),
    ('participant_label = ["01", 2]', "entry 2 of participant_label is 2: give a text"),
    ("run_label = [[1]]", "entry 1 of run_label is [1]: give a text"),
    ("two_pass = 1", "two_pass is 1: give true or false"),
    ('two_pass = "yes"', 'two_pass is "yes": give true or false'),
    ("mask_erosion = -1", "mask_erosion is -1: give a number of 0 or more"),
    ("mask_erosion = nan", "mask_erosion is nan: give a finite number of 0 or more"),
    ("mask_erosion = true", "mask_erosion is true: give a number of 0 or more"),
    ('mask_erosion = "1"', 'mask_erosion is "1": give a number of 0 or more'),
    ("mask_erosion = 2024-01-01", 'mask_erosion is "2024-01-01": give a number'),
    ("b0 = inf", "b0 is inf: give a finite number above 0"),
    ("b0 = 0", "b0 is 0: give a number above 0"),
    ("phase_sign = 2", "phase_sign is 2: give 1 or -1"),
    ("b0_direction = [0, 0]", "b0_direction 0 0: give three finite numbers"),
    ("nprocs = 2.0", "nprocs is 2.0: give a whole number above 0"),
    ("nprocs = 0", "nprocs is 0: give a whole number above 0"),
    ("mem_gb = 0.0", "mem_gb is 0.0: give a number above 0"),
    ("uncertainty = 1", "uncertainty 1: give 2 noisy fields or more"),
    ('device = "gpu"', "give 'auto', 'cpu', or 'cuda'"),
    ('preset = "fats"', "there is no preset 'fats': choose from default, fast, "),
    ('preset = "fats"', "did you mean 'fast'?"),
    ('reference = "cfs"', "reference 'cfs': choose brain"),
    ('derivatives = ["/masks"]', 'derivatives is ["/masks"]: give a table'),
    ("derivatives = {masks = 1}", "derivatives.masks is 1: give a text"),
    ('bids_dir = "a\\u0000b"', "bids_dir holds a NUL character"),
    ("parameters = 1", "parameters is 1: give a table"),
    ("parameters.inversion = 1", "parameters.inversion is 1: give a table"),
    ("parameters.invertion.lambda = 1", "there is no stage 'invertion'"),
    ("parameters.inversion.lambda = nan", "parameters.inversion.lambda is nan: give a finite"),
    ('parameters.inversion.lambda = "big"', "give a number above 0, or 'auto'"),
    ("parameters.inversion.lamda = 1", "did you mean 'lambda'?"),
    ("parameters.mask.max_hole = 1\nmask = 'threshold & quality'", "mask.threshold.max_hole or"),
    ('[parameters."inversion.tkd"]\nthreshold = 0.2', "tkd is not run"),
    ('[parameters."inversion.tk"]\nthreshold = 0.2', "inversion has no method 'tk'"),
    ("[parameters.background]\nmargin = [1, 2]", "background.pdf.margin is [1, 2]: give a number"),
    (f"nprocs = {10**400}", "nprocs is 1000"),
    ("mask = 1979-05-27", 'mask is "1979-05-27": give a text'),
    ("parameters.inversion.lambda = 07:32:00", "parameters.inversion.lambda is"),
    (f"nprocs = {'9' * 5000}", "not a readable TOML file"),
    ("a = " + "[" * 5000, "nested too deeply"),
    ("inversion = ", "not a readable TOML file"),
    ('inversion = "tv"\ninversion = "rts"', "not a readable TOML file"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"), WRONG_FILES, ids=[text[:40] for text, _ in WRONG_FILES]
)
def test_a_file_is_checked_value_by_value(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as failure:
        combine({}, str(file))
    assert str(failure.value).startswith(f"{file}: ")


def test_every_setting_refuses_what_is_not_of_its_type(tmp_path: Path) -> None:
    """Each setting by name, with each kind of value that TOML has; what passes is complete."""
    file = tmp_path / "config.toml"
    values = ["true", "7", "-3", "0", "1.5", "nan", "-inf", '""', '"x"', "[]", "[1]", '["x"]',
              "[[1]]", "[1.0, true]", "{}", "{a = 1}", "{a = {b = 1}}", "{a = [1]}", "1979-05-27",
              "1979-05-27T07:32:00Z", "07:32:00"]  # fmt: skip
    said: dict[str, list[str]] = {field.name: [] for field in fields(Settings)}
    for name, value in product(said, values):
        file.write_text(f"{name} = {value}\n")
        try:
            settings = combine({}, str(file))
        except ValueError as error:
            said[name].append(str(error))
        else:
            assert isinstance(settings.as_toml(), str)
    for name, messages in said.items():
        assert len(messages) >= 14, name
        for message in messages:
            assert message.startswith(f"{file}: ")
            assert name in message


@pytest.mark.parametrize("content", [b"\xff\xfe", b"name = '\xe9'", b"\x00"])
def test_a_file_that_is_no_text_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.toml: not "):
        read(file)


@pytest.mark.parametrize(("name", "reason"), [("none.toml", "No such file"), (".", "directory")])
def test_a_file_that_cannot_be_read_is_named(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        read(tmp_path / name)


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("nprocs = -1\nb0 = 'three'\n")
    with pytest.raises(ValueError, match=r"b0 is .*; nprocs is"):
        read(file)


def test_labels_may_have_their_prefix(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('participant_label = ["sub-01", "02"]\nrun_label = ["run-1"]\n')
    settings = combine({}, str(file))
    assert settings.participant_label == ("01", "02")
    assert settings.run_label == ("1",)


def test_defaults_are_the_default_preset() -> None:
    assert combine({}) == Settings()
