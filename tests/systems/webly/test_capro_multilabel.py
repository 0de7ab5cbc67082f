"""Multi-label CAPro's step against values of the official code; its rule entry by entry; its invariants."""

import pytest
import torch
from torch import nn

from contralto.errors import UsageError
from contralto.systems.webly.capro_multilabel import CAProMultiLabel, correct_entries, positive_weights

from tests.systems.webly.reference import fill, load, reference_case

REFERENCE = load("capro_multilabel.npz")


def close(a, b, **options):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, **options)


def build(ref, cleaning):
    """The tiny network of the reference values, in float64."""
    system = CAProMultiLabel(
        nn.Linear(6, 8, bias=False), num_classes=5, num_features=8, hidden=7, dim=4, queue_size=12, init_proto_epoch=0,
        start_clean_epoch=0 if cleaning else 9, frozen_encoder_epoch=0, momentum_prototype=0.9,
        threshold=0.7 if cleaning else 0.9,
    ).double()  # fmt: skip
    fill(system, ref)
    with torch.no_grad():
        for c in range(5):
            system.spaces[c].copy_(ref[f"init__projection_class.{c}.0.weight"])
            system.offsets[c].copy_(ref[f"init__projection_class.{c}.0.bias"])
            system.auxiliary.weight[c].copy_(ref[f"init__classifier_projection.{c}.fc.weight"][0])
        system.positive_weight.copy_(ref["pos_weight"])
    return system


def batch_of(ref):
    return {
        "views": [ref["img"], ref["img_aug"]], "label": ref["target"], "anchor": ref["domain"],
        "weight": ref["sample_weight"][:, 0], "index": torch.arange(6),
    }  # fmt: skip


@pytest.mark.parametrize("case", ["nus_noclean", "nus_clean"])
def test_one_step_equals_the_official_code(case):
    ref = reference_case(REFERENCE, case)
    system = build(ref, cleaning=case == "nus_clean")
    out = system.step(batch_of(ref), epoch=1)
    out["loss"].backward()
    for ours, theirs in {"cls": "cls", "aux": "aux", "ins": "inst", "recn": "recn", "pro": "proto"}.items():
        close(out[f"loss_{ours}"], ref[f"out__loss_{theirs}"], msg=lambda m, name=ours: f"{name}: {m}")
    close(out["loss"], ref["out__loss_total"])
    close(system.prototypes, ref["out__prototypes_after"])
    close(system.queue.keys.T, ref["out__queue_after"])
    close(system.momentum_encoder.weight, ref["out__encoder_k_after"])
    for ours, theirs in (
        (system.encoder, "encoder_q"), (system.projector[0], "projection.0"), (system.classifier, "classifier.fc"),
    ):  # fmt: skip
        close(ours.weight.grad, ref[f"grad__{theirs}.weight"])


def test_every_entry_follows_the_rule():
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(200, 4, generator=g)
    labels = (torch.rand(200, 4, generator=g) < 0.5).long()
    anchors = torch.randint(-1, 2, (200, 4), generator=g) * (torch.rand(200, 4, generator=g) < 0.3)
    new, valid = correct_entries(scores, labels, anchors, threshold=0.9)
    seen = set()
    for i in range(200):
        for c in range(4):
            positive, y = float(scores[i, c]), int(labels[i, c])
            own, other = (positive, 1 - positive) if y else (1 - positive, positive)
            if anchors[i, c] != 0:
                expected = (y, True, "anchor")
            elif other >= 0.9:
                expected = (1 - y, True, "flipped")
            else:
                expected = (y, own >= 1 / 4, "kept" if own >= 1 / 4 else "ignored")
            assert (int(new[i, c]), bool(valid[i, c])) == expected[:2]
            seen.add(expected[2])
    assert seen == {"anchor", "flipped", "kept", "ignored"}
    # With gamma at most 1 - 1/C nothing can be ignored.
    assert correct_entries(scores, labels, anchors, threshold=0.75)[1].all()


def test_prototypes_start_from_the_anchors_of_both_sides_in_the_space_of_their_class():
    torch.manual_seed(0)
    system = CAProMultiLabel(nn.Linear(6, 8), 3, 8, hidden=7, dim=4, queue_size=12)
    x, y = torch.randn(10, 6), (torch.arange(30).view(10, 3) % 2)
    y[:, 2] = 1  # no picture without the third class
    system.anchor_batches = lambda: [{"views": [x[:6]], "label": y[:6]}, {"views": [x[6:]], "label": y[6:]}]
    system.init_prototypes()
    z = system.projector(system.momentum_encoder(x))
    for c in range(3):
        each = nn.functional.normalize(z @ system.spaces[c].T + system.offsets[c], dim=1)
        for side in (0, 1):
            rows = each[y[:, c] == side]
            expected = nn.functional.normalize(rows.sum(0), dim=0) if len(rows) else torch.zeros(4)
            torch.testing.assert_close(system.prototypes[c, side], expected)
    assert system.training


def test_votes_of_keys_are_their_scores_by_the_auxiliary_classifier():
    torch.manual_seed(0)
    system = CAProMultiLabel(nn.Linear(6, 8), 3, 8, hidden=7, dim=4, queue_size=700, alpha=0.3).double()
    system.prototypes.copy_(nn.functional.normalize(torch.randn(3, 2, 4), dim=2))
    keys = nn.functional.normalize(torch.randn(700, 4, dtype=torch.float64), dim=1)
    each = system.in_spaces(keys)
    auxiliary = (each * system.auxiliary.weight).sum(2).sigmoid()
    near = (torch.einsum("bcd,cpd->bcp", each, system.prototypes) / 0.1).softmax(2)[..., 1]
    close(system._votes(keys), 0.3 * auxiliary + 0.7 * near)


@pytest.mark.parametrize(("weight", "factor"), [(None, 5), (7.0, 7)])
@pytest.mark.parametrize("stage", ["plain", "capro"])
def test_losses_over_classes_have_their_weight_and_no_other(stage, weight, factor):
    ref = reference_case(REFERENCE, "nus_clean")
    one, other = build(ref, cleaning=True), build(ref, cleaning=True)
    one.hparams.stage = other.hparams.stage = stage
    other.hparams.lambda_class = weight
    a, b = (s.step(batch_of(ref), epoch=1) for s in (one, other))
    for name in a.keys() - {"loss", "kept", "corrected"}:
        close(b[name], a[name] * (factor if name in ("loss_cls", "loss_aux", "loss_pro") else 1), msg=name)
    close(b["loss"], sum(v for k, v in b.items() if k.startswith("loss_")))


def test_weights_of_positives_and_wrong_arguments():
    labels = torch.tensor([[1, 0], [1, 0], [0, 0], [0, 0], [0, 0]])
    torch.testing.assert_close(positive_weights(labels), torch.tensor([(3 / 2) ** 0.5, 2.0]))
    for wrong in ({"threshold": 0.5}, {"alpha": 2}, {"stage": "x"}, {"momentum_prototype": None}, {"lambda_class": 0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            CAProMultiLabel(nn.Identity(), 3, 8, **wrong)
    with pytest.raises(UsageError, match="one shape"):
        correct_entries(torch.zeros(2, 3), torch.zeros(2, 2), torch.zeros(2, 3), threshold=0.9)
