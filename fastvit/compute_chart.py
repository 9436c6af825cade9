"""Models by what they cost: figures 5 and 12 without the accuracy, which takes the training of every model."""

from collections.abc import Iterable, Sequence
from typing import Any

from .compute import Row
from .figures import blank

# Okabe and Ito's colours, told apart by readers with any colour vision, and a marker each for those who print in grey
_LOOKS = {"ResNet": ("#595959", "s"), "hybrid": ("#e69f00", "D"), "ViT": ("#0072b2", "o")}
_TEXT = {"ResNet": "#595959", "hybrid": "#9a6a00", "ViT": "#0072b2"}  # of names: darker where a letter needs it
_ASKED = "#d55e00"
_PLACES = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, 1), (-1, 1), (1, -1), (-1, -1))  # of a label around its point
_ROUNDS = 3  # in which every label chooses among its places, those of the others being what they are


def chart(rows: Sequence[Row]) -> Any:
    """Multiply-adds of one image against parameters, both logarithmic, in the manner of figure 5: a point for each row.

    Families have a colour and a marker of their own; rows that were asked for are stars.
    """
    figure = blank(7.0, 4.6)
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    for family, (colour, marker) in _LOOKS.items():
        members = [row for row in rows if row.family == family and not row.asked]
        x, y = [row.gmacs for row in members], [row.parameters / 1e6 for row in members]
        if members:
            axes.scatter(x, y, s=46, color=colour, marker=marker, label=family, zorder=3)
    for row in rows:
        if row.asked:
            point = ([row.gmacs], [row.parameters / 1e6])
            axes.scatter(*point, s=230, color=_ASKED, marker="*", label=row.name, zorder=4, edgecolor="white")
    axes.margins(0.13)
    axes.set_xlabel("GMACs for one image")
    axes.set_ylabel("parameters (millions)")
    for axis in (axes.xaxis, axes.yaxis):
        _ticks(axis)
    axes.grid(True, which="major", color="#d0d7de", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", fontsize=9, framealpha=0.9)
    axes.set_title("compute of ResNets, hybrids and Vision Transformers", size=10)
    _label(figure, axes, [row for row in rows if not row.asked])
    return figure


def _ticks(axis: Any) -> None:
    """1, 2, 5, 10, ... written as they are."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _label(figure: Any, axes: Any, rows: Iterable[Row]) -> None:
    """Each name beside its point, where it covers least of the points, the other names and the legend."""
    from matplotlib.transforms import Bbox

    figure.canvas.draw()  # places the axes, so that points have a place in pixels
    taken = [axes.get_legend().get_window_extent()] if axes.get_legend() else []
    for points in axes.collections:
        for x, y in axes.transData.transform(points.get_offsets()):
            taken.append(Bbox.from_extents(x - 6, y - 6, x + 6, y + 6))
    names = []
    for row in rows:
        point, colour = (row.gmacs, row.parameters / 1e6), _TEXT[row.family]
        names.append(axes.annotate(row.name, point, (7, 0), textcoords="offset points", size=9, color=colour))
    boxes = [_put(name, _PLACES[0]) for name in names]
    for _ in range(_ROUNDS):
        for number, name in enumerate(names):
            others = [*taken, *boxes[:number], *boxes[number + 1 :]]
            best = min(_PLACES, key=lambda place: sum(_shared(_put(name, place), other) for other in others))
            boxes[number] = _put(name, best)


def _put(name: Any, place: tuple[int, int]) -> Any:
    """Put a name at one of the places around its point; the box that it takes there."""
    right, up = place
    name.set_position((7 * right, 7 * up))
    name.set_horizontalalignment(("center", "left", "right")[right])
    name.set_verticalalignment(("center", "bottom", "top")[up])
    return name.get_window_extent()


def _shared(a: Any, b: Any) -> float:
    """The area that two boxes share."""
    wide = min(a.x1, b.x1) - max(a.x0, b.x0)
    tall = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(wide, 0.0) * max(tall, 0.0)
