"""Decoding of untrusted bytes: bounded, in all the modes that the web has."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from contralto.data.images import ImageError, decode_image, duplicate_groups, perceptual_hash, probe_image

from tests.conftest import bomb, encode, picture


@pytest.mark.parametrize("side", [30_000, 8_000])
def test_a_decompression_bomb_is_refused_by_its_header(side):
    with pytest.raises(ImageError) as caught:
        decode_image(bomb(side))
    assert caught.value.reason == "too many pixels"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_formats_by_content_not_by_name(kind):
    data = encode(Image.new("RGB", (30, 20), (200, 30, 40)), kind)
    assert probe_image(data)[:2] == (30, 20)
    assert np.abs(decode_image(data).astype(int) - [200, 30, 40]).max() < 12


def test_modes_of_the_web():
    clear = Image.new("RGBA", (10, 10), (255, 0, 0, 0))
    assert (decode_image(encode(clear, "PNG")) == 255).all()
    deep = Image.fromarray(np.full((10, 10), 65535 // 2, np.uint16))
    assert abs(int(decode_image(encode(deep, "PNG"))[0, 0, 0]) - 127) <= 1
    cmyk = Image.new("CMYK", (10, 10), (0, 255, 255, 0))
    assert decode_image(encode(cmyk, "JPEG")).shape == (10, 10, 3)
    palette = Image.new("RGB", (10, 10), (10, 200, 30)).quantize(4)
    assert decode_image(encode(palette, "GIF"))[0, 0].tolist() == [10, 200, 30]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_rotation_is_applied_in_header_and_pixels(kind):
    image = Image.new("RGB", (30, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    data = encode(image, kind, exif=exif)
    assert probe_image(data)[:2] == (20, 30)
    assert decode_image(data).shape == (30, 20, 3)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 3), st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=20), st.integers(0, 5000)
)
def test_damaged_bytes_raise_only_the_named_error(kind, changes, cut):
    data = bytearray(picture((90, 90, 200), 0, kind=("PNG", "JPEG", "GIF", "WEBP")[kind]))
    for place, value in changes:
        data[place % len(data)] = value
    with contextlib.suppress(ImageError):
        assert decode_image(bytes(data[: max(cut, 1)])).shape[2] == 3


@given(st.binary(max_size=300))
def test_any_bytes_at_all(data):
    with pytest.raises(ImageError):
        decode_image(data)


def test_hashes_of_resized_and_recompressed_pictures_are_near_and_of_others_far():
    rng = np.random.default_rng(0)
    smooth = [
        np.asarray(Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((96, 96))) for _ in range(20)
    ]
    for i, image in enumerate(smooth):
        again = decode_image(encode(Image.fromarray(image).resize((70, 70)), "JPEG", quality=75))
        assert (perceptual_hash(image) ^ perceptual_hash(again)).bit_count() <= 6
        assert (perceptual_hash(image) ^ perceptual_hash(smooth[(i + 1) % 20])).bit_count() > 8


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 3))
def test_groups_equal_all_pairs(seed, distance):
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 2**63, 8, dtype=np.uint64)
    hashes = base[rng.integers(0, 8, 40)]
    for i in range(40):
        for bit in rng.integers(0, 64, rng.integers(0, 3)):
            hashes[i] ^= np.uint64(1) << np.uint64(bit)
    names = np.array([str(i) for i in range(40)])
    names[5] = names[30]
    group = list(range(40))
    for _ in range(40):
        for i in range(40):
            for j in range(40):
                if names[i] == names[j] or int(hashes[i] ^ hashes[j]).bit_count() <= distance:
                    group[i] = group[j] = min(group[i], group[j])
    assert duplicate_groups(hashes, names, max_distance=distance).tolist() == group
