"""SentenceMIM: its loss against the official code's, the clipped gradient, and that codes are not ignored."""

from pathlib import Path

import numpy as np
import pytest
import torch

from contralto.data.texts import END, PAD
from contralto.encoders.recurrent import GRUEncoder
from contralto.errors import UsageError
from contralto.systems.text.sentence_mim import SentenceMIM

ARRAYS = np.load(Path(__file__).parents[2] / "reference" / "cmim.npz", allow_pickle=False)
REF = {k: torch.from_numpy(ARRAYS[k]) for k in ARRAYS.files}


def build(words=9, length=5, **arguments):
    torch.manual_seed(0)
    options = {"dim": 4, "embedding": 5, "hidden": 6, "dropout": 0.0} | arguments
    encoder = GRUEncoder(words, options["embedding"], options["hidden"])
    return SentenceMIM(encoder, num_features=options["hidden"], words=words, length=length, **options).double()


def batch(n=8, seed=0, length=5):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(4, 9, (n, length), generator=g)
    ends = torch.randint(1, length, (n, 1), generator=g)
    place = torch.arange(length)
    x = torch.where(place < ends, x, torch.where(place == ends, END, PAD))
    return {"views": [x], "index": torch.arange(n)}


def test_the_loss_is_sentence_mims(monkeypatch):
    """Logits, codes and noise of the official code's step: its loss without the constant log(B) / B."""
    system = build(words=7, length=3, dim=6, mode="amim", min_log_scale=-50.0)
    targets, log_scale = REF["amim_targets"], 0.5 * REF["amim_log_var"]
    monkeypatch.setattr(system, "encode", lambda x: (REF["amim_mean"], REF["amim_mean"], log_scale))
    monkeypatch.setattr(system, "normal", lambda *_: REF["amim_eps"])
    monkeypatch.setattr(system.decoder, "forward", lambda z, x: REF["amim_logits"])
    out = system.step({"views": [targets], "index": torch.arange(4)})
    expected = REF["amim_loss"] - torch.tensor(4.0, dtype=torch.float64).log() / 4
    torch.testing.assert_close(out["loss"], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mode", ["cmim", "amim", "smim", "vae"])
def test_one_step_of_every_mode_reaches_both_networks(mode):
    system = build(mode=mode)
    out = system.step(batch())
    out["loss"].backward()
    grads = [p.grad for p in system.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in grads)
    assert not out["features"].requires_grad


def test_the_gradient_is_clipped():
    system = build(clip=0.25)
    (100 * system.step(batch())["loss"]).backward()
    [optimizer], _ = system.optimizers_and_schedules()
    system.on_before_optimizer_step(optimizer)
    norm = torch.stack([p.grad.norm() for p in system.parameters()]).norm()
    assert norm.item() == pytest.approx(0.25, rel=1e-4)


def test_sentences_are_written_again_from_their_codes():
    system = build(hidden=24, dim=8, lr=0.02, mode="cmim", epochs=1, steps_per_epoch=250, clip=5.0)
    given = batch(12)
    [optimizer], [schedule] = system.optimizers_and_schedules()
    for _ in range(250):
        optimizer.zero_grad()
        system.step(given)["loss"].backward()
        system.on_before_optimizer_step(optimizer)
        optimizer.step()
        schedule.step()
        system.at_step_end()
    system.eval()
    x = given["views"][0]
    assert (system.reconstruct(x) == x).all(1).double().mean() > 0.9
    other = system.decoder.mean(system.mean_code(x).roll(1, 0))
    assert (other == x).all(1).double().mean() < 0.5  # it is the code that says it


def test_embeddings_do_not_depend_on_padding():
    system = build().eval()
    x = batch()["views"][0]
    longer = torch.nn.functional.pad(x, (0, 3))
    torch.testing.assert_close(system.embed(longer), system.embed(x))
    assert system.embed(x).shape == (8, 6)
    mean = build(use="mean").eval()
    assert mean.embed(x).shape == (8, 4)


def test_new_sentences_are_of_cool_codes():
    system = build().eval()
    g = [torch.Generator().manual_seed(0) for _ in range(2)]
    z = torch.randn(3, 4, generator=g[0]).double() / 2
    assert torch.equal(system.generate(3, generator=g[1]), system.decoder.mean(z))


def test_augmented_views_are_refused():
    with pytest.raises(UsageError, match="sentences do not have"):
        build(mode="infonce_aug")
