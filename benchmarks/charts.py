"""How bars and dots are drawn, and how panels make a page: each stands in a PNG beside others, or alone as SVG."""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

# Okabe and Ito's palette, told apart by readers with any colour vision; eager is grey because it is the yardstick.
# A report replaces these by what suits a light and a dark page (`report_style.py`).
INK, MUTED, RULE = "#1f2328", "#59636e", "#d0d7de"
EAGER, OURS, PEER, FAILED = "#8c8c8c", "#0072b2", "#e69f00", "#b3261e"
SECOND, THIRD = "#009e73", "#cc79a7"

SIZE = 9.6  # points, all over: on a phone 390 pixels wide a panel of WIDTH is scaled so that this is 14 pixels
WIDTH = 3.4
_GAP, _BELOW, _TITLE, _MARGIN = 0.3, 0.14, 0.3, 0.25
_LINE = 0.17  # of text, in inches
_ONE_LINE, _TWO_LINES, _FIRST, _SECOND = 0.27, 0.45, 0.135, 0.306  # an entry's height, and its lines from its top
_LETTER = 0.081  # the width of one, in inches, on the safe side


@dataclass(frozen=True)
class Panel:
    """One small picture: a title, the height of its axes, what is left free around them, all in inches."""

    title: str
    height: float
    left: float
    right: float
    bottom: float
    draw: Callable[[Any], None] = field(repr=False)

    @property
    def outer(self) -> float:
        """The height with everything but the title."""
        return self.height + self.bottom


@dataclass(frozen=True)
class Mark:
    """A measured value, the whisker around it and what stands beside it."""

    value: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Entry:
    """Two bars under each other, each with its name: fastvit's, and what it is held against; dots for the rest."""

    name: str
    under: str
    ours: Mark | None
    other: Mark | None
    dots: tuple[float, ...] = ()
    failed: str = ""


@dataclass(frozen=True)
class Scale:
    """The axis that all bars of a picture share: ends, ticks, where bars begin and the line they are held to."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    base: float
    rule: float | None
    logarithmic: bool = True


@contextmanager
def style() -> Iterator[None]:
    """The looks of every chart, whatever the reader's matplotlib is set to; SVG keeps its text as text."""
    import matplotlib

    ours = {
        "font.family": ["DejaVu Sans"],
        "font.size": SIZE,
        "text.color": INK,
        "axes.edgecolor": RULE,
        "axes.labelcolor": MUTED,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "svg.fonttype": "none",
        "svg.hashsalt": "fastvit",
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(ours)
        yield


def margins(entries: Iterable[Entry]) -> tuple[float, float]:
    """Inches that names take at the left and values at the right: the same for all panels of a picture."""
    entries = list(entries)
    left = _room(text for entry in entries for text in (entry.name, entry.under))
    return left, _room(mark.text for entry in entries for mark in (entry.ours, entry.other) if mark)


def bars(title: str, entries: Sequence[Entry], scale: Scale, free: tuple[float, float], other: str = PEER) -> Panel:
    """A panel of bars. Every value is written out, so the axis has few ticks; no bar where there is no speed."""
    left, right = free
    tops, height = _tops(entries)

    def draw(axes: Any) -> None:
        _axis(axes, height, scale)
        for top, entry in zip(tops, entries, strict=True):
            upper, lower = top + _FIRST, top + _SECOND
            _names(axes, entry, (upper, lower), left)
            if entry.failed:
                _beside(axes, scale.base, upper, entry.failed, color=FAILED, weight="bold")
            seen = [value for value in entry.dots if scale.low <= value <= scale.high]
            _bar(axes, entry.ours, upper, scale, OURS)
            _bar(axes, entry.other, lower, scale, other, seen)
            axes.plot(seen, [lower] * len(seen), "o", color="white", mec=INK, mew=0.7, ms=3, zorder=4)

    return Panel(title, height, left, right, 0.28, draw)


def pairs(title: str, entries: Sequence[Entry], scale: Scale, free: tuple[float, float]) -> Panel:
    """A panel of dots: eager's value joined to fastvit's, and hollow dots for the others. Names carry the values."""
    left, _ = free
    tops, height = _tops(entries)

    def draw(axes: Any) -> None:
        _axis(axes, height, scale)
        for top, entry in zip(tops, entries, strict=True):
            middle = top + (_FIRST + _SECOND) / 2
            _names(axes, entry, (top + _FIRST, top + _SECOND), left)
            ends = [max(mark.value, scale.low) for mark in (entry.other, entry.ours) if mark]
            axes.plot(ends, [middle] * len(ends), color=RULE, linewidth=2.5, solid_capstyle="round", zorder=1)
            dots = [max(value, scale.low) for value in entry.dots]
            axes.plot(dots, [middle] * len(dots), "o", color="none", mec=PEER, mew=1.4, ms=6, zorder=2, clip_on=False)
            for mark, colour in ((entry.other, EAGER), (entry.ours, OURS)):
                if mark:
                    axes.plot(max(mark.value, scale.low), middle, "o", color=colour, ms=8, zorder=3, clip_on=False)

    return Panel(title, height, left, 0.2, 0.28, draw)


def _tops(entries: Sequence[Entry]) -> tuple[list[float], float]:
    """Where each entry begins and where all end, in inches: one with a single name takes a single line."""
    heights = [_TWO_LINES if entry.under else _ONE_LINE for entry in entries]
    *tops, end = itertools.accumulate(heights, initial=0.0)
    return tops, end


def _axis(axes: Any, height: float, scale: Scale) -> None:
    """Sizes run along x, inches down from the top along y."""
    if scale.logarithmic:
        axes.set_xscale("log")
    axes.set_xlim(scale.low, scale.high)
    axes.set_ylim(height, 0)
    axes.minorticks_off()
    axes.set_xticks([at for at, _ in scale.ticks], [text for _, text in scale.ticks])
    axes.set_yticks([])
    axes.tick_params(axis="x", length=0, pad=3)
    axes.grid(axis="x", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    if scale.rule is not None:
        axes.axvline(scale.rule, color=EAGER, linewidth=1.2, zorder=1)
    axes.spines[:].set_visible(False)


def _names(axes: Any, entry: Entry, places: tuple[float, float], left: float) -> None:
    for text, place, looks in zip(
        (entry.name, entry.under), places, ({"weight": "bold"}, {"color": MUTED}), strict=True
    ):
        axes.annotate(
            text, (0, place), (-72 * left, 0), ("axes fraction", "data"), "offset points", va="center", **looks
        )


def _bar(axes: Any, mark: Mark | None, place: float, scale: Scale, colour: str, beyond: Sequence[float] = ()) -> None:
    if mark is None:
        return
    value, low, high = (min(max(end, scale.low), scale.high) for end in (mark.value, mark.low, mark.high))
    axes.barh(place, value - scale.base, left=scale.base, height=0.14, color=colour, zorder=2)
    axes.plot((low, high), (place, place), color=INK, linewidth=0.9, solid_capstyle="butt", zorder=3)
    _beside(
        axes, max(value, high, scale.base, *beyond), place, mark.text, weight="bold" if colour == OURS else "normal"
    )


def _beside(axes: Any, at: float, place: float, text: str, **looks: Any) -> None:
    axes.annotate(text, (at, place), (4, 0), textcoords="offset points", va="center", annotation_clip=False, **looks)


def _room(texts: Iterable[str]) -> float:
    """Inches that the longest of these takes, and a little air."""
    return 0.12 + _LETTER * max(map(len, texts), default=0)


def page(
    title: str, where: str, key: Sequence[tuple[str, str]], panels: Sequence[Panel], notes: Sequence[str], columns: int
) -> Any:
    """Panels in columns that fill one after the other, below a title and a key of coloured words, above notes."""
    columns = max(1, min(columns, len(panels)))
    stacks = _stacked(panels, columns)
    width = 2 * _MARGIN + columns * WIDTH + (columns - 1) * _GAP
    body = max(sum(_TITLE + panel.outer + _BELOW for panel in stack) for stack in stacks)
    notes = [line for note in notes for line in textwrap.wrap(note, int((width - 2 * _MARGIN) / (0.86 * _LETTER)))]
    head, foot = 1.05, _MARGIN + _LINE * len(notes)
    figure = _blank(width, head + body + foot)
    tall = head + body + foot
    figure.text(_MARGIN / width, 1 - 0.32 / tall, title, size=15, weight="bold", va="center")
    figure.text(_MARGIN / width, 1 - 0.58 / tall, where, color=MUTED, va="center")
    _key(figure, key, 1 - 0.82 / tall)
    for column, stack in enumerate(stacks):
        x, y = _MARGIN + column * (WIDTH + _GAP), tall - head
        for panel in stack:
            figure.text(x / width, (y - 0.13) / tall, panel.title, size=10.5, weight="bold", va="center")
            y -= _TITLE + panel.outer
            _place(figure, panel, x, y)
            y -= _BELOW
    for number, line in enumerate(notes):
        figure.text(_MARGIN / width, (foot - (number + 0.5) * _LINE) / tall, line, size=8.4, color=MUTED, va="center")
    return figure


def _stacked(panels: Sequence[Panel], columns: int) -> list[list[Panel]]:
    """Panels in order, each column closed once it is as high as an even share."""
    heights = [_TITLE + panel.outer + _BELOW for panel in panels]
    stacks: list[list[Panel]] = [[] for _ in range(columns)]
    reached, share = 0.0, sum(heights) / columns
    for panel, height in zip(panels, heights, strict=True):
        stacks[min(columns - 1, int((reached + height / 2) / share))].append(panel)
        reached += height
    return [stack for stack in stacks if stack]


def _key(figure: Any, key: Sequence[tuple[str, str]], y: float) -> None:
    """Words in the colours they stand for, one after the other."""
    width = figure.get_figwidth()
    x = _MARGIN
    for text, colour in key:
        figure.text(x / width, y, "●", color=colour, va="center")
        figure.text((x + 0.16) / width, y, text, color=INK, va="center")
        x += 0.16 + _LETTER * len(text) + 0.12


def alone(panel: Panel) -> str:
    """A panel without its title as the text of an SVG element, with letters as letters."""
    tall = panel.outer + 0.08
    figure = _blank(WIDTH, tall)
    figure.patch.set_visible(False)
    _place(figure, panel, 0.0, 0.0)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return text.getvalue()


def _place(figure: Any, panel: Panel, x: float, y: float) -> None:
    width, tall = figure.get_size_inches()
    inner = WIDTH - panel.left - panel.right
    box = ((x + panel.left) / width, (y + panel.bottom) / tall, inner / width, panel.height / tall)
    axes = figure.add_axes(box)
    axes.patch.set_visible(False)
    panel.draw(axes)


def _blank(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure
