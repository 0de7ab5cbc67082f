"""The job of spoken language on made-up words: a stream from recordings to a page, resumed to the bit, and used afterwards."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import contralto
from contralto.cli import main
from contralto.data.texts import Characters, Vocabulary
from contralto.errors import DataError, UsageError
from contralto.pipelines.applying import apply_model
from contralto.pipelines.speech import SpeechJob, intents, load_speech, targets
from contralto.systems.continual.coconut import COCONUT

from tests.conftest import picture

sf = pytest.importorskip("soundfile")
RATE = 4000
WORDS = {"low": 300, "mid": 700, "high": 1100, "top": 1600}
SMALL = {
    "tasks": 2, "rate": RATE, "seconds": 0.5, "mels": 12, "encoder_dim": 16, "epochs": 40, "extra_epochs": 20, "batch_size": 12,
    "replayed": 4, "memory_size": 8, "lr": 0.01, "dim": 8, "decoder_dim": 16, "decoder_heads": 2, "decoder_hidden": 32, "beam": 1,
    "accelerator": "cpu", "progress": False, "seed": 100,
}  # fmt: skip


def recording(pitch, number):
    rng = np.random.default_rng([int(pitch), number])
    t = np.arange(int(RATE * rng.uniform(0.2, 0.4))) / RATE
    wave = np.sin(2 * np.pi * pitch * t) + 0.05 * rng.standard_normal(len(t))
    buffer = io.BytesIO()
    sf.write(buffer, (8000 * wave).astype(np.int16), RATE, format="WAV")
    return buffer.getvalue()


def collection(path, *, broken=False, per_word=15, split=True):
    rows = [
        {
            "audio": recording(pitch, i), "label": f"tone {word}", "text": word,
            "split": "test" if i < 5 and split else "train", "speaker": f"s{i % 3}",
        }
        for word, pitch in WORDS.items()
        for i in range(per_word)
    ]  # fmt: skip
    if broken:
        rows[7]["audio"] = b"no sound"
    pq.write_table(
        pa.Table.from_pylist(rows if split else [{k: v for k, v in r.items() if k != "split"} for r in rows]), path
    )
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return collection(tmp_path_factory.mktemp("data") / "words.parquet", broken=True)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    return SpeechJob("coconut").fit(str(data), run, **SMALL)


def told(run):
    return json.loads((run / "metrics.json").read_text())


def test_a_stream_is_learnt_measured_and_told(finished):
    metrics = told(finished)
    assert metrics["recordings"] == 39
    assert metrics["tested"] == 20
    assert metrics["skipped"] == 1
    assert [t["recordings" if "recordings" in t else "pictures"] for t in metrics["tasks"]] in ([20, 19], [19, 20])
    assert metrics["scores"]["recognised: after the last task (Last)"]["value"] > 0.6
    assert metrics["kept"] == 8
    for path in metrics["files"].values():
        assert (finished / path).exists()
    answers = pq.read_table(finished / "tasks" / "task2" / "answers.parquet").to_pylist()
    assert {a["label"] for a in answers} == set(WORDS)
    assert all(a["right"] == (a["label"] == a["predicted"]) for a in answers)
    last = np.mean([a["right"] for a in answers])
    assert abs(metrics["scores"]["recognised: after the last task (Last)"]["value"] - last) < 1e-9
    skipped = pq.read_table(finished / "sounds" / "skipped.parquet").to_pylist()
    assert [(s["row"], s["reason"]) for s in skipped] == [(7, "not a sound")]


def test_the_finished_model_writes_what_it_wrote(finished, data):
    model = load_speech(finished)
    answers = pq.read_table(finished / "tasks" / "task2" / "answers.parquet").to_pylist()
    table = pq.read_table(data).to_pylist()
    rows = [int(a["id"].rpartition("#")[2]) for a in answers]
    assert model.write([table[r]["audio"] for r in rows]) == [a["predicted"] for a in answers]
    assert load_speech(finished / "model").write([table[0]["audio"]], beam=3)


def test_the_commands_of_a_finished_run_take_recordings(finished, data, tmp_path):
    found = apply_model(contralto.load(finished), str(data), tmp_path / "said.parquet")
    assert found.n == 59
    assert found.skipped == [("words.parquet#7", "not a sound (expected WAV, FLAC or Ogg)")]
    said = {r["id"]: r for r in pq.read_table(tmp_path / "said.parquet").to_pylist()}
    answers = pq.read_table(finished / "tasks" / "task2" / "answers.parquet").to_pylist()
    assert list(said["words.parquet#0"]) == ["id", "text", "confidence"]
    assert all(said[a["id"]]["text"] == a["predicted"] for a in answers)
    sure = np.array([said[a["id"]]["confidence"] for a in answers])
    right = np.array([a["right"] for a in answers])
    assert ((sure > 0) & (sure <= 1)).all()
    assert right.all() or sure[right].mean() > sure[~right].mean()
    assert contralto.load(finished).predict([recording(300, 0)], threshold=1.1) == ["unknown"]
    (tmp_path / "one.wav").write_bytes(recording(1100, 9))
    assert apply_model(contralto.load(finished), str(tmp_path / "one.wav"), tmp_path / "e.parquet", task="embed").n == 1
    assert len(pq.read_table(tmp_path / "e.parquet").to_pylist()[0]["embedding"]) == 16


def test_what_cannot_be_heard_is_said_and_what_was_written_stays(finished, data, tmp_path, capsys):
    kept = tmp_path / "p.parquet"
    rows = [{"clip": recording(300, 0), "path": "<b>x"}, {"clip": recording(700, 1)[:30], "path": "y"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "clips.parquet")
    words = ["predict", str(finished), str(tmp_path / "clips.parquet"), "--out", str(kept)]
    assert main([*words, "--sound_column", "clip"]) == 0
    out, err = capsys.readouterr()
    assert "1 predictions in" in out
    assert err.startswith("skipped clips.parquet#1: broken sound")
    before = kept.read_bytes()
    (tmp_path / "cut.wav").write_bytes(recording(300, 0)[:30])
    (tmp_path / "a.png").write_bytes(picture((200, 30, 40), 1))
    (tmp_path / "pictures" / "red").mkdir(parents=True)
    (tmp_path / "pictures" / "red" / "a.png").write_bytes(picture((200, 30, 40), 1))
    pq.write_table(pa.table({"picture": [b"x"]}), tmp_path / "other.parquet")
    for words, told in [
        ([tmp_path / "cut.wav"], "not one usable recording: 1 skipped, the first "),
        ([tmp_path / "cut.wav"], "cut.wav: broken sound"),
        ([tmp_path / "a.png"], "this run takes recordings"),
        ([tmp_path / "pictures"], "not one usable recording: none was found"),
        ([tmp_path / "other.parquet"], "name it with --sound_column"),
        ([data, "--sound_column", "nothing"], "no column 'nothing'"),
        ([data, "--image_column", "audio"], "--image_column names images, and this run takes recordings"),
    ]:
        code = main(["predict", str(finished), *map(str, words), "--out", str(kept)])
        err = capsys.readouterr().err
        assert (code, told in err, "Traceback" in err) == (2, True, False), (words, err)
    assert kept.read_bytes() == before
    assert main(["evaluate", str(finished / "model"), str(data)]) == 2
    assert "name the run folder" in capsys.readouterr().err


def test_evaluation_of_the_same_recordings_says_the_same(finished, data):
    found = SpeechJob("coconut").evaluate(finished, str(data))
    assert found["n"] == 20
    expected = told(finished)["scores"]["recognised: after the last task (Last)"]["value"]
    assert abs(found["scores"]["recognised"]["value"] - expected) < 1e-9
    assert abs(found["scores"]["word error rate"]["value"] - (1 - expected)) < 1e-6
    parts = [found["scores"][f"recognised, {t['name']}"]["value"] for t in told(finished)["tasks"]]
    assert abs(np.mean(parts) - expected) < 1e-9
    with pytest.raises(DataError, match="split 'nowhere'"):
        SpeechJob("coconut").evaluate(finished, str(data), split="nowhere")


def test_the_page_shows_spectrograms_and_runs_nothing_of_the_data(finished, tmp_path):
    from contralto.review.continual import write_continual_report

    page = write_continual_report(finished, out=tmp_path / "page.html").read_text()
    assert "recordings of earlier tasks kept at the end" in page
    assert "word for word" in page
    assert "Task-incremental" not in page
    hostile = shutil.copytree(finished, tmp_path / "hostile")
    for number in (1, 2):
        path = hostile / "tasks" / f"task{number}" / "answers.parquet"
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            row |= {"predicted": "</script><img src=x onerror=alert(1)>", "right": number == 1}
        pq.write_table(pa.Table.from_pylist(rows), path)
    page = write_continual_report(hostile).read_text()
    assert "<img src=x" not in page
    assert "onerror" in page  # told, as text
    assert "data:image/" in page


def test_a_run_that_was_done_is_not_done_again_and_another_is_refused(finished, data, monkeypatch):
    before = load_file(finished / "model" / "weights.safetensors")
    monkeypatch.setattr(COCONUT, "training_step", lambda *_: pytest.fail("trained again"))
    SpeechJob("coconut").fit(str(data), finished, **SMALL)
    after = load_file(finished / "model" / "weights.safetensors")
    assert all(torch.equal(before[k], after[k]) for k in before)
    with pytest.raises(UsageError):
        SpeechJob("coconut").fit(str(data), finished, **(SMALL | {"lr": 0.02}))


@pytest.mark.parametrize("stop", [(0, 3), (1, 2)], ids=["in the first task", "in a later task"])
def test_an_interrupted_stream_goes_on_to_the_same_bits(finished, data, tmp_path, monkeypatch, stop):
    task, epoch = stop
    step = COCONUT.training_step

    def stops(self, batch, batch_idx):
        if (int(self.task), self.current_epoch, batch_idx) == (task, epoch, 0):
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(COCONUT, "training_step", stops)
        with pytest.raises(KeyboardInterrupt):
            SpeechJob("coconut").fit(str(data), tmp_path / "run", **SMALL, checkpoint_every=1)
    SpeechJob("coconut").fit(str(data), tmp_path / "run", **SMALL)
    one, other = (load_file(run / "model" / "weights.safetensors") for run in (finished, tmp_path / "run"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    for number in (1, 2):
        a, b = (
            pq.read_table(run / "tasks" / f"task{number}" / "answers.parquet") for run in (finished, tmp_path / "run")
        )
        assert a.equals(b)


def test_epochs_have_orders_and_views_of_their_own(data, tmp_path, monkeypatch):
    seen = []
    transfer = COCONUT.on_after_batch_transfer
    monkeypatch.setattr(
        COCONUT, "on_after_batch_transfer",
        lambda self, batch, n: seen.append((batch["epoch"].tolist(), batch["index"].tolist())) or transfer(self, batch, n),
    )  # fmt: skip
    SpeechJob("coconut").fit(str(data), tmp_path / "run", **(SMALL | {"epochs": 2, "extra_epochs": 0}))
    order = [epochs[0] for epochs, _ in seen]
    assert order == sorted(order)
    assert set(order) == {0, 1, 2, 3}
    first, second = (tuple(i for e, index in seen if e[0] == epoch for i in index) for epoch in (0, 1))
    assert first != second


def test_a_wave_encoder_of_transformers_learns_through_the_job(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8), conv_kernel=(10, 8),
        conv_stride=(8, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    transformers.Wav2Vec2Model(config).save_pretrained(tmp_path / "wav2vec")
    data = collection(tmp_path / "a.parquet", per_word=7)
    small = SMALL | {
        "audio_encoder": str(tmp_path / "wav2vec"), "epochs": 1, "extra_epochs": 0, "encoder_lr": 1e-4, "batch_size": 6,
        "replayed": 2, "memory_rule": "closest", "memory_size": 4,
    }  # fmt: skip
    run = SpeechJob("coconut").fit(str(data), tmp_path / "run", **small)
    assert not (run / "spectrograms.npy").exists()
    shutil.rmtree(tmp_path / "wav2vec")  # the run holds what it needs
    assert len(load_speech(run).write([recording(300, 0), recording(700, 3)])) == 2


def test_without_a_split_speakers_are_kept_apart(tmp_path):
    data = collection(tmp_path / "a.parquet", per_word=9, split=False)
    small = SMALL | {"epochs": 0, "extra_epochs": 0, "test_share": 0.5, "seed": 102}
    job = SpeechJob("coconut")
    job.fit(str(data), tmp_path / "run", **small)
    speakers = job.sounds.column("group")
    assert not set(speakers[job.rows]) & set(speakers[job.test_rows])


def test_domains_are_speakers(tmp_path):
    data = collection(tmp_path / "a.parquet", per_word=9)
    small = SMALL | {"epochs": 0, "extra_epochs": 0, "split_by": "domain", "memory_size": 16}
    tasks = told(SpeechJob("coconut").fit(str(data), tmp_path / "run", **small))["tasks"]
    assert sorted(t["name"] for t in tasks) == ["s0", "s1", "s2"]
    assert all(len(t["classes"]) == 4 for t in tasks)


def test_class_and_text_are_written_and_judged_by_the_class(tmp_path, monkeypatch):
    data = collection(tmp_path / "a.parquet", per_word=7)
    small = SMALL | {"epochs": 0, "extra_epochs": 0, "target": "label_text", "vocabulary": "words"}
    job = SpeechJob("coconut")
    job.fit(str(data), tmp_path / "run", **small)
    assert job.texts[0] == "tone low | low"
    monkeypatch.setattr(COCONUT, "write", lambda self, x, lengths, beam=None: known[: len(x)])
    model = contralto.load(tmp_path / "run")
    known = torch.from_numpy(model.vocabulary.encode(["tone low | mid", "tone top"], length=5))
    said = model.answers([recording(300, 0), recording(700, 0)])
    assert {name: c.to_pylist() for name, c in said.items()} == {
        "text": ["tone low | mid", "tone top"], "intent": ["tone low", "tone top"], "confidence": said["confidence"].to_pylist(),
    }  # fmt: skip
    assert intents(["tone low | hight", "tone  LOW"], Vocabulary) == ["tone low", "tone low"]
    assert intents(["a|b c"], Characters) == ["a"]
    with pytest.raises(DataError, match="stands between class and text"):
        targets(["x"], ["a|b"], "label_text")


def test_what_does_not_fit_is_named(tmp_path, data):
    with pytest.raises(UsageError, match="no argument 'image_size'"):
        SpeechJob("coconut").fit(str(data), tmp_path / "a", image_size=3, **SMALL)
    with pytest.raises(UsageError, match="tasks must be between"):
        SpeechJob("coconut").fit(str(data), tmp_path / "b", **(SMALL | {"tasks": 9}))
    rows = pq.read_table(data).to_pylist()
    rows[20]["label"] = None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="1 recordings have none"):
        SpeechJob("coconut").fit(str(tmp_path / "a.parquet"), tmp_path / "c", **SMALL)


def test_damage_of_the_model_names_the_file(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "model" / "weights.safetensors").write_bytes(b"x" * 10)
    with pytest.raises(DataError, match=r"weights\.safetensors: is damaged"):
        load_speech(run)
    (run / "model" / "speech.json").write_text("{}")
    with pytest.raises(DataError, match=r"speech\.json: is damaged"):
        load_speech(run)


@pytest.mark.data
def test_spoken_digits_are_learnt(tmp_path):
    """Two words in one task of a few epochs, on real recordings."""
    found = Path(os.environ.get("CONTRALTO_DATA", "")) / "spoken_digits" / "spoken_digits.parquet"
    if not found.is_file():
        pytest.skip("CONTRALTO_DATA holds no spoken_digits")
    table = pq.read_table(found)
    two = table.filter(pa.compute.is_in(table["text"], pa.array(["two", "seven"])))
    pq.write_table(two, tmp_path / "two.parquet")
    small = SMALL | {
        "tasks": 1, "rate": 8000, "seconds": 1.0, "mels": 40, "encoder_dim": 32, "batch_size": 32, "epochs": 8,
        "extra_epochs": 0, "lr": 0.003,
    }  # fmt: skip
    run = SpeechJob("coconut").fit(str(tmp_path / "two.parquet"), tmp_path / "run", **small)
    assert told(run)["scores"]["recognised: after the last task (Last)"]["value"] > 0.8
