"""Fine-tune a pretrained encoder on a few labelled pictures, and compare with plain cross-entropy from the same start.

    python examples/fine_tune.py [PICTURES] [OUT] [SHOTS]

Without pictures it takes the icons that ship with the package, by their right labels, ten per class.
"""

import json
import sys
from importlib import resources

import contralto
from contralto.pipelines.finetuning import FineTuningJob
from contralto.pipelines.job import load_preset

shipped = str(resources.files("contralto.data") / "samples/web_icons/web_icons.parquet")
data = sys.argv[1] if len(sys.argv) > 1 else shipped
out = sys.argv[2] if len(sys.argv) > 2 else "runs/fine_tune"
shots = int(sys.argv[3]) if len(sys.argv) > 3 else 10
columns = {"label_column": "label", "group_column": "emoji"} if data == shipped else {}

# Any encoder serves: a pretraining of your own by its folder, image_encoder="runs/simclr".
settings = load_preset("small", "core_tuning") | {"image_encoder": "efficientnet-lite0", "epochs": 10}
run = FineTuningJob("core_tuning").fit(data, out, shots=shots, baseline=True, **columns, **settings)

for name, score in json.loads((run / "metrics.json").read_text())["scores"].items():
    print(f"{name}: {score['value']:.1%} [{score['low']:.1%}, {score['high']:.1%}]")
model = contralto.load(run)  # predicts pictures of your own: model.predict(["a.jpg", "b.jpg"])
print(f"{len(model.classes)} classes: {', '.join(model.classes[:5])}, ...")
