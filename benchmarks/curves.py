"""How the roofline and the growth of time are drawn: logarithmic panels whose lines and points carry their names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .charts import _LETTER, _LINE, EAGER, INK, MUTED, OURS, PEER, RULE, WIDTH, Panel

_SUPERSCRIPTS = str.maketrans("0123456789.-", "⁰¹²³⁴⁵⁶⁷⁸⁹·⁻")

# Where a label may stand beside its point: to its right, left or in the middle, lines up or down.
_PLACES = tuple((across, up / 2) for up in range(-14, 15) for across in (1, -1, 0) if across or abs(up) > 1)

Box = tuple[float, float, float, float]  # left, bottom, right, top


@dataclass(frozen=True)
class Point:
    """A kernel or a model under the roof: FLOPs per byte, and GFLOP/s of fastvit, eager and the best other.

    An empty name: one of many shapes, drawn small and alone.
    """

    intensity: float
    ours: float
    eager: float | None
    peer: float | None
    name: str
    model: bool = False


@dataclass(frozen=True)
class Curve:
    """Times by size: the name at its end, its colour, (size, time) in order of size."""

    name: str
    colour: str
    points: tuple[tuple[float, float], ...]


def roofline(title: str, points: Sequence[Point], gflops: float, gbs: float) -> Panel:
    """GFLOP/s against FLOPs per byte, under the copy's slope and the matrix product's ceiling."""
    left, right, bottom, height = 0.62, 0.12, 0.52, 3.3
    rates = [rate for p in points for rate in (p.ours, p.eager, p.peer) if rate]
    ridge = gflops / gbs
    x_ends = (min(min(p.intensity for p in points), ridge) / 1.8, max(max(p.intensity for p in points), ridge) * 2.2)
    y_ends = (min(rates) / 1.6, max(gflops, *rates) * 2.2)
    inches = (WIDTH - left - right, height)

    def at(x: float, y: float) -> tuple[float, float]:
        return inches[0] * _share(x, x_ends), inches[1] * _share(y, y_ends)

    def draw(axes: Any) -> None:
        _logarithmic(axes, x_ends, y_ends)
        axes.set_xlabel("FLOPs per byte moved", labelpad=2)
        axes.set_ylabel("GFLOP/s", labelpad=2)
        if gflops >= 1e4:
            axes.set_yticks(axes.get_yticks(), [_short(tick / 1e3) for tick in axes.get_yticks()])
            axes.set_ylabel("TFLOP/s", labelpad=2)
        slope = [(x, min(x * gbs, gflops)) for x in (x_ends[0], ridge, x_ends[1])]
        axes.plot(*zip(*slope, strict=True), color=INK, linewidth=1.4, zorder=1)
        roof = [at(x, min(x * gbs, gflops)) for x in _steps(x_ends)]
        taken = [_around(place, 0.04) for place in roof]
        ceiling = f"product {_rate(gflops, 'FLOP/s')}, copy {_rate(gbs, 'B/s')}"
        taken.append(_write(axes, at, (x_ends[1], y_ends[1] / 1.3), ceiling))
        own = [_dots(axes, at, point) for point in points]
        for number, point in enumerate(points):
            others = [box for at_point in own[:number] + own[number + 1 :] for box in at_point]
            if point.name:
                taken += _label(axes, at, inches, point, own[number], [*taken, *others])

    return Panel(title, height, left, right, bottom, draw)


def _dots(axes: Any, at: Any, point: Point) -> list[Box]:
    shape = "D" if point.model else "o"
    if not point.name:
        axes.plot(point.intensity, point.ours, shape, color=OURS, ms=2.6, alpha=0.55, mew=0, zorder=2)
        return [_around(at(point.intensity, point.ours), 0.03)]
    rates = [rate for rate in (point.eager, point.peer, point.ours) if rate]
    axes.plot([point.intensity] * len(rates), rates, color=RULE, linewidth=1.6, zorder=1)
    for rate, colour in ((point.eager, EAGER), (point.peer, PEER)):
        if rate:
            axes.plot(point.intensity, rate, shape, mfc="none", mec=colour, mew=1.4, ms=5, zorder=3)
    axes.plot(point.intensity, point.ours, shape, color=OURS, ms=6, mew=0, zorder=4)
    low, high = min(rates), max(rates)
    between = [low * (high / low) ** (i / 4) for i in range(5)]
    return [_around(at(point.intensity, rate), 0.05) for rate in between]


def _label(
    axes: Any, at: Any, inches: tuple[float, float], point: Point, own: Sequence[Box], taken: Sequence[Box]
) -> list[Box]:
    """The point's name at the freest place near its highest or lowest mark, a thin line where it is not next to it."""
    rates = [rate for rate in (point.ours, point.eager, point.peer) if rate]
    half, tall = _LETTER * len(point.name) / 2, _LINE
    x, _ = at(point.intensity, point.ours)
    found = []
    for across, up in _PLACES:
        rate = max(rates) if up > 0 else min(rates) if up < 0 else point.ours
        _, y = at(point.intensity, rate)
        middle = (x + across * (half + 0.07), y + up * tall)
        box = (middle[0] - half, middle[1] - tall / 2, middle[0] + half, middle[1] + tall / 2)
        if box[0] < 0 or box[1] < 0 or box[2] > inches[0] or box[3] > inches[1]:
            continue
        steps = [((middle[0] - x) * part, (middle[1] - y) * part) for part in (0.2, 0.35, 0.5, 0.65)]
        way = [_around((x + dx, y + dy), 0.02) for dx, dy in steps]
        hits = sum(_overlap(box, mine) for mine in own)
        hits += sum(_overlap(box, other) + sum(_overlap(step, other) for step in way) for other in taken)
        far = math.hypot(middle[0] - x - 0.5 * half * across, middle[1] - y)
        found.append((1e3 * hits + far, middle, rate, abs(up) > 1, [box, *way]))
    if not found:
        return []
    _, (cx, cy), rate, is_far, boxes = min(found)
    axes.annotate(
        point.name, (point.intensity, rate), (cx / inches[0], cy / inches[1]), textcoords="axes fraction",
        ha="center", va="center", zorder=5,
        arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkB": 3} if is_far else None,
    )  # fmt: skip
    return boxes


def growth(title: str, unit: str, curves: Sequence[Curve], ideal: Sequence[tuple[float, float]], across: str) -> Panel:
    """Times by size, both logarithmic; dashed: the least time at the machine's measured ceilings."""
    names = [curve.name for curve in curves]
    left, right, bottom, height = 0.66, 0.14 + _LETTER * max(map(len, [*names, "least"])), 0.5, 1.6
    sizes = sorted({x for curve in curves for x, _ in curve.points})
    times = [y for curve in curves for _, y in curve.points] + [y for _, y in ideal]
    x_ends, y_ends = (sizes[0] / 1.12, sizes[-1] * 1.12), (min(times) / 1.25, max(times) * 1.25)

    def draw(axes: Any) -> None:
        _logarithmic(axes, x_ends, y_ends)
        axes.set_xticks(_apart(sizes, x_ends, WIDTH - left - right), minor=False)
        axes.set_xticklabels([f"{x:.0f}" for x in axes.get_xticks()])
        axes.set_xlabel(across, labelpad=2)
        axes.set_ylabel(unit, labelpad=2)
        ends = []
        if ideal:
            axes.plot(*zip(*ideal, strict=True), color=INK, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
            ends.append(("least", MUTED, ideal[-1][1]))
        for curve in curves:
            thick = 2.2 if curve.colour == OURS else 1.4
            axes.plot(*zip(*curve.points, strict=True), color=curve.colour, linewidth=thick, marker="o", ms=3.6)
            ends.append((curve.name, curve.colour, curve.points[-1][1]))
        wanted = [height * _share(y, y_ends) for _, _, y in ends]
        for (name, colour, y), place in zip(ends, _spread(wanted, _LINE, height), strict=True):
            bold = "bold" if colour == OURS else "normal"
            spot = (1 + 0.08 / (WIDTH - left - right), place / height)
            line = {
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.7,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 2,
            }
            axes.annotate(
                name, (sizes[-1], y), spot, textcoords="axes fraction", va="center", arrowprops=line,
                weight=bold, color=INK if colour != MUTED else MUTED, annotation_clip=False,
            )  # fmt: skip

    return Panel(title, height, left, right, bottom, draw)


def power(points: Sequence[tuple[float, float]], letter: str = "N") -> str:
    """The exponent of the growth from the first point to the last: "N¹·⁹"."""
    (x, t), (x_last, t_last) = points[0], points[-1]
    if x == x_last:
        return letter
    return letter + f"{math.log(t_last / t) / math.log(x_last / x):.1f}".translate(_SUPERSCRIPTS)


def _logarithmic(axes: Any, x_ends: tuple[float, float], y_ends: tuple[float, float]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(*x_ends)
    axes.set_ylim(*y_ends)
    axes.minorticks_off()
    for axis, ends, least in ((axes.xaxis, x_ends, 3), (axes.yaxis, y_ends, 3)):
        ticks = _ticks(ends, least)
        axis.set_ticks(ticks, [_short(tick) for tick in ticks])
    axes.tick_params(length=0, pad=3)
    axes.grid(color=RULE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _ticks(ends: tuple[float, float], least: int) -> list[float]:
    """Powers of ten between the ends, with 3 or with 2 and 5 between them where these alone are too few."""
    decades = range(math.floor(math.log10(ends[0])), math.ceil(math.log10(ends[1])) + 1)
    ticks: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        ticks = [tick for tick in ticks if ends[0] <= tick <= ends[1]]
        if len(ticks) >= least:
            break
    return ticks


def _apart(sizes: Sequence[float], ends: tuple[float, float], inches: float) -> list[float]:
    """Those sizes, from the largest down, whose numbers do not touch."""
    kept: list[float] = []
    for size in reversed(sizes):
        room = _LETTER * (len(f"{size:.0f}") + 1)
        if not kept or inches * (_share(kept[0], ends) - _share(size, ends)) >= room:
            kept.insert(0, size)
    return kept


def _spread(wanted: Sequence[float], apart: float, high: float) -> list[float]:
    """Places near the wanted ones, none nearer to another than that, all between 0 and high if they fit."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [wanted[i] for i in order]
    for _ in range(60):
        placed[0], placed[-1] = max(placed[0], apart / 2), min(placed[-1], high - apart / 2)
        for i in range(1, len(placed)):
            lack = apart - (placed[i] - placed[i - 1])
            if lack > 0:
                placed[i - 1] -= lack / 2
                placed[i] += lack / 2
    found = [0.0] * len(wanted)
    for i, place in zip(order, placed, strict=True):
        found[i] = place
    return found


def _share(value: float, ends: tuple[float, float]) -> float:
    return math.log(value / ends[0]) / math.log(ends[1] / ends[0])


def _steps(ends: tuple[float, float], count: int = 60) -> Iterable[float]:
    return (ends[0] * (ends[1] / ends[0]) ** (i / count) for i in range(count + 1))


def _around(place: tuple[float, float], half: float) -> Box:
    x, y = place
    return x - half, y - half, x + half, y + half


def _overlap(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _write(axes: Any, at: Any, where: tuple[float, float], text: str) -> Box:
    axes.text(*where, text, ha="right", va="center", color=MUTED)
    x, y = at(*where)
    return x - _LETTER * len(text), y - _LINE / 2, x, y + _LINE / 2


def _rate(giga: float, unit: str) -> str:
    """780,000 -> 780 TFLOP/s."""
    return f"{giga / 1e3:,.3g} T{unit}" if giga >= 1e3 else f"{giga:,.3g} G{unit}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
