"""Panels of curves from rows: what is reached under the roofline, and how time grows with batch and tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from . import charts, curves
from .cases import FORWARD
from .charts import EAGER, OURS, PEER, Entry, Mark, Panel, Scale
from .standings import Standing, ceilings, grouped, is_sound, number, provider

Row = Mapping[str, object]

_OWN_WIDTH, _OWN_TOKENS = 768, 197  # ViT-B's: of several, those whose growth is drawn
_MOST_PEERS = 2  # lines beside eager and fastvit


def roofline(found: Sequence[Standing]) -> list[Panel]:
    """A roofline for ops and for models in each dtype and direction; GB/s for the ops that have no product."""
    drawn, moving = [], []
    for (is_op, *_), members in grouped(found, lambda s: (s.is_op, s.direction, s.dtype)).items():
        gflops, gbs = ceilings(row for s in members for row in s.rows)
        counted = [s for s in members if is_sound(s.ours) and _work(s)]
        if counted and gflops and gbs:
            largest = grouped(counted, lambda s: s.subject).values()
            named = {id(max(group, key=lambda s: _work(s)[0])) for group in largest}
            points = [_point(s, id(s) in named) for s in counted]
            title = members[0].heading(members[0].dtype, "ops" if is_op else "models")
            drawn.append(curves.roofline(title, points, gflops, gbs))
        still = [s for s in members if is_op and is_sound(s.ours) and not number(s.ours, "flops")]
        moving += [group for group in grouped(still, lambda s: s.subject).values() if gbs]
    return [*drawn, *map(_bandwidth, moving)]


def _work(s: Standing) -> tuple[float, float]:
    """FLOPs and bytes, or nothing where one of them is not known or zero."""
    flops, moved = (number(s.ours, name) for name in ("flops", "bytes"))
    return (flops, moved) if flops and moved else ()  # type: ignore[return-value]


def _point(s: Standing, named: bool) -> curves.Point:
    flops, moved = _work(s)
    ours, eager, peer = (flops / ms / 1e6 if (ms := _ms(row)) else None for row in (s.ours, s.eager, s.peer))
    name = s.subject.removeprefix("linear_") if named else ""
    return curves.Point(flops / moved, ours or 0.0, eager, peer, name, not s.is_op)


def _ms(row: Row | None) -> float | None:
    return number(row, "median_ms") if is_sound(row) else None


def _bandwidth(found: Sequence[Standing]) -> Panel:
    _, gbs = ceilings(row for s in found for row in s.rows)
    entries = []
    for s in found:
        moved = number(s.ours, "bytes") or 0.0
        ours, eager = (_rate(moved, row) for row in (s.ours, s.eager))
        others = tuple(moved / ms / 1e6 for row in s.peers if (ms := _ms(row)))
        entries.append(Entry(f"{s.batch} × {s.size}", "eager", ours, eager, others))
    high = 1.05 * max([gbs or 0.0, *(m.value for e in entries for m in (e.ours, e.other) if m)])
    scale = Scale(0.0, high, ((gbs or 0.0, f"copy {_gbs(gbs or 0.0)}"),), base=0.0, rule=gbs, logarithmic=False)
    title = found[0].heading(found[0].subject, found[0].dtype)
    return charts.bars(title, entries, scale, charts.margins(entries), EAGER)


def _rate(moved: float, row: Row | None) -> Mark | None:
    ms = _ms(row)
    if ms is None:
        return None
    low, high = (moved / (number(row, column) or ms) / 1e6 for column in ("p80_ms", "p20_ms"))
    return Mark(moved / ms / 1e6, low, high, f"{_gbs(moved / ms / 1e6)} GB/s")


def _gbs(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def growth(found: Sequence[Standing]) -> list[Panel]:
    """Models by batch; ops by tokens, by batch and by width."""
    ops = [s for s in found if s.is_op]
    return [*_by_batch([s for s in found if not s.is_op]), *_by_tokens(ops), *_by_batch(ops), *_by_width(ops)]


def _by_tokens(found: Sequence[Standing]) -> list[Panel]:
    """Of each op, dtype and direction the largest batch, at ViT-B's width if it was measured."""
    drawn = []
    for members in grouped(found, lambda s: (s.subject, s.dtype, s.direction)).values():
        lines = grouped(members, lambda s: (s.width == _OWN_WIDTH, s.batch, s.width)).values()
        line = max((sorted(line, key=lambda s: s.tokens) for line in lines if len(line) > 2), key=_wide, default=None)
        if line:
            title = line[0].heading(line[0].subject, line[0].dtype, f"batch {line[0].batch}")
            drawn.append(_grown(title, line, lambda s: s.tokens, "tokens N"))
    return drawn


def _by_width(found: Sequence[Standing]) -> list[Panel]:
    """Of each op's forward and dtype the largest batch with more than three widths."""
    drawn = []
    for members in grouped(found, lambda s: (s.subject, s.dtype)).values():
        forward = [s for s in members if s.direction == FORWARD]
        same = grouped(forward, lambda s: (s.batch, s.tokens)).values()
        lines = [sorted(line, key=lambda s: s.width) for line in same if len({s.width for s in line}) > 3]
        line = max(lines, key=lambda line: (line[0].batch, line[0].tokens == _OWN_TOKENS), default=None)
        if line:
            title = line[0].heading(line[0].subject, line[0].dtype, f"{line[0].batch} × {line[0].tokens}")
            drawn.append(_grown(title, line, lambda s: s.width, "width D"))
    return drawn


def _wide(line: Sequence[Standing]) -> tuple:
    return line[0].width == _OWN_WIDTH, line[0].batch, line[0].width


def _by_batch(found: Sequence[Standing]) -> list[Panel]:
    """Of each model, size, dtype and direction; of each op's forward the line with most batches."""
    drawn = []
    for members in grouped(found, lambda s: (s.subject, s.dtype, s.direction)).values():
        lines = [sorted(line, key=lambda s: s.batch) for line in grouped(members, lambda s: s.dimensions[1:]).values()]
        lines = [line for line in lines if len({s.batch for s in line}) > 1]
        if members[0].is_op:
            best = max(lines, key=_usual, default=None)
            lines = [best] if best and best[0].direction == FORWARD else []
        for line in lines:
            title = line[0].heading(line[0].name, line[0].dtype)
            drawn.append(_grown(title, line, lambda s: s.batch, "batch B", per_image=True))
    return drawn


def _usual(line: Sequence[Standing]) -> tuple:
    return len(line), line[0].width == _OWN_WIDTH, line[0].tokens == _OWN_TOKENS


def _grown(
    title: str, line: Sequence[Standing], size: Callable[[Standing], int], across: str, per_image: bool = False
) -> Panel:
    micro = max((_ms(row) or 0.0) / (s.batch if per_image else 1) for s in line for row in s.rows) < 1.0
    unit = ("µs" if micro else "ms") + (" per image" if per_image else "")

    def point(s: Standing, ms: float | None) -> list[tuple[float, float]]:
        return [] if ms is None else [(float(size(s)), ms * (1e3 if micro else 1.0) / (s.batch if per_image else 1))]

    def times(name: str) -> tuple[tuple[float, float], ...]:
        return tuple(at for s in line for at in point(s, _ms(s.ours if name == "fastvit" else s.of(name))))

    found = [("eager", EAGER), *zip(_steady_peers(line), (PEER, charts.SECOND), strict=False), ("fastvit", OURS)]
    drawn = []
    for name, colour in found:
        if len(points := times(name)) > 1:
            exponent = "" if per_image else " " + curves.power(points, across[-1])
            drawn.append(curves.Curve(provider({"provider": name}) + exponent, colour, points))
    ideal = [at for s in line for at in point(s, _least_ms(s))]
    return curves.growth(title, unit, drawn, ideal, across)


def _steady_peers(line: Sequence[Standing]) -> list[str]:
    """The fastest of those that were measured at every size."""
    everywhere = set.intersection(*({str(row["provider"]) for row in s.peers} for s in line))
    last = [str(row["provider"]) for row in line[-1].peers]
    return [name for name in last if name in everywhere][:_MOST_PEERS]


def _least_ms(s: Standing) -> float | None:
    """What the case's least work takes at the rates measured beside it."""
    flops, moved = (number(s.first, name) or 0.0 for name in ("flops", "bytes"))
    gflops, gbs = ceilings(s.rows)
    return max(flops / gflops, moved / gbs) / 1e6 if gflops and gbs else None
