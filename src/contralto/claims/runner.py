"""What all claims share: paired comparisons with intervals and a verdict, the file and the picture that they leave."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from contralto.errors import MissingExtraError, UsageError
from contralto.evaluation.classification import accuracy_interval
from contralto.files import write_atomically, write_json
from contralto.pipelines.outputs import environment

__all__ = ["CLAIMS", "compare", "demand_plots", "found_once", "get_claim", "points", "save"]

CLAIMS = {"capro": "reproduce_capro", "fopro": "reproduce_fopro"}
"""System -> function of `contralto.claims.<system>` that runs its claim."""


def get_claim(system: str) -> Any:
    """The function that runs the claim of a system.

    Examples
    --------
    >>> get_claim("capro").__name__
    'reproduce_capro'
    """
    if system not in CLAIMS:
        raise UsageError(f"no claim of {system!r} can be run; there are: {', '.join(CLAIMS)}")
    return getattr(import_module(f"contralto.claims.{system}"), CLAIMS[system])


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


def compare(
    right: Mapping[str, npt.NDArray[np.float64]],
    pairs: Sequence[tuple[str, str]],
    labels: npt.NDArray[np.int64],
    groups: npt.NDArray[Any],
    parts: Mapping[str, npt.NDArray[np.bool_]] | None = None,
) -> list[dict[str, Any]]:
    """Differences between arms that were trained in pairs, with 95 % intervals over seeds and groups of test samples.

    Parameters
    ----------
    right : mapping of str to array (S, N)
        Per arm, 1 where the answer of seed s to sample i is right.
    pairs : sequence of (method, baseline)
    labels, groups : array (N,)
    parts : mapping of str to array (N,) bool, optional
        Parts of the test samples that are told apart too, as `macro_<name>`.

    Returns
    -------
    list of dict
        `method`, `baseline`, `accuracy`, `macro` and the parts, each with `value`, `low`, `high`; and the verdict by `macro`:
        "reproduced" when the interval lies above zero, "not reproduced" when below, else "inconclusive".

    Examples
    --------
    >>> right = {"new": np.ones((2, 4)), "old": np.array([[1.0, 1, 0, 0]] * 2)}
    >>> found = compare(right, [("new", "old")], np.array([0, 0, 1, 1]), np.array(["", "", "", ""]))
    >>> found[0]["macro"]["value"]
    0.5
    """
    every = np.ones(len(labels), bool)
    shown = {"accuracy": (every, False), "macro": (every, True)}
    shown |= {f"macro_{name}": (mask, True) for name, mask in (parts or {}).items()}
    comparisons = []
    for method, baseline in pairs:
        difference = right[method] - right[baseline]
        entry: dict[str, Any] = {"method": method, "baseline": baseline}
        for key, (keep, macro) in shown.items():
            interval = accuracy_interval(difference[:, keep], labels[keep], groups=groups[keep], macro=macro)
            entry[key] = interval._asdict()
        low, high = entry["macro"]["low"], entry["macro"]["high"]
        entry["verdict"] = "reproduced" if low > 0 else "not reproduced" if high < 0 else "inconclusive"
        comparisons.append(entry)
    return comparisons


def points(v: Mapping[str, float]) -> str:
    """A difference of accuracies with its interval, in points.

    Examples
    --------
    >>> points({"value": 0.012, "low": -0.005, "high": 0.03})
    '+1.2 [-0.5, +3.0]'
    """
    return f"{100 * v['value']:+.1f} [{100 * v['low']:+.1f}, {100 * v['high']:+.1f}]"


def demand_plots() -> None:
    """Ask for what draws the picture before the work, not after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("the picture of a claim", extra="plots") from error


def save(system: str, claim: str, seeds: int, data: Mapping[str, Any], out: Path | None) -> dict[str, Any]:
    """Put a result together; write it and its picture, unless `out` is None."""
    result = {
        "claim": claim,
        "command": f"contralto reproduce {system} --seeds {seeds}",
        "seeds": list(range(seeds)),
        "environment": environment(),
        "data": dict(data),
    }
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / f"{system}.json", result)
        _draw(data, out / f"{system}.png")
    return result


def _draw(results: Mapping[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(5.2 * len(results), 3.4), squeeze=False, layout="constrained")
    colours = ("#1f5fa8", "#c26a1b")
    for axis, (name, result) in zip(axes[0], results.items(), strict=True):
        for place, entry in enumerate(reversed(result["comparisons"])):
            keys = [k for k in entry if k.startswith("macro")]
            for key, shift, colour in zip(keys, (0.12, -0.12), colours, strict=False):
                v = entry[key]
                axis.plot([100 * v["low"], 100 * v["high"]], [place + shift] * 2, color=colour, lw=2)
                told = "all classes" if key == "macro" else f"{key.removeprefix('macro_')} classes"
                axis.plot(100 * v["value"], place + shift, "o", color=colour, label=told if place == 0 else None)
        rows = [f"{e['method']}\nagainst {e['baseline']}" for e in reversed(result["comparisons"])]
        axis.set_yticks(range(len(rows)), rows, fontsize=8)
        axis.axvline(0, color="grey", lw=0.8)
        axis.set_xlabel("points of accuracy, mean over classes", fontsize=8)
        axis.set_title(f"{name}: {result['verdict']}", fontsize=10)
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    write_atomically(path, lambda part: figure.savefig(part, dpi=130, format="png"))
    plt.close(figure)
