"""Changes of colour are those of torchvision, each picture with factors of its own."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from contralto.views.colour import adjust_hue, change_colours, rgb_to_grey, solarize

STEPS = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)


def awkward(seed=0):
    """Noise with greys, ties of two channels, black and white."""
    picture = np.random.default_rng(seed).random((3, 20, 30), dtype=np.float32)
    picture[:, :4] = picture[0, :4]
    picture[1, 4:6] = picture[0, 4:6]
    picture[2, 6:8] = picture[1, 6:8]
    picture[0, 8:10] = picture[2, 8:10]
    picture[:, 10:12] = 0.0
    picture[:, 12] = 1.0
    return torch.from_numpy(picture)


def test_grey_is_that_of_torchvision():
    picture = awkward()
    torch.testing.assert_close(rgb_to_grey(picture[None])[0], TF.rgb_to_grayscale(picture), atol=1e-6, rtol=0)


def test_colours_are_those_of_torchvision():
    rng = np.random.default_rng(0)
    for _ in range(60):
        pictures = torch.stack([awkward(seed) for seed in range(3)])
        hues = rng.choice([-0.5, -1 / 3, 0.0, 1 / 6, 0.5, rng.uniform(-0.5, 0.5)], (3, 1))
        factors = torch.from_numpy(np.append(rng.uniform(0, 2, (3, 3)), hues, 1).astype(np.float32))
        order = rng.permutation(4).tolist()
        expected = pictures.clone()
        for i in range(3):
            for step in order:
                expected[i] = STEPS[step](expected[i], float(factors[i, step]))
        ours = pictures * 255
        assert change_colours(ours, factors, order) is ours
        torch.testing.assert_close(ours / 255, expected, atol=1e-4, rtol=0)  # far below 1/255
        for i in range(3):
            one = change_colours((pictures[i] * 255).numpy(), factors[i].numpy(), order)
            assert one.dtype == np.float32
            np.testing.assert_allclose(one, ours[i], atol=1e-2)


@pytest.mark.parametrize("turns", [-0.5, -0.2, 0.0, 0.01, 1 / 6, 0.3, 0.5])
def test_hue_keeps_the_largest_and_the_least(turns):
    picture = awkward()[None] * 255
    before = picture.clone()
    adjust_hue(picture, torch.tensor([turns]))
    torch.testing.assert_close(picture.amax(1), before.amax(1), atol=1e-3, rtol=0)
    torch.testing.assert_close(picture.amin(1), before.amin(1), atol=1e-3, rtol=0)
    adjust_hue(picture, torch.tensor([-turns]))
    torch.testing.assert_close(picture, before, atol=1e-2, rtol=0)


def test_grey_alone_is_changed_as_three_equal_channels():
    grey = torch.rand(2, 1, 10, 10, generator=torch.Generator().manual_seed(0)) * 255
    factors = torch.tensor([[1.3, 0.7, 1.2, 0.2], [0.5, 1.9, 0.1, -0.4]])
    three = change_colours(grey.repeat(1, 3, 1, 1), factors, (2, 0, 3, 1))
    torch.testing.assert_close(
        change_colours(grey, factors, (2, 0, 3, 1)).expand(-1, 3, -1, -1), three, atol=0.1, rtol=0
    )


def test_solarise_is_that_of_torchvision():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    assert torch.equal(solarize(levels.float()).to(torch.uint8), TF.solarize(levels, 128))
