"""Tell a number from a table: an encoder trained by contrast with a linear probe, beside least absolute error.

    python examples/regression.py [TABLE TARGET] [OUT]

Without a table it takes the diabetes study that comes with scikit-learn: how far the disease went within a year.
"""

import json
import sys
import tempfile
from pathlib import Path

import contralto
from contralto.data.tables import read_numbers
from contralto.pipelines.regression import RegressionJob

if len(sys.argv) > 2:
    table, target = sys.argv[1:3]
else:
    import numpy as np
    from sklearn.datasets import load_diabetes

    table, target = str(Path(tempfile.mkdtemp()) / "diabetes.csv"), "progress"
    found = load_diabetes(scaled=False)
    names = ",".join([*found.feature_names, target])
    np.savetxt(table, np.c_[found.data, found.target], delimiter=",", header=names, comments="")
out = sys.argv[3] if len(sys.argv) > 3 else tempfile.mkdtemp()

# The numbers go from 25 to 346: in bins of ten, samples have others of their number, and a window of five bins is 50.
run = RegressionJob("supremix").fit(table, out, target=target, bin=10.0, epochs=30)
for name, score in json.loads((run / "metrics.json").read_text())["scores"].items():
    print(f"{name}: {score['value']:.3g}")

model = contralto.load(run)
rows = read_numbers(table, target, columns=model.config["columns"])
print("told of the first five rows:", model.predict(rows.inputs[:5]).round(1).tolist())
