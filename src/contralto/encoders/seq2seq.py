"""From a sequence of features to a text: a transformer decoder with greedy and beam search.

Texts are rows of numbers (B, L) as `contralto.data.texts` makes them: words or characters, end, padding.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.data.texts import END, PAD, START
from contralto.errors import UsageError
from contralto.views.audio import frames_there

__all__ = ["SequenceDecoder", "positions"]


def positions(length: int, width: int) -> Tensor:
    """Sines and cosines that tell places apart (length, width), as of Vaswani et al. 2017.

    Examples
    --------
    >>> positions(2, 4)[1]
    tensor([0.8415, 0.5403, 0.0100, 0.9999])
    """
    place = torch.arange(length).unsqueeze(1)
    rate = torch.exp(-math.log(10_000.0) * torch.arange(0, width, 2) / width)
    angles = place * rate
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)[:, :width]


class SequenceDecoder(nn.Module):
    """Word after word, looking at the features of a recording and at the words before.

    Parameters
    ----------
    words : int
        Size of the vocabulary.
    dim : int
        Width of the decoder, even.
    num_features : int, optional
        Width of the features, where it is another one.
    layers, heads, hidden : int
        Pre-norm transformer layers, their attention heads, and the width within them.
    length : int
        Longest text, its end included.
    dropout : float

    Notes
    -----
    Matrices are drawn by Xavier's rule.

    Examples
    --------
    >>> decoder = SequenceDecoder(10, dim=8, heads=2, hidden=16, length=5).eval()
    >>> features, lengths = torch.randn(2, 6, 8), torch.tensor([6, 4])
    >>> decoder(features, lengths, torch.tensor([[4, 5, 2], [6, 2, 0]])).shape
    torch.Size([2, 3, 10])
    >>> decoder.greedy(features, lengths).shape, decoder.beam(features, lengths, width=3).shape
    (torch.Size([2, 5]), torch.Size([2, 5]))
    """

    table: Tensor

    def __init__(
        self,
        words: int,
        *,
        dim: int = 64,
        num_features: int | None = None,
        layers: int = 1,
        heads: int = 4,
        hidden: int = 256,
        length: int = 130,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % 2 or dim % heads or min(words, dim, layers, heads, hidden, length) < 1:
            raise UsageError(f"dim must be even and a multiple of heads; got dim {dim}, heads {heads}")
        self.dim, self.length = dim, length
        self.bridge = nn.Identity() if num_features in (None, dim) else nn.Linear(int(num_features or dim), dim)
        self.embed = nn.Embedding(words, dim, padding_idx=PAD)
        layer = nn.TransformerDecoderLayer(dim, heads, hidden, dropout, batch_first=True, norm_first=True)
        self.layers = nn.TransformerDecoder(layer, layers, nn.LayerNorm(dim))
        self.output = nn.Linear(dim, words)
        self.register_buffer("table", positions(length, dim), persistent=False)
        for parameter in (*self.layers.parameters(), self.output.weight, self.embed.weight):
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        with torch.no_grad():
            self.embed.weight[PAD] = 0.0

    def forward(self, features: Tensor, lengths: Tensor, texts: Tensor) -> Tensor:
        """Logits (B, L, words) of every word of `texts` (B, L), given the features (B, T, F) and the words before it."""
        if texts.shape[1] > self.length:
            raise UsageError(f"texts have {texts.shape[1]} words, the decoder was made for {self.length}")
        before = torch.cat([texts.new_full((len(texts), 1), START), texts[:, :-1]], 1)
        return self._read(self.bridge(features), ~frames_there(lengths, features.shape[1]), before)

    def loss(self, features: Tensor, lengths: Tensor, texts: Tensor, *, smoothing: float = 0.1) -> Tensor:
        """Cross-entropy of the words given those before (teacher forcing), padding ignored, the mean over words."""
        logits = self(features, lengths, texts)
        return F.cross_entropy(logits.flatten(0, 1), texts.flatten(), ignore_index=PAD, label_smoothing=smoothing)

    def text_mean(self, texts: Tensor) -> Tensor:
        """The mean of the embeddings of a text's words, without end and padding (B, dim)."""
        there = ((texts != PAD) & (texts != END)).unsqueeze(2)
        mean: Tensor = (self.embed(texts) * there).sum(1) / there.sum(1).clamp_min(1)
        return mean

    @torch.no_grad()
    def greedy(self, features: Tensor, lengths: Tensor) -> Tensor:
        """The most likely word, one after the other (B, length)."""
        features, out = self.bridge(features), ~frames_there(lengths, features.shape[1])
        texts = lengths.new_full((len(features), self.length + 1), PAD)
        texts[:, 0] = START
        ended = torch.zeros(len(features), dtype=torch.bool, device=texts.device)
        for place in range(self.length):
            scores = self._next(features, out, texts[:, : place + 1], place)
            word = torch.where(ended, PAD, scores.argmax(1))
            texts[:, place + 1] = word
            ended = ended | (word == END)
            if ended.all():
                break
        return texts[:, 1:]

    @torch.no_grad()
    def beam(self, features: Tensor, lengths: Tensor, *, width: int = 20, penalty: float = 0.6) -> Tensor:
        """The best of `width` texts that are followed at a time (B, length).

        Parameters
        ----------
        features, lengths : Tensor (B, T, F), (B,)
        width : int
        penalty : float
            The log-probability of a text of n words is divided by ``((5 + n) / 6) ** penalty`` (Wu et al. 2016), so that long
            texts are not at a disadvantage.
        """
        if width < 1:
            raise UsageError(f"width of the beam must be at least 1, got {width}")
        count = len(features)
        features, out = (
            x.repeat_interleave(width, 0) for x in (self.bridge(features), ~frames_there(lengths, features.shape[1]))
        )
        texts = lengths.new_full((count, width, self.length + 1), PAD)
        texts[..., 0] = START
        score = features.new_full((count, width), -torch.inf)
        score[:, 0] = 0.0  # all begin alike: one of them is enough
        ended = torch.zeros_like(score, dtype=torch.bool)
        size = torch.zeros_like(score)
        only_padding = torch.full((self.output.out_features,), -torch.inf, device=features.device)
        only_padding[PAD] = 0.0
        for place in range(self.length):
            step = self._next(features, out, texts.flatten(0, 1)[:, : place + 1], place).view(count, width, -1)
            step = torch.where(ended.unsqueeze(2), only_padding, step)
            total = score.unsqueeze(2) + step
            longer = size + ~ended
            ranked = (total / self._long(longer, penalty).unsqueeze(2)).flatten(1)
            best = ranked.topk(width, dim=1).indices  # (B, width) of width * words
            parent, word = best // step.shape[2], best % step.shape[2]
            texts = texts.gather(1, parent.unsqueeze(2).expand_as(texts)).clone()
            texts[..., place + 1] = word
            score = total.flatten(1).gather(1, best)
            size, ended = longer.gather(1, parent), ended.gather(1, parent) | (word == END)
            if ended.all():
                break
        first = (score / self._long(size, penalty)).argmax(1)
        return texts[torch.arange(count, device=texts.device), first, 1:]

    def _read(self, features: Tensor, out: Tensor, before: Tensor) -> Tensor:
        """Logits after every word of `before`."""
        x = self.embed(before) * math.sqrt(self.dim) + self.table[: before.shape[1]]
        ahead = torch.ones(before.shape[1], before.shape[1], dtype=torch.bool, device=x.device).triu(1)
        states = self.layers(x, features, tgt_mask=ahead, memory_key_padding_mask=out)
        logits: Tensor = self.output(states)
        return logits

    def _next(self, features: Tensor, out: Tensor, before: Tensor, place: int) -> Tensor:
        """Log-probabilities of the next word; a text has at least one."""
        scores = self._read(features, out, before)[:, -1].log_softmax(1)
        scores[:, [PAD, START]] = -torch.inf
        if place == 0:
            scores[:, END] = -torch.inf
        return scores

    @staticmethod
    def _long(size: Tensor, penalty: float) -> Tensor:
        return ((5 + size) / 6) ** penalty
