"""COCONUT: understand more and more of what is said, by replay and two contrasts on the encoder.

A sequence-to-sequence model writes what a recording says. When new classes of utterances come, a small memory of old ones is
replayed; the projections of these are pulled to where the model of the task before had put their class, and pushed from
everything in the batch as the model sees it now (NSPT: negatives of the student, positives of the teacher). A second contrast
(MM) aligns recordings with their texts, in every task.

Continual Contrastive Spoken Language Understanding, Cappellazzo et al., ACL Findings 2024, arXiv 2310.02699. No code of the
method was released: weights and temperature of the losses, the projections and whether an anchor's own teacher row is one of its
positives (it is, here) are this library's reading of the paper.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contralto.data.dataset import Batch
from contralto.data.texts import PAD
from contralto.distributed import gather_rows, mean_weight
from contralto.encoders.audio import AudioEncoder, mean_over_time
from contralto.encoders.seq2seq import SequenceDecoder
from contralto.errors import UsageError
from contralto.losses.distillation import feature_distance, soft_targets
from contralto.losses.teacher_student import Source, audio_text, teacher_student
from contralto.memory.replay import ReplayMemory, Rule
from contralto.memory.teacher import Teacher
from contralto.systems.base import Optimizer
from contralto.systems.continual.base import ContinualSystem
from contralto.views.audio import AudioView, draw_audio, frames_there, normalize_waves

__all__ = ["COCONUT", "Distillation"]

Distillation = Literal["none", "token", "sequence", "features"]


class COCONUT(ContinualSystem):
    """Replay, contrast with the model of the last task, and contrast of sounds with texts, for a model that writes what it hears.

    Parameters
    ----------
    encoder : AudioEncoder
        Sounds and their lengths to sequences of features, such as those of `contralto.encoders.audio`.
    **base
        See `ContinualSystem`; a class is what one intent, or one word, is called.
    vocabulary : int
        Size of the vocabulary of texts, with padding, start and end.
    encoder_lr : float, optional
        Rate of the encoder, where it is another one: a smaller one for an encoder that was trained before.
    fixed_quota : bool
        Keep ``memory_size // num_classes`` of every class from the first task on; else ``memory_size //`` classes so far.
    dim : int
        Width of the projections.
    temperature : float
    nspt_weight, mm_weight : float
        Of the contrast with the last model, and with texts; both 0 is plain replay.
    positive_from, negative_from : {"teacher", "student"}
        See `contralto.losses.teacher_student.teacher_student`: NSPT, or SCL ("student" and "student"), or NTPT ("teacher" and
        "teacher").
    negatives : {"all", "new_only"}
    include_self_positive : bool
        See there.
    mm_on : {"new", "all"}
        Whether MM is over the samples of the task, or also over those of the memory.
    shared_text : {"multi_positive", "summed", "ignore"}
        Whether equal texts are positives of each other, pooled by the mean of logarithms, or (beyond the paper) by the logarithm
        of their sum; see `contralto.losses.teacher_student.audio_text`.
    distillation : {"none", "token", "sequence", "features"}
        What else the last model says of the replayed samples: its distribution of every word of the right text, the text that it
        writes (by beam search) in place of the right one, or its features.
    distillation_weight : float
        Of "token" and "features".
    smoothing : float
        Of the labels of words.
    decoder_dim, decoder_layers, decoder_heads, decoder_hidden, decoder_dropout, length
        See `contralto.encoders.seq2seq.SequenceDecoder`.
    beam, penalty : int, float
        Of the search for a text; a beam of 1 is greedy.
    shift, noise, time_masks, time_width, band_masks, band_width
        How sounds are changed while they are learnt, see `contralto.views.audio.AudioView`.

    Notes
    -----
    A batch has, beside `views` (one, (B, T, F) or (B, S)) and `label`, `lengths` (B,) of the sounds, `text` (B, L), rows of word
    numbers, and `replayed` (B,) of bool, who comes from the memory; without it, nobody does.

    Examples
    --------
    >>> from contralto.encoders.audio import ConvGRUEncoder
    >>> encoder = ConvGRUEncoder(mels=6, num_features=8)
    >>> system = COCONUT(encoder, num_features=8, num_classes=4, vocabulary=9, dim=4, decoder_dim=8, decoder_heads=2, length=4)
    >>> system.begin_task([0, 1])
    >>> batch = {"views": [torch.randn(3, 12, 6)], "lengths": torch.tensor([12, 9, 5]), "label": torch.tensor([0, 1, 0])}
    >>> batch |= {"text": torch.tensor([[4, 5, 2], [6, 2, 0], [4, 5, 2]]), "index": torch.arange(3)}
    >>> sorted(system.step(batch))
    ['asr', 'features', 'loss', 'mm']
    >>> system.write(batch["views"][0], batch["lengths"]).shape
    torch.Size([3, 4])
    """

    needs = ("label", "lengths", "text")

    def __init__(
        self,
        encoder: AudioEncoder,
        *,
        vocabulary: int,
        epochs: int = 20,
        batch_size: int = 32,
        optimizer: Optimizer = "adamw",
        lr: float = 5e-4,
        encoder_lr: float | None = None,
        weight_decay: float = 0.01,
        extra_epochs: int = 20,
        milestones: Sequence[int] | None = None,
        memory_size: int = 20,
        memory_rule: Rule = "random",
        fixed_quota: bool = False,
        dim: int = 512,
        temperature: float = 0.1,
        nspt_weight: float = 0.1,
        mm_weight: float = 0.1,
        positive_from: Source = "teacher",
        negative_from: Source = "student",
        negatives: Literal["all", "new_only"] = "all",
        include_self_positive: bool = True,
        mm_on: Literal["new", "all"] = "new",
        shared_text: Literal["multi_positive", "summed", "ignore"] = "multi_positive",
        distillation: Distillation = "none",
        distillation_weight: float = 0.5,
        smoothing: float = 0.1,
        decoder_dim: int = 64,
        decoder_layers: int = 1,
        decoder_heads: int = 4,
        decoder_hidden: int = 256,
        decoder_dropout: float = 0.1,
        length: int = 130,
        beam: int = 20,
        penalty: float = 0.6,
        shift: int = 1,
        noise: float = 0.1,
        time_masks: int = 0,
        time_width: int = 10,
        band_masks: int = 0,
        band_width: int = 8,
        **base: Any,
    ) -> None:
        super().__init__(
            encoder,
            epochs=epochs,
            batch_size=batch_size,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            extra_epochs=extra_epochs,
            milestones=milestones,
            memory_size=memory_size,
            memory_rule=memory_rule,
            **base,
        )
        if self.memory is not None and fixed_quota:
            self.memory = ReplayMemory(memory_size, rule=memory_rule, num_classes=self.num_classes, seed=self.seed)
        if min(nspt_weight, mm_weight, distillation_weight) < 0 or not 0 <= smoothing < 1:
            raise UsageError("weights of losses must be at least 0, and smoothing in [0, 1)")
        for name, value, known in (
            ("mm_on", mm_on, ("new", "all")), ("shared_text", shared_text, ("multi_positive", "summed", "ignore")),
            ("distillation", distillation, get_args(Distillation)),
        ):  # fmt: skip
            if value not in known:
                raise UsageError(f"{name} must be one of {', '.join(known)}; got {value!r}")
        self.encoder_lr, self.temperature, self.smoothing = encoder_lr, temperature, smoothing
        self.nspt_weight, self.mm_weight, self.distillation_weight = nspt_weight, mm_weight, distillation_weight
        self.positive_from, self.negative_from = positive_from, negative_from
        self.negatives: Literal["all", "new_only"] = negatives
        self.include_self_positive, self.mm_on, self.shared_text = include_self_positive, mm_on, shared_text
        self.distillation, self.beam, self.penalty = distillation, beam, penalty
        self.view = AudioView(shift, noise, time_masks, time_width, band_masks, band_width)
        with self.seeded():
            self.decoder = SequenceDecoder(
                vocabulary, dim=decoder_dim, num_features=self.num_features, layers=decoder_layers, heads=decoder_heads,
                hidden=decoder_hidden, length=length, dropout=decoder_dropout,
            )  # fmt: skip
            self.audio_head = nn.Linear(self.num_features, dim)  # one for all tasks
            self.text_head = nn.Linear(decoder_dim, dim)
        parts: dict[str, nn.Module] = {"encoder": self.encoder, "audio_head": self.audio_head}
        self._taught = [*parts, "decoder"] if distillation in ("token", "sequence") else list(parts)
        self.teacher = Teacher(**{name: getattr(self, name) for name in self._taught})

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of a batch of new samples and replayed ones."""
        (x,) = self.checked(batch, 1)
        lengths, text, label = batch["lengths"], batch["text"], batch["label"]
        replayed = batch.get("replayed", torch.zeros_like(label, dtype=torch.bool))
        self.observe(batch)
        features, frames = self.encoder(x, lengths)
        audio = self.audio_head(mean_over_time(features, frames))
        found: dict[str, Tensor] = {}
        if bool(self.teacher.taken):
            found |= self._of_last_model(x, lengths, audio, features, frames, label, text, replayed)
        written = found.pop("written", text)
        words = (written != PAD).sum()
        asr = self.decoder.loss(features, frames, written, smoothing=self.smoothing) * mean_weight(words)
        mm = self._of_texts(audio, text, torch.ones_like(replayed) if self.mm_on == "all" else ~replayed)
        loss = asr + self.mm_weight * mm
        if "nspt" in found:
            loss = loss + self.nspt_weight * found["nspt"]
        if "distilled" in found:
            loss = loss + self.distillation_weight * found["distilled"]
        return {"loss": loss, "features": mean_over_time(features, frames).detach(), "asr": asr, "mm": mm} | found

    def _of_texts(self, audio: Tensor, text: Tensor, rows: Tensor) -> Tensor:
        """MM: sounds against texts; the text side is the decoder's own embedding, which learns from this too."""
        if not self.mm_weight:
            return audio.new_zeros(())
        texts = self.text_head(self.decoder.text_mean(text))
        which = None if self.shared_text == "ignore" else text_numbers(text)[rows]
        pooled: Literal["mean", "sum"] = "sum" if self.shared_text == "summed" else "mean"
        return audio_text(audio[rows], texts[rows], which, pooled=pooled, temperature=self.temperature, gather="all")

    def _of_last_model(
        self,
        x: Tensor,
        lengths: Tensor,
        audio: Tensor,
        features: Tensor,
        frames: Tensor,
        label: Tensor,
        text: Tensor,
        replayed: Tensor,
    ) -> dict[str, Tensor]:
        """NSPT and distillation, and how many batches have nothing of the memory."""
        # The teacher is only asked for what is used: samples of the anchors' classes, or all where it gives the negatives.
        asked = torch.isin(label, gather_rows(label[replayed]))
        if self.negative_from == "teacher":
            asked = torch.ones_like(replayed)
        asked = asked if self.nspt_weight else replayed & (self.distillation != "none")
        found = {"without_memory": (~replayed.any()).to(audio)}
        theirs, long = self._ask(x[asked], lengths[asked])
        if self.nspt_weight:
            old = torch.zeros_like(audio)
            if len(theirs):
                old[asked] = self.teacher("audio_head", mean_over_time(theirs, long)).to(old)
            found["nspt"] = teacher_student(
                audio, old, label, replayed, temperature=self.temperature, positive_from=self.positive_from,
                negative_from=self.negative_from, negatives=self.negatives,
                include_self_positive=self.include_self_positive, gather="all",
            )  # fmt: skip
        if self.distillation == "none":
            return found
        mine = replayed[asked]
        return found | self._distilled(theirs[mine], long[mine], features[replayed], frames[replayed], text, replayed)

    def _ask(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Features of the last model, with their lengths."""
        if not len(x):
            return x.new_zeros(0, 1, self.num_features), lengths
        features, frames = self.teacher("encoder", x, lengths)
        return features, frames

    def _distilled(
        self, theirs: Tensor, long: Tensor, ours: Tensor, frames: Tensor, text: Tensor, replayed: Tensor
    ) -> dict[str, Tensor]:
        """What the last model says of the replayed samples."""
        if self.distillation == "sequence":
            written = text.clone()
            if len(theirs):
                decoder = self.teacher.parts["decoder"]
                assert isinstance(decoder, SequenceDecoder)
                rows = decoder.beam(theirs, long, width=self.beam, penalty=self.penalty)
                written = F.pad(written, (0, max(0, rows.shape[1] - text.shape[1])), value=PAD)
                written[replayed] = F.pad(rows, (0, written.shape[1] - rows.shape[1]), value=PAD)
                written = written[:, : int((written != PAD).sum(1).max())]
            return {"written": written}
        if not len(theirs):
            return {"distilled": ours.sum() * mean_weight(torch.tensor(0, device=ours.device))}
        if self.distillation == "features":
            there = frames_there(frames, theirs.shape[1])
            loss = feature_distance(ours[:, : theirs.shape[1]], theirs, mask=there)
        else:
            right = text[replayed]
            there = right != PAD
            said = self.teacher("decoder", theirs, long, right)
            loss = soft_targets(self.decoder(ours, frames, right), said, mask=there)
        return {"distilled": loss * mean_weight(there.sum())}

    def end_task(
        self, index: Tensor | None = None, labels: Tensor | None = None, features: Tensor | None = None
    ) -> None:
        """The memory chooses, and the model as it is now is the teacher of the next task, its head included."""
        super().end_task(index, labels, features)
        self.teacher.take(**{name: getattr(self, name) for name in self._taught})

    def embed(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The mean over time (N, F) of the encoder's features; without `lengths` nothing of `x` is padding."""
        if lengths is None:
            lengths = torch.full((len(x),), x.shape[1], device=x.device)
        return mean_over_time(*self.encoder(x, lengths))

    @torch.no_grad()
    def write(self, x: Tensor, lengths: Tensor, *, beam: int | None = None) -> Tensor:
        """What is said, as rows of word numbers (N, length); call it in evaluation mode.

        Parameters
        ----------
        x, lengths : Tensor (N, ...), (N,)
        beam : int, optional
            Default: that of the system; 1 is greedy.
        """
        features, frames = self.encoder(x, lengths)
        width = self.beam if beam is None else beam
        if width == 1:
            return self.decoder.greedy(features, frames)
        return self.decoder.beam(features, frames, width=width, penalty=self.penalty)

    def logits_of(self, features: Tensor) -> Tensor:
        """There are none: this system writes.

        Raises
        ------
        UsageError
        """
        raise UsageError("COCONUT has no logits of classes: it writes what is said, see `write`")

    def own_groups(self) -> list[dict[str, Any]]:
        """The encoder, where it has a rate of its own."""
        if self.encoder_lr is None:
            return []
        learnt = [p for p in self.encoder.parameters() if p.requires_grad]
        return [{"params": learnt, "lr": self.encoder_lr}] if learnt else []

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Draw the view of a batch of `sounds`, on the device that trains."""
        if "sounds" not in batch:
            return batch
        x, lengths = batch["sounds"], batch["lengths"]
        wave = x.ndim == 2
        x = normalize_waves(x, lengths).unsqueeze(2) if wave else x
        x = draw_audio(self.view, x, lengths, seed=self.seed, epoch=batch["epoch"], index=batch["index"])
        rest = {k: v for k, v in batch.items() if k not in ("sounds", "epoch")}
        return {"views": [x.squeeze(2) if wave else x]} | rest


def text_numbers(text: Tensor) -> Tensor:
    """A number for every row of `text` (B, L) that depends on its words alone, on any process.

    Examples
    --------
    >>> a, b = text_numbers(torch.tensor([[4, 5, 2], [4, 5, 2]])), text_numbers(torch.tensor([[4, 5, 2, 0], [5, 4, 2, 0]]))
    >>> bool(a[0] == a[1] == b[0]), bool(b[0] == b[1])
    (True, False)
    """
    # A polynomial of an odd number, modulo 2^64: padding, which is 0, adds nothing.
    powers = torch.full((text.shape[1],), 6364136223846793005, device=text.device).cumprod(0)
    numbers: Tensor = (text * powers).sum(1)
    return numbers
