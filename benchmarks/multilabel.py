"""Several labels per picture: multi-label CAPro beside what else one would do with tags, on titles of a real shop.

    CONTRALTO_DATA=... python benchmarks/multilabel.py           # about half an hour on two cores; goes on where it stopped

The pictures are those of `fashion_web`: 4,000 of its training part, drawn once, and its test part. Classes are the article types,
colours, genders, seasons and uses of the catalogue that at least 20 test pictures have and that at least 20 of the 4,000 titles
name (`classes` in the JSON; `left_out` says which values are too rare). A web label says that a word of the class stands in the
title (`contralto.data.tags`); nothing else of the data is learnt from. The catalogue's attributes are the clean labels, for
evaluation and for the ceiling.

Every arm trains the same linear classifier over the same features of the frozen, pretrained EfficientNet-Lite0, on the same views
and with the same number of steps:

plain               binary cross-entropy on the web labels
clean labels        the same on the catalogue's (ceiling)
weighted BCE        positives weighted by (N - n) / n
CAPro's weights     plain training with the weights that CAPro has: positives by sqrt((N - n) / n), pictures by class frequency
label smoothing     0.1
asymmetric loss     ASL (Ridnik et al. 2021), made for missing labels, by timm with its defaults
k-NN vote           a picture's labels are the mean over itself and its ten nearest by the frozen features
cleanlab            entries that cleanlab flags, class by class, from out-of-fold probabilities are turned round
plain --specific    the most specific name counts: "navy blue" names no blue, a sports shoe is no other shoe
CAPro, the paper's  the job with the paper's matching, its mean over the classes, and pictures weighted by class frequency
CAPro               the `small` preset
CAPro --specific    the same, on the web labels of *plain --specific*

*not fine-tuned* is the classifier before the last stage, which has had fewer steps.

Learning rates: every arm has the best of the same grid, which grows where the best stands at its end, by the mean average
precision on the *web* labels of a held-out seventh of the training pictures, with seed 100 (*--specific*: that of the arm
without it). No clean label is used in training or choosing; the test part is looked at once, at the end.

mAP is the mean over classes; C-F1 and O-F1 are those of the three surest classes (`contralto.evaluation.multilabel`), where a
picture has four. Share of the gap = (arm - plain) / (ceiling - plain) by mAP, with 95 % bootstrap intervals over seeds and test
pictures. *wrong* and *missing*: average precision of the list of web labels that are wrong among those given, and of those that
are missing among the others. Seconds are of one core's work, without the features that all arms share.
Needs `contralto[bench,pretrained]`.
"""

import argparse
import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from webly import components, draw, eval_features

from contralto.claims.capro import held_out, with_split
from contralto.claims.plan import DEVELOPMENT_SEED
from contralto.data.definitions import load_definitions
from contralto.data.ingest import ingest
from contralto.data.manifest import ClassInfo, Manifest
from contralto.data.tags import tag_labels
from contralto.encoders.features import cached_array
from contralto.evaluation.multilabel import average_precisions, entry_metrics, map_interval, multilabel_metrics
from contralto.files import save_array, write_atomically
from contralto.neighbors.knn import knn
from contralto.pipelines.capro_multilabel import CAProMultiLabelJob
from contralto.pipelines.job import load_preset
from contralto.pipelines.outputs import environment
from contralto.systems.webly.capro_multilabel import CAProMultiLabel

ATTRIBUTES = {"label": "type", "colour": "colour", "gender": "gender", "season": "season", "usage": "use"}
PICTURES, ENOUGH = 4000, 20
CEILING = "clean labels (ceiling)"
# Arms that train the classifier alone, and arms that run the job: changes to the `small` preset.
SIMPLE = (
    "plain", CEILING, "weighted BCE", "CAPro's weights", "label smoothing", "asymmetric loss", "k-NN vote", "cleanlab",
    "plain --specific",
)  # fmt: skip
JOBS: dict[str, dict[str, Any]] = {
    "CAPro, the paper's": {"sample_weights": "frequency", "match": "rerank", "lambda_class": 1.0},
    "CAPro": {},
    "CAPro --specific": {"specific": True},
}
FOLLOWS = {"plain --specific": "plain", "CAPro --specific": "CAPro"}  # whose learning rate an arm has
GRID = (0.001, 0.003, 0.01)
LOWEST, HIGHEST = 0.0001, 0.1
RATES = ("plain_lr", "vanilla_lr", "lr", "finetune_lr")
SET = "fashion_web, several labels"


class Weighed(CAProMultiLabel):
    """Plain training with weights or a loss of its own."""

    loss = None

    def _binary(self, logits, label):
        return super()._binary(logits, label) if self.loss is None else self.loss(logits, label)


class Arm(CAProMultiLabelJob):
    """The job with other labels, weights or another loss for its plain training."""

    system = Weighed
    relabelled = positive_weight = loss = None

    def _loader(self, encoder, stage, rows, labels):
        return super()._loader(encoder, stage, rows, self.relabelled if labels is None else labels)

    def _complete(self, module):
        super()._complete(module)
        module.loss = self.loss
        if self.positive_weight is not None:
            module.positive_weight.copy_(torch.from_numpy(self.positive_weight))


def candidates() -> tuple[list[ClassInfo], dict[str, str]]:
    """All values of the attributes with their definitions, and which attribute each is of."""
    source = Path(os.environ["CONTRALTO_DATA"]) / "fashion_web"
    types = load_definitions(source / "classes.json")
    others = load_definitions(Path(__file__).with_name("fashion_concepts.yaml"))
    table = pq.read_table(source / "fashion_web.parquet", columns=list(ATTRIBUTES))
    of = {v: name for column, name in ATTRIBUTES.items() for v in table[column].unique().to_pylist() if v is not None}
    return [*types, *others], of


def manifest_of(work: Path, *, development: bool = False) -> Path:
    """The manifest, made once: classes with enough pictures, a part of the training pictures."""
    folder = work / ("manifest-development" if development else "manifest")
    if (folder / "manifest.parquet").exists():
        return folder
    if development:
        held_out(Manifest.load(manifest_of(work))).save(folder)
        return folder
    classes, _ = candidates()
    path = Path(os.environ["CONTRALTO_DATA"]) / "fashion_web" / "fashion_web.parquet"
    how = {"text_column": "text", "clean_column": ",".join(ATTRIBUTES), "multilabel": True}
    every = ingest(
        str(path), classes=classes, blank_share=load_preset("small", "capro-multilabel")["blank_share"], **how
    )
    split = every.column("split").astype(object)
    train = np.flatnonzero(split == "train")
    split[np.random.default_rng(0).permutation(train)[PICTURES:]] = "left out"
    named = tag_labels(every.texts, classes, glued=False)[split == "train"].sum(0)
    there = (every.clean_matrix() == 1)[split == "test"].sum(0)
    enough = np.flatnonzero((named >= ENOUGH) & (there >= ENOUGH))
    number = {int(c): i for i, c in enumerate(enough)}
    sets = [[number[c] for c in found if c in number] for found in every.clean_sets.to_pylist()]
    kept = tuple(classes[c] for c in enough)
    replace(with_split(every, split), classes=kept, clean_sets=pa.array(sets, every.clean_sets.type)).save(folder)
    rare = {classes[c].name: [int(named[c]), int(there[c])] for c in range(len(classes)) if c not in number}
    write_atomically(work / "left_out.json", lambda p: p.write_text(json.dumps(rare), encoding="utf-8"))
    return folder


def run_arm(arm: str, rate: float, seed: int, work: Path) -> dict:
    """Train one arm with one seed and say what it answers; done before = read."""
    folder = work / "found" / f"{arm}-{rate}-{seed}"
    found = found_once(folder, lambda: train_arm(arm, rate, seed, work, folder))
    return found | {"scores": {k: np.load(folder / f"{k}.npy", allow_pickle=False) for k in found["answers"]}}


def found_once(folder: Path, train: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What an arm found: from `found.json` of its folder, or by training it in the emptied folder and keeping it there."""
    done = folder / "found.json"
    if done.exists():
        return dict(json.loads(done.read_text(encoding="utf-8")))
    shutil.rmtree(folder, ignore_errors=True)
    found = train()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(done, lambda path: path.write_text(json.dumps(found), encoding="utf-8"))  # NaN is read back
    return found


def train_arm(arm: str, rate: float, seed: int, work: Path, folder: Path) -> dict:
    started, development = time.process_time(), seed == DEVELOPMENT_SEED
    shared = manifest_of(work, development=development)
    shutil.copytree(shared, folder / "run" / "manifest")
    arguments = load_preset("small", "capro-multilabel") | JOBS.get(arm, {}) | dict.fromkeys(RATES, rate)
    arguments |= {"seed": seed, "cache": str(work / "features"), "glued": False, "accelerator": "cpu"}
    if arm == "CAPro's weights":
        arguments["sample_weights"] = "frequency"
    arguments["specific"] = arm.endswith("--specific")
    job = Arm(str(shared), folder / "run", arguments, progress=False)
    job.ingest()
    clean = (job.manifest.clean_matrix() == 1).astype(np.int64)[job.train_rows]
    rows = np.flatnonzero(job.manifest.column("split") == "test")
    web = tag_labels(job.manifest.texts, job.manifest.classes, glued=False).astype(
        np.int64
    )  # whatever the arm learns from
    found, answers = {}, {}
    if arm in SIMPLE:
        prepare(job, arm, clean)
        job.train("plain")
        stage = "plain"
        there = job.unseen if arm == "cleanlab" else job.predict_rows("plain", job.encoder(), job.train_rows)
    else:
        job.train("vanilla")
        job.match()
        job.train("capro")
        job.clean()
        answers["not fine-tuned"] = job.predict_rows("capro", job.encoder(), rows)
        job.train("finetune")
        stage, there = "finetune", np.where(job.web == 1, 1 - job.p_wrong, job.p_wrong)
        found["anchors"] = float((clean == job.web)[job.entries != 0].mean())
        found["changes"] = changes(job, clean)
    answers["scores"] = job.predict_rows(stage, job.encoder(), rows)
    if development:
        found["choice"] = float(np.nanmean(average_precisions(answers["scores"], web[rows])))
    else:
        given = web[job.train_rows]
        found["list"] = entry_metrics(given, clean, np.where(given == 1, 1 - there, there))
    shutil.rmtree(folder / "run")
    for name, scores in answers.items():
        save_array(scores.astype(np.float32), folder / f"{name}.npy")
    found |= {"answers": list(answers), "seconds": round(time.process_time() - started, 1)}
    found["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    print(f"{arm}, rate {rate}, seed {seed}: {found['seconds']:.0f} s", flush=True)
    return found


def changes(job: Arm, clean: npt.NDArray[np.int64]) -> dict[str, float]:
    """How many labels were added and removed, and the share of both that is right."""
    out = {}
    for name, right in (("added", clean == 1), ("removed", clean == 0)):
        changed = job.changes[name]
        out |= {name: int(changed.sum()), f"{name}_right": float(right[changed].mean()) if changed.any() else None}
    return out


def prepare(job: Arm, arm: str, clean: npt.NDArray[np.int64]) -> None:
    """What an arm of plain training learns from, and by which loss."""
    if arm != "CAPro's weights":
        job.positive_weight = np.ones(job.num_classes, np.float32)
    if arm == CEILING:
        job.relabelled = clean
    elif arm == "weighted BCE":
        count = job.web.sum(0).clip(1)
        job.positive_weight = ((len(job.web) - count) / count).astype(np.float32)
    elif arm == "label smoothing":
        job.relabelled = (0.9 * job.web + 0.05).astype(np.float32)
    elif arm == "asymmetric loss":
        from timm.loss import AsymmetricLossMultiLabel

        job.loss = AsymmetricLossMultiLabel(reduction="none").forward  # no module of the network
    elif arm == "k-NN vote":
        _, nearest = knn(eval_features(job), 11)
        job.relabelled = job.web[nearest].mean(1).astype(np.float32)
    elif arm == "cleanlab":
        from cleanlab.filter import find_label_issues

        job.unseen, flagged = unseen_probabilities(job), np.zeros(job.web.shape, bool)
        for c in range(job.num_classes):
            both = np.stack([1 - job.unseen[:, c], job.unseen[:, c]], 1)
            flagged[:, c] = find_label_issues(job.web[:, c], both, n_jobs=1)
        job.relabelled = np.where(flagged, 1 - job.web, job.web)


def unseen_probabilities(job: Arm) -> npt.NDArray[np.float64]:
    """Of a logistic regression per class that learnt the web labels of the other folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict

    x = components(job)
    classifier = LogisticRegression(C=0.01, max_iter=200)

    def compute():
        each = [cross_val_predict(classifier, x, y, cv=5, method="predict_proba")[:, 1] for y in job.web.T]
        return np.stack(each, 1)

    return cached_array(job.cache, "unseen", {"data": job.manifest.fingerprint()}, compute)


def choose_rates(arms: list[str], pool: ProcessPoolExecutor, work: Path) -> dict[str, dict[float, float]]:
    """Scores of the rates of every arm on held-out web labels: three, and more while the best is the lowest or the highest."""
    score: dict[str, dict[float, float]] = {arm: {} for arm in arms}
    waiting = [(arm, rate) for arm in arms for rate in GRID]
    while waiting:
        tried = pool.map(run_arm, *zip(*((*w, DEVELOPMENT_SEED, work) for w in waiting), strict=True))
        for (arm, rate), found in zip(waiting, tried, strict=True):
            score[arm][rate] = found["choice"]
        best = {arm: max(tried, key=tried.get) for arm, tried in score.items()}
        more = [
            (arm, float(f"{best[arm] * f:.0e}"))
            for arm in arms
            for f, end in ((1 / 3, min), (3, max))
            if best[arm] == end(score[arm])
        ]
        waiting = [(arm, rate) for arm, rate in more if rate not in score[arm] and LOWEST <= rate <= HIGHEST]
    return {arm: dict(sorted(tried.items())) for arm, tried in score.items()}


def summarise(found: dict[str, list[dict]], rates: dict[str, float], work: Path) -> dict:
    """Means, intervals and shares of the gap of all arms."""
    manifest = Manifest.load(manifest_of(work))
    rows = np.flatnonzero(manifest.column("split") == "test")
    truth = manifest.clean_matrix()[rows] == 1
    train = manifest.column("split") == "train"
    web, clean = tag_labels(manifest.texts, manifest.classes, glued=False)[train], manifest.clean_matrix()[train] == 1
    of = candidates()[1]
    attribute = np.array([of[name] for name in manifest.class_names])
    scores = {arm: np.stack([f["scores"]["scores"] for f in runs]) for arm, runs in found.items()}
    gap = map_interval(scores[CEILING], truth, against=scores["plain"], resamples=1).value
    arms = {}
    for arm, runs in found.items():
        metrics = [multilabel_metrics(p, truth) for p in scores[arm]]
        by_class = np.mean([average_precisions(p, truth) for p in scores[arm]], 0)
        against = map_interval(scores[arm], truth, against=scores["plain"])._asdict()
        arms[arm] = {
            "seeds": len(runs), "rate": rates[arm], "map_by_seed": [m["map_macro"] for m in metrics],
            **{k: float(np.mean([m[k] for m in metrics])) for k in ("map_macro", "map_micro", "class_f1", "overall_f1")},
            "map_by_attribute": {a: float(by_class[attribute == a].mean()) for a in dict.fromkeys(attribute)},
            "against_plain": against, "share_of_gap": {k: v / gap for k, v in against.items()},
            **{f"list_{k}": float(np.mean([r["list"][k] for r in runs])) for k in runs[0]["list"]},
            **{k: [r[k] for r in runs] for k in ("anchors", "changes") if k in runs[0]},
            "seconds": float(np.median([r["seconds"] for r in runs])), "peak_gib": max(r["peak_gib"] for r in runs),
        }  # fmt: skip
    classes = {
        name: {
            "attribute": of[name], "named": int(web[:, c].sum()), "there": int(clean[:, c].sum()),
            "right": float(clean[web[:, c], c].mean()), "found": float(web[clean[:, c], c].mean()),
            "test": int(truth[:, c].sum()),
        }
        for c, name in enumerate(manifest.class_names)
    }  # fmt: skip
    left_out = json.loads((work / "left_out.json").read_text(encoding="utf-8"))
    return {
        "network": "frozen features", "train_images": int((web.any(1)).sum()), "test_images": len(rows),
        "labels_per_picture": {"web": float(web.sum(1).mean()), "catalogue": float(clean.sum(1).mean())},
        "classes": classes, "left_out": left_out, "gap": gap, "arms": arms, "environment": environment(),
    }  # fmt: skip


def markdown(result: dict) -> str:
    """The table of the docs."""
    lines = [
        "| training | mAP, % | share of the gap, % | C-F1, % | O-F1, % | wrong | missing | CPU seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, r in result["arms"].items():
        g = r["share_of_gap"]
        share = "" if arm == "plain" else f"{100 * g['value']:.0f} [{100 * g['low']:.0f}, {100 * g['high']:.0f}]"
        lists = f"{r['list_wrong_average_precision']:.2f} | {r['list_missing_average_precision']:.2f}"
        shown = f"{100 * r['map_macro']:.1f} | {share} | {100 * r['class_f1']:.1f} | {100 * r['overall_f1']:.1f}"
        lines.append(f"| {arm} | {shown} | {lists} | {r['seconds']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--work", type=Path, default=Path("runs/multilabel"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    a = parser.parse_args()
    arms = [*SIMPLE, *JOBS]
    for development in (False, True):
        manifest_of(a.work, development=development)
    with ProcessPoolExecutor(a.processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        # First one run each that computes the features which all others read.
        list(pool.map(run_arm, ["CAPro"] * 2, [GRID[0]] * 2, [DEVELOPMENT_SEED, 0], [a.work] * 2))
        score = choose_rates([arm for arm in arms if arm not in FOLLOWS], pool, a.work)
        rates = {arm: max(tried, key=tried.get) for arm, tried in score.items()}
        rates |= {arm: rates[other] for arm, other in FOLLOWS.items()}
        tasks = [(arm, rates[arm], seed, a.work) for seed in range(a.seeds) for arm in arms]
        done = list(pool.map(run_arm, *zip(*tasks, strict=True)))
    found: dict[str, list[dict]] = {}
    for arm in arms:
        found[arm] = [f for f, t in zip(done, tasks, strict=True) if t[0] == arm]
        if arm in JOBS:
            row = f"{arm}, not fine-tuned"
            found[row], rates[row] = (
                [f | {"scores": {"scores": f["scores"]["not fine-tuned"]}} for f in found[arm]],
                rates[arm],
            )
    result = summarise(found, rates, a.work)
    told = {
        "command": "python benchmarks/multilabel.py",
        "choice": "mean average precision on the web labels of held-out training pictures, seed 100",
        "tried": score, "results": {SET: result},
    }  # fmt: skip
    text = json.dumps(told, indent=1, default=float) + "\n"
    a.out.mkdir(parents=True, exist_ok=True)
    write_atomically(a.out / "multilabel.json", lambda path: path.write_text(text, encoding="utf-8"))
    draw({SET: result}, a.out / "multilabel.png")
    print(markdown(result))


if __name__ == "__main__":
    main()
