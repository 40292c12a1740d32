"""Weights and their cards: what a network is, what it was trained on, and for what it is meant."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import tomli_w
import torch
from annotated_types import Ge, Gt, Le
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialised
from torch import Tensor

from qsmpipe.nets.architectures import Blueprint, build
from qsmpipe.nets.common import Network, load_parameters
from qsmpipe.nets.contract import Channel, Contract
from qsmpipe.nets.patches import Tiling, check_tiling
from qsmpipe.nets.weights import CARD_SUFFIX, WEIGHTS, WEIGHTS_SUFFIX, weights_names
from qsmpipe.numerics.fourier import Zooms
from qsmpipe.tables import Options, from_table, read_table, to_table

LARGE = 4096
"""Numbers of a tensor, above which they are stored in half precision."""

OWN_LICENCE = "Apache-2.0"
"""Of qsmpipe, and of the weights that come with it."""

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Images that a network was trained on.

    Attributes
    ----------
    zooms : tuple of 3 ranges
        Voxel size along each axis (mm).
    alike : int
        So many axes, counted from the first, have the same size.
    tilt : float
        Largest angle between B0 and the third axis (degrees).
    radians_per_ppm : float
        Phase (rad) of 1 ppm, for a network that takes phase; 0 for one that takes a field.
    """

    zooms: tuple[Range, Range, Range]
    alike: Annotated[int, Ge(1), Le(3)] = 1
    tilt: Annotated[float, Ge(0)] = 0.0
    radians_per_ppm: Annotated[float, Ge(0)] = 0.0

    def nearest(self, zooms: Zooms) -> Zooms:
        """Voxel size (mm) in the domain that is nearest to another one, rather smaller.

        >>> Domain(zooms=((0.8, 2.0),) * 3, alike=3).nearest((1.0, 1.0, 3.0))
        (1.0, 1.0, 1.0)
        """
        shared = [min(zooms[: self.alike])] * self.alike
        wanted = (*shared, *zooms[self.alike :])
        x, y, z = (
            min(max(zoom, low), high) for zoom, (low, high) in zip(wanted, self.zooms, strict=True)
        )
        return x, y, z

    def same_shape(self, zooms: Zooms) -> Zooms:
        """Voxel size (mm) in the domain of nearly the same shape: a dipole has no size.

        >>> Domain(zooms=((0.5, 1.0), (0.5, 1.0), (1.0, 4.0))).same_shape((4.0, 4.0, 8.0))
        (1.0, 1.0, 2.0)
        """
        factor = max(zoom / high for zoom, (_, high) in zip(zooms, self.zooms, strict=True))
        if factor < 1:
            least = min(zoom / low for zoom, (low, _) in zip(zooms, self.zooms, strict=True))
            factor = min(least, 1.0)
        x, y, z = (zoom / factor for zoom in zooms)
        return self.nearest((x, y, z))


@dataclass(frozen=True, kw_only=True)
class Card:
    """What comes with weights.

    Attributes
    ----------
    network, contract, domain
        Which network, what it is given and gives, and for which images it is meant.
    patch, halo : int
        How whole images are cut by default, see :class:`.patches.Tiling` (voxels).
    sha256 : str
        Of the weights' file.
    licence : str
        Of the weights; none if they are the user's own. Any other than :data:`OWN_LICENCE` must
        be accepted by name.
    about : mapping
        Paper, data, limits: for those who read.
    training : mapping
        How they were trained: steps, seed, hours, machine, figures of validation.
    recipe : mapping
        By what: the tables of a recipe, as ``qsmpipe train --config`` takes them.
    """

    network: Blueprint
    contract: Contract
    domain: Domain
    patch: Annotated[int, Gt(0)]
    halo: Annotated[int, Ge(0)]
    sha256: str = ""
    licence: str = ""
    about: Mapping[str, str] = field(default_factory=dict)
    training: Options = field(default_factory=dict)
    recipe: Options = field(default_factory=dict)


class Model(NamedTuple):
    """A network that is ready to map."""

    name: str
    """Of its weights: one of the package's, or a file."""
    network: Network
    """In evaluation mode."""
    card: Card


def save(network: Network, card: Card, path: Path) -> Card:
    """Write weights, and their card beside them.

    What is large is float16, and that is kernels, or what mixes them. All else is float32:
    statistics of normalisation may be tiny or large.

    Parameters
    ----------
    network : Network
        That of the card.
    card : Card
        Its hash is written anew.
    path : Path
        Of the weights, ending in ``.safetensors``.

    Returns
    -------
    Card
        With the hash.
    """
    state = {name: _small(value) for name, value in network.state_dict().items()}
    path.write_bytes(serialised(state))
    card = replace(card, sha256=_hash(path))
    path.with_suffix(CARD_SUFFIX).write_text(tomli_w.dumps(to_table(card)))
    return card


def _small(value: Tensor) -> Tensor:
    value = value.detach().cpu().contiguous()
    if not value.is_floating_point():
        return value
    return value.to(torch.float16 if value.numel() > LARGE else torch.float32)


def read_card(weights: str) -> tuple[Path, Card]:
    """Find weights and read their card.

    Parameters
    ----------
    weights : str
        Name of the package's own, or a ``.safetensors`` file with its card (``.toml``) beside it.

    Raises
    ------
    ValueError
        If there are no such weights, or the card cannot be read; it names the file.
    """
    if weights in weights_names():
        path = Path(str(WEIGHTS / f"{weights}{WEIGHTS_SUFFIX}"))
    else:
        path = Path(weights)
        if path.suffix != WEIGHTS_SUFFIX:
            msg = (
                f"no weights are called {weights!r}: give one of {', '.join(weights_names())}, or "
                f"a {WEIGHTS_SUFFIX} file with its card ({CARD_SUFFIX}) beside it"
            )
            raise ValueError(msg)
    for needed, what in ((path, "weights"), (path.with_suffix(CARD_SUFFIX), "their card")):
        if not needed.is_file():
            raise ValueError(f"{needed} is missing: {what} should be there")
    card = path.with_suffix(CARD_SUFFIX)
    return path, from_table(Card, read_table(card), str(card))


def check_licence(name: str, card: Card, accepted: str = "") -> None:
    """Insist that a licence other than qsmpipe's is accepted by name.

    Raises
    ------
    ValueError
        If it is not.
    """
    if card.licence not in ("", OWN_LICENCE, accepted):
        given = f", not {accepted!r}" if accepted else ""
        msg = (
            f"{name}: these weights come under {card.licence!r}{given}: read it, and accept it by "
            f"that name (--accept-licence '{card.licence}')"
        )
        raise ValueError(msg)


def load(
    weights: str,
    *,
    architecture: str,
    licence: str = "",
    given: Collection[Channel] = ("field", "mask"),
) -> Model:
    """Load weights into their network, in float32.

    Parameters
    ----------
    weights : str
        As for :func:`read_card`.
    architecture : str
        The network that is wanted.
    licence : str
        A licence that is accepted.
    given : collection of str
        Images that there are.

    Raises
    ------
    ValueError
        If they are of another network, take other images, are not those of their card, or come
        under a licence that was not accepted.
    """
    path, card = read_card(weights)
    if card.network.architecture != architecture:
        msg = (
            f"{weights}: these are weights of {card.network.architecture}, not of {architecture}: "
            f"choose the inversion {card.network.architecture}, or other weights"
        )
        raise ValueError(msg)
    if missing := [one for one in card.contract.channels if one not in given]:
        msg = (
            f"{weights}: these weights take the {missing[0]}, but the inversion {architecture} "
            f"has {' and '.join(given)}: choose weights that were trained on that"
        )
        raise ValueError(msg)
    check_licence(weights, card, licence)
    if _hash(path) != card.sha256:
        msg = f"{path} is not the file that its card describes (SHA-256): get both anew"
        raise ValueError(msg)
    network = build(card.network.architecture, card.network.options)
    load_parameters(network, read_parameters(path), path)
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # faster
    check_tiling(network, Tiling(card.patch, card.halo))
    return Model(weights, network.eval(), card)


def read_parameters(path: Path) -> dict[str, Tensor]:
    """Read parameters in float32 from a ``.safetensors`` file.

    Raises
    ------
    ValueError
        If it is none.
    """
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: no safetensors file ({error})") from error
    return {
        name: value.float() if value.is_floating_point() else value
        for name, value in state.items()
    }


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
