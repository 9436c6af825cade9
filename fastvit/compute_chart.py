"""Models by what they cost: figures 5 and 12 without the accuracy, which takes the training of every model."""

from collections.abc import Iterable, Sequence
from typing import Any

from .compute import Row
from .figures import blank

# Okabe and Ito's colours, told apart by readers with any colour vision, and a marker each for those who print in grey
_LOOKS = {"ResNet": ("#595959", "s"), "hybrid": ("#e69f00", "D"), "ViT": ("#0072b2", "o")}
_ASKED = "#d55e00"
_PLACES = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, 1), (-1, 1), (1, -1), (-1, -1))  # of a label around its point


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
    """Each name beside its point, where it covers no point, no other name and not the legend."""
    from matplotlib.transforms import Bbox

    figure.canvas.draw()  # places the axes, so that points have a place in pixels
    taken = [axes.get_legend().get_window_extent()] if axes.get_legend() else []
    for points in axes.collections:
        for x, y in axes.transData.transform(points.get_offsets()):
            taken.append(Bbox.from_extents(x - 6, y - 6, x + 6, y + 6))
    for row in rows:
        crowded: list[tuple[int, Any, Any]] = []
        for right, up in _PLACES:
            text = axes.annotate(
                row.name,
                (row.gmacs, row.parameters / 1e6),
                xytext=(7 * right, 7 * up),
                textcoords="offset points",
                ha=("center", "left", "right")[right],
                va=("center", "bottom", "top")[up],
                size=9,
                color=_LOOKS[row.family][0] if row.family != "hybrid" else "#9a6a00",
            )
            box = text.get_window_extent()
            crowded.append((sum(box.overlaps(other) for other in taken), text, box))
            if not crowded[-1][0]:
                break
        _, best, box = min(crowded, key=lambda place: place[0])
        for _, text, _ in crowded:
            if text is not best:
                text.remove()
        taken.append(box)
