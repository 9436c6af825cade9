"""Which pictures there are, and which rows and columns each is drawn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import bar_panels, charts, curve_panels
from .charts import EAGER, OURS, PEER, Panel
from .rows import KEY, MODEL, OP, of_level
from .standings import Standing, order, standings

Row = Mapping[str, object]

_ALWAYS = (*KEY, "level", "status", "eager", "date", "fastvit", "torch", "commit")
_TIMES = ("median_ms", "p20_ms", "p80_ms", "ratio")
_WORK = ("flops", "bytes", "ceiling_gflops", "ceiling_gbs")
_BARS = (("fastvit", OURS), ("the best other", PEER), ("eager = 1", EAGER))
_WHISKERS = "Whiskers: 20th to 80th percentile of the rounds. White dots: the other providers beside the best. "


@dataclass(frozen=True)
class Picture:
    """A picture of one device: what it says above and below, its rows' levels and columns, and its panels."""

    title: str
    key: tuple[tuple[str, str], ...]
    note: str
    levels: tuple[str, ...]
    columns: tuple[str, ...]
    panels: Callable[[Sequence[Standing]], list[Panel]]

    def source(self, rows: Iterable[Row]) -> list[dict[str, str]]:
        """All that the picture is drawn from: rows of its levels, cut down to its columns, in order of their keys."""
        kept = (*_ALWAYS, *self.columns)
        chosen = [row for level in self.levels for row in of_level(rows, level)]
        return sorted(({name: text(row.get(name)) for name in kept} for row in chosen), key=order)

    def drawn(self, rows: Iterable[Row]) -> list[Panel]:
        """The panels, none where the rows hold nothing to draw."""
        return self.panels(standings(self.source(rows)))

    def page(self, rows: Iterable[Row], drawn: Sequence[Panel]) -> Any:
        """The panels as one figure."""
        source = self.source(rows)
        tall = sum(panel.outer + 0.6 for panel in drawn)
        columns = 1 if tall < 4 else 2 if tall < 30 else 3 if tall < 90 else 4
        return charts.page(self.title, _where(source), self.key, drawn, [self.note, *_provenance(source)], columns)


def text(value: object) -> str:
    """A cell as it stands in a file, also of rows that were in none yet."""
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _where(rows: Sequence[Row]) -> str:
    return ", ".join(dict.fromkeys(str(row["device"]) for row in rows))


def _provenance(rows: Sequence[Row]) -> list[str]:
    """What failed, who eager is, versions and the days of measuring."""
    failed = sum(row["status"] != "ok" for row in rows)
    days = sorted({str(row["date"])[:10] for row in rows} - {""})
    names = {name: ", ".join(sorted({str(row[name]) for row in rows} - {""})) for name in ("eager", "torch", "fastvit")}
    notes = [f"{failed} of {len(rows)} runs failed their check or broke; they have no speed."] if failed else []
    days = days if len(days) < 2 else [f"{days[0]} to {days[-1]}"]
    return [*notes, f"eager: {names['eager']}; torch {names['torch']}; fastvit {names['fastvit']}; {' '.join(days)}"]


SUMMARY = "summary"  # for the README: few of the cases in "models"

PICTURES: dict[str, Picture] = {
    SUMMARY: Picture(
        "Whole models: speed as a multiple of eager's",
        _BARS,
        _WHISKERS + "The axis is logarithmic.",
        (MODEL,),
        (*_TIMES, "flops"),
        bar_panels.chosen,
    ),
    "models": Picture(
        "Whole models: speed as a multiple of eager's",
        _BARS,
        _WHISKERS + "The axis is logarithmic: half and double speed are equally far from eager.",
        (MODEL,),
        (*_TIMES, "flops"),
        bar_panels.models,
    ),
    "ops": Picture(
        "Single ops: speed as a multiple of eager's",
        _BARS,
        "Shapes: batch × tokens × width. " + _WHISKERS + "The axis is logarithmic.",
        (OP,),
        _TIMES,
        bar_panels.ops,
    ),
    "roofline": Picture(
        "Roofline: what is reached of what the machine can do",
        (("fastvit", OURS), ("the best other", PEER), ("eager", EAGER), ("diamonds: models", charts.INK)),
        "Work by formula: FLOPs of the matrix products, and bytes if each input is read and each output written once. "
        "Roof: medians of a plain copy and of the fastest arithmetic measured between rounds; a point may touch it. "
        "Named: the largest shape of each op and model; small dots: fastvit at the other shapes. An op without a "
        "product has no place there: its GB/s stand beside the copy's, which tensors that fit into a cache may pass.",
        (OP, MODEL),
        ("median_ms", "p20_ms", "p80_ms", "ratio", *_WORK),
        curve_panels.roofline,
    ),
    "growth": Picture(
        "Growth: time by batch, tokens and width",
        (("fastvit", OURS), ("others", PEER), ("eager", EAGER), ("dashed: least time", charts.INK)),
        "Both axes logarithmic. Dashed: the least time for the case's FLOPs and bytes at the rates measured beside it; "
        "its slope is the ideal one. Exponents: growth from the first to the last point.",
        (MODEL, OP),
        ("median_ms", "ratio", *_WORK),
        curve_panels.growth,
    ),
    "memory": Picture(
        "Memory that one call adds, at its highest",
        (("fastvit", OURS), ("eager", EAGER), ("others", PEER)),
        "MiB beside weights and inputs, logarithmic, what is below 0.5 at the left end. Engines that keep their "
        "buffers between calls add nothing here.",
        (MODEL,),
        ("median_ms", "ratio", "flops", "peak_mib"),
        bar_panels.memory,
    ),
}
