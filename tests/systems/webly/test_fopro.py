"""FoPro's step against values of the official code; its stages, its invariants."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from contralto.errors import UsageError
from contralto.prototypes.bank import density_temperature
from contralto.systems.webly.fopro import FoPro

from tests.systems.webly.reference import fill, load, reference_case

REFERENCE = load("fopro_step.npz")
# Case: epoch, gamma, what corrects. Prototypes are on from epoch 1, cleaning from 2, the relation from 3.
CASES = {
    "warm": (0, 0.6, "fusion"),
    "proto": (1, 0.6, "fusion"),
    "clean_rule": (2, 0.6, "fusion"),
    "clean_relation": (3, 0.5, "relation"),
    "clean_fusion": (3, 0.5, "fusion"),
}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def build(ref, gamma=0.6, cleaning="fusion", **arguments):
    """The tiny network of the reference values, in float64."""
    arguments = {"stage": "fopro", "init_proto_epoch": 0, "start_clean_epoch": 1, "relation_clean_epoch": 2} | arguments
    system = FoPro(
        nn.Linear(6, 8, bias=False), num_classes=5, num_features=8, hidden=7, dim=4, queue_size=12,
        momentum_prototype=0.9, threshold=gamma, cleaning=cleaning, **arguments,
    ).double()  # fmt: skip
    system.relation.pair, system.relation.out = nn.Linear(8, 5, bias=False), nn.Linear(5, 1, bias=False)
    fill(system, ref)
    with torch.no_grad():
        system.auxiliary.weight.copy_(ref["init__classifier_projection.fc.weight"])
        for ours, theirs in (
            ("temperatures", "_density"),
            ("distance", "_distance"),
            ("count", "_visited"),
        ):
            getattr(system, ours).copy_(ref[f"init__prototypes{theirs}"])
    system.relation.pair.weight = nn.Parameter(ref["init__relation.fc1.weight"].clone())
    system.relation.out.weight = nn.Parameter(ref["init__relation.fc2.weight"].clone())
    return system


def batch_of(ref):
    return {
        "views": [ref["img"], ref["img_aug"]], "label": ref["target"], "anchor": ref["domain"][:, 0] > 0,
        "weight": torch.ones(len(ref["target"])), "index": torch.arange(len(ref["target"])),
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_step_equals_the_official_code(case):
    ref = reference_case(REFERENCE, case)
    epoch, gamma, cleaning = CASES[case]
    system = build(ref, gamma, cleaning)
    seen = {}
    judge = system.judge

    def spy(target, *rest, **options):
        correction, sure = judge(target, *rest, **options)
        seen.update(target=target, correction=correction)
        return correction, sure

    system.judge = spy
    out = system.step(batch_of(ref), epoch=epoch)
    out["loss"].backward()
    close(out["loss"], ref["out__loss_total"])
    close(system.encoder.weight.grad, ref["grad__encoder_q.weight"])
    if "grad__relation.fc1.weight" in ref:
        close(system.relation.pair.weight.grad, ref["grad__relation.fc1.weight"])
    else:
        assert system.relation.pair.weight.grad is None
    close(system.prototypes, ref["out__prototypes_after"])
    if "correction" in seen:
        kept = seen["correction"].kept
        close(seen["target"][kept], ref["out__target_soft"])
        assert torch.equal(seen["correction"].labels[kept], ref["out__target_out"])
    if "out__density_after" in ref:
        theirs = ref["out__density_after"]  # their counters start anew after it
        ours = density_temperature(system.distance, system.count, system.temperatures)
        inside = (system.count > 0) & (theirs >= 0.02) & (theirs <= 1)
        assert inside.any()
        close(ours[inside], theirs[inside])
        assert torch.equal(ours[system.count == 0], system.temperatures[system.count == 0])
    else:
        close(system.count, ref["out__visited_after"])
        close(system.distance, ref["out__distance_after"])


def small(**arguments):
    torch.manual_seed(1)
    arguments = {"init_proto_epoch": 0, "start_clean_epoch": 1, "relation_clean_epoch": 2, "epochs": 9} | arguments
    system = FoPro(
        nn.Linear(6, 8),
        num_classes=5,
        num_features=8,
        hidden=7,
        dim=4,
        queue_size=30,
        momentum_prototype=0.9,
        **arguments,
    ).double()
    system.prototypes.copy_(F.normalize(torch.randn(5, 4, dtype=torch.float64), dim=1))
    return system


def random_batch(seed=0, n=8, shots=2):
    g = torch.Generator().manual_seed(seed)
    return {
        "views": [torch.randn(n, 6, generator=g, dtype=torch.float64) for _ in range(2)],
        "label": torch.randint(5, (n,), generator=g), "anchor": torch.arange(n) < shots,
        "weight": torch.ones(n, dtype=torch.float64), "index": torch.arange(n),
    }  # fmt: skip


def test_the_relation_stage_trains_the_relation_alone_and_moves_prototypes_only():
    system, batch = small(stage="relation"), random_batch()
    before = {k: v.clone() for k, v in system.state_dict().items()}
    optimizer = system.configure_optimizers()
    out = system.step(batch, epoch=0)
    out["loss"].backward()
    optimizer.step()
    assert {k for k in out if k.startswith("loss_")} == {"loss_rel"}
    changed = {k.split(".")[0] for k, v in system.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"relation", "prototypes", "count", "distance"}


def test_stage_prototypes_has_no_relation_and_shots_hold():
    system, batch = small(stage="prototypes", threshold=0.01), random_batch()
    out = system.step(batch, epoch=2)
    assert "loss_rel" not in out
    assert out["kept"] == 1
    logits = system.classifier(system.encoder(batch["views"][0]))
    target = system.fused_scores(logits, torch.zeros(8, 4).double(), system.prototypes)
    correction, sure = system.judge(
        target, torch.zeros(8, 4).double(), batch["label"], batch["anchor"], system.prototypes, with_relation=False
    )
    assert torch.equal(correction.labels[:2], batch["label"][:2])
    assert torch.equal(correction.labels[2:], target[2:].argmax(1))
    assert sure.tolist() == [False] * 2 + [True] * 6


def test_a_relation_score_keeps_the_label_against_a_better_class():
    system, batch = small(threshold=0.01), random_batch(shots=0)
    z = torch.randn(8, 4, dtype=torch.float64)
    target = F.one_hot((batch["label"] + 1) % 5, 5).double()
    rho = system.relation_scores(z, system.prototypes).gather(1, batch["label"][:, None])[:, 0]
    system.hparams.threshold = float(rho.sort().values[3])  # half of them, and one is not above itself
    correction, _ = system.judge(target, z, batch["label"], batch["anchor"], system.prototypes, with_relation=True)
    held = rho > system.hparams.threshold
    assert 0 < held.sum() < 8
    assert torch.equal(correction.labels, torch.where(held, batch["label"], (batch["label"] + 1) % 5))


def test_the_archive_distance_is_that_of_the_paper():
    system = small()
    z, y, p = torch.randn(3, 4).double(), torch.tensor([0, 4, 2]), system.prototypes
    expected = [
        0.5 * abs(1 - float(z[i] @ p[y[i]]))
        + 0.5 * sum(abs(float(p[y[i]] @ p[c] - z[i] @ p[c])) for c in range(5) if c != y[i])
        for i in range(3)
    ]
    close(system._archive_distance(z, y, p), torch.tensor(expected, dtype=torch.float64))


def test_only_shots_have_a_margin_in_the_prototype_loss_and_a_batch_without_shots_none():
    batch = random_batch()
    losses = {m: small(margin=m).step(batch, epoch=1)["loss_pro"] for m in (0.0, 0.5)}
    none = {m: small(margin=m).step(random_batch(shots=0), epoch=1)["loss_pro"] for m in (0.0, 0.5)}
    assert losses[0.5] > losses[0.0] + 0.1
    close(none[0.5], none[0.0])


def test_classes_are_weighted_by_the_corrected_label():
    system, batch = small(threshold=0.01), random_batch(shots=0)
    system.class_weights.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    z = system.projector(system.encoder(batch["views"][0]))
    logits = system.classifier(system.encoder(batch["views"][0]))
    target = system.fused_scores(logits, z, system.prototypes)
    label, q = target.argmax(1), target.gather(1, batch["label"][:, None])[:, 0]
    out = system.step(batch, epoch=2)
    expected = (
        sum(
            (label[i] + 1)
            * (q[i] * F.cross_entropy(logits[i], label[i]) - (1 - q[i]) * (target[i] @ logits[i].log_softmax(0)))
            for i in range(8)
        )
        / 8
    )
    close(out["loss_cls"], expected)


def test_fine_tuning_trusts_the_label_as_much_as_the_classifier_does_and_mixes_half_of_the_batches():
    system, batch = small(stage="finetune", mixup=0.0), random_batch()
    logits = system.classifier(system.encoder(batch["views"][0]))
    expected = 0.0
    for i in range(8):
        own = logits[i].detach().softmax(0)
        p = own[batch["label"][i]]
        expected = (
            expected
            + (p * F.cross_entropy(logits[i], batch["label"][i]) - (1 - p) * (own @ logits[i].log_softmax(0))) / 8
        )
    close(system.step(batch, 0)["loss"], expected)
    system = small(stage="finetune")
    mixed = [not torch.isclose(system.step(batch, 0, i)["loss"], expected, rtol=1e-9) for i in range(200)]
    assert 70 < sum(mixed) < 130
    close(system.step(batch, 0, mixed.index(True))["loss"], system.step(batch, 0, mixed.index(True))["loss"])


def test_the_temperature_of_a_class_without_samples_stays_and_others_are_bounded():
    t = density_temperature(torch.tensor([0.0, 1e-9, 1e9]), torch.tensor([0.0, 5.0, 5.0]), torch.full((3,), 0.3))
    assert t.tolist() == pytest.approx([0.3, 0.02, 1.0])


def test_stages_count_through_and_plain_training_has_as_many_epochs():
    arguments = {"epochs": 200, "relation_clean_epoch": 26, "relation_epochs": 20, "finetune_epochs": 0}
    assert [FoPro.stage_epochs(arguments, s) for s in ("plain", "prototypes", "relation", "fopro", "finetune")] == [
        220, 27, 20, 173, 0,
    ]  # fmt: skip
    assert small(stage="fopro").first_epoch == 3
    assert small(stage="prototypes").first_epoch == 0


@pytest.mark.parametrize(
    "wrong",
    [{"stage": "x"}, {"alpha": 1.5}, {"temperature": 0}, {"start_clean_epoch": 27}, {"momentum_prototype": None}],
)
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        FoPro(nn.Identity(), num_classes=3, num_features=8, **wrong)
