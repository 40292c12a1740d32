"""Dipole inversion by trained networks: a function for each, as those of :mod:`.numerics`."""

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, ParamSpec, TypeAlias, TypeVar

import torch
from annotated_types import Ge
from torch import Tensor

from qsmpipe.nets.cards import load
from qsmpipe.nets.reconstruction import Grid, reconstruct
from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.inversion.common import Susceptibility
from qsmpipe.numerics.kernels import AXIAL
from qsmpipe.numerics.parameters import checked
from qsmpipe.numerics.swi import high_pass
from qsmpipe.numerics.units import radians_per_ppm

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

Voxels: TypeAlias = Annotated[int, Ge(0)]
"""Of a patch; 0 for the card's."""


CHOICES = """\
weights : str
    Name of the package's own weights, or a ``.safetensors`` file with its card beside it.
licence : str
    Licence of the weights that is accepted, where it is not qsmpipe's own.
grid : {"card", "native"}
    Whether images outside the card's domain are resampled to it, and the map back, or taken as
    they are.
patch : int
    Edge of the patches that are mapped at a time (voxels of the network's grid); 0: the card's.
halo : int
    Neighbours that a patch reads on every side (voxels of the network's grid); 0: the card's.
mirror : bool
    Whether the map is the mean of those of the images and of their seven mirror images."""

FROM_FIELD = """Invert by {what}.

Parameters
----------
field : (X, Y, Z) real tensor
    Local field (ppm).
mask : (X, Y, Z) bool tensor
    Where it is known.
zooms : tuple of float
    Voxel size (mm).
b0_direction : sequence of 3 floats
    Unit vector along B0 in voxel axes.
{choices}

Returns
-------
Susceptibility
    ``chosen`` names weights, hash, patches, the seam error that they cost, how far the maps of
    mirror images are from their mean, and the voxel size (mm) that was resampled to, if any.

Raises
------
ValueError
    If grids differ, the weights are not those of this network, their licence was not accepted, or
    patch or halo do not fit.

References
----------
.. [1] {reference}
"""


def _from_field(architecture: str, what: str, reference: str) -> Callable[..., Susceptibility]:
    """Make the inversion by a network of the local field: they differ by their weights alone."""

    @checked
    def invert(
        field: Tensor,
        mask: Tensor,
        zooms: Zooms,
        *,
        b0_direction: Sequence[float] = AXIAL,
        weights: str = architecture,
        licence: str = "",
        grid: Grid = "card",
        patch: Voxels = 0,
        halo: Voxels = 0,
        mirror: bool = True,
    ) -> Susceptibility:
        model = load(weights, architecture=architecture, licence=licence)
        chi, made = reconstruct(
            model, mask, zooms, field=field,
            b0_direction=b0_direction, grid=grid, patch=patch, halo=halo, mirror=mirror,
        )  # fmt: skip
        return Susceptibility(chi, None, made)

    invert.__name__ = invert.__qualname__ = architecture.replace("-", "_")
    invert.__doc__ = FROM_FIELD.format(what=what, reference=reference, choices=CHOICES)
    return invert


unet = _from_field(
    "unet",
    "a 3D U-Net [1]_ (:class:`.unet.UNet`)",
    "Jochmann, Haueisen, Schweser. How to train a deep convolutional neural network for\n"
    "   quantitative susceptibility mapping (QSM). ISMRM, abstract",
)
qsmgan = _from_field(
    "qsmgan",
    "the generator of QSMGAN [1]_ (:class:`.qsmgan.Generator`)",
    "Chen et al. NeuroImage 207 (2020) 116389, doi:10.1016/j.neuroimage.2019.116389",
)
si_qsm = _from_field(
    "si-qsm",
    "SI-QSM [1]_ (:class:`.si_qsm.SIQSM`), which takes the mask as well",
    "Larrain. Scale-invariant deep learning approach for QSM reconstruction: SI-QSM. Thesis,\n"
    "   Pontificia Universidad Catolica de Chile (2022)",
)
meta_qsm = _from_field(
    "meta-qsm",
    "Meta-QSM [1]_ (:class:`.meta_qsm.MetaQSM`), whose kernels fit the voxel size",
    "Liu, Koch. Meta-QSM: an image-resolution-arbitrary network for QSM reconstruction\n"
    "   (2019), arXiv:1908.00206",
)


def _with_choices(invert: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Tell in the docstring of the choices that all networks have."""
    assert invert.__doc__ is not None
    invert.__doc__ = inspect.cleandoc(invert.__doc__).format(choices=CHOICES)
    return invert


@checked
@_with_choices
def cpsi_net(
    phase: Tensor,
    mask: Tensor,
    zooms: Zooms,
    *,
    echo_times: Sequence[float],
    field_strength: float,
    magnitude: Tensor | None = None,
    b0_direction: Sequence[float] = AXIAL,
    filtered: bool = False,
    weights: str = "cpsi-net",
    licence: str = "",
    grid: Grid = "card",
    patch: Voxels = 0,
    halo: Voxels = 0,
    mirror: bool = True,
) -> Susceptibility:
    """Invert the high-pass filtered phase of SWI by C-Psi-Net [1]_ (:class:`.cpsi_net.CPsiNet`).

    Of several echoes the one is taken whose phase of 1 ppm is nearest to that of the training; the
    rest of the difference is a factor of the filtered phase.

    Parameters
    ----------
    phase : (E, X, Y, Z) real tensor
        Phase (rad), wrapped or not, that grows with the field.
    mask : (X, Y, Z) bool tensor
        Where it is known.
    zooms : tuple of float
        Voxel size (mm).
    echo_times : sequence of float
        s.
    field_strength : float
        T.
    magnitude : (E, X, Y, Z) real tensor, optional
        Magnitude of the same echoes: weights the low-pass filter.
    b0_direction : sequence of 3 floats
        Unit vector along B0 in voxel axes.
    filtered : bool
        Whether the scanner has already high-pass filtered the phase.
    {choices}

    Returns
    -------
    Susceptibility
        As of :func:`unet`.

    Raises
    ------
    ValueError
        As by :func:`unet`.

    References
    ----------
    .. [1] Lu et al. Reconstruction of quantitative susceptibility maps from phase of
       susceptibility weighted imaging with cross-connected Psi-Net. ISBI (2021)
    """
    model = load(
        weights, architecture="cpsi-net", licence=licence, given=("filtered phase", "mask")
    )
    trained = model.card.domain.radians_per_ppm
    scales = [radians_per_ppm(field_strength, time) for time in echo_times]
    echo = min(range(len(scales)), key=lambda e: abs(scales[e] - trained))
    known = torch.where(mask, phase[echo], 0)
    if not filtered:
        size = torch.ones_like(known) if magnitude is None else magnitude[echo]
        known = high_pass(known, mask, zooms, magnitude=size, b0_direction=b0_direction)
    chi, made = reconstruct(
        model, mask, zooms, filtered=trained / scales[echo] * known,
        b0_direction=b0_direction, grid=grid, patch=patch, halo=halo, mirror=mirror,
    )  # fmt: skip
    return Susceptibility(chi, None, {"echo": echo + 1, **made})
