"""Means over neighbourhoods, against scipy's."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from qsmpipe.numerics.smoothing import box_count, wide_gaussian


@pytest.mark.parametrize("zooms", [(1.0, 1.0, 1.0), (0.7, 2.0, 9.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wide_gaussian_is_that_of_scipy(zooms, dtype):
    images = torch.rand((2, 21, 18, 13), dtype=dtype, generator=torch.manual_seed(0)) - 0.3
    smooth = wide_gaussian(images, zooms, sigma=7.0)
    for image, found in zip(images, smooth, strict=True):
        expected = ndimage.gaussian_filter(
            image.double().numpy(), [7.0 / zoom for zoom in zooms], mode="constant", truncate=8.0
        )
        # scipy divides by the sum of its weights, which for 9 mm voxels is not quite 1.
        np.testing.assert_allclose(found.numpy(), expected, atol=2e-4 * expected.max())


def test_a_box_counts_what_the_grid_holds():
    mask = torch.rand((9, 8, 2), generator=torch.manual_seed(1)) < 0.4
    count = box_count(mask, (5, 3, 1))
    expected = ndimage.convolve(mask.numpy().astype(int), np.ones((5, 3, 1)), mode="constant")
    np.testing.assert_array_equal(count.numpy(), expected)
