"""What a claim leaves for people: the picture of its paired differences, and the page of all claims."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contralto.errors import DataError, MissingExtraError
from contralto.files import naming, write_atomically

__all__ = ["demand_plots", "draw", "effect", "kept_results", "measure", "page", "points", "sides", "write_page"]


def points(v: Mapping[str, Any]) -> str:
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


def effect(c: Mapping[str, Any], *names: str) -> str:
    """Numbers of a comparison as people read them: shares in points, what has a baseline with its sign.

    Parameters
    ----------
    c : mapping
        One of the `comparisons` of a result.
    *names : str
        Of its numbers; default: value, and low and high in brackets.

    Examples
    --------
    >>> effect({"value": 0.012, "low": -0.005, "high": None, "share": True, "baseline": "plain"})
    '+1.2 [-0.5, -]'
    """
    if not names:
        return f"{effect(c, 'value')} [{effect(c, 'low', 'high')}]"
    sign = "+" if c["baseline"] else ""
    return ", ".join(_number(c[name], sign, c["share"]) for name in names)


def _number(value: float | None, sign: str = "", share: bool = False) -> str:
    if value is None or value != value:
        return "-"
    return f"{100 * value:{sign}.1f}" if share else f"{value:{sign}.3g}"


def measure(c: Mapping[str, Any]) -> str:
    """What a comparison compares, in words; the key of the arms' metrics.

    Examples
    --------
    >>> measure({"metric": "right", "macro": True, "part": "rare"})
    'right, mean over classes, rare'
    """
    return ", ".join([c["metric"], *(["mean over classes"] if c["macro"] else []), *([c["part"]] if c["part"] else [])])


def sides(c: Mapping[str, Any]) -> str:
    """Who is compared with whom, or with what.

    Examples
    --------
    >>> sides({"method": "a", "baseline": None, "above": 30})
    'a above 30'
    """
    if c["baseline"]:
        return f"{c['method']} against {c['baseline']}"
    return " ".join([c["method"], *(f"{k} {c[k]:g}" for k in ("above", "below") if k in c)])


def draw(result: Mapping[str, Any], path: Path) -> None:
    """One dot per seed, the mean and its interval: a column per data set, a panel per scale."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    data = result["data"]
    scales = list(dict.fromkeys(_scale(c) for found in data.values() for c in found["comparisons"]))
    rows = {s: max(sum(_scale(c) == s for c in found["comparisons"]) for found in data.values()) for s in scales}
    heights = [0.5 * n + 0.7 for n in rows.values()]
    figure, axes = plt.subplots(
        len(scales), len(data), figsize=(6.4 * len(data), sum(heights) + 0.4), squeeze=False, layout="constrained",
        height_ratios=heights,
    )  # fmt: skip
    for column, (name, found) in enumerate(data.items()):
        decides = [found["comparisons"][i] for i in result["decides"]["comparisons"]]
        for row, scale in enumerate(scales):
            axis = axes[row][column]
            shown = [c for c in found["comparisons"] if _scale(c) == scale]
            for place, c in enumerate(reversed(shown)):
                _draw_one(axis, place, c, decides=any(c is d for d in decides))
            axis.set_yticks(range(len(shown)), [_row(c, scale) for c in reversed(shown)], fontsize=8)
            axis.set_ylim(-0.6, len(shown) - 0.4)
            axis.tick_params(axis="x", labelsize=8)
            axis.set_xlabel(scale[1], fontsize=8)
            if scale[0] == "difference":
                axis.axvline(0, color="grey", lw=0.8, zorder=0)
        axes[0][column].set_title(f"{name}: {found['verdict']}", fontsize=10)
    write_atomically(path, lambda part: figure.savefig(part, dpi=130, format="png"))
    plt.close(figure)


def _scale(c: Mapping[str, Any]) -> tuple[str, str]:
    kind = "difference" if c["baseline"] else "value"
    what = "points" if c["share"] else c["metric"]
    turned = " (turned: the right of 0 supports the claim)" if c.get("direction") == "lower" else ""
    return kind, f"{kind}, {what}{turned}"


def _row(c: Mapping[str, Any], scale: tuple[str, str]) -> str:
    what = measure(c)
    return sides(c).replace(" against ", "\nagainst ") + (
        f"\n{what}" if not scale[1].startswith(f"{scale[0]}, {what}") else ""
    )


def _draw_one(axis: Any, place: int, c: Mapping[str, Any], *, decides: bool) -> None:
    colour, factor = "#1f5fa8" if decides else "#7a8794", 100.0 if c["share"] else 1.0
    seeds = [factor * v for v in c["seeds"]]
    axis.plot(seeds, [place - 0.16] * len(seeds), "o", ms=4, mfc="none", mec=colour, alpha=0.8)
    axis.plot([factor * c["low"], factor * c["high"]], [place + 0.08] * 2, color=colour, lw=2)
    axis.plot(factor * c["value"], place + 0.08, "o", color=colour, ms=6)
    for mark in (c.get("smallest") or None, c.get("above"), c.get("below")):
        if mark is not None:
            axis.plot([factor * mark] * 2, [place - 0.3, place + 0.3], color="#b03030", lw=1, ls=":")


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of all claims, in Markdown, from the results by name.

    Parameters
    ----------
    results : mapping of str to mapping
        Name of the claim -> what its JSON file holds.
    """
    lines = [
        "# The claims of the papers, as they came out here",
        "",
        "Made by `contralto reproduce --table` from the files in [results/claims](../results/claims). Every claim is an",
        "experiment with paired arms: the same data, split, order, views, initialisation and number of steps on the same seed. A",
        "claim that did not come back is listed as such. Effects are turned so that positive supports the claim; those on what",
        "is right or wrong by sample are in points (hundredths).",
        "",
        *_table(("system", "claim", "data", "compared", "effect", "95 % interval", "seeds", "verdict", "command")),
    ]
    for name, result in results.items():
        for data, found in result["data"].items():
            for i in result["decides"]["comparisons"]:
                c = found["comparisons"][i]
                told = f"{sides(c)}: {measure(c)}", effect(c, "value"), effect(c, "low", "high"), str(len(c["seeds"]))
                lines.append(
                    _line(
                        f"[{result['system']}](#{name})",
                        result["claim"],
                        data,
                        *told,
                        c["verdict"],
                        f"`{result['command']}`",
                    )
                )
    versions = dict.fromkeys((r["rule"]["version"], r["rule"]["text"]) for r in results.values())
    for version, text in versions:
        lines += ["", f"The rule (version {version}), fixed before the runs: {text}"]
    for name, result in results.items():
        lines += [
            "",
            f"## {name}",
            "",
            f"{_sentence(result['claim'])}{' ' + result['paper'] if result['paper'] else ''}",
            "",
        ]
        if result["decides"]["which"] == "all" and len(result["decides"]["comparisons"]) > 1:
            lines += ["Holds if all of its gated comparisons do: " + ", ".join(
                f"{d}: **{f['verdict']}**" for d, f in result["data"].items()) + ".", ""]  # fmt: skip
        lines += _table(("data", "compared", "measure", "method", "baseline", "effect", "verdict"))
        for data, found in result["data"].items():
            for c in found["comparisons"]:
                means = (_mean_of(found, c, c[side]) for side in ("method", "baseline"))
                lines.append(_line(data, sides(c), measure(c), *means, effect(c), c["verdict"]))
        lines += ["", f"![Paired differences: a dot per seed, the mean and its interval](../results/claims/{name}.png)"]
        if result["left_out"]:
            lines += ["", "Left out: " + "; ".join(result["left_out"]) + "."]
    return "\n".join(lines) + "\n"


def write_page(results: Path, target: Path) -> Path:
    """Write the page of all claims from the JSON files of a folder.

    Raises
    ------
    DataError
        No result is there.
    """
    found = kept_results(results)
    if not found:
        raise DataError("holds no result of a claim: run `contralto reproduce SYSTEM` first", file=str(results))
    target.parent.mkdir(parents=True, exist_ok=True)
    text = page(found)
    write_atomically(target, lambda path: path.write_text(text, encoding="utf-8"))
    return target


def kept_results(folder: Path) -> dict[str, Any]:
    """The results of claims in a folder: name -> what its JSON file holds."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        with naming(path):
            read = json.loads(path.read_text(encoding="utf-8"))
        if "rule" in read:  # the choice of learning rates lies there too
            found[path.stem] = read
    return found


def _mean_of(found: Mapping[str, Any], c: Mapping[str, Any], arm: str | None) -> str:
    if (
        arm not in found["arms"]
    ):  # a bound has no baseline, and two arms that stand for their difference no mean of their own
        return ""
    m = found["arms"][arm]["metrics"][measure(c)]
    spread = "" if m["sd"] is None else f" ± {_number(m['sd'], share=c['share'])}"
    return _number(m["mean"], share=c["share"]) + spread


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _table(heads: Sequence[str]) -> list[str]:
    return [_line(*heads), "|" + "---|" * len(heads)]


def _line(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
