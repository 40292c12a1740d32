"""How far each preset's maps are from the truth, from wrapped phase to susceptibility.

    python benchmarks/end_to_end.py --data /tmp/heads --out /tmp/end_to_end

simulates whole heads (3 T and 7 T, upright and tilted) of 1 mm, or of other voxels with
"--voxel 1 1 2", runs the app on each with each preset, and prints one table. Heads and results
are kept, so that it resumes. Scores are over the whole true brain, where what a method left out
counts as zero, and again inside the mask that it kept. A chain with several inversions
("default --inversion tfi,tv") has a row for each map.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nb
import numpy as np
import torch
from heads import write_head

from qsmpipe.methods import METHODS
from qsmpipe.numerics.metrics import detrended_nrmse, hfen, nrmse, xsim
from qsmpipe.numerics.units import hz_per_ppm

CASES = {
    2: (3.0, 0.0), 4: (3.0, 20.0), 6: (7.0, 20.0), 8: (7.0, 0.0),
    9: (3.0, 0.0), 10: (7.0, 0.0), 11: (3.0, 20.0), 12: (7.0, 30.0),
    13: (3.0, 0.0), 14: (3.0, 30.0), 15: (7.0, 10.0), 16: (3.0, 10.0),
}  # fmt: skip
"""Head to field strength (T) and tilt (degrees)."""

TUNED, REPORTED = (2, 4, 6, 8), (9, 10, 11, 12, 13, 14, 15, 16)
"""Heads that defaults may be chosen on, and heads that tell how good they are."""

REGIONS = {
    "white matter": (2, 41), "cortex": (3, 42), "thalamus": (10, 49), "caudate": (11, 50),
    "putamen": (12, 51), "pallidum": (13, 52),
}  # fmt: skip
SCORES = {"NRMSE": nrmse, "dNRMSE": detrended_nrmse, "XSIM": xsim, "HFEN": hfen}


def run(bids: Path, out: Path, options: list[str]) -> dict[str, Any]:
    """Run the app; wall time, and peak memory of its largest node."""
    begin = time.monotonic()
    if not list(out.glob("logs/acquisitions/*.json")):
        words = [sys.executable, "-m", "qsmpipe", str(bids), str(out), "participant",
                 "--work-dir", str(out) + "-work", "--skip-bids-validation"]  # fmt: skip
        subprocess.run([*words, *options], check=True, stderr=subprocess.DEVNULL)
        (out / "seconds").write_text(str(time.monotonic() - begin))
    (path,) = out.glob("logs/acquisitions/*.json")
    record = json.loads(path.read_text())
    peak = max(node["peak_memory_mb"] or 0 for node in record["nodes"])
    return {"seconds": float((out / "seconds").read_text()), "GB": peak / 1024}


def load(out: Path, pattern: str) -> torch.Tensor:
    """Read the one derivative of that name."""
    (path,) = out.glob(f"sub-*/{pattern}")
    return torch.from_numpy(np.asarray(nb.load(path).dataobj, dtype=np.float32))


def compare(
    out: Path, truth: dict[str, np.ndarray]
) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Map, region of the score, scores."""
    brain = torch.from_numpy(truth["mask"])
    ppm = 1 / hz_per_ppm(float(truth["field_strength"]))
    kept = load(out, "anat/*_desc-qsm_mask.nii.gz") > 0
    maps = {
        "total field": load(out, "fmap/*_desc-total_fieldmap.nii.gz") * ppm,
        "local field": load(out, "fmap/*_desc-local_fieldmap.nii.gz") * ppm,
        "chi": load(out, "anat/*[0-9]_Chimap.nii.gz"),
    }
    for path in sorted(out.glob("sub-*/anat/*_desc-*_Chimap.nii.gz")):
        method = path.name.split("_desc-")[1].split("_")[0]
        if method in METHODS["inversion"] or method == "median":
            maps[f"chi, {method}"] = load(out, f"anat/{path.name}")
    known = {
        "total field": torch.from_numpy(truth["total"]),
        "local field": torch.from_numpy(truth["local"]),
        "chi": torch.from_numpy(truth["chi"]),
    }
    for name, found in maps.items():
        true = known[name.partition(",")[0]]
        whole = brain
        inside = brain & kept
        for where, mask in (("whole", whole), ("kept", inside)):
            # A constant is the reference's or the shim's business: both are relative to the mask.
            a = torch.where(kept | (name == "total field"), found, 0.0)
            a = (a - a[inside].mean()) * (inside if name != "total field" else mask)
            b = (true - true[mask].mean()) * mask
            yield name, where, {key: float(f(a, b, mask)) for key, f in SCORES.items()}
    labels, chi = truth["labels"], maps["chi"].numpy()
    inside_array = (brain & kept).numpy()
    true_chi = truth["chi"] - truth["chi"][inside_array].mean()
    for region, numbers in REGIONS.items():
        where = np.isin(labels, numbers) & inside_array
        yield (
            region,
            "mean",
            {
                "found": float(chi[where].mean() - chi[inside_array].mean()),
                "true": float(true_chi[where].mean()),
            },
        )


def numbers(heads: Sequence[int]) -> str:
    """Name the heads."""
    return ", ".join(map(str, heads))


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="keep the simulated heads here")
    parser.add_argument("--out", type=Path, required=True, help="keep the results here")
    parser.add_argument(
        "--chains",
        nargs="+",
        default=["default", "fast", "consensus"],
        help="a preset, and options of the app after it: 'default --background vsharp'",
    )
    parser.add_argument(
        "--heads", type=int, nargs="+", choices=list(CASES), default=REPORTED, metavar="HEAD",
        help=f"by default those that tell how good the defaults are, {numbers(REPORTED)}; those "
        f"to choose defaults on are {numbers(TUNED)}",
    )  # fmt: skip
    parser.add_argument(
        "--voxel", type=int, nargs=3, default=(1, 1, 1), metavar=("X", "Y", "Z"),
        help="edges of a voxel (mm), multiples of 1 mm: 1 1 2",
    )  # fmt: skip
    given = parser.parse_args()
    rows: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    costs: dict[str, list[dict[str, float]]] = {}
    for head in given.heads:
        field_strength, tilt = CASES[head]
        folder = write_head(
            head, given.data, field_strength=field_strength, tilt=tilt, voxel=tuple(given.voxel)
        )
        truth = dict(np.load(folder / "truth.npz"))
        for chain in given.chains:
            out = given.out / re.sub(r"\W+", "_", chain) / folder.name
            out.mkdir(parents=True, exist_ok=True)
            cost = run(folder / "bids", out, ["--preset", *shlex.split(chain)])
            costs.setdefault(chain, []).append(cost)
            for name, where, scores in compare(out, truth):
                rows.setdefault((chain, name, where), []).append(scores)
                shown = " ".join(f"{key} {value:.3f}" for key, value in scores.items())
                print(f"{folder.name} {chain} {name} ({where}): {shown}", flush=True)
    print(f"\nMean (standard deviation) over {len(given.heads)} scans\n")
    print("| chain | map | voxels | NRMSE % | dNRMSE % | XSIM | HFEN % |")
    print("|---|---|---|---|---|---|---|")
    for (chain, name, where), found in rows.items():
        if where != "mean":
            cells = " | ".join(
                f"{np.mean([s[key] for s in found]):.3g} ({np.std([s[key] for s in found]):.2g})"
                for key in SCORES
            )
            print(f"| {chain} | {name} | {where} | {cells} |")
    print("\n| region | true (ppm) |" + "".join(f" {p} |" for p in given.chains))
    print("|---|---|" + "---|" * len(given.chains))
    for region in REGIONS:
        true = np.mean([s["true"] for s in rows[given.chains[0], region, "mean"]])
        cells = "".join(
            f" {np.mean([s['found'] for s in rows[p, region, 'mean']]):.3f} |"
            for p in given.chains
        )
        print(f"| {region} | {true:.3f} |{cells}")
    print("\n| chain | seconds per scan | peak memory of a node (GB) |\n|---|---|---|")
    for chain, found in costs.items():
        seconds, peak = (np.mean([c[key] for c in found]) for key in ("seconds", "GB"))
        print(f"| {chain} | {seconds:.0f} | {peak:.1f} |")


if __name__ == "__main__":
    main()
