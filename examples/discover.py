"""Which kinds are in these pictures that nobody has named yet? Find them, look at them, name them, and predict by these names.

    python examples/discover.py [LABELLED UNLABELLED]

Without arguments it takes the icons that ship with the package: 11 kinds are known by 20 pictures each, 11 are not. Needs
contralto[pretrained]; a few minutes on one core. The same from the command line: contralto fit protogcd LABELLED --unlabelled
UNLABELLED --preset frozen --out RUN, and then contralto review RUN.
"""

import sys
import tempfile
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import contralto
from contralto.data.names import save_names
from contralto.pipelines.job import load_preset
from contralto.review.discovered import Discoveries
from contralto.systems.registry import get_job

RUN = Path("runs/discover")

if len(sys.argv) > 2:
    labelled, unlabelled, truth = *sys.argv[1:3], {}
else:
    folder = Path(tempfile.mkdtemp())
    icons = pq.read_table(str(resources.files("contralto.data") / "samples/web_icons/web_icons.parquet"))
    kind = np.array([k or "" for k in icons.column("label").to_pylist()])  # the right ones; "" = none of the kinds
    known = np.unique(kind[kind != ""])[::2]
    shown = np.concatenate([np.flatnonzero(kind == k)[:20] for k in known])
    rest = np.setdiff1d(np.flatnonzero(kind != ""), shown)
    ids, images = pa.array([f"icon {row}" for row in range(len(kind))]), icons.column("image")
    labelled, unlabelled = str(folder / "labelled.parquet"), str(folder / "unlabelled.parquet")
    pq.write_table(pa.table({"id": ids.take(shown), "image": images.take(shown), "kind": kind[shown]}), labelled)
    pq.write_table(pa.table({"id": ids.take(rest), "image": images.take(rest)}), unlabelled)
    truth = dict(zip(ids.take(rest).to_pylist(), kind[rest].tolist(), strict=True))

column = {"label_column": "kind"} if truth else {}
get_job("protogcd").fit(labelled, RUN, unlabelled=unlabelled, **load_preset("frozen", "protogcd"), **column)

found, names = Discoveries(RUN), {}
for k in found.by_size():
    if not found.is_new[k]:
        continue
    typical, unsure = found.shown(k, 5)
    like, cosine = found.nearest[k][0]
    print(f"{found.classes[k]}: {len(found.members(k))} pictures, most like {like} ({cosine:.2f})")
    kinds = [truth.get(found.ids[n], found.ids[n]) for n in typical]  # a person would look at them: see RUN/report.html
    print("   ", ", ".join(kinds))
    names[found.classes[k]] = max(set(kinds), key=kinds.count) if truth else ""

save_names(RUN, names)
pictures = [found.read_bytes(int(n)) for n in found.members(int(np.flatnonzero(found.is_new)[0]))[:3]]
print("predicted by these names:", contralto.load(RUN).predict(pictures))
