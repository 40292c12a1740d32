"""Every block of the tutorial runs, on a smaller head and with a shorter training."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial.md"

SHORTER = {
    '"demo"': '"gre3t"',
    "simulate demo": "simulate gre3t",
    "steps = 500": "steps = 4",
    "validate_every = 100": "validate_every = 2",
}


def blocks() -> list[tuple[str, str]]:
    """Language and text of each block, in order."""
    text = TUTORIAL.read_text()
    for long, short in SHORTER.items():
        assert long in text
        text = text.replace(long, short)
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for number, (language, text) in enumerate(blocks()):
        if language == "python":
            script = tmp_path / f"block{number}.py"  # Nipype reads its functions from their file
            script.write_text(text)
            names |= runpy.run_path(str(script), init_globals=names)
        elif language == "toml":
            (tmp_path / "small.toml").write_text(text)
        else:
            for line in text.splitlines():
                command = [sys.executable, "-m", *shlex.split(line)]
                subprocess.run(command, check=True, timeout=600)
    brain = names["brain"]
    assert names["nrmse"](names["chi"], names["truth"], brain) < 80
    (described,) = (node for node in names["graph"].nodes() if node.name == "words")
    assert described.result.outputs.words.startswith("mean 0.0000 ppm")
    assert Path("out/sub-01.html").is_file()
    assert Path("out/sub-01/anat/sub-01_desc-rts_Chimap.nii.gz").is_file()
    assert Path("out_network/sub-01/anat/sub-01_desc-unet_Chimap.nii.gz").is_file()
