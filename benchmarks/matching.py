"""How precise are anchors, by how texts are cleaned, encoded, enhanced and matched? Nothing is trained; seconds a row.

    CONTRALTO_DATA=... python benchmarks/matching.py [out.json]

Precision of the 30 best images per class (mean over classes), of all classes and of the hard ones, of which less than two
thirds of the web labels are right. Clean labels serve as the judge only. Visual neighbours come from the frozen, pretrained
Lite0 at 96 pixels, so this is what the `small` preset sees.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from contralto.claims.capro import ambiguous_classes, shared_manifest
from contralto.data.definitions import class_text
from contralto.data.manifest import Manifest
from contralto.data.text import clean_texts, drop_even_words, words_of
from contralto.encoders.text import text_encoder
from contralto.neighbors.graph import adjacency, smooth
from contralto.neighbors.matching import match_texts
from contralto.pipelines.capro import CAProJob
from contralto.pipelines.job import load_preset
from contralto.pipelines.outputs import environment

K = 30


def main(out: Path, work: Path) -> None:
    rows = []
    for name in ("web_icons", "fashion_web"):
        shared = shared_manifest(name, work)
        manifest = Manifest.load(shared)
        train = np.flatnonzero((manifest.column("split") == "train") & (manifest.labels >= 0))
        labels, clean = manifest.labels[train], manifest.column("clean_label")[train].astype(int)
        hard = ambiguous_classes(manifest)
        job = CAProJob(
            str(shared), shared.parent, load_preset("small") | {"cache": shared.parent / "features"}, progress=False
        )
        job.ingest()
        graph = adjacency(*job.neighbour_graph())
        every = manifest.texts
        raw = [every[i] for i in train]

        def precision(chosen, labels=labels, clean=clean, hard=hard):
            by_class = [(labels == clean)[chosen & (labels == c)].mean() for c in range(len(hard))]
            return {"all": float(np.mean(by_class)), "hard": float(np.mean(np.array(by_class)[hard]))}

        rng = np.random.default_rng(0)
        random = np.zeros(len(labels), bool)
        for c in range(len(hard)):
            members = np.flatnonzero(labels == c)
            random[rng.permutation(members)[:K]] = True
        rows.append({"data": name, "texts": "random images", **precision(random)})
        keep = {w for c in manifest.classes for w in words_of(f"{c.name} {' '.join(c.queries)} {c.definition}")}
        variants = {"raw": raw, "english": clean_texts(raw, keep=keep)}
        variants["even words dropped"] = drop_even_words(
            clean_texts(raw, keep=keep, words="any"), labels, len(hard), keep=keep
        )
        for told, texts in variants.items():
            for encoder_name in ("minilm", "tfidf"):
                for form in ("definition", "name+definition"):
                    encoder = text_encoder(encoder_name)
                    classes = [class_text(c, form) for c in manifest.classes]
                    encoder.fit([*texts, *classes])
                    unique, inverse = np.unique(texts, return_inverse=True)
                    own = encoder.encode(unique.tolist())[inverse]
                    for enhanced, embedded in (("no", own), ("yes", smooth(own, graph))):
                        for method in ("rerank", "cosine", "discriminative"):
                            match = match_texts(embedded, encoder.encode(classes), labels, method=method)
                            rows.append(
                                {
                                    "data": name, "texts": told, "encoder": encoder_name, "class_text": form,
                                    "enhanced": enhanced, "match": method, **precision((match.rank >= 0) & (match.rank < K)),
                                }
                            )  # fmt: skip
                            print(
                                *(f"{v:.3f}" if isinstance(v, float) else v for v in rows[-1].values()),
                                sep="  ",
                                flush=True,
                            )
    text = json.dumps(
        {"command": "python benchmarks/matching.py", "k": K, "environment": environment(), "rows": rows}, indent=1
    )
    out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("results/matching.json")
    main(target, Path(sys.argv[2]) if len(sys.argv) > 2 else Path(tempfile.mkdtemp()))
