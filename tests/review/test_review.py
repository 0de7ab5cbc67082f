"""The review: decisions that last, a page that lets nobody else in, what comes out, and learning from it."""

import json
import re
import subprocess
import sys
import time
from urllib.parse import urlsplit

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from contralto.cli import main
from contralto.data.decisions import DATABASE, Decisions
from contralto.data.manifest import Manifest
from contralto.data.verified import UNKNOWN, read_reviewed
from contralto.errors import DataError, UsageError
from contralto.pipelines.capro import fit_capro
from contralto.pipelines.fopro import fit_fopro
from contralto.review.export import export_review, reviewed_table
from contralto.review.listing import Filter, Listing
from contralto.review.server import class_codes, create_app

from tests.pipelines.test_fopro import FROZEN as FOPRO
from tests.review.test_report import HOSTILE, hostile_run
from tests.tiny import FROZEN

HERE = "http://127.0.0.1:8000"
FORM = {"origin": HERE}


def visitor(app, name="ada", address=HERE, **more):
    client = TestClient(app, base_url=address, follow_redirects=False)
    answer = client.post("/enter", data={"name": name} | more, headers={"origin": address})
    assert answer.status_code == 303
    client.headers["origin"] = address
    client.key = re.search(r'name="key" value="(\w+)"', client.get("/").text)[1]
    return client


def say(client, path, **values):
    return client.post(path, data={"key": client.key} | values)


# Decisions.


def test_the_last_word_holds_and_undo_brings_back_what_held_before(tmp_path):
    one, two = Decisions(tmp_path), Decisions(tmp_path)  # as two processes have them
    one.decide({"a": ["x"], "b": ["x"]}, reviewer="ada", told="both")
    two.decide({"a": ["y"]}, reviewer="ben", told="a")
    one.decide({"a": []}, reviewer="ada", told="a again")
    assert [d.of("a").labels for d in (one, two)] == [(), ()]
    assert {r: d.labels for r, d in two.by_reviewer("a").items()} == {"ada": (), "ben": ("y",)}
    assert one.undo("ada").told == "a again"
    assert [d.of("a").labels for d in (one, two)] == [("y",), ("y",)]
    assert one.by_reviewer("a")["ada"].labels == ("x",)
    assert one.undo("ada").told == "both"
    assert two.of("b") is None
    assert one.undo("ada") is None
    assert [(a.told, a.pictures, a.undone is not None) for a in two.history()] == [
        ("a again", 1, True), ("a", 1, False), ("both", 2, True),
    ]  # fmt: skip
    assert one.secret() == two.secret()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from(["x", "y", None]), st.sets(st.sampled_from("123"), min_size=1))
    )
)
def test_decisions_equal_a_slow_reading_of_the_history(tmp_path_factory, actions):
    """None is undo; two connections take turns, so that each also sees what the other wrote."""
    folder = tmp_path_factory.mktemp("d")
    stores, done = [Decisions(folder), Decisions(folder)], []
    for i, (reviewer, label, ids) in enumerate(actions):
        store = stores[i % 2]
        if label is None:
            store.undo(reviewer)
            for action in reversed(done):
                if action[0] == reviewer and not action[3]:
                    action[3] = True
                    break
        else:
            store.decide({j: [label] for j in ids}, reviewer=reviewer, told=label)
            done.append([reviewer, label, ids, False])
    for store in stores:
        for j in "123":
            expected = {reviewer: label for reviewer, label, ids, undone in done if j in ids and not undone}
            assert {r: d.labels[0] for r, d in store.by_reviewer(j).items()} == expected
        store.close()


WRITER = """
import sys
from contralto.data.decisions import Decisions
d = Decisions(sys.argv[1])
for i in range(100_000):
    d.decide({str(i): ["x"]}, reviewer="ada", told="x")
    print(i, flush=True)
"""


def test_a_killed_writer_loses_no_decision_that_it_had_told(tmp_path):
    for wait in (0.3, 0.05):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as process:
            first = process.stdout.readline()
            time.sleep(wait)
            process.kill()
            told = [first, *process.stdout.readlines()]
        told = [int(line) for line in told if line.endswith("\n")]
        assert told
        kept = Decisions(tmp_path).every()
        assert {str(i) for i in told} <= kept.keys()


def test_a_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / DATABASE).write_bytes(b"\x80\x04nonsense" * 200)
    with pytest.raises(DataError, match=DATABASE):
        Decisions(tmp_path)


# The list.


def slow_find(listing, f, reviewer):
    """What `find` should give, from the words of `Filter`."""
    out = []
    for n in range(len(listing)):
        said = listing.decisions.by_reviewer(listing.ids[n])
        text = f"{listing.texts[n]} {listing.ids[n]}".lower()
        verdict = listing.flagged[n] if f.verdict == "flagged" else f.verdict in ("any", listing.verdict[n])
        label = not f.label or f.label in {*listing.given[n], *listing.new[n]}
        state = {"open": not said, "own": reviewer not in said, "decided": bool(said), "any": True,
                 "differ": len({d.labels for d in said.values()}) > 1}[f.state]  # fmt: skip
        if (
            verdict
            and label
            and state
            and all(w in text for w in f.words.lower().split())
            and listing.p_wrong[n] >= f.least
        ):
            out.append(n)
    names = listing.manifest.class_names
    return sorted(
        out,
        key=lambda n: ((names.index(listing.given[n][0]),) if f.order == "class" else ()) + (-listing.p_wrong[n], n),
    )


def test_lists_equal_a_slow_reading_of_their_filter(run):
    listing = Listing(run)
    rng = np.random.default_rng(0)
    for reviewer in ("ada", "ben"):
        for n in rng.permutation(len(listing))[:20]:
            label = [listing.manifest.class_names[rng.integers(3)]] if rng.random() < 0.8 else []
            listing.decisions.decide({listing.ids[n]: label}, reviewer=reviewer, told="x")
    seen = set()
    others = (("", "", 0.0, "worst"), ("blue", "", 0.2, "class"), ("red", "photo", 0.0, "worst"))
    for verdict in ("flagged", "any", "kept", "anchor"):
        for state in ("open", "own", "decided", "differ", "any"):
            for label, words, least, order in others:
                f = Filter(verdict, label, state, words, least, order)
                found = listing.find(f, "ada").tolist()
                assert found == slow_find(listing, f, "ada"), f
                seen.add(len(found))
                if found:
                    for at, n in enumerate(found):
                        following = found[(at + 1) % len(found)]
                        assert listing.around(n, f, "ada")[1] == (following if len(found) > 1 else None)
                        assert listing.around(n, f, "ada")[0] == (found[at - 1] if at else None)
                        assert listing.around(n, f, "ada")[2] == len(found)
    assert len(seen) > 5


def test_progress_and_agreement_are_counted_right(run):
    listing = Listing(run)
    flagged = np.flatnonzero(listing.flagged)
    assert listing.progress()["precision"] is None
    for i, n in enumerate(flagged):
        labels = listing.given[n] if i % 4 == 0 else ()
        listing.decisions.decide({listing.ids[n]: labels}, reviewer="ada", told="x")
        listing.decisions.decide({listing.ids[n]: listing.given[n] if i % 2 == 0 else ()}, reviewer="ben", told="x")
    p, k = listing.progress(), len(flagged)
    wrong = sum(i % 2 != 0 for i in range(k))  # ben has the last word
    assert (p["decided"], p["wrong"], p["differ"]) == (k, wrong, sum(i % 4 == 2 for i in range(k)))
    z, share = 1.959964, wrong / k
    middle, half = share + z * z / (2 * k), z * np.sqrt(share * (1 - share) / k + z * z / (4 * k * k))
    np.testing.assert_allclose(
        [p["low"], p["high"]], np.array([middle - half, middle + half]) / (1 + z * z / k), rtol=1e-5
    )
    (agreement,) = listing.agreement()
    assert agreement["reviewers"] == ("ada", "ben")
    assert agreement["both"] == k
    assert agreement["share"] == pytest.approx(1 - p["differ"] / k)


def test_neighbours_are_those_of_the_largest_cosine(run):
    listing = Listing(run)
    x = np.load(run / "embedding.npy").astype(float)
    cosine = (x @ x[5]) / np.linalg.norm(x, axis=1) / np.linalg.norm(x[5])
    cosine[5] = -2
    np.testing.assert_allclose([s for _, s in listing.neighbours(5)], np.sort(cosine)[::-1][:8], atol=1e-3)
    assert listing.neighbours(5)[0][0] != 5


def test_unfinished_and_damaged_runs_are_named(tmp_path, run):
    with pytest.raises(DataError, match=r"config\.json"):
        Listing(tmp_path)
    np.save(tmp_path / "e.npy", np.zeros((3, 2)))
    whole = (run / "embedding.npy").read_bytes()
    try:
        (run / "embedding.npy").write_bytes((tmp_path / "e.npy").read_bytes())
        with pytest.raises(DataError, match=r"embedding\.npy"):
            Listing(run)
    finally:
        (run / "embedding.npy").write_bytes(whole)


# The page.


def test_deciding_goes_to_the_next_and_undo_comes_back(run):
    listing = Listing(run)
    client = visitor(create_app(run))
    order = listing.find(Filter()).tolist()
    page = client.get("/").text
    assert [int(n) for n in re.findall(r'class="item" href="/picture/(\d+)', page)] == order[:60]
    given = []
    for n, action in zip(order, ["keep", "accept", "off-topic", "keep"], strict=False):
        answer = say(client, "/decide", n=n, action=action)
        assert answer.status_code == 303
        given.append({"keep": listing.given[n], "accept": listing.new[n], "off-topic": ()}[action])
        rest = [m for m in order if m not in order[: order.index(n) + 1]]
        assert urlsplit(answer.headers["location"]).path == (f"/picture/{rest[0]}" if rest else "/")
    assert [listing.decisions.of(listing.ids[n]).labels for n in order[: len(given)]] == given
    assert urlsplit(say(client, "/undo").headers["location"]).path == f"/picture/{order[len(given) - 1]}"
    assert listing.decisions.of(listing.ids[order[len(given) - 1]]) is None
    history = client.get("/reviewers").text
    assert history.count("<bdi>ada</bdi></td>") == len(given)
    assert say(client, "/decide", n=order[0], set="blue").status_code == 303
    assert listing.decisions.of(listing.ids[order[0]]).labels == ("blue",)


def test_a_batch_takes_the_list_that_was_seen_and_nothing_else(run):
    listing = Listing(run)
    app = create_app(run)
    ada, ben = visitor(app), visitor(app, "ben")
    n = len(listing.find(Filter()))
    order = listing.find(Filter()).tolist()
    say(ben, "/decide", n=order[0], action="keep")
    assert say(ada, "/batch", action="off-topic", count=n).status_code == 409
    assert len(listing.decisions.every()) == 1
    assert say(ada, "/batch", action="off-topic", count=n - 1).status_code == 303
    held = listing.decisions.holding()
    assert {listing.position(i) for i in held} == set(order)
    assert held[listing.ids[order[0]]].reviewer == "ben"
    say(ada, "/undo")
    assert len(listing.decisions.every()) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_who_does_not_belong_here_is_refused(run, host):
    app = create_app(run, host=host, token="wonder" if host == "0.0.0.0" else None)
    more = {"token": "wonder"} if host == "0.0.0.0" else {}
    client = visitor(app, **more)
    stranger = TestClient(app, base_url=HERE, follow_redirects=False)
    if more:
        assert stranger.post("/enter", data={"name": "eve", "token": "wrong"}, headers=FORM).status_code == 401
    for path in ("/picture/0", "/reviewers"):
        assert stranger.get(path).status_code == 303
    assert "item" not in stranger.get("/").text
    assert stranger.get("/image/0/96").status_code == 401
    assert stranger.post("/decide", data={"n": 0, "action": "keep"}, headers=FORM).status_code == 401
    forged = TestClient(app, base_url=HERE, cookies={"reviewer": b"ada".hex() + "." + "0" * 64})
    assert forged.get("/image/0/96").status_code == 401
    # Another host name that leads here, another page's form, a form without the key.
    assert client.get("/", headers={"host": "evil.example"}).status_code == 421
    form = {"key": client.key, "n": 0, "action": "keep"}
    for origin in (
        "http://evil.example", "null", "http://127.0.0.1:9", "http://127.0.0.1:8000.evil.example", "http://[",
    ):  # fmt: skip
        assert client.post("/decide", data=form, headers={"origin": origin}).status_code == 403
    del client.headers["origin"]
    assert say(client, "/decide", n=0, action="keep").status_code == 403
    client.headers["origin"] = HERE
    assert client.post("/decide", data={"n": 0, "action": "keep", "key": "0" * 64}).status_code == 403
    assert client.post("/decide", content=b"x" * 2**21, headers={"content-type": "text/plain"}).status_code == 413
    assert client.post("/decide", content=iter([b"x"]), headers={"content-type": "text/plain"}).status_code == 411
    for method in ("PUT", "DELETE", "OPTIONS", "PATCH"):
        assert client.request(method, "/decide").status_code == 405
    for path in ("/docs", "/openapi.json", "/static/../server.py", "/static/%2e%2e%2fserver.py", "/image/0/97", "/image/-1/96",
                 "/image/../../etc/passwd", "/image/0%2f..%2f1/96", "/picture/1e1", "/picture/\u0661"):  # fmt: skip
        assert client.get(path).status_code in (404, 405)
    assert Decisions(run).every() == {}
    answer = client.get("/")
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_other_machines_need_a_token(run):
    with pytest.raises(UsageError, match="token"):
        create_app(run, host="0.0.0.0")
    with pytest.raises(UsageError, match="token"):
        create_app(run, host="192.168.1.7")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = hostile_run(tmp_path_factory.mktemp("hostile"))
    return folder, visitor(create_app(folder), HOSTILE[1])


def test_hostile_texts_names_and_reviewers_stay_text(hostile):
    _, client = hostile
    say(client, "/decide", n=0, action="keep")
    for page in [
        client.get(p).text for p in ("/?verdict=any&state=any", "/reviewers", *(f"/picture/{n}" for n in range(8)))
    ]:
        assert "<script>window" not in page
        assert 'onerror="window' not in page.replace("&#34;", "")
        assert "\u202e" not in re.sub('value="[^"]*"', "", page)
        assert len(page) < 200_000


PATHS = st.one_of(
    st.sampled_from(
        ["/", "/picture/0", "/picture/39", "/image/0/96", "/image/3/480", "/static/review.js", "/reviewers"]
    ),
    st.text(max_size=30).map(lambda t: "/" + t),
    st.tuples(st.sampled_from(["/picture/", "/image/", "/static/", "/image/1/"]), st.text(max_size=20)).map("".join),
)
KNOWN = ["flagged", "any", "open", "own", "differ", "worst", "class", "keep", "set", "accept"]
NAMES = [
    "verdict",
    "label",
    "state",
    "words",
    "least",
    "order",
    "page",
    "last",
    "token",
    "n",
    "action",
    "set",
    "count",
    "name",
    "key",
]
WORDS = st.one_of(
    st.text(max_size=20), st.integers().map(str), st.floats().map(str), st.sampled_from([*KNOWN, *HOSTILE[:6]])
)
QUERY = st.dictionaries(st.one_of(st.sampled_from(NAMES), st.text(max_size=5)), WORDS, max_size=6)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=PATHS, query=QUERY)
def test_no_address_breaks_the_server_or_leads_out_of_the_run(hostile, path, query):
    from urllib.parse import quote

    _, client = hostile
    answer = client.get(quote(path, safe="/%"), params={k: v.encode("utf-8", "replace") for k, v in query.items()})
    assert answer.status_code in (200, 303, 307, 404, 405, 410, 422), answer.text[:500]
    assert b"root:" not in answer.content
    if answer.headers.get("content-type", "").startswith("image/"):
        assert answer.content[:3] == b"\xff\xd8\xff"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(["/decide", "/batch", "/undo", "/enter", "/leave"]), form=QUERY, keyed=st.booleans(),
       kind=st.sampled_from(["form", "multipart", "json", "raw"]), raw=st.binary(max_size=60))  # fmt: skip
def test_no_form_breaks_the_server(hostile, path, form, keyed, kind, raw):
    folder, client = hostile
    form = {k: v.encode("utf-8", "replace").decode() for k, v in form.items()} | ({"key": client.key} if keyed else {})
    if kind == "form":
        answer = client.post(path, data=form)
    elif kind == "multipart":
        answer = client.post(path, files={"n": ("a.png", raw, "image/svg+xml")}, data=form)
    elif kind == "json":
        answer = client.post(path, json=form)
    else:
        answer = client.post(path, content=raw, headers={"content-type": "multipart/form-data; boundary=x"})
    assert answer.status_code in (303, 400, 401, 403, 404, 409, 422), answer.text[:500]
    names = set(Manifest.load(folder / "manifest").class_names)
    assert all(set(d.labels) <= names for said in Decisions(folder).every().values() for d in said.values())
    if path in ("/enter", "/leave"):  # the session may have changed
        client.cookies.clear()
        client.cookies.update(visitor_cookies(client))


def visitor_cookies(client):
    answer = client.post("/enter", data={"name": HOSTILE[1]})
    return dict(answer.cookies)


def test_pictures_are_made_anew_and_small(run):
    client = visitor(create_app(run))
    small, large = (client.get(f"/image/0/{side}") for side in (96, 480))
    assert small.headers["content-type"] == "image/jpeg"
    assert small.content[:3] == b"\xff\xd8\xff"
    assert len(small.content) <= len(large.content)


def test_codes_of_classes_are_two_keys_and_all_different():
    for count in (2, 100, 101, 360):
        codes = class_codes(count)
        assert len(set(codes)) == count
        assert all(re.fullmatch("[0-9][0-9a-z]", c) for c in codes)


# What comes out.


def test_export_has_the_last_word_and_cleanlabs_names(run, tmp_path):
    listing = Listing(run)
    flagged = np.flatnonzero(listing.flagged)
    kept, gone = (listing.ids[n] for n in flagged[:2])
    listing.decisions.decide({kept: listing.given[flagged[0]]}, reviewer="ada", told="keep")
    listing.decisions.decide({gone: []}, reviewer="=ben()", told="off-topic")
    assert main(["review", str(run), "--export", str(tmp_path / "r.parquet")]) == 0
    assert main(["review", str(run), "--export", str(tmp_path / "r.csv")]) == 0
    rows = {r["id"]: r for r in pq.read_table(tmp_path / "r.parquet").to_pylist()}
    assert len(rows) == len(listing)
    assert {"given_label", "predicted_label", "is_label_issue", "label_score"} <= rows[kept].keys()
    assert (rows[kept]["is_label_issue"], rows[kept]["label_score"], rows[kept]["reviewer"]) == (False, 1.0, "ada")
    assert (rows[gone]["label"], rows[gone]["label_score"], rows[gone]["reviewed"]) == (None, 0.0, True)
    other = next(r for r in rows.values() if not r["reviewed"] and r["is_label_issue"])
    assert other["label"] == other["predicted_label"] or other["predicted_label"] is None
    assert "\n=" not in (tmp_path / "r.csv").read_text()
    assert "'=ben()" in (tmp_path / "r.csv").read_text()


def test_the_folder_is_a_data_set_of_pictures_and_class_labels(run, tmp_path):
    n = export_review(run, tmp_path / "set")
    (shard,) = sorted((tmp_path / "set" / "data").iterdir())
    table = pq.read_table(shard)
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == table.column_names
    names = features["label"]["names"]
    expected = {r["id"]: r["label"] for r in reviewed_table(Listing(run)).to_pylist() if r["label"]}
    assert {r["id"]: names[r["label"]] for r in table.to_pylist()} == expected
    assert n == len(expected)
    assert table["image"][0]["bytes"].as_py()[:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0")
    with pytest.raises(UsageError, match="already"):
        export_review(run, tmp_path / "set")
    with pytest.raises(UsageError, match="folder"):
        export_review(run, tmp_path / "set.xlsx")


# Learning from it.


@pytest.mark.parametrize("system", ["capro", "fopro", "reconcile"])
def test_what_people_said_holds_in_the_next_run(run, tiny_parquet, tmp_path, system):
    listing = Listing(run)
    wrong = listing.ids[0], listing.ids[1]
    other = next(c for c in listing.manifest.class_names if c != listing.given[0][0])
    listing.decisions.decide({wrong[0]: [other]}, reviewer="ada", told="set")
    listing.decisions.decide({wrong[1]: []}, reviewer="ada", told="off-topic")
    fit, arguments = (fit_fopro, FOPRO) if system == "fopro" else (fit_capro, FROZEN)
    arguments = arguments | {"epochs": 3, "baseline": False}
    if system == "reconcile":
        arguments |= {"reconcile": True}
    definitions = tiny_parquet.with_name("classes.yaml")
    again = fit(str(tiny_parquet), tmp_path / "r", definitions=definitions, reviewed=run, **arguments)
    rows = {r["id"]: r for r in pq.read_table(again / "cleaned.parquet").to_pylist()}
    assert wrong[1] not in rows
    assert (rows[wrong[0]]["verdict"], rows[wrong[0]]["given"], rows[wrong[0]]["new"]) == ("anchor", other, other)
    assert rows[wrong[0]]["p_wrong"] == pytest.approx(0, abs=1e-6)
    assert "only in part verified by people" in (again / "model" / "README.md").read_text()
    assert "labelled by a person" in (again / "report.html").read_text()


def test_reviews_that_cannot_be_learnt_from_are_named(tmp_path, run):
    manifest = Manifest.load(run / "manifest")
    with pytest.raises(DataError, match="nobody reviewed"):
        read_reviewed(tmp_path, manifest)
    decisions = Decisions(tmp_path)
    decisions.decide({"elsewhere.jpg": ["red"]}, reviewer="a", told="x")
    with pytest.raises(DataError, match="none of the 1 pictures"):
        read_reviewed(tmp_path, manifest)
    identity = str(manifest.column("id")[3])
    for labels, message in ((["mauve"], "mauve"), (["red", "blue"], "several labels")):
        decisions.decide({identity: labels}, reviewer="a", told="x")
        with pytest.raises(DataError, match=message):
            read_reviewed(tmp_path, manifest)
    decisions.decide({identity: ["red"]}, reviewer="a", told="x")
    found = read_reviewed(tmp_path, manifest)
    assert manifest.class_names[found[3]] == "red"
    assert (np.delete(found, 3) == UNKNOWN).all()
