"""Whole heads from label maps, scanned and written as BIDS, with their truth.

The true brain is all brain tissue with the cerebrospinal fluid between its folds.
"""

import argparse
import json
import math
from pathlib import Path

import nibabel as nb
import numpy as np
import torch
from torch import Tensor

from qsmpipe import images
from qsmpipe.examples import rotation
from qsmpipe.numerics.fourier import SPACE
from qsmpipe.numerics.simulate import Scan, add_noise, block_mean, maps_of, simulate, upsample
from qsmpipe.numerics.simulate.labels import TISSUES, brain_mask, clean
from qsmpipe.numerics.units import GAMMA
from qsmpipe.placement import b0_direction

HEADS = Path(__file__).parents[2] / "shared" / "data" / "heads"
ECHO_TIMES = {3.0: (0.005, 0.010, 0.015, 0.020, 0.025), 7.0: (0.004, 0.009, 0.014, 0.019)}
PURE = 0.5
"""Susceptibility (ppm, relative to water) beyond which there is no tissue."""
MARGIN = 8
"""Air kept around the head, and neck kept below the brain (voxels)."""

Voxel = tuple[int, int, int]
"""Edges of a voxel (mm)."""


def mean_of(image: Tensor, counts: Voxel) -> Tensor:
    """Average (..., X, Y, Z) over ``counts`` voxels along each axis."""
    for axis, count in zip(SPACE, counts, strict=True):
        image = image.unflatten(axis, (-1, count)).mean(axis)
    return image


def write_head(
    number: int,
    out: Path,
    *,
    field_strength: float,
    tilt: float = 0.0,
    voxel: int | Voxel = 1,
    snr: float = 60.0,
    texture: float = 0.006,
) -> Path:
    """Simulate one head; returns its folder, which holds ``bids`` and ``truth.npz``.

    Cubes of 1 or 2 mm are averaged from eight of half that edge, and longer voxels from as many
    cubes as they hold. The signal-to-noise ratio is that of the voxels, whatever their size.
    """
    edges = (voxel, voxel, voxel) if isinstance(voxel, int) else voxel
    cube = math.gcd(*edges)
    if cube not in (1, 2):
        raise SystemExit(f"voxel {edges} mm: only cubes of 1 or 2 mm can be put together")
    counts = (edges[0] // cube, edges[1] // cube, edges[2] // cube)
    name = f"head{number:02d}_{field_strength:g}T_tilt{tilt:g}"
    if max(edges) > 1:
        name += f"_{cube if len(set(edges)) == 1 else 'x'.join(map(str, edges))}mm"
    folder = out / name
    if (folder / "truth.npz").exists():
        return folder
    source = HEADS / f"training_seg_{number:02d}.nii.gz"
    if not source.exists():
        raise SystemExit(f"{source}: the label maps are needed for this benchmark")
    image = nb.as_closest_canonical(nb.load(source))
    labels = clean(
        torch.from_numpy(np.asarray(image.dataobj).astype(np.int16)), (1.0, 1.0, 1.0)
    ).labels
    labels = labels[tuple(slice(0, n - n % 2) for n in labels.shape)]
    labels = torch.nn.functional.pad(labels, [MARGIN] * 4 + [0, MARGIN])
    inside = brain_mask(labels, (1.0, 1.0, 1.0))
    fine, brain = (upsample(x, 2) if cube == 1 else x for x in (labels, inside))
    labels = labels[::cube, ::cube, ::cube]
    zooms = (float(cube),) * 3
    affine = np.eye(4)
    affine[:3, :3] = rotation((tilt, 0.0, 0.0)) * cube
    affine[:3, 3] = affine[:3, :3] @ -(np.array(labels.shape) / 2)

    small = tuple(zoom / 2 for zoom in zooms)
    maps = maps_of(fine, TISSUES, small, field_strength=field_strength, texture=texture,
                   seed=number)  # fmt: skip
    below = int(torch.nonzero(brain.any(0).any(0))[0]) // 2 - MARGIN // cube
    starts = (0, 0, max(below, 0))
    x, y, z = (
        slice(start, n - (n - start) % count)
        for start, n, count in zip(starts, labels.shape, counts, strict=True)
    )
    window = (x, y, z)
    scan = Scan(field_strength, ECHO_TIMES[field_strength], factor=2, coil_seed=number,
                b0_direction=b0_direction(affine))  # fmt: skip
    scanned = simulate(maps, brain, zooms, scan, window=window)
    signal, share, chi, total, local = (
        mean_of(image, counts)
        for image in (
            scanned.signal, scanned.mask.float(), scanned.chi, scanned.total, scanned.local
        )
    )  # fmt: skip
    mask = share >= 0.5
    affine[:3, 3] += affine[:3, :3] @ (np.array(starts) + (np.array(counts) - 1) / 2)
    affine[:3, :3] *= counts
    signal = add_noise(signal, mask, snr=snr, seed=number)

    anat = folder / "bids" / f"sub-{number:02d}" / "anat"
    anat.mkdir(parents=True, exist_ok=True)
    description = {"Name": f"head {number}", "BIDSVersion": "1.10.0", "DatasetType": "raw"}
    (folder / "bids" / "dataset_description.json").write_text(json.dumps(description))
    common = {
        "MagneticFieldStrength": field_strength,
        "ImagingFrequency": field_strength * GAMMA,
        "MRAcquisitionType": "3D",
        "Manufacturer": "Siemens",
    }
    scale = 3500 / signal[0].abs().max()
    for echo, time in enumerate(scan.echo_times):
        magnitude = (signal[echo].abs() * scale).round().numpy().astype(np.int16)
        phase = signal[echo].angle().numpy().astype(np.float32)
        for part, values, more in (("mag", magnitude, {}), ("phase", phase, {"Units": "rad"})):
            stem = anat / f"sub-{number:02d}_echo-{echo + 1}_part-{part}_MEGRE"
            images.store(values, f"{stem}.nii", affine=affine)
            sidecar = common | {"EchoTime": time} | more
            Path(f"{stem}.json").write_text(json.dumps(sidecar))
    middle = labels[window][tuple(slice(count // 2, None, count) for count in counts)]
    # Voxels that hold air or bone as well have no susceptibility of the brain to be found.
    pure = mean_of(block_mean((maps.chi.abs() < PURE).float(), 2)[window], counts) == 1
    np.savez_compressed(
        folder / "truth.npz",
        mask=(mask & pure).numpy(),
        chi=chi.numpy().astype(np.float32),
        total=total.numpy().astype(np.float32),
        local=local.numpy().astype(np.float32),
        labels=middle.numpy(),
        b0_direction=np.array(scan.b0_direction),
        field_strength=field_strength,
    )
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--head", type=int, default=2)
    parser.add_argument("--field-strength", type=float, default=3.0)
    parser.add_argument("--tilt", type=float, default=0.0)
    parser.add_argument("--voxel", type=int, nargs=3, default=(1, 1, 1), help="edges (mm)")
    given = parser.parse_args()
    print(
        write_head(
            given.head,
            given.out,
            field_strength=given.field_strength,
            tilt=given.tilt,
            voxel=tuple(given.voxel),
        )
    )
