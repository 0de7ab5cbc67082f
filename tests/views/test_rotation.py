"""Rotation of pictures against PIL, for squares and others."""

import numpy as np
import pytest
import torch
from PIL import Image

from contralto.errors import UsageError
from contralto.views.rotation import rotate


@pytest.mark.parametrize("shape", [(33, 33), (24, 40)])
@pytest.mark.parametrize("degrees", [-50.0, 15.0, 120.0])
def test_a_picture_is_turned_as_pil_turns_it(shape, degrees):
    smooth = torch.nn.functional.interpolate(
        torch.rand(1, 1, 5, 7, generator=torch.Generator().manual_seed(0)), size=shape, mode="bicubic"
    )
    found = rotate(smooth, torch.tensor([degrees]))[0, 0].numpy()
    expected = np.asarray(Image.fromarray(smooth[0, 0].numpy()).rotate(degrees, Image.Resampling.BILINEAR))
    inside = np.asarray(Image.fromarray(np.ones(shape, np.float32)).rotate(degrees)) > 0
    inside[[0, 1, -2, -1]] = False
    inside[:, [0, 1, -2, -1]] = False
    assert np.abs(found - expected)[inside].mean() < 0.01


def test_each_picture_has_its_own_angle():
    x = torch.rand(3, 2, 8, 8)
    found = rotate(x, torch.tensor([0.0, 180.0, 90.0]))
    torch.testing.assert_close(found[0], x[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], x[1].flip(1, 2), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[2], x[2].rot90(1, (1, 2)), atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match="an angle for each"):
        rotate(x, torch.zeros(2))
