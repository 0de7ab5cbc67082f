"""Losses over the rows of two processes are those of one process with the whole batch: values and parameters' gradients."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from contralto.distributed import gather_rows, gather_with_gradient, own_places
from contralto.errors import UsageError
from contralto.losses import pairs
from contralto.losses.contrast import contrast

from tests.ranks import on_two_ranks

pytestmark = pytest.mark.xdist_group("ranks")  # two processes are started once


def soft(q, k, _labels, **options):
    """Each query belongs to all keys, the more the nearer the places are."""
    place = own_places(q)

    def positives(rows, columns):
        return 1 / (1 + (place[rows] - columns).abs()).double()

    return contrast(q, k, positives=positives, weights=place.unsqueeze(1), gather="all", **options)


def some_positives(q, k, labels, **options):
    """Only classes 0 and 1 have positives."""
    return contrast(q, k, positives=torch.where(labels < 2, own_places(q), -1), gather="all", **options)


def queue():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


LOSSES = {
    "info_nce": lambda a, b, y, **o: pairs.info_nce(a, b, gather="all", **o),
    "info_nce, queue": lambda a, b, y, **o: pairs.info_nce(a, b, negatives=queue(), gather="all", **o),
    "nt_xent": lambda a, b, y, **o: pairs.nt_xent(a, b, gather="all", **o),
    "clip": lambda a, b, y, **o: pairs.clip(a, b, gather="all", **o),
    "dcl": lambda a, b, y, **o: pairs.dcl(a, b, gather="all", **o),
    "dcl, weights": lambda a, b, y, **o: pairs.dcl(a, b, sigma=0.5, gather="all", **o),
    "dcl, learnt weights": lambda a, b, y, **o: pairs.dcl(a, b, sigma=0.5, detach_weight=False, gather="all", **o),
    "sup_con": lambda a, b, y, **o: pairs.sup_con(torch.cat([a, b]), torch.cat([y, y]), gather="all", **o),
    "sup_con, one view": lambda a, b, y, **o: pairs.sup_con(a, y, gather="all", **o),
    "soft": soft,
    "some positives": some_positives,
}
CASES = {
    **{
        f"{name}, {reduction}, {n} rows": (name, reduction, n)
        for name in LOSSES
        for reduction in ("mean", "sum")
        for n in (6, 7)
    },
    "info_nce, mean_all, 7 rows": ("info_nce", "mean_all", 7),
    "some positives, mean_all, 7 rows": ("some positives", "mean_all", 7),
    "hard_negative, mean, 7 rows": ("hard_negative", "mean", 7),
    "siglip, 7 rows": ("siglip", "", 7),
}


def step(case, rank=0, world=1, wrap=lambda model: model):
    """The loss and the gradients of the parameters, temperature included, of this rank's rows."""
    name, reduction, n = case
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, n, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[:, rank::world]
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 3])[:n][rank::world]
    wrapped = wrap(model)
    a, b = wrapped(x.flatten(0, 1)).chunk(2)
    if name == "siglip":
        loss = pairs.siglip(a, b, scale=1 / temperature, bias=-temperature, gather="all")
    elif name == "hard_negative":
        loss = pairs.hard_negative(a, b, temperature=0.5, reduction=reduction, gather="all") + 0 * temperature
    else:
        loss = LOSSES[name](a, b, labels, temperature=temperature, reduction=reduction)
    loss.backward()
    gradients = {k: p.grad for k, p in model.named_parameters()}
    return {"loss": loss.detach(), "temperature": temperature.grad, **gradients}


def mean_over_ranks(found):
    for x in found.values():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return found


def by_torch(case, rank, world):
    """As `step`, with DistributedDataParallel averaging the gradients of the model, not by hand."""
    found = step(case, rank, world, wrap=DistributedDataParallel)
    return {k: x for k, x in found.items() if k not in ("loss", "temperature")}


def both(rank, world):
    warnings.simplefilter("ignore")
    found = {name: mean_over_ranks(step(case, rank, world)) for name, case in CASES.items()}
    torchs = by_torch(("nt_xent", "mean", 6), rank, world)
    a, b = (torch.randn(7, 4, generator=torch.Generator().manual_seed(s))[rank::world] for s in (2, 3))
    rows = gather_rows(pairs.info_nce(a, b, reduction="none", gather="all"))
    refused = ""
    try:
        gather_with_gradient(a, uneven="refuse")
    except UsageError as error:
        refused = str(error)
    even = gather_with_gradient(a[:2], uneven="refuse").shape[0]
    return {"cases": found, "torch": torchs, "rows": rows, "places": own_places(a), "refused": refused, "even": even}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes found."""
    return on_two_ranks(both, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(ranks, name):
    alone = step(CASES[name])
    assert all(
        x.abs().max() > 1e-6 for k, x in alone.items() if (k, CASES[name][0]) != ("temperature", "hard_negative")
    )
    for rank in ranks:
        for key, value in alone.items():
            torch.testing.assert_close(
                rank["cases"][name][key], value, rtol=1e-9, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}"
            )


def test_alone_all_is_none(ranks):
    a, b = (torch.randn(7, 4, generator=torch.Generator().manual_seed(s)) for s in (2, 3))
    expected = pairs.info_nce(a, b, reduction="none")
    assert torch.equal(pairs.info_nce(a, b, reduction="none", gather="all"), expected)
    for rank in ranks:
        torch.testing.assert_close(rank["rows"], expected)


def test_torchs_own_wrapper_averages_to_the_same(ranks):
    alone = step(("nt_xent", "mean", 6))
    for rank in ranks:
        for key, value in rank["torch"].items():
            torch.testing.assert_close(value, alone[key], rtol=1e-9, atol=1e-11)


def test_places_and_uneven_batches(ranks):
    assert ranks[0]["places"].tolist() == [0, 2, 4, 6]
    assert ranks[1]["places"].tolist() == [1, 3, 5]
    for rank in ranks:
        assert "[4, 3]" in rank["refused"]
        assert rank["even"] == 4


def test_keys_without_their_gradient_are_refused():
    with pytest.raises(UsageError, match="without their gradient"):
        pairs.info_nce(torch.randn(3, 4), torch.randn(3, 4), gather="detached")
