"""Three labels per class, and the class of every other sample: TMV-HLP on views of one's own.

    python examples/transductive.py

Takes scikit-learn's digits. Any matrices with a row per sample do: features of two encoders, a picture's and a text's, ...
"""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from contralto.encoders.described import describe
from contralto.systems.zeroshot.tmv_hlp import TMVHLP

data, truth = load_digits(return_X_y=True)
pictures = data.reshape(-1, 8, 8) / 16
views = [describe(pictures, name) for name in ("pixels", "fourier", "gradients")]

rng = np.random.default_rng(0)
order = rng.permutation(len(truth))
shots = np.concatenate([order[truth[order] == c][:3] for c in range(10)])
labels = np.full(len(truth), -1)  # -1: no label
labels[shots] = truth[shots]
asked = labels < 0

model = TMVHLP(standardise="all", regulariser=1.0, power=1.0, k=10, times=3, hyper_k=10, hyper_times=3, alpha=0.9).fit(
    views, labels
)
found = model.transduction_

together = np.hstack([(v - v.mean(0)) / np.maximum(v.std(0), 1e-9) for v in views])
nearest = KNeighborsClassifier(1).fit(together[shots], truth[shots]).predict(together)
sure = model.label_distributions_.max(1)
half = asked & (sure > np.median(sure[asked]))

print(f"nearest labelled sample   {balanced_accuracy_score(truth[asked], nearest[asked]):.1%} mean over classes")
print(f"TMV-HLP                   {balanced_accuracy_score(truth[asked], found[asked]):.1%}")
print(f"of the surer half         {(found == truth)[half].mean():.1%} are right")
print(
    "agreement of the views   ",
    dict(zip(("pixels", "fourier", "gradients"), model.view_weights_.round(2).tolist(), strict=True)),
)
