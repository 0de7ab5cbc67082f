"""Losses between cells against values of the official code, and against slow loops over pictures and cells."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.losses.pixels import cell_centres, pixel_consistency, pixel_contrast, positive_cells, propagate

with np.load(Path(__file__).parents[1] / "reference" / "pixpro.npz", allow_pickle=False) as arrays:
    REFERENCE = {k: torch.from_numpy(arrays[k]) for k in arrays.files if not k.startswith("net_")}


def near(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def slow_positive(box_q, box_k, size_q, size_k, threshold):
    """Pair after pair, for one picture."""

    def places(box, height, width):
        x1, y1, x2, y2 = box
        return [
            (x1 + (c + 0.5) * (x2 - x1) / width, y1 + (r + 0.5) * (y2 - y1) / height)
            for r in range(height)
            for c in range(width)
        ]

    def diagonal(box, height, width):
        return math.sqrt(((box[2] - box[0]) / width) ** 2 + ((box[3] - box[1]) / height) ** 2)

    larger = max(diagonal(box_q, *size_q), diagonal(box_k, *size_k))
    return [[math.dist(a, b) / larger < threshold for b in places(box_k, *size_k)] for a in places(box_q, *size_q)]


def slow_consistency(q, k, positives, scale):
    per_picture = []
    for a, b, mask in zip(q.flatten(2), k.flatten(2), positives, strict=True):
        cosines = [F.cosine_similarity(a[:, i], b[:, j], dim=0) for i, j in mask.nonzero().tolist()]
        per_picture.append(-scale * sum(cosines, q.new_zeros(())) / float(np.float32(len(cosines)) + np.float32(1e-6)))
    return torch.stack(per_picture)


def slow_contrast(q, k, positives, t):
    per_picture = []
    for a, b, mask in zip(q.flatten(2), k.flatten(2), positives, strict=True):
        rows = []
        for i in range(a.shape[1]):
            e = torch.stack([(F.cosine_similarity(a[:, i], b[:, j], dim=0) / t).exp() for j in range(b.shape[1])])
            if mask[i].any():
                rows.append(-(e[mask[i]].sum() / e.sum()).log())
        per_picture.append(sum(rows, q.new_zeros(())) / max(len(rows), 1))
    return torch.stack(per_picture)


def slow_propagate(x, g, gamma, clamp):
    out = torch.zeros(x.shape[0], g.shape[1], *x.shape[2:], dtype=x.dtype)
    cells, values, sums = x.flatten(2), g.flatten(2), out.flatten(2)
    for n in range(len(x)):
        for i in range(cells.shape[2]):
            for j in range(cells.shape[2]):
                s = max(float(F.cosine_similarity(cells[n, :, i], cells[n, :, j], dim=0)), clamp)
                sums[n, :, i] += (s + (1e-6 if gamma < 1 else 0)) ** gamma * values[n, :, j] / values[n, :, j].norm()
    return sums.view_as(out)


def draw(seed, n=3, size_q=(3, 4), size_k=(2, 3), c=5):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(n, c, *size_q, generator=g, dtype=torch.float64)
    k = torch.randn(n, c, *size_k, generator=g, dtype=torch.float64)
    low, side = torch.rand(2, n, 2, generator=g, dtype=torch.float64), 0.1 + torch.rand(2, n, 2, generator=g).double()
    boxes = torch.cat([low, low + side], 2)
    mirrored = torch.rand(2, n, generator=g) < 0.5
    return q, k, *torch.where(mirrored[..., None], boxes[..., [2, 1, 0, 3]], boxes)


def test_positive_cells_and_consistency_equal_the_official_code():
    q, k = (REFERENCE[name].clone().requires_grad_() for name in ("q", "k"))
    mask = positive_cells(REFERENCE["coord_q"], REFERENCE["coord_k"], (4, 5))
    assert torch.equal(mask, REFERENCE["mask_0.7"])
    # Their gradients stop at the normalised maps, whose length-one rows lose the part along themselves.
    unit_q, unit_k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    loss = pixel_consistency(q, k, mask)
    near(loss, REFERENCE["regression_0.7_loss"])
    loss.backward()
    for ours, unit, theirs in ((q, unit_q, "q"), (k, unit_k, "k")):
        wanted = torch.autograd.grad(unit, ours, REFERENCE[f"regression_0.7_grad_{theirs}"])[0]
        near(ours.grad, wanted)


@pytest.mark.parametrize("case", ["identity_2.0", "linear_2.0", "identity_0.5"])
def test_propagation_equals_the_official_code(case):
    x = REFERENCE["q"].clone().requires_grad_()
    value = F.conv2d(x, REFERENCE["value_w"], REFERENCE["value_b"]) if "linear" in case else None
    y = propagate(x, value, gamma=float(case.split("_")[1]))
    near(y, REFERENCE[f"ppm_{case}_out"])
    y.square().sum().backward()
    near(x.grad, REFERENCE[f"ppm_{case}_grad_x_of_sum_sq"])


@given(st.integers(0, 10_000), st.sampled_from([0.3, 0.7, 1.5]))
@settings(max_examples=25, deadline=None)
def test_positive_cells_equal_the_slow_way_and_transpose_for_exchanged_views(seed, threshold):
    _, _, boxes_q, boxes_k = draw(seed)
    found = positive_cells(boxes_q, boxes_k, (3, 4), (2, 3), threshold=threshold)
    slow = [
        slow_positive(a, b, (3, 4), (2, 3), threshold) for a, b in zip(boxes_q.tolist(), boxes_k.tolist(), strict=True)
    ]
    assert found.tolist() == slow
    assert torch.equal(positive_cells(boxes_k, boxes_q, (2, 3), (3, 4), threshold=threshold), found.transpose(1, 2))


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_losses_equal_the_slow_way(seed):
    q, k, boxes_q, boxes_k = draw(seed)
    mask = positive_cells(boxes_q, boxes_k, (3, 4), (2, 3))
    near(pixel_consistency(q, k, mask, scale=1.5, reduction="none"), slow_consistency(q, k, mask, 1.5))
    near(pixel_contrast(q, k, mask, temperature=0.4, reduction="none"), slow_contrast(q, k, mask, 0.4))
    near(pixel_contrast(q, k, mask, temperature=0.4), slow_contrast(q, k, mask, 0.4).mean())
    near(pixel_contrast(q, k, mask, temperature=0.4, reduction="sum"), slow_contrast(q, k, mask, 0.4).sum())


@pytest.mark.parametrize(("gamma", "clamp"), [(2.0, 0.0), (1.0, 0.0), (0.5, 0.0), (3.0, 0.2)])
def test_propagation_equals_the_slow_way(gamma, clamp):
    x, g, *_ = draw(1, size_k=(3, 4))
    near(propagate(x, g, gamma=gamma, clamp=clamp), slow_propagate(x, g, gamma, clamp))


def test_gradients_are_right():
    q, k, *_ = draw(3, n=2, size_q=(2, 2), size_k=(2, 2), c=3)
    mask = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[1, 2] = False
    q.requires_grad_()
    k.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: pixel_consistency(a, b, mask), (q, k))
    assert torch.autograd.gradcheck(lambda a, b: pixel_contrast(a, b, mask), (q, k))
    assert torch.autograd.gradcheck(lambda a, b: propagate(a, b), (q, k))


def test_a_mirrored_view_is_put_right():
    box, mirrored = torch.tensor([[0.2, 0.1, 0.8, 0.9]]), torch.tensor([[0.8, 0.1, 0.2, 0.9]])
    plain, turned = cell_centres(box, 2, 3).view(2, 3, 2), cell_centres(mirrored, 2, 3).view(2, 3, 2)
    torch.testing.assert_close(plain, turned.flip(1))
    # A cell and the one that shows the same place are a pair wherever they stand in the two maps.
    mask = positive_cells(box, mirrored, (2, 3), threshold=0.4).view(2, 3, 2, 3)
    assert mask[0, 0, 0].tolist() == [False, False, True]
    assert not mask[0, 0, 1].any()


def test_the_distance_counts_in_the_larger_cell():
    """One coarse cell has many fine ones as positives."""
    coarse, fine = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[0.0, 0.0, 0.5, 0.5]])
    mask = positive_cells(coarse, fine, (2, 2))
    assert mask[0].sum(1).tolist() == [4, 2, 2, 0]


def test_the_threshold_is_strict():
    box, beside = torch.tensor([[0.0, 0.0, 3.0, 4.0]]), torch.tensor([[3.0, 4.0, 6.0, 8.0]])
    assert not positive_cells(box, beside, (1, 1), threshold=1.0).any()  # one diagonal apart
    assert positive_cells(box, beside, (1, 1), threshold=1.0001).all()


@pytest.mark.parametrize("loss", [pixel_consistency, pixel_contrast])
def test_views_that_do_not_touch_give_nothing_but_count(loss):
    q, k, *_ = draw(5, size_k=(3, 4))
    mask = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(1)) < 0.3
    mask[1] = False
    q.requires_grad_()
    each = loss(q, k, mask, reduction="none")
    assert each[1] == 0
    torch.testing.assert_close(loss(q, k, mask), (each[0] + each[2]) / 3)
    total = loss(q, k, torch.zeros_like(mask))
    total.backward()
    assert total == 0
    assert (q.grad == 0).all()


def test_half_precision_is_computed_in_float32():
    q, k, *_ = draw(6, size_k=(3, 4))
    mask = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(1)) < 0.3
    low_q, low_k = q.bfloat16(), k.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for loss in (pixel_consistency, pixel_contrast):
            found = loss(low_q, low_k, mask)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, loss(low_q.float(), low_k.float(), mask))
        assert propagate(low_q).dtype == torch.float32


def test_extreme_and_empty_input_stay_finite():
    q, k, boxes_q, boxes_k = draw(7, size_k=(3, 4))
    q[0], k[0] = 0, 0  # after a ReLU all channels of a cell may be 0
    q = q.mul(1e8).float().requires_grad_()
    mask = positive_cells(boxes_q, boxes_k, (3, 4))
    y = propagate(q)
    loss = pixel_consistency(y, k.float(), mask) + pixel_contrast(q, k.float(), mask, temperature=1e-3)
    loss.backward()
    assert loss.isfinite()
    assert q.grad.isfinite().all()
    assert pixel_consistency(q[:0], k[:0].float(), mask[:0]) == 0


def test_what_does_not_fit_is_named():
    q, k, boxes_q, boxes_k = draw(8)
    mask = positive_cells(boxes_q, boxes_k, (3, 4), (2, 3))
    with pytest.raises(UsageError, match=r"positives must be booleans of shape \(3, 12, 6\)"):
        pixel_consistency(q, k, mask.transpose(1, 2))
    with pytest.raises(UsageError, match=r"maps must be of shape \(N, C, h, w\)"):
        pixel_contrast(q.flatten(2), k, mask)
    with pytest.raises(UsageError, match="reduction"):
        pixel_contrast(q, k, mask, reduction="all")
    with pytest.raises(UsageError, match=r"boxes must be of shape \(N, 4\)"):
        cell_centres(boxes_q[:, :3], 2, 2)
    with pytest.raises(UsageError, match="a box per picture"):
        positive_cells(boxes_q, boxes_k[:2], (2, 2))
