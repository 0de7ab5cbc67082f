"""Photographs of classes without a label, by words or by attributes of the classes: TMV-HLP beside what looks at one at a time.

    python benchmarks/attributes.py [out.json] [--seeds 0 1 2 3 4]

A seed draws 15 classes of Tiny ImageNet to find, 40 pictures each, and 40 other classes with 15 labelled pictures each, on which
meaning is learnt. Attributes are the terms above a class in WordNet that at least two of the 55 classes share. Needs
CONTRALTO_DATA and `contralto[pretrained]`; a minute for every draw.
"""

import argparse
import csv
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from contralto.files import write_json
from contralto.pipelines.job import load_preset
from contralto.pipelines.outputs import environment
from contralto.pipelines.transductive import Transductive


def draw(seed: int, source: Path, folder: Path) -> None:
    """Write `pictures.parquet`, `attributes.csv` and `classes.json` of one draw."""
    classes = {c["label"]: c for c in json.loads((source / "classes.json").read_text(encoding="utf-8"))}
    table = pq.read_table(source / "tiny_imagenet100.parquet", columns=["image", "label", "split"])
    table = table.filter(np.array(table["split"].to_pylist()) == "train")
    label, rng = table["label"].to_numpy(), np.random.default_rng([seed, 7])
    order = rng.permutation(len(classes))
    asked, others = order[:15], order[15:55]
    rows: list[int] = []
    for part, n in ((asked, 40), (others, 15)):
        for c in part:
            rows += rng.choice(np.flatnonzero(label == c), n, replace=False).tolist()
    names = [classes[label[r]]["name"] for r in rows]
    split = ["test"] * (40 * len(asked)) + ["train"] * (15 * len(others))
    pictures = pa.table({"image": table["image"].take(rows), "label": names, "split": split})
    pq.write_table(pictures, folder / "pictures.parquet")
    used = [classes[int(c)] for c in (*asked, *others)]
    above = [{*c["hypernyms"], *c["synonyms"]} for c in used]
    columns = [t for t in sorted(set().union(*above)) if 2 <= sum(t in a for a in above) < len(used)]
    with (folder / "attributes.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", *columns])
        writer.writerows([c["name"], *(int(t in a) for t in columns)] for c, a in zip(used, above, strict=True))
    told = {classes[int(c)]["name"]: {"definition": classes[int(c)]["definition"]} for c in asked}
    (folder / "classes.json").write_text(json.dumps(told), encoding="utf-8")


def measure(seed: int, source: Path) -> dict[str, float]:
    """Accuracy of every way on one draw."""
    scores: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(seed, source, folder)
        attributes = {"attributes": str(folder / "attributes.csv")}
        words = {"definitions": str(folder / "classes.json"), "class_text": "name+definition"}
        ways: dict[str, dict[str, Any]] = {"attributes": attributes, "words": words, "both": attributes | words}
        for way, arguments in ways.items():
            job = Transductive("tmv_hlp")
            job.fit(
                str(folder / "pictures.parquet"), folder / way, views=["efficientnet-lite0", "gradients"], image_size=128,
                shots=0, progress=False, **arguments, **load_preset("small", "tmv_hlp"),
            )  # fmt: skip
            scores |= {k: round(float((v == job.truth).mean()), 4) for k, v in job.baselines.items()}
            scores[f"TMV-HLP, {way}"] = round(float((job.found == job.truth).mean()), 4)
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", nargs="?", default="results/attributes.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    given = parser.parse_args()
    # Without the variable, definitions of the other classes are those of ImageNet, which are right; those of WordNet are of the
    # first sense.
    source, found = Path(os.environ.pop("CONTRALTO_DATA")) / "tiny_imagenet100", []
    for seed in given.seeds:
        found.append({"seed": seed} | measure(seed, source))
        print(found[-1], flush=True)
        write_json(given.out, {"draws": found, "environment": environment()})
