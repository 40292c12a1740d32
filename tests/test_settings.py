"""Settings: layers, assignments, and messages that help."""

from pathlib import Path

import pytest

from qsmpipe.settings import Settings, combine, parse_assignments, presets, read


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
        ("inversion.lambda=big", "does not fit tfi"),
        ("inversion.max_iterations=1.5", "does not fit tfi"),
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
    ],
)
def test_a_wrong_method_is_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine(settings).check()


def test_a_file_with_an_unknown_setting_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('inverson = "tv"\n')
    with pytest.raises(ValueError, match="did you mean 'inversion'"):
        read(file)


def test_defaults_are_the_default_preset() -> None:
    assert combine({}) == Settings()
