"""Encoders: one contract, real weights, freezing, the cache of features."""

import numpy as np
import pytest
import torch
from torch import nn

from contralto.encoders.features import _folded, cached_array, encode_batches
from contralto.encoders.heads import mlp
from contralto.encoders.image import concatenate, freeze, image_encoder, save_encoder, unfreeze
from contralto.encoders.text import text_encoder
from contralto.errors import ContraltoError, UsageError


@pytest.mark.parametrize(
    "name", ["conv4", "resnet12", "resnet8", "resnet14", "resnet18-small", "timm/resnet18", "vit_tiny_patch16_224"]
)
def test_every_image_encoder_keeps_the_contract(name):
    encoder = image_encoder(name, pretrained=False, size=32).eval()
    x = torch.randn(2, 3, 32, 32)
    assert encoder(x).shape == (2, encoder.num_features)
    torch.testing.assert_close(encoder.embed(x).norm(dim=1), torch.ones(2))
    before = encoder.fingerprint()
    with torch.no_grad():
        next(encoder.parameters()).add_(1e-3)
    assert encoder.fingerprint() != before


@pytest.mark.parametrize(
    "name", ["conv4", "resnet12", "resnet8", "resnet18-small", "timm/resnet18", "efficientnet-lite0", "mobilenetv2_050"]
)
def test_features_are_the_mean_of_the_map(name):
    encoder = image_encoder(name, pretrained=False, size=64).eval()
    x = torch.randn(2, 3, 64, 96)
    cells = encoder.forward_map(x)
    assert cells.shape[:2] == (2, encoder.num_features)
    assert cells.shape[3] == cells.shape[2] * 3 / 2
    torch.testing.assert_close(cells.mean((2, 3)), encoder(x))
    [only] = encoder.forward_maps(x)
    assert torch.equal(only, cells)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "bilinear/resnet18"])
def test_an_encoder_without_a_map_says_so(name):
    encoder = image_encoder(name, pretrained=False)
    with pytest.raises(UsageError, match=f"the encoder '{name}' has no feature map"):
        encoder.forward_map(torch.zeros(1, 3, 224, 224))


def test_lite0_has_its_imagenet_weights():
    """The loaded network must know photographs' statistics: its batch norms are not those of a fresh one."""
    trained, fresh = image_encoder("efficientnet-lite0"), image_encoder("efficientnet-lite0", pretrained=False)
    means = [
        torch.cat([m.running_mean for m in e.modules() if isinstance(m, nn.BatchNorm2d)]) for e in (trained, fresh)
    ]
    assert means[0].abs().mean() > 0.1
    assert means[1].abs().max() == 0
    assert trained.num_features == 1280
    assert (trained.mean, trained.std) == ((0.5,) * 3, (0.5,) * 3)


def test_open_clip_image_towers():
    pytest.importorskip("open_clip")
    encoder = image_encoder("open_clip/RN50", pretrained=False).eval()
    assert encoder(torch.zeros(1, 3, encoder.size, encoder.size)).shape == (1, encoder.num_features)
    with pytest.raises(UsageError, match="name the weights too"):
        image_encoder("open_clip/RN50")
    with pytest.raises(UsageError, match="knows no model"):
        image_encoder("open_clip/nothing", pretrained=False)


def test_a_saved_encoder_is_loaded_by_its_path(tmp_path):
    encoder = image_encoder("resnet8").eval()
    save_encoder(encoder, tmp_path / "e")
    again = image_encoder(str(tmp_path / "e")).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again(x), encoder(x))


@pytest.mark.parametrize("normalize", [False, True])
def test_encoders_side_by_side_are_saved_and_loaded_as_one(tmp_path, normalize):
    torch.manual_seed(0)
    parts = [image_encoder("resnet8").eval(), image_encoder("resnet8").eval(), image_encoder("conv4").eval()]
    both = concatenate(parts, normalize=normalize).eval()
    x = torch.rand(4, 3, 32, 32)
    expected = torch.cat([part.embed(x) if normalize else part(x) for part in parts], 1)
    assert torch.equal(both(x), expected)
    assert both.num_features == expected.shape[1]
    save_encoder(both, tmp_path / "e")
    again = image_encoder(str(tmp_path / "e")).eval()
    assert torch.equal(again(x), expected)
    assert again.name == both.name
    nested = concatenate([again, parts[0]]).eval()
    assert torch.equal(nested(x)[:, : both.num_features], expected)
    save_encoder(nested, tmp_path / "n")
    assert torch.equal(image_encoder(str(tmp_path / "n")).eval()(x), nested(x))
    with pytest.raises(UsageError, match="several encoders already"):
        concatenate([again, parts[0]], normalize=True)


def test_encoders_for_other_pixels_are_not_put_together():
    with pytest.raises(UsageError, match=r"resnet8: 32 pixels.*conv4: 64 pixels"):
        concatenate([image_encoder("resnet8"), image_encoder("conv4", size=64)])
    with pytest.raises(UsageError, match="at least one"):
        concatenate([])


def test_wrong_names_are_named():
    with pytest.raises(UsageError, match="no image encoder is called 'resnet9000'"):
        image_encoder("resnet9000")
    with pytest.raises(ContraltoError, match="could not be loaded"):
        text_encoder("/nowhere/model")


def test_a_frozen_module_learns_nothing_and_can_be_released():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    freeze(net)
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net(torch.randn(4, 3, 8, 8))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(p.requires_grad for p in net.parameters())
    unfreeze(net)
    net(torch.randn(4, 3, 8, 8)).sum().backward()
    assert not torch.equal(net[1].running_mean, before["1.running_mean"])
    assert net[0].weight.grad is not None


def test_heads_by_name_of_their_widths():
    head = mlp([6, 5, 3], normalize=True)
    torch.testing.assert_close(head(torch.randn(4, 6)).norm(dim=1), torch.ones(4))
    with pytest.raises(UsageError, match="sizes"):
        mlp([4])


@pytest.mark.parametrize("last_norm", ["none", "batch", "plain"])
def test_a_head_of_convolutions_is_the_same_head_cell_by_cell(last_norm):
    sizes = [6, 5, 3]
    rows = mlp(sizes, norm="batch", last_norm=last_norm, normalize=True).double()
    cells = mlp(sizes, norm="batch", last_norm=last_norm, normalize=True, kind="conv").double()
    shapes = {k: v.shape for k, v in cells.state_dict().items()}
    cells.load_state_dict({k: v.view(shapes[k]) for k, v in rows.state_dict().items()})
    x = torch.randn(2, 6, 4, 3, dtype=torch.float64)
    found = cells(x)
    torch.testing.assert_close(found.movedim(1, 3).reshape(-1, 3), rows(x.movedim(1, 3).reshape(-1, 6)))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2, 4, 3, dtype=torch.float64))


def test_a_head_may_end_in_layer_norm_on_rows_only():
    found = mlp([6, 5, 3], last_norm="layer")(torch.randn(4, 6))
    torch.testing.assert_close(found.mean(1), torch.zeros(4), atol=1e-6, rtol=0)
    with pytest.raises(UsageError, match="for rows"):
        mlp([6, 5, 3], last_norm="layer", kind="conv")


@pytest.mark.parametrize("name", ["minilm", "tfidf"])
def test_text_encoders_put_like_to_like(name):
    texts = ["a red shoe for women", "a shoe in red colour", "the president spoke on monday"]
    encoder = text_encoder(name).fit(texts)
    rows = encoder.encode(texts)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    similarity = rows @ rows.T
    assert similarity[0, 1] > similarity[0, 2] + 0.2
    assert encoder.fingerprint() == text_encoder(name).fit(texts).fingerprint()


def test_tfidf_knows_no_word_and_needs_one():
    assert not text_encoder("tfidf").fit(["red shoe"]).encode(["quantum"]).any()
    assert text_encoder("tfidf").fit(["красная обувь"]).encode(["обувь"]).any()
    with pytest.raises(UsageError, match="no words"):
        text_encoder("tfidf").fit(["", "1 2"])


def test_the_cache_computes_once_and_again_when_broken_or_changed(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return np.arange(5.0)

    for key in ({"a": 1}, {"a": 1}, {"a": 2}):
        assert cached_array(tmp_path, "x", key, compute).tolist() == [0, 1, 2, 3, 4]
    assert len(calls) == 2
    for path in tmp_path.glob("x-*.npy"):
        path.write_bytes(path.read_bytes()[:50])
    with pytest.warns(UserWarning, match="cannot be read"):
        cached_array(tmp_path, "x", {"a": 1}, compute)
    assert len(calls) == 3


def test_a_computation_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(ZeroDivisionError):
        cached_array(tmp_path, "x", {}, lambda: np.array([1 / 0]))
    assert list(tmp_path.iterdir()) == []


def test_encoding_in_batches_equals_encoding_at_once():
    encoder = image_encoder("resnet8").eval()
    x = torch.randn(5, 3, 32, 32)
    with torch.inference_mode():
        expected = encoder(x).numpy()
    np.testing.assert_allclose(encode_batches(encoder, x.split(2)), expected, atol=2e-3)


class NormFirst(nn.Module):
    """Names its convolution before the norm and calls it after."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.conv(self.norm(x)).flatten(1)


@pytest.mark.parametrize(
    ("encoder", "folds"),
    [
        (image_encoder("resnet8"), True),
        (image_encoder("efficientnet-lite0", pretrained=False, size=64), True),
        (image_encoder("vit_tiny_patch16_224", pretrained=False), True),  # has no batch norm
        (NormFirst(), False),
    ],
    ids=["resnet8", "lite0", "vit", "norm first"],
)
def test_norms_are_folded_into_convolutions_only_where_that_changes_nothing(encoder, folds):
    generator = torch.Generator().manual_seed(0)
    for norm in [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]:
        for value in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    x = torch.randn(3, 3, getattr(encoder, "size", 8), getattr(encoder, "size", 8), generator=generator)
    with torch.inference_mode():
        expected = encoder.eval()(x)
        folded = _folded(encoder, x[:2])
        torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert folds != any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert (folded is encoder) != folds


def test_bilinear_features_are_the_root_of_the_mean_outer_product_of_a_vggs_last_convolution():
    encoder = image_encoder("bilinear/vgg11", pretrained=False).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        found = encoder(x)
        layers = list(encoder.backbone.backbone.features)
        assert isinstance(layers[-1], nn.Identity)
        for layer in layers:
            x = layer(x)
    assert x.shape == (1, 512, 4, 4)
    outer = torch.stack([torch.outer(x[0, :, i, j], x[0, :, i, j]) for i in range(4) for j in range(4)]).mean(0)
    expected = (outer + 1e-5).sqrt().flatten()
    torch.testing.assert_close(found[0], expected / expected.norm())
    assert found.shape == (1, encoder.num_features)
    assert sum(p.numel() for p in encoder.parameters()) < 10e6  # the backbone's own classifier is gone
