"""Views of a batch: drawn like torchvision's, per sample, as a function of (seed, epoch, index, view) alone."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from contralto.errors import UsageError
from contralto.views import batched
from contralto.views.batched import (
    ORDERS,
    BatchView,
    DrawViews,
    apply_view,
    draw_batch,
    draw_parameters,
    uniforms,
)

RAW = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3}  # pixels come out with values from 0 to 255
MANY = 4000
STRONG = BatchView(
    16, (0.2, 1.0), jitter=(0.8, 0.6, 0.4, 0.2), jitter_p=0.8, grey=0.2, blur_p=0.5, solarize_p=0.3, **RAW
)


def pictures(count, height, width=None, seed=0):
    """Smooth colours with some noise: what photographs are like."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 255, (count, 3, 5, 5))).float()
    smooth = torch.nn.functional.interpolate(coarse, (height, width or height), mode="bicubic")
    noisy = smooth + torch.from_numpy(rng.normal(0, 12, smooth.shape)).float()
    return noisy.clamp(0, 255).to(torch.uint8)


def drawn(view, sizes, seed=0, epoch=0, number=0):
    return draw_parameters(view, sizes, uniforms(seed, epoch, np.arange(len(sizes)), number, 33))


def alike(ours, theirs):
    """Two samples of one distribution."""
    assert stats.ks_2samp(ours, theirs).pvalue > 1e-4


# What is drawn


@pytest.mark.parametrize("size", [(40, 60), (32, 32), (9, 100), (100, 3)], ids=str)
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.6, 0.9)], ids=str)
def test_crops_are_distributed_as_torchvisions(size, scale):
    height, width = size
    box = drawn(BatchView(8, scale), np.tile(size, (MANY, 1))).box
    picture = torch.zeros(1, *size)
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(8, scale)
    params = [crop.make_params([picture]) for _ in range(MANY)]
    theirs = np.array([[p[k] for k in ("top", "left", "height", "width")] for p in params])
    for i in range(4):
        alike(box[:, i], theirs[:, i])
    alike(box[:, 2] * box[:, 3], theirs[:, 2] * theirs[:, 3])
    alike(box[:, 3] / box[:, 2], theirs[:, 3] / theirs[:, 2])
    free = np.maximum(np.array(size) - box[:, 2:], 1)
    theirs_free = np.maximum(np.array(size) - theirs[:, 2:], 1)
    alike(box[:, 0] / free[:, 0], theirs[:, 0] / theirs_free[:, 0])
    assert (box[:, :2] >= 0).all()
    assert (box[:, 0] + box[:, 2] <= height).all()
    assert (box[:, 1] + box[:, 3] <= width).all()


def test_flip_grey_blur_solarise_and_jitter_come_as_often_as_they_should():
    d = drawn(STRONG, np.full((MANY, 2), 32))
    for drew, share in (
        (d.flip, 0.5),
        (d.grey, 0.2),
        (d.sigma > 0, 0.5),
        (d.solarize, 0.3),
        (d.order >= 0, 0.8),
    ):
        assert stats.binomtest(int(drew.sum()), MANY, share).pvalue > 1e-4
    alike(d.sigma[d.sigma > 0], np.random.default_rng(0).uniform(0.1, 2.0, MANY))
    never = drawn(dataclasses.replace(STRONG, flip=0, grey=0, blur_p=0, solarize_p=0, jitter_p=0), np.full((50, 2), 32))
    assert not np.stack([never.flip, never.grey, never.sigma, never.solarize]).any()
    assert (never.order == -1).all()
    always = drawn(
        dataclasses.replace(STRONG, flip=1, grey=1, blur_p=1, solarize_p=1, jitter_p=1), np.full((50, 2), 32)
    )
    assert always.flip.all()
    assert always.grey.all()
    assert always.sigma.all()
    assert always.solarize.all()
    assert (always.order >= 0).all()


def test_jitter_is_distributed_as_torchvisions():
    view = BatchView(8, jitter=(0.4, 1.5, 0.2, 0.1), jitter_p=1.0)
    d = drawn(view, np.full((MANY, 2), 32))
    jitter = v2.ColorJitter(0.4, 1.5, 0.2, 0.1)
    torch.manual_seed(0)
    theirs = [jitter.make_params([]) for _ in range(MANY)]
    for i, name in enumerate(("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")):
        alike(d.factors[:, i], np.array([p[name] for p in theirs]))
    orders = [ORDERS.index(tuple(int(i) for i in p["fn_idx"])) for p in theirs]
    ours, count = np.bincount(d.order, minlength=24), np.bincount(orders, minlength=24)
    assert stats.chi2_contingency([ours, count]).pvalue > 1e-4
    assert d.factors[:, 1].min() >= 0


def test_what_is_drawn_for_one_thing_tells_nothing_of_another():
    d = drawn(STRONG, np.full((MANY, 2), 64))
    columns = np.stack([*d.box.T, d.flip, *d.factors.T, d.order, d.grey, d.sigma, d.solarize], 1).astype(float)
    rank = stats.spearmanr(columns).statistic
    rank[2:4, 2:4] = rank[:2, 2:4] = rank[2:4, :2] = rank[:2, :2] = 0  # area, shape and place belong together
    np.fill_diagonal(rank, 0)
    assert abs(rank).max() < 4.5 / math.sqrt(MANY)


def test_uniform_numbers_are_uniform_and_differ_by_each_of_their_arguments():
    first = uniforms(1, 2, np.arange(MANY), 0, 33)
    assert first.min() >= 0
    assert first.max() < 1
    assert stats.kstest(first.ravel(), "uniform").pvalue > 1e-3
    for other in (
        uniforms(2, 2, np.arange(MANY), 0, 33),
        uniforms(1, 3, np.arange(MANY), 0, 33),
        uniforms(1, 2, np.arange(MANY), 1, 33),
        uniforms(1, 2, np.arange(MANY) + 1, 0, 33),
    ):
        assert not (first == other).any()
        assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 4.5 / math.sqrt(first.size)
    neighbours = np.corrcoef(first.T)
    np.fill_diagonal(neighbours, 0)
    assert abs(neighbours).max() < 4.5 / math.sqrt(MANY)
    # The published numbers of SplitMix64 from state 1234567 on.
    state = np.array([1234567], np.uint64)
    told = []
    for _ in range(3):
        state = state + batched._GOLDEN
        told.append(int(batched._mix(state)[0]))
    assert told == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_large_negative_and_per_sample_arguments():
    assert uniforms(-1, 2**40, [2**62], 7, 2).shape == (1, 2)
    mixed = uniforms(0, [0, 1], [5, 5], 0, 4)
    assert (mixed[0] == uniforms(0, 0, [5], 0, 4)).all()
    assert (mixed[1] == uniforms(0, 1, [5], 0, 4)).all()


# What is made of it


def one_by_torchvision(view, picture, d, i):
    """The pixels of one view by torchvision's functions on bytes, in the order of SimCLR and BYOL."""
    top, left, height, width = d.box[i].tolist()
    mode = v2.InterpolationMode.BILINEAR if view.interpolation == "bilinear" else v2.InterpolationMode.BICUBIC
    out = TF.resized_crop(picture, top, left, height, width, [view.size] * 2, interpolation=mode, antialias=True)
    if d.flip[i]:
        out = TF.horizontal_flip(out)
    out = out.float() / 255
    if d.order[i] >= 0:
        steps = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
        for step in ORDERS[d.order[i]]:
            out = steps[step](out, float(d.factors[i, step]))
    if d.grey[i]:
        out = TF.rgb_to_grayscale(out, num_output_channels=3)
    if d.sigma[i]:
        out = TF.gaussian_blur(out, [2 * view.blur_radius + 1] * 2, [float(d.sigma[i])] * 2)
    if d.solarize[i]:
        out = TF.solarize(out, 128 / 255)
    return out * 255


@pytest.mark.parametrize(
    "view",
    [
        STRONG,
        dataclasses.replace(STRONG, size=48, interpolation="bicubic"),
        dataclasses.replace(STRONG, size=64, scale=(0.5, 0.9), blur_kernel=9),
        dataclasses.replace(STRONG, size=33, jitter_p=0, grey=0, blur_p=0, solarize_p=0),
        dataclasses.replace(STRONG, size=20, jitter=(0, 0, 0, 0.5), jitter_p=1, blur_p=1, solarize_p=1, blur_kernel=-1),
    ],
    ids=["strong", "bicubic", "enlarged", "crop", "hue"],
)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
def test_pixels_are_those_of_torchvision_for_the_same_parameters(view, form):
    batch = pictures(60, 40, 50).contiguous(memory_format=form)
    d = drawn(view, np.tile((40, 50), (60, 1)))
    ours = apply_view(view, batch, d)
    assert ours.dtype == torch.float32
    for i in range(60):
        theirs = one_by_torchvision(view, batch[i], d, i)
        difference = (ours[i] - theirs).abs()
        if d.solarize[i]:  # a step at the threshold: a value on its other side may come out inverted
            difference = torch.minimum(difference, (255 - ours[i] - theirs).abs())
        # torch 2.6 rounds some pixels of the crop to the next level, which the colours may then spread
        assert difference.max() <= 8, (i, difference.max())
        assert difference.mean() < 0.5


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [7, 16, 32, 100])
def test_matrices_cut_as_integers_do(interpolation, size):
    view = BatchView(size, (0.2, 1.0), interpolation=interpolation, **RAW)
    batch, rows = pictures(60, 40, 50), np.arange(60)
    d = drawn(view, np.tile((40, 50), (60, 1)))
    by_matrices = batched._cut_by_matrices(view, batch, rows, d)
    difference = (batched._cut_one_by_one(view, batch, rows, d) - by_matrices).abs()
    assert difference.max() <= (1 if interpolation == "bilinear" else 2)
    assert difference.mean() < 0.25


def test_solarise_inverts_from_128_on():
    view = BatchView(2, (1, 1), (1, 1), flip=0, solarize_p=1, **RAW)
    batch = torch.tensor([[127, 128], [0, 255]], dtype=torch.uint8).expand(1, 3, 2, 2).contiguous()
    (out,), _ = draw_batch([view], batch, seed=0, epoch=0, index=[0])
    assert out[0, 0].tolist() == [[127, 127], [0, 0]]


def test_normalisation_is_that_of_torchvision():
    view = BatchView(8, (1, 1), (1, 1), flip=0)
    batch = pictures(3, 8)
    (out,), _ = draw_batch([view], batch, seed=0, epoch=0, index=[0, 1, 2])
    expected = TF.normalize(batch.float() / 255, list(view.mean), list(view.std))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


# Each sample for itself


def test_a_sample_is_the_same_alone_in_a_batch_in_any_order_and_on_any_canvas():
    batch, views = pictures(30, 24), [STRONG, dataclasses.replace(STRONG, size=9)]
    together, boxes = draw_batch(views, batch, seed=3, epoch=2, index=np.arange(100, 130))
    order = torch.from_numpy(np.random.default_rng(0).permutation(30))
    shuffled, _ = draw_batch(views, batch[order], seed=3, epoch=2, index=order + 100)
    canvas = torch.full((30, 3, 40, 31), 77, dtype=torch.uint8)
    canvas[:, :, :24, :24] = batch
    larger, larger_boxes = draw_batch(
        views, canvas, torch.full((30, 2), 24), seed=3, epoch=torch.full((30,), 2), index=torch.arange(100, 130)
    )
    for number in range(2):
        torch.testing.assert_close(shuffled[number], together[number][order], atol=1e-3, rtol=0)
        torch.testing.assert_close(larger[number], together[number], atol=1e-3, rtol=0)
        assert torch.equal(larger_boxes[number], boxes[number])
        for i in (0, 17, 29):
            alone, box = draw_batch(views, batch[i : i + 1], seed=3, epoch=2, index=[100 + i])
            torch.testing.assert_close(alone[number][0], together[number][i], atol=1e-3, rtol=0)
            assert torch.equal(box[number][0], boxes[number][i])


def test_same_key_same_pixels_other_key_other_pixels():
    batch = pictures(1, 24).expand(8, -1, -1, -1)

    def draw(seed=0, epoch=0, first=0):
        return draw_batch([STRONG, STRONG], batch, seed=seed, epoch=epoch, index=np.arange(first, first + 8))[0]

    one = draw()
    assert all(torch.equal(a, b) for a, b in zip(one, draw(), strict=True))
    for other in (draw(seed=1), draw(epoch=1), draw(first=8), one[::-1]):
        assert not any(torch.allclose(a, b) for a, b in zip(one[0], other[0], strict=True))
    for i in range(1, 8):  # the same picture, another row
        assert not torch.allclose(one[0][0], one[0][i])


@pytest.mark.parametrize("path", ["bytes", "matrices"])
def test_automatic_half_precision_changes_nothing(path, monkeypatch):
    if path == "matrices":
        monkeypatch.setattr(batched, "_cut_one_by_one", batched._cut_by_matrices)
    batch, view = pictures(20, 24), dataclasses.replace(STRONG, blur_p=1)
    (plain,), _ = draw_batch([view], batch, seed=0, epoch=0, index=range(20))
    with torch.autocast("cpu", torch.bfloat16):
        (same,), _ = draw_batch([view], batch, seed=0, epoch=0, index=range(20))
    assert torch.equal(same, plain)


def test_how_many_pictures_a_block_holds_changes_nothing(monkeypatch):
    batch = pictures(40, 20)
    (whole,), _ = draw_batch([STRONG], batch, seed=0, epoch=0, index=np.arange(40))
    monkeypatch.setattr(batched, "BLOCK_BYTES", 1)
    (single,), _ = draw_batch([STRONG], batch, seed=0, epoch=0, index=np.arange(40))
    torch.testing.assert_close(single, whole, atol=1e-3, rtol=0)


# Geometry


@pytest.mark.parametrize("path", ["bytes", "matrices"])
def test_boxes_point_at_the_pixels_that_were_cut(path, monkeypatch):
    """On a ramp of coordinates, every pixel says where it comes from."""
    if path == "matrices":
        monkeypatch.setattr(batched, "_cut_one_by_one", batched._cut_by_matrices)
    height, width = 101, 201
    ramp = torch.zeros(64, 3, 128, 256, dtype=torch.uint8)
    ramp[:, 0, :height, :width] = torch.arange(width, dtype=torch.uint8)
    ramp[:, 1, :height, :width] = torch.arange(height, dtype=torch.uint8)[:, None] * 2
    view = BatchView(12, (0.3, 1.0), **RAW)
    (out,), (boxes,) = draw_batch([view], ramp, np.tile((height, width), (64, 1)), seed=0, epoch=0, index=np.arange(64))
    x1, y1, x2, y2 = (boxes * torch.tensor([width - 1, height - 1] * 2)).T[:, :, None]
    mirrored = x1 > x2
    assert 0 < int(mirrored.sum()) < 64
    assert (y1 < y2).all()
    step = (torch.arange(12) + 0.5) / 12
    x = x1 - 0.5 + mirrored * 1.0 + step * (x2 - x1 + 1 - 2.0 * mirrored)
    y = y1 - 0.5 + step * (y2 - y1 + 1)
    assert (out[:, 0] - x[:, None, :]).abs()[:, :, 1:-1].max() < 1.2
    assert (out[:, 1] / 2 - y[:, :, None]).abs()[:, 1:-1].max() < 1.2


def test_a_crop_of_everything_has_the_corners_of_the_unit_square():
    view = BatchView(8, (1, 1), (1, 1), flip=0)
    for size in ((1, 1), (7, 7)):
        _, (box,) = draw_batch([view], pictures(1, 8), [size], seed=0, epoch=0, index=[0])
        assert box.tolist() == ([[0, 0, 1, 1]] if size == (7, 7) else [[0, 0, 0, 0]])
    _, (box,) = draw_batch([dataclasses.replace(view, flip=1)], pictures(1, 8), seed=0, epoch=0, index=[0])
    assert box.tolist() == [[1, 0, 0, 1]]


# Edges


@pytest.mark.parametrize("path", ["bytes", "matrices"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (3, 4), (40, 40)], ids=str)
def test_small_and_thin_pictures_in_batches_of_one_and_none(size, path, monkeypatch):
    if path == "matrices":
        monkeypatch.setattr(batched, "_cut_one_by_one", batched._cut_by_matrices)
    for side in (1, 2, 32):
        view = dataclasses.replace(STRONG, size=side, blur_p=1, interpolation="bicubic", blur_kernel=-1)
        (out,), (box,) = draw_batch([view], pictures(1, *size), seed=0, epoch=0, index=[1])
        assert out.shape == (1, 3, side, side)
        assert out.isfinite().all()
        assert ((box >= 0) & (box <= 1)).all()
    (out,), (box,) = draw_batch([STRONG], pictures(1, *size)[:0], seed=0, epoch=0, index=[])
    assert out.shape == (0, 3, 16, 16)
    assert box.shape == (0, 4)


def test_pictures_stay_as_they_are_and_global_randomness_too():
    batch = pictures(4, 20)
    before, state = batch.clone(), torch.get_rng_state()
    draw_batch(
        [dataclasses.replace(STRONG, size=20, scale=(1, 1), ratio=(1, 1))], batch, seed=0, epoch=0, index=range(4)
    )
    assert torch.equal(batch, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_becomes_views():
    batch = {
        "pictures": pictures(3, 20),
        "sizes": torch.full((3, 2), 20, dtype=torch.int32),
        "index": torch.tensor([4, 5, 6]),
        "epoch": 7,
        "label": torch.tensor([0, 1, -1]),
    }
    out = DrawViews([STRONG, STRONG], seed=1)(batch)
    assert sorted(out) == ["boxes", "epoch", "index", "label", "views"]
    expected, boxes = draw_batch([STRONG, STRONG], batch["pictures"], seed=1, epoch=7, index=[4, 5, 6])
    assert all(torch.equal(a, b) for a, b in zip(out["views"], expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(out["boxes"], boxes, strict=True))
    assert "pictures" in batch


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 0}, "size"),
        ({"scale": (0.5, 1.1)}, "scale"),
        ({"scale": (0.5, 0.1)}, "scale"),
        ({"ratio": (0.0, 1.0)}, "ratio"),
        ({"flip": 1.5}, "flip"),
        ({"grey": float("nan")}, "grey"),
        ({"jitter": (0.1, 0.1, 0.1, 0.6)}, "jitter"),
        ({"blur_kernel": 4}, "blur_kernel"),
        ({"blur_sigma": (0.0, 1.0)}, "blur_sigma"),
        ({"interpolation": "nearest"}, "interpolation"),
        ({"std": (1.0, 0.0, 1.0)}, "std"),
    ],
    ids=str,
)
def test_wrong_views_are_named(wrong, message):
    with pytest.raises(UsageError, match=message):
        BatchView(**{"size": 8} | wrong)


def test_wrong_batches_are_named():
    batch = pictures(2, 8)
    for wrong, message in (
        ({"pictures": batch.float()}, "uint8"),
        ({"pictures": batch[:, :1]}, "uint8"),
        ({"sizes": [[8, 8], [9, 8]]}, "picture 1"),
        ({"sizes": [[8, 8], [0, 8]]}, "picture 1"),
        ({"sizes": [[8, 8]]}, "sizes"),
        ({"sizes": 8}, "sizes"),
        ({"index": [0]}, "index"),
        ({"index": [0.5, 1.0]}, "index"),
        ({"epoch": [1, 2, 3]}, "epoch"),
    ):
        arguments = {"pictures": batch, "sizes": None, "epoch": 0, "index": [0, 1]} | wrong
        with pytest.raises(UsageError, match=message):
            draw_batch([STRONG], arguments.pop("pictures"), arguments.pop("sizes"), seed=0, **arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_same_pixels():
    batch, views = pictures(40, 40, 50), [STRONG, dataclasses.replace(STRONG, size=64, interpolation="bicubic")]
    ours, boxes = draw_batch(views, batch, seed=0, epoch=0, index=range(40))
    theirs, their_boxes = draw_batch(views, batch.cuda(), seed=0, epoch=0, index=range(40))
    for number in range(2):
        assert theirs[number].is_cuda
        difference = (ours[number] - theirs[number].cpu()).abs()
        assert difference.mean() < 0.5
        assert torch.equal(boxes[number], their_boxes[number].cpu())
