"""Make the tutorial's pictures from the tutorial's own blocks.

``python docs/pictures.py``; it takes some minutes, and a chromium for the picture of the report.
"""

import contextlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from PIL import Image

from qsmpipe import images

mpl.use("Agg")
from matplotlib import pyplot as plt

DOCS = Path(__file__).parent
PICTURES = DOCS / "pictures"
COLOURS = 128
"""Of a picture: a report's page needs no more, and stays small."""


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and text of each block of a page, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run(text: str, folder: Path) -> dict[str, Any]:
    """Run the blocks of the tutorial in ``folder``, the current one; give the names they bind.

    Python blocks share their names, a TOML block becomes ``small.toml``, all else are commands.
    """
    names: dict[str, Any] = {}
    for number, (language, block) in enumerate(blocks(text)):
        if language == "python":
            script = folder / f"block{number}.py"  # Nipype reads its functions from their file
            script.write_text(block)
            names |= runpy.run_path(str(script), init_globals=names)
        elif language == "toml":
            (folder / "small.toml").write_text(block)
        else:
            for line in block.splitlines():
                subprocess.run([sys.executable, "-m", *shlex.split(line)], check=True)
    return names


def panels(shown: dict[str, tuple[np.ndarray, float, float]], path: Path) -> None:
    """Draw an axial slice of each image, with its title and window, side by side."""
    figure, axes = plt.subplots(
        1, len(shown), figsize=(2.1 * len(shown), 2.75), layout="constrained"
    )
    for axis, (title, (image, low, high)) in zip(axes, shown.items(), strict=True):
        axis.imshow(image.T, vmin=low, vmax=high, cmap="gray", origin="lower")
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def slim(path: Path) -> None:
    """Save a picture with few colours."""
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(COLOURS).save(path, optimize=True)


def array(names: dict[str, Any]) -> None:
    """Draw the way from the arrays to the map."""
    k = names["brain"].shape[2] // 2
    brain = names["brain"].numpy()
    chi, truth = (names[name].numpy() * brain for name in ("chi", "truth"))
    magnitude = names["magnitude"][2].numpy()
    shown = {
        "magnitude, echo 3": (magnitude[..., k], 0.0, float(np.quantile(magnitude, 0.995))),
        "phase, echo 3 (rad)": (names["angle"][2].numpy()[..., k], -np.pi, np.pi),
        "total field (ppm)": ((names["total"].field.numpy() * brain)[..., k], -0.25, 0.25),
        "susceptibility (ppm)": (chi[..., k], -0.1, 0.1),
        "truth (ppm)": (truth[..., k], -0.1, 0.1),
    }
    panels(shown, PICTURES / "array.png")


def training(names: dict[str, Any]) -> None:
    """Draw the curve, and the map by the trained network beside the default and the truth."""
    folder = Path("out_network/sub-01/anat")
    found = {
        "default, tfi (ppm)": next(folder.glob("*_Chimap.nii.gz")),
        "network (ppm)": next(folder.glob("*_desc-unet_Chimap.nii.gz")),
    }
    chi = {title: images.load(path).numpy() for title, path in found.items()}
    brain = names["brain"].numpy()
    chi["truth (ppm)"] = names["truth"].numpy() * brain
    k = brain.shape[2] // 2
    rows = np.genfromtxt("my_training/curve.csv", delimiter=",", names=True)
    figure, (curve, *axes) = plt.subplots(
        1,
        4,
        figsize=(10.0, 2.75),
        gridspec_kw={"width_ratios": (1.6, 1, 1, 1)},
        layout="constrained",
    )
    curve.plot(rows["step"], rows["nrmse"], color="black")
    curve.set(xlabel="step", ylabel="error of validation (%)", ylim=(0, None))
    for axis, (title, image) in zip(axes, chi.items(), strict=True):
        axis.imshow(image[..., k].T, vmin=-0.1, vmax=0.1, cmap="gray", origin="lower")
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()
    figure.savefig(PICTURES / "training.png", dpi=110)
    plt.close(figure)


def report() -> None:
    """Take the top of the subject's report."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        raise SystemExit("no chromium: the picture of the report is not made")
    page, picture = Path("out/sub-01.html").absolute(), PICTURES / "report.png"
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--hide-scrollbars",
        "--window-size=1000,820",
    ]
    subprocess.run([*command, f"--screenshot={picture}", page.as_uri()], check=True)


def main() -> None:
    """Run the tutorial in a folder of its own and draw."""
    PICTURES.mkdir(exist_ok=True)
    text = (DOCS / "tutorial.md").read_text()
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        names = run(text, Path(name))
        array(names)
        training(names)
        report()
    for picture in PICTURES.glob("*.png"):
        slim(picture)


if __name__ == "__main__":
    main()
