"""Panels of bars and dots from rows: whole models and ops by their ratio to eager, models by their memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from . import charts, summary
from .cases import INT8
from .charts import Entry, Mark, Panel, Scale
from .standings import Standing, grouped, is_sound, number, provider

Row = Mapping[str, object]


def models(found: Sequence[Standing]) -> list[Panel]:
    """A panel for each direction, dtype and batch."""
    return _ratios(found, lambda s: (s.direction, s.dtype, s.batch), _model_heading, lambda s: s.name)


def _model_heading(s: Standing) -> str:
    return s.heading(_dtype(s), f"batch {s.batch}")


def _dtype(s: Standing) -> str:
    return "int8 (eager: float32)" if s.dtype == INT8 else s.dtype


def chosen(found: Sequence[Standing]) -> list[Panel]:
    """The models that the README shows."""
    return models(summary.models(found))


def ops(found: Sequence[Standing]) -> list[Panel]:
    """A panel for each op, dtype and direction; entries are shapes, batch × tokens × width."""
    return _ratios(
        found,
        lambda s: (s.subject, s.dtype, s.direction),
        lambda s: s.heading(s.subject, s.dtype),
        lambda s: f"{s.batch} × {s.size}",
    )


def _ratios(
    found: Sequence[Standing],
    group: Callable[[Standing], tuple],
    title: Callable[[Standing], str],
    name: Callable[[Standing], str],
) -> list[Panel]:
    entries = {key: [(s, _ratio_entry(s, name(s))) for s in members] for key, members in grouped(found, group).items()}
    marks = [mark for pairs in entries.values() for _, e in pairs for mark in (e.ours, e.other) if mark]
    values = [mark.value for mark in marks]
    low = max(0.12, min([0.75, *(0.92 * value for value in values)]))
    high = max([2.0, *(1.05 * value for value in values)])
    apart = 1 if high / low < 2**5 else 2  # doublings between two ticks, so that their numbers do not touch
    ticks = tuple((2.0**i, _multiple(2.0**i)) for i in range(-2, 12, apart) if low <= 2.0**i <= high)
    scale = Scale(low, high, ticks, base=1.0, rule=1.0)
    free = charts.margins(entry for pairs in entries.values() for _, entry in pairs)
    return [charts.bars(title(pairs[0][0]), [entry for _, entry in pairs], scale, free) for pairs in entries.values()]


def _multiple(value: float) -> str:
    return f"{({0.25: '¼', 0.5: '½'}).get(value, f'{value:.0f}')}×"


def _ratio_entry(s: Standing, name: str) -> Entry:
    failed = "" if s.ours is None or is_sound(s.ours) else str(s.ours["status"])
    return Entry(
        name,
        provider(s.peer) if s.peer else "",
        _ratio_mark(s, s.ours),
        _ratio_mark(s, s.peer),
        tuple(ratio for row in s.peers[1:] if (ratio := s.ratio(row))),
        failed,
    )


def _ratio_mark(s: Standing, row: Row | None) -> Mark | None:
    ratio = s.ratio(row)
    if ratio is None:
        return None
    middle = number(row, "median_ms") or 1.0
    low, high = (ratio * middle / (number(row, column) or middle) for column in ("p80_ms", "p20_ms"))
    return Mark(ratio, low, high, f"{ratio:.2f}×")


def memory(found: Sequence[Standing]) -> list[Panel]:
    """A panel for each direction, dtype and batch of the models whose memory was seen."""
    pairs = grouped(
        [s for s in found if number(s.ours, "peak_mib") is not None and number(s.eager, "peak_mib") is not None],
        lambda s: (s.direction, s.dtype, s.batch),
    )
    entries = {key: [_memory_entry(s) for s in members] for key, members in pairs.items()}
    seen = [value for e in itertools.chain(*entries.values()) for value in (e.ours.value, e.other.value, *e.dots)]  # type: ignore[union-attr]
    if not seen:
        return []
    high = max(*seen, 2.0) * 1.05
    ticks = ((0.5, "≤½"), *((10.0**i, f"{10**i:,}") for i in range(1, 7) if 10.0**i <= high))
    scale = Scale(0.5, high, ticks, base=0.5, rule=None)
    free = charts.margins(itertools.chain(*entries.values()))
    return [charts.pairs(_model_heading(members[0]), entries[key], scale, free) for key, members in pairs.items()]


def _memory_entry(s: Standing) -> Entry:
    ours, eager = (number(row, "peak_mib") or 0.0 for row in (s.ours, s.eager))
    others = tuple(value for row in s.peers if (value := number(row, "peak_mib")) is not None)
    text = f"{_mib(ours)} MiB, eager {_mib(eager)}"
    return Entry(s.name, text, Mark(ours, ours, ours, ""), Mark(eager, eager, eager, ""), others)


def _mib(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
