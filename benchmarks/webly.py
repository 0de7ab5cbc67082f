"""The main job beside what else one would do with noisy web labels: equal budgets, five seeds, intervals.

    CONTRALTO_DATA=... python benchmarks/webly.py                # about an hour on two cores; goes on where it stopped
    python benchmarks/webly.py --full --device gpu               # fine-tunes the pretrained encoder too: for a GPU
    python benchmarks/webly.py --rivals                          # what else one would try: rivals.json

Sets: `web_icons` (ships; 52 % of the labels wrong, most of those off-topic), `fashion_web` (shop titles; 26 % wrong) and
`cifar10n` (human label noise, 40 % wrong, no texts; 3,000 training and 2,000 test pictures). Every arm sees the same pictures,
views, class-balanced draws and number of steps; over features of the frozen, pretrained EfficientNet-Lite0 all arms train the
same linear classifier. `small network` rows train a ResNet-8 from scratch, end to end. Ablations and trained
networks have three seeds.

*vanilla stage* stops after that stage of CAPro, and rows *not fine-tuned* are the classifier before the last stage: both have had
fewer steps. Over frozen features the vanilla stage is plain training: its other losses do not reach the classifier there.

Learning rates: every arm has the best of the same grid (arms that only choose anchors otherwise have that of `capro`, those of
`contralto clean` that of `plain`) by the
accuracy on the *web labels* of a held-out seventh of the training pictures (by group), each weighted by how well its text
fits that label, with seed 100. No clean label is used in training or choosing, but by the ceiling; the test part is looked
at once, at the end.

`clean --probs` and `clean --embeddings` are the list of `contralto clean` from out-of-fold probabilities (those that cleanlab
gets) or the features, and plain training on the labels that it hands back; `--method confident` is by those probabilities,
`--method knn` by the features.

`cleanlab` leaves out what its filter flags; `datalab` also outliers and the later of near-duplicates. Co-teaching is told the
true share of wrong labels, as in its paper. Mixup mixes features: see `benchmarks/rivals.py`.

`pairs` in the JSON are differences between two arms, by the seeds that both have.

Share of the gap = (arm - plain) / (ceiling - plain), mean over classes. Intervals: bootstrap over seeds and groups of test
pictures. Hard classes: at most three quarters (`web_icons`: under half) of the pictures are right. Needs `contralto[bench]`.
"""

import argparse
import json
import os
import resource
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rivals import TRAININGS, datalab, told_to_forget

from contralto.claims.capro import right_share, shared_manifest
from contralto.claims.plan import DEVELOPMENT_SEED
from contralto.data.ingest import ingest
from contralto.data.manifest import Manifest
from contralto.data.text import names_in_texts
from contralto.evaluation.classification import accuracy_interval, calibration_error, per_class_accuracy
from contralto.evaluation.noise import noise_metrics
from contralto.files import write_atomically
from contralto.pipelines.capro import CAProJob
from contralto.pipelines.cleaning import clean_with_model
from contralto.pipelines.job import load_preset
from contralto.pipelines.outputs import environment
from contralto.prototypes.correction import flagged
from contralto.systems.webly.base import scale_rule

PAPER = {"reconcile": False, "text_weight": 0.0, "keep_threshold": None}
RULE = {"reconcile": False}
# Arms that train the classifier alone, and what they learn from.
SIMPLE = (
    "plain", "clean labels (ceiling)", "cleanlab", "label smoothing", "name in text", "clean --probs", "clean --embeddings",
    "plain on reconciled",
)  # fmt: skip
# What else one would try; `--rivals` runs them beside the first three of the simple arms and the job.
RIVALS = ("datalab", "clean --method confident", "clean --method knn", *TRAININGS)
# Arms that run the job: changes to the `small` preset, and the stage that is tested.
JOBS = {
    "random anchors": PAPER | {"anchors": -1},
    "capro, no enhancement": PAPER | {"enhance": False},
    "capro, match rerank": PAPER | {"match": "rerank"},
    "capro, match cosine": PAPER | {"match": "cosine"},
    "capro": PAPER,
    "capro+text": RULE,
    "capro+reconcile": {},
}
# Arms with fewer seeds, and whose learning rate they have.
ABLATIONS = {
    "vanilla stage": "capro",
    "random anchors": "capro",
    "capro, no enhancement": "capro",
    "capro, match rerank": "capro",
    "capro, match cosine": "capro",
    "clean --probs": "plain",
    "clean --embeddings": "plain",
}
FEW_SEEDS = 3
PAIRS = (
    *[("capro", a) for a in ("random anchors", "capro, no enhancement", "capro, match rerank", "capro, match cosine")],
    ("capro+reconcile", "plain on reconciled"), ("capro+reconcile", "clean --probs"), ("capro+reconcile", "clean --embeddings"),
    ("clean --probs", "cleanlab"), ("clean --embeddings", "cleanlab"),
    *[("capro+reconcile", a) for a in RIVALS], *[("cleanlab", a) for a in RIVALS],
)  # fmt: skip
UNTUNED = ("capro", "capro+reconcile")  # the classifier before fine-tuning has a row too
GRID = (0.001, 0.003)
RATES = ("plain_lr", "vanilla_lr", "lr", "finetune_lr")
SMALL_NETWORK = {
    "image_encoder": "resnet8", "pretrained": False, "image_size": 24, "frozen_features": False, "frozen_encoder_epoch": 1,
    "vanilla_epochs": 4, "epochs": 10, "finetune_epochs": 2, "workers": 0,
}  # fmt: skip
FULL_NETWORK = {"frozen_features": False, "frozen_encoder_epoch": 1, "workers": 4, "feature_views": 1}
NETWORK_ARMS = ("plain", "clean labels (ceiling)", "capro", "capro+reconcile")
NETWORK_RATE = {"small network": 0.03, "fine-tuned": 0.003}
NEEDS_TEXT = (
    "name in text",
    "plain on reconciled",
    "capro+text",
    "capro+reconcile",
    "capro, match rerank",
    "capro, match cosine",
)
NEEDS_TEXT += ("capro, no enhancement",)


class Arm(CAProJob):
    """The job with other rows, labels or soft labels for its classifier."""

    rows = relabelled = soft = None

    def _loader(self, encoder, stage, rows, labels):
        return super()._loader(
            encoder, stage, self.rows if rows is None else rows, self.relabelled if labels is None else labels
        )

    def _fields(self, stage, rows=None, labels=None):
        import torch

        fields = super()._fields(stage, rows, labels)
        if self.soft is not None and stage == "plain":
            fields["target"] = torch.from_numpy(self.soft[rows])
        return fields


def manifest_of(name: str, work: Path, *, development: bool) -> Path:
    """The manifest of a set, made once."""
    if name != "cifar10n":
        return shared_manifest(name, work, development=development)
    folder = work / name / ("manifest-development" if development else "manifest")
    if (folder / "manifest.parquet").exists():
        return folder
    source = Path(os.environ["CONTRALTO_DATA"]) / "cifar10n"
    train, test = pq.read_table(source / "train.parquet"), pq.read_table(source / "test.parquet")
    rng = np.random.default_rng(0)
    train, test = (
        train.take(np.sort(rng.permutation(len(train))[:3000])),
        test.take(np.sort(rng.permutation(len(test))[:2000])),
    )
    names = dict(zip(train["label"].to_pylist(), train["class_name"].to_pylist(), strict=True))
    held = rng.random(len(train)) < 1 / 7
    rows = [
        {"image": r["image"], "query": names[r["noisy_worst"]], "label": r["class_name"],
         "split": "test" if development and h else "train"} for r, h in zip(train.to_pylist(), held, strict=True)
    ]  # fmt: skip
    if not development:
        rows += [
            {"image": r["image"], "query": None, "label": r["class_name"], "split": "test"} for r in test.to_pylist()
        ]
    path = work / name / f"{folder.name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    ingest(str(path), blank_share=None).save(folder)
    return folder


def run_arm(name: str, network: str, arm: str, rate: float, seed: int, work: Path, device: str) -> dict:
    """Train one arm with one seed and say what it predicts; done before = read."""
    development = seed == DEVELOPMENT_SEED
    done = work / name / "found" / network / f"{arm}-{rate}-{seed}.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    started = time.perf_counter()
    shared = manifest_of(name, work, development=development)
    folder = work / name / "runs" / f"{network}-{arm}-{rate}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(shared, folder / "manifest")
    settings = {"small network": SMALL_NETWORK, "fine-tuned": FULL_NETWORK}.get(network, {})
    arguments = (
        load_preset("small") | settings | JOBS.get(arm, {}) | {"seed": seed, "cache": str(shared.parent / "features")}
    )
    arguments |= dict.fromkeys(RATES, rate) | {"accelerator": device}
    job = Arm(str(shared), folder, arguments, progress=False)
    job.ingest()
    anchors = scale_rule(len(job.labels), job.num_classes)["anchors"]
    job.arguments["anchors"] = -anchors if arguments["anchors"] == -1 else anchors
    clean = job.manifest.column("clean_label")[job.train_rows].astype(np.int64)
    found = {}
    if arm == "vanilla stage":
        job.train("vanilla")
        stage = "vanilla"
    elif arm in SIMPLE or arm in RIVALS:
        prepare(job, arm, clean)
        job.train("plain")
        stage = "plain"
        own = job.predict_rows("plain", job.encoder(), job.train_rows)[np.arange(len(job.labels)), job.labels]
        p_wrong, new, marked = 1 - own, job.labels, own < 0
        if arm in ("cleanlab", "datalab"):
            p_wrong, marked = job.doubt, job.flagged
            new = np.where(marked, -1, job.labels)
        if arm.startswith("clean --"):
            p_wrong, new, marked = job.doubt, job.judged, job.flagged
        if arm == "plain on reconciled":
            p_wrong = 1 - job.reconciled.posterior[np.arange(len(job.labels)), job.labels]
            marked, new = p_wrong > 0.5, np.where(p_wrong > 0.5, job.reconciled.posterior.argmax(1), job.labels)
    else:
        job.train("vanilla")
        job.match()
        job.train("capro")
        table = job.clean()
        found["not fine-tuned"] = answers(job.predict_rows("capro", job.encoder(), job.test_rows))
        job.train("finetune")
        stage = "finetune"
        p_wrong, new = table.column("p_wrong").to_numpy(), job.new_labels
        marked = flagged(table.column("verdict").to_pylist())
        found["anchors"] = float((job.labels == clean)[job.anchors].mean())
    if stage != "vanilla":
        found["list"] = noise_metrics(job.labels, clean, new, marked, p_wrong)
    probability = job.predict_rows(stage, job.encoder(), job.test_rows)
    found |= answers(probability)
    if development:
        found["choice"] = choose_score(job, probability)
    shutil.rmtree(folder)
    found["seconds"] = round(time.perf_counter() - started, 1)
    found["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    done.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(done, lambda path: path.write_text(json.dumps(found), encoding="utf-8"))
    print(f"{name}, {network}: {arm}, rate {rate}, seed {seed}: {found['seconds']:.0f} s", flush=True)
    return found


def answers(probability: np.ndarray) -> dict[str, list]:
    return {"predicted": probability.argmax(1).tolist(), "confidence": probability.max(1).round(4).tolist()}


def prepare(job: Arm, arm: str, clean: np.ndarray) -> None:
    """What an arm of plain training learns from."""
    every = np.arange(len(job.labels))
    if arm == "clean labels (ceiling)":
        job.rows = np.flatnonzero(clean >= 0)
        job.relabelled = np.maximum(clean, 0)
    elif arm == "cleanlab":
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_self_confidence_for_each_label

        unseen = unseen_probabilities(job)
        job.flagged = find_label_issues(job.labels, unseen, n_jobs=1)
        job.doubt = 1 - get_self_confidence_for_each_label(job.labels, unseen)
        job.rows = np.flatnonzero(~job.flagged)
    elif arm == "label smoothing":
        job.soft = np.full((len(every), job.num_classes), 0.1 / job.num_classes, np.float32)
        job.soft[every, job.labels] += 0.9
    elif arm == "name in text":
        texts = job.manifest.texts
        names = names_in_texts([texts[i] for i in job.train_rows], job.manifest.class_names)
        keep = names[every, job.labels]
        none_left = np.bincount(job.labels[keep], minlength=job.num_classes) == 0
        job.rows = np.flatnonzero(keep | none_left[job.labels])
    elif arm == "datalab":
        job.doubt, job.flagged, copies = datalab(job.labels, unseen_probabilities(job), eval_features(job))
        job.rows = np.flatnonzero(~job.flagged & ~copies)
    elif arm in TRAININGS:
        job.system = told_to_forget(float((job.labels != clean).mean())) if arm == "co-teaching" else TRAININGS[arm]
    elif arm.startswith("clean --"):
        probs = unseen_probabilities(job) if arm in ("clean --probs", "clean --method confident") else None
        embeddings = eval_features(job) if arm in ("clean --embeddings", "clean --method knn") else None
        method = arm.removeprefix("clean --method ") if "method" in arm else "witnesses"
        table = clean_list(job, probs=probs, embeddings=embeddings, method=method)
        index = {name: c for c, name in enumerate(job.manifest.class_names)} | {"": -1}
        job.judged = np.array([index[name] for name in table.column("new").to_pylist()])
        job.doubt = table.column("p_wrong").to_numpy()
        job.flagged = flagged(table.column("verdict").to_pylist())
        job.rows, job.relabelled = np.flatnonzero(job.judged >= 0), np.maximum(job.judged, 0)
    elif arm == "plain on reconciled":
        job.modules["vanilla"] = None
        job.match()
        job._is_reconciled = lambda stage: stage == "plain"  # its draws too


def eval_features(job: Arm) -> np.ndarray:
    encoder = job.encoder()
    return job.features(encoder, job.train_rows, job._views(encoder)[0], 0, "").astype(np.float32)


def components(job: Arm) -> np.ndarray:
    """Principal components of the features, scaled to unit spread over all of them."""
    from sklearn.decomposition import PCA

    x = PCA(256, random_state=0).fit_transform(eval_features(job))
    return x / x.std()


def unseen_probabilities(job: Arm) -> np.ndarray:
    """Of a logistic regression that learnt the web labels of the other folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict

    classifier = LogisticRegression(C=0.01, max_iter=200, class_weight="balanced")
    return cross_val_predict(classifier, components(job), job.labels, cv=5, method="predict_proba")


def clean_list(job: Arm, **given) -> pa.Table:
    """The list of `contralto clean` for the training pictures, from a table that holds no clean labels."""
    names, texts = job.manifest.class_names, job.manifest.texts
    rows = [
        {"image": job.read_bytes(int(i)), "query": names[label], "text": texts[i]}
        for i, label in zip(job.train_rows, job.labels, strict=True)
    ]
    path, seed = job.out / "web.parquet", job.arguments["seed"]
    pq.write_table(pa.Table.from_pylist(rows), path)
    definitions = job.out / "manifest" / "classes.json"
    table = clean_with_model(
        path,
        job.out / "list",
        definitions=definitions,
        blank_share=None,
        min_side=1,
        seed=seed,
        progress=False,
        **given,
    )
    assert table.column("given").to_pylist() == [names[label] for label in job.labels]
    return table


def choose_score(job: Arm, probability: np.ndarray) -> float:
    """Accuracy on the web labels of held-out pictures, weighted by how well each text fits its label; mean over classes."""
    from contralto.data.definitions import class_text
    from contralto.encoders.text import text_encoder
    from contralto.neighbors.matching import match_texts

    labels = job.manifest.labels[job.test_rows]
    encoder = text_encoder("minilm")
    every = job.manifest.texts
    texts = [every[i] for i in job.test_rows]
    if any(t.strip() for t in texts):
        classes = encoder.encode([class_text(c, "name+definition") for c in job.manifest.classes])
        match = match_texts(encoder.encode(texts), classes, labels, method="discriminative")
        weight = match.probability[np.arange(len(labels)), labels]
    else:
        weight = np.ones(len(labels))
    right = (probability.argmax(1) == labels) * weight
    classes = [right[labels == c].sum() / weight[labels == c].sum() for c in np.unique(labels)]
    return float(np.mean(classes))


def compare(right: dict, pairs: list, labels: np.ndarray, groups: np.ndarray) -> list[dict]:
    """Differences between arms (S, N) that were trained in pairs, with 95 % intervals over seeds and groups, and verdicts."""
    comparisons = []
    for method, baseline in pairs:
        difference = right[method] - right[baseline]
        entry = {"method": method, "baseline": baseline}
        for key, macro in (("accuracy", False), ("macro", True)):
            entry[key] = accuracy_interval(difference, labels, groups=groups, macro=macro)._asdict()
        low, high = entry["macro"]["low"], entry["macro"]["high"]
        entry["verdict"] = "reproduced" if low > 0 else "not reproduced" if high < 0 else "inconclusive"
        comparisons.append(entry)
    return comparisons


def hard_classes(name: str, manifest: Manifest) -> np.ndarray:
    share = right_share(manifest)
    return share < 0.5 if name == "web_icons" else np.round(100 * share) <= 75


def summarise(name: str, network: str, arms: dict, rates: dict, work: Path) -> dict:
    """Means, intervals and shares of the gap of all arms of one set."""
    manifest = Manifest.load(manifest_of(name, work, development=False))
    rows = np.flatnonzero((manifest.column("split") == "test") & (manifest.column("clean_label") >= 0))
    labels, groups = manifest.column("clean_label")[rows].astype(int), manifest.column("group")[rows]
    hard = hard_classes(name, manifest)
    right = {arm: np.array([np.array(f["predicted"]) == labels for f in found], float) for arm, found in arms.items()}

    def paired(arm):
        return right[arm] - right["plain"][: len(right[arm])]

    def macro(x):
        return accuracy_interval(x, labels, groups=groups, macro=True)

    gap = macro(right["clean labels (ceiling)"]).value - macro(right["plain"]).value
    out = {}
    for arm, found in arms.items():
        on_hard = hard[labels]
        against = macro(paired(arm))
        row = {
            "seeds": len(found),
            "rate": rates[arm],
            "accuracy": right[arm].mean(),
            "macro": macro(right[arm]).value,
            "macro_by_seed": [
                float(np.nanmean(per_class_accuracy(labels, np.array(f["predicted"]), len(hard)))) for f in found
            ],
            "against_plain": against._asdict(),
            "share_of_gap": {k: v / gap for k, v in against._asdict().items()},
            "calibration_error": float(
                np.mean(
                    [calibration_error(r, np.array(f["confidence"])) for r, f in zip(right[arm], found, strict=True)]
                )
            ),
            "seconds": float(np.median([f["seconds"] for f in found])),
            "peak_gib": max(f["peak_gib"] for f in found),
        }
        if hard.any():
            h = right[arm][:, on_hard], labels[on_hard], groups[on_hard]
            d = paired(arm)[:, on_hard]
            row["macro_hard"] = accuracy_interval(h[0], h[1], groups=h[2], macro=True).value
            row["hard_against_plain"] = accuracy_interval(d, h[1], groups=h[2], macro=True)._asdict()
        for key in ("average_precision", "precision", "recall", "corrected_accuracy", "calibration_error"):
            values = [f["list"][key] for f in found if f.get("list")]
            row[f"list_{key}"] = float(np.mean(values)) if values and np.isfinite(values).all() else None
        if "anchors" in found[0]:
            row["anchor_precision"] = float(np.mean([f["anchors"] for f in found]))
        out[arm] = row
    pairs = []
    for pair in PAIRS:
        if all(arm in right for arm in pair):
            seeds = min(len(right[arm]) for arm in pair)
            both = {arm: right[arm][:seeds] for arm in pair}
            pairs.append(compare(both, [pair], labels, groups)[0] | {"seeds": seeds})
    named = [n for n, h in zip(manifest.class_names, hard, strict=True) if h]
    return {
        "network": network, "test_images": len(labels), "hard": named, "gap": gap, "arms": out, "pairs": pairs,
        "environment": environment("cleanlab"),
    }  # fmt: skip


def arms_of(name: str, network: str, rivals: bool) -> list[str]:
    if rivals:
        return [*SIMPLE[:3], *RIVALS, "capro" if name == "cifar10n" else "capro+reconcile"]
    arms = [*SIMPLE, "vanilla stage", *JOBS] if network == "frozen features" else list(NETWORK_ARMS)
    return [a for a in arms if name != "cifar10n" or a not in NEEDS_TEXT]


def one(task: tuple) -> dict:
    import torch

    torch.set_num_threads(1)
    return run_arm(*task)


def markdown(results: dict) -> str:
    """The table of the docs."""
    lines = []
    for key, result in results.items():
        lines += [
            f"**{key}**",
            "",
            "| training | mean over classes, % | share of the gap, % | hard classes, % | list: average precision | "
            "corrections right, % | seconds |",
            "|---|---|---|---|---|---|---|",
        ]
        for arm, r in result["arms"].items():
            g = r["share_of_gap"]
            share = "" if arm == "plain" else f"{100 * g['value']:.0f} [{100 * g['low']:.0f}, {100 * g['high']:.0f}]"
            told = [r.get("macro_hard"), r["list_average_precision"], r["list_corrected_accuracy"]]
            hard, ap, right = ("" if x is None else x for x in told)
            hard, right = (f"{100 * x:.1f}" if x != "" else "" for x in (hard, right))
            ap = f"{ap:.2f}" if ap != "" else ""
            lines.append(f"| {arm} | {100 * r['macro']:.1f} | {share} | {hard} | {ap} | {right} | {r['seconds']:.0f} |")
        lines.append("")
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(5.2 * len(results), 5), squeeze=False)
    for axis, (key, result) in zip(axes[0], results.items(), strict=True):
        arms = [a for a in result["arms"] if a != "plain"][::-1]
        for y, arm in enumerate(arms):
            g = {k: 100 * v for k, v in result["arms"][arm]["share_of_gap"].items()}
            colour = "#c0392b" if "reconcile" in arm else "#7f8c8d" if "ceiling" in arm else "#2c3e50"
            axis.plot([g["low"], g["high"]], [y, y], color=colour, lw=2)
            axis.plot(g["value"], y, "o", color=colour)
        axis.axvline(0, color="0.6", lw=1)
        axis.axvline(100, color="0.6", lw=1, ls=":")
        axis.set_yticks(range(len(arms)), arms)
        axis.set_title(key, fontsize=10)
        axis.set_xlabel("share of the gap, %")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    write_atomically(path, lambda p: figure.savefig(p, dpi=110, format="png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--work", type=Path, default=Path("runs/webly"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data", nargs="+", default=["web_icons", "fashion_web", "cifar10n"])
    parser.add_argument("--full", action="store_true", help="fine-tune the pretrained encoder as well")
    parser.add_argument("--rivals", action="store_true", help="what else one would try, over frozen features")
    parser.add_argument("--networks", nargs="+", default=["frozen features", "small network"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=2)
    a = parser.parse_args()
    if a.rivals:
        a.networks, a.full = ["frozen features"], False
    networks = [*a.networks, *(["fine-tuned"] if a.full else [])]
    kept = a.out / ("rivals.json" if a.rivals else "webly.json")
    results = json.loads(kept.read_text(encoding="utf-8"))["results"] if kept.exists() else {}  # of other sets
    with ProcessPoolExecutor(a.processes) as pool:
        pairs = [(n, k) for k in networks for n in a.data if k != "small network" or n == "web_icons"]
        frozen = [p for p in pairs if p[1] == "frozen features"]
        # The ablations come when the main arms are written already, trained networks last.
        passes = (
            [(p, False) for p in frozen]
            + [(p, True) for p in frozen if not a.rivals]
            + [(p, False) for p in pairs if p not in frozen]
        )
        for (name, network), ablations in passes:
            for development in (True, False) if network == "frozen features" else (False,):
                manifest_of(name, a.work, development=development)
            arms, rates = [x for x in arms_of(name, network, a.rivals) if ablations or x not in ABLATIONS], {}
            if network == "frozen features":
                # First one run each that computes the features which all others read.
                seeds = (DEVELOPMENT_SEED, 0)
                list(pool.map(one, [(name, network, "capro", GRID[0], s, a.work, a.device) for s in seeds]))
                grid = [(arm, rate) for arm in arms if arm not in ABLATIONS for rate in GRID]
                tasks = [(name, network, arm, rate, DEVELOPMENT_SEED, a.work, a.device) for arm, rate in grid]
                score = {pair: f["choice"] for pair, f in zip(grid, pool.map(one, tasks), strict=True)}
                rates = {arm: max(GRID, key=lambda r, arm=arm: score[arm, r]) for arm in arms if arm not in ABLATIONS}
                rates |= {arm: rates[ABLATIONS[arm]] for arm in arms if arm in ABLATIONS}
            else:
                rates = dict.fromkeys(arms, NETWORK_RATE[network])
            tasks = [
                (name, network, arm, rates[arm], seed, a.work, a.device)
                for seed in range(a.seeds)
                for arm in arms
                if seed < FEW_SEEDS or (arm not in ABLATIONS and network == "frozen features")
            ]
            found = list(pool.map(one, tasks))
            by_arm = {}
            for arm in arms:
                by_arm[arm] = [f for f, t in zip(found, tasks, strict=True) if t[2] == arm]
                if arm in UNTUNED:
                    row = f"{arm}, not fine-tuned"
                    by_arm[row], rates[row] = [f | f["not fine-tuned"] for f in by_arm[arm]], rates[arm]
            results[f"{name}, {network}"] = summarise(name, network, by_arm, rates, a.work)
            told = {
                "command": "python benchmarks/webly.py" + (" --full" if a.full else " --rivals" if a.rivals else ""),
                "grid": GRID, "choice": "web labels of held-out training pictures weighted by text, seed 100",
                "results": results,
            }  # fmt: skip
            text = json.dumps(told, indent=1, default=float) + "\n"
            a.out.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, lambda path, text=text: path.write_text(text, encoding="utf-8"))
            draw(results, kept.with_suffix(".png"))
    print(markdown(results))


if __name__ == "__main__":
    main()
