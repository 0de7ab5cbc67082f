"""Charts as inline SVG: small functions that return markup, with attributes only (a strict policy forbids inline styles)."""

import math
from collections.abc import Sequence
from html import escape

__all__ = ["agreement", "bar_pairs", "curve", "heat_map", "scatter", "share_map"]

Point = tuple[float, float]


def _svg(width: int, height: int, body: str, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" class="chart" '
        f'preserveAspectRatio="xMidYMid meet">{body}</svg>'
    )


def curve(
    series: Sequence[tuple[str, Sequence[Point]]],
    *,
    label: str,
    width: int = 320,
    height: int = 170,
    percent: bool = False,
    x_label: str = "",
) -> str:
    """Lines over a common frame; each series is (name, points) and gets the next class ``s0``, ``s1``, ...

    Examples
    --------
    >>> curve([("loss", [(0, 1.0), (1, 0.5)])], label="loss").startswith("<svg")
    True
    """
    points = [p for _, line in series for p in line]
    if not points:
        return ""
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    y0, y1 = (0.0, 1.0) if percent else (min(p[1] for p in points), max(p[1] for p in points))
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)
    left, top, right, bottom = 44, 10, width - 8, height - 26

    def place(p: Point) -> str:
        x = left + (p[0] - x0) / (x1 - x0) * (right - left)
        return f"{x:.1f},{bottom - (p[1] - y0) / (y1 - y0) * (bottom - top):.1f}"

    parts = []
    for i in range(5):
        value, y = y0 + (y1 - y0) * i / 4, bottom - (bottom - top) * i / 4
        told = f"{value:.0%}" if percent else f"{value:.3g}"
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 5}" y="{y + 3:.1f}" text-anchor="end">{told}</text>')
    for i, (name, line) in enumerate(series):
        path = " ".join(place(p) for p in line)
        parts.append(f'<polyline class="line s{i % 8}" points="{path}"><title>{escape(name)}</title></polyline>')
    share = percent and x1 <= 1
    for value, anchor, x in ((x0, "start", left), (x1, "end", right)):
        told = f"{value:.0%}" if share else f"{value:.4g}"
        parts.append(f'<text class="tick" x="{x}" y="{bottom + 13}" text-anchor="{anchor}">{told}</text>')
    parts.append(
        f'<text class="tick" x="{(left + right) / 2}" y="{bottom + 22}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return _svg(width, height, "".join(parts), label)


def bar_pairs(rows: Sequence[tuple[str, float | None, float]], *, names: tuple[str, str], width: int = 640) -> str:
    """One row per class with two horizontal bars in [0, 1]; the first may be missing.

    Examples
    --------
    >>> "cat" in bar_pairs([("cat", 0.4, 0.7)], names=("plain", "CAPro"))
    True
    """
    left, step = 150, 26
    parts = []
    for i, (name, first, second) in enumerate(rows):
        y = i * step + 4
        shown = name if len(name) <= 22 else name[:21] + "…"
        parts.append(f'<text class="name" x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(shown)}</text>')
        for j, value in enumerate((first, second)):
            if value is not None:
                length = max(1.0, value * (width - left - 50))
                parts.append(
                    f'<rect class="bar b{j}" x="{left}" y="{y + j * 9}" width="{length:.1f}" height="8" rx="1.5">'
                    f"<title>{escape(name)}, {escape(names[j])}: {value:.1%}</title></rect>"
                )
        parts.append(f'<text class="tick" x="{width - 4}" y="{y + 14}" text-anchor="end">{second:.0%}</text>')
    return _svg(width, len(rows) * step + 8, "".join(parts), f"accuracy per class, {names[0]} and {names[1]}")


def heat_map(matrix: Sequence[Sequence[int]], rows: Sequence[str], columns: Sequence[str], *, label: str) -> str:
    """Counts as squares; each square carries `data-row` and `data-column` for a script to use.

    Examples
    --------
    >>> 'data-row="0"' in heat_map([[1, 2]], ["a"], ["b", "c"], label="flow")
    True
    """
    cell, left, top = 20, 130, 110
    width, height = left + cell * len(columns) + 8, top + cell * len(rows) + 8
    most = max((v for row in matrix for v in row), default=1) or 1
    parts = []
    for j, name in enumerate(columns):
        x = left + j * cell + 14
        parts.append(
            f'<text class="tick" x="{x}" y="{top - 6}" transform="rotate(-50 {x} {top - 6})">{escape(name[:18])}</text>'
        )
    for i, name in enumerate(rows):
        parts.append(
            f'<text class="tick" x="{left - 6}" y="{top + i * cell + 14}" text-anchor="end">{escape(name[:20])}</text>'
        )
        for j, value in enumerate(matrix[i]):
            strength = 0.0 if value == 0 else 0.12 + 0.88 * (value / most) ** 0.5
            parts.append(
                f'<rect class="cell" x="{left + j * cell}" y="{top + i * cell}" width="{cell - 2}" height="{cell - 2}" '
                f'fill-opacity="{strength:.2f}" data-row="{i}" data-column="{j}" tabindex="{0 if value else -1}">'
                f"<title>{escape(name)} → {escape(columns[j])}: {value}</title></rect>"
            )
    return _svg(width, height, "".join(parts), label)


def share_map(
    matrix: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str], *, label: str
) -> str:
    """Shares in [0, 1] as squares with the number in them; None stays empty.

    Examples
    --------
    >>> ">50<" in share_map([[0.5, None]], ["a"], ["b", "c"], label="accuracy")
    True
    """
    cell, left, top = 36, 150, 64
    width, height = left + cell * len(columns) + 60, top + cell * len(rows) + 8
    parts = []
    for j, name in enumerate(columns):
        x = left + j * cell + cell // 2
        parts.append(
            f'<text class="tick" x="{x}" y="{top - 6}" transform="rotate(-40 {x} {top - 6})">{escape(name[:18])}</text>'
        )
    for i, name in enumerate(rows):
        y = top + i * cell
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 22}" text-anchor="end">{escape(name[:22])}</text>')
        for j, value in enumerate(matrix[i]):
            if value is None:
                continue
            x = left + j * cell
            parts.append(
                f'<rect class="share" x="{x}" y="{y}" width="{cell - 2}" height="{cell - 2}" '
                f'fill-opacity="{0.04 + 0.66 * value:.2f}"><title>{escape(name)}, {escape(columns[j])}: {value:.1%}</title>'
                f'</rect><text class="name" x="{x + cell // 2 - 1}" y="{y + 22}" text-anchor="middle">{100 * value:.0f}</text>'
            )
    return _svg(width, height, "".join(parts), label)


def scatter(
    points: Sequence[tuple[float, float, int, str]],
    prototypes: Sequence[tuple[float, float, int, str]],
    *,
    size: int = 640,
) -> str:
    """A map: points (x, y, colour number, verdict) as dots, prototypes as ringed dots with their names.

    Examples
    --------
    >>> scatter([(0, 0, 0, "kept")], [(1, 1, 0, "cat")]).count("<circle")
    2
    """
    everything = [*points, *prototypes]
    xs, ys = [p[0] for p in everything], [p[1] for p in everything]
    x0, y0 = min(xs), min(ys)
    span = max(max(xs) - x0, max(ys) - y0, 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        return 12 + (x - x0) / span * (size - 24), 12 + (y - y0) / span * (size - 24)

    parts = []
    for x, y, colour, verdict in points:
        px, py = place(x, y)
        parts.append(
            f'<circle class="dot c{colour % 12} v-{escape(verdict)}" cx="{px:.0f}" cy="{py:.0f}" r="2.4" data-class="{colour}"/>'
        )
    for x, y, colour, name in prototypes:
        px, py = place(x, y)
        parts.append(
            f'<circle class="proto c{colour % 12}" cx="{px:.0f}" cy="{py:.0f}" r="6"><title>{escape(name)}</title></circle>'
        )
        parts.append(f'<text class="proto-name" x="{px + 9:.0f}" y="{py + 4:.0f}">{escape(name[:24])}</text>')
    return _svg(size, size, "".join(parts), "map of the training images with the prototypes of the classes")


def agreement(
    points: Sequence[Point],
    *,
    label: str,
    x_label: str,
    y_label: str,
    limits: tuple[float, float] | None = None,
    size: int = 420,
) -> str:
    """Points (what is right, what was told) in a square with the line on which both are the same.

    `limits` are those of both axes, by default of the points.

    Examples
    --------
    >>> agreement([(1.0, 1.2), (2.0, 1.9)], label="told", x_label="right", y_label="told").count("<circle")
    2
    """
    if not points:
        return ""
    values = [v for p in points for v in p]
    low, high = limits or (min(values), max(values))
    high = high if high > low else low + 1
    left, top, side = 52, 10, size - 92

    def x_of(v: float) -> float:
        return left + (v - low) / (high - low) * side

    def y_of(v: float) -> float:
        return top + side - (v - low) / (high - low) * side

    parts = []
    for value in _round_numbers(low, high):
        x, y = x_of(value), y_of(value)
        parts.append(f'<line class="grid" x1="{left}" x2="{left + side}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 5}" y="{y + 3:.1f}" text-anchor="end">{value:.3g}</text>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{top + side + 14}" text-anchor="middle">{value:.3g}</text>')
    parts.append(
        f'<line class="grid" x1="{x_of(low):.1f}" y1="{y_of(low):.1f}" x2="{x_of(high):.1f}" y2="{y_of(high):.1f}"/>'
    )
    parts += [f'<circle class="dot c0" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.4"/>' for x, y in points]
    middle = left + side / 2
    parts.append(f'<text class="tick" x="{middle}" y="{top + side + 30}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f'transform="rotate(-90 11 {top + side / 2})" text-anchor="middle"'
    parts.append(f'<text class="tick" x="11" y="{top + side / 2}" {turned}>{escape(y_label)}</text>')
    return _svg(size, size, "".join(parts), label)


def _round_numbers(low: float, high: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from `low` to `high`, at most so many steps.

    Examples
    --------
    >>> _round_numbers(-92.8, 99.8)
    [-50.0, 0.0, 50.0]
    """
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(m * power for m in (1, 2, 5, 10) if m * power * most >= high - low)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
