"""Hydra's gates and losses against values of the official code; pairing, forms, ranks, state."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from contralto.errors import DataError, UsageError
from contralto.losses.gated import gated_contrast
from contralto.pipelines.job import load_preset, presets_of
from contralto.systems.registry import get_job
from contralto.systems.selfsup.hydra import Hydra, PairGate, draw_partners

from tests.ranks import on_two_ranks
from tests.systems.selfsup import steps

with np.load(Path(__file__).parents[2] / "reference" / "hydra.npz", allow_pickle=False) as arrays:
    REFERENCE = {k: torch.from_numpy(arrays[k]) for k in arrays.files}

CLASSES = 4
ARMS = {
    "gate": {},
    "product of gates": {"fuse": False},
    "subspace, pairs": {"placement": "subspace", "reduction": "pair"},
    "open space": {"alpha": 0.5, "learn_temperature": True},
    "gumbel": {"gate": "gumbel", "pairing": "distinct"},
    "stochastic": {"gate": "stochastic", "pairing": "present", "sparsity": 0.1},
    "supervised contrast": {"gate": "open", "pairing": "identical"},
    "single view": {"form": "single_view"},
    "single view, supervised": {"form": "single_view", "supervised": True},
    "fused": {"form": "fused"},
}


def near(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def official_gate(**arguments):
    gate = PairGate(5, 10, embedding=6, hidden=8, **arguments).double()
    with torch.no_grad():
        gate.embedding.weight.copy_(REFERENCE["gate_label_embedding_weight"])
        for layer in (1, 2, 4, 5):
            for kind in ("weight", "bias"):
                getattr(gate.network[layer], kind).copy_(REFERENCE[f"gate_mlp_{layer}_{kind}"])
    return gate


def build(encoder=None, **arguments):
    words = {"hidden": 8, "dim": 6, "embedding": 5, "gate_hidden": 7, "epochs": 2, "steps_per_epoch": 5} | arguments
    torch.manual_seed(0)
    return Hydra(encoder or nn.Linear(8, 5), num_features=5, num_classes=CLASSES, **words).train()


def batch(seed=0, n=8, views=2):
    g = torch.Generator().manual_seed(seed)
    x = [torch.randn(n, 8, generator=g) for _ in range(views)]
    return {"views": x, "label": torch.randint(CLASSES, (n,), generator=g), "index": torch.arange(n) + 10}


def test_gates_equal_the_official_code():
    y, y2 = REFERENCE["y"], REFERENCE["y2"]
    gate = official_gate()
    near(gate(y, y2), REFERENCE["gate_train"])
    gate = official_gate().eval()
    near(gate(y, y2), REFERENCE["gate_eval"])
    near(gate(y2, y), REFERENCE["gate_eval_swapped"])
    near(gate(y, y), REFERENCE["gate_eval_single"])
    product = official_gate(fuse=False).eval()
    near(product(y, y2), REFERENCE["gate_eval_product"])


@pytest.mark.parametrize(("name", "alpha"), [("alpha0", 0.0), ("alpha0.5", 0.5), ("identical", 0.5)])
def test_losses_with_the_gate_network_in_training_mode_equal_the_official_code(name, alpha):
    y = REFERENCE["y"]
    y2 = y if name == "identical" else REFERENCE["y2"]
    loss = gated_contrast(REFERENCE["z1"], REFERENCE["z2"], official_gate()(y, y2), y, y2, alpha=alpha)
    near(loss, REFERENCE[f"{name}_loss_train_gate"])


def test_a_step_is_the_loss_of_its_parts():
    system, data = build().double(), batch()
    data["views"] = [v.double() for v in data["views"]]
    out = system.step(data)
    partners = draw_partners(data["label"], "arbitrary", CLASSES, torch.Generator().manual_seed(0))
    z, keys = (system.projector(system.encoder(v)) for v in data["views"])
    near(out["loss"], gated_contrast(z, keys, system.gate(data["label"], partners), data["label"], partners))
    near(out["alike"], F.cosine_similarity(z, keys, dim=1).mean())


@pytest.mark.parametrize("arm", ARMS)
def test_every_part_learns(arm):
    system = build(**ARMS[arm])
    out = system.step(batch())
    out["loss"].backward()
    assert out["loss"].ndim == 0
    assert len(out["features"]) == 8
    for name, parameter in system.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0 or name.endswith("bias") or "embedding" in name, name


def test_the_classifier_beside_takes_no_gradient_to_the_encoder_unless_told_to():
    grads = {}
    for supervised in (False, True):
        system = build(form="single_view", supervised=supervised)
        out = system.step(batch())
        grads[supervised] = torch.autograd.grad(
            out["loss_classifier"], system.encoder.weight, allow_unused=True, retain_graph=True
        )[0]
        assert torch.autograd.grad(out["loss_classifier"], system.classifier.weight)[0].abs().sum() > 0
    assert grads[False] is None
    assert grads[True].abs().sum() > 0


def test_single_views_are_samples_of_their_own():
    system, data = build(form="single_view", gate="open", pairing="identical"), batch(views=3)
    out = system.step(data)
    z = system.projector(system.encoder(torch.cat(data["views"])))
    y = data["label"].repeat(3)
    contrast = gated_contrast(z, z, torch.ones_like(z), y, y)
    torch.testing.assert_close(out["loss"] - out["loss_classifier"], contrast)


def test_the_fused_form_opens_dimensions_in_which_both_classes_have_one_sign():
    system, data = build(form="fused", pairing="identical"), batch()
    labels, partners = torch.tensor([0, 1]), torch.tensor([2, 1])
    w = system.prototypes
    gate = system._gates(labels, partners)
    assert not gate.requires_grad
    assert torch.equal(gate, torch.stack([(w[0] * w[2] > 0).float(), torch.ones(6)]))
    out = system.step(data)
    z = system.projector(system.encoder(torch.cat(data["views"])))
    y = data["label"].repeat(2)
    contrast = gated_contrast(z, z, torch.ones_like(z), y, y, placement="subspace", both=True, reduction="pair")
    angle = F.cosine_similarity(z[:, None], w[None], dim=2)
    own = F.one_hot(y, CLASSES).bool()
    turned = torch.where(own, (angle.acos() + 0.5).cos(), angle)
    turned = torch.where(own & (angle.acos() + 0.5 > torch.pi), angle - 0.5 * np.sin(0.5), turned)
    torch.testing.assert_close(out["loss_classifier"], F.cross_entropy(turned / 0.1, y))
    torch.testing.assert_close(out["loss"], contrast + out["loss_classifier"])


class TestPartners:
    labels = torch.arange(3000) % 3

    def draw(self, pairing, labels=None, classes=3):
        labels = self.labels if labels is None else labels
        return draw_partners(labels, pairing, classes, torch.Generator().manual_seed(0))

    def test_identical(self):
        assert torch.equal(self.draw("identical"), self.labels)

    def test_arbitrary_partners_are_as_frequent_as_classes_and_independent(self):
        labels = torch.tensor([0] * 2000 + [1] * 1000)
        partners = self.draw("arbitrary", labels)
        assert torch.equal(partners.bincount(), labels.bincount())
        assert (partners[labels == 1] == 1).float().mean().item() == pytest.approx(1 / 3, abs=0.05)

    @pytest.mark.parametrize("pairing", ["distinct", "present"])
    def test_distinct_partners_are_all_other_classes_alike(self, pairing):
        partners = self.draw(pairing)
        assert (partners != self.labels).all()
        table = torch.zeros(3, 3).index_put_((self.labels, partners), torch.tensor(1.0), accumulate=True)
        assert table[~torch.eye(3).bool()].sub(500).abs().max() < 70

    def test_present_partners_have_a_sample_in_the_batch_where_distinct_ones_may_not(self):
        labels = torch.tensor([3, 7, 7, 50])
        assert set(self.draw("present", labels, 100).tolist()) <= {3, 7, 50}
        assert not set(self.draw("distinct", labels, 100).tolist()) <= {3, 7, 50}
        assert self.draw("present", torch.tensor([5, 5]), 100).tolist() == [5, 5]

    def test_a_draw_is_a_function_of_seed_and_step(self):
        system, other = build(), build()
        first, second = system.step(batch())["loss"], other.step(batch())["loss"]
        assert torch.equal(first, second)
        other.at_step_end()
        assert not torch.equal(other.step(batch())["loss"], first)


def test_many_classes_leave_distinct_partners_alone_and_say_so():
    torch.manual_seed(0)
    words = {"num_features": 5, "num_classes": 100, "hidden": 8, "dim": 6, "embedding": 5, "gate_hidden": 7}
    alone = {}
    for pairing in ("distinct", "present", "arbitrary"):
        system = Hydra(nn.Linear(8, 5), pairing=pairing, **words)
        alone[pairing] = float(system.step(batch())["alone"])
    assert alone == {"distinct": pytest.approx(1, abs=0.2), "present": 0.0, "arbitrary": 0.0}


@pytest.mark.parametrize("kind", ["gumbel", "stochastic"])
def test_noise_is_for_training_only_and_a_function_of_seed_and_step(kind):
    system, other = build(gate=kind), build(gate=kind)
    first = system.step(batch())["open"]
    assert torch.equal(other.step(batch())["open"], first)
    other.at_step_end()
    assert not torch.equal(other.step(batch())["open"], first)
    system.eval()
    y = torch.arange(3)
    quiet = system._gates(y, y)
    assert torch.equal(system.gate(y, y), quiet)
    assert (quiet >= 0).all()
    assert (quiet <= 1).all()
    assert system._drawn(y, 2)[1] is None
    assert system.train()._drawn(y, 2)[1].shape == (6, 6)


def test_the_expected_number_of_open_gates_is_what_is_drawn():
    gate = PairGate(2, 3, embedding=4, hidden=4, kind="stochastic").eval()
    a = torch.zeros(20_000, dtype=torch.int64)
    noise = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    drawn = (gate(a, a + 1, noise) > 0).float().sum(1).mean()
    assert drawn.item() == pytest.approx(gate.expected_open(a[:1], a[:1] + 1).item(), abs=0.03)


@pytest.mark.parametrize("form", ["two_views", "fused"])
def test_relations_are_read_in_evaluation_mode(form):
    system = build(form=form)
    system.step(batch())["loss"].backward()
    before = {k: v.clone() for k, v in system.state_dict().items()}
    told = system.relations()
    assert system.training
    assert all(torch.equal(v, before[k]) for k, v in system.state_dict().items())
    torch.testing.assert_close(told["openness"], told["openness"].T)
    torch.testing.assert_close(told["similarity"].diagonal(), torch.ones(CLASSES))
    system.eval()
    a, b = torch.tensor([1]), torch.tensor([3])
    gate = system._gates(a, b)[0]
    torch.testing.assert_close(told["openness"][1, 3], gate.mean())
    entropy = torch.distributions.Bernoulli(gate, validate_args=False).entropy()
    if form == "two_views":
        torch.testing.assert_close(told["entropy"][1, 3], entropy.mean(), rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="no gates"):
        build(gate="open").relations()


def test_a_state_holds_all_that_the_next_step_needs():
    system, other = build(), build(seed=0)
    optimizer = torch.optim.SGD([p for p in system.parameters() if p.requires_grad], 0.1)
    for number in range(2):
        system.step(batch(number))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        system.at_step_end()
    other.load_state_dict(system.state_dict())
    assert torch.equal(system.step(batch(2))["loss"], other.step(batch(2))["loss"])


def test_bad_input_is_named():
    with pytest.raises(DataError, match=r"sample 12 has the label -1: Hydra needs one in \[0, 4\)"):
        build().step(batch() | {"label": torch.tensor([0, 1, -1, 0, 0, 0, 0, 9])})
    with pytest.raises(UsageError, match="'label'"):
        build().step({k: v for k, v in batch().items() if k != "label"})
    with pytest.raises(UsageError, match="takes 2 views"):
        build().step(batch(views=1))
    with pytest.raises(UsageError, match="at least two"):
        build().step(batch(n=1))
    for name, value in (("form", "three"), ("gate", "shut"), ("temperature", 0.0), ("repeats", 0)):
        with pytest.raises(UsageError, match=name):
            build(**{name: value})
    with pytest.raises(UsageError, match="pairing"):
        build(pairing="any").step(batch())


@pytest.mark.parametrize("name", presets_of("hydra"))
def test_presets_hold_arguments_that_there_are_and_train(name):
    given = load_preset(name, "hydra")
    assert set(given) <= set(get_job("hydra").parameters())
    words = {
        k: v
        for k, v in given.items()
        if k not in ("image_encoder", "image_size", "batch_size", "epochs", "hidden", "dim")
    }
    system = build(**words)
    data = batch(views=2 if system.form == "two_views" else system.repeats)
    assert system.step(data)["loss"].isfinite()


# Two processes.

RANKED = {name: ARMS[name] for name in ("gate", "subspace, pairs", "gumbel", "single view", "fused")}


def plain(arm):
    """Without batch norm, whose statistics are those of a rank."""
    torch.manual_seed(1)
    return steps.without_batch_norm(build(nn.Sequential(nn.Linear(8, 5), nn.Tanh()), **ARMS[arm]))


def trained(arm, n, rank=0, world=1):
    system = plain(arm)
    losses = steps.train(system, rank=rank, world=world, make=lambda step: batch(step, n, views=2))
    return {"losses": losses, "state": system.state_dict()}


def run(rank=0, world=1):
    return {f"{arm}, {n}": trained(arm, n, rank, world) for arm in RANKED for n in (8, 9)}


@pytest.mark.xdist_group("ranks")
def test_two_processes_equal_one(tmp_path):
    expected = run()
    for found in on_two_ranks(run, tmp_path):
        for name, alone in expected.items():
            ours = found[name]
            near(ours["losses"], alone["losses"])
            for key, value in alone["state"].items():
                torch.testing.assert_close(ours["state"][key], value, rtol=1e-8, atol=1e-10)
