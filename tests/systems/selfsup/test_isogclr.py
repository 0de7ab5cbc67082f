"""iSogCLR as a system: what is kept per item moves as the loss says, frequent items get larger temperatures, bad input."""

import pytest
import torch

from contralto.errors import UsageError
from contralto.losses.global_contrast import (
    ItemState,
    TemperatureRule,
    bimodal_global_contrast,
    global_contrast,
    queue_global_contrast,
)
from contralto.systems.selfsup.isogclr import BimodalGlobalContrast, ISogCLR

from tests.systems.selfsup import steps


def build(**arguments):
    given = {
        "num_features": 10,
        "num_samples": steps.SAMPLES,
        "hidden": 7,
        "dim": 5,
        "steps_per_epoch": 2,
        "epochs": 10,
    }
    return steps.without_batch_norm(ISogCLR(steps.encoder(), **(given | arguments)))


def test_a_step_moves_its_items_and_no_others():
    system, batch = build(temperature=0.3), steps.batch(1)
    start = ItemState.start(8, 0.3, like=batch["views"][0])
    z0, z1 = (system.projector(system.encoder(v)) for v in batch["views"])
    expected, after = global_contrast(z0, z1, start, TemperatureRule())
    found = system.step(batch)
    torch.testing.assert_close(found["loss"], expected)
    kept = system.items.read(batch["index"])
    torch.testing.assert_close(kept["temperature"], after.temperature)
    torch.testing.assert_close(kept["log_mean"], after.log_mean)
    torch.testing.assert_close(found["temperature"], after.temperature.mean())
    seen = torch.zeros(steps.SAMPLES, dtype=torch.bool)
    seen[batch["index"]] = True
    assert torch.equal(system.items.seen, seen)
    assert torch.equal(system.temperatures().isnan(), ~seen)
    assert system.items.temperature[~seen].unique().item() == pytest.approx(0.3)


def test_two_epochs_keep_means_over_batches():
    system = build(gamma=0.3)
    for step in range(4):
        batch = steps.batch(step)
        index = batch["index"]
        before = ItemState(**system.items.read(index))
        z0, z1 = (system.projector(system.encoder(v)).detach() for v in batch["views"])
        _, after = global_contrast(z0, z1, before, system.rule(0))
        alone, _ = global_contrast(z0, z1, ItemState.start(8, 0.1, like=z0), system.rule(0))
        assert torch.isfinite(alone)
        system.step(batch)
        torch.testing.assert_close(system.items.log_mean[index], after.log_mean)


@pytest.mark.parametrize("mixed", [False, True])
def test_with_a_queue(mixed):
    """Cosines are in single precision also where the network is not."""
    system = ISogCLR(
        steps.encoder(), num_features=10, num_samples=steps.SAMPLES, hidden=7, dim=5, queue_size=16, decay=0.9
    )
    batch = steps.batch(1)
    batch["views"] = [v.float() for v in batch["views"]]
    past = system.queue.read()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        query = system.projector(system.encoder(batch["views"][0])).float()
        found = system.step(batch)
        key = system.key_network(batch["views"][1]).float()
    query, key = (torch.nn.functional.normalize(x, dim=1) for x in (query, key))
    cosine = torch.cat([(query * key).sum(1, keepdim=True), query @ past.T], 1)
    expected, after = queue_global_contrast(cosine, ItemState.start(8, 0.1))
    torch.testing.assert_close(found["loss"], expected)
    torch.testing.assert_close(system.items.temperature[batch["index"]], after.temperature)
    torch.testing.assert_close(system.queue.keys[:8], key)


def test_sogclr_leaves_temperatures_alone():
    system = build(learn_temperature=False, temperature=0.2)
    steps.train(system)
    assert system.items.temperature.unique().item() == pytest.approx(0.2)
    assert system.items.seen.any()


def test_the_first_epoch_of_the_published_code_forgets_the_means():
    system, batch = build(official=True), steps.batch(1)
    system.step(batch)
    first = system.items.log_mean.clone()
    system.step(batch)  # still in epoch 0
    torch.testing.assert_close(
        system.items.log_mean, first, rtol=0.5, atol=0.5, equal_nan=True
    )  # the batch's own, at a temperature that has moved
    own = build(official=True)
    own.items.write(batch["index"], temperature=system.items.temperature[batch["index"]])
    system.steps += 4
    system.step(batch)
    later = system.items.log_mean[batch["index"]].clone()
    own.step(batch)
    assert not torch.allclose(later, own.items.log_mean[batch["index"]])


def test_step_sizes_follow_the_epoch():
    system = build(eta_schedule="cosine", eta=0.05)
    assert system.rule(0).eta == pytest.approx(0.05)
    assert system.rule(10).eta == pytest.approx(1e-4)


def test_pairs_in_the_place_of_the_loss_of_clip():
    loss = BimodalGlobalContrast(num_images=9, num_texts=9, temperature=0.2).double()
    g = torch.Generator().manual_seed(0)
    image, text = (torch.randn(4, 5, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    images, texts = torch.tensor([3, 0, 8, 5]), torch.tensor([1, 2, 7, 6])
    start = ItemState.start(4, 0.2, like=image.detach())
    expected, of_images, of_texts = bimodal_global_contrast(image, text, start, start, loss.rule)
    found = loss(image, text, images, texts)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(loss.images.temperature[images], of_images.temperature)
    torch.testing.assert_close(loss.texts.log_mean[texts], of_texts.log_mean)
    found.backward()
    assert torch.isfinite(image.grad).all()
    assert torch.isfinite(text.grad).all()
    state = {k: v.clone() for k, v in loss.state_dict().items()}
    loss.eval()(image, text, images, texts)
    assert all(torch.equal(v, state[k]) for k, v in loss.state_dict().items())


def test_bad_input_is_named():
    with pytest.raises(UsageError, match="num_samples"):
        build(num_samples=0)
    with pytest.raises(UsageError, match=r"index \d+ is not among the 5 samples"):
        build(num_samples=5).step(steps.batch(0))
    with pytest.raises(UsageError, match="temperature must begin within"):
        build(temperature=0.01)
    with pytest.raises(UsageError, match="gamma"):
        build(gamma=1.5)
    with pytest.raises(UsageError, match="schedule"):
        build(eta_schedule="linear")
    twice = steps.batch(0)
    twice["index"][1] = twice["index"][0]
    assert torch.isfinite(build().step(twice)["loss"])
