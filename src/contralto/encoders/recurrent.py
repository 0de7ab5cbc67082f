"""Sentences as one vector and back: GRU encoder and decoder of SentenceMIM (Livne, Swersky and Fleet 2020).

Sentences are rows of word numbers (B, T) as `contralto.data.texts.Vocabulary` makes them: words, end, padding.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from contralto.data.texts import END, PAD, START
from contralto.encoders.decoders import Decoder, tap
from contralto.errors import DataError

__all__ = ["GRUDecoder", "GRUEncoder"]


class GRUEncoder(nn.Module):
    """The last state of a GRU that reads a sentence from its end to its beginning.

    Parameters
    ----------
    words : int
        Size of the vocabulary.
    embedding, hidden : int
        Width of word vectors and state.

    Examples
    --------
    >>> GRUEncoder(10, 4, 6)(torch.tensor([[4, 5, 2, 0], [6, 2, 0, 0]])).shape
    torch.Size([2, 6])
    """

    def __init__(self, words: int, embedding: int = 300, hidden: int = 256) -> None:
        super().__init__()
        self.num_features = hidden
        self.embed = nn.Embedding(words, embedding, padding_idx=PAD)
        self.gru = nn.GRU(embedding, hidden, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Word numbers (B, T) to states (B, hidden)."""
        lengths = (x != PAD).sum(1)
        if not lengths.all():
            raise DataError(f"sentence {int((lengths == 0).nonzero()[0])} of the batch has no words")
        place = torch.arange(x.shape[1], device=x.device)
        backwards = (lengths.unsqueeze(1) - 1 - place).clamp_min(0)  # what stands behind the sentence is not read
        packed = pack_padded_sequence(
            self.embed(x.gather(1, backwards)), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        state: Tensor = self.gru(packed)[1][0]
        return state


class GRUDecoder(Decoder):
    """Word after word; the code sets the first state and stands beside every word vector that is read.

    Parameters
    ----------
    words : int
    dim : int
        Width of codes.
    embedding, hidden : int
    length : int
        Of sentences, the end included.
    dropout : float
        Of word vectors: without some of the words before it, a word must be told by the code.

    Examples
    --------
    >>> decoder = GRUDecoder(10, dim=3, embedding=4, hidden=6, length=5).eval()
    >>> x = torch.tensor([[4, 5, 2, 0, 0], [6, 2, 0, 0, 0]])
    >>> decoder(torch.zeros(2, 3), x).shape, decoder.nll(torch.zeros(2, 3), x).shape, decoder.mean(torch.zeros(2, 3)).shape
    (torch.Size([2, 5, 10]), torch.Size([2]), torch.Size([2, 5]))
    """

    discrete = True

    def __init__(
        self, words: int, dim: int, embedding: int = 300, hidden: int = 256, length: int = 60, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.shape = (length,)
        self.embed = nn.Embedding(words, embedding, padding_idx=PAD)
        self.dropout = nn.Dropout(dropout)
        self.start = nn.Linear(dim, hidden)
        self.gru = nn.GRU(embedding + dim, hidden, batch_first=True)
        self.output = nn.Linear(hidden, words)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Logits (B, T, words) of every word of x (B, T), given the code and the words before it."""
        before = torch.cat([x.new_full((len(x), 1), START), x[:, :-1]], 1)
        logits: Tensor = self.output(self._read(before, z, self.start(z).unsqueeze(0))[0])
        return logits

    def nll(self, z: Tensor, x: Tensor) -> Tensor:
        """Summed over words and the end of a sentence (B,)."""
        logits = self(z, x).transpose(1, 2)
        return F.cross_entropy(logits, x, ignore_index=PAD, reduction="none").sum(1)

    def mean(self, z: Tensor) -> Tensor:
        """The most likely word, one after the other (B, length)."""
        return self._write(z, None)

    @torch.no_grad()
    def sample(self, z: Tensor, uniform: Tensor) -> Tensor:
        """Draw word after word (B, length)."""
        return self._write(z, uniform)

    def hidden(self, z: Tensor, x: Tensor) -> Tensor:
        """States before the output map while x is read, averaged over words and the end (B, hidden)."""
        states = tap(self.output, lambda: self(z, x))
        there = (x != PAD).unsqueeze(2)
        return (states * there).sum(1) / there.sum(1).clamp_min(1)

    def _read(self, words: Tensor, z: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """States (B, T, hidden) after words (B, T), and the last one."""
        beside = z.unsqueeze(1).expand(-1, words.shape[1], -1)
        states, last = self.gru(torch.cat([self.dropout(self.embed(words)), beside], 2), state)
        return states, last

    def _write(self, z: Tensor, uniform: Tensor | None) -> Tensor:
        word = torch.full((len(z), 1), START, device=z.device)
        state, ended, written = self.start(z).unsqueeze(0), torch.zeros_like(word, dtype=torch.bool), []
        for place in range(self.shape[0]):
            states, state = self._read(word, z, state)
            logits = self.output(states[:, 0])
            logits[:, [PAD, START]] = -torch.inf
            if uniform is None:
                word = logits.argmax(1, keepdim=True)
            else:
                below = logits.softmax(1).cumsum(1) < uniform[:, place, None]
                word = below.sum(1, keepdim=True).clamp_max(logits.shape[1] - 1)
            word = torch.where(ended, PAD, word)
            ended = ended | (word == END)
            written.append(word)
        return torch.cat(written, 1)
