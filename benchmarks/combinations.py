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
from collections.abc import Callable, Mapping, Sequence
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
STARTS = {name: row.starts_from for name, row in METHODS["inversion"].items()}


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


Scores = defaultdict[tuple[str, str], list[dict[str, float]]]


class Tables:
    """What the heads add up to."""

    def __init__(self) -> None:
        self.scores: Scores = defaultdict(list)
        """Inversion and background removal to the score of each head."""
        self.losses: Scores = defaultdict(list)
        """Inversion and what the truth stood in for to the score of each head."""
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, truth: Mapping[str, Tensor], known: Mapping[str, Any]) -> None:
        """Run every combination on a head, and put the truth in stage by stage."""
        field, mask, brain = known["field"], known["mask"], truth["mask"]
        given = {key: value for key, value in known.items() if key not in ("field", "mask")}

        def remove(name: str, image: Tensor, kept: Tensor) -> Any:
            return call(function_of("background", name), image, kept, given=given)

        def invert(name: str, image: Tensor, kept: Tensor) -> dict[str, float]:
            begin = time.monotonic()
            chi = call(function_of("inversion", name), image, kept, given=given).chi
            self.seconds[name].append(time.monotonic() - begin)
            return score(chi, kept, truth)

        local_fields = {TRUE: (truth["local"], brain)}
        for background in METHODS["background"]:
            found = remove(background, field, mask)
            local_fields[background] = found.field, found.mask
        for name, start in STARTS.items():
            if start == "total field":
                self.scores[name, TOTAL].append(invert(name, field, mask))
            elif start == "local field":
                for background, (local, kept) in local_fields.items():
                    self.scores[name, background].append(invert(name, local, kept))

        both = mask & brain
        for name in ("tfi", "tv"):
            for what, total, kept in (
                ("nothing", field, mask),
                ("mask: the true brain in what the chain kept", field, both),
                ("total field in that mask", truth["total"], both),
                ("total field and mask", truth["total"], brain),
            ):
                local = STARTS[name] == "local field"
                image = remove("pdf", total, kept).field if local else total
                self.losses[name, what].append(invert(name, image, kept))
        for what, kept in (("local field in that mask", both), ("local field", brain)):
            self.losses["tv", what].append(invert("tv", truth["local"], kept))

    def print(self) -> None:
        """Print them in Markdown."""
        columns = [TRUE, *METHODS["background"], TOTAL]
        for key in ("XSIM", "NRMSE"):
            print(f"\n{key} of susceptibility\n")
            print("| inversion | s |" + "".join(f" {column} |" for column in columns))
            print("|---|---|" + "---|" * len(columns))
            for name, start in STARTS.items():
                if start != "phase":
                    cells = "".join(f" {cell(self.scores.get((name, b)), key)} |" for b in columns)
                    print(f"| `{name}` | {np.mean(self.seconds[name]):.2g} |{cells}")
        print("\n| inversion | true | XSIM | NRMSE |\n|---|---|---|---|")
        for (name, what), found in self.losses.items():
            print(f"| `{name}` | {what} | {cell(found, 'XSIM')} | {cell(found, 'NRMSE')} |")


def cell(found: Sequence[Mapping[str, float]] | None, key: str) -> str:
    """Mean and, of several heads, standard deviation; nothing where there is nothing."""
    if not found:
        return ""
    values = [one[key] for one in found]
    return f"{np.mean(values):.3g}" + (f" ({np.std(values):.2g})" if len(values) > 1 else "")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="keep the simulated heads here")
    parser.add_argument("--out", type=Path, required=True, help="keep the app's results here")
    parser.add_argument("--heads", type=int, nargs="+", choices=list(CASES), default=list(CASES))
    given = parser.parse_args()
    tables = Tables()
    for head in given.heads:
        tables.add(*examine(head, given.data, given.out))
        print(f"head {head} done", flush=True)
    tables.print()


if __name__ == "__main__":
    main()
