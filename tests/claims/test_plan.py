"""A claim's file is checked when it is read, and errors name the file and the key."""

import pytest

from contralto.claims.plan import Claim, Comparison, claims, find_claim, load_claim
from contralto.errors import DataError, UsageError

GOOD = {"method": "good", "baseline": "bad", "metric": "right"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"arm": {}}, "arm: unknown key; did you mean arms?"),
        ({"system": None}, "system: must be a text"),
        ({"run": "fakeclaim.run"}, "run: must be module:function, got 'fakeclaim.run'"),
        ({"seeds": 0}, "seeds: must be a whole number above 0"),
        ({"quick": {"step": 1}}, "quick.step: unknown key; did you mean steps?"),
        ({"arms": {}}, "arms: must name at least one arm"),
        ({"arms": {"good": 3, "bad": {}}}, "arms.good: must be a mapping"),
        ({"data": "blobs"}, "data: must be a list of names"),
        ({"data": [{"blobs": 3}]}, "data: names and folders must be texts"),
        ({"verdict": "most"}, "verdict: must be first or all, got 'most'"),
        ({"comparisons": []}, "comparisons: must be a list of at least one"),
        ({"comparisons": [GOOD | {"gate": False}]}, "must have one without `gate: false`"),
        ({"comparisons": [GOOD, GOOD | {"metrics": "x"}]}, "comparisons[1].metrics: unknown key; did you mean metric?"),
        ({"comparisons": [GOOD | {"baseline": "worse"}]}, "[0].baseline: no arm is called 'worse'; there are: good, bad"),
        ({"comparisons": [GOOD | {"method": ["good", "bad"]}]}, "comparisons[0]: must have one arm as method and as baseline"),
        ({"comparisons": [GOOD | {"above": 3}]}, "comparisons[0]: must have either a baseline or a bound"),
        ({"comparisons": [{"method": "good", "metric": "right"}]}, "comparisons[0]: must have either a baseline or a bound"),
        ({"comparisons": [{"method": "good", "metric": "x", "above": 3, "smallest": 1}]}, "a bound has neither direction nor"),
        ({"comparisons": [{"method": "good", "baseline": "bad"}]}, "comparisons[0]: metric is missing"),
        ({"comparisons": [GOOD | {"metric": "labels"}]}, "comparisons[0].metric: must be the name of a measurement"),
        ({"comparisons": [GOOD | {"smallest": "1 %"}]}, "comparisons[0].smallest: must be a number"),
        ({"comparisons": [GOOD | {"direction": "up"}]}, "comparisons[0].direction: must be higher or lower"),
        ({"comparisons": [GOOD | {"macro": "yes"}]}, "comparisons[0].macro: must be true or false"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_named_with_its_key(fake, changes, told):
    with pytest.raises(DataError) as error:
        load_claim(fake.write(**changes))
    assert str(error.value).startswith(f"{fake.path}: ")
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("system: [", "is no YAML"),
        ("- 1", "must be a mapping"),
        ("arms: {a: {}, b: {}, a: {}}", "the key 'a' is there twice"),
        ("system: x", "claim is missing"),
    ],
)
def test_what_is_no_claim_is_named(fake, text, told):
    fake.path.write_text(text)
    with pytest.raises(DataError, match=told) as error:
        load_claim(fake.path)
    assert str(fake.path) in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no\.yaml: cannot be read"):
        find_claim(str(tmp_path / "no.yaml"))
    with pytest.raises(UsageError, match=r"no claim of 'nothing' can be run; there are: .*capro"):
        find_claim("nothing")


def test_a_function_that_is_not_there_is_named(fake):
    for run in ("nowhere.at.all:run", "fakeclaim:train"):
        with pytest.raises(DataError, match=r"fake\.yaml: run: .* cannot be imported"):
            load_claim(fake.write(run=run)).function()


def test_what_a_file_leaves_out_has_its_default(fake):
    text = fake.path.read_text().replace("steps: 30", "lr: 1e-3").replace("quick:\n  steps: 1\n", "")
    fake.path.write_text(text)
    claim = load_claim(fake.path)
    assert isinstance(claim, Claim)
    assert claim.budget == {"lr": 0.001}  # YAML 1.1 takes 1e-3 for a text
    assert (claim.seeds, claim.verdict, claim.quick, claim.data, claim.name) == (5, "first", {}, {"blobs": ()}, "fake")
    assert claim.comparisons[1] == Comparison(("good",), "right", ("bad",), macro=True, part="rare", gate=False)
    assert claim.deciding() == [0]
    assert load_claim(fake.write(verdict="all")).deciding() == [0]
    gated = [GOOD | {"gate": False}, GOOD, GOOD]
    assert load_claim(fake.write(comparisons=gated)).deciding() == [1]
    assert load_claim(fake.write(comparisons=gated, verdict="all")).deciding() == [1, 2]


def test_data_may_need_folders(fake):
    claim = load_claim(fake.write(data=["digits", {"shop": "fashion_web"}, {"cifar": ["cifar10n", "tiny"]}]))
    assert claim.data == {"digits": (), "shop": ("fashion_web",), "cifar": ("cifar10n", "tiny")}
    assert load_claim(fake.write(data={"digits": []})).data == {"digits": ()}


@pytest.mark.parametrize("name", claims())
def test_the_claims_that_ship_are_whole(name):
    claim = find_claim(name)
    assert callable(claim.function())
    assert claim.paper, "the registry knows no paper of this system: name it in the file"
    assert set(claim.data)
    assert claim.seeds >= 3
