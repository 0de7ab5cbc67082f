"""The papers' views: their tables, and that each can be drawn."""

import pytest
import torch

from contralto.errors import UsageError
from contralto.views.batched import draw_batch
from contralto.views.presets import (
    adainf_pair,
    byol_pair,
    cacr_views,
    groco_views,
    moco_pair,
    multi_crop,
    pixpro_pair,
    simclr_pair,
)

ALL = {
    "simclr": simclr_pair(32),
    "moco": moco_pair(32),
    "byol": byol_pair(48),
    "pixpro": pixpro_pair(32),
    "swav": multi_crop(32, 16, 4),
    "groco": groco_views(32, 16, 2, count=4),
    "cacr": cacr_views(32),
    "adainf": adainf_pair(32),
    "adainf strong": adainf_pair(32, "strong", learner="byol"),
}


@pytest.mark.parametrize("name", ALL)
def test_every_preset_can_be_drawn_and_its_views_differ(name):
    views = ALL[name]
    pictures = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels, boxes = draw_batch(views, pictures, seed=0, epoch=0, index=range(4))
    assert [p.shape[-1] for p in pixels] == [v.size for v in views]
    assert all(p.isfinite().all() for p in pixels)
    assert len({tuple(b.flatten().tolist()) for b in boxes}) == len(views) >= 2


def table(views):
    return [(v.scale[0], v.jitter_p, v.jitter, v.blur_p, v.solarize_p) for v in views]


def test_adainf_follows_the_table_of_the_paper():
    half, full, third = (0.4, 0.4, 0.4, 0.1), (0.8, 0.8, 0.8, 0.2), (0.4, 0.4, 0.2, 0.1)
    assert table(adainf_pair(32, "strong")) == [(0.08, 0.8, full, 0.5, 0.0)] * 2
    assert table(adainf_pair(32, "strong", learner="moco")) == [(0.08, 0.8, half, 0.5, 0.0)] * 2
    assert table(adainf_pair(32)) == table(adainf_pair(32, learner="moco")) == [(0.2, 0.4, half, 0.5, 0.0)] * 2
    strong, weak = adainf_pair(32, "strong", learner="byol"), adainf_pair(32, learner="byol")
    assert table(strong) == [(0.08, 0.8, third, 0.0, 0.0), (0.08, 0.8, third, 0.0, 0.2)]
    assert table(weak) == [(0.2, 0.4, third, 0.0, 0.0), (0.2, 0.4, third, 0.0, 0.2)]
    assert {v.interpolation for v in strong + weak} == {"bicubic"}
    assert {v.grey for v in strong + weak} == {0.2}


def test_multi_crop_is_that_of_swav():
    views = multi_crop(224, 96, 6)
    assert [(v.size, v.scale) for v in views] == [(224, (0.14, 1.0))] * 2 + [(96, (0.05, 0.14))] * 6
    assert {(v.jitter, v.jitter_p, v.grey, v.blur_p, v.blur_sigma) for v in views} == {
        ((0.8, 0.8, 0.8, 0.2), 0.8, 0.2, 0.5, (0.1, 2.0))
    }
    assert [v.scale for v in multi_crop(224)] == [(0.08, 1.0)] * 2


def test_the_other_tables():
    assert table(groco_views(224, 96, 1, count=3)) == [
        (0.14, 0.8, (0.4, 0.4, 0.2, 0.1), 1.0, 0.0),
        (0.14, 0.8, (0.4, 0.4, 0.2, 0.1), 0.1, 0.2),
        (0.14, 0.8, (0.4, 0.4, 0.2, 0.1), 1.0, 0.0),
        (0.05, 0.8, (0.4, 0.4, 0.2, 0.1), 0.5, 0.0),
    ]
    assert table(cacr_views(32)) == [(0.2, 1.0, (0.4,) * 4, 0.0, 0.0)] * 5
    assert table(pixpro_pair(224)) == table(byol_pair(224))
    assert [v.blur_p for v in (*simclr_pair(32), *moco_pair(32), *byol_pair(32))] == [0] * 6
    assert [v.blur_p for v in (*simclr_pair(96), *moco_pair(96))] == [0.5] * 4
    assert byol_pair(224)[0].blur_radius == 11
    assert moco_pair(224)[0].blur_radius == 8


def test_wrong_arguments_are_named():
    with pytest.raises(UsageError, match="weak"):
        adainf_pair(32, "medium")
    with pytest.raises(UsageError, match="learner"):
        adainf_pair(32, learner="swav")
    with pytest.raises(UsageError, match="small ones have a size"):
        multi_crop(32, small_count=3)
    with pytest.raises(UsageError, match="at least one large"):
        groco_views(32, count=0)
