"""COCONUT: what the paper and its pitfalls ask of a step and of the ends of tasks; the losses have tests of their own."""

import copy

import pytest
import torch
from torch.nn import functional as F

from contralto.data.texts import PAD
from contralto.encoders.audio import mean_over_time
from contralto.errors import UsageError
from contralto.losses.teacher_student import audio_text, teacher_student
from contralto.systems.continual.coconut import COCONUT, text_numbers

from tests.ranks import average, on_two_ranks
from tests.systems.continual.spoken import TEXTS, batch, build


def test_the_loss_is_the_sum_that_the_paper_writes():
    system, x = build(nspt_weight=0.3, mm_weight=0.7), batch(build())
    out = system.step(x)
    features, frames = system.encoder(x["views"][0], x["lengths"])
    audio = system.audio_head(mean_over_time(features, frames))
    asr = system.decoder.loss(features, frames, x["text"], smoothing=0.1)
    theirs, long = system.teacher("encoder", x["views"][0], x["lengths"])
    old = system.teacher("audio_head", mean_over_time(theirs, long))
    nspt = teacher_student(audio, old, x["label"], x["replayed"], temperature=0.1)
    new = ~x["replayed"]
    texts = system.text_head(system.decoder.text_mean(x["text"]))
    mm = audio_text(audio[new], texts[new], x["label"][new], temperature=0.1)  # every class has one text here
    for name, expected in (("asr", asr), ("nspt", nspt), ("mm", mm), ("loss", asr + 0.3 * nspt + 0.7 * mm)):
        assert torch.allclose(out[name], expected, atol=1e-6), name


def test_in_the_first_task_the_teacher_is_never_asked():
    system = build(task=0, distillation="token")
    system.teacher.forward = lambda *_, **__: pytest.fail("asked")
    out = system.step(batch(system))
    assert "nspt" not in out
    assert "distilled" not in out


@pytest.mark.parametrize("distillation", ["none", "token", "sequence", "features"])
def test_a_batch_without_the_memory_gives_zeros_and_is_counted(distillation):
    system = build(distillation=distillation)
    out = system.step(batch(system, replayed=0))
    out["loss"].backward()
    assert out["nspt"] == 0
    assert out["without_memory"] == 1
    assert out.get("distilled", torch.tensor(0.0)) == 0
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in system.parameters())
    assert system.step(batch(system))["without_memory"] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {}, {"positive_from": "student"}, {"negative_from": "teacher"}, {"distillation": "token"},
        {"distillation": "sequence"}, {"distillation": "features"},
    ],
)  # fmt: skip
def test_no_gradient_and_no_step_reaches_the_teacher(arguments):
    system = build(**arguments)
    before = copy.deepcopy(system.teacher.state_dict())
    [optimizer], _ = system.optimizers_and_schedules()
    learnt = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not learnt & {id(p) for p in system.teacher.parameters()}
    system.step(batch(system))["loss"].backward()
    optimizer.step()
    assert all(p.grad is None for p in system.teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), system.teacher.state_dict().values(), strict=True))
    assert not system.train().teacher.training


def test_the_teacher_keeps_the_projection_of_its_time():
    system = build(task=0)
    then = copy.deepcopy(system.audio_head.weight.detach())
    x = batch(system)
    system.end_task(torch.arange(8), x["label"])
    with torch.no_grad():
        system.audio_head.weight += 1
    assert torch.equal(system.teacher.weight("audio_head"), then)
    system.begin_task([2, 3])
    assert torch.equal(system.teacher.weight("audio_head"), then)
    system.end_task(torch.arange(8, 16), x["label"] + 2)
    assert torch.equal(system.teacher.weight("audio_head"), system.audio_head.weight)


def test_the_teacher_is_asked_for_what_is_used_alone(monkeypatch):
    """Samples of the anchors' classes; all of them where the negatives are the teacher's."""
    for arguments, expected in (({}, 3), ({"negative_from": "teacher"}, 8)):
        system, asked = build(**arguments), []
        forward = system.teacher.forward
        monkeypatch.setattr(
            system.teacher,
            "forward",
            lambda part, x, *r, forward=forward, asked=asked: asked.append(len(x)) or forward(part, x, *r),
        )
        system.step(batch(system))
        assert asked[0] == expected


def test_mm_is_over_new_samples_and_pools_equal_texts():
    system = build()
    x = batch(system)
    other = copy.deepcopy(x)
    other["text"][-1] = torch.tensor([4, 4, 4, 2])  # of the memory
    assert torch.equal(system.step(x)["mm"], system.step(other)["mm"])
    every = build(mm_on="all")
    assert not torch.equal(every.step(x)["mm"], every.step(other)["mm"])
    shared, apart, summed = (build(shared_text=w).step(x)["mm"] for w in ("multi_positive", "ignore", "summed"))
    assert torch.isclose(shared, apart)  # equal texts have equal rows: see `audio_text`
    assert summed < shared - 0.1


def test_mm_teaches_the_embedding_of_the_decoder():
    system = build()
    system.step(batch(system))["mm"].backward()
    used = TEXTS[[2, 3]].unique()
    grad = system.decoder.embed.weight.grad
    assert grad[[w for w in used.tolist() if w > 2]].abs().sum() > 0
    assert grad[PAD].abs().sum() == 0


def test_token_distillation_is_the_divergence_from_the_teachers_words():
    system = build(distillation="token")
    with torch.no_grad():
        system.decoder.output.weight += 0.5 * torch.randn(9, 8, generator=torch.Generator().manual_seed(3))
    x = batch(system)
    mine = x["replayed"]
    features, frames = system.encoder(x["views"][0], x["lengths"])
    theirs, long = system.teacher("encoder", x["views"][0][mine], x["lengths"][mine])
    p = system.teacher("decoder", theirs, long, x["text"][mine]).log_softmax(2)
    q = system.decoder(features[mine], frames[mine], x["text"][mine]).log_softmax(2)
    there = x["text"][mine] != PAD
    expected = ((p.exp() * (p - q)).sum(2) * there).sum() / there.sum()
    found = system.step(x)["distilled"]
    assert found > 1e-3
    assert torch.allclose(found, expected, atol=1e-6)


def test_sequence_distillation_learns_what_the_teacher_writes():
    system = build(distillation="sequence")
    x = batch(system)
    written = x["text"].clone()
    mine = x["replayed"]
    theirs, long = system.teacher("encoder", x["views"][0][mine], x["lengths"][mine])
    rows = system.teacher.parts["decoder"].beam(theirs, long, width=2, penalty=0.6)
    written = F.pad(written, (0, rows.shape[1] - written.shape[1]))
    written[mine] = rows
    written = written[:, : int((written != PAD).sum(1).max())]
    assert not torch.equal(written[mine][:, :4], x["text"][mine])
    features, frames = system.encoder(x["views"][0], x["lengths"])
    assert torch.allclose(system.step(x)["asr"], system.decoder.loss(features, frames, written), atol=1e-6)


def test_the_order_and_the_padding_of_a_batch_change_nothing():
    system, x = build(), batch(build())
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    shuffled = {k: [v[0][order]] if k == "views" else v[order] for k, v in x.items()}
    longer = x | {"views": [F.pad(x["views"][0], (0, 0, 0, 5))], "text": F.pad(x["text"], (0, 1))}
    expected = system.step(x)
    for other in (shuffled, longer):
        found = system.step(other)
        for name in ("loss", "asr", "nspt", "mm"):
            assert torch.allclose(found[name], expected[name], atol=1e-5), name


def test_the_memory_never_holds_more_than_its_size_and_equal_quotas():
    for fixed, sizes in ((False, [[4, 4], [2, 2, 2, 2]]), (True, [[2, 2], [2, 2, 2, 2]])):
        system = build(task=0, memory_size=8, fixed_quota=fixed)
        index, labels = torch.arange(40), torch.arange(40) % 4
        for task, expected in enumerate(sizes):
            here = labels // 2 == task
            if task:
                system.begin_task([2, 3])
            system.end_task(index[here], labels[here])
            assert system.memory.label.bincount().tolist() == expected
            assert len(system.memory) <= 8


def test_what_is_written_can_be_read_greedily_and_by_beam():
    system, x = build().eval(), batch(build())
    greedy = system.write(x["views"][0], x["lengths"], beam=1)
    assert torch.equal(greedy, system.decoder.greedy(*system.encoder(x["views"][0], x["lengths"])))
    assert system.write(x["views"][0], x["lengths"]).shape == (8, 5)


def test_it_learns_to_write_and_keeps_more_with_its_memory():
    """Two tasks of two words each: words of the first are written rightly after the second only with replay."""
    kept = {}
    for replayed in (4, 0):
        system = build(task=0, epochs=150, extra_epochs=0, steps_per_epoch=1, lr=0.01, replayed=4)
        for task in range(2):
            if task:
                system.end_task(torch.arange(8), torch.arange(8) % 2)
                system.begin_task([2, 3])
            [optimizer], [schedule] = system.optimizers_and_schedules()
            for step in range(system.total_steps):
                system.step(batch(system, seed=step, n=12, replayed=replayed if task else 0))["loss"].backward()
                optimizer.step(), optimizer.zero_grad(), schedule.step()
                system.at_step_end()
        system.eval()
        test = batch(system, seed=1000, n=40, replayed=20)
        written = system.write(test["views"][0], test["lengths"], beam=1)
        right = (F.pad(test["text"], (0, 1)) == written).all(1)
        kept[replayed] = float(right[test["replayed"]].float().mean())
        assert right[~test["replayed"]].float().mean() > 0.9
    assert kept[0] < 0.3
    assert kept[4] > 0.8


def test_views_are_drawn_of_sounds_and_of_waves():
    system = build(shift=1, noise=0.1)
    x = batch(system)
    given = {k: v for k, v in x.items() if k != "views"} | {"sounds": x["views"][0], "epoch": torch.full((8,), 3)}
    found = system.on_after_batch_transfer(dict(given), 0)
    assert sorted(found) == ["index", "label", "lengths", "replayed", "text", "views"]
    assert not torch.equal(found["views"][0], x["views"][0])
    assert torch.equal(found["views"][0], system.on_after_batch_transfer(dict(given), 0)["views"][0])
    waves = {**given, "sounds": torch.randn(8, 50), "lengths": torch.full((8,), 50)}
    assert system.on_after_batch_transfer(waves, 0)["views"][0].shape == (8, 50)


def test_numbers_of_texts_tell_texts_apart():
    texts = torch.randint(0, 1000, (5000, 12), generator=torch.Generator().manual_seed(0))
    assert len(text_numbers(texts).unique()) == len(texts.unique(dim=0))
    assert torch.equal(text_numbers(texts), text_numbers(F.pad(texts, (0, 7))))


def test_the_encoder_may_have_a_rate_of_its_own():
    system = build(encoder_lr=1e-5)
    [optimizer], _ = system.optimizers_and_schedules()
    rates = {id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in system.encoder.parameters()} == {1e-5}
    assert {rates[id(p)] for p in system.decoder.parameters()} == {5e-4}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"mm_on": "some"}, "mm_on"), ({"distillation": "all"}, "distillation"), ({"shared_text": "x"}, "shared_text"),
        ({"nspt_weight": -1.0}, "weights"), ({"smoothing": 1.0}, "smoothing"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments, told):
    with pytest.raises(UsageError, match=told):
        build(**arguments)


def test_it_says_what_it_lacks():
    system = build()
    x = batch(system)
    with pytest.raises(UsageError, match="'lengths'"):
        system.step({k: v for k, v in x.items() if k != "lengths"})
    with pytest.raises(UsageError, match="writes what is said"):
        system.predict_logits(x["views"][0])
    assert COCONUT.needs == ("label", "lengths", "text")


RANKED = {
    "all": {}, "ntpt": {"negative_from": "teacher"}, "token": {"distillation": "token"},
    "features": {"distillation": "features"}, "mm of all": {"mm_on": "all"},
}  # fmt: skip


def ranked(rank, world):
    """Loss and gradient of this rank's share of a batch; the ranks have different numbers of replayed samples and of words."""
    found = {}
    for name, arguments in RANKED.items():
        system = build(**arguments).double()
        x = batch(system, n=9, replayed=3)
        x["views"] = [x["views"][0].double()]
        own = {k: [v[0][rank::world]] if k == "views" else v[rank::world] for k, v in x.items()}
        loss = system.step(own)["loss"]
        loss.backward()
        grads = torch.cat([p.grad.flatten() for p in system.parameters() if p.grad is not None])
        found[name] = torch.cat([average(loss.detach()).reshape(1), average(grads)])
    return found


@pytest.mark.xdist_group("coconut ranks")
def test_two_processes_equal_one(tmp_path):
    expected = ranked(0, 1)
    for name, found in on_two_ranks(ranked, tmp_path)[0].items():
        assert torch.allclose(found, expected[name], rtol=1e-8, atol=1e-10), name
