"""The door to SimpleITK: rigid registration."""

import itertools
import math
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk  # noqa: N813
from torch import Tensor

from qsmpipe.numerics.fourier import Zooms
from qsmpipe.numerics.masks.morphology import dilate

LEVELS = (4.0, 2.0, 0.0)
"""Voxel size (mm) of the images at each level, coarse to fine; 0 for their own."""

BINS = (8, 32)
"""Of the joint histogram, at least and at most; between them the cube root of the voxels that are
compared. With few voxels in many bins, any two images seem to know much of one another."""

SAMPLES = 200_000
"""Voxels at most that the metric looks at, evenly taken from the mask."""

MARGIN = 6.0
"""What is compared reaches this far beyond the mask (mm): the edge of the brain tells most. On a
simulated head of 3.4 mm voxels it took the error from 0.4 to 0.2 degrees."""

STARTS = (-30.0, 0.0, 30.0)
"""Turns about each axis (degrees) that are tried at the coarsest level; all combinations."""

TRIED = 3
"""Starts that are followed, the best ones."""

MAX_ITERATIONS = 300

MIN_STEP = 1e-4
"""Least step of the optimiser (mm, as the mask moves by it)."""

TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""Between NIfTI's world axes and ITK's."""


class Placed(NamedTuple):
    """An image and where it lies."""

    image: Tensor
    """(X, Y, Z)."""
    affine: np.ndarray
    """Voxel to world coordinates (mm), 4 x 4."""
    mask: Tensor
    """(X, Y, Z) bool: the head's rigid part."""

    @property
    def zooms(self) -> Zooms:
        """Voxel size (mm)."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return x, y, z

    @property
    def centre(self) -> np.ndarray:
        """Middle of the mask in world coordinates (mm)."""
        voxel = self.mask.nonzero().double().mean(0).cpu().numpy()
        return self.affine[:3, :3] @ voxel + self.affine[:3, 3]


def register(fixed: Placed, moving: Placed) -> np.ndarray:
    """Find the rigid motion that takes world points of ``fixed`` to those of ``moving``.

    Mutual information of Mattes [1]_, by SimpleITK [2]_: shading and loss of signal change as the
    head turns, and it bears with both (to divide the shading out first made it worse). The middles
    of the masks are laid on one another, turns of all kinds are tried on coarse images, and the
    best are refined, coarse to fine. One thread and evenly taken voxels: the same images give the
    same motion.

    Parameters
    ----------
    fixed, moving : Placed
        Magnitudes, and masks of the brain: what is compared lies in the mask of ``fixed`` and
        :data:`MARGIN` around it.

    Returns
    -------
    (4, 4) array
        World (mm) of ``fixed`` to world of ``moving``.

    Raises
    ------
    ValueError
        If a mask is empty, or the registration fails.

    References
    ----------
    .. [1] Mattes et al. IEEE Trans Med Imaging 22 (2003) 120, doi:10.1109/TMI.2003.809072
    .. [2] Lowekamp et al. Front Neuroinform 7 (2013) 45, doi:10.3389/fninf.2013.00045
    """
    for name, placed in (("fixed", fixed), ("moving", moving)):
        if not placed.mask.any():
            msg = f"the mask of the {name} image is empty: there is nothing to register"
            raise ValueError(msg)
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)  # sums in another order, another motion
    try:
        starts = _starts(TO_LPS[:3, :3] @ fixed.centre, TO_LPS[:3, :3] @ moving.centre)
        for level, zoom in enumerate(LEVELS):
            search = _Search.at(fixed, moving, zoom)
            starts = sorted(starts, key=search.value)[: TRIED if level == 0 else 1]
            starts = [search.refined(start) for start in starts]
    except RuntimeError as error:
        cause = str(error).strip().splitlines()[-1]
        msg = f"the images could not be registered ({cause}): do they show the same head?"
        raise ValueError(msg) from error
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    matrix, centre = np.eye(4), np.array(starts[0].GetCenter())
    matrix[:3, :3] = np.array(starts[0].GetMatrix()).reshape(3, 3)
    matrix[:3, 3] = np.array(starts[0].GetTranslation()) + centre - matrix[:3, :3] @ centre
    return TO_LPS @ matrix @ TO_LPS


def turned_by(motion: np.ndarray) -> float:
    """Angle (degrees) of a rigid motion (4, 4)."""
    return math.degrees(math.acos(np.clip((np.trace(motion[:3, :3]) - 1) / 2, -1, 1)))


def _starts(fixed: np.ndarray, moving: np.ndarray) -> list[sitk.VersorRigid3DTransform]:
    """Motions that lay one middle on the other, with all turns of :data:`STARTS`."""
    starts = []
    for angles in itertools.product(map(math.radians, STARTS), repeat=3):
        shift = (moving - fixed).tolist()
        turned = sitk.Euler3DTransform(fixed.tolist(), *angles, shift)
        start = sitk.VersorRigid3DTransform()
        start.SetCenter(fixed.tolist())
        start.SetMatrix(turned.GetMatrix(), 1e-6)
        start.SetTranslation(shift)
        starts.append(start)
    return starts


class _Search(NamedTuple):
    """Both images at one level, and where they are compared."""

    fixed: sitk.Image
    moving: sitk.Image
    inside: sitk.Image

    @classmethod
    def at(cls, fixed: Placed, moving: Placed, zoom: float) -> "_Search":
        coarse = _coarse(_itk(fixed.image, fixed.affine), zoom)
        wide = dilate(fixed.mask, fixed.zooms, radius=MARGIN)
        mask = sitk.Cast(_itk(wide.float(), fixed.affine), sitk.sitkUInt8)
        inside = sitk.Resample(mask, coarse, sitk.Transform(), sitk.sitkNearestNeighbor)
        return cls(coarse, _coarse(_itk(moving.image, moving.affine), zoom), inside)

    def value(self, motion: sitk.Transform) -> float:
        """Metric, the less the better."""
        method = self._method()
        method.SetInitialTransform(motion)
        return method.MetricEvaluate(self.fixed, self.moving)

    def refined(self, motion: sitk.Transform) -> sitk.VersorRigid3DTransform:
        method = self._method()
        method.SetOptimizerAsRegularStepGradientDescent(
            learningRate=1.0,
            minStep=MIN_STEP,
            numberOfIterations=MAX_ITERATIONS,
            relaxationFactor=0.8,
            gradientMagnitudeTolerance=1e-8,
        )
        method.SetOptimizerScalesFromPhysicalShift()
        best = sitk.VersorRigid3DTransform(motion)
        method.SetInitialTransform(best, inPlace=True)
        method.Execute(self.fixed, self.moving)
        return best

    def _method(self) -> sitk.ImageRegistrationMethod:
        method = sitk.ImageRegistrationMethod()
        count = int(sitk.GetArrayViewFromImage(self.inside).sum())
        least, most = BINS
        bins = min(max(round(min(count, SAMPLES) ** (1 / 3)), least), most)
        method.SetMetricAsMattesMutualInformation(numberOfHistogramBins=bins)
        # differences of neighbours: the smoothed gradient, ITK's own choice, led uphill at edges
        method.MetricUseMovingImageGradientFilterOff()
        method.MetricUseFixedImageGradientFilterOff()
        method.SetMetricFixedMask(self.inside)
        method.SetInterpolator(sitk.sitkLinear)
        if count > SAMPLES:
            method.SetMetricSamplingStrategy(method.REGULAR)
            method.SetMetricSamplingPercentage(SAMPLES / count, seed=1)
        return method


def _itk(image: Tensor, affine: np.ndarray) -> sitk.Image:
    """Make an ITK image (axes reversed in memory) where the NIfTI affine says."""
    made = sitk.GetImageFromArray(np.ascontiguousarray(image.cpu().numpy().T, dtype=np.float32))
    placed = TO_LPS @ affine
    zooms = np.linalg.norm(placed[:3, :3], axis=0)
    made.SetSpacing(zooms.tolist())
    made.SetDirection((placed[:3, :3] / zooms).ravel().tolist())
    made.SetOrigin(placed[:3, 3].tolist())
    return made


def _coarse(image: sitk.Image, zoom: float) -> sitk.Image:
    """Average blocks of about ``zoom`` mm; finer images stay as they are.

    Blocks, not every other voxel: those lie off the blocks' middles, to the other side where an
    image is flipped.
    """
    factors = [max(1, round(zoom / own)) for own in image.GetSpacing()]
    return image if max(factors) == 1 else sitk.BinShrink(image, factors)
