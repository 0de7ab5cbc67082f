"""Views are functions of (seed, epoch, sample, view), and draw what they say."""

import numpy as np
import torch
from torchvision.transforms.v2 import functional as TF

from contralto.views.image import EvalView, View, strong_view, view_generator, weak_view

IMAGE = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 40, 60), dtype=np.uint8))


def test_same_key_same_pixels_other_key_other_pixels():
    view = strong_view(16, (0.5,) * 3, (0.5,) * 3)
    first = view(IMAGE, view_generator(1, 2, 3, 0))
    assert torch.equal(first, view(IMAGE, view_generator(1, 2, 3, 0)))
    for other in ((2, 2, 3, 0), (1, 3, 3, 0), (1, 2, 4, 0), (1, 2, 3, 1)):
        assert not torch.equal(first, view(IMAGE, view_generator(*other)))


def test_crops_cover_the_stated_share_of_the_area():
    from contralto.views.image import _crop

    shares = []
    for i in range(400):
        top, left, height, width = _crop(40, 60, (0.2, 1.0), (3 / 4, 4 / 3), np.random.default_rng(i))
        assert 0 <= top <= 40 - height
        assert 0 <= left <= 60 - width
        shares.append(height * width / 2400)
    assert 0.15 < min(shares) < 0.3
    assert np.mean(shares) > 0.4


def test_a_view_without_changes_is_a_plain_resize():
    view = View(16, scale=(1, 1), ratio=(1, 1), flip=0, lighting=0, mean=(0, 0, 0), std=(1, 1, 1))
    square = IMAGE[:, :40, :40]
    expected = TF.resize(square, [16, 16], antialias=True).float() / 255
    torch.testing.assert_close(view(square, view_generator(0, 0, 0, 0)), expected)


def test_flip_and_grey_are_drawn_with_their_probability():
    flips = greys = 0
    view = View(8, scale=(1, 1), ratio=(1, 1), flip=0.5, grayscale=0.2, lighting=0, mean=(0, 0, 0), std=(1, 1, 1))
    square = IMAGE[:, :40, :40]
    plain = TF.resize(square, [8, 8], antialias=True).float() / 255
    for i in range(300):
        out = view(square, view_generator(0, 0, i, 0))
        grey = bool((out[0] == out[1]).all())
        greys += grey
        flips += not torch.allclose(out.mean(0), (TF.rgb_to_grayscale(plain)[0] if grey else plain.mean(0)), atol=1e-3)
    assert 0.4 < flips / 300 < 0.6
    assert 0.12 < greys / 300 < 0.28


def test_the_test_view_draws_nothing_and_extreme_shapes_work():
    view = EvalView(16, crop=1.0)
    assert torch.equal(view(IMAGE), view(IMAGE, view_generator(0, 0, 0, 0)))
    for shape in ((3, 1, 50), (3, 50, 1), (3, 1, 1)):
        small = torch.zeros(shape, dtype=torch.uint8)
        assert weak_view(16, (0.5,) * 3, (0.5,) * 3)(small, view_generator(0, 0, 0, 0)).shape == (3, 16, 16)
        assert view(small).shape == (3, 16, 16)
