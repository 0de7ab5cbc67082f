"""Sentences to states and back: padding has no say, words are told by code and the words before them."""

import pytest
import torch
from torch.nn import functional as F

from contralto.data.texts import END, PAD, START
from contralto.encoders.recurrent import GRUDecoder, GRUEncoder
from contralto.errors import DataError

X = torch.tensor([[4, 5, 6, END, PAD, PAD], [7, END, PAD, PAD, PAD, PAD], [4, 4, 5, 6, 7, END]])


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return GRUEncoder(8, 3, 5).double()


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return GRUDecoder(8, dim=2, embedding=3, hidden=5, length=6, dropout=0.0).double()


def codes(n=3):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_sentence_is_read_from_its_end_without_its_padding(encoder):
    found = encoder(X)
    for row, x in enumerate(X):
        words = x[x != PAD].flip(0).unsqueeze(0)
        torch.testing.assert_close(found[row], encoder.gru(encoder.embed(words))[1][0, 0])
    torch.testing.assert_close(encoder(F.pad(X, (0, 3))), found)


def test_a_sentence_without_words_is_named(encoder):
    with pytest.raises(DataError, match="sentence 1 of the batch has no words"):
        encoder(torch.tensor([[4, END], [PAD, PAD]]))


def test_the_negative_log_likelihood_is_summed_word_by_word(decoder):
    z = codes()
    for row, x in enumerate(X):
        total, state, word = 0.0, decoder.start(z[row : row + 1]).unsqueeze(0), START
        for target in x[x != PAD].tolist():
            read = torch.cat([decoder.embed(torch.tensor([[word]])), z[row].view(1, 1, -1)], 2)
            out, state = decoder.gru(read, state)
            total -= decoder.output(out[0, 0]).log_softmax(0)[target].item()
            word = target
        assert decoder.nll(z, X)[row].item() == pytest.approx(total)


def test_hidden_states_are_averaged_over_words_only(decoder):
    z = codes()
    full = decoder.hidden(z, X)
    torch.testing.assert_close(decoder.hidden(z, F.pad(X, (0, 4))), full)
    torch.testing.assert_close(decoder.hidden(z[1:2], X[1:2, :2]), full[1:2])
    assert full.shape == (3, 5)


def test_written_sentences_end_once_and_hold_words_only(decoder):
    z = codes(64)
    uniform = torch.rand(64, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for rows in (decoder.sample(z, uniform), decoder.mean(z)):
        assert rows.shape == (64, 6)
        for row in rows.tolist():
            kept = row[: row.index(END)] if END in row else row
            assert PAD not in kept
            assert START not in row
            assert set(row[len(kept) + 1 :]) <= {PAD}


def test_drawn_words_have_the_probabilities_of_the_decoder(decoder):
    z = codes(1).expand(20_000, 2)
    uniform = torch.rand(20_000, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first = decoder.sample(z, uniform)[:, 0]
    logits = decoder(z[:1], X[:1])[0, 0].detach()
    logits[[PAD, START]] = -torch.inf
    share = torch.bincount(first, minlength=8) / len(first)
    torch.testing.assert_close(share.double(), logits.softmax(0), atol=0.015, rtol=0)


def test_the_most_likely_sentence_is_what_greedy_reading_says(decoder):
    z = codes()
    written = decoder.mean(z)
    logits = decoder(z, written)
    logits[..., [PAD, START]] = -torch.inf
    there = written != PAD
    assert torch.equal(logits.argmax(2)[there], written[there])
