"""Views are functions of (seed, epoch, sample, view), and draw what they say."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF
from torchvision.transforms.v2.functional import _geometry

from contralto.data.images import ImageError, decode_image
from contralto.errors import UsageError
from contralto.views import image as module
from contralto.views.image import (
    EvalView,
    View,
    draw_views,
    strong_view,
    view_generator,
    weak_view,
)

from tests.conftest import bomb, encode


@pytest.fixture(autouse=True)
def _bytes_are_resized_as_bytes(monkeypatch):
    # torchvision before 0.22 does so with AVX2 only, and with AVX512 gives values that differ by one level of 255.
    monkeypatch.setattr(_geometry, "_do_native_uint8_resize_on_cpu", lambda interpolation: True)


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


def slow_view(view, image, rng):
    """The definition, by torchvision's functional operations in float."""
    top, left, height, width = view.place(*image.shape[1:], rng)
    out = TF.resized_crop(image, top, left, height, width, [view.size] * 2, antialias=True).float() / 255
    if view.grayscale and rng.random() < view.grayscale:
        out = TF.rgb_to_grayscale(out, num_output_channels=3)
    if view.jitter:
        brightness, contrast, saturation = rng.uniform(1 - view.jitter, 1 + view.jitter, 3)
        hue = rng.uniform(-view.jitter, view.jitter)
        for step in rng.permutation(4):
            out = (
                TF.adjust_brightness(out, brightness),
                TF.adjust_contrast(out, contrast),
                TF.adjust_saturation(out, saturation),
                TF.adjust_hue(out, hue),
            )[step]
    if rng.random() < view.flip:
        out = out.flip(2)
    values, vectors = np.array([0.2175, 0.0188, 0.0045]), [
        [-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]
    ]  # fmt: skip
    out = out + torch.from_numpy(np.array(vectors) @ (rng.normal(0, view.lighting, 3) * values)).view(3, 1, 1).float()
    return TF.normalize(out, list(view.mean), list(view.std))


@pytest.mark.parametrize("make", [weak_view, strong_view])
def test_a_view_is_what_torchvision_makes_of_the_same_draws(make):
    view = make(24, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    for i in range(40):
        torch.testing.assert_close(
            view(IMAGE, view_generator(0, 0, i, 0)),
            slow_view(view, IMAGE, view_generator(0, 0, i, 0)),
            atol=1e-3,
            rtol=0,
        )


def test_the_test_view_is_resize_and_centre_crop():
    for crop in (0.875, 1.0):
        view = EvalView(16, crop=crop, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
        for image in (IMAGE, IMAGE.transpose(1, 2), IMAGE[:, :13, :11]):
            expected = TF.center_crop(TF.resize(image, [round(16 / crop)], antialias=True), [16, 16]).float() / 255
            torch.testing.assert_close(view(image), TF.normalize(expected, [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]))
    with pytest.raises(UsageError, match="crop"):
        EvalView(16, crop=1.5)


def photograph(height, width, **options):
    """Smooth with edges, as photographs are."""
    small = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    return picture, encode(picture, "JPEG", quality=95, **options)


@pytest.mark.parametrize(("orientation", "shape"), [(1, (400, 600)), (6, (400, 600)), (1, (397, 611))])
def test_a_large_jpeg_is_decoded_at_a_smaller_scale_and_looks_the_same(orientation, shape, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = orientation
    _, data = photograph(*shape, exif=exif)
    views = [weak_view(40, (0.5,) * 3, (0.5,) * 3), strong_view(40, (0.5,) * 3, (0.5,) * 3), EvalView(40)]
    whole = torch.from_numpy(decode_image(data)).permute(2, 0, 1)
    sizes = []
    load = module.load_image
    monkeypatch.setattr(module, "load_image", lambda *a: (image := load(*a), sizes.append(min(image.size)))[0])
    for i in range(20):
        drawn = draw_views(data, views, [view_generator(0, 0, i, v) for v in range(3)])
        for v, (view, small) in enumerate(zip(views, drawn, strict=True)):
            large = view(whole, view_generator(0, 0, i, v))
            assert (small - large).abs().mean() < 0.02 / view.std[0]
    assert any(s < min(shape) / 1.9 for s in sizes[::4])


def test_a_jpeg_keeps_its_scale_where_a_view_needs_it_and_other_formats_always():
    picture, data = photograph(160, 240)
    view = weak_view(100, (0.5,) * 3, (0.5,) * 3)
    whole = torch.from_numpy(decode_image(data)).permute(2, 0, 1)
    assert torch.equal(
        draw_views(data, [view], [view_generator(0, 0, 1, 0)])[0], view(whole, view_generator(0, 0, 1, 0))
    )
    small = weak_view(20, (0.5,) * 3, (0.5,) * 3)
    png = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    drawn = draw_views(encode(picture, "PNG"), [small], [view_generator(0, 0, 1, 0)])[0]
    assert torch.equal(drawn, small(png, view_generator(0, 0, 1, 0)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_turned_pictures_of_any_format_are_cut_where_their_pixels_are(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    for shape in ((48, 96), (45, 97)):
        data = encode(photograph(*shape)[0].resize(shape[::-1]), kind, exif=exif)
        whole = torch.from_numpy(decode_image(data)).permute(2, 0, 1)
        for view in (weak_view(24, (0.5,) * 3, (0.5,) * 3), EvalView(24)):
            for i in range(5):
                drawn = draw_views(data, [view], [view_generator(0, 0, i, 0)])[0]
                assert torch.equal(drawn, view(whole, view_generator(0, 0, i, 0)))


def test_views_of_bytes_are_bounded_and_name_what_is_broken():
    _, data = photograph(160, 240)
    for broken, reason in (
        (data[: len(data) // 2], "truncated"),
        (bomb(30_000), "too many pixels"),
        (b"", "empty file"),
    ):
        with pytest.raises(ImageError) as caught:
            draw_views(broken, [EvalView(16)], [None])
        assert caught.value.reason == reason
