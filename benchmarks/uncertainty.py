"""How good the standard deviations of susceptibility are that the app's ``--uncertainty`` writes.

    python benchmarks/uncertainty.py --data /tmp/heads --out /tmp/uncertainty

The app makes noise, mask and magnitude of a whole head of 2 mm from its wrapped phase. A
measurement is the true total field with independent noise of that size. Many go through the chain:
their scatter is the deviation that is sought. The estimate is made as the app makes it, from one
measurement more. A chain is an inversion, after background removals or without: ``vsharp+tv``,
``tfi``.
"""

import argparse
import inspect
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from combinations import CASES, STARTS, ZOOMS, examine
from scipy.stats import chi2
from torch import Tensor

from qsmpipe.methods import function_of, parameters_of
from qsmpipe.numerics.uncertainty import Chain, deviation


def bind(stage: str, name: str, known: Mapping[str, Any]) -> Callable[..., Any]:
    """Bind a method to those of the data that it takes."""
    function = function_of(stage, name)
    taken = inspect.signature(function).parameters.keys() - {"field", "mask"}
    return partial(function, **{key: known[key] for key in taken & known.keys()})


def chain_of(names: str, field: Tensor, known: Mapping[str, Any]) -> Chain:
    """Put a chain together, with the parameters that its inversion chooses on ``field``."""
    *before, name = names.split("+")
    chain = Chain(
        known["mask"],
        ZOOMS,
        bind("inversion", name, known),
        [bind("background", one, known) for one in before],
        b0_direction=known["b0_direction"],
        holds_background=STARTS[name] == "total field",
    )
    chosen = chain.invert(*chain.local(field), ZOOMS).chosen
    own = {key: chosen[key] for key in parameters_of("inversion", name) if key in chosen}
    return replace(chain, invert=partial(chain.invert, **own))


def estimate(chain: Chain, field: Tensor, noise: Tensor, *, is_direct: bool) -> Tensor:
    """Deviation from one measurement, by the steps of ``interfaces/uncertainty.py``."""
    guide = chain.filter_deviation(noise) if is_direct else None
    if guide is not None and not chain.backgrounds:
        return guide
    return deviation(chain, chain.fitted(field), noise, chain.mask, guide=guide).deviation


def share(errors: Tensor, deviations: float) -> str:
    """Percentage of standardised errors within so many deviations."""
    return f"{100 * (errors.abs() < deviations).double().mean().item():.1f}"


def row(names: str, truth: Mapping[str, Tensor], known: Mapping[str, Any], count: int) -> str:
    """Compare the estimate of a chain with the scatter of ``count`` measurements."""
    noise, mask = known["noise"], known["mask"]

    def measure(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        error = noise * torch.randn(noise.shape, generator=generator)
        return torch.where(mask, truth["total"] + error, 0.0)

    # The noise of the estimate's own realisations has seed 0.
    first = measure(1)
    chain = chain_of(names, first, known)
    is_direct = "max_iterations" not in parameters_of("inversion", names.split("+")[-1])
    begin = time.monotonic()
    found = estimate(chain, first, noise, is_direct=is_direct)
    seconds = time.monotonic() - begin

    maps = torch.stack([chain(measure(seed)) for seed in range(2, 2 + count)])
    kept = chain.local(first)[1]
    values, spread = maps[:, kept], found[kept]
    ratio = spread / values.std(0)
    low, middle, high = ratio.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    whole = (spread.square().mean() / values.var(0).mean()).sqrt().item()
    # The mean of the measurements holds a share of each of them.
    scatter = (values - values.mean(0)) * math.sqrt(count / (count - 1)) / spread

    brain = kept & truth["mask"]
    found_chi, true_chi = maps[:, brain], truth["chi"][brain]
    error = found_chi - found_chi.mean(1, keepdim=True) - (true_chi - true_chi.mean())
    return (
        f"| `{names}` | {middle:.2f} | {low:.2f} to {high:.2f} | {whole:.2f} "
        f"| {share(scatter, 1)} | {share(scatter, 2)} | {share(error / found[brain], 2)} "
        f"| {seconds:.0f} |"
    )


def ideal(count: int) -> str:
    """Give the same of the true deviation, with normal errors."""
    high, middle, low = ((count - 1) / chi2.ppf((0.1, 0.5, 0.9), count - 1)) ** 0.5
    one, two = (100 * math.erf(n / math.sqrt(2)) for n in (1, 2))
    return (
        f"| (the true deviation) | {middle:.2f} | {low:.2f} to {high:.2f} | 1.00 "
        f"| {one:.1f} | {two:.1f} |  |  |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="keep the simulated head here")
    parser.add_argument("--out", type=Path, required=True, help="keep the app's results here")
    parser.add_argument("--head", type=int, choices=list(CASES), default=14)
    parser.add_argument(
        "--chains", nargs="+", default=["tfi", "pdf+tv", "pdf+rts", "pdf+tkd"], metavar="CHAIN"
    )
    parser.add_argument("--measurements", type=int, default=20, help="2 or more")
    given = parser.parse_args()
    truth, known = examine(given.head, given.data, given.out)
    print(
        "| chain | estimated / empirical: median | 10th to 90th percentile | root mean square "
        "| within 1 of the mean (%) | within 2 of the mean (%) | within 2 of the truth (%) | s |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    print(ideal(given.measurements), flush=True)
    for names in given.chains:
        print(row(names, truth, known, given.measurements), flush=True)


if __name__ == "__main__":
    main()
