"""CAPro's step against values of the official code and against a slow reference; its invariants."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.systems.webly.base import lr_factor
from contralto.systems.webly.capro import CAPro, bootstrapping_target

from tests.systems.webly.reference import fill, load, reference_case

REFERENCE = load("capro_step.npz")
CASES = ("web_noclean", "web_clean", "web_weights")


def build(ref, cleaning):
    """The tiny network of the reference values, in float64."""
    system = CAPro(
        nn.Linear(6, 8, bias=False), num_classes=5, num_features=8, hidden=7, dim=4, queue_size=12,
        init_proto_epoch=0, start_clean_epoch=0 if cleaning else 9, frozen_encoder_epoch=0, momentum_prototype=0.9,
    ).double()  # fmt: skip
    fill(system, ref)
    with torch.no_grad():
        system.auxiliary.weight.copy_(ref["init__classifier_projection.fc.weight"])
    return system


def batch_of(ref, weight=None):
    return {
        "views": [ref["img"], ref["img_aug"]],
        "label": ref["target"],
        "anchor": ref["domain"][:, 0] > 0,
        "weight": ref["sample_weight"][:, 0] if weight is None else weight,
        "index": torch.arange(6),
    }


@pytest.mark.parametrize("case", CASES)
def test_one_step_equals_the_official_code(case):
    ref = reference_case(REFERENCE, case)
    system = build(ref, cleaning=case == "web_clean")
    # The official single-label trainer multiplies a column by a row: in effect a constant weight, the mean of all.
    weight = ref["sample_weight"][:, 0].mean().expand(6)
    out = system.step(batch_of(ref, weight), epoch=1)
    out["loss"].backward()
    names = {"cls": "cls", "aux": "aux", "ins": "inst", "recn": "recn", "pro": "proto"}
    for ours, theirs in names.items():
        torch.testing.assert_close(out[f"loss_{ours}"], ref[f"out__loss_{theirs}"], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(out["loss"], ref["out__loss_total"], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(system.prototypes, ref["out__prototypes_after"], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(system.queue.keys.T, ref["out__queue_after"], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(system.momentum_encoder.weight, ref["out__encoder_k_after"], rtol=1e-9, atol=1e-11)
    for ours, theirs in (
        (system.encoder, "encoder_q"), (system.projector[0], "projection.0"), (system.classifier, "classifier.fc"),
    ):  # fmt: skip
        torch.testing.assert_close(ours.weight.grad, ref[f"grad__{theirs}.weight"], rtol=1e-9, atol=1e-11)


def slow_step(system, batch, epoch):
    """One step, sample by sample, with its own loops; returns loss, r, labels, prototypes, queue."""
    h = system.hparams
    x, x2 = batch["views"]
    y, anchor, w = batch["label"].tolist(), batch["anchor"].tolist(), batch["weight"]
    n, classes = len(y), h.num_classes
    proto, tau = system.prototypes.clone(), h.temperature
    v = system.encoder(x)
    logits = v @ system.classifier.weight.T
    raw = system.projector[2](torch.relu(system.projector[0](v)))
    z = torch.stack([row / row.norm() for row in raw])
    with torch.no_grad():
        theta = h.momentum_encoder * system.momentum_encoder.weight + (1 - h.momentum_encoder) * system.encoder.weight
        key = system.projector[2](torch.relu(system.projector[0](x2 @ theta.T)))
        key = torch.stack([row / row.norm() for row in key])
        old = system.queue.keys.clone()
        new = old.clone()
        start = min(int(system.queue.pointer), len(new) - n)
        for i in range(n):
            new[start + i] = key[i]
        new = torch.stack([row / row.norm() for row in new])
        b = torch.zeros(n, classes, dtype=v.dtype)
        for i in range(n):
            total = 0.0
            for j in range(len(new)):
                a = min(max(float(z[i] @ new[j]), 0.0), 1.0) + 1e-7
                q = h.alpha * torch.softmax(new[j] @ system.auxiliary.weight.T, 0)
                q = q + (1 - h.alpha) * torch.softmax(new[j] @ proto.T / tau, 0)
                b[i] += a * q
                total += a
            b[i] /= total
            b[i] = b[i].clamp(0, 1) / b[i].clamp(0, 1).sum()
        r = torch.zeros(n, classes, dtype=v.dtype)
        for i in range(n):
            r[i] = h.alpha * torch.softmax(logits[i], 0) + (1 - h.alpha) * torch.softmax(z[i] @ proto.T / tau, 0)
    kept, label = list(range(n)), list(y)
    if epoch > h.start_clean_epoch:
        kept = []
        for i in range(n):
            if anchor[i]:
                kept.append(i)
            elif r[i].max() >= h.threshold:
                label[i] = int(r[i].argmax())
                kept.append(i)
            elif r[i, y[i]] >= 1 / classes:
                kept.append(i)
    after = proto.clone()
    for i in kept:
        after[label[i]] = h.momentum_prototype * after[label[i]] + (1 - h.momentum_prototype) * z[i].detach()
    after = torch.stack([row / row.norm() for row in after])
    ins = 0.0
    for i in range(n):
        scores = torch.cat([(z[i] * key[i]).sum().view(1), old @ z[i]]) / tau
        ins = ins - torch.log_softmax(scores, 0)[0] / n
    rest = 0.0
    for i in kept:
        aux = torch.log_softmax(system.auxiliary.weight @ z[i], 0)
        rest = rest - w[i] * torch.log_softmax(logits[i], 0)[label[i]] / len(kept)
        rest = rest - (1 - h.beta) * w[i] * aux[label[i]] / len(kept) - h.beta * w[i] * (b[i] @ aux) / len(kept)
        back = system.reconstructor[2](torch.relu(system.reconstructor[0](z[i].detach())))
        rest = rest + ((back - v[i].detach()) ** 2).mean() / len(kept)
        rest = rest - torch.log_softmax(z[i] @ proto.T / tau, 0)[label[i]] / len(kept)
    return ins + rest, label, kept, after, new


@pytest.mark.parametrize("cleaning", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_step_equals_a_slow_reference(cleaning, seed):
    generator = torch.Generator().manual_seed(seed)
    system = build(reference_case(REFERENCE, "web_clean"), cleaning)
    system.classifier.weight.data.mul_(3)
    batch = {
        "views": [torch.randn(8, 6, generator=generator, dtype=torch.float64) for _ in range(2)],
        "label": torch.randint(5, (8,), generator=generator),
        "anchor": torch.rand(8, generator=generator) < 0.2,
        "weight": torch.rand(8, generator=generator, dtype=torch.float64) + 0.5,
        "index": torch.arange(8),
    }
    system.queue.pointer.fill_(7)  # the batch does not fit behind it: the last places are written instead
    loss, _label, kept, prototypes, queue = slow_step(system, batch, epoch=1)
    weights = [p for p in system.parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss, weights)
    out = system.step(batch, epoch=1)
    torch.testing.assert_close(out["loss"], loss, rtol=1e-10, atol=1e-12)
    for gradient, wanted in zip(torch.autograd.grad(out["loss"], weights), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(system.prototypes, prototypes)
    torch.testing.assert_close(system.queue.keys, queue)
    if cleaning:
        assert out["kept"] == pytest.approx(len(kept) / 8)


def random_batch(seed=0, n=8, dim=6, classes=5):
    g = torch.Generator().manual_seed(seed)
    return {
        "views": [torch.randn(n, dim, generator=g), torch.randn(n, dim, generator=g)],
        "label": torch.randint(classes, (n,), generator=g), "anchor": torch.zeros(n, dtype=torch.bool),
        "weight": torch.ones(n), "index": torch.arange(n),
    }  # fmt: skip


def small(**arguments):
    defaults = {"hidden": 7, "dim": 4, "queue_size": 16, "init_proto_epoch": 0, "start_clean_epoch": 0}
    return CAPro(nn.Linear(6, 8), 5, 8, **(defaults | arguments))


def test_warm_up_gives_reconstruction_gradient_to_the_encoder_and_later_not():
    for epoch, reached in ((0, True), (1, False)):
        system = small(start_clean_epoch=9)
        system.prototypes.copy_(F.normalize(torch.randn(5, 4), dim=1))
        out = system.step(random_batch(), epoch)
        out["loss_recn"].backward()
        assert (system.projector[0].weight.grad is not None) is reached
        assert system.reconstructor[0].weight.grad is not None
        assert ("loss_pro" in out) is (epoch > 0)


def test_vanilla_has_no_prototypes_and_no_cleaning_in_any_epoch():
    system = small(stage="vanilla")
    out = system.step(random_batch(), 50)
    assert sorted(out) == ["loss", "loss_aux", "loss_cls", "loss_ins", "loss_recn"]
    assert not system.prototypes.any()


def test_a_batch_in_which_nothing_is_kept_has_only_the_instance_loss():
    system = small(threshold=2.0, keep_threshold=1.1)
    system.prototypes.copy_(F.normalize(torch.randn(5, 4), dim=1))
    before = system.prototypes.clone()
    out = system.step(random_batch(), 1)
    assert sorted(out) == ["corrected", "kept", "loss", "loss_ins"]
    assert out["kept"] == 0
    assert torch.isfinite(out["loss"])
    torch.testing.assert_close(system.prototypes, before)


@pytest.mark.parametrize("mode", range(11))
def test_every_label_reference_mode_has_finite_gradients_and_the_stated_mix(mode):
    system = small(stage="capro", label_reference=mode, start_clean_epoch=9)
    system.prototypes.copy_(F.normalize(torch.randn(5, 4), dim=1))
    batch = random_batch(mode)
    plain = small(label_reference=0, start_clean_epoch=9)
    plain.load_state_dict(system.state_dict())
    out, hard = system.step(batch, 1), plain.step(batch, 1)
    out["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in system.parameters() if p.grad is not None)
    head = "loss_aux" if mode in (7, 10) else "loss_cls"
    other = "loss_cls" if head == "loss_aux" else "loss_aux"
    torch.testing.assert_close(out[other], hard[other])
    if mode == 0:
        torch.testing.assert_close(out["loss"], hard["loss"])
    else:
        assert not torch.allclose(out[head], hard[head])
    if mode == 2:  # label smoothing as torch has it
        logits = system.classifier(system.encoder(batch["views"][0]))
        torch.testing.assert_close(out["loss_cls"], F.cross_entropy(logits, batch["label"], label_smoothing=0.1))
    if mode == 5:
        v = F.normalize(system.encoder(batch["views"][0]), dim=1)
        logits = system.classifier(system.encoder(batch["views"][0]))
        similarity = (v @ v.T).clamp(0, 1)  # ten nearest of eight are all
        target = (similarity / similarity.sum(1, keepdim=True)) @ (logits / 2).softmax(1)
        soft = -(target.detach() * logits.log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(out["loss_cls"], 0.9 * hard["loss_cls"] + 0.1 * soft)


def test_text_weight_one_lets_the_text_alone_decide():
    system = small(text_weight=1.0)
    system.prototypes.copy_(F.normalize(torch.randn(5, 4), dim=1))
    batch = random_batch()
    batch["text_scores"] = F.one_hot((batch["label"] + 1) % 5, 5).float()
    assert system.step(batch, 1)["corrected"] == 1
    del batch["text_scores"]
    with pytest.raises(UsageError, match="text_scores"):
        system.step(batch, 1)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 12), st.integers(2, 7))
def test_bootstrapping_target_invariants(seed, n, q, classes):
    g = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(n, 4, generator=g, dtype=torch.float64), dim=1)
    keys = F.normalize(torch.randn(q, 4, generator=g, dtype=torch.float64), dim=1)
    votes = torch.randn(q, classes, generator=g, dtype=torch.float64).softmax(1)
    b = bootstrapping_target(z, keys, votes)
    torch.testing.assert_close(b.sum(1), torch.ones(n, dtype=torch.float64))
    order = torch.randperm(q, generator=g)
    torch.testing.assert_close(bootstrapping_target(z, keys[order], votes[order]), b)
    same = bootstrapping_target(z, keys[:1].expand(q, 4), votes[:1].expand(q, classes))
    torch.testing.assert_close(same, votes[:1].expand(n, classes))


@pytest.mark.parametrize(("alpha", "moves"), [(1.0, "prototypes"), (0.0, "classifier")])
def test_alpha_switches_classifier_or_prototypes_off(alpha, moves):
    system, batch = small(alpha=alpha), random_batch()
    v = system.encoder(batch["views"][0])
    z = system.projector(v)
    before = system.fused_scores(system.classifier(v), z, torch.zeros(5, 4), None)
    if moves == "prototypes":
        after = system.fused_scores(system.classifier(v), z, torch.randn(5, 4), None)
    else:
        after = system.fused_scores(torch.randn(8, 5), z, torch.zeros(5, 4), None)
    torch.testing.assert_close(before, after)


def test_mixup_is_a_function_of_seed_epoch_and_batch():
    system, batch = small(stage="finetune"), random_batch()
    first = system.step(batch, 3, 1)["loss_mixup"]
    torch.testing.assert_close(system.step(batch, 3, 1)["loss_mixup"], first)
    assert not torch.allclose(system.step(batch, 3, 2)["loss_mixup"], first)


def test_stage_epochs_and_schedule_follow_the_paper():
    arguments = {"vanilla_epochs": 120, "epochs": 60, "finetune_epochs": 15}
    assert [CAPro.stage_epochs(arguments, s) for s in ("plain", "vanilla", "capro", "finetune")] == [195, 120, 60, 15]
    expected = [max(e, 1) / 5 if e <= 5 else 0.5 * (1 + np.cos(np.pi * (e - 5) / 55)) for e in range(60)]
    assert [lr_factor(e, 5, 60) for e in range(60)] == pytest.approx(expected)


@pytest.mark.parametrize(
    "wrong", [{"stage": "x"}, {"alpha": 1.5}, {"temperature": 0}, {"label_reference": 11}, {"text_weight": -0.1}]
)
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        small(**wrong)


@pytest.mark.parametrize("stage", ["capro", "finetune"])
def test_a_posterior_judges_and_soft_labels_teach(stage):
    """The extension `reconcile`: the posterior takes the place of r; both classifiers learn the soft label of every row."""
    torch.manual_seed(3)
    n, classes = 7, 4
    system = CAPro(
        nn.Linear(6, 8), classes, 8, stage=stage, hidden=7, dim=5, queue_size=20, init_proto_epoch=0, start_clean_epoch=50,
        momentum_prototype=0.9, threshold=0.6, keep_threshold=0.3, mixup=0.0,
    ).double()  # fmt: skip
    system.prototypes.copy_(F.normalize(torch.randn(classes, 5, dtype=torch.float64), dim=1))
    batch = {
        "views": [torch.randn(n, 6, dtype=torch.float64) for _ in range(2)],
        "label": torch.randint(classes, (n,)),
        "anchor": torch.arange(n) == 1,
        "weight": torch.rand(n, dtype=torch.float64),
        "posterior": 0.8 * torch.rand(n, classes, dtype=torch.float64).mul(6).softmax(1),
        "target": torch.rand(n, classes, dtype=torch.float64).softmax(1),
    }
    before = system.prototypes.clone()
    v = system.encoder(batch["views"][0])
    z = system.projector(v)
    logits, aux = system.classifier(v), system.auxiliary(z)
    out = system.step(batch, epoch=3)
    b = bootstrapping_target(
        z, system.queue.read(),
        0.5 * (system.queue.read() @ system.auxiliary.weight.T).softmax(1)
        + 0.5 * (system.queue.read() @ before.T / 0.1).softmax(1),
    )  # fmt: skip
    cls = aux_loss = 0.0
    for i in range(n):
        soft = sum(-batch["target"][i, c] * logits[i].log_softmax(0)[c] for c in range(classes))
        soft_aux = sum(-batch["target"][i, c] * aux[i].log_softmax(0)[c] for c in range(classes))
        looked_up = sum(-b[i, c] * aux[i].log_softmax(0)[c] for c in range(classes))
        cls = cls + batch["weight"][i] * soft / n
        aux_loss = aux_loss + batch["weight"][i] * (0.9 * soft_aux + 0.1 * looked_up) / n
    torch.testing.assert_close(out["loss_cls"], cls)
    torch.testing.assert_close(out["loss_aux"], aux_loss)
    if stage == "finetune":
        assert "kept" not in out
        return
    moved, kept = before.clone(), 0
    for i in range(n):
        p, y = batch["posterior"][i], int(batch["label"][i])
        if not batch["anchor"][i]:
            if p.max() >= 0.6:
                y = int(p.argmax())
            elif p[y] < 0.3:
                continue
        kept += 1
        moved[y] = 0.9 * moved[y] + 0.1 * z[i].detach()
    assert 0 < kept < n
    assert out["kept"] == pytest.approx(kept / n)
    torch.testing.assert_close(system.prototypes, F.normalize(moved, dim=1))
