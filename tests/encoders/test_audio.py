"""Encoders of sounds do not see padding; wav2vec 2.0 as transformers has it, from a folder; the decoder and its two searches."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from contralto.data.texts import END, PAD, START
from contralto.encoders.audio import ConvGRUEncoder, Wav2Vec2Encoder, mean_over_time
from contralto.encoders.seq2seq import SequenceDecoder, positions
from contralto.errors import ContraltoError, DataError, UsageError


def seeded(build, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_small_encoder_does_not_see_what_stands_behind_the_end():
    encoder = seeded(lambda: ConvGRUEncoder(6, 8)).eval()
    x, lengths = noise(0, 3, 31, 6), torch.tensor([31, 9, 2])
    x = x * (torch.arange(31) < lengths[:, None]).unsqueeze(2)
    together, frames = encoder(x, lengths)
    assert frames.tolist() == [8, 3, 1]
    for row, length in enumerate(lengths.tolist()):
        alone, own = encoder(x[[row], :length], lengths[[row]])
        assert torch.allclose(together[row, : int(own)], alone[0], atol=1e-6)
        assert not together[row, int(own) :].any()
        assert torch.allclose(mean_over_time(together, frames)[row], alone.mean(1)[0], atol=1e-6)


def test_every_frame_of_the_small_encoder_hears_the_whole_recording():
    encoder = seeded(lambda: ConvGRUEncoder(6, 8)).eval()
    x = noise(0, 1, 40, 6).requires_grad_()
    found, _ = encoder(x, torch.tensor([40]))
    for frame in (0, 9):
        (grad,) = torch.autograd.grad(found[0, frame].sum(), x, retain_graph=True)
        assert (grad[0].abs().sum(1) > 0).all()


def test_what_the_small_encoder_cannot_take_is_named():
    encoder = ConvGRUEncoder(6, 8)
    with pytest.raises(DataError, match="recording 1 of the batch has no frames"):
        encoder(noise(0, 2, 5, 6), torch.tensor([5, 0]))
    with pytest.raises(UsageError, match="spectrograms are"):
        encoder(noise(0, 5, 6), torch.tensor([5]))
    with pytest.raises(UsageError, match="even"):
        ConvGRUEncoder(6, 7)


@pytest.fixture(scope="module", params=["group", "layer"])
def wav2vec(request, tmp_path_factory):
    """A tiny model of the form of wav2vec 2.0, as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8), conv_kernel=(10, 3),
        conv_stride=(5, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        feat_extract_norm=request.param,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("wav2vec")
    seeded(lambda: transformers.Wav2Vec2Model(config)).save_pretrained(folder)
    return folder


def test_wav2vec_comes_from_a_folder_with_its_weights(wav2vec):
    transformers = pytest.importorskip("transformers")
    encoder = Wav2Vec2Encoder(str(wav2vec)).eval()
    waves, lengths = noise(0, 2, 400), torch.tensor([400, 400])
    found, frames = encoder(waves, lengths)
    assert found.shape == (2, 39, 16)
    assert frames.tolist() == [39, 39]
    normal = (waves - waves.mean(1, keepdim=True)) / (waves.var(1, keepdim=True, correction=0) + 1e-7).sqrt()
    with torch.no_grad():
        expected = transformers.Wav2Vec2Model.from_pretrained(wav2vec).eval()(normal).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-5)
    other = Wav2Vec2Encoder(str(wav2vec), pretrained=False)
    drawn, known = (next(e.model.encoder.layers.parameters()) for e in (other, encoder))
    assert drawn.shape == known.shape
    assert not torch.equal(drawn, known)


def test_the_convolutions_of_wav2vec_are_frozen_and_the_rest_learns(wav2vec):
    encoder = Wav2Vec2Encoder(str(wav2vec)).train()
    assert not encoder.model.feature_extractor.training
    assert encoder.model.encoder.training
    found, frames = encoder(noise(0, 2, 400), torch.tensor([400, 250]))
    mean_over_time(found, frames).sum().backward()
    assert all(p.grad is None for p in encoder.model.feature_extractor.parameters())
    assert all(p.grad is not None for p in encoder.model.encoder.layers.parameters())


def test_wav2vec_draws_nothing_from_numpys_global_state(wav2vec):
    """The masks of transformers would: views are drawn by (seed, epoch, index) here."""
    encoder = Wav2Vec2Encoder(str(wav2vec)).train()
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    encoder(noise(0, 2, 400), torch.tensor([400, 250]))
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_the_frames_of_short_waves_are_counted(wav2vec):
    encoder = Wav2Vec2Encoder(str(wav2vec)).eval()
    _, frames = encoder(noise(0, 2, 400), torch.tensor([400, 123]))
    _, alone = encoder(noise(0, 1, 123), torch.tensor([123]))
    assert int(frames[1]) == int(alone[0]) == encoder(noise(0, 1, 123), torch.tensor([123]))[0].shape[1]
    with pytest.raises(DataError, match="recording 1 of the batch is too short"):
        encoder(noise(0, 2, 400), torch.tensor([400, 5]))


def test_an_encoder_that_is_not_there_or_no_audio_encoder_is_named(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ContraltoError, match="could not be loaded"):
        Wav2Vec2Encoder(str(tmp_path / "nothing"))
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "text")
    with pytest.raises(UsageError, match="no audio encoder"):
        Wav2Vec2Encoder(str(tmp_path / "text"))


WORDS, LENGTH = 7, 4


def decoder(seed=0, **options):
    return seeded(lambda: SequenceDecoder(WORDS, dim=8, heads=2, hidden=16, length=LENGTH, **options), seed).eval()


def score(model, features, lengths, text):
    """Log-probability of one text, word by word; the end included where there is room."""
    logs = model(features, lengths, text).log_softmax(2).detach()
    return sum(float(logs[0, i, w]) for i, w in enumerate(text[0].tolist()) if w != PAD)


def every_text():
    """All texts that can be written: at least one word, then the end where there is room."""
    words = [w for w in range(WORDS) if w not in (PAD, START, END)]
    for count in range(1, LENGTH + 1):
        for found in itertools.product(words, repeat=count):
            yield [*found, END][:LENGTH] + [PAD] * (LENGTH - count - 1)


def test_the_beam_finds_what_a_search_over_all_texts_finds():
    for seed, penalty in ((0, 0.0), (1, 0.6), (2, 0.6)):
        model, features, lengths = decoder(seed), noise(seed, 1, 5, 8), torch.tensor([5])
        model.output.weight.data *= 3  # so that texts differ
        ranked = {}
        for text in every_text():
            size = sum(w != PAD for w in text)
            ranked[tuple(text)] = score(model, features, lengths, torch.tensor([text])) / ((5 + size) / 6) ** penalty
        best = max(ranked, key=ranked.get)
        found = model.beam(features, lengths, width=60, penalty=penalty)
        assert found[0].tolist() == list(best)


def test_a_beam_of_one_is_greedy():
    model, features, lengths = decoder(), noise(0, 6, 5, 8), torch.tensor([5, 4, 3, 2, 1, 5])
    assert torch.equal(model.greedy(features, lengths), model.beam(features, lengths, width=1))


def test_what_is_written_of_a_recording_does_not_depend_on_the_batch():
    model, features, lengths = decoder(), noise(0, 3, 6, 8), torch.tensor([6, 2, 4])
    for search in (model.greedy, lambda f, n: model.beam(f, n, width=3)):
        together = search(features, lengths)
        for row, length in enumerate(lengths.tolist()):
            assert torch.equal(search(features[[row], :length], lengths[[row]])[0], together[row])


def test_a_word_is_predicted_from_those_before_it_alone():
    model, features, lengths = decoder(), noise(0, 1, 5, 8), torch.tensor([5])
    a, b = torch.tensor([[4, 5, 6, END]]), torch.tensor([[4, 5, 4, END]])
    first, other = model(features, lengths, a), model(features, lengths, b)
    assert torch.allclose(first[:, :3], other[:, :3], atol=1e-6)
    assert not torch.allclose(first[:, 3], other[:, 3], atol=1e-3)


def test_the_loss_is_smoothed_cross_entropy_of_words_without_padding():
    model, features, lengths = decoder(), noise(0, 2, 5, 8), torch.tensor([5, 3])
    text = torch.tensor([[4, 5, END, PAD], [6, END, PAD, PAD]])
    logs = model(features, lengths, text).log_softmax(2)
    places = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    expected = [-(0.9 * logs[i, j, text[i, j]] + 0.1 * logs[i, j].mean()) for i, j in places]
    assert torch.allclose(model.loss(features, lengths, text), torch.stack(expected).mean(), atol=1e-6)


def test_the_mean_of_a_text_leaves_end_and_padding_out():
    model = decoder()
    found = model.text_mean(torch.tensor([[4, 5, END, PAD], [6, END, PAD, PAD]]))
    assert torch.allclose(found[0], (model.embed.weight[4] + model.embed.weight[5]) / 2)
    assert torch.allclose(found[1], model.embed.weight[6])


def test_positions_are_those_of_the_paper():
    table = positions(50, 8)
    for place, k in ((3, 0), (17, 2)):
        assert abs(float(table[place, 2 * k]) - torch.sin(torch.tensor(place / 10000 ** (2 * k / 8)))) < 1e-5
        assert abs(float(table[place, 2 * k + 1]) - torch.cos(torch.tensor(place / 10000 ** (2 * k / 8)))) < 1e-5


def test_a_decoder_of_another_width_than_the_features():
    model = decoder(num_features=12)
    assert model(noise(0, 2, 5, 12), torch.tensor([5, 5]), torch.tensor([[4, END], [5, END]])).shape == (2, 2, WORDS)


def test_what_the_decoder_cannot_do_is_named():
    with pytest.raises(UsageError, match="multiple of heads"):
        SequenceDecoder(5, dim=10, heads=4)
    with pytest.raises(UsageError, match="5 words"):
        decoder()(noise(0, 1, 5, 8), torch.tensor([5]), F.pad(torch.tensor([[4, END]]), (0, 3)))
    with pytest.raises(UsageError, match="width"):
        decoder().beam(noise(0, 1, 5, 8), torch.tensor([5]), width=0)
