"""The finished model: predicts from whatever pictures come as, survives saving and export, names what is wrong."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import contralto
from contralto.encoders.image import image_encoder
from contralto.errors import DataError, UsageError
from contralto.systems.classifier import Classifier

from tests.conftest import picture

CONFIG = {
    "encoder": "resnet8", "num_features": 128, "size": 32, "crop": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3,
    "classes": ["red", "blue"], "hidden": 8, "dim": 4, "temperature": 0.1,
}  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = Classifier(CONFIG).eval()
    model.save(tmp_path / "model", "card")
    return tmp_path, model


def test_all_kinds_of_pictures_give_one_answer(saved, tmp_path):
    folder, model = saved
    data = picture((200, 30, 40), 0)
    (tmp_path / "a.png").write_bytes(data)
    image = Image.open(io.BytesIO(data))
    prediction = contralto.load(folder).predict(
        [data, tmp_path / "a.png", str(tmp_path / "a.png"), image, np.asarray(image)]
    )
    assert len(set(prediction)) == 1
    assert np.ptp(prediction.probabilities, axis=0).max() < 1e-6
    np.testing.assert_allclose(prediction.probabilities, model.predict([data] * 5).probabilities, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(model.embed([data]), axis=1), 1, rtol=1e-5)
    assert model.predict([]) == []
    assert model.embed([]).shape == (0, 4)


@pytest.mark.parametrize("rule", ["linear", "cosine", "distance"])
def test_rules_score_features_as_they_say_and_survive_saving(rule, tmp_path):
    generator = torch.Generator().manual_seed(0)
    weight, features = torch.randn(3, 128, generator=generator), torch.randn(5, 128, generator=generator)
    encoder = image_encoder("resnet8")
    model = Classifier.of(encoder, "resnet8", ["a", "b", "c"], weight, rule=rule, temperature=0.5)
    for i in range(5):
        for c in range(3):
            f, w = features[i].double(), weight[c].double()
            want = {
                "linear": f @ w,
                "cosine": f @ w / f.norm() / w.norm() / 0.5,
                "distance": -((f - w) ** 2).sum() / 0.5,
            }
            torch.testing.assert_close(model.logits(features)[i, c].double(), want[rule], rtol=1e-4, atol=1e-4)
    model.save(tmp_path / "model", "card")
    again, pictures = contralto.load(tmp_path), [picture((200, 30, 40), 0)]
    np.testing.assert_array_equal(again.predict(pictures).probabilities, model.predict(pictures).probabilities)
    np.testing.assert_array_equal(again.embed(pictures), model.embed(pictures))
    assert again.embed(pictures).shape == (1, 128)
    assert again.embed([]).shape == (0, 128)


def test_bad_pictures_and_folders_are_named(saved, tmp_path):
    folder, model = saved
    (tmp_path / "bad.jpg").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"bad\.jpg: not an image"):
        model.predict([tmp_path / "bad.jpg"])
    with pytest.raises(DataError, match=r"gone\.jpg: cannot be read"):
        model.predict([tmp_path / "gone.jpg"])
    with pytest.raises(UsageError, match="list of pictures"):
        model.predict("a.jpg")
    with pytest.raises(UsageError, match=r"uint8 \(H, W, 3\)"):
        model.predict([np.zeros((4, 4))])
    with pytest.raises(DataError, match="is the run finished"):
        contralto.load(tmp_path / "nothing")
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | {"encoder": "nope"}))
    with pytest.raises(UsageError, match="nope"):
        contralto.load(folder)


def test_the_exported_program_runs_with_any_batch_and_without_this_library(saved, tmp_path):
    _, model = saved
    path = model.export(tmp_path / "m.pt2")
    x = torch.randn(3, 3, 32, 32)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch\n"
        f"program = torch.export.load({str(path)!r}).module()\n"
        f"x = torch.load({str(tmp_path / 'x.pt')!r}, weights_only=True)\n"
        f"torch.save([program(x), program(x[:1])], {str(tmp_path / 'y.pt')!r})\n"
        "assert not any(m.startswith('contralto') for m in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    three, one = torch.load(tmp_path / "y.pt", weights_only=True)
    with torch.inference_mode():
        torch.testing.assert_close(three, model(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one, model(x[:1]), rtol=1e-4, atol=1e-5)


def test_inference_does_not_load_the_training_stack(saved):
    folder, _ = saved
    code = (
        f"import sys, contralto; contralto.load({str(folder)!r})\n"
        "bad = [m for m in ('lightning', 'faiss', 'sklearn', 'sentence_transformers', 'jinja2') if m in sys.modules]\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_below_the_threshold_a_picture_is_unknown():
    config = {
        "encoder": "resnet8", "num_features": 128, "size": 32, "crop": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3,
        "classes": ["cat", "dog"], "hidden": 16, "dim": 8, "temperature": 0.1,
    }  # fmt: skip
    model = Classifier(config).eval()
    pictures = [np.full((40, 40, 3), v, np.uint8) for v in (0, 90, 250)]
    best = model.predict(pictures).probabilities.max(1)
    middle = float(np.sort(best)[1])
    found = model.predict(pictures, threshold=middle)
    assert [f == "unknown" for f in found] == [b <= middle for b in best.tolist()]
    assert model.predict(pictures, threshold=1.0) == ["unknown"] * 3
    assert "unknown" not in model.predict(pictures)
    with pytest.raises(UsageError, match="threshold"):
        model.predict(pictures, threshold=1.5)
    named = Classifier(config | {"classes": ["unknown", "dog"]}).eval()
    with pytest.raises(UsageError, match="a class is called 'unknown'"):
        named.predict(pictures, threshold=0.5)
