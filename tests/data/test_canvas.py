"""Canvases: bounded decoding, a cache that is whole or goes on, batches that any loader yields alike."""

import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from contralto.data import canvas
from contralto.data.canvas import CanvasDataset, as_it_is, fit_picture
from contralto.data.dataset import EpochSampler
from contralto.data.images import decode_image
from contralto.errors import DataError, UsageError
from contralto.views.batched import BatchView, DrawViews

from tests.conftest import bomb, encode, picture

SIDE = 32
COUNT = 50


def read(row):
    """Pictures of several sizes and kinds, some as arrays."""
    rng = np.random.default_rng(row)
    height, width = rng.integers(5, 90, 2)
    smooth = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((int(width), int(height)))
    return np.asarray(smooth) if row % 5 == 0 else encode(smooth, ("PNG", "JPEG")[row % 2])


def dataset(cache=None, reader=read, **options):
    return CanvasDataset(reader, {"label": torch.arange(COUNT) % 3}, side=SIDE, cache=cache, **options)


def batches(data, workers, collate=as_it_is):
    sampler = EpochSampler(COUNT, seed=1)
    sampler.set_epoch(4)
    return list(DataLoader(data, batch_size=16, sampler=sampler, num_workers=workers, collate_fn=collate))


def same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        for x, y in zip(*((v if isinstance(v, list) else [v]) for v in (value, b[key])), strict=True):
            assert torch.equal(x, y), key


def test_canvases_hold_the_pictures_at_the_top_left():
    batch = dataset().__getitems__([(2, row) for row in range(COUNT)])
    assert batch["pictures"].shape == (COUNT, 3, SIDE, SIDE)
    assert batch["pictures"].dtype == torch.uint8
    assert batch["pictures"].is_contiguous(memory_format=torch.channels_last)
    assert batch["sizes"].dtype == torch.int32
    assert batch["index"].tolist() == list(range(COUNT))
    assert batch["epoch"].tolist() == [2] * COUNT
    assert batch["label"].tolist() == [row % 3 for row in range(COUNT)]
    for row in range(COUNT):
        data = read(row)
        whole = decode_image(data) if isinstance(data, bytes) else data
        height, width = batch["sizes"][row].tolist()
        pixels = batch["pictures"][row].permute(1, 2, 0).numpy()
        assert pixels[height:].max(initial=0) == pixels[:, width:].max(initial=0) == 0
        if max(whole.shape) <= SIDE:
            assert (pixels[:height, :width] == whole).all()
        else:
            assert max(height, width) == SIDE
            assert abs(height / width / (whole.shape[0] / whole.shape[1]) - 1) < 0.5 / min(height, width) + 0.02
            expected = np.asarray(Image.fromarray(whole).resize((width, height), Image.Resampling.BILINEAR))
            assert np.abs(pixels[:height, :width].astype(int) - expected).mean() < 3


@pytest.mark.parametrize("cached", [False, True])
def test_workers_and_cache_change_nothing(cached, tmp_path):
    expected = batches(dataset(), 0)
    data = dataset(tmp_path / "a" / "canvases.npy" if cached else None)
    for workers in (0, 2):
        for a, b in zip(batches(data, workers), expected, strict=True):
            same(a, b)
    draw = DrawViews([BatchView(8, jitter=(0.4, 0.4, 0.4, 0.1))] * 2, seed=3)
    for a, b in zip(batches(data, 2, draw), map(draw, expected), strict=True):
        same(a, b)


def test_pictures_are_decoded_once_in_one_place_and_read_in_one_thread(tmp_path):
    threads, rows = set(), []

    def counted(row):
        threads.add(threading.get_ident())
        rows.append(row)
        return read(row)

    cache = tmp_path / "canvases.npy"
    batches(dataset(cache, counted), 0)
    assert threads == {threading.get_ident()}
    assert sorted(set(rows)) == list(range(COUNT))
    assert len(rows) == COUNT + 3  # three are looked at again
    rows.clear()
    batches(dataset(cache, counted), 0)
    assert rows == [0, COUNT // 2, COUNT - 1]
    assert [p.name for p in tmp_path.iterdir()] == ["canvases.npy"]


def test_an_interrupted_cache_goes_on_and_is_the_same(tmp_path):
    whole, cut = tmp_path / "whole.npy", tmp_path / "cut.npy"
    dataset(whole)
    rows = []

    def failing(row):
        if row == 37:
            raise KeyboardInterrupt
        return read(row)

    def counted(row):
        rows.append(row)
        return read(row)

    with pytest.raises(KeyboardInterrupt):
        dataset(cut, failing)
    assert not cut.exists()
    (growing,) = tmp_path.glob("cut.npy.growing*")
    with growing.open("ab") as file:  # half a record, and a whole one whose bytes a power cut has lost
        file.write(bytes(np.dtype([("s", "<i4", 2), ("p", "u1", (SIDE, SIDE, 3))]).itemsize * 3 // 2))
    dataset(cut, counted)
    assert cut.read_bytes() == whole.read_bytes()
    done = 37 // canvas.BLOCK * canvas.BLOCK
    assert set(rows) - {0, done // 2, done - 1, COUNT // 2} == set(range(done, COUNT)) - {COUNT // 2}
    assert not list(tmp_path.glob("*.growing*"))


KILLED = """
import sys, time
from tests.data import test_canvas as t
def slow(row):
    time.sleep(0.02)
    print(row, flush=True)
    return t.read(row)
t.dataset(sys.argv[1], slow)
"""


def test_a_killed_making_goes_on(tmp_path):
    whole, cut = tmp_path / "whole.npy", tmp_path / "cut.npy"
    dataset(whole)
    process = subprocess.Popen([sys.executable, "-c", KILLED, cut], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) >= 40:
            process.kill()
            break
    process.wait()
    assert not cut.exists()
    (growing,) = tmp_path.glob("cut.npy.growing*")
    assert growing.stat().st_size > 2 * canvas.BLOCK * 3 * SIDE * SIDE
    dataset(cut)
    assert cut.read_bytes() == whole.read_bytes()


def test_two_processes_make_one_cache(tmp_path):
    cache = tmp_path / "canvases.npy"
    several = [
        subprocess.Popen([sys.executable, "-c", KILLED, cache], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    told = [p.communicate(timeout=120)[0].split() for p in several]
    assert [p.returncode for p in several] == [0, 0]
    assert sorted(map(len, told)) == [3, COUNT + 3]  # one makes it, the other looks at three pictures
    assert [p.name for p in tmp_path.iterdir()] == ["canvases.npy"]


def test_a_cache_of_other_pictures_is_refused(tmp_path):
    cache = tmp_path / "canvases.npy"
    dataset(cache)
    with pytest.raises(DataError, match=r"canvases.npy: is of other pictures \(row 0 differs\)"):
        dataset(cache, lambda row: read(row + 5))
    with pytest.raises(DataError, match="remove it"):
        CanvasDataset(read, {}, count=COUNT, side=SIDE + 1, cache=cache)
    with pytest.raises(DataError, match="remove it"):
        CanvasDataset(read, {}, count=COUNT + 1, side=SIDE, cache=cache)
    cache.write_bytes(cache.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"canvases.npy: is damaged"):
        dataset(cache)
    cache.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(DataError, match=r"canvases.npy: is damaged"):
        dataset(cache)


def test_other_pictures_do_not_go_on_where_some_were_left(tmp_path):
    cache = tmp_path / "canvases.npy"

    def failing(row):
        if row == 40:
            raise KeyboardInterrupt
        return read(row)

    with pytest.raises(KeyboardInterrupt):
        dataset(cache, failing)
    with pytest.raises(DataError, match=r"growing.*is of other pictures"):
        dataset(cache, lambda row: read(row + 1))


@pytest.mark.parametrize(
    "broken",
    [b"", b"<html></html>", bomb(20_000), picture((1, 2, 3), 0, 40, "JPEG")[:-200], picture((1, 2, 3), 0)[:300]],
    ids=["empty", "page", "bomb", "cut JPEG", "cut PNG"],
)
@pytest.mark.parametrize("cached", [False, True])
def test_a_picture_that_broke_later_is_named(broken, cached, tmp_path):
    def reader(row):
        return broken if row == 21 else read(row)

    cache = tmp_path / "canvases.npy" if cached else None
    with pytest.raises(DataError, match=r"crawl/21\.jpg, row 21: cannot be decoded any more"):
        dataset(cache, reader, name=lambda row: f"crawl/{row}.jpg").__getitems__([(0, 20), (0, 21)])
    with pytest.raises(DataError, match="row 21"):
        dataset(cache, reader).__getitems__([(0, 21)])


def test_turned_pictures_stand_upright():
    image = Image.fromarray(np.arange(60 * 100 * 3, dtype=np.uint8).reshape(60, 100, 3))
    exif = image.getexif()
    exif[0x0112] = 6
    data = encode(image, "JPEG", exif=exif)
    assert fit_picture(data, 50).shape == (50, 30, 3)
    assert fit_picture(data, 200).shape == (100, 60, 3)


def test_a_large_jpeg_is_decoded_no_finer_than_needed(monkeypatch):
    sizes = []
    load = canvas.load_image
    monkeypatch.setattr(canvas, "load_image", lambda *a: sizes.append(load(*a).size) or load(*a))
    data = encode(Image.fromarray(np.zeros((1200, 1600, 3), np.uint8)), "JPEG")
    assert fit_picture(data, 100).shape == (75, 100, 3)
    assert sizes == [(200, 150)]


def test_thin_pictures_keep_a_pixel():
    assert fit_picture(np.zeros((1, 500, 3), np.uint8), 20).shape == (1, 20, 3)
    assert fit_picture(np.zeros((500, 1, 3), np.uint8), 1).shape == (1, 1, 3)


def test_wrong_arguments_are_named():
    for options, message in (
        ({"fields": {}}, "count"),
        ({"fields": {"a": torch.zeros(3), "b": torch.zeros(4)}}, "'b': 4"),
        ({"fields": {"a": torch.zeros(3)}, "count": 4}, "'count': 4"),
        ({"fields": {}, "count": 3, "side": 0}, "side"),
    ):
        with pytest.raises(UsageError, match=message):
            CanvasDataset(read, **{"side": 8} | options)
    for array in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(UsageError, match="uint8 array"):
            fit_picture(array, 8)


def test_one_row_and_copies_for_workers(tmp_path):
    data = dataset(tmp_path / "canvases.npy")
    one = data[(0, 7)]
    assert one["pictures"].shape == (3, SIDE, SIDE)
    assert int(one["index"]) == 7
    copy = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 3000
    same(copy.__getitems__([(0, 7)]), data.__getitems__([(0, 7)]))


def test_a_full_disk_is_an_error_and_not_the_end(tmp_path):
    program = (
        "import resource, signal, sys; from tests.data import test_canvas as t;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({20 * 3 * SIDE * SIDE},) * 2);"
        "t.dataset(sys.argv[1])"
    )
    cache = tmp_path / "canvases.npy"
    result = subprocess.run([sys.executable, "-c", program, cache], capture_output=True, text=True, check=False)
    assert "OSError: [Errno 27]" in result.stderr, result.stderr
    assert not cache.exists()
    dataset(cache)
    assert cache.exists()
