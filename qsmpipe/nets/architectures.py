"""Every network by its name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qsmpipe.nets.common import Network
from qsmpipe.nets.cpsi_net import CPsiNet
from qsmpipe.nets.meta_qsm import MesaQSM, MetaQSM
from qsmpipe.nets.qsmgan import Generator
from qsmpipe.nets.si_qsm import SIQSM
from qsmpipe.nets.unet import UNet
from qsmpipe.tables import Options, check_keywords

ARCHITECTURES: dict[str, type[Network]] = {
    "unet": UNet,
    "qsmgan": Generator,
    "si-qsm": SIQSM,
    "meta-qsm": MetaQSM,
    "mesa-qsm": MesaQSM,
    "cpsi-net": CPsiNet,
}


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """Which network."""

    architecture: str
    """A key of :data:`ARCHITECTURES`."""
    options: Options = field(default_factory=dict)
    """Of its class."""

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            msg = f"architecture is {self.architecture!r}"
            raise ValueError(f"{msg}: give one of {', '.join(ARCHITECTURES)}")
        check_keywords(ARCHITECTURES[self.architecture], self.options, "options")


def build(architecture: str, options: Mapping[str, Any]) -> Network:
    """Make a network; its parameters are drawn by torch's seed.

    Raises
    ------
    ValueError
        If there is no such network, or it has no such option.
    """
    if architecture not in ARCHITECTURES:
        msg = f"no network is called {architecture!r}: give one of {', '.join(ARCHITECTURES)}"
        raise ValueError(msg)
    try:
        return ARCHITECTURES[architecture](**options)
    except TypeError as error:
        raise ValueError(f"{architecture}: {error}") from error
