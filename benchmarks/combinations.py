"""Every background removal with every inversion, and where the loss of a map arises.

    python benchmarks/combinations.py --data /tmp/heads --out /tmp/combinations

The app makes field, noise, mask and magnitude of whole heads of 2 mm from their wrapped phase;
each background removal and each inversion then runs with its defaults. Scores are means (standard
deviations) over the heads, over the whole true brain, where what was left out counts as zero.

The second table puts the truth in, stage by stage: what is left of the loss is that of the stages
that follow.
"""

import argparse
import inspect
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from end_to_end import load, run
from heads import ECHO_TIMES, write_head
from torch import Tensor

from qsmpipe.methods import METHODS, function_of
from qsmpipe.numerics.metrics import nrmse, xsim
from qsmpipe.numerics.units import hz_per_ppm

CASES = {4: (3.0, 20.0), 8: (7.0, 0.0), 14: (3.0, 30.0), 15: (7.0, 10.0)}
"""Head to field strength (T) and tilt (degrees)."""
ZOOMS = (2.0, 2.0, 2.0)
TRUE = "(true local field)"
TOTAL = "(none)"


def call(function: Callable[..., Any], *images: Tensor, given: Mapping[str, Any]) -> Any:
    """Call with those of the given data that the function takes."""
    known = inspect.signature(function).parameters
    chosen = {name: value for name, value in given.items() if name in known}
    return function(*images, ZOOMS, **chosen)


def score(chi: Tensor, kept: Tensor, truth: Mapping[str, Tensor]) -> dict[str, float]:
    """Over the whole true brain, relative to its mean inside what was kept."""
    brain = truth["mask"]
    inside = brain & kept
    found = (chi - chi[inside].mean()) * inside
    true = (truth["chi"] - truth["chi"][brain].mean()) * brain
    return {"XSIM": float(xsim(found, true, brain)), "NRMSE": float(nrmse(found, true, brain))}


def examine(head: int, data: Path, out: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Truth, and what the app makes of the head before the background is removed."""
    field_strength, tilt = CASES[head]
    folder = write_head(head, data, field_strength=field_strength, tilt=tilt, voxel=2)
    target = out / folder.name
    target.mkdir(parents=True, exist_ok=True)
    run(folder / "bids", target, ["--inversion", "tkd", "--intermediates"])
    truth = {key: torch.from_numpy(value) for key, value in np.load(folder / "truth.npz").items()}
    ppm = 1 / hz_per_ppm(field_strength)
    return truth, {
        "field": load(target, "fmap/*_desc-total_fieldmap.nii.gz") * ppm,
        "noise": load(target, "fmap/*_desc-noise_fieldmap.nii.gz") * ppm,
        "mask": load(target, "anat/*_desc-brain_mask.nii.gz") > 0,
        "magnitude": load(target, "anat/*_desc-combined_T2starw.nii.gz"),
        "r2star": load(target, "anat/*_R2starmap.nii.gz"),
        "b0_direction": tuple(truth["b0_direction"].tolist()),
        "echo_times": ECHO_TIMES[field_strength],
        "field_strength": field_strength,
    }


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="keep the simulated heads here")
    parser.add_argument("--out", type=Path, required=True, help="keep the app's results here")
    parser.add_argument("--heads", type=int, nargs="+", choices=list(CASES), default=list(CASES))
    given = parser.parse_args()
    scores: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    losses: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    seconds: dict[str, list[float]] = defaultdict(list)
    starts = {name: row.starts_from for name, row in METHODS["inversion"].items()}
    for head in given.heads:
        truth, known = examine(head, given.data, given.out)
        field, mask, brain = known.pop("field"), known.pop("mask"), truth["mask"]

        def invert(
            name: str, image: Tensor, kept: Tensor, known: Mapping[str, Any] = known
        ) -> Tensor:
            begin = time.monotonic()
            chi = call(function_of("inversion", name), image, kept, given=known).chi
            seconds[name].append(time.monotonic() - begin)
            return chi

        locals_ = {TRUE: (truth["local"], brain)}
        for background in METHODS["background"]:
            found = call(function_of("background", background), field, mask, given=known)
            locals_[background] = found.field, found.mask
        for name, start in starts.items():
            if start == "total field":
                scores[name, TOTAL].append(score(invert(name, field, mask), mask, truth))
            elif start == "local field":
                for background, (local, kept) in locals_.items():
                    scores[name, background].append(score(invert(name, local, kept), kept, truth))
        both = mask & brain
        for name in ("tfi", "tv"):
            for what, total, kept in (
                ("nothing", field, mask),
                ("mask: the true brain in what the chain kept", field, both),
                ("total field in that mask", truth["total"], both),
                ("total field and mask", truth["total"], brain),
            ):
                image = total
                if starts[name] == "local field":
                    image = call(function_of("background", "pdf"), image, kept, given=known).field
                chi = invert(name, image, kept)
                losses[name, what].append(score(chi, kept, truth))
            if starts[name] == "local field":
                for what, kept in (("local field in that mask", both), ("local field", brain)):
                    chi = invert(name, truth["local"], kept)
                    losses[name, what].append(score(chi, kept, truth))
        print(f"head {head} done", flush=True)

    def cell(found: list[dict[str, float]] | None, key: str) -> str:
        if not found:
            return ""
        values = [one[key] for one in found]
        return f"{np.mean(values):.3g} ({np.std(values):.2g})"

    columns = [TRUE, *METHODS["background"], TOTAL]
    for key in ("XSIM", "NRMSE"):
        print(f"\n{key} of susceptibility, {len(given.heads)} heads\n")
        print("| inversion | s |" + "".join(f" {column} |" for column in columns))
        print("|---|---|" + "---|" * len(columns))
        for name, start in starts.items():
            if start != "phase":
                cells = "".join(f" {cell(scores.get((name, b)), key)} |" for b in columns)
                print(f"| `{name}` | {np.mean(seconds[name]):.2g} |{cells}")
    print("\n| inversion | true | XSIM | NRMSE |\n|---|---|---|---|")
    for (name, what), found in losses.items():
        print(f"| `{name}` | {what} | {cell(found, 'XSIM')} | {cell(found, 'NRMSE')} |")


if __name__ == "__main__":
    main()
